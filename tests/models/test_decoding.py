"""The decode loop, beside transformers' own and beside rows that run alone."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

from persona_lora.core.lora_diff import BaseModel, LoRAFactors
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models import decoding, generation
from persona_lora.models.decoding import RoomyLayer, decodes
from persona_lora.models.generation import RowPlan, generate_answers
from persona_lora.steering.activations import ActivationSteerer
from persona_lora.steering.live import LiveLoRA
from persona_lora.steering.steerer import Together, select_batch

TEXTS = ["a", "a longer question", "mid", "a very much longer question than the others", "z"]
ASKED = [[{"role": "user", "content": text}] for text in TEXTS]
STEPS = 12


def noted_tokens(monkeypatch):
    """Return a list that will hold the tokens of every step."""
    said = []
    step = decoding.Decoding.step

    def noted(self, tokens):
        said.append(tokens)
        return step(self, tokens)

    monkeypatch.setattr(decoding.Decoding, "step", noted)
    return said


@pytest.fixture
def ending(chat_model, monkeypatch):
    """The model, with tokens that end its answers at steps of their own."""
    chosen = set()
    for temperature in (0.0, 1.0):
        with monkeypatch.context() as context:
            said = noted_tokens(context)
            options = {"temperature": temperature, "seed": 4, "plan": RowPlan(endless=True)}
            generate_answers(chat_model, ASKED, max_new_tokens=STEPS, **options)
        chosen |= {int(said[3][1]), int(said[7][3])}
    settings = chat_model.model.generation_config
    monkeypatch.setattr(settings, "eos_token_id", [chat_model.tokenizer.eos_token_id, *chosen])
    return chat_model


def sizes_of(chat_model, monkeypatch):
    """Return a list that will hold the number of rows of every pass."""
    sizes = []
    run = decoding.Decoding._run

    def noted(self, tokens, places):
        sizes.append(len(tokens))
        return run(self, tokens, places)

    monkeypatch.setattr(decoding.Decoding, "_run", noted)
    return sizes


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_loop_equals_that_of_transformers(ending, monkeypatch, temperature):
    options = {"max_new_tokens": STEPS, "temperature": temperature, "seed": 4}
    assert decodes(ending.model)
    ours = generate_answers(ending, ASKED, **options)
    monkeypatch.setattr(generation, "decodes", lambda model: False)
    assert generate_answers(ending, ASKED, **options) == ours
    assert len({each.num_tokens for each in ours}) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_leave_when_their_answers_end_and_the_others_do_not_notice(
    ending, monkeypatch, temperature
):
    options = {"max_new_tokens": STEPS, "temperature": temperature, "seed": 4}
    alone = [
        generate_answers(ending, [asked], plan=RowPlan(streams=[row]), **options)[0]
        for row, asked in enumerate(ASKED)
    ]
    sizes = sizes_of(ending, monkeypatch)
    assert generate_answers(ending, ASKED, **options) == alone
    steps = [min(each.num_tokens + 1, STEPS) for each in alone]
    assert sizes == [sum(step > at for step in steps) for at in range(max(steps))]
    assert sizes[-1] < sizes[0]


def test_nobody_leaves_where_a_steerer_could_not_be_told(ending, monkeypatch):
    sizes = sizes_of(ending, monkeypatch)
    generate_answers(ending, ASKED, max_new_tokens=STEPS, prepare_batch=lambda rows: None)
    assert set(sizes) == {5}


def steerers(chat_model, make_diff, kind):
    """Return a steerer of twenty rows: each with its own coefficients, or two kinds on a basis."""
    rows = [[at / 4 - 2.0] for at in range(20)]
    model = chat_model.model
    if kind == "basis":
        one, other = make_diff(model, seed=1), make_diff(model, seed=2)
        factors = {
            name: LoRAFactors(one.factors[name].A, each.B) for name, each in other.factors.items()
        }
        family = [one, dataclasses.replace(other, factors=factors)]
        return LiveLoRA(model, family, [[1.0, -1.0]] * 10 + [[-2.0, 0.5]] * 10)
    vector = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    if kind == "lora":
        return LiveLoRA(model, [make_diff(model)], rows)
    steering = SteeringVector(
        {0: vector, 1: vector}, num_layers=2, base_model=BaseModel("tiny", None)
    )
    if kind == "both":
        live = LiveLoRA(model, [make_diff(model)], rows)
        return Together([live, ActivationSteerer(model, steering, rows)])
    return ActivationSteerer(model, steering, rows, positions=kind)


@pytest.mark.parametrize("kind", ["lora", "basis", "response", "prompt", "all", "both"])
def test_steered_rows_keep_their_steering_when_others_leave(ending, make_diff, monkeypatch, kind):
    options = {"max_new_tokens": STEPS}
    alone = []
    asked_often = ASKED * 4
    for row, asked in enumerate(asked_often):
        with steerers(ending, make_diff, kind) as steerer:
            told = lambda rows, row=row, steerer=steerer: select_batch(steerer, [row])  # noqa: E731
            alone += generate_answers(ending, [asked], prepare_batch=told, **options)
    sizes = sizes_of(ending, monkeypatch)
    with steerers(ending, make_diff, kind) as steerer:
        together = generate_answers(
            ending,
            asked_often,
            prepare_batch=partial(select_batch, steerer),
            plan=RowPlan(keep_rows=steerer.keep_rows, alike=[0] * 10 + [1] * 10),
            **options,
        )
    assert together == alone
    assert sizes[-1] < sizes[0]


@pytest.mark.parametrize("here", [True, False])
def test_what_a_models_authors_would_have_generation_do_plays_no_part(
    chat_model, monkeypatch, here
):
    """Greedy is greedy: penalties, beams and bans come along in a model's files unasked."""
    monkeypatch.setattr(generation, "decodes", lambda model: here)
    plain = generate_answers(chat_model, ASKED, max_new_tokens=STEPS)
    unasked = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 1, "num_beams": 3}
    unasked |= {"min_new_tokens": STEPS, "suppress_tokens": list(range(40, 90)), "do_sample": True}
    for name, value in unasked.items():
        monkeypatch.setattr(chat_model.model.generation_config, name, value)
    before = chat_model.model.generation_config
    assert generate_answers(chat_model, ASKED, max_new_tokens=STEPS) == plain
    assert chat_model.model.generation_config is before


