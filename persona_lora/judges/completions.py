"""Reading the body of a chat-completion response, without trusting a word of it.

A body may be garbage, cut off, or lack what was asked for: each is an unscored reading with a
reason, never an exception.
"""

from __future__ import annotations

import json
import math
from typing import Any, Literal, NamedTuple

from persona_lora.judges.prompts import (
    REFUSAL_REASON,
    Reading,
    number_reply,
    weighted_score,
)

Mode = Literal["logprobs", "number"]


class Completion(NamedTuple):
    """One reply as read.

    ``lasting``: the model itself replied, so that asking again would give the same reading; False
    for faults of the endpoint. ``tokens``: its count of (prompt, completion) tokens, where sent.
    ``first_tokens``: the likely tokens of the first position, where sent.
    """

    reading: Reading
    lasting: bool = False
    tokens: tuple[int, int] | None = None
    first_tokens: tuple[str, ...] = ()


def unscored(reason: str) -> Completion:
    """Return a passing failure to score."""
    return Completion(Reading(None, reason))


def read_completion(body: str, mode: Mode) -> Completion:
    """Read the JSON body of a chat completion as a score (see ``prompts``)."""
    try:
        value = json.loads(body)
    except ValueError:
        return unscored("the endpoint's reply is not valid JSON")
    choice = _first(_get(value, "choices"))
    message = _get(choice, "message")
    if not isinstance(message, dict):
        return unscored("the endpoint's reply has no message")
    tokens = _token_counts(_get(value, "usage"))
    if isinstance(message.get("refusal"), str) and message["refusal"]:
        return Completion(Reading(None, REFUSAL_REASON), True, tokens)
    if _get(choice, "finish_reason") == "content_filter":
        return Completion(Reading(None, "withheld by the endpoint's content filter"), True, tokens)
    if mode == "number":
        return _read_number(message.get("content"), tokens)
    return _read_logprobs(_get(choice, "logprobs"), tokens)


def _read_number(content: Any, tokens: tuple[int, int] | None) -> Completion:
    if not isinstance(content, str):
        return Completion(Reading(None, "the endpoint's reply has no text"), False, tokens)
    return Completion(number_reply(content), True, tokens)


def _read_logprobs(logprobs: Any, tokens: tuple[int, int] | None) -> Completion:
    top = _get(_first(_get(logprobs, "content")), "top_logprobs")
    if not isinstance(top, list) or not top:
        reason = "the endpoint sent no top logprobs; use the number mode with it"
        return Completion(Reading(None, reason), False, tokens)
    pairs = [(_get(each, "token"), _get(each, "logprob")) for each in top]
    if not all(isinstance(token, str) and _is_finite(logprob) for token, logprob in pairs):
        return Completion(Reading(None, "the endpoint's logprobs are malformed"), False, tokens)
    first_tokens = tuple(token for token, _ in pairs)
    return Completion(weighted_score(pairs), True, tokens, first_tokens)


def _token_counts(usage: Any) -> tuple[int, int] | None:
    counts = (_get(usage, "prompt_tokens"), _get(usage, "completion_tokens"))
    if all(isinstance(count, int) and count >= 0 for count in counts):
        return counts
    return None


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
