"""Weight projection against dense float64 references, and its faults."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff, LoRAFactors
from persona_lora.models.structure import (
    decoder_linear_modules,
    linear_modules,
    weight_fingerprint,
)
from persona_lora.models.weight_files import LoadedWeights, StoredWeights, weights_of
from persona_lora.projections.inputs import ModuleInputs
from persona_lora.projections.weight_space import (
    Projection,
    WeightProjector,
    project_adapter,
    project_weights,
    rounding_variance,
)
from persona_lora.steering.weights import LoRAMerger


def folder_of(model, path, *, shards=None):
    model.save_pretrained(path, **({} if shards is None else {"max_shard_size": shards}))
    return path


def perturbed(model, *, seed=0, scale=1e-2):
    """The same model with noise on every weight."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in other.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return other


def dense_reference(before, after, diffs):
    """Ten lines in float64: ΔW formed, directions formed, flattened, multiplied."""
    old, new = linear_modules(before), linear_modules(after)
    names = list(dict.fromkeys(name for diff in diffs.values() for name in diff.factors))
    delta = [(new[n].weight.double() - old[n].weight.double()).flatten() for n in names]
    dense = {
        label: [(diff.factors[n].B.double() @ diff.factors[n].A.double()).flatten() for n in names]
        for label, diff in diffs.items()
    }
    return torch.cat(delta), {label: torch.cat(each) for label, each in dense.items()}


def squares_of_change(before, after):
    """‖ΔW‖² of every parameter by name."""
    old = dict(before.named_parameters())
    return {
        name: float((new.double() - old[name].double()).square().sum())
        for name, new in after.named_parameters()
    }


@pytest.fixture
def diffs(model, make_diff):
    one = make_diff(model, seed=1)
    return {"one": one, "two": make_diff(model, seed=2) + one * 0.5}


@pytest.mark.parametrize("shards", [None, "20KB"])
def test_it_equals_a_dense_float64_reference(model, diffs, tmp_path, shards):
    after = perturbed(model)
    found = project_weights(
        StoredWeights(folder_of(model, tmp_path / "before")),
        StoredWeights(folder_of(after, tmp_path / "after", shards=shards)),
        diffs,
        block_numbers=500,  # many blocks a tensor
    )
    delta, dense = dense_reference(model, after, diffs)
    for label, direction in dense.items():
        got, inner = found.total[label], float(delta @ direction)
        assert got.inner == pytest.approx(inner, rel=1e-6)
        assert got.coordinate == pytest.approx(inner / float(direction.norm()), rel=1e-6)
        whole = math.sqrt(sum(squares_of_change(model, after).values()))
        assert got.cosine == pytest.approx(inner / float(direction.norm()) / whole, rel=1e-6)
    basis = torch.stack(list(dense.values()), dim=1)
    expected = torch.linalg.lstsq(basis, delta[:, None]).solution[:, 0]
    assert list(found.corrected.values()) == pytest.approx(expected.tolist(), rel=1e-6)
    assert found.delta_norm == pytest.approx(whole, rel=1e-6)
    share = float((basis @ expected).square().sum()) / found.delta_norm**2
    assert found.explained == pytest.approx(share, rel=1e-6)


def test_directions_on_the_disk_give_the_same_numbers(model, diffs, tmp_path):
    before, after = LoadedWeights(model, "before"), LoadedWeights(perturbed(model), "after")
    on_disk = {
        label: LoRADiff.load(diff.save(tmp_path / label), on_disk=True)
        for label, diff in diffs.items()
    }
    held, left = (project_weights(before, after, each) for each in (diffs, on_disk))
    assert left.total == held.total
    assert left.corrected == held.corrected
    adapter = on_disk["two"]
    assert project_adapter(adapter, on_disk).total == project_adapter(diffs["two"], diffs).total


def test_a_merged_direction_is_found_with_its_coefficient(model, diffs):
    after = copy.deepcopy(model)
    merger = LoRAMerger(after, allow_other_base=True)
    merger.merge_lora_diff(diffs["one"], 0.7)
    merger.merge_lora_diff(diffs["two"], -0.3)
    found = project_weights(LoadedWeights(model, "before"), LoadedWeights(after, "after"), diffs)
    assert found.corrected == pytest.approx({"one": 0.7, "two": -0.3}, rel=1e-4)
    assert found.explained == pytest.approx(1.0, rel=1e-5)
    assert found.other_square == 0.0
    assert found.total["one"].p < 1e-6


