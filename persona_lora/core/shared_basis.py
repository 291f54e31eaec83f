"""Diffs that were made apart, brought onto one right basis: ΔWₖ = ΔBₖ·A with one A per module.

With BₖAₖ = Qₖ(RₖAₖ), Q orthonormal, the stacked rows [R₁A₁; R₂A₂; …] are the right sides of all
diffs as large as they are; their leading right directions serve all of them best. A has orthonormal
rows; a mix of any number of such diffs has the rank of A. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from persona_lora.core.lora_diff import (
    LoRADiff,
    LoRAFactors,
    check_cut,
    shared_base_model,
    truncated,
)

Roots = Mapping[str, Tensor]  # R [in, k] by module, with E[x xᵀ] = R Rᵀ


class OnBasis(NamedTuple):
    """Diffs of one A per module, and the share of each that was lost, ‖ΔW − ΔB·A‖ / ‖ΔW‖."""

    diffs: dict[str, LoRADiff]
    errors: dict[str, float]


def on_one_basis(
    diffs: Mapping[str, LoRADiff],
    *,
    rank: int | None = None,
    energy: float | None = None,
    roots: Roots | None = None,
) -> OnBasis:
    """Bring diffs onto one orthonormal right basis per module.

    Exactly, or cut to ``rank``, or to what keeps the share ``energy`` of all ‖·‖² in each module,
    in which every diff counts alike. With ``roots`` ‖·‖ is that of ΔW·R, the error on real inputs.
    A module that a diff does not change is left out of it: that is a ΔB of zero.

    Raises:
        UserError: Diffs of different base models, or both of ``rank`` and ``energy``.
    """
    if rank is None and energy is None:
        energy, roots = 1.0, None  # nothing is cut, whatever the inputs
    check_cut(rank, energy)
    base_model = shared_base_model(list(diffs.values()))
    sizes = {name: _size(diff.factors, roots) for name, diff in diffs.items()}
    found: dict[str, dict[str, LoRAFactors]] = {name: {} for name in diffs}
    for module in sorted({module for diff in diffs.values() for module in diff.factors}):
        held = {
            name: diff.factors[module] for name, diff in diffs.items() if module in diff.factors
        }
        root = None if roots is None else roots[module]
        weights = {name: sizes[name] or 1.0 for name in held}
        for name, factors in _on_basis(held, weights, rank, energy, root).items():
            found[name][module] = factors
    made = {
        name: replace(
            diff,
            factors=found[name],
            base_model=base_model,
            sources={
                **diff.sources,
                **({"kept": None} if "kept" in diff.sources else {}),
                "basis_of": list(diffs),
            },
        )
        for name, diff in diffs.items()
    }
    errors = {
        name: _size(_differences(diff, made[name]), roots) / (sizes[name] or 1.0)
        for name, diff in diffs.items()
    }
    return OnBasis(made, errors)


def _on_basis(
    held: Mapping[str, LoRAFactors],
    weights: Mapping[str, float],
    rank: int | None,
    energy: float | None,
    root: Tensor | None,
) -> dict[str, LoRAFactors]:
    frames, rights = {}, {}
    for name, each in held.items():
        frames[name], upper = torch.linalg.qr(each.B.double())
        rights[name] = upper @ each.A.double() / weights[name]
    stacked = torch.cat(list(rights.values()))
    whole = LoRAFactors(stacked, torch.eye(len(stacked), dtype=torch.float64))
    cut = truncated(whole, rank, energy, root).factors
    basis, lower = torch.linalg.qr(cut.A.double().T)
    A = basis.T.float().contiguous()
    parts = torch.split(cut.B.double() @ lower.T, [len(each) for each in rights.values()])
    return {
        name: LoRAFactors(A, (weights[name] * (frames[name] @ part)).float())
        for name, part in zip(held, parts, strict=True)
    }


def _differences(diff: LoRADiff, near: LoRADiff) -> dict[str, LoRAFactors]:
    """Return diff − near by module, never added up: what is left may be as small as rounding."""
    pairs = ((module, diff.factors[module], near.factors[module]) for module in diff.factors)
    return {
        module: LoRAFactors(torch.cat([one.A, two.A]), torch.cat([one.B, -two.B], dim=1))
        for module, one, two in pairs
    }


def _size(factors: Mapping[str, LoRAFactors], roots: Roots | None) -> float:
    """Return ‖ΔW‖, or ‖ΔW·R‖, over all modules."""
    squares = []
    for module, each in factors.items():
        A = each.A.double() if roots is None else each.A.double() @ roots[module].double()
        weighed = LoRAFactors(A, each.B)
        squares.append(max(weighed.inner(weighed), 0.0))
    return math.sqrt(math.fsum(squares))
