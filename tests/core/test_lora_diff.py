"""Identities of the algebra, checked against dense matrices and against PEFT."""

from __future__ import annotations

import copy
import json
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import (
    WEIGHED,
    BaseModel,
    LoRADiff,
    LoRAFactors,
    layer_number,
    mix,
    part_of,
    parts_of,
)
from persona_lora.models.structure import linear_modules


def dense(diff: LoRADiff) -> dict[str, torch.Tensor]:
    return {name: each.B.double() @ each.A.double() for name, each in diff.factors.items()}


def small_diff(seed: int, rank: int = 3, name: str = "model.layers.0.mlp.up_proj") -> LoRADiff:
    generator = torch.Generator().manual_seed(seed)
    factors = LoRAFactors(
        torch.randn(rank, 7, generator=generator), torch.randn(5, rank, generator=generator)
    )
    return LoRADiff({name: factors}, BaseModel("tiny"), trait="t")


@given(
    seeds=st.tuples(st.integers(0, 50), st.integers(51, 99)),
    ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    coefficient=st.floats(-3, 3),
)
@settings(max_examples=30, deadline=None)
def test_algebra_agrees_with_dense_matrices(seeds, ranks, coefficient):
    one, two = small_diff(seeds[0], ranks[0]), small_diff(seeds[1], ranks[1])
    name = next(iter(one.factors))
    result = dense(one * coefficient - two / 2 + -one)[name]
    expected = coefficient * dense(one)[name] - dense(two)[name] / 2 - dense(one)[name]
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_inner_norm_and_cosine_agree_with_dense_matrices():
    one, two = small_diff(0), small_diff(1, rank=4)
    name = next(iter(one.factors))
    first, second = dense(one)[name], dense(two)[name]
    assert one.inner(two) == pytest.approx(float((first * second).sum()), rel=1e-10)
    assert one.norm() == pytest.approx(float(first.norm()), rel=1e-10)
    assert one.cosine(two) == pytest.approx(
        float((first * second).sum() / (first.norm() * second.norm())), rel=1e-10
    )
    assert (one - one).norm() == 0
    assert (one + one).norm() == pytest.approx(2 * one.norm())


def diff_of(base: BaseModel, name: str = "model.layers.0.mlp.up_proj", shape=(5, 7)) -> LoRADiff:
    out, width = shape
    generator = torch.Generator().manual_seed(out)
    A, B = (torch.randn(*size, generator=generator) for size in ((3, width), (out, 3)))
    return LoRADiff({name: LoRAFactors(A, B)}, base)


TINY, MARK = BaseModel("tiny", "a" * 32), BaseModel("", f"{WEIGHED}x")
APART = {
    "other weights": (diff_of(TINY), diff_of(BaseModel("tiny", "b" * 32)), "different base models"),
    "other name": (diff_of(TINY), diff_of(BaseModel("small")), "different base models"),
    "weighed": (diff_of(TINY), diff_of(MARK), "weigh both"),
    "weighed by others": (diff_of(BaseModel("", f"{WEIGHED}others")), diff_of(MARK), "weigh both"),
    "weighed, a bare file": (diff_of(BaseModel("")), diff_of(MARK), "weigh both"),
    "other width": (diff_of(TINY), diff_of(TINY, shape=(5, 6)), "up_proj is"),
    "other height": (diff_of(TINY), diff_of(TINY, shape=(4, 7)), "up_proj is"),
    "no diff": (diff_of(TINY), 3, "a diff is expected"),
}
OPERATIONS = {
    "inner": LoRADiff.inner,
    "cosine": LoRADiff.cosine,
    "+": operator.add,
    "-": operator.sub,
    "mix": lambda one, other: mix({one: 2.0, other: 1.0}),
}


@pytest.mark.parametrize("pair", APART)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_not_of_one_model_has_no_number_and_no_sum(operation, pair):
    one, other, message = APART[pair]
    with pytest.raises(UserError, match=message):
        OPERATIONS[operation](one, other)
    if isinstance(other, LoRADiff):
        with pytest.raises(UserError, match=message):
            OPERATIONS[operation](other, one)


def test_diffs_without_a_module_in_common_add_and_do_not_compare():
    one, other = diff_of(TINY), diff_of(TINY, "model.layers.0.mlp.gate_proj")
    assert set((one + other).factors) == {*one.factors, *other.factors}
    for compare in (one.inner, one.cosine):
        with pytest.raises(UserError, match="share no module"):
            compare(other)


