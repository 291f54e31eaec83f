"""The book of merged weights: what each was, and which diffs lie on top of it, from whom.

Undoing a merge by subtraction is not undoing it: in bf16 W + Δ − Δ differs from W. So the bits of
every weight are kept while anything is merged into it, every change recomputes W = W₀ + Σ cᵢBᵢAᵢ
in fp32 from them and rounds once, and the last one to leave copies them back. Mergers may come
and go in any order.

The book is kept by weak reference to the parameter itself, so that a model, its PEFT or compiled
wrapper, and whatever else holds the parameter are one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff, LoRAFactors
from persona_lora.models.structure import weight_of

Backup = Literal["cpu", "device"]
T = TypeVar("T")


class Term(NamedTuple):
    """A diff with its coefficient, as one call of one merger added it."""

    diff: LoRADiff
    scale: float


@dataclass
class MergedWeight:
    """One weight while diffs are merged into it; ``written`` is the sum of its bits since then."""

    name: str
    original: Tensor
    fingerprint: str  # of the whole model, without any diff
    terms: list[Term] = field(default_factory=list)
    written: int | None = None  # None while it is being written


MERGED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter: MergedWeight
LOCK = threading.RLock()  # of the book, and for whoever must not read half-written weights


class Merges:
    """What one merger has in the weights; outlives it, so that it can be taken out for it."""

    def __init__(self, backup: Backup) -> None:
        self.backup = backup
        self.terms: list[Term] = []
        self._weights: dict[str, tuple[nn.Module, nn.Parameter]] = {}

    @torch.no_grad()
    def add(self, term: Term, modules: dict[str, nn.Module], fingerprint: str) -> None:
        """Merge a term into the weights of modules; whatever goes wrong, none of it stays."""

        def merge() -> None:
            try:
                self.terms.append(term)
                for name, module in modules.items():
                    self._weights[name] = module, _parameter(module)
                    self._add_to(name, module, term, fingerprint)
            except BaseException:
                self._take_out([term])
                raise

        _write_alone(merge)

    @torch.no_grad()
    def take_out(self) -> tuple[list[str], list[str]]:
        """Take all terms out; return the weights that others replaced, and those they changed.

        Safe to call again, also after an interrupt.
        """
        return _write_alone(self.take_out_now)

    def not_in(self, modules: dict[str, nn.Module]) -> list[str]:
        """Return the names of merged modules in whose place another module stands now."""
        return [
            name for name, (module, _) in self._weights.items() if modules.get(name) is not module
        ]

    @torch.no_grad()
    def take_out_now(self) -> tuple[list[str], list[str]]:
        """Do so for a caller that has the book already."""
        return self._take_out(self.terms)

    def _add_to(self, name: str, module: nn.Module, term: Term, fingerprint: str) -> None:
        entry = MERGED.get(_parameter(module))
        if entry is None:
            weight = weight_of(module)
            keep_on = torch.device("cpu") if self.backup == "cpu" else weight.device
            entry = MergedWeight(name, weight.to(keep_on, copy=True), fingerprint)
            MERGED[_parameter(module)] = entry
        elif _changed(module, entry):
            raise UserError(
                f"{name}.weight was changed by others while a diff was merged into it; restore "
                "the merged diffs before anything else writes into the weights"
            )
        entry.terms.append(term)
        _write(module, entry)

    def _take_out(self, terms: Sequence[Term]) -> tuple[list[str], list[str]]:
        replaced, changed = [], []
        gone = {id(term) for term in terms}  # all alive here
        for name, (module, weight) in self._weights.items():
            entry = MERGED.get(weight)
            if entry is None:
                continue
            if module.weight is not weight:
                replaced.append(name)
                MERGED.pop(weight, None)
                continue
            if _changed(module, entry):
                changed.append(name)
            entry.terms = [each for each in entry.terms if id(each) not in gone]
            _write(module, entry)
        self.terms = [each for each in self.terms if id(each) not in gone]
        if not self.terms:
            self._weights.clear()
        return replaced, changed


def _write(module: nn.Module, entry: MergedWeight) -> None:
    """Set one weight to W₀ + Σ cBA: summed in fp32, rounded once, in place; or close its entry."""
    entry.written = None
    weight = weight_of(module)
    weight.copy_(entry.original)
    terms = [(term.diff.factors[entry.name], term.scale) for term in entry.terms]
    if terms:
        exact = torch.promote_types(weight.dtype, torch.float32)
        total = weight.to(exact)  # the weight itself, where that is its dtype
        add_terms(total, terms)
        if total is not weight:
            weight.copy_(total)
        entry.written = _sum_of_bits(weight)
    else:
        MERGED.pop(_parameter(module), None)
    # A graph that was built before must not be differentiated with what stands here now.
    if not _parameter(module).is_inference():
        torch.autograd.graph.increment_version(_parameter(module))


def _parameter(module: nn.Module) -> nn.Parameter:
    return module.get_parameter("weight")


def add_terms(total: Tensor, terms: Sequence[tuple[LoRAFactors, float]]) -> None:
    """Add Σ cBA to a tensor in place, in its own type."""
    for factors, scale in terms:
        B, A = (each.to(total.device, total.dtype) for each in (factors.B, factors.A))
        total.addmm_(B, A, alpha=scale)


def _changed(module: nn.Module, entry: MergedWeight) -> bool:
    """Say whether anybody else has written into a merged weight."""
    return entry.written is not None and entry.written != _sum_of_bits(weight_of(module))


def _sum_of_bits(weight: Tensor) -> int:
    starts = weight.storage_offset() * weight.itemsize
    if weight.is_contiguous() and weight.nbytes % 8 == starts % 8 == 0:
        return int(weight.reshape(-1).view(torch.int64).sum())
    return int(weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]).sum())


def _refuse_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not len(MERGED):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            entry = MERGED.get(parameter)
            if entry is not None:
                raise UserError(
                    f"a step of the optimiser would change {entry.name}.weight while a diff is "
                    "merged into it, and be lost on restore; restore first, or hold the diff live "
                    "(LiveLoRA, hold: live)"
                )


register_optimizer_step_pre_hook(_refuse_step)

_BUSY = threading.Event()
_DROPPED: list[Merges] = []


def _write_alone(write: Callable[[], T]) -> T:
    """Let one thread at a time at the book, and take out what was dropped in the meantime.

    No context manager of Python's own holds the lock: an interrupt that comes in its frames would
    leave it held, and every other thread waiting.
    """
    with LOCK:
        try:
            _BUSY.set()
            return write()
        finally:
            _BUSY.clear()
            _sweep()


def take_out_dropped(merges: Merges) -> None:
    """Take out what a merger left that nobody holds any more: at once, or after a running write.

    The garbage collector may call this in the middle of one.
    """
    _DROPPED.append(merges)
    with LOCK:
        _sweep()


def _sweep() -> None:
    while _DROPPED and not _BUSY.is_set():
        _BUSY.set()
        try:
            dropped = _DROPPED[0]
            dropped.take_out_now()
            _DROPPED.remove(dropped)
        finally:
            _BUSY.clear()
