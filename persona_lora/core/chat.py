"""Messages, conditions, answers, verdicts as values. Refuses to know who wrote or judged them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from persona_lora.core.errors import UserError


class Message(TypedDict):
    """One turn: ``role`` is "system", "user" or "assistant"."""

    role: str
    content: str


Conversation = list[Message]


class Exchange(NamedTuple):
    """A question and the answer to it: what a judge sees, and whether the answer was not cut."""

    question: str
    answer: str
    finished: bool = True


Place = int | str  # where a vector acts: a layer, or several at once, "10+14+18"


def place_of(layers: Sequence[int]) -> Place:
    """Return what layers that are steered at once are called; of a single one its number."""
    return layers[0] if len(layers) == 1 else "+".join(map(str, sorted(layers)))


class Series(NamedTuple):
    """Conditions that differ by their coefficient alone: a method, and the layer it steers at."""

    method: str
    layer: Place | None


@dataclass(frozen=True)
class Condition:
    """One setting in which questions are asked: what produces an answer.

    ``method`` is "none", "lora", "activation", "ablation", "bounded" (states held along a vector),
    "random" (a random direction), "prompt" (with ``system_prompt``), "prompt_pos" and "prompt_neg"
    (the trait's own system prompts, taken in turn over the questions), or "prompt_neutral" (ones
    that ask for no trait). ``layer`` is where a single layer is steered, or in a sweep several at
    once.
    """

    method: str
    coefficient: float | None = None
    layer: Place | None = None
    system_prompt: str | None = None

    @property
    def series(self) -> Series | None:
        """The series of a condition that has a coefficient."""
        return None if self.coefficient is None else Series(self.method, self.layer)

    @property
    def direction(self) -> str:
        """The name of what steers in a bank of directions: one place of a vector is one of them."""
        return self.method if self.layer is None else f"{self.method}@{self.layer}"

    @property
    def coefficients(self) -> dict[str, float]:
        """The coefficient by the name of its direction; empty where nothing steers."""
        return {} if self.coefficient is None else {self.direction: self.coefficient}


UNSTEERED = Condition("none")


@dataclass(frozen=True)
class Answer:
    """One generated answer and the setting that produced it; a row of ``answers.jsonl``.

    ``method``, ``coefficient`` and ``layer`` are those of its ``Condition``; ``finished`` is False
    when the token limit cut the answer off.
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
    layer: Place | None = None


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


def read_messages(value: Any, where: str) -> Conversation:
    """Return a list of ``{role, content}`` messages as it is, checked; ``where`` names it.

    Contents keep their indentation and line ends. An empty system message stays: it says that there
    is none, where a chat template would put in its own. Raises UserError for another empty one.
    """
    messages = _messages(value, where)
    for message in messages:
        if message["role"] != "system" and not message["content"].strip():
            raise UserError(
                f"{where}: a message of the {message['role']} is empty; leave the row out"
            )
    return messages


def parse_messages(value: Any, where: str) -> Conversation:
    """Return a list of ``{role, content}`` messages, stripped and without empty ones."""
    return [
        Message(role=each["role"], content=each["content"].strip())
        for each in _messages(value, where)
        if each["content"].strip()
    ]


def _messages(value: Any, where: str) -> Conversation:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} has no messages; expected a list of {{role, content}}")
    messages: Conversation = []
    for turn in value:
        role = turn.get("role") if isinstance(turn, dict) else None
        content = turn.get("content") if isinstance(turn, dict) else None
        if role not in ("user", "assistant", "system") or not isinstance(content, str):
            raise UserError(f"{where}: a message needs a role (user, assistant) and content")
        messages.append(Message(role=role, content=content))
    return messages


def check_conversation(value: Any) -> None:
    """Raise UserError for what is no list of messages, or has none, of whatever roles."""
    turns = value if isinstance(value, list | tuple) else ()
    if not turns or not all(
        isinstance(turn, Mapping) and {str} == {type(turn.get("role")), type(turn.get("content"))}
        for turn in turns
    ):
        raise UserError(
            "a conversation is a list of messages, as in "
            f'[{{"role": "user", "content": "Hello"}}], got {repr(value)[:80]}'
        )


def user_question(
    question: str, system_prompt: str | None = None, before: Sequence[Message] = ()
) -> Conversation:
    """Return a conversation of an optional system prompt, earlier turns and one user question."""
    turns: Conversation = []
    if system_prompt is not None:
        turns.append({"role": "system", "content": system_prompt})
    turns += [*before, {"role": "user", "content": question}]
    return turns