def test_a_number_between_diffs_of_other_bases_is_given_to_who_asks_for_it():
    one, other = diff_of(TINY), diff_of(BaseModel("tiny", "b" * 32))
    assert one.cosine(other, allow_other_base=True) == pytest.approx(1.0)
    assert one.inner(other, allow_other_base=True) == pytest.approx(one.inner(one))
    with pytest.raises(UserError, match="up_proj is"):
        one.inner(diff_of(TINY, shape=(5, 6)), allow_other_base=True)


def test_a_cosine_stays_between_minus_one_and_one():
    for seed in range(200):
        diff = small_diff(seed, rank=1 + seed % 5)
        assert 1 - 1e-12 < diff.cosine(diff) <= 1
        assert -1 <= diff.cosine(-diff) < -1 + 1e-12


def test_compress_is_the_best_approximation_of_its_rank():
    diff = small_diff(0, rank=5) + small_diff(1, rank=5)
    name = next(iter(diff.factors))
    values = torch.linalg.svdvals(dense(diff)[name])
    compressed, kept = diff.compress(rank=2)
    error = (dense(diff)[name] - dense(compressed)[name]).square().sum()
    assert compressed.rank == 2
    assert float(error) == pytest.approx(float(values[2:].square().sum()), rel=1e-5)
    assert kept == pytest.approx(float(values[:2].square().sum() / values.square().sum()))
    assert diff.compress(energy=1.0).diff.rank == 5  # the matrix is 5 × 7
    assert (diff - diff.compress(energy=1.0).diff).norm() == pytest.approx(0, abs=1e-5)
    assert diff.compress(energy=0.5).energy_kept >= 0.5


@given(seed=st.integers(0, 99), rank=st.integers(1, 4), tokens=st.integers(2, 40))
@settings(max_examples=30, deadline=None)
def test_a_weighed_cut_errs_least_on_the_rows_that_weigh_it(seed, rank, tokens):
    """Against the outputs on every row, and against other cuts of that rank, random ones too."""
    diff = small_diff(seed, rank=5)
    name = next(iter(diff.factors))
    whole, generator = dense(diff)[name], torch.Generator().manual_seed(seed)
    scales = torch.tensor([100.0, 10, 3, 1, 0.3, 0.1, 0.01], dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(7, 7, generator=generator, dtype=torch.float64)).Q
    x = torch.randn(tokens, 7, generator=generator, dtype=torch.float64) * scales @ turned

    def share(matrix: torch.Tensor) -> float:
        return float((x @ (whole - matrix).T).square().sum() / (x @ whole.T).square().sum())

    cut, kept = diff.compress(rank=rank, roots={name: x.T / tokens**0.5})
    assert cut.rank <= rank
    assert share(dense(cut)[name]) == pytest.approx(1 - kept, abs=1e-6)
    others = [dense(diff.compress(rank=rank).diff)[name]]
    for _ in range(20):
        near = torch.randn(5, rank, generator=generator, dtype=torch.float64)
        others.append(torch.linalg.qr(near).Q @ torch.linalg.qr(near).Q.T @ whole)
    assert share(dense(cut)[name]) <= min(map(share, others)) + 1e-6
    least = diff.compress(energy=0.9, roots={name: x.T / tokens**0.5})
    assert share(dense(least.diff)[name]) <= 0.1 + 1e-6


def test_weighed_by_inputs_that_are_alike_in_all_directions_a_cut_is_the_plain_one():
    diff = small_diff(0, rank=5)
    name = next(iter(diff.factors))
    for asked in ({"rank": 2}, {"energy": 0.8}):
        weighed = diff.compress(**asked, roots={name: 3.0 * torch.eye(7)})
        plain = diff.compress(**asked)
        torch.testing.assert_close(dense(weighed.diff), dense(plain.diff), atol=1e-5, rtol=1e-5)
        assert weighed.energy_kept == pytest.approx(plain.energy_kept)


@pytest.mark.parametrize(
    "arguments", [{}, {"rank": 1, "energy": 0.5}, {"rank": 0}, {"energy": 2}, {"energy": 0.0}]
)
def test_compress_refuses_senseless_arguments(arguments):
    with pytest.raises(UserError):
        small_diff(0).compress(**arguments)