def test_a_roomy_layer_holds_what_a_growing_one_holds():
    generator = torch.Generator().manual_seed(0)
    roomy, growing = RoomyLayer(9), DynamicLayer()
    for length in (4, 1, 1):
        states = [torch.randn(5, 2, length, 3, generator=generator) for _ in range(2)]
        for ours, theirs in zip(roomy.update(*states), growing.update(*states), strict=True):
            assert torch.equal(ours, theirs)
    roomy.keep([0, 2, 4])
    growing.batch_select_indices(torch.tensor([0, 2, 4]))
    states = [torch.randn(3, 2, 1, 3, generator=generator) for _ in range(2)]
    for ours, theirs in zip(roomy.update(*states), growing.update(*states), strict=True):
        assert torch.equal(ours, theirs)
    assert roomy.get_seq_length() == growing.get_seq_length() == 7


@torch.inference_mode()
def test_rows_that_join_give_the_logits_that_they_give_alone(model):
    """A long row leaves, so that columns are dropped; shorter and longer rows join; room grows."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 200, (length,), generator=generator) for length in (30, 6, 11, 19)]

    def begun(rows):
        longest = max(len(texts[row]) for row in rows)
        spare = [(longest - len(texts[row]), 0) for row in rows]
        tokens = torch.stack([pad(texts[row], each) for row, each in zip(rows, spare, strict=True)])
        mask = torch.stack([pad(torch.ones(longest - each[0]).long(), each) for each in spare])
        going = decoding.Decoding(model, tokens, mask, None, 2)
        return going, going.begin()

    alone = []
    for row in range(4):
        going, logits = begun([row])
        going.join(steps=9)
        alone.append([logits, *(going.step(torch.tensor([5])) for _ in range(6))])
    batch, _ = begun([0, 1])
    first = batch.step(torch.tensor([5, 5]))
    batch.keep([1])
    batch.join(begun([2])[0], steps=1)
    second = batch.step(torch.tensor([5, 5]))
    assert batch.room == 0
    batch.join(begun([3])[0], steps=2)
    third, fourth = (batch.step(torch.tensor([5, 5, 5])) for _ in range(2))
    for found, steps in (
        (first, (1, 1)),
        (second, (None, 2, 1)),
        (third, (None, 3, 2, 1)),
        (fourth, (None, 4, 3, 2)),
    ):
        expected = [alone[row][step] for row, step in enumerate(steps) if step is not None]
        torch.testing.assert_close(found, torch.cat(expected), atol=2e-5, rtol=1e-5)
