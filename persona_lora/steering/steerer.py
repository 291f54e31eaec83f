"""What a steerer is: a change of a model that is told which rows and positions come next.

Threads take turns at a model (``models/turns``). One thread may nest its steerers; another waits
until the first has left them all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn

from persona_lora.core.chat import Conversation
from persona_lora.core.options import GenerationOptions
from persona_lora.models.generation import Generated, RowPlan, generate_answers
from persona_lora.models.hooks import Hooked
from persona_lora.models.loading import ChatModel
from persona_lora.models.turns import Turn


class Steerer(Hooked):
    """Context manager over a model: changes it on entry and puts it back on exit.

    It takes its turn at ``model`` and puts its ``hooks``; without a model it does neither. Every
    row and every position meets the same change, unless a subclass says otherwise. Call
    ``backward`` inside the block, too: gradient checkpointing runs the forward pass again in it.
    """

    def __init__(self, model: nn.Module | None = None, *, every: bool = False) -> None:
        super().__init__(model=model, every=every)
        self._turn = None if model is None else Turn(model, self.rows_apart)

    def apply(self) -> None:
        """Put the hooks, when no other thread steers the model."""
        if self._turn is not None:
            self._turn.take()
        super().apply()

    def undo(self) -> None:
        """Take the hooks off."""
        super().undo()
        if self._turn is not None:
            self._turn.leave()

    def answers(
        self,
        chat_model: ChatModel,
        conversations: Sequence[Conversation],
        numbers: Sequence[int],
        options: GenerationOptions,
        plan: RowPlan,
    ) -> list[Generated]:
        """Answer conversations, which are the rows ``numbers``, inside this steerer.

        ``plan`` counts in places among these; so do the numbers that its ``on_batch`` gets.
        """

        def named(batch: Sequence[int]) -> list[int]:
            return [numbers[place] for place in batch]

        return generate_answers(
            chat_model,
            conversations,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
            batch_size=options.batch_size,
            prepare_batch=lambda batch: select_batch(self, named(batch)),
            plan=replace(
                plan,
                prepare_prefix=lambda batch, length: select_prefix(self, named(batch), length),
                keep_rows=self.keep_rows,
            ),
        )

    def rows_apart(self) -> int:
        """Return how many rows have a change of their own; 1 where all meet the same."""
        return 1

    def select_rows(self, rows: Sequence[int]) -> None:
        """Take which rows the next batch consists of, in its order."""

    def keep_rows(self, places: Sequence[int]) -> None:
        """Take which rows of the batch go on, by their places in it, in their new order."""

    def select_positions(self, response: Tensor | None) -> None:
        """Take where the responses of whole texts stand: ``[batch or 1, sequence]``.

        No generation produces these step by step. None goes back to generation.
        """


class Unsteered(Steerer):
    """The steerer that changes nothing: the control of every comparison."""


class Together(Steerer):
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

    def keep_rows(self, places: Sequence[int]) -> None:
        """Tell all of them which rows of the batch go on."""
        for steerer in self.steerers:
            steerer.keep_rows(places)

    def select_positions(self, response: Tensor | None) -> None:
        """Tell all of them where the responses stand."""
        for steerer in self.steerers:
            steerer.select_positions(response)


class Parted(Steerer):
    """Rows of two steerers: those in ``own`` are answered inside ``near``, the rest inside ``far``.

    Either steers while its rows are answered.
    """

    def __init__(self, near: Steerer, far: Steerer, own: Collection[int]) -> None:
        super().__init__()
        self.near, self.far, self.own = near, far, own

    def answers(
        self,
        chat_model: ChatModel,
        conversations: Sequence[Conversation],
        numbers: Sequence[int],
        options: GenerationOptions,
        plan: RowPlan,
    ) -> list[Generated]:
        """Answer the rows of the one, then those of the other."""
        found: dict[int, Generated] = {}
        for steerer, near in ((self.far, False), (self.near, True)):
            places = [at for at, number in enumerate(numbers) if (number in self.own) == near]
            if places:
                asked, rows = [conversations[at] for at in places], [numbers[at] for at in places]
                with steerer:
                    part = steerer.answers(chat_model, asked, rows, options, _part(plan, places))
                found.update(zip(places, part, strict=True))
        return [found[at] for at in range(len(numbers))]


def _part(plan: RowPlan, places: Sequence[int]) -> RowPlan:
    """Return the plan of some of its rows, by their places."""

    def told(batch: Sequence[int], generated: Sequence[Generated]) -> None:
        if plan.on_batch is not None:
            plan.on_batch([places[at] for at in batch], generated)

    streams = places if plan.streams is None else [plan.streams[at] for at in places]
    alike = None if plan.alike is None else [plan.alike[at] for at in places]
    return replace(plan, streams=streams, alike=alike, on_batch=told)


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
