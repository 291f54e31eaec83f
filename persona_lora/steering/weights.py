"""Merging diffs into weights and restoring the weights bit for bit.

``ledger`` keeps the bits of what is merged; here is who merges, and what may be.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from persona_lora.core.errors import UserError
from persona_lora.core.given import whole_numbers
from persona_lora.core.lora_diff import (
    LoRADiff,
    LoRAFactors,
    as_diff,
    finite_coefficient,
)
from persona_lora.models.structure import linear_modules
from persona_lora.steering.ledger import Backup, Merges, Term, add_terms, take_out_dropped
from persona_lora.steering.placement import (
    base_fingerprint,
    check_fingerprint,
    check_writable,
    find_modules,
)
from persona_lora.steering.steerer import Steerer


class MergeReport(NamedTuple):
    """How many linear modules a merge changed, and how many the model has."""

    matched: int
    total: int


class LoRAMerger:
    """Merges diffs into a model's weights, any number of times, and restores them exactly.

    ``backup`` says where the touched weights are kept while merged: "cpu" (the model's own dtype,
    in main memory) or "device" (beside the model: faster to restore, as much device memory again
    as the touched weights take). Nothing is kept before the first merge or after a restore.

    Several mergers on one model may be restored in any order. One that is dropped takes its diffs
    with it. Call ``backward`` before the restore: gradient checkpointing runs the forward pass
    again in it, with the weights of then.
    """

    def __init__(
        self, model: nn.Module, *, backup: Backup = "cpu", allow_other_base: bool = False
    ) -> None:
        if backup not in ("cpu", "device"):
            raise UserError(f"backup must be 'cpu' or 'device', got {backup!r}")
        self.model = model
        self.allow_other_base = allow_other_base
        self._merges = Merges(backup)
        weakref.finalize(self, take_out_dropped, self._merges).atexit = False

    def merge_lora_diff(
        self,
        lora_diff: LoRADiff | str | Path,
        coefficient: float = 1.0,
        *,
        layers: int | Iterable[int] | None = None,
    ) -> MergeReport:
        """Add ``coefficient`` · diff to the weights, on top of what is merged already.

        ``layers`` are the decoder layers that it acts on; all of the diff's modules by default.
        Weights may be trainable, but no optimiser may step while a diff is merged into them.

        Whatever goes wrong in the middle, an interrupt included, leaves the weights as they were
        before the call.

        Raises:
            UserError: Before anything is touched: a diff of another base model, a module without
                a weight, a layer that the diff has not, or a weight that cannot be restored
                exactly.
        """
        diff, scale = as_diff(lora_diff), finite_coefficient(coefficient)
        if layers is not None:
            diff = diff.at(layers)
        fingerprint = base_fingerprint(self.model)
        if not self.allow_other_base:
            check_fingerprint(fingerprint, [diff])
        modules = find_modules(self.model, diff)
        check_writable(self.model, modules)
        self._merges.add(Term(diff, scale), modules, fingerprint)
        return MergeReport(len(modules), len(linear_modules(self.model)))

    def restore_original_weights(self) -> None:
        """Put back the weights as they were without this merger's diffs, bit for bit.

        Safe to call at any time, also twice, also after an interrupted merge or restore.

        Raises:
            UserError: Others wrote into merged weights, or put new ones into their place; all
                weights that there still are have been put back.
        """
        moved = self._merges.not_in(linear_modules(self.model))
        replaced, changed = self._merges.take_out()
        if replaced := replaced + moved:
            raise UserError(
                f"{_those(replaced)} replaced while a diff was merged, and the new ones may hold "
                "it; load the model anew"
            )
        if changed:
            raise UserError(
                f"{_those(changed)} changed by others while a diff was merged; the change is lost, "
                "the weights are as they were before the merge"
            )


def _those(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more were" if len(names) > 1 else " was"
    return f"{names[0]}.weight{more}"


def merged_weight(weight: Tensor, terms: Sequence[tuple[LoRAFactors, float]]) -> Tensor:
    """Return W + Σ cBA as a new tensor, summed in fp32 and rounded once: what a merge writes."""
    total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    add_terms(total, terms)
    return total.to(weight.dtype)


class LoRASteerer(Steerer):
    """Context manager: merges one or several diffs on entry, restores the weights on any exit.

    ``LoRASteerer(model, path, 1.5)`` or ``LoRASteerer(model, {evil: 1.5, sycophancy: -0.5})``;
    ``layers`` as for ``LoRAMerger.merge_lora_diff``. Raises UserError as that does, and for a
    ``coefficient`` beside those that a mapping holds.
    """

    def __init__(
        self,
        model: nn.Module,
        lora_diff_path: LoRADiff | str | Path | Mapping[LoRADiff, float],
        coefficient: float = 1.0,
        *,
        layers: int | Iterable[int] | None = None,
        backup: Backup = "cpu",
        allow_other_base: bool = False,
    ) -> None:
        super().__init__(model)
        if isinstance(lora_diff_path, Mapping) and coefficient != 1.0:
            raise UserError(
                f"coefficient {coefficient:g} would do nothing beside a mapping of diffs to their "
                "own; multiply these, or leave it out"
            )
        self.terms: Mapping[LoRADiff, float] = (
            lora_diff_path
            if isinstance(lora_diff_path, Mapping)
            else {as_diff(lora_diff_path): finite_coefficient(coefficient)}
        )
        self.layers = None if layers is None else whole_numbers(layers, "layers")
        self.merger = LoRAMerger(model, backup=backup, allow_other_base=allow_other_base)

    def apply(self) -> None:
        """Merge the diffs."""
        super().apply()
        for diff, coefficient in self.terms.items():
            self.merger.merge_lora_diff(diff, coefficient, layers=self.layers)

    def undo(self) -> None:
        """Restore the weights."""
        self.merger.restore_original_weights()
        super().undo()
