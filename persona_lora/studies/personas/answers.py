"""Answers of many mixes of directions to many prompts, as the rows of as few batches as fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from persona_lora.core import progress
from persona_lora.core.chat import user_question
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError
from persona_lora.core.personas import Coefficients
from persona_lora.models.generation import Generated, generate_answers
from persona_lora.models.loading import ChatModel
from persona_lora.models.processes import Alone, Processes
from persona_lora.steering.steerer import Steerer, Unsteered, select_batch, select_prefix
from persona_lora.studies.asking.run import GenerationOptions
from persona_lora.studies.steering.equal_effect import Directions


class Cell(NamedTuple):
    """One answer to be generated: to a prompt, under a mix (None: unsteered) and a system prompt.

    ``stream`` names the random numbers that sampling uses; equal ones are shared.
    """

    prompt: str
    mix: Coefficients | None = None
    system_prompt: str | None = None
    stream: int = 0


@dataclass(frozen=True, eq=False)
class Speaker:
    """A model that answers under any mix of directions: coefficient = alpha · x · scale.

    ``scales`` are coefficients by trait (see ``equal_effect_scales``). Rows are shared out over
    ``processes``, and every process gets all answers.
    """

    chat_model: ChatModel
    directions: Directions | None
    scales: Mapping[str, float]
    alpha: float
    options: GenerationOptions
    processes: Processes

    def inputs(self) -> dict[str, str]:
        """Return digests of the model, of the directions, and of how they are scaled."""
        steering = {} if self.directions is None else self.directions.inputs()
        scaled = digest_of([self.alpha, dict(self.scales)])
        return {**self.chat_model.inputs(), **steering, "the scales": scaled}

    def answers(
        self,
        cells: Sequence[Cell],
        *,
        on_batch: Callable[[Sequence[int], Sequence[str]], None] | None = None,
    ) -> list[str]:
        """Return one answer a cell, in order; ``on_batch`` sees this process's as they come."""
        own = range(self.processes.index, len(cells), self.processes.count)
        texts = self._own_answers([cells[at] for at in own], list(own), on_batch)
        found = dict(self.processes.gather(list(zip(own, texts, strict=True))))
        return [found[at] for at in range(len(cells))]

    def _own_answers(
        self,
        cells: Sequence[Cell],
        places: Sequence[int],
        on_batch: Callable[[Sequence[int], Sequence[str]], None] | None,
    ) -> list[str]:
        if not cells:
            return []

        def told(rows: Sequence[int], generated: Sequence[Generated]) -> None:
            if on_batch is not None:
                on_batch([places[row] for row in rows], [each.text for each in generated])

        steerer = self._steerer(cells)
        with steerer, progress.stage("answering"):
            answers = generate_answers(
                self.chat_model,
                [user_question(cell.prompt, cell.system_prompt) for cell in cells],
                max_new_tokens=self.options.max_new_tokens,
                temperature=self.options.temperature,
                seed=self.options.seed,
                streams=[cell.stream for cell in cells],
                batch_size=self.options.batch_size,
                prepare_batch=partial(select_batch, steerer),
                alike=[cell.mix for cell in cells],
                prepare_prefix=partial(select_prefix, steerer),
                on_batch=told,
            )
        return [answer.text for answer in answers]

    def _steerer(self, cells: Sequence[Cell]) -> Steerer:
        if self.directions is None:
            steered = [cell for cell in cells if cell.mix is not None]
            if steered:
                raise UserError("a mix of directions was asked for, and there are none")
            return Unsteered()
        rows = [self.coefficients(cell.mix) for cell in cells]
        return self.directions.steerer(self.chat_model, rows)

    def coefficients(self, mix: Coefficients | None) -> list[float]:
        """Return what each direction is multiplied with, ``[K]``; zeros for the unsteered model."""
        assert self.directions is not None
        values = {} if mix is None else mix.as_dict()
        return [
            self.alpha * values.get(trait, 0.0) * self.scales[trait]
            for trait in self.directions.traits
        ]


def plain_speaker(
    chat_model: ChatModel, options: GenerationOptions, processes: Processes | None = None
) -> Speaker:
    """Return a speaker without directions."""
    return Speaker(chat_model, None, {}, 1.0, options, processes or Alone())