def test_mix_is_the_weighted_sum_and_keeps_a_shared_trait():
    one, two = small_diff(0), small_diff(1)
    name = next(iter(one.factors))
    both = mix({one: 0.5, two: -2.0})
    torch.testing.assert_close(
        dense(both)[name], 0.5 * dense(one)[name] - 2 * dense(two)[name], atol=1e-5, rtol=1e-5
    )
    assert both.trait == "t"
    assert both.rank == one.rank + two.rank


def test_diffs_of_one_A_keep_its_rank_and_add_their_B():
    name, one = next(iter(small_diff(0).factors.items()))
    Bs = [small_diff(seed).factors[name].B for seed in (1, 2, 3)]
    diffs = [LoRADiff({name: LoRAFactors(one.A.clone(), B)}, BaseModel("tiny")) for B in Bs]
    difference = (diffs[0] - diffs[1]).factors[name]
    assert torch.equal(difference.A, one.A)
    assert torch.equal(difference.B, Bs[0] - Bs[1])
    terms = dict(zip(diffs, (0.5, -2.0, 1.5), strict=True))
    mixed, other = mix(terms), small_diff(4)
    expected = sum(value * dense(diff)[name] for diff, value in terms.items())
    torch.testing.assert_close(dense(mixed)[name], expected, atol=1e-6, rtol=1e-6)
    assert (mixed.rank, (mixed + other).rank, mix({**terms, other: 1.0}).rank) == (3, 6, 6)
    nearly = LoRADiff({name: LoRAFactors(one.A * (1 + 1e-6), Bs[0])}, BaseModel("tiny"))
    assert (nearly - diffs[0]).rank == 6


@pytest.mark.parametrize("coefficient", [float("nan"), float("inf"), -float("inf")])
def test_a_coefficient_that_is_not_finite_is_refused(coefficient):
    with pytest.raises(UserError, match="finite"):
        small_diff(0) * coefficient


def test_diffs_of_different_bases_do_not_mix():
    one = small_diff(0)
    other = LoRADiff(one.factors, BaseModel("another"))
    with pytest.raises(UserError, match="base_model_name_or_path in adapter_config"):
        one + other
    known = [LoRADiff(one.factors, BaseModel("tiny", print_)) for print_ in ("a", "b")]
    with pytest.raises(UserError, match="weights differ, take diffs of one"):
        known[0] + known[1]
    assert mix({known[0]: 1.0, LoRADiff(small_diff(1).factors, BaseModel("")): 1.0}).rank == 6


SETTINGS = [
    ({}, {}),
    ({"r": 4, "lora_alpha": 8}, {"r": 6, "lora_alpha": 3}),
    ({"use_rslora": True}, {"use_rslora": True, "r": 2}),
    (
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 16}},
        {"alpha_pattern": {"down_proj": 1}},
    ),
    ({"target_modules": ["q_proj", "v_proj"]}, {}),
]


@pytest.mark.parametrize(("positive", "negative"), SETTINGS)
def test_the_difference_opens_in_peft_and_gives_the_sum_of_both_deltas(
    model, make_adapter, tmp_path, positive, negative
):
    """logits(base + Δ₊ − Δ₋): dense deltas from PEFT's own merge are the reference."""
    pos = make_adapter(tmp_path / "pos", model, seed=1, **positive)
    neg = make_adapter(tmp_path / "neg", model, seed=2, **negative)
    diff = LoRADiff.from_adapters(pos, neg, trait="t")
    folder = diff.save(tmp_path / "diff")

    reference = copy.deepcopy(model)
    for path, sign in ((pos, 1), (neg, -1)):
        merged = PeftModel.from_pretrained(copy.deepcopy(model), path).merge_and_unload()
        for (name, weight), other in zip(
            reference.named_parameters(), merged.parameters(), strict=True
        ):
            base = dict(model.named_parameters())[name]
            weight.data += sign * (other.data - base)
    opened = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    tokens = torch.arange(24).reshape(2, 12)
    torch.testing.assert_close(
        opened(tokens).logits, reference(tokens).logits, atol=1e-4, rtol=1e-4
    )