def test_a_model_does_not_drift_from_itself(model, diffs):
    found = project_weights(LoadedWeights(model, "a"), LoadedWeights(model, "b"), diffs)
    assert found.delta_norm == 0
    assert found.explained is None
    assert all(each.inner == 0 and each.p is None for each in found.total.values())


def test_a_change_of_weights_of_64_bits_is_found_whatever_the_other_has(make_model, diffs):
    model = make_model()
    after = perturbed(model)
    expected = project_weights(LoadedWeights(model, "a"), LoadedWeights(after, "b"), diffs)
    wide = copy.deepcopy(model).double(), copy.deepcopy(after).double()
    for pair in (wide, (wide[0], after), (model, wide[1])):
        found = project_weights(*(LoadedWeights(each, "w") for each in pair), diffs)
        assert found.total["one"].inner == pytest.approx(expected.total["one"].inner, rel=1e-5)


def test_layers_and_kinds_add_up(model, diffs):
    found = project_weights(LoadedWeights(model, "a"), LoadedWeights(perturbed(model), "b"), diffs)
    for parts in (found.by_layer(), found.by_kind()):
        total = sum(each["one"].inner for each in parts.values())
        assert total == pytest.approx(found.total["one"].inner)
    assert list(found.by_layer()) == [0, 1]
    assert "q_proj" in found.by_kind()
    whole = found.delta_norm**2
    shares = {(part, of): share for part, of, share in found.shares()}
    for part in ("layer", "kind"):
        assert sum(each for (name, _), each in shares.items() if name == part) == pytest.approx(1)
    squares = {each.module: each.delta_square for each in found.modules} | dict(found.others)
    for layer in (0, 1):
        own = sum(square for name, square in squares.items() if f".{layer}." in name)
        assert shares["layer", layer] == pytest.approx(own / whole)
    outside = sum(square for name, square in squares.items() if ".layers." not in name)
    assert shares["layer", "elsewhere"] == pytest.approx(outside / whole)
    same = project_weights(LoadedWeights(model, "a"), LoadedWeights(model, "b"), diffs)
    assert same.shares() == []


def test_an_adapter_needs_no_weights(model, diffs):
    adapter = diffs["two"] * 0.4
    after = copy.deepcopy(model)
    merger = LoRAMerger(after, allow_other_base=True)
    merger.merge_lora_diff(adapter, 1.0)
    dense = project_weights(LoadedWeights(model, "a"), LoadedWeights(after, "b"), diffs)
    factors = project_adapter(adapter, diffs)
    for label in diffs:
        assert factors.total[label].inner == pytest.approx(dense.total[label].inner, rel=1e-4)
        assert factors.total[label].null_sd == pytest.approx(dense.total[label].null_sd, rel=1e-4)
    assert factors.corrected == pytest.approx({"one": 0.0, "two": 0.4}, abs=1e-6)
    assert factors.explained == pytest.approx(1.0)


