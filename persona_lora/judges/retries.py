"""Faults of an endpoint: which of them pass by waiting, and how long to wait.

Knows HTTP statuses and Retry-After; refuses to know what was asked.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

FIRST_WAIT = 0.5
LONGEST_WAIT = 60.0
_PASSING_STATUSES = {408, 409, 425, 429}
_QUOTA_CODE = "insufficient_quota"


class Fault(Exception):
    """What came instead of a reply.

    ``reason`` is one line without secrets. ``status`` is the HTTP status, None where no whole
    reply came; ``code`` and ``said`` are the endpoint's own words about it; ``retry_after`` is how
    many seconds it asks to wait. ``passing`` tells whether a fault without a status may pass.
    """

    def __init__(
        self,
        reason: str,
        *,
        status: int | None = None,
        code: str = "",
        said: str = "",
        retry_after: float | None = None,
        passing: bool = False,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status
        self.code = code
        self.said = said
        self.retry_after = retry_after
        self.passing = passing


def passes(error: BaseException) -> bool:
    """Tell whether asking again may help: 408, 409, 425, 429, 5xx, a lost connection, a timeout.

    A 429 that says the account's quota is used up does not pass by waiting.
    """
    if not isinstance(error, Fault):
        return False
    if error.status is None:
        return error.passing
    if error.status == 429 and error.code == _QUOTA_CODE:
        return False
    return error.status in _PASSING_STATUSES or error.status >= 500


def retry_after(headers: Mapping[str, str], *, now: float | None = None) -> float | None:
    """Return the seconds that Retry-After asks for (seconds, or an HTTP date), or Retry-After-Ms.

    None where there is no such header or it cannot be read; a date in the past is 0.
    """
    value = headers.get("retry-after", "").strip()
    milliseconds = headers.get("retry-after-ms", "").strip()
    try:
        seconds = float(milliseconds) / 1000 if milliseconds else float(value)
    except ValueError:
        return _seconds_until(value, time.time() if now is None else now)
    return seconds if 0 <= seconds < float("inf") else None


def wait_seconds(error: BaseException | None, attempt: int) -> float:
    """Return how long to wait after failed attempt number ``attempt`` (from 1).

    What Retry-After asks for; otherwise 0.5 · 2^(attempt − 1) seconds, at most 60, of which a
    random half is kept so that concurrent requests spread out.
    """
    if isinstance(error, Fault) and error.retry_after is not None:
        return error.retry_after
    return min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT) * random.uniform(0.5, 1.0)


def retrying(max_retries: int) -> AsyncRetrying:
    """Return a loop of attempts over passing faults; the last fault is raised as it is.

    It gives up at once when the endpoint asks for a wait of over 60 seconds.
    """
    return AsyncRetrying(
        retry=retry_if_exception(passes),
        wait=lambda state: wait_seconds(_fault(state), state.attempt_number),
        stop=lambda state: state.attempt_number > max_retries or _asked_to_wait_too_long(state),
        reraise=True,
    )


def _fault(state: RetryCallState) -> BaseException | None:
    return None if state.outcome is None else state.outcome.exception()


def _asked_to_wait_too_long(state: RetryCallState) -> bool:
    error = _fault(state)
    return isinstance(error, Fault) and (error.retry_after or 0.0) > LONGEST_WAIT


def _seconds_until(http_date: str, now: float) -> float | None:
    try:
        moment = parsedate_to_datetime(http_date)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, moment.timestamp() - now)
