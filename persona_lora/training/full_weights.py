"""The difference of two models trained in full, cut to a rank: a direction like any other.

This is contrastive weight steering as published (Fierro & Roger 2025, arXiv:2511.05408), whose
difference is of full rank, as far as a low-rank diff can hold it. Knows two model folders and the
modules that were trained; refuses to know how.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from persona_lora.core import progress
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRAFactors
from persona_lora.models.structure import canonical_name
from persona_lora.models.weight_files import StoredWeights

MORE, ITERATIONS = 16, 8  # vectors beyond the rank, and passes, that find the leading ones


class CutDifference(NamedTuple):
    """Factors by module, and the share of ‖W₊ − W₋‖² that they keep."""

    factors: dict[str, LoRAFactors]
    kept: float


def cut_difference(pos: Path, neg: Path, modules: Sequence[str], rank: int) -> CutDifference:
    """Return factors of ``rank`` near to W₊ − W₋ of each of the modules (``near_factors``).

    Raises UserError where the models are equal.
    """
    plus, minus = StoredWeights(pos), StoredWeights(neg)
    factors, kept, total = {}, 0.0, 0.0
    for module in progress.over("cutting the difference", sorted(modules)):
        name = f"{canonical_name(module)}.weight"
        rows = plus.tensors[name].shape[0]
        delta = (plus.rows(name, 0, rows).double() - minus.rows(name, 0, rows).double()).float()
        own = near_factors(delta, rank)
        factors[canonical_name(module)] = own
        kept += float(own.B.double().square().sum())
        total += float(delta.double().square().sum())
    if total == 0:
        raise UserError(f"{pos} and {neg} hold the same weights; train them on, or further")
    return CutDifference(factors, kept / total)


def near_factors(delta: Tensor, rank: int) -> LoRAFactors:
    """Return B ``[out, rank]`` and A ``[rank, in]``, of orthonormal rows, near to a matrix.

    Its leading singular vectors, by randomised subspace iteration: of a matrix of 4096 rows in
    seconds, where all of them take minutes. The same matrix gives the same factors.

    Source:
        Halko, Martinsson and Tropp 2011, arXiv:0909.4061.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = min(rank + MORE, *delta.shape)
        left, values, right = torch.svd_lowrank(delta, q=size, niter=ITERATIONS)
    B = left[:, :rank] * values[:rank]
    return LoRAFactors(A=right[:, :rank].T.contiguous(), B=B.contiguous())
