"""What a steerer is, and the ways of putting diffs and steering vectors into a model.

A steerer changes a model on entry and puts it back on exit, whatever ends the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.reversible import Reversible
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.loading import ChatModel
from persona_lora.steering.activations import ActivationSteerer, DirectionAblation, Positions
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


class Together(Reversible):
    """Several steerers at once: each is told the same rows and positions."""

    def __init__(self, steerers: Sequence[Steerer]) -> None:
        super().__init__()
        self.steerers = list(steerers)
        self._stack = ExitStack()

    def apply(self) -> None:
        """Enter all of them, in order."""
        for steerer in self.steerers:
            self._stack.enter_context(steerer)

    def undo(self) -> None:
        """Leave all of them, the last first."""
        self._stack.close()

    def select_rows(self, rows: Sequence[int]) -> None:
        """Tell all of them which rows the next batch consists of."""
        for steerer in self.steerers:
            steerer.select_rows(rows)

    def select_positions(self, response: Tensor | None) -> None:
        """Tell all of them where the responses stand."""
        for steerer in self.steerers:
            steerer.select_positions(response)


def select_batch(steerer: Steerer, rows: Sequence[int]) -> None:
    """Prepare a steerer for generating these rows."""
    steerer.select_rows(rows)
    steerer.select_positions(None)


def select_prefix(steerer: Steerer, rows: Sequence[int], length: int) -> None:
    """Prepare a steerer for the first ``length`` positions of these rows' prompts.

    None of them belongs to the response, not even the last one.
    """
    steerer.select_rows(rows)
    steerer.select_positions(torch.zeros(1, length, dtype=torch.bool))


SteeringMethod = Callable[[ChatModel, Mapping[LoRADiff, float]], Steerer]


def steer_live(chat_model: ChatModel, terms: Mapping[LoRADiff, float]) -> Steerer:
    """Hold Σ cᵢ·diffᵢ beside the weights, the same for every row."""
    return LiveLoRA(
        chat_model.model,
        list(terms),
        [list(terms.values())],
        allow_other_base=chat_model.allow_other_base,
    )


def steer_merged(chat_model: ChatModel, terms: Mapping[LoRADiff, float]) -> Steerer:
    """Merge Σ cᵢ·diffᵢ into the weights, and restore them bit for bit."""
    return LoRASteerer(chat_model.model, terms, allow_other_base=chat_model.allow_other_base)


METHODS: dict[str, SteeringMethod] = {"live": steer_live, "merged": steer_merged}


@dataclass(frozen=True, eq=False)
class ActivationSetting:
    """Steering vectors with their coefficients, and where they act.

    ``layers`` None means every layer that a vector has. With ``ablate`` the directions are
    projected out instead, and the coefficients play no part.
    """

    vectors: Mapping[SteeringVector, float]
    layers: tuple[int, ...] | None = None
    positions: Positions = "response"
    ablate: bool = False

    def steerer(self, chat_model: ChatModel) -> Steerer:
        """Return the context manager that steers the model so."""
        if not self.vectors:
            raise UserError("activation steering needs at least one steering vector")
        vectors, coefficients = list(self.vectors), list(self.vectors.values())
        model, allowed = chat_model.model, chat_model.allow_other_base
        if self.ablate:
            return DirectionAblation(
                model, vectors, self.layers, self.positions, allow_other_base=allowed
            )
        return ActivationSteerer(
            model,
            vectors,
            coefficients,
            self.layers,
            self.positions,
            allow_other_base=allowed,
        )
