"""Merging against PEFT, and restoring bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel, LoRADiff, LoRAFactors, mix
from persona_lora.models.structure import weight_fingerprint
from persona_lora.steering import ledger
from persona_lora.steering.ledger import MERGED
from persona_lora.steering.weights import LoRAMerger, LoRASteerer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("dtype", "backup"), zip(DTYPES, ["cpu", "device", "cpu"], strict=True))
def test_restore_is_bit_identical_after_a_thousand_cycles(make_model, make_diff, dtype, backup):
    model = make_model(dtype=dtype)
    before = snapshot(model)
    diff = make_diff(model, rank=2)
    merger = LoRAMerger(model, backup=backup)
    for cycle in range(1000):
        merger.merge_lora_diff(diff, 0.001 * cycle - 0.3)
        merger.restore_original_weights()
    assert same_bits(model, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_is_one_fp32_sum_rounded_once(make_model, make_diff, dtype):
    model = make_model(dtype=dtype)
    before = snapshot(model)
    one, two = make_diff(model, seed=1), make_diff(model, seed=2)
    merger = LoRAMerger(model)
    report = merger.merge_lora_diff(one, 1.5)
    merger.merge_lora_diff(two, -0.5)
    assert report == (14, 15)
    for name in one.factors:
        exact = before[f"{name}.weight"].double()
        exact += 1.5 * one.factors[name].delta() - 0.5 * two.factors[name].delta()
        merged = model.get_submodule(name).weight
        error = (merged.double() - exact).abs()
        assert (error <= exact.abs() * torch.finfo(dtype).eps + 1e-6).all()
    merger.restore_original_weights()
    assert same_bits(model, before)


def test_merging_equals_peft(model, make_adapter, tmp_path):
    adapter = make_adapter(tmp_path / "a", model, seed=1)
    tokens = torch.arange(24).reshape(2, 12)
    reference = PeftModel.from_pretrained(copy.deepcopy(model), adapter).merge_and_unload()
    with LoRASteerer(model, adapter, 1.0):
        torch.testing.assert_close(
            model(tokens).logits, reference(tokens).logits, atol=1e-5, rtol=1e-4
        )


def test_several_diffs_at_once_equal_their_mix(model, make_diff):
    one, two = make_diff(model, seed=1), make_diff(model, seed=2)
    tokens = torch.arange(12)[None]
    with LoRASteerer(model, {one: 1.5, two: -0.5}):
        together = model(tokens).logits
    with LoRASteerer(model, mix({one: 1.5, two: -0.5})):
        torch.testing.assert_close(model(tokens).logits, together, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("at_module", [1, 5, 14])
def test_a_fault_in_the_middle_of_a_merge_undoes_it(
    model, make_diff, monkeypatch, error, at_module
):
    before = snapshot(model)
    diff = make_diff(model)
    merger = LoRAMerger(model)
    merger.merge_lora_diff(diff, 1.0)
    merged = snapshot(model)
    plain, calls = ledger._write, []

    def write(module, entry):
        calls.append(module)
        plain(module, entry)
        if len(calls) == at_module:
            raise error

    monkeypatch.setattr(ledger, "_write", write)
    with pytest.raises(error):
        merger.merge_lora_diff(make_diff(model, seed=9), 1.0)
    assert same_bits(model, merged)
    monkeypatch.undo()
    merger.restore_original_weights()
    assert same_bits(model, before)


def test_a_fault_during_a_restore_can_be_mended_by_another(model, make_diff, monkeypatch):
    before = snapshot(model)
    merger = LoRAMerger(model)
    merger.merge_lora_diff(make_diff(model), 1.0)
    plain, calls = ledger.weight_of, []

    def interrupted(module):
        calls.append(module)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(module)

    monkeypatch.setattr(ledger, "weight_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merger.restore_original_weights()
    monkeypatch.undo()
    assert not same_bits(model, before)
    merger.restore_original_weights()
    merger.restore_original_weights()
    assert same_bits(model, before)


def test_the_steerer_restores_on_any_exit(model, make_diff):
    before = snapshot(model)
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), LoRASteerer(model, make_diff(model), 2.0):
            assert not same_bits(model, before)
            raise error
        assert same_bits(model, before)


def test_tied_embeddings_keep_their_tensor(make_model, make_diff):
    model = make_model(tied=True)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    with LoRASteerer(model, make_diff(model), 1.0):
        assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
        assert model.lm_head.weight is model.model.embed_tokens.weight
    factors = LoRAFactors(torch.randn(2, 32), torch.randn(model.config.vocab_size, 2))
    with pytest.raises(UserError, match="shares its memory with model"):
        LoRAMerger(model).merge_lora_diff(LoRADiff({"lm_head": factors}, BaseModel("tiny")))
    untied = make_model(tied=False)
    before = snapshot(untied)
    with LoRASteerer(untied, LoRADiff({"lm_head": factors}, BaseModel("tiny"))):
        assert not torch.equal(untied.lm_head.weight, before["lm_head.weight"])
    assert same_bits(untied, before)


def test_unknown_modules_and_wrong_shapes_are_refused_before_anything_is_touched(
    model, make_diff, make_model
):
    before = snapshot(model)
    diff = make_diff(model)
    lost = LoRADiff(
        {f"base_model.model.{name}": each for name, each in diff.factors.items()}, diff.base_model
    )
    with pytest.raises(UserError, match="14 of the 14 modules of the diff find no weight"):
        LoRAMerger(model).merge_lora_diff(lost)
    one_lost = LoRADiff(
        {**diff.factors, "model.layers.7.mlp.up_proj": next(iter(diff.factors.values()))},
        diff.base_model,
    )
    with pytest.raises(UserError, match=r"1 of the 15 .*layers\.7"):
        LoRAMerger(model).merge_lora_diff(one_lost)
    narrow = LoRAFactors(torch.randn(2, 16), torch.randn(32, 2))
    with pytest.raises(UserError, match=r"q_proj is \[32, 32\] in the model and \[32, 16\]"):
        LoRAMerger(model).merge_lora_diff(
            LoRADiff({"model.layers.0.self_attn.q_proj": narrow}, diff.base_model)
        )
    assert same_bits(model, before)
    assert len(MERGED) == 0


def test_weights_that_cannot_be_restored_exactly_are_refused(make_model, make_diff):
    diff = make_diff(make_model())
    with pytest.raises(UserError, match="meta device"):
        LoRAMerger(make_model().to("meta")).merge_lora_diff(diff, 1.0)
    quantised = make_model()
    module = quantised.model.layers[1].mlp.up_proj
    module.weight = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight is quantised"):
        LoRAMerger(quantised).merge_lora_diff(diff)
    packed = make_model()
    module = packed.model.layers[1].mlp.up_proj
    module.weight = torch.nn.Parameter(torch.zeros(0), requires_grad=False)
    with pytest.raises(UserError, match="packed or sharded"):
        LoRAMerger(packed).merge_lora_diff(diff)


def test_a_diff_of_another_base_is_refused_unless_allowed(make_model, make_diff):
    model, other = make_model(seed=0), make_model(seed=1)
    diff = make_diff(model, fingerprint=weight_fingerprint(model))
    with LoRASteerer(model, diff):
        pass
    with pytest.raises(UserError, match="allow_other_base=True"):
        LoRAMerger(other).merge_lora_diff(diff)
    before = snapshot(other)
    with LoRASteerer(other, diff, allow_other_base=True):
        assert not same_bits(other, before)
    assert same_bits(other, before)


def test_mergers_nest_and_are_restored_in_any_order(make_model, make_diff):
    model = make_model()
    fingerprint = weight_fingerprint(model)
    before = snapshot(model)
    one = make_diff(model, seed=1, fingerprint=fingerprint)
    two = make_diff(model, seed=2, fingerprint=fingerprint)
    with LoRASteerer(model, one):
        between = snapshot(model)
        with LoRASteerer(model, two):
            pass
        assert same_bits(model, between)
    assert same_bits(model, before)
    first, second = LoRAMerger(model), LoRAMerger(model)
    first.merge_lora_diff(one)
    second.merge_lora_diff(two)
    first.restore_original_weights()
    with LoRASteerer(model, two):
        pass  # of the same base: a merged diff below changes nothing about whose it is
    second.restore_original_weights()
    assert same_bits(model, before)
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0], [2, 1, 0]):
        mergers = [LoRAMerger(model) for _ in order]
        for merger, diff in zip(mergers, (one, two, one), strict=True):  # A, B, A again
            merger.merge_lora_diff(diff)
        for index in order[:2]:
            mergers[index].restore_original_weights()
        with LoRASteerer(make_model(), [one, two, one][order[2]]) as alone:
            expected = snapshot(alone.merger.model)
        assert same_bits(model, expected)
        mergers[order[2]].restore_original_weights()
        assert same_bits(model, before)
    assert len(MERGED) == 0


@pytest.mark.parametrize("coefficient", [float("nan"), float("inf")])
def test_a_coefficient_that_is_not_finite_touches_nothing(model, make_diff, coefficient):
    before = snapshot(model)
    with pytest.raises(UserError, match="finite"):
        LoRAMerger(model).merge_lora_diff(make_diff(model), coefficient)
    assert same_bits(model, before)
    with pytest.raises(UserError, match="backup"):
        LoRAMerger(model, backup="disk")


def test_peft_wrapped_models_are_merged_below_the_adapter(model, make_adapter, make_diff, tmp_path):
    diff = make_diff(model)
    wrapped = PeftModel.from_pretrained(model, make_adapter(tmp_path / "a", model, seed=1))
    wrapped.requires_grad_(False)
    before = snapshot(wrapped)
    with LoRASteerer(wrapped, diff, 1.0):
        assert not same_bits(wrapped, before)
    assert same_bits(wrapped, before)


def test_a_coefficient_beside_those_of_a_mapping_is_refused(model, make_diff):
    with pytest.raises(UserError, match="coefficient 2 would do nothing beside a mapping"):
        LoRASteerer(model, {make_diff(model): 0.5}, 2.0)
