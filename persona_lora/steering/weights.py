"""Merging diffs into weights and restoring the weights bit for bit.

Undoing a merge by subtraction is not undoing it: in bf16 W + Δ − Δ differs from W. So the weights
that a merge touches are kept, every merge recomputes W = W₀ + Σ cᵢBᵢAᵢ in fp32 from them and
rounds once, and restoring copies them back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff, LoRAFactors, finite_coefficient
from persona_lora.models.structure import linear_modules, weight_of
from persona_lora.steering.placement import (
    MERGED,
    MergedState,
    as_diff,
    base_fingerprint,
    check_base_model,
    check_writable,
    find_modules,
)

Backup = Literal["cpu", "device"]


class MergeReport(NamedTuple):
    """How many linear modules a merge changed, and how many the model has."""

    matched: int
    total: int


class LoRAMerger:
    """Merges diffs into a model's weights, any number of times, and restores them exactly.

    ``backup`` says where the touched weights are kept while merged: "cpu" (the model's own dtype,
    in main memory) or "device" (beside the model: faster to restore, as much device memory again
    as the touched weights take). Nothing is kept before the first merge or after a restore.

    Nested mergers on one model are restored in reverse order.
    """

    def __init__(
        self, model: nn.Module, *, backup: Backup = "cpu", allow_other_base: bool = False
    ) -> None:
        if backup not in ("cpu", "device"):
            raise UserError(f"backup must be 'cpu' or 'device', got {backup!r}")
        self.model = model
        self.backup = backup
        self.allow_other_base = allow_other_base
        self._terms: list[tuple[LoRADiff, float]] = []
        self._modules: dict[str, nn.Module] = {}
        self._originals: dict[str, Tensor] = {}

    @torch.no_grad()
    def merge_lora_diff(
        self, lora_diff: LoRADiff | str | Path, coefficient: float = 1.0
    ) -> MergeReport:
        """Add ``coefficient`` · diff to the weights, on top of what is merged already.

        Raises UserError, before anything is touched, for a diff of another base model, a module
        without a weight, or a weight that cannot be restored exactly. Whatever goes wrong in the
        middle, an interrupt included, leaves the weights as they were before the call.
        """
        diff, scale = as_diff(lora_diff), finite_coefficient(coefficient)
        check_base_model(self.model, [diff], allow_other_base=self.allow_other_base)
        modules = find_modules(self.model, diff)
        check_writable(self.model, modules)
        self._announce()
        before = list(self._terms)
        self._modules.update(modules)
        try:
            self._terms.append((diff, scale))
            for name in modules:
                self._write(name)
        except BaseException:
            self._terms = before
            for name in modules:
                if name in self._originals:
                    self._write(name)
            raise
        return MergeReport(len(modules), len(linear_modules(self.model)))

    @torch.no_grad()
    def restore_original_weights(self) -> None:
        """Put back the weights as they were before the first merge, bit for bit.

        Safe to call at any time, also twice, also after an interrupted merge or restore.
        """
        state = MERGED.get(self.model)
        if state is not None and id(self) in state.mergers and state.mergers[-1] != id(self):
            raise UserError(
                "another LoRAMerger changed this model later and must be restored before this one"
            )
        for name, original in self._originals.items():
            weight_of(self._modules[name]).copy_(original)
        self._terms.clear()
        self._originals.clear()
        self._modules.clear()
        if state is not None and id(self) in state.mergers:
            state.mergers.remove(id(self))
            if not state.mergers:
                del MERGED[self.model]

    def _announce(self) -> None:
        fingerprint = base_fingerprint(self.model)
        state = MERGED.setdefault(self.model, MergedState(fingerprint))
        if id(self) not in state.mergers:
            state.mergers.append(id(self))

    def _write(self, name: str) -> None:
        """Set one weight to W₀ + Σ cBA: summed in fp32, rounded once, in place."""
        weight = weight_of(self._modules[name])
        if name not in self._originals:
            keep_on = torch.device("cpu") if self.backup == "cpu" else weight.device
            self._originals[name] = weight.to(keep_on, copy=True)
        else:
            weight.copy_(self._originals[name])
        terms = [(diff.factors[name], scale) for diff, scale in self._terms if name in diff.factors]
        if not terms:
            return
        exact = torch.promote_types(weight.dtype, torch.float32)
        total = weight.to(exact)  # the weight itself, where that is its dtype
        _add_terms(total, terms)
        if total is not weight:
            weight.copy_(total)


def merged_weight(weight: Tensor, terms: Sequence[tuple[LoRAFactors, float]]) -> Tensor:
    """Return W + Σ cBA as a new tensor, summed in fp32 and rounded once: what a merge writes."""
    total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    _add_terms(total, terms)
    return total.to(weight.dtype)


def _add_terms(total: Tensor, terms: Sequence[tuple[LoRAFactors, float]]) -> None:
    for factors, scale in terms:
        B, A = (each.to(total.device, total.dtype) for each in (factors.B, factors.A))
        total.addmm_(B, A, alpha=scale)


class LoRASteerer:
    """Context manager: merges one or several diffs on entry, restores the weights on any exit.

    ``LoRASteerer(model, path, 1.5)`` or ``LoRASteerer(model, {evil: 1.5, sycophancy: -0.5})``.
    """

    def __init__(
        self,
        model: nn.Module,
        lora_diff_path: LoRADiff | str | Path | Mapping[LoRADiff, float],
        coefficient: float = 1.0,
        *,
        backup: Backup = "cpu",
        allow_other_base: bool = False,
    ) -> None:
        self.terms: Mapping[LoRADiff, float] = (
            lora_diff_path
            if isinstance(lora_diff_path, Mapping)
            else {as_diff(lora_diff_path): finite_coefficient(coefficient)}
        )
        self.merger = LoRAMerger(model, backup=backup, allow_other_base=allow_other_base)

    def __enter__(self) -> Self:
        try:
            for diff, coefficient in self.terms.items():
                self.merger.merge_lora_diff(diff, coefficient)
        except BaseException:
            self.merger.restore_original_weights()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.merger.restore_original_weights()

    def select_rows(self, rows: Sequence[int]) -> None:
        """Do nothing: a merged model is the same for every row."""

    def select_positions(self, response: Tensor | None) -> None:
        """Do nothing: merged weights act on every position."""
