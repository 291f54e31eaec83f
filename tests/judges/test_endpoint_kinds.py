"""Every kind of endpoint: the right score, or unscored with the reason, or a stop with the remedy.

The server of these tests knows a score for every answer; whatever its form, no other number comes.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from persona_lora.core.chat import Exchange
from persona_lora.core.errors import UserError
from persona_lora.judges.cache import VerdictCache
from persona_lora.judges.judge_prompts import PromptJudge
from persona_lora.judges.openai import EndpointReader, Limits
from persona_lora.judges.retries import FAULTS_IN_A_ROW, FORMLESS_IN_A_ROW

TRUTHS = (12, 47, 90)
FAST = Limits(concurrency=1, max_retries=0)
WORDS = ["The", "I", "Score", "**", "\n", "<", "Rating", "As"]
NO = {"Retry-After": "0"}


def items(truths=TRUTHS) -> list[Exchange]:
    return [Exchange(f"Question {at}?", f"worth {truth}") for at, truth in enumerate(truths)]


def asked(request: dict[str, Any]) -> int | None:
    """Return the score of the answer that a request is about, None for any other prompt."""
    _, worth, number = request["messages"][-1]["content"].partition("worth ")
    return int(number.split()[0]) if worth else None


def kind(reply: Callable[[Any, dict[str, Any], int], Any]):
    """Let the endpoint reply by what it is asked; 100 is the truth of any other prompt."""

    def install(endpoint):
        def send(handler):
            truth = asked(handler.body)
            reply(endpoint, handler.body, 100 if truth is None else truth)(handler)

        endpoint.otherwise = send

    return install


def message(endpoint, content, *, finish="stop", **more):
    value = {"role": "assistant", "content": content, **more}
    return endpoint.json(200, endpoint.completion(message=value, finish_reason=finish))


def tops(endpoint, pairs, content="x"):
    top = [{"token": token, "logprob": value} for token, value in pairs]
    first = {"token": pairs[0][0], "logprob": pairs[0][1], "top_logprobs": top}
    return endpoint.json(
        200,
        endpoint.completion(
            message={"role": "assistant", "content": content}, logprobs={"content": [first]}
        ),
    )


def digits(endpoint, request, truth):
    """A tokenizer that splits numbers: sure of itself, and the other likely tokens are words."""
    first = str(truth)[0]
    return tops(endpoint, [(first, -0.01), *((word, -6.0 - at) for at, word in enumerate(WORDS))])


def refusing(name: str, text: str, status: int = 400, only=lambda value: True, **error):
    """Refuse a parameter, as soon as it is sent with a value that is not allowed."""

    def reply(endpoint, request, truth):
        if name in request and only(request[name]):
            return endpoint.error(status, text, **error)
        most = request.get("top_logprobs")
        if most is None:
            return message(endpoint, str(truth))
        return tops(endpoint, [(str(truth), -0.05), *((w, -9.0) for w in WORDS)][:most])

    return reply


def thinking(endpoint, request, truth):
    room = request.get("max_tokens", 0)
    if room < 200:
        return message(endpoint, "<think>\nThe user asks", finish="length")
    return message(endpoint, f"<think>It is 99, or 3.</think>\n\n{truth}")


def reasoning_apart(endpoint, request, truth):
    if request.get("max_tokens", 0) < 200:
        return message(endpoint, None, finish="length", reasoning_content="Okay, 3 or")
    return message(endpoint, str(truth), reasoning_content="Okay, 3 or 4")


RIGHT = {
    "logprobs": {
        "plain": lambda e, r, t: tops(e, [(str(t), -0.05), (str(t + 1), -30.0)]),
        "sentencepiece": lambda e, r, t: tops(e, [(f"▁{t}", -0.05)]),
        "minus infinity": lambda e, r, t: tops(e, [(str(t), -0.05), ("99", -math.inf)]),
        "null": lambda e, r, t: tops(e, [(str(t), -0.05), ("99", None)]),
        "only the token": lambda e, r, t: e.json(
            200,
            e.completion(
                message={"role": "assistant", "content": str(t)},
                logprobs={"content": [{"token": str(t), "logprob": -0.1, "top_logprobs": []}]},
            ),
        ),
        "of old": lambda e, r, t: e.json(
            200,
            e.completion(
                message={"role": "assistant", "content": str(t)},
                logprobs={"tokens": [str(t)], "top_logprobs": [{str(t): -0.1, "The": -3.0}]},
            ),
        ),
        "max_completion_tokens": refusing(
            "max_tokens",
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
            "'max_completion_tokens' instead.",
        ),
        "five logprobs": refusing(
            "top_logprobs", "top_logprobs must be at most 5", only=lambda most: most > 5
        ),
        "five logprobs, 422": refusing(
            "top_logprobs", "Input should be <= 5", 422, only=lambda most: most > 5,
            param="top_logprobs",
        ),
    },
    "number": {
        "plain": lambda e, r, t: message(e, f"{t}\n"),
        "of a hundred": lambda e, r, t: message(e, f"{t}/100"),
        "bold": lambda e, r, t: message(e, f"**{t}**"),
        "percent": lambda e, r, t: message(e, f"{t}%"),
        "object": lambda e, r, t: message(e, json.dumps({"score": t})),
        "in parts": lambda e, r, t: message(e, [{"type": "text", "text": str(t)}]),
        "reasons first": thinking,
        "reasons apart": reasoning_apart,
        "no temperature": refusing(
            "temperature", "Unsupported value: 'temperature' does not support 0 with this model."
        ),
        "max_completion_tokens": refusing("max_tokens", "use max_completion_tokens", 400),
    },
}  # fmt: skip

STOPPED = {
    "logprobs": {
        "digits": (digits, "number", 2),
        "reasons first": (thinking, "number", 1),
        "reasons apart": (reasoning_apart, "number", 1),
        "no logprobs": (lambda e, r, t: message(e, str(t)), "--judge-mode number", 1),
        "no temperature": (
            refusing("temperature", "'temperature' does not support 0"),
            "--judge-mode number",
            1,
        ),
        "no logprobs, refused": (
            refusing("logprobs", "logprobs are not supported"),
            "--judge-mode number",
            1,
        ),
        "too few logprobs": (refusing("top_logprobs", "top_logprobs"), "--judge-mode number", 4),
        "a web page": (lambda e, r, t: e.raw(b"<html>It works"), "base URL", FAULTS_IN_A_ROW),
        "busy": (lambda e, r, t: e.error(429, "slow down", NO), "slow down", FAULTS_IN_A_ROW),
        "down": (lambda e, r, t: e.error(503, "later", NO), "503", FAULTS_IN_A_ROW),
        "moved": (lambda e, r, t: e.error(308, "x", {"Location": "http://x"}), "/v1", 1),
        "probabilities for logprobs": (
            lambda e, r, t: tops(e, [(str(t), 0.9)]),
            "malformed",
            FAULTS_IN_A_ROW,
        ),
        "a line break first": (
            lambda e, r, t: tops(e, [("\n", -0.01), (str(t), -5.0)]),
            "number mass",
            FORMLESS_IN_A_ROW,
        ),
    },
    "number": {
        "another scale": (lambda e, r, t: message(e, "7/10"), "7/10", FORMLESS_IN_A_ROW),
        "cut off": (
            lambda e, r, t: message(e, str(t)[0], finish="length"),
            "cut off",
            FORMLESS_IN_A_ROW,
        ),
        "reasons on and on": (
            lambda e, r, t: message(e, "<think>Hm", finish="length"),
            "cut off",
            FORMLESS_IN_A_ROW + 1,
        ),
    },
}


@pytest.mark.parametrize(("mode", "name"), [(mode, name) for mode in RIGHT for name in RIGHT[mode]])
def test_the_right_score(trait, endpoint, mode, name):
    kind(RIGHT[mode][name])(endpoint)
    judge = PromptJudge(trait, EndpointReader(base_url=endpoint.base_url, mode=mode, limits=FAST))
    verdicts = judge.judge(items(), "flattery")
    assert [verdict.score for verdict in verdicts] == pytest.approx(TRUTHS)


@pytest.mark.parametrize(
    ("mode", "name"), [(mode, name) for mode in STOPPED for name in STOPPED[mode]]
)
def test_a_stop_with_the_remedy(trait, endpoint, mode, name):
    reply, remedy, requests = STOPPED[mode][name]
    kind(reply)(endpoint)
    judge = PromptJudge(trait, EndpointReader(base_url=endpoint.base_url, mode=mode, limits=FAST))
    with pytest.raises(UserError, match=remedy) as caught:
        judge.judge(items(range(11, 71)), "flattery")
    assert "\n" not in str(caught.value)
    assert len(endpoint.requests) == requests


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, {"code": "content_filter"}),
        (400, {"code": "context_length_exceeded"}),
        (400, {"message": "This model's maximum context length is 4096 tokens."}),
        (403, {"message": "Your input was flagged."}),
    ],
)
def test_a_refused_text_leaves_the_others_alone(trait, endpoint, status, error):
    def reply(endpoint, request, truth):
        if truth != TRUTHS[-1]:
            return endpoint.error(status, **error)
        return tops(endpoint, [(str(truth), -0.05)])

    kind(reply)(endpoint)
    judge = PromptJudge(trait, EndpointReader(base_url=endpoint.base_url, limits=FAST))
    verdicts = judge.judge(items((*TRUTHS[:2] * 30, TRUTHS[-1])), "flattery")
    assert [verdict.score for verdict in verdicts] == [None] * 60 + [pytest.approx(TRUTHS[-1])]
    assert verdicts[0].reason.startswith(f"HTTP {status}")


@pytest.mark.parametrize("truth", [0, 7])
def test_a_confident_digit_is_a_score_where_the_tokenizer_writes_numbers_whole(
    trait, endpoint, truth
):
    def reply(endpoint, request, truth):
        return tops(endpoint, [(str(truth), -0.01), ("The", -6.0)])

    kind(reply)(endpoint)
    judge = PromptJudge(trait, EndpointReader(base_url=endpoint.base_url, limits=FAST))
    verdicts = judge.judge(items((truth,) * 3), "flattery")
    assert [verdict.score for verdict in verdicts] == [truth] * 3
    prompts = [request["messages"][0]["content"] for request in endpoint.requests]
    assert len(prompts) == 4
    assert sum("the number 100" in prompt for prompt in prompts) == 1


def test_a_series_of_faults_is_broken_by_a_score_and_what_was_scored_is_not_asked_again(
    trait, endpoint, tmp_path
):
    """A run of 60 whose endpoint dies after 20: stopped after five more; gone on with after."""
    alive = {"until": 20}

    def reply(endpoint, request, truth):
        alive["until"] -= 1
        flaky = alive["until"] % 5 == 3  # now and then a fault of one request
        if alive["until"] < 0 or flaky:
            return endpoint.error(500, "dead", NO)
        return tops(endpoint, [(str(truth), -0.05)])

    kind(reply)(endpoint)
    truths = range(11, 71)
    with closing(VerdictCache(tmp_path / "cache.sqlite")) as cache:
        judge = PromptJudge(
            trait, EndpointReader(base_url=endpoint.base_url, limits=FAST, cache=cache)
        )
        with pytest.raises(UserError, match=r"5 times in a row: HTTP 500: dead; kept so far: 16"):
            judge.judge(items(truths), "flattery")
    assert len(endpoint.requests) == 25
    alive["until"] = 10_000
    with closing(VerdictCache(tmp_path / "cache.sqlite")) as cache:
        judge = PromptJudge(
            trait, EndpointReader(base_url=endpoint.base_url, limits=FAST, cache=cache)
        )
        scores = [verdict.score for verdict in judge.judge(items(truths), "flattery")]
    scored = [score for score in scores if score is not None]
    assert scored == pytest.approx(
        [t for t, s in zip(truths, scores, strict=True) if s is not None]
    )
    assert judge.reader.usage.cache_hits == 16
    assert len(endpoint.requests) == 25 + 44


def test_replies_in_any_order_give_verdicts_in_the_order_of_the_answers(trait, endpoint):
    late = threading.Event()

    def reply(endpoint, request, truth):
        if truth == 11:
            late.wait(20)  # the first to be asked is the last to be told
        if truth == 20:
            late.set()
        return tops(endpoint, [(str(truth), -0.05)])

    kind(reply)(endpoint)
    judge = PromptJudge(
        trait, EndpointReader(base_url=endpoint.base_url, limits=Limits(concurrency=4))
    )
    verdicts = judge.judge(items(range(11, 21)), "flattery")
    assert [verdict.score for verdict in verdicts] == pytest.approx(list(range(11, 21)))