def of_modules(diff, *kinds):
    """The part of a diff in modules of some kinds."""
    kept = {name: each for name, each in diff.factors.items() if name.endswith(kinds)}
    return dataclasses.replace(diff, factors=kept)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_projection_does_not_depend_on_the_directions_beside_it(model, make_diff, weighted):
    """A finetune of all modules, a direction in some, and another one in the rest of a layer."""
    finetune, whole = (make_diff(model, seed=seed) for seed in (5, 6))
    names = {"a": of_modules(whole, "layers.0.self_attn.q_proj", "v_proj")}
    inputs = made_inputs(model) if weighted else None
    companies = {
        "more kinds": of_modules(whole, "up_proj", "o_proj"),
        "another layer of a kind": of_modules(whole, "layers.1.self_attn.q_proj"),
        "all": whole,
    }
    after = copy.deepcopy(model)
    LoRAMerger(after, allow_other_base=True).merge_lora_diff(finetune, 1.0)
    after.model.layers[0].input_layernorm.weight.data += 0.1  # no diff can touch it
    sides = LoadedWeights(model, "a"), LoadedWeights(after, "b")
    alone = project_adapter(finetune, names, inputs=inputs)
    of_weights = project_weights(*sides, names, inputs=inputs)
    both = (inputs.weigh(each) if weighted else each for each in (finetune, names["a"]))
    assert alone.total["a"].cosine == pytest.approx(next(both).cosine(next(both)), rel=1e-6)
    for company in companies.values():
        beside = {**names, "b": company}
        for one, other in (
            (alone, project_adapter(finetune, beside, inputs=inputs)),
            (of_weights, project_weights(*sides, beside, inputs=inputs)),
        ):
            pairs = [(one.total, other.total)]
            for mine, theirs in (
                (one.by_layer(), other.by_layer()), (one.by_kind(), other.by_kind())
            ):  # fmt: skip
                pairs += [(mine[part], theirs[part]) for part in mine]
            for first, second in pairs:
                found = [each or 0.0 for each in dataclasses.astuple(second["a"])]
                expected = [each or 0.0 for each in dataclasses.astuple(first["a"])]
                assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_cosines_of_layers_and_kinds_are_in_all_that_these_hold(model, make_diff):
    after, diff = perturbed(model), of_modules(make_diff(model, seed=1), "q_proj")
    found = project_weights(LoadedWeights(model, "a"), LoadedWeights(after, "b"), {"a": diff})
    squares = squares_of_change(model, after)
    for parts, inside in (
        (found.by_layer(), lambda part, name: f"layers.{part}." in name),
        (found.by_kind(), lambda part, name: name.endswith(f"{part}.weight")),
    ):
        for part, each in parts.items():
            norm = math.sqrt(sum(square for name, square in squares.items() if inside(part, name)))
            assert each["a"].cosine == pytest.approx(each["a"].coordinate / norm, rel=1e-6)


def test_projections_stay_where_the_factors_lie(diffs):
    expected = project_adapter(diffs["two"], diffs, control=diffs["one"]).total
    with torch.device("meta"):  # where a tensor lands that is made without naming a device
        found = project_adapter(diffs["two"], diffs, control=diffs["one"]).total
    assert found == expected


def test_an_adapter_that_has_not_moved_yet_projects_to_zero(diffs):
    """B starts at zero, and a warm-up's first step leaves it there."""
    found = project_adapter(diffs["one"] * 0.0, diffs)
    assert found.delta_norm == 0
    assert all((each.coordinate, each.p) == (0.0, None) for each in found.total.values())


def test_a_direction_of_no_length_has_no_projection_and_no_test(diffs):
    """Beside one that has a length as small as any: its own coordinate is what was planted."""
    names = {"nothing": diffs["one"] * 0.0, "one": diffs["one"] * 1e-6}
    found = project_adapter(diffs["two"] + diffs["one"] * 0.5, names).total
    assert found["nothing"] == Projection(0.0, 0.0, 0.0, 0.0, None, 0.0)
    whole = project_adapter(diffs["two"] + diffs["one"] * 0.5, {"one": diffs["one"]}).total["one"]
    assert found["one"].coordinate == pytest.approx(whole.coordinate, rel=1e-4)
    assert found["one"].p == pytest.approx(whole.p, rel=1e-3)
    assert whole.coordinate > 0


def turned(diff, seed):
    """The same A and singular values, the outputs turned at random."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, each in diff.factors.items():
        size = len(each.B)
        q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        factors[name] = LoRAFactors(each.A, ((q * r.diagonal().sign()) @ each.B.double()).float())
    return dataclasses.replace(diff, factors=factors)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_null_is_that_of_directions_of_the_same_inputs_turned_at_random(
    model, make_diff, weighted
):
    """An adapter whose A is nearly the direction's, as adapters of one seed have it."""
    direction = make_diff(model, seed=3, rank=2)
    adapter = turned(direction, 999) + make_diff(model, seed=4, rank=1) * 0.1
    inputs = made_inputs(model) if weighted else None
    random = {str(seed): turned(direction, seed) for seed in range(200)}
    found = project_adapter(adapter, random, inputs=inputs)
    predicted = project_adapter(adapter, {"one": direction}, inputs=inputs).total["one"].null_sd
    coordinates = np.array([each.coordinate for each in found.total.values()])
    assert coordinates.std() == pytest.approx(predicted, rel=0.15)
    assert 0.01 <= np.mean([each.p < 0.05 for each in found.total.values()]) <= 0.11


