"""Slopes of a goal's value at no steering: those of the exact mean, and what is read off them."""

from __future__ import annotations

import dataclasses
import logging
import math

import numpy as np
import pytest
import torch

from persona_lora.core.chat import Exchange, Verdict, user_question
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel, LoRADiff, LoRAFactors
from persona_lora.core.options import GenerationOptions
from persona_lora.core.personas import Coefficients
from persona_lora.judges.budget import COST_CAP
from persona_lora.models.generation import ending_tokens
from persona_lora.models.processes import Processes
from persona_lora.steering.bank import bank_of_diffs
from persona_lora.studies.personas import climbing
from persona_lora.studies.personas.climbing import (
    LENGTHS,
    Drawn,
    Slopes,
    kept_slopes,
    value_slopes,
)
from persona_lora.studies.personas.objective import Speaker
from persona_lora.studies.personas.search import SearchOptions

SCALES = {"calm": 1.0, "loud": 0.5}
PROMPTS = ("Hi there.", "Any plans?", "What now?", "And then?")
LIKED = 50.0


class Likes:
    """Values an answer by its first letter; None for one that is empty, or no whole letter."""

    name = "likes"

    def judge(self, exchanges, criterion):
        return [Verdict(criterion, self.value(each.answer), "", self.name) for each in exchanges]

    def value(self, answer):
        return None if not answer or "\ufffd" in answer else LIKED * (answer[0].lower() in "aeiou")


def valued(model, judge):
    """The value of every token as an answer of its own; NaN without one."""
    ends, tokens = ending_tokens(model), range(model.model.config.vocab_size)
    read = model.tokenizer.decode
    said = ["" if at in ends else read([at], skip_special_tokens=True).strip() for at in tokens]
    values = [judge.value(each) for each in said]
    return torch.tensor([math.nan if each is None else each for each in values])


@pytest.fixture
def speaker(chat_model, make_diff):
    """Two directions: one of chance, and one that makes well-valued tokens likelier."""
    module, values = "model.layers.1.mlp.down_proj", valued(chat_model, Likes())
    out = chat_model.model.get_output_embeddings().weight.detach()
    B = ((values - values.nanmean()).nan_to_num() @ out)[:, None]
    seen = []
    taken = chat_model.model.get_submodule(module).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0][0, -1])
    )
    for prompt in PROMPTS:
        text = chat_model.render(user_question(prompt))
        chat_model.model(**chat_model.tokenizer(text, return_tensors="pt"))
    taken.remove()
    states = torch.stack(seen).detach().mean(dim=0, keepdim=True)
    A = states / states.norm() ** 2
    liked = LoRADiff({module: LoRAFactors(A, 100 * B / B.norm())}, BaseModel("tiny", None))
    chance = make_diff(chat_model.model, seed=0, scale=0.05)
    options = GenerationOptions(max_new_tokens=1)
    bank = bank_of_diffs({"calm": chance, "loud": liked})
    return Speaker(chat_model, bank, SCALES, 2.0, options, Processes())


def exact_mean(speaker, mix, judge):
    """The mean value of one-token answers that have one: over the vocabulary, by probabilities."""
    model, values, found = speaker.chat_model, valued(speaker.chat_model, judge).double(), []
    known = ~values.isnan()
    with speaker.directions.steerer(model, [speaker.coefficients(mix)]) as steerer:
        for prompt in PROMPTS:
            text = model.render(user_question(prompt))
            ids = model.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            steerer.select_rows([0])
            with torch.no_grad():
                p = model.model(input_ids=ids).logits[0, -1].double()[known].softmax(dim=-1)
            found.append(float(p @ values[known]))
    return np.mean(found)


def test_slopes_are_those_of_the_exact_mean(speaker, monkeypatch):
    """Answers without a value are left out on both sides: what is left has its own mean."""
    monkeypatch.setattr(climbing, "DRAWS", 600)
    monkeypatch.setattr(climbing, "STEP", 0.05)
    found = value_slopes(speaker, PROMPTS, Likes(), "value", seed=0)
    assert found.traits == speaker.directions.names
    exact = []
    for name, value, error in zip(found.traits, found.values, found.errors, strict=True):
        up, down = (exact_mean(speaker, Coefficients.of({name: c}), Likes()) for c in (0.1, -0.1))
        exact.append((up - down) / 0.2)
        assert value == pytest.approx(exact[-1], abs=4 * error)
    # The test would not see a slope of 0, or of the other sign.
    assert max(abs(each) for each in exact) > 4 * max(found.errors)


