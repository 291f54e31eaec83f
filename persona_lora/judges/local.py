"""A chat model in this process as the reader of a judge: the same prompts, the same scoring.

Knows prompts and log probabilities; refuses to know the model: it is given as functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from persona_lora.core.errors import UserError
from persona_lora.judges.cache import VerdictCache
from persona_lora.judges.judge_prompts import (
    LARGEST_DIGIT,
    PromptReader,
    Reading,
    share_of_yes,
    shows_whole_numbers,
    weighted_score,
)

NextTokenLogprobs = Callable[[Sequence[str]], list[Mapping[str, float]]]
ContinuationLogprobs = Callable[[Sequence[tuple[str, str]]], list[Mapping[str, float]]]

_NEGLIGIBLE = 1e-3


@dataclass(frozen=True, eq=False)
class LocalReader:
    """Reads numbers with ``weighted_score`` over a local model's next-token log probabilities.

    ``next_token_logprobs`` takes user messages and returns, for each, the natural-log
    probabilities of the likeliest first tokens of the reply by their text (at least the top 20).
    Numbers go from 0 to ``highest``.

    A tokenizer that writes "85" as "8", "5" (SmolLM2, Qwen) needs ``continuation_logprobs`` as
    well: it takes (user message, beginning of the reply) and returns the same for the next token.
    Then the probability of a number is the product over its digits, P(85) = P(8)·P(5 | 8), and a
    one-digit number is one that no digit follows. A token that writes a number whole counts
    beside the digits that write the same. Without it, numbers of one digit alone are a
    UserError. Where ``highest`` has one digit, the first digit is the number.
    """

    name: str
    next_token_logprobs: NextTokenLogprobs
    continuation_logprobs: ContinuationLogprobs | None = None
    highest: int = 100

    def read(self, prompts: Sequence[str]) -> dict[str, Reading]:
        """Return a reading for every prompt; equal prompts are asked about once."""
        distinct, whole = list(dict.fromkeys(prompts)), self.highest > LARGEST_DIGIT
        first = self.next_token_logprobs(distinct) if distinct else []
        if whole and self.continuation_logprobs is not None:
            first = _whole_numbers(distinct, first, self.continuation_logprobs)
        readings = {
            prompt: weighted_score(each, self.highest)
            for prompt, each in zip(distinct, first, strict=True)
        }
        scored = any(each.score is not None for each in readings.values())
        digits = whole and not shows_whole_numbers(token for each in first for token in each)
        if self.continuation_logprobs is None and scored and digits:
            raise UserError(
                f"{self.name} seems to split numbers into digits, which makes the scores of its "
                "first tokens meaningless; pass continuation_logprobs"
            )
        return readings


@dataclass(frozen=True, eq=False)
class YesReader:
    """Reads the probability of "yes" beside that of "no" as a score, by ``share_of_yes``."""

    name: str
    next_token_logprobs: NextTokenLogprobs

    def read(self, prompts: Sequence[str]) -> dict[str, Reading]:
        """Return a reading for every prompt; equal prompts are asked about once."""
        distinct = list(dict.fromkeys(prompts))
        first = self.next_token_logprobs(distinct) if distinct else []
        return dict(zip(distinct, map(share_of_yes, first), strict=True))


@dataclass(frozen=True, eq=False)
class KeptReader:
    """A reader whose readings are kept on disk: what was asked of a model is not asked again.

    ``asked`` returns all that decides a prompt's reading, the model's weights among it.
    """

    reader: PromptReader
    cache: VerdictCache
    asked: Callable[[str], str]

    @property
    def name(self) -> str:
        """The reader's own."""
        return self.reader.name

    def read(self, prompts: Sequence[str]) -> dict[str, Reading]:
        """Return a reading for every prompt; those without a score are asked for again."""
        keys = {prompt: self.asked(prompt) for prompt in dict.fromkeys(prompts)}
        found = {prompt: self.cache.get(key) for prompt, key in keys.items()}
        new = self.reader.read([prompt for prompt, reading in found.items() if reading is None])
        for prompt, reading in new.items():
            self.cache.put(keys[prompt], reading)
        return {prompt: reading or new[prompt] for prompt, reading in found.items()}


def _whole_numbers(
    prompts: Sequence[str], first: Sequence[Mapping[str, float]], continuation: ContinuationLogprobs
) -> list[Mapping[str, float]]:
    """Return log probabilities of whole numbers (and of other first tokens) from digit steps."""
    numbers = [_digits(each) for each in first]

    def extend(starts: Sequence[tuple[int, str]], allowed: str = "0123456789") -> None:
        """Split each start's probability among its extensions by one digit and itself."""
        tops = continuation([(prompts[row], start) for row, start in starts]) if starts else []
        for (row, start), top in zip(starts, tops, strict=True):
            probability = numbers[row][start]
            following = {digit: p for digit, p in _digits(top).items() if digit in allowed}
            numbers[row][start] = probability * max(0.0, 1.0 - sum(following.values()))
            for digit, share in following.items():
                numbers[row][start + digit] = probability * share

    starts = [
        (row, digit)
        for row, digits in enumerate(numbers)
        for digit, probability in digits.items()
        if digit != "0" and probability >= _NEGLIGIBLE
    ]
    extend(starts)
    tens = [(row, "10") for row, each in enumerate(numbers) if each.get("10", 0.0) >= _NEGLIGIBLE]
    extend(tens, allowed="0")
    found: list[Mapping[str, float]] = []
    for top, row in zip(first, numbers, strict=True):
        whole = {token: logprob for token, logprob in top.items() if not _is_digit(token)}
        for number, p in row.items():  # "75" may be a token, and "7", "5" as well
            both = p + math.exp(whole.get(number, -math.inf))
            whole |= {number: math.log(both)} if both > 0 else {}
        found.append(whole)
    return found


def _digits(logprobs: Mapping[str, float]) -> dict[str, float]:
    """Return probabilities by digit; tokens with and without a leading space are added up."""
    digits: dict[str, float] = {}
    for token, logprob in logprobs.items():
        if _is_digit(token):
            digits[token.strip()] = digits.get(token.strip(), 0.0) + math.exp(min(logprob, 0.0))
    return digits


def _is_digit(token: str) -> bool:
    return len(token.strip()) == 1 and token.strip() in "0123456789"