def test_directions_of_fresh_inputs_are_no_null_for_an_adapter_of_the_same_seed(model, make_diff):
    direction = make_diff(model, seed=3, rank=2)
    adapter = turned(direction, 999)
    fresh = {str(seed): make_diff(model, seed=seed, rank=2) for seed in range(10, 60)}
    found = project_adapter(adapter, {**fresh, "own": direction}).total
    spread = np.std([found[name].coordinate for name in fresh])
    assert spread < 0.7 * found["own"].null_sd


def made_inputs(model):
    """A root for every linear module: inputs with a few strong directions."""
    generator = torch.Generator().manual_seed(8)
    roots = {
        name: torch.randn(module.weight.shape[1], 5, generator=generator)
        for name, module in decoder_linear_modules(model).items()
    }
    return ModuleInputs(roots, weight_fingerprint(model), "prompts", 100)


def test_weighted_sums_equal_a_dense_float64_reference(model, diffs, make_diff):
    inputs, after, control = made_inputs(model), perturbed(model), make_diff(model, seed=7)
    before = LoadedWeights(model, "a")
    found = project_weights(
        before, LoadedWeights(after, "b"), diffs, inputs=inputs, control=control, block_numbers=500
    )
    old, new = linear_modules(model), linear_modules(after)
    inner = dict.fromkeys(diffs, 0.0)
    null = square = 0.0
    for name in diffs["one"].factors:
        root = inputs.roots[name].double()
        sigma = root @ root.T
        delta = new[name].weight.double() - old[name].weight.double()
        delta = delta - control.factors[name].B.double() @ control.factors[name].A.double()
        square += float((delta @ sigma * delta).sum())
        for label, diff in diffs.items():
            direction = diff.factors[name].B.double() @ diff.factors[name].A.double()
            inner[label] += float((delta @ sigma * direction).sum())
        direction = diffs["one"].factors[name].B.double() @ diffs["one"].factors[name].A.double()
        null += float((direction @ sigma @ delta.T).square().sum()) / len(delta)
    for label in diffs:
        assert found.total[label].inner == pytest.approx(inner[label], rel=1e-5)
    assert sum(m.delta_square for m in found.modules) == pytest.approx(square, rel=1e-5)
    assert sum(m.null_square[0] for m in found.modules) == pytest.approx(null, rel=1e-5)


def test_weighing_an_adapter_equals_weighing_the_model_that_it_is_merged_into(model, diffs):
    inputs, after = made_inputs(model), copy.deepcopy(model)
    merger = LoRAMerger(after, allow_other_base=True)
    merger.merge_lora_diff(diffs["two"], 1.0)
    models = LoadedWeights(model, "a"), LoadedWeights(after, "b")
    dense = project_weights(*models, diffs, inputs=inputs, control=diffs["one"])
    factors = project_adapter(diffs["two"], diffs, inputs=inputs, control=diffs["one"])
    for label in diffs:
        for what in ("inner", "cosine", "null_sd"):
            one, other = (getattr(each.total[label], what) for each in (dense, factors))
            assert one == pytest.approx(other, rel=1e-3)
    direct = inputs.weigh(diffs["two"] - diffs["one"]).inner(inputs.weigh(diffs["one"]))
    assert factors.total["one"].inner == pytest.approx(direct, rel=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_rounding_floor_is_the_spread_over_roundings(model, diffs, weighted):
    inputs = made_inputs(model) if weighted else None
    before, errors, floor = LoadedWeights(model, "a"), [], 0.0
    for seed in range(40):
        exact = perturbed(model, seed=seed, scale=1.0)
        rounded = copy.deepcopy(exact).bfloat16()
        found = [
            project_weights(before, LoadedWeights(each, "b"), diffs, inputs=inputs).total["one"]
            for each in (exact, rounded)
        ]
        errors.append(found[1].coordinate - found[0].coordinate)
        floor = found[1].rounding_sd
    assert np.std(errors) == pytest.approx(floor, rel=0.35)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 2e-5)]
)
def test_the_rounding_floor_is_the_error_that_rounding_makes(dtype, scale):
    torch.manual_seed(0)
    exact = scale * torch.randn(400, 400)  # the smallest of the last are subnormal
    rounded = exact.to(dtype)
    error = float((rounded.double() - exact.double()).square().sum())
    assert rounding_variance(rounded) == pytest.approx(error, rel=0.03)
    assert rounding_variance(exact) == 0
    assert rounding_variance(torch.zeros(3, 3, dtype=dtype)) == 0


