"""Which faults pass, and how long to wait."""

from __future__ import annotations

import asyncio
from email.utils import formatdate

import pytest

from persona_lora.judges.retries import Fault, passes, retry_after, retrying, wait_seconds


def status_error(status: int, *, code: str = "", retry_after: float | None = None) -> Fault:
    return Fault(f"HTTP {status}", status=status, code=code, retry_after=retry_after)


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
def test_passes_for_faults_that_waiting_may_mend(status):
    assert passes(status_error(status))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_does_not_pass_for_requests_that_are_wrong(status):
    assert not passes(status_error(status))


def test_passes_for_lost_connections_and_timeouts_but_not_for_bugs_or_used_up_quotas():
    assert passes(Fault("the connection failed", passing=True))
    assert not passes(Fault("the reply is a web page"))
    assert not passes(KeyError("x"))
    assert not passes(status_error(429, code="insufficient_quota"))


def test_retry_after_reads_seconds_and_http_dates():
    assert retry_after({"retry-after": "7"}) == 7.0
    assert retry_after({"retry-after": "0.5"}) == 0.5
    assert retry_after({"retry-after": "7", "retry-after-ms": "250"}) == 0.25
    date = formatdate(1_000_030, usegmt=True)
    assert retry_after({"retry-after": date}, now=1_000_000.0) == pytest.approx(30.0)
    assert retry_after({"retry-after": date}, now=2_000_000.0) == 0.0


@pytest.mark.parametrize("value", ["", "soon", "-3", "inf", "nan", "Mon, 99 Foo 2020"])
def test_retry_after_ignores_what_it_cannot_read(value):
    assert retry_after({"retry-after": value}) is None
    assert retry_after({}) is None


def test_wait_follows_retry_after_and_otherwise_grows_to_a_bound():
    assert wait_seconds(status_error(429, retry_after=3.0), 1) == 3.0
    assert 0.25 <= wait_seconds(None, 1) <= 0.5
    assert 1.0 <= wait_seconds(status_error(500), 3) <= 2.0
    assert wait_seconds(None, 60) <= 60.0


def attempts_made(error: Exception, max_retries: int) -> int:
    made = 0

    async def fail() -> None:
        nonlocal made
        made += 1
        raise error

    with pytest.raises(type(error)):
        asyncio.run(retrying(max_retries)(fail))
    return made


def test_retrying_stops_after_its_retries_and_raises_the_fault_itself():
    assert attempts_made(status_error(503, retry_after=0.0), 3) == 4
    assert attempts_made(status_error(503, retry_after=0.0), 0) == 1
    assert attempts_made(status_error(400), 3) == 1


def test_retrying_gives_up_when_asked_to_wait_for_an_hour():
    assert attempts_made(status_error(429, retry_after=3600.0), 3) == 1