def test_the_difference_equals_pefts_cat(model, make_adapter, tmp_path):
    pos = make_adapter(tmp_path / "pos", model, seed=1)
    neg = make_adapter(tmp_path / "neg", model, seed=2)
    both = PeftModel.from_pretrained(copy.deepcopy(model), pos, adapter_name="pos")
    both.load_adapter(neg, adapter_name="neg")
    both.add_weighted_adapter(["pos", "neg"], [1.0, -1.0], "cat", combination_type="cat")
    both.set_adapter("cat")
    both.eval()
    opened = PeftModel.from_pretrained(
        copy.deepcopy(model), LoRADiff.from_adapters(pos, neg).save(tmp_path / "diff")
    ).eval()
    tokens = torch.arange(24).reshape(2, 12)
    torch.testing.assert_close(opened(tokens).logits, both(tokens).logits, atol=1e-4, rtol=1e-4)


def test_subtracting_factors_is_another_direction(model, make_adapter, tmp_path):
    """The common mistake (B₊ − B₋)(A₊ − A₋): its cosine with the true difference is far from 1."""
    pos = make_adapter(tmp_path / "pos", model, seed=1)
    neg = make_adapter(tmp_path / "neg", model, seed=2)
    plus, minus = LoRADiff.load(pos), LoRADiff.load(neg)
    true = LoRADiff.from_adapters(pos, neg)
    wrong = LoRADiff(
        {
            name: LoRAFactors(each.A - minus.factors[name].A, each.B - minus.factors[name].B)
            for name, each in plus.factors.items()
        },
        true.base_model,
    )
    assert abs(wrong.cosine(true)) < 0.9
    assert (wrong - true).norm() / true.norm() > 0.5


def test_save_and_load_are_inverse(model, make_diff, tmp_path):
    diff = make_diff(model, fingerprint="abc")
    loaded = LoRADiff.load(diff.save(tmp_path / "diff"))
    assert loaded.trait == diff.trait
    assert loaded.base_model == diff.base_model
    assert loaded.factors.keys() == diff.factors.keys()
    for name, each in diff.factors.items():
        assert torch.equal(each.A, loaded.factors[name].A)
        assert torch.equal(each.B, loaded.factors[name].B)
    record = json.loads((tmp_path / "diff" / "diff.json").read_text())
    assert record["base_model"] == {"name": "tiny", "fingerprint": "abc"}
    assert "torch" in record["versions"]


def test_reads_bare_files_and_the_pt_forms(model, make_diff, tmp_path):
    diff = make_diff(model)
    flat = {}
    for name, each in diff.factors.items():
        flat[f"base_model.model.{name}.lora_A.weight"] = each.A
        flat[f"base_model.model.{name}.lora_B.weight"] = each.B
    save_file(flat, tmp_path / "bare.safetensors")
    torch.save(flat, tmp_path / "flat.pt")
    torch.save({n: {"A": e.A, "B": e.B} for n, e in diff.factors.items()}, tmp_path / "nested.pt")
    torch.save({f"{n}.weight": e.delta() for n, e in diff.factors.items()}, tmp_path / "dense.pt")
    for file in ("bare.safetensors", "flat.pt", "nested.pt", "dense.pt"):
        loaded = LoRADiff.load(tmp_path / file)
        assert (loaded - diff).norm() == pytest.approx(0, abs=1e-4), file
        assert loaded.rank == diff.rank, file


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "LoRA bias"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embeddings"),
    ],
)
def test_what_is_not_a_plain_low_rank_change_is_refused(
    model, make_adapter, tmp_path, settings, message
):
    folder = make_adapter(tmp_path / "adapter", model, seed=1, **settings)
    with pytest.raises(UserError, match=message):
        LoRADiff.load(folder)


def test_adapters_of_different_bases_are_refused(model, make_adapter, tmp_path):
    folders = [make_adapter(tmp_path / sign, model, seed=1) for sign in ("pos", "neg")]
    for folder, name in zip(folders, ("a", "b"), strict=True):
        path = folder / "adapter_config.json"
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": name})
        )
    with pytest.raises(UserError, match="same base model"):
        LoRADiff.from_adapters(*folders)


def test_factors_left_on_the_disk_are_the_same(model, make_diff, tmp_path):
    folder = make_diff(model, scale=0.3).save(tmp_path / "diff")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["alpha_pattern"] = {next(iter(linear_modules(model))): 7}  # a scaling of its own
    (folder / "adapter_config.json").write_text(json.dumps(config))
    held, left = LoRADiff.load(folder), LoRADiff.load(folder, on_disk=True)
    assert list(left.factors) == list(held.factors)
    for module, factors in held.factors.items():
        assert torch.equal(left.factors[module].A, factors.A)
        assert torch.equal(left.factors[module].B, factors.B)
    assert left.norm() == held.norm()
    assert torch.equal((left * 2.0).factors[module].B, (held * 2.0).factors[module].B)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        left.factors[module]