def test_tied_weights_count_once(tmp_path, diffs):
    from tests.conftest import tiny_llama

    before, after = tiny_llama(tied=True), perturbed(tiny_llama(tied=True))
    loaded = project_weights(LoadedWeights(before, "a"), LoadedWeights(after, "b"), diffs)
    folders = [folder_of(each, tmp_path / name) for name, each in (("a", before), ("b", after))]
    twice = load_file(folders[1] / "model.safetensors")
    twice["lm_head.weight"] = twice["model.embed_tokens.weight"].clone()
    save_file(twice, folders[1] / "model.safetensors", metadata={"format": "pt"})
    stored = project_weights(*map(StoredWeights, folders), diffs)
    assert stored.delta_norm == pytest.approx(loaded.delta_norm)


def test_the_named_call_gives_a_number_a_layer(model, diffs, tmp_path):
    after = folder_of(perturbed(model), tmp_path / "after")
    before = folder_of(model, tmp_path / "before")
    found = WeightProjector.compute_layer_projections(
        after, diffs["one"], num_layers=2, original=before
    )
    whole = project_weights(weights_of(before), weights_of(after), {"diff": diffs["one"]})
    assert found == {layer: each["diff"].coordinate for layer, each in whole.by_layer().items()}
    with pytest.raises(UserError, match="num_layers is 1"):
        WeightProjector.compute_layer_projections(after, diffs["one"], 1, original=before)


# -- faults ---------------------------------------------------------------------------------


def test_other_weights_are_named(model, diffs):
    class Renamed(LoadedWeights):
        def __init__(self, model, label):
            super().__init__(model, label)
            self.tensors["model.odd.weight"] = self.tensors.pop("model.norm.weight")

    with pytest.raises(UserError, match=r"b lacks model\.norm\.weight; a lacks model\.odd"):
        project_weights(LoadedWeights(model, "a"), Renamed(model, "b"), diffs)
    reshaped = LoadedWeights(model, "b")
    reshaped.tensors["model.norm.weight"] = torch.zeros(7)
    with pytest.raises(UserError, match=r"model\.norm\.weight is \[32\] in a and \[7\] in b"):
        project_weights(LoadedWeights(model, "a"), reshaped, diffs)


def test_a_diff_of_another_model_is_named(model, make_diff, diffs):
    factors = diffs["one"].factors
    strange = LoRADiff(
        {"model.layers.9.q_proj": next(iter(factors.values()))}, diffs["one"].base_model
    )
    weights = LoadedWeights(model, "a")
    with pytest.raises(UserError, match=r"no weight model\.layers\.9"):
        project_weights(weights, weights, {"strange": strange})
    with pytest.raises(UserError, match="share no module"):
        project_adapter(strange, diffs)
    with pytest.raises(UserError, match="at least one diff"):
        project_weights(weights, weights, {})


def test_a_truncated_or_missing_shard_is_named(model, tmp_path):
    folder = folder_of(model, tmp_path / "model", shards="20KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=shard.name):
        StoredWeights(folder)
    shard.unlink()
    with pytest.raises(UserError, match=f"lacks the shard {shard.name}"):
        StoredWeights(folder)
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        StoredWeights(tmp_path)


def test_an_unmerged_adapter_is_refused(model):
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(UserError, match="unmerged adapter"):
        LoadedWeights(wrapped, "wrapped")


def test_overflowed_weights_are_refused(model, diffs):
    broken = copy.deepcopy(model)
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(UserError, match="NaN or infinity"):
        project_weights(LoadedWeights(model, "a"), LoadedWeights(broken, "b"), diffs)


def test_a_control_that_is_not_of_these_weights_is_refused(model, make_diff):
    models = LoadedWeights(model, "a"), LoadedWeights(perturbed(model), "b")
    diff = make_diff(model)
    (name, factors), *_ = diff.factors.items()
    elsewhere = dataclasses.replace(diff, factors={"transformer.h.0.attn": factors})
    with pytest.raises(UserError, match=r"has no weight transformer\.h\.0\.attn\.weight"):
        project_weights(*models, {"diff": diff}, control=elsewhere)
    narrow = dataclasses.replace(diff, factors={name: LoRAFactors(factors.A[:, :1], factors.B[:1])})
    with pytest.raises(UserError, match=r"is \[1, 1\] in a diff"):
        project_weights(*models, {"diff": diff}, control=narrow)
