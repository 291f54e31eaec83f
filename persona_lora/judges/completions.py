"""Reading the body of a chat completion, without trusting a word of it.

A body may be garbage, cut off, or lack what was asked for. What is no chat completion is a
``Fault``; a completion that gives no score has a reason instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from persona_lora.core.json_text import read_reply_json
from persona_lora.judges.judge_prompts import REFUSAL_REASON, Reading, number_reply, weighted_score
from persona_lora.judges.retries import Fault, Outcome

Mode = Literal["logprobs", "number"]

REASONS_FIRST = (
    "the model reasons before it answers, so that its first token is no score; use --judge-mode "
    "number, or switch its reasoning off"
)
NO_LOGPROBS = "the endpoint sent no top logprobs; use --judge-mode number with it"
CUT_OFF = "the reply was cut off at its longest, and its number may be too"
_FILTERED = "withheld by the endpoint's content filter"
_REASONING_END = ("</think>", "</thinking>", "[/THINK]", "<|channel|>final<|message|>")
_REASONING_START = re.compile(r"\s*(?:<think(?:ing)?>|\[THINK\]|<\|channel\|>analysis)")
_LARGEST_LOGPROB = 1e-3  # rounding; what is larger is no logarithm of a probability


class Reply(NamedTuple):
    """A chat completion as sent.

    ``text`` is what follows any reasoning. ``reasoned``: the model reasoned before it. ``cut``: it
    reached its longest length. ``withheld``: why there is no answer, "" where there is one.
    ``logprobs`` is unread; ``tokens`` counts (prompt, completion) tokens, where sent.
    """

    text: str
    reasoned: bool
    cut: bool
    withheld: str
    logprobs: Any
    tokens: tuple[int, int] | None

    @property
    def unfinished(self) -> bool:
        """Whether the reply was cut off before the answer began."""
        return self.cut and self.reasoned and not self.text


class Completion(NamedTuple):
    """One reply as read; ``first_tokens`` are the likely tokens of its first position."""

    reading: Reading
    outcome: Outcome
    first_tokens: tuple[str, ...] = ()


def read_reply(body: str) -> Reply:
    """Read the JSON body of a chat completion; Fault where it is none."""
    try:
        value = read_reply_json(body)
    except (ValueError, RecursionError) as error:
        kind = "a web page" if body.lstrip()[:1] == "<" else "not valid JSON"
        raise Fault(f"the endpoint's reply is {kind}; check its base URL (…/v1)") from error
    choice = _first(_get(value, "choices"))
    message = _get(choice, "message")
    if not isinstance(message, dict):
        raise Fault("the endpoint's reply has no message; check its base URL (…/v1)")
    text, reasoned = _after_reasoning(_text(message.get("content")))
    apart = message.get("reasoning_content") or message.get("reasoning")
    filtered = _get(choice, "finish_reason") == "content_filter"
    refused = isinstance(message.get("refusal"), str) and message["refusal"]
    return Reply(
        text=text,
        reasoned=reasoned or bool(apart),
        cut=_get(choice, "finish_reason") == "length",
        withheld=REFUSAL_REASON if refused else _FILTERED if filtered else "",
        logprobs=_get(choice, "logprobs"),
        tokens=_token_counts(_get(value, "usage")),
    )


def score_reply(reply: Reply, mode: Mode, highest: int = 100) -> Completion:
    """Read a reply as a number from 0 to ``highest`` (see ``judge_prompts``)."""
    if reply.withheld:
        return Completion(Reading(None, reply.withheld), "about the text")
    if mode == "number" and reply.cut:
        return Completion(Reading(None, CUT_OFF), "formless")
    if mode == "number":
        reading = number_reply(reply.text, highest)
        return Completion(reading, _outcome(reading))
    if reply.reasoned:
        return Completion(Reading(None, REASONS_FIRST), "lasting")
    pairs = _first_position(reply.logprobs)
    if not pairs:
        return Completion(Reading(None, NO_LOGPROBS), "lasting")
    # JSON has no infinity: an impossible token's logprob is sent as -Infinity or as null.
    likely = [(token, -math.inf if value is None else value) for token, value in pairs]
    if not all(isinstance(token, str) and _is_logprob(value) for token, value in likely):
        return Completion(Reading(None, "the endpoint's logprobs are malformed"), "fault")
    reading = weighted_score(likely, highest)
    return Completion(reading, _outcome(reading), tuple(token for token, _ in likely))


def _outcome(reading: Reading) -> Outcome:
    if reading.score is not None:
        return "good"
    return "about the text" if reading.reason == REFUSAL_REASON else "formless"


def _first_position(logprobs: Any) -> Sequence[tuple[Any, Any]]:
    """Return tokens and logprobs at the reply's first position, in today's form or the old one."""
    first = _first(_get(logprobs, "content"))
    top = _get(first, "top_logprobs")
    if not top and isinstance(_get(first, "token"), str):
        top = [first]
    if isinstance(top, list):
        return [
            (each.get("token"), each.get("logprob", math.nan)) if isinstance(each, dict) else (0, 0)
            for each in top
        ]
    old = _first(_get(logprobs, "top_logprobs"))
    return list(old.items()) if isinstance(old, dict) else []


def _after_reasoning(text: str) -> tuple[str, bool]:
    """Return what follows the reasoning in ``text``, and whether there is any."""
    for end in _REASONING_END:
        if end in text:
            return text.rpartition(end)[2].strip(), True
    return ("", True) if _REASONING_START.match(text) else (text.strip(), False)


def _text(content: Any) -> str:
    """Return a message's text, which some endpoints send in parts."""
    if isinstance(content, list):
        return "".join(_text(_get(part, "text")) for part in content)
    return content if isinstance(content, str) else ""


def _token_counts(usage: Any) -> tuple[int, int] | None:
    counts = (_get(usage, "prompt_tokens"), _get(usage, "completion_tokens"))
    if all(isinstance(count, int) and count >= 0 for count in counts):
        return counts
    return None


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else None


def _is_logprob(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and not math.isnan(value) and value <= _LARGEST_LOGPROB
