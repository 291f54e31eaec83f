"""What a steerer is, and the ways of putting a diff into a model.

A steerer changes a model on entry and puts it back on exit, whatever ends the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

from torch import Tensor, nn

from persona_lora.core.lora_diff import LoRADiff
from persona_lora.steering.live import LiveLoRA
from persona_lora.steering.weights import LoRASteerer


class Steerer(Protocol):
    """A context manager over a model; it is told which rows the next batch holds.

    A batch of whole texts, which no generation produces step by step, needs to be told where the
    responses stand: ``select_positions`` takes a mask ``[batch or 1, sequence]``, or None to go
    back to generation.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def select_rows(self, rows: Sequence[int]) -> None: ...

    def select_positions(self, response: Tensor | None) -> None: ...


class Unsteered:
    """The steerer that changes nothing: the control of every comparison."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    def select_rows(self, rows: Sequence[int]) -> None:
        """Do nothing: every row meets the same model."""

    def select_positions(self, response: Tensor | None) -> None:
        """Do nothing: every position meets the same model."""


SteeringMethod = Callable[[nn.Module, Mapping[LoRADiff, float], bool], Steerer]


def steer_live(
    model: nn.Module, terms: Mapping[LoRADiff, float], allow_other_base: bool
) -> Steerer:
    """Hold Σ cᵢ·diffᵢ beside the weights, the same for every row."""
    coefficients = [list(terms.values())]
    return LiveLoRA(model, list(terms), coefficients, allow_other_base=allow_other_base)


def steer_merged(
    model: nn.Module, terms: Mapping[LoRADiff, float], allow_other_base: bool
) -> Steerer:
    """Merge Σ cᵢ·diffᵢ into the weights, and restore them bit for bit."""
    return LoRASteerer(model, terms, allow_other_base=allow_other_base)


METHODS: dict[str, SteeringMethod] = {"live": steer_live, "merged": steer_merged}
