"""A language model as persona judge: does the steered answer fit the person better than the plain?

It sees the persona's ``final_judge_prompt.txt`` with the unsteered and the steered answer as A and
B, in an order drawn for each answer, and says 1 (much worse) to 5. Language models favour a side;
the drawn order turns that into noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

from persona_lora.core.chat import Exchange, Verdict
from persona_lora.core.errors import UserError
from persona_lora.judges.judge_prompts import Reading
from persona_lora.judges.style_judge import HIGHEST, LOWEST, PERSONA_FIT
from persona_lora.profiles.judge_prompt import fill_judge_prompt

Read = Callable[[Sequence[str]], Mapping[str, Reading]]


class ComparisonJudge:
    """A ``Judge`` of the criterion "persona_fit" that asks a language model.

    ``read`` returns a number for each prompt; ``template`` is a persona's judge prompt, with its
    places for the message and both answers; ``baselines`` holds the unsteered answer by message.
    """

    def __init__(
        self, name: str, read: Read, template: str, baselines: Mapping[str, str], *, seed: int = 0
    ) -> None:
        self.name = name
        self._read = read
        self._template = template
        self._baselines = baselines
        self._seed = seed

    def judge(self, exchanges: Sequence[Exchange], criterion: str = PERSONA_FIT) -> list[Verdict]:
        """Return one verdict of 1–5 an exchange; UserError for a message without a baseline."""
        if criterion != PERSONA_FIT:
            raise UserError(f"a persona's judge scores {PERSONA_FIT!r}, not {criterion!r}")
        prompts = [self._prompt(exchange) for exchange in exchanges]
        readings = self._read(prompts)
        return [
            self._verdict(readings[prompt], self._swapped(exchange))
            for prompt, exchange in zip(prompts, exchanges, strict=True)
        ]

    def _swapped(self, exchange: Exchange) -> bool:
        """Tell whether the steered answer stands first: drawn by seed, message and answer."""
        drawn = hashlib.sha256(f"{self._seed}\n{exchange.question}\n{exchange.answer}".encode())
        return drawn.digest()[0] % 2 == 1

    def _prompt(self, exchange: Exchange) -> str:
        baseline = self._baselines.get(exchange.question)
        if baseline is None:
            raise UserError(
                f"there is no unsteered answer to {exchange.question!r} to compare with"
            )
        answers = (baseline, exchange.answer)
        first, second = reversed(answers) if self._swapped(exchange) else answers
        return fill_judge_prompt(self._template, exchange.question, first, second)

    def _verdict(self, reading: Reading, swapped: bool) -> Verdict:
        score = reading.score
        if score is None:
            return Verdict(PERSONA_FIT, None, reading.reason, self.name)
        if not LOWEST <= score <= HIGHEST:
            reason = f"the reply {score:g} is not from 1 to 5"
            return Verdict(PERSONA_FIT, None, reason, self.name)
        fit = LOWEST + HIGHEST - score if swapped else score
        return Verdict(PERSONA_FIT, fit, "", self.name)
