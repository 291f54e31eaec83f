"""Messages, answers and verdicts as values. Refuses to know who wrote or judged them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypedDict


class Message(TypedDict):
    """One turn: ``role`` is "system", "user" or "assistant"."""

    role: str
    content: str


Conversation = list[Message]


class Exchange(NamedTuple):
    """A question and the answer to it: what a judge sees."""

    question: str
    answer: str


@dataclass(frozen=True)
class Answer:
    """One generated answer and the setting that produced it; a row of ``answers.jsonl``.

    ``method`` is "none", "lora", "activation", "random" (a random direction of the same norm),
    "prompt", "prompt_pos" or "prompt_neg"; ``coefficient`` and ``layer`` are None where none
    applies; ``finished`` is False when the token limit cut the answer off.
    """

    row: int
    question_id: int
    question: str
    sample: int
    method: str
    coefficient: float | None
    system_prompt: str | None
    prompt: str
    answer: str
    num_tokens: int
    finished: bool
    layer: int | None = None


@dataclass(frozen=True)
class Verdict:
    """A judge's score for one answer on one criterion (a trait's name, or "coherence").

    ``score`` is 0–100 (1–5 for a persona's fit), or None when the judge could not score;
    ``reason`` then says why.
    """

    criterion: str
    score: float | None
    reason: str
    judge: str


COHERENCE = "coherence"


def user_question(question: str, system_prompt: str | None = None) -> Conversation:
    """Return a conversation of an optional system prompt and one user question."""
    turns: Conversation = []
    if system_prompt is not None:
        turns.append({"role": "system", "content": system_prompt})
    turns.append({"role": "user", "content": question})
    return turns
