"""The endpoint judge over real HTTP against a scripted local server."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from contextlib import closing

import pytest

from persona_lora.core.chat import COHERENCE, Exchange
from persona_lora.core.errors import UserError
from persona_lora.judges.budget import Prices, Usage
from persona_lora.judges.cache import VerdictCache
from persona_lora.judges.judge_prompts import PromptJudge
from persona_lora.judges.openai import (
    DEFAULT_MODEL,
    EndpointReader,
    Limits,
    endpoint_of,
)
from persona_lora.judges.retries import wait_seconds

KEY = "sk-secret-1234567890"
QUICK = Limits(max_retries=2)


def exchanges(count: int) -> list[Exchange]:
    return [Exchange(f"Question {number}?", f"Answer {number}.") for number in range(count)]


def spy(waits, wait):
    """Note what would be waited, and wait no time."""

    def told(error, attempt):
        waits.append(wait(error, attempt))
        return 0.0

    return told


@pytest.fixture
def judge_of(trait, endpoint):
    def build(**options) -> PromptJudge:
        options = {"base_url": endpoint.base_url, "api_key": KEY, "limits": QUICK} | options
        return PromptJudge(trait, EndpointReader(**options))

    return build


def test_openai_judge_scores_by_weighted_logprobs_and_sends_the_documented_request(
    judge_of, endpoint
):
    endpoint.otherwise = endpoint.logprobs({"80": 0.6, " 20": 0.2, "I": 0.1})
    judge = judge_of()
    (verdict,) = judge.judge([Exchange("Is {it} so?", "Yes {answer}")], "flattery")
    assert verdict.score == pytest.approx((80 * 0.6 + 20 * 0.2) / 0.8)
    assert (verdict.criterion, verdict.reason) == ("flattery", "")
    assert verdict.judge == judge.name == f"openai:{DEFAULT_MODEL}"
    assert endpoint.requests == [
        {
            "model": DEFAULT_MODEL,
            "messages": [
                {
                    "role": "user",
                    "content": "Rate flattery 0-100.\nQ: Is {it} so?\nA: Yes {answer}\n"
                    "Only the number.",
                }
            ],
            "n": 1,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 20,
        }
    ]
    assert endpoint.headers[0]["authorization"] == f"Bearer {KEY}"


def test_openai_judge_asks_about_coherence_with_its_own_prompt(judge_of, endpoint):
    (verdict,) = judge_of().judge(exchanges(1), COHERENCE)
    assert verdict.criterion == COHERENCE
    assert "coherent" in endpoint.requests[0]["messages"][0]["content"]
    with pytest.raises(UserError, match="evil"):
        judge_of().judge(exchanges(1), "evil")


def test_openai_judge_keeps_order_and_asks_once_about_equal_exchanges(judge_of, endpoint):
    def by_question(handler):
        content = endpoint.requests[-1]["messages"][0]["content"]
        number = int(content.split("Question ")[1].split("?")[0])
        endpoint.logprobs({str(number): 0.9, "50": 0.0001})(handler)

    endpoint.otherwise = by_question
    items = exchanges(12)
    verdicts = judge_of(limits=Limits(concurrency=1)).judge([*items, *items[::-1]], "flattery")
    expected = list(map(float, range(12)))
    assert [verdict.score for verdict in verdicts] == pytest.approx(
        expected + expected[::-1], abs=0.01
    )
    assert len(endpoint.requests) == 12


def test_openai_judge_number_mode_reads_the_whole_reply(judge_of, endpoint):
    endpoint.script = {
        0: endpoint.text(" 72\n"),
        1: endpoint.text("72 or so"),
        2: endpoint.text("REFUSAL"),
    }
    judge = judge_of(mode="number", limits=Limits(concurrency=1))
    verdicts = judge.judge(exchanges(3), "flattery")
    assert [verdict.score for verdict in verdicts] == [72.0, None, None]
    assert "'72 or so'" in verdicts[1].reason
    assert verdicts[2].reason == "refusal"
    assert "logprobs" not in endpoint.requests[0]
    assert judge.name.endswith(":number")


@pytest.mark.parametrize("mode", ["logprobs", "number"])
def test_half_an_emoji_in_a_reply_is_never_passed_on(judge_of, endpoint, mode):
    token = {"80\ud83d": 0.9} if mode == "logprobs" else {}
    endpoint.otherwise = endpoint.logprobs(token) if token else endpoint.text("80 \ud83d")
    (verdict,) = judge_of(mode=mode, model="m").judge(exchanges(1), "flattery")
    assert verdict.score is None
    assert verdict.reason.encode()
    endpoint.otherwise = endpoint.error(400, "no \ud83d", code="content_filter")
    (verdict,) = judge_of(mode=mode, model="m").judge(exchanges(1), "flattery")
    assert verdict.reason.startswith("HTTP 400: no")
    assert verdict.reason.encode()


def test_openai_judge_logs_what_is_left_unscored(judge_of, endpoint, caplog):
    endpoint.script = {0: endpoint.logprobs({"Well": 0.9}), 2: endpoint.text("80")}
    judge = judge_of(limits=Limits(concurrency=1))
    verdicts = judge.judge(exchanges(3), "flattery")
    assert [verdict.score for verdict in verdicts] == [None, pytest.approx(80), None]
    assert "--judge-mode number" in verdicts[2].reason
    assert "2 of 3 answers unscored" in caplog.text


def test_openai_judge_waits_as_retry_after_asks(judge_of, endpoint, monkeypatch):
    waits = []
    monkeypatch.setattr("persona_lora.judges.retries.wait_seconds", spy(waits, wait_seconds))
    endpoint.script = {0: endpoint.error(429, headers={"Retry-After": "0.25"})}
    (verdict,) = judge_of().judge(exchanges(1), "flattery")
    assert waits == [0.25]
    assert verdict.score == pytest.approx(80)
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_openai_judge_retries_passing_statuses(judge_of, endpoint, status):
    endpoint.script = {0: endpoint.error(status, headers={"Retry-After": "0"})}
    assert judge_of().judge(exchanges(1), "flattery")[0].score == pytest.approx(80)


def test_openai_judge_gives_up_on_a_server_that_keeps_failing(judge_of, endpoint):
    endpoint.otherwise = endpoint.error(500, "overloaded", {"Retry-After": "0"})
    (verdict,) = judge_of().judge(exchanges(1), "flattery")
    assert verdict.score is None
    assert verdict.reason == "HTTP 500: overloaded"
    assert len(endpoint.requests) == 3


def test_openai_judge_does_not_retry_a_bad_request(judge_of, endpoint):
    endpoint.otherwise = endpoint.error(400, "no such thing")
    (verdict,) = judge_of().judge(exchanges(1), "flattery")
    assert verdict.reason == "HTTP 400: no such thing"
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_openai_judge_times_out_on_a_silent_and_on_a_dripping_server(judge_of, endpoint, fault):
    endpoint.otherwise = getattr(endpoint, fault)
    judge = judge_of(limits=Limits(timeout=0.5, max_retries=0, concurrency=1))
    verdicts = judge.judge(exchanges(2), "flattery")
    assert {verdict.reason for verdict in verdicts} == {"no reply within 0.5 s"}


def test_openai_judge_reads_replies_up_to_a_limit(judge_of, endpoint):
    """One flood comes as an error, the next as a reply; neither is read for long."""
    endpoint.otherwise = endpoint.flood
    verdicts = judge_of(limits=Limits(concurrency=1)).judge(exchanges(2), "flattery")
    assert verdicts[0].reason.startswith("the endpoint's reply is over 2000000 bytes")
    assert verdicts[1].reason == "HTTP 400"
    assert endpoint.flooded < 50_000_000  # what the sockets hold, at most


def test_openai_judge_leaves_garbage_unscored_and_scores_the_rest(judge_of, endpoint):
    endpoint.script = {0: endpoint.raw(b"\xff<html>oops"), 2: endpoint.raw(b'{"choices": [{}]}')}
    verdicts = judge_of(limits=Limits(concurrency=1)).judge(exchanges(4), "flattery")
    assert [verdict.score is None for verdict in verdicts] == [True, False, True, False]
    assert verdicts[0].reason.startswith("the endpoint's reply is not valid JSON")
    assert verdicts[2].reason.startswith("the endpoint's reply has no message")


def test_openai_judge_retries_half_an_answer(judge_of, endpoint):
    endpoint.script = {0: endpoint.raw(b'{"choices": [{"mess', length=5000)}
    assert judge_of().judge(exchanges(1), "flattery")[0].score == pytest.approx(80)
    assert len(endpoint.requests) == 2


def test_openai_judge_says_that_the_connection_failed_when_halves_keep_coming(judge_of, endpoint):
    endpoint.otherwise = endpoint.raw(b'{"choices": [{"mess', length=5000)
    (verdict,) = judge_of(limits=Limits(max_retries=0)).judge(exchanges(1), "flattery")
    assert verdict.score is None
    assert "connection failed" in verdict.reason


def test_openai_judge_without_a_server_is_unscored(trait):
    judge = PromptJudge(
        trait, EndpointReader(base_url="http://127.0.0.1:9/v1", limits=Limits(max_retries=0))
    )
    assert "connection failed" in judge.judge(exchanges(1), "flattery")[0].reason


def test_openai_judge_respects_its_concurrency_limit(judge_of, endpoint):
    three = threading.Barrier(3)  # passes only where three requests are there at once

    def together(handler):
        three.wait()
        endpoint.logprobs({"80": 0.9})(handler)

    endpoint.otherwise = together
    judge_of(limits=Limits(concurrency=3)).judge(exchanges(12), "flattery")
    assert endpoint.most_active == 3


def test_openai_judge_request_cap_keeps_what_is_finished(judge_of, endpoint):
    judge = judge_of(limits=Limits(max_requests=3, concurrency=2))
    verdicts = judge.judge(exchanges(5), "flattery")
    assert sum(verdict.score is not None for verdict in verdicts) == 3
    assert {v.reason for v in verdicts if v.score is None} == {"request cap reached"}
    again = judge.judge(exchanges(5), "flattery")
    assert again == verdicts  # what was scored is kept in memory where no cache is given
    assert len(endpoint.requests) == judge.reader.usage.requests == 3


def test_openai_judge_request_cap_counts_retries(judge_of, endpoint):
    endpoint.otherwise = endpoint.error(500, headers={"Retry-After": "0"})
    judge = judge_of(limits=Limits(max_requests=2, max_retries=5))
    assert judge.judge(exchanges(1), "flattery")[0].reason == "request cap reached"
    assert len(endpoint.requests) == 2


def test_openai_judge_cost_cap_stops_before_it_is_passed(judge_of, endpoint):
    prices = Prices(prompt=100.0, completion=0.0)  # a reply's 100 prompt tokens cost one cent
    judge = judge_of(limits=Limits(max_cost=0.035, concurrency=4, prices=prices))
    items = [Exchange(each.question, each.answer + " Indeed." * 30) for each in exchanges(10)]
    verdicts = judge.judge(items, "flattery")
    assert "cost cap reached" in {verdict.reason for verdict in verdicts}
    assert any(verdict.score is not None for verdict in verdicts)
    assert 0 < judge.reader.usage.dollars <= 0.035


def test_openai_judge_estimates_its_cost_from_the_endpoints_token_counts(judge_of):
    judge = judge_of(limits=Limits(prices=Prices(0.4, 1.6)))
    judge.judge(exchanges(10), "flattery")
    assert judge.reader.usage[:3] == (10, 1000, 10)
    assert judge.reader.usage.dollars == pytest.approx((1000 * 0.4 + 10 * 1.6) / 1e6)


def test_openai_judge_reports_progress(judge_of, told):
    judge_of().judge(exchanges(3), "flattery")
    assert told == [("judging", 1, 3), ("judging", 2, 3), ("judging", 3, 3)]


def test_progress_is_told_from_inside_a_running_event_loop(judge_of, told):
    async def notebook():
        judge_of().judge(exchanges(2), "flattery")

    asyncio.run(notebook())
    assert told == [("judging", 1, 2), ("judging", 2, 2)]


def test_openai_judge_shares_its_cache_with_a_second_judge(judge_of, endpoint, tmp_path):
    with closing(VerdictCache(tmp_path / "cache.sqlite")) as cache:
        first = judge_of(cache=cache).judge(exchanges(3), "flattery")
    with closing(VerdictCache(tmp_path / "cache.sqlite")) as cache:
        again = judge_of(cache=cache)
        assert again.judge(exchanges(3), "flattery") == first
        assert again.reader.usage == Usage(0, 0, 0, 0.0, 3)
        judge_of(cache=cache, model="another").judge(exchanges(3), "flattery")
    assert len(endpoint.requests) == 6


def test_openai_judge_shares_its_cache_with_another_process(judge_of, endpoint, trait, tmp_path):
    path = tmp_path / "cache.sqlite"
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from persona_lora.core.chat import Exchange\n"
        "from persona_lora.core.traits import load_trait\n"
        "from persona_lora.judges.cache import VerdictCache\n"
        "from persona_lora.judges.judge_prompts import PromptJudge\n"
        "from persona_lora.judges.openai import EndpointReader\n"
        "reader = EndpointReader(base_url=sys.argv[2], api_key='x', "
        "cache=VerdictCache(Path(sys.argv[3])))\n"
        "judge = PromptJudge(load_trait(Path(sys.argv[1])), reader)\n"
        "judge.judge([Exchange('Question 0?', 'Answer 0.')], 'flattery')\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(trait.folder), endpoint.base_url, str(path)],
        check=True,
    )
    with closing(VerdictCache(path)) as cache:
        judge = judge_of(cache=cache)
        assert judge.judge(exchanges(1), "flattery")[0].score == pytest.approx(80)
        assert judge.reader.usage.cache_hits == 1
    assert len(endpoint.requests) == 1


def test_openai_judge_caches_scores_and_nothing_else(judge_of, endpoint, tmp_path):
    endpoint.script = {
        0: endpoint.logprobs({"REF": 0.9}),
        1: endpoint.raw(b"garbage"),
        2: endpoint.error(500),
        3: endpoint.logprobs({"Hm": 0.9}),
    }
    with closing(VerdictCache(tmp_path / "cache.sqlite")) as cache:
        limits = Limits(concurrency=1, max_retries=0)
        first = judge_of(cache=cache, limits=limits).judge(exchanges(5), "flattery")
        assert [verdict.reason for verdict in first][::4] == ["refusal", ""]
        assert len(cache) == 1
        second = judge_of(cache=cache, limits=limits).judge(exchanges(5), "flattery")
    assert [verdict.score for verdict in second] == [pytest.approx(80)] * 5
    assert len(endpoint.requests) == 9


@pytest.mark.parametrize("status", [401, 403])
def test_openai_judge_with_a_refused_key_is_a_user_error_without_the_key(
    judge_of, endpoint, status
):
    endpoint.otherwise = endpoint.error(status, f"Incorrect API key provided: {KEY}")
    with pytest.raises(UserError, match="OPENAI_API_KEY") as caught:
        judge_of(limits=Limits(concurrency=1)).judge(exchanges(4), "flattery")
    assert KEY not in repr(caught.getrepr(style="long", showlocals=False))
    assert "\n" not in str(caught.value)
    assert len(endpoint.requests) == 1


def test_openai_judge_with_an_unknown_model_is_a_user_error(judge_of, endpoint):
    endpoint.otherwise = endpoint.error(404, "no such model")
    with pytest.raises(UserError, match=r"'nope'.*JUDGE_MODEL"):
        judge_of(model="nope").judge(exchanges(2), "flattery")


def test_openai_judge_with_a_used_up_quota_does_not_retry(judge_of, endpoint):
    endpoint.otherwise = endpoint.error(429, code="insufficient_quota")
    with pytest.raises(UserError, match="quota"):
        judge_of(limits=Limits(concurrency=1)).judge(exchanges(2), "flattery")
    assert len(endpoint.requests) == 1


def test_openai_judge_keeps_finished_verdicts_when_the_key_is_revoked_on_the_way(
    judge_of, endpoint
):
    endpoint.script = {number: endpoint.error(401) for number in (1, 2)}
    judge = judge_of(limits=Limits(concurrency=1))
    for _ in range(2):
        with pytest.raises(UserError, match=r"OPENAI_API_KEY.*kept so far: 1; the same command"):
            judge.judge(exchanges(3), "flattery")
    assert len(endpoint.requests) == 3
    assert all(each.score is not None for each in judge.judge(exchanges(3), "flattery"))
    assert len(endpoint.requests) == 5


def test_openai_judge_never_shows_its_key(judge_of, endpoint, caplog, capfd, tmp_path):
    path = tmp_path / "cache.sqlite"
    endpoint.script = {
        0: endpoint.error(400, f"bad key {KEY} in the request"),
        1: endpoint.error(500, KEY, {"Retry-After": "0"}),
        2: endpoint.logprobs({"REF": 0.9}),
    }
    with caplog.at_level(logging.DEBUG), closing(VerdictCache(path)) as cache:
        judge = judge_of(cache=cache, limits=Limits(concurrency=1, max_retries=1))
        verdicts = judge.judge(exchanges(3), "flattery")
        files = b"".join(each.read_bytes() for each in tmp_path.glob("cache.sqlite*"))
    assert "[key]" in verdicts[0].reason
    output = capfd.readouterr()
    for text in (caplog.text, repr(verdicts), repr(judge.reader), str(judge.reader.usage), *output):
        assert KEY not in text
    assert len(files) > 0
    assert KEY.encode() not in files


def test_openai_judge_works_inside_a_running_event_loop(judge_of):
    async def inside() -> float | None:
        return judge_of().judge(exchanges(1), "flattery")[0].score

    assert asyncio.run(inside()) == pytest.approx(80)


def test_openai_judge_of_nothing_asks_nothing(judge_of, endpoint):
    assert judge_of().judge([], "flattery") == []
    assert not endpoint.requests


def test_openai_judge_without_a_key_names_the_remedy(trait):
    with pytest.raises(UserError, match=r"there is no API key; set OPENAI_API_KEY"):
        PromptJudge(trait, EndpointReader(**endpoint_of({})))


def test_openai_judge_reads_the_given_environment_and_ignores_the_process_one(
    trait, endpoint, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-process")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    environ = {
        "OPENAI_API_KEY": f" {KEY}\n",
        "OPENAI_BASE_URL": endpoint.base_url + "/",
        "JUDGE_MODEL": "my-model",
    }
    judge = PromptJudge(trait, EndpointReader(**endpoint_of(environ)))
    assert judge.judge(exchanges(1), "flattery")[0].score == pytest.approx(80)
    assert endpoint.requests[0]["model"] == "my-model"
    assert endpoint.headers[0]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("key", ["sk-a b", "sk-a\nb", "sk-ü"])
def test_openai_judge_refuses_a_malformed_key_without_showing_it(trait, key):
    with pytest.raises(UserError) as caught:
        PromptJudge(trait, EndpointReader(api_key=key))
    assert key not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a/v1", "http://", "http://u:s3cret@a/v1",
    "http://s3cret@a/v1", "http://a/v1?api_key=s3cret", "http://a/v1?s3cret", "http://a/v1#s3cret",
    "http://u:s3cret@a:x/v1", "http://a:99999/v1", "http://[::1/v1", "http://a b/v1", "http://a/\n",
    "https://u:s3cret@a/v1?api-version=1&key=s3cret"])  # fmt: skip
def test_openai_judge_refuses_a_base_url_that_is_malformed_or_holds_secrets(trait, url):
    with pytest.raises(UserError, match="base URL") as caught:
        PromptJudge(trait, EndpointReader(base_url=url))
    assert "s3cret" not in str(caught.value)


def test_openai_judge_keeps_an_api_version_in_the_base_url(judge_of, endpoint):
    judge = judge_of(base_url=endpoint.base_url + "/?api-version=2025-01-01")
    assert judge.judge(exchanges(1), "flattery")[0].score == pytest.approx(80)
    assert endpoint.paths == ["/v1/chat/completions?api-version=2025-01-01"]


def test_openai_judge_refuses_senseless_limits_and_modes(trait):
    for options in ({"concurrency": 0}, {"timeout": 0.0}, {"max_retries": -1}):
        with pytest.raises(UserError, match="limits"):
            Limits(**options)
    with pytest.raises(UserError, match="mode"):
        PromptJudge(trait, EndpointReader(api_key=KEY, mode="guess"))