def test_missing_truncated_and_poisoned_files_are_named(model, make_diff, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        LoRADiff.load(tmp_path / "nowhere")
    folder = make_diff(model).save(tmp_path / "diff")
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors.*truncated"):
        LoRADiff.load(folder)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(UserError, match=r"diff.*NaN"):
        LoRADiff.load(folder)
    tensors.pop(next(key for key in tensors if "lora_A" in key))
    save_file(tensors, weights)
    with pytest.raises(UserError, match="only one of lora_A and lora_B"):
        LoRADiff.load(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        LoRADiff.load(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        LoRADiff.load(tmp_path / "empty")


def test_a_pickle_with_code_in_it_is_refused(tmp_path):
    torch.save({"x": copy.copy}, tmp_path / "code.pt")
    with pytest.raises(UserError, match="tensors only"):
        LoRADiff.load(tmp_path / "code.pt")


def test_a_failed_save_leaves_the_old_diff_whole(model, make_diff, tmp_path, monkeypatch):
    diff = make_diff(model)
    folder = diff.save(tmp_path / "diff")
    before = (folder / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(
        "persona_lora.core.adapter_files.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError)
    )
    with pytest.raises(OSError):
        (diff * 2).save(folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["diff"]


def test_rslora_scaling_is_alpha_over_root_rank(model, make_adapter, tmp_path):
    folder = make_adapter(tmp_path / "a", model, seed=1, r=4, lora_alpha=8)
    config = json.loads((folder / "adapter_config.json").read_text())
    plain = LoRADiff.load(folder).norm()
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    assert LoRADiff.load(folder).norm() == pytest.approx(plain * 2)  # 8/√4 against 8/4


def test_merged_peft_weights_equal_the_delta(model, make_adapter, tmp_path):
    folder = make_adapter(tmp_path / "a", model, seed=3)
    merged = PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload()
    for name, factors in LoRADiff.load(folder).factors.items():
        before = model.get_submodule(name).weight
        torch.testing.assert_close(
            merged.get_submodule(name).weight - before, factors.delta(), atol=1e-6, rtol=1e-4
        )


def test_layer_numbers_come_from_module_names():
    assert layer_number("model.layers.12.self_attn.q_proj") == 12
    assert layer_number("transformer.h.3.attn.c_proj") == 3
    assert layer_number("lm_head") is None


@pytest.mark.parametrize("layers", [range(0, 12, 2), (3, 5, 8), ()])
def test_parts_make_up_a_diff_with_gaps_and_with_modules_outside_the_layers(layers):
    names = [f"model.layers.{at}.mlp.up_proj" for at in layers] + ["lm_head", "model.mlp.in_proj"]
    factors = {name: LoRAFactors(torch.ones(1, 2), torch.ones(2, 1)) for name in names}
    diff = LoRADiff(factors, BaseModel("tiny"))
    by_layer = [part_of(diff, part) for part in parts_of(diff, "layers")]
    assert sorted(name for part in by_layer for name in part.factors) == sorted(names)
    assert parts_of(diff, "modules") == ["lm_head", "mlp"]
    assert set(part_of(diff, "lm_head").factors) == {"lm_head"}


def test_a_band_begins_and_ends_with_layers_of_the_diff():
    factors = {
        f"model.layers.{at}.mlp.up_proj": LoRAFactors(torch.ones(1, 2), torch.ones(2, 1))
        for at in (0, 2, 4)
    }
    diff = LoRADiff(factors, BaseModel("tiny"))
    assert len(part_of(diff, "0-4").factors) == 3
    for band, named in (("0-3", "layer 3"), ("1-2", "layer 1"), ("4-0", "none was named")):
        with pytest.raises(UserError, match=rf"{named}.*; it has layers 0, 2, 4"):
            part_of(diff, band)


@pytest.mark.parametrize("training", ["lr 1e-4", ["a"], {"training": ["a"]}, {"training": None}])
def test_a_record_of_training_that_is_none_is_refused_where_a_diff_is_read(tmp_path, training):
    path = small_diff(0).save(tmp_path / "d") / "diff.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "sources": {"training": training, "seed": 1}}))
    with pytest.raises(UserError, match="d: what a diff says of its sources must be an object"):
        LoRADiff.load(tmp_path / "d")