def test_mixes_go_up_the_slopes_as_far_as_the_bound(caplog):
    found = Slopes(("calm", "loud"), (3.0, -4.0), (1.0, 1.0))
    told = [each.as_dict() for each in found.mixes(None)]
    assert told == [{"calm": round(0.6 * at, 2), "loud": round(-0.8 * at, 2)} for at in LENGTHS]
    assert [each.as_dict()["loud"] for each in found.mixes(1.0)] == [-0.4, -0.8, -1.0]
    flat = Slopes(("calm", "loud"), (0.0, 0.0), (0.0, 0.0))
    assert flat.mixes(4.0) == ()
    assert "nothing to start from" in caplog.text


def test_they_are_read_once_and_said_with_their_errors(speaker, tmp_path, monkeypatch, caplog):
    def read(**changed):
        own = {"criterion": "value", "read": "x", "folder": tmp_path, "seed": 0, "fixed": {}}
        own |= changed
        searching = SearchOptions(seed=own.pop("seed"), fixed=own.pop("fixed"))
        return kept_slopes(speaker, PROMPTS, Likes(), searching=searching, **own)

    with caplog.at_level(logging.INFO):
        found = read()
    assert "calm" in caplog.text
    assert "±" in caplog.text
    monkeypatch.setattr(climbing, "value_slopes", None)
    assert read() == found
    for changed in ({"seed": 1}, {"read": "y"}, {"criterion": "other"}, {"fixed": {"calm": 1.0}}):
        with pytest.raises(TypeError):
            read(**changed)


def test_too_few_answers_with_a_value_are_refused(speaker):
    class Mute(Likes):
        def value(self, answer):
            return None

    with pytest.raises(UserError, match="two prompts with two valued answers each, and has 0"):
        value_slopes(speaker, PROMPTS, Mute(), "value", seed=0)
    with pytest.raises(UserError, match="and has 1"):
        value_slopes(speaker, PROMPTS[:1], Likes(), "value", seed=0)


def test_the_end_of_an_answer_counts_where_it_was_drawn(speaker):
    """Whatever its text is retokenised to: one that was cut off has no end."""
    (end,) = speaker.chat_model.template.end_of_turn
    asked = Exchange("Hi there.", "Fine.")
    finished, cut = (climbing._ended(speaker, Drawn(asked, each)) for each in (True, False))
    assert finished.answer == [*cut.answer, end]
    assert end not in cut.answer
    longer = dataclasses.replace(speaker, options=GenerationOptions(max_new_tokens=3))
    drawn = climbing._drawn(longer, PROMPTS, 0, {})
    assert {each.finished for each in drawn} == {False}
    ends = [climbing._ended(longer, each).answer[-1:] == [end] for each in drawn]
    assert sum(ends) == sum(not each.exchange.answer for each in drawn)


def test_what_is_fixed_is_held_and_has_no_slope(speaker, monkeypatch):
    monkeypatch.setattr(climbing, "STEP", 0.05)
    held = {"calm": 0.5}
    found = value_slopes(speaker, PROMPTS, Likes(), "value", 0, held)
    assert found.traits == ("loud",)
    assert {each.as_dict()["calm"] for each in found.mixes(4.0)} == {0.5}
    assert [abs(each.as_dict()["loud"]) for each in found.mixes(4.0)] == list(LENGTHS)
    free = value_slopes(speaker, PROMPTS, Likes(), "value", 0)
    assert found.values[0] != free.values[free.traits.index("loud")]


def test_equal_values_slope_nowhere_and_no_mix_passes_the_bound(speaker, caplog):
    class Even(Likes):
        def value(self, answer):
            return 0.7 if answer else None

    flat = value_slopes(speaker, PROMPTS, Even(), "value", seed=0)
    assert set(flat.values) == {0.0}
    steep = Slopes(("calm", "loud"), (1.0, 0.1), (0.1, 0.1))
    assert max(each.as_dict()["calm"] for each in steep.mixes(0.667)) == 0.667


def test_a_spent_budget_leaves_no_slopes_to_be_read_again(speaker, tmp_path):
    class Spent(Likes):
        def judge(self, exchanges, criterion):
            return [
                each if at < len(exchanges) // 2 else Verdict(criterion, None, COST_CAP, self.name)
                for at, each in enumerate(super().judge(exchanges, criterion))
            ]

    asked = {"criterion": "value", "searching": SearchOptions(), "read": None, "folder": tmp_path}
    with pytest.raises(UserError, match="cost cap"):
        kept_slopes(speaker, PROMPTS, Spent(), **asked)
    assert not list(tmp_path.iterdir())
