"""Diffs of other A, ranks and modules on one right basis: exact, or as near as a rank allows."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel, LoRADiff, LoRAFactors, mix
from persona_lora.core.shared_basis import on_one_basis
from persona_lora.steering.export import export_basis

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def diff_of(seed: int, **ranks: int) -> LoRADiff:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        {"up": UP, "down": DOWN}[name]: LoRAFactors(
            torch.randn(rank, 20, generator=generator), torch.randn(9, rank, generator=generator)
        )
        for name, rank in ranks.items()
    }
    return LoRADiff(factors, BaseModel("tiny"), trait=f"t{seed}")


def dense(diff: LoRADiff, module: str) -> torch.Tensor:
    return diff.factors[module].B.double() @ diff.factors[module].A.double()


def test_a_basis_of_full_rank_is_exact_and_every_mix_has_its_rank():
    diffs = {"a": diff_of(0, up=3, down=2), "b": diff_of(1, up=5), "c": diff_of(2, up=1, down=4)}
    found = on_one_basis(diffs, roots={UP: torch.zeros(20, 1)})  # nothing is cut: of no account
    for name, diff in diffs.items():
        assert found.diffs[name].factors.keys() == diff.factors.keys()
        assert found.errors[name] < 1e-6
        for module in diff.factors:
            torch.testing.assert_close(
                dense(found.diffs[name], module), dense(diff, module), atol=2e-6, rtol=1e-5
            )
    a, b, c = found.diffs.values()
    assert torch.equal(a.factors[UP].A, b.factors[UP].A)
    assert torch.equal(a.factors[DOWN].A, c.factors[DOWN].A)
    A = a.factors[UP].A
    torch.testing.assert_close(A @ A.T, torch.eye(9), atol=1e-6, rtol=0)
    mixed = mix({a: 1.0, b: -2.0, c: 0.5})
    assert {module: each.rank for module, each in mixed.factors.items()} == {UP: 9, DOWN: 6}
    expected = dense(a, UP) - 2 * dense(b, UP) + 0.5 * dense(c, UP)
    torch.testing.assert_close(dense(mixed, UP), expected, atol=1e-5, rtol=1e-5)


def test_a_cut_basis_is_the_best_of_its_rank_and_says_what_it_lost():
    one = diff_of(0, up=4)
    diffs = {"a": one, "b": one * 3.0}  # each counts alike, whatever its size
    found = on_one_basis(diffs, rank=2)
    values = torch.linalg.svdvals(dense(one, UP))
    lost = float(values[2:].square().sum() / values.square().sum()) ** 0.5
    assert found.errors == pytest.approx({"a": lost, "b": lost}, rel=1e-5)
    assert found.diffs["b"].rank == 2
    diffs = {"a": one, "b": diff_of(1, up=4)}
    for energy in (0.9, 0.99):
        cut = on_one_basis(diffs, energy=energy)
        total = sum(error**2 for error in cut.errors.values())
        assert 0 < total <= 2 * (1 - energy) + 1e-9


def test_roots_decide_what_a_cut_keeps():
    """A direction that no input has is cut first, however large it is in the weights."""
    A = torch.eye(20)[:2] * torch.tensor([[1.0], [50.0]])
    diffs = {"a": LoRADiff({UP: LoRAFactors(A, torch.eye(9)[:, :2])}, BaseModel("tiny"))}
    root = torch.eye(20)
    root[1, 1] = 0.001
    plain, weighed = on_one_basis(diffs, rank=1), on_one_basis(diffs, rank=1, roots={UP: root})
    assert plain.errors["a"] == pytest.approx(1 / 2501**0.5, rel=1e-3)
    assert weighed.errors["a"] == pytest.approx(0.05 / 1.0025**0.5, rel=1e-3)
    assert float(dense(weighed.diffs["a"], UP)[0, 0]) == pytest.approx(1.0)


def test_adapters_of_other_people_are_written_as_adapters(model, make_adapter, tmp_path):
    settings = ({"r": 3, "target_modules": ["q_proj", "up_proj"]}, {"r": 5, "use_rslora": True})
    paths = [
        make_adapter(tmp_path / name / "adapter", model, seed=seed, **each)
        for seed, (name, each) in enumerate(zip(("ann", "bob"), settings, strict=True))
    ]
    loaded = {str(path): LoRADiff.load(path, on_disk=True) for path in paths}
    table = export_basis(loaded, tmp_path / "basis")
    assert [row[:3] for row in table.rows] == [("ann", "3", "8"), ("bob", "5", "8")]
    ids = torch.arange(3, 12)[None]
    for name, path in zip(("ann", "bob"), paths, strict=True):
        logits = []
        for folder in (path, tmp_path / "basis" / name / "diff"):
            wrapped = PeftModel.from_pretrained(model, folder).eval()
            logits.append(wrapped(ids).logits)
            wrapped.unload()
        torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-4)


def test_what_cannot_be_put_on_one_basis_is_refused(tmp_path):
    diffs = {"a": diff_of(0, up=2), "b": diff_of(1, up=2)}
    with pytest.raises(UserError, match="either rank or energy"):
        on_one_basis(diffs, rank=1, energy=0.5)
    other = LoRADiff(diffs["a"].factors, BaseModel("another"))
    with pytest.raises(UserError, match="different base models"):
        on_one_basis({**diffs, "c": other})
    twice = {"x/evil/diff": diffs["a"], "y/evil/diff": diffs["b"]}
    with pytest.raises(UserError, match=r"x/evil/diff and another diff would both be 'evil'"):
        export_basis(twice, tmp_path)
    export_basis({"evil (seed0)": diffs["a"], "evil (a/seed1)": diffs["b"]}, tmp_path / "seeds")
    assert sorted(path.name for path in (tmp_path / "seeds").iterdir()) == [
        "evil_a_seed1", "evil_seed0",
    ]  # fmt: skip
