"""Activation steering: exactly the chosen positions move by exactly c·v, in every kind of pass."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from peft import PeftModel

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.caches import kept_cache
from persona_lora.models.generation import RowPlan, generate_answers
from persona_lora.models.structure import decoder_layers, weight_fingerprint
from persona_lora.steering.activations import (
    ActivationSteerer,
    BoundedSteerer,
    ConditionalSteerer,
    DirectionAblation,
)
from persona_lora.steering.steerer import select_batch, select_prefix

TOKENS = torch.randint(3, 250, (5, 9), generator=torch.Generator().manual_seed(0))
COEFFICIENTS = [[0.0, 0.0], [1.0, 0.0], [-0.5, 1.5], [0.0, 2.0], [0.3, -0.7]]


def make_vector(seed: int, layers=(0, 1), *, fingerprint=None) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    directions = {layer: torch.randn(32, generator=generator) for layer in layers}
    return SteeringVector(directions, BaseModel("tiny", fingerprint), num_layers=2)


class Recorder:
    """The outputs of every block, pass by pass: ``passes[i][layer]`` is [batch, seq, hidden]."""

    def __init__(self, model):
        self.passes = []
        blocks = decoder_layers(model)
        self.handles = [
            block.register_forward_hook(self.hook(layer)) for layer, block in enumerate(blocks)
        ]

    def hook(self, layer):
        def record(module, arguments, output):
            if layer == 0:
                self.passes.append({})
            self.passes[-1][layer] = output.clone()

        return record

    def close(self):
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def decode(model, tokens, split):
    """Run tokens up to ``split`` as one pass, then the others one by one with the cache."""
    recorder = Recorder(model)
    kept = kept_cache(model(tokens[:, :split], use_cache=True))
    for position in range(split, tokens.shape[1]):
        step = tokens[:, position : position + 1]
        kept = kept_cache(model(step, **{kept.name: kept.cache}, use_cache=True))
    recorder.close()
    return recorder.passes


@pytest.mark.parametrize("positions", ["response", "prompt", "all"])
@pytest.mark.parametrize("layer", [0, 1])
def test_exactly_the_chosen_positions_move_by_c_times_v(model, layer, positions):
    vector = make_vector(1)
    plain = decode(model, TOKENS, split=6)
    with ActivationSteerer(model, vector, -1.5, layers=layer, positions=positions):
        steered = decode(model, TOKENS, split=6)
    expected = {"response": [[5], [0], [0], [0]], "prompt": [range(6), [], [], []]}
    expected["all"] = [range(6), [0], [0], [0]]
    for before, after, chosen in zip(plain, steered, expected[positions], strict=True):
        moved = torch.zeros(before[0].shape[1], 1)
        moved[list(chosen)] = 1
        if layer == 1:
            assert torch.equal(after[0], before[0])  # layer k − 1 is unchanged
        difference = after[layer] - before[layer]
        wanted = (moved * -1.5 * vector.directions[layer]).expand_as(difference)
        torch.testing.assert_close(difference, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_layer_is_the_row_of_hidden_states_that_structure_names(model):
    vector = make_vector(1)
    plain = model(TOKENS, output_hidden_states=True).hidden_states
    with ActivationSteerer(model, vector, 2.0, layers=0, positions="all"):
        steered = model(TOKENS, output_hidden_states=True).hidden_states
    assert torch.equal(steered[0], plain[0])
    moved = steered[1] - plain[1]
    wanted = (2.0 * vector.directions[0]).expand_as(moved)
    torch.testing.assert_close(moved, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_hidden_states_asked_of_the_model_are_the_steered_ones(model):
    """Also where transformers has left its capturing hooks on the blocks before."""
    vector = make_vector(1)
    plain = model(TOKENS, output_hidden_states=True).hidden_states
    with ActivationSteerer(model, vector, 2.0, layers=0) as steerer:
        steerer.select_positions(torch.ones(1, 9))
        steered = model(TOKENS, output_hidden_states=True).hidden_states
    moved = steered[1] - plain[1]
    wanted = (2.0 * vector.directions[0]).expand_as(moved)
    torch.testing.assert_close(moved, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["response", "prompt", "all"])
def test_whole_texts_with_a_mask_equal_cached_decoding(model, positions):
    """A teacher-forced pass sees the model that generated: the cost of steering is measured so."""
    vector = make_vector(2)
    with ActivationSteerer(model, vector, 0.8, positions=positions) as steerer, torch.no_grad():
        stepwise = decode(model, TOKENS, split=6)
        # From the last prompt position on: its state makes the first token of the answer. As a
        # prompt, that position counts in generation, so here it is added to the mask.
        first = 6 if positions == "prompt" else 5
        steerer.select_positions(torch.arange(9)[None] >= first)
        recorder = Recorder(model)
        model(TOKENS)
        recorder.close()
    for layer in (0, 1):
        joined = torch.cat([each[layer] for each in stepwise], dim=1)
        torch.testing.assert_close(recorder.passes[0][layer], joined, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_every_row_equals_the_model_steered_with_its_coefficients(model):
    vectors = [make_vector(1), make_vector(2, layers=(1,))]
    with ActivationSteerer(model, vectors, COEFFICIENTS, positions="all") as steerer:
        steerer.select_rows([4, 0, 2, 3, 1])
        logits = model(TOKENS).logits
    for place, row in enumerate([4, 0, 2, 3, 1]):
        with ActivationSteerer(model, vectors, COEFFICIENTS[row], positions="all"):
            alone = model(TOKENS[place : place + 1]).logits[0]
        torch.testing.assert_close(logits[place], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_row_of_zeros_has_the_bits_of_the_unsteered_model(make_model, dtype):
    model = make_model(dtype=dtype)
    plain = model(TOKENS).logits
    with ActivationSteerer(model, make_vector(1), [[1.0], [0.0], [-2.0], [0.0], [3.0]]) as steerer:
        steerer.select_rows(range(5))
        logits = model(TOKENS).logits
    assert torch.equal(logits[[1, 3]], plain[[1, 3]])
    assert not torch.equal(logits[0], plain[0])


def test_one_batched_generation_equals_a_loop_of_single_ones(chat_model):
    vectors = [make_vector(1), make_vector(2)]
    conversations = [[{"role": "user", "content": f"question {i}" * (i + 1)}] for i in range(5)]
    with ActivationSteerer(chat_model.model, vectors, COEFFICIENTS) as steerer:
        batched = generate_answers(
            chat_model,
            conversations,
            max_new_tokens=16,
            batch_size=2,
            prepare_batch=steerer.select_rows,
        )
    for row, conversation in enumerate(conversations):
        with ActivationSteerer(chat_model.model, vectors, COEFFICIENTS[row]):
            (alone,) = generate_answers(chat_model, [conversation], max_new_tokens=16)
        assert alone.text == batched[row].text
    assert len({answer.text for answer in batched}) > 1


@pytest.mark.parametrize("positions", ["response", "prompt", "all"])
def test_a_shared_prefix_is_steered_as_the_prompt_that_it_is(chat_model, positions):
    rows = [row for row in COEFFICIENTS for _ in range(2)]
    asked = [[{"role": "user", "content": f"question {i}" * (i + 1)}] for i in range(len(rows))]
    vectors = [make_vector(1), make_vector(2)]
    lengths = []
    with ActivationSteerer(chat_model.model, vectors, rows, positions=positions) as steerer:
        plain = generate_answers(
            chat_model, asked, max_new_tokens=12, prepare_batch=steerer.select_rows
        )
        shared = generate_answers(
            chat_model,
            asked,
            max_new_tokens=12,
            prepare_batch=partial(select_batch, steerer),
            plan=RowPlan(
                alike=[tuple(row) for row in rows],
                prepare_prefix=lambda rows, length: (
                    lengths.append(length) or select_prefix(steerer, rows, length)
                ),
            ),
        )
    assert shared == plain
    assert len(lengths) == 1


@torch.no_grad()
def test_no_hook_is_left_after_any_exit(model):
    plain = model(TOKENS).logits
    for steerer_of in (ActivationSteerer, DirectionAblation):
        for error in (ValueError, KeyboardInterrupt):
            with pytest.raises(error), steerer_of(model, make_vector(1)):
                assert not torch.equal(model(TOKENS).logits, plain)
                raise error
            assert torch.equal(model(TOKENS).logits, plain)
            for module in model.modules():
                assert not module._forward_hooks
                assert not module._forward_pre_hooks


def test_a_failure_inside_the_forward_pass_leaves_no_hook(model):
    with (
        pytest.raises(UserError, match="select_rows"),
        ActivationSteerer(model, make_vector(1), [[1.0], [2.0]]),
    ):
        model(TOKENS)
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_a_peft_model_is_steered_as_its_base_is(model, make_adapter, tmp_path):
    wrapped = PeftModel.from_pretrained(model, make_adapter(tmp_path / "a", model, seed=1))
    plain = wrapped(TOKENS).logits
    with wrapped.disable_adapter(), ActivationSteerer(wrapped, make_vector(1), positions="all"):
        steered = wrapped(TOKENS).logits
    with ActivationSteerer(wrapped.unload(), make_vector(1), positions="all"):
        torch.testing.assert_close(steered, model(TOKENS).logits)
    assert not torch.equal(plain, steered)


def test_gradients_flow_through_a_steered_pass(model):
    vector = make_vector(1)
    inputs = model.get_input_embeddings()(TOKENS).detach().requires_grad_(True)
    for positions in ("response", "prompt", "all"):
        with ActivationSteerer(model, vector, 0.5, positions=positions):
            with_gradient = model(inputs_embeds=inputs).logits
            with torch.no_grad():
                without = model(inputs_embeds=inputs).logits
        torch.testing.assert_close(with_gradient, without)
        (gradient,) = torch.autograd.grad(with_gradient.square().mean(), inputs)
        assert torch.isfinite(gradient).all()
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("num_vectors", [1, 3])
@torch.no_grad()
def test_ablation_leaves_nothing_along_the_directions_and_the_rest_alone(model, num_vectors):
    vectors = [make_vector(seed, layers=(1,)) for seed in range(num_vectors)]
    plain = decode(model, TOKENS, split=6)
    with DirectionAblation(model, vectors):
        ablated = decode(model, TOKENS, split=6)
    stacked = torch.stack([each.directions[1] for each in vectors], dim=1)
    basis, _ = torch.linalg.qr(stacked)
    for before, after in zip(plain, ablated, strict=True):
        assert torch.equal(after[0], before[0])
        assert (after[1] @ basis).abs().max() < 1e-4
        rest = before[1] - before[1] @ basis @ basis.T
        torch.testing.assert_close(after[1], rest, atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_the_model_is_named(model):
    fits = make_vector(1)
    wide = dataclasses.replace(fits, directions={0: torch.ones(16)})
    with pytest.raises(UserError, match=r"2 layers of width 16.*2 layers of width 32"):
        ActivationSteerer(model, wide)
    deep = dataclasses.replace(fits, num_layers=4)
    with pytest.raises(UserError, match="4 layers of width 32"):
        ActivationSteerer(model, deep)
    with pytest.raises(UserError, match=r"no layer 5; it has layers 0–1"):
        ActivationSteerer(model, fits, layers=5)
    with pytest.raises(UserError, match="'answer'"):
        ActivationSteerer(model, fits, positions="answer")
    with pytest.raises(UserError, match="at least one"):
        ActivationSteerer(model, [])
    with pytest.raises(UserError, match="finite"):
        ActivationSteerer(model, fits, float("nan"))
    with pytest.raises(UserError, match=r"\[rows, 1\]"):
        ActivationSteerer(model, fits, [[1.0, 2.0]])
    with pytest.raises(UserError, match="length 0"):
        DirectionAblation(model, fits * 0.0)


def test_a_vector_of_other_weights_is_refused_unless_meant(model):
    other = make_vector(1, fingerprint="0" * 32)
    with pytest.raises(UserError, match=r"steering vector belongs to 'tiny'.*--allow-other-base"):
        ActivationSteerer(model, other)
    ActivationSteerer(model, other, allow_other_base=True)
    ActivationSteerer(model, make_vector(1, fingerprint=weight_fingerprint(model)))


def test_a_mask_of_another_length_is_refused(model):
    with ActivationSteerer(model, make_vector(1)) as steerer:
        steerer.select_positions(torch.ones(1, 4))
        with pytest.raises(UserError, match="covers 4 positions, the batch has 9"):
            model(TOKENS)
        steerer.select_positions(None)
        model(TOKENS)


def test_states_are_held_between_floor_and_ceiling(model):
    vector = make_vector(1)
    unit = vector.directions[1] / vector.directions[1].norm()
    plain = [each[1] for each in decode(model, TOKENS, split=6)]
    along = torch.cat([(each @ unit).flatten() for each in plain])
    low, high = along.quantile(0.3).item(), along.quantile(0.6).item()
    with BoundedSteerer(model, vector, low, high, layers=1, positions="all"):
        held = [each[1] for each in decode(model, TOKENS, split=6)]
    for before, after in zip(plain, held, strict=True):
        was = before @ unit
        torch.testing.assert_close(after @ unit, was.clamp(low, high), rtol=1e-4, atol=1e-4)
        inside = (was > low) & (was < high)
        assert torch.equal(after[inside], before[inside])
        rest = after - before - ((after - before) @ unit)[..., None] * unit
        assert rest.norm() < 1e-4  # nothing but the coordinate has moved
    assert any(not torch.equal(a, b) for a, b in zip(plain, held, strict=True))
    with BoundedSteerer(model, vector, None, high, layers=1, positions="all"):
        capped = torch.cat([(each[1] @ unit).flatten() for each in decode(model, TOKENS, split=6)])
    assert capped.max() <= high + 1e-4
    assert capped.min() == pytest.approx(along.min().item(), abs=1e-4)


def test_vectors_are_added_to_states_like_the_condition_alone(model):
    vector, condition = make_vector(1), make_vector(2)
    unit = condition.directions[0] / condition.directions[0].norm()
    plain = [each[0] for each in decode(model, TOKENS, split=6)]
    cosines = [each @ unit / each.norm(dim=-1) for each in plain]
    threshold = torch.cat([each.flatten() for each in cosines]).median().item()
    rows = torch.tensor(COEFFICIENTS)[:, :1].tolist()
    steerer = ConditionalSteerer(
        model, vector, rows, condition, threshold=threshold, layers=0, positions="all"
    )
    with steerer:
        steerer.select_rows(range(5))
        steered = [each[0] for each in decode(model, TOKENS, split=6)]
    scale = torch.tensor(rows)[:, :, None]
    for before, after, cosine in zip(plain, steered, cosines, strict=True):
        expected = scale * vector.directions[0] * (cosine > threshold)[..., None]
        torch.testing.assert_close(after - before, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(after[cosine < threshold], before[cosine < threshold])


def test_bounds_and_conditions_that_say_nothing_are_refused(model):
    vector = make_vector(1)
    zero = dataclasses.replace(vector, directions={0: torch.zeros(32), 1: torch.zeros(32)})
    for floor, ceiling in ((None, None), (2.0, 1.0), (float("nan"), None)):
        with pytest.raises(UserError, match="hold nothing"):
            BoundedSteerer(model, vector, floor, ceiling)
    with pytest.raises(UserError, match="one vector"):
        BoundedSteerer(model, [vector, vector], 0.0, None)
    with pytest.raises(UserError, match="length 0"):
        BoundedSteerer(model, zero, 0.0, None)
    with pytest.raises(UserError, match="length 0"):
        ConditionalSteerer(model, vector, 1.0, zero)
    for threshold in (1.0, -1.5, float("nan")):
        with pytest.raises(UserError, match="is a cosine"):
            ConditionalSteerer(model, vector, 1.0, vector, threshold=threshold)
    with pytest.raises(UserError, match="layer"):
        ConditionalSteerer(model, vector, 1.0, make_vector(2, layers=(0,)), layers=1)
    foreign = make_vector(2, fingerprint="0" * 32)
    with pytest.raises(UserError, match="allow-other-base"):
        ConditionalSteerer(model, vector, 1.0, foreign)
