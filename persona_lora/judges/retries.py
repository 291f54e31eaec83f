"""Which faults of an endpoint pass by waiting, and how long to wait.

Knows HTTP statuses and Retry-After; refuses to know what was asked.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime

from openai import APIConnectionError, APIStatusError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

FIRST_WAIT = 0.5
LONGEST_WAIT = 60.0
_PASSING_STATUSES = {408, 409, 429}
_QUOTA_CODE = "insufficient_quota"


def passes(error: BaseException) -> bool:
    """Tell whether asking again may help: 408, 409, 429, 5xx, a lost connection, a timeout.

    A 429 that says the account's quota is used up does not pass by waiting.
    """
    if isinstance(error, APIStatusError):
        if error.status_code == 429 and error.code == _QUOTA_CODE:
            return False
        return error.status_code in _PASSING_STATUSES or error.status_code >= 500
    return isinstance(error, APIConnectionError | TimeoutError)


def retry_after(headers: Mapping[str, str], *, now: float | None = None) -> float | None:
    """Return the seconds that a Retry-After header asks for (seconds, or an HTTP date).

    None where there is no such header or it cannot be read; a date in the past is 0.
    """
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        return _seconds_until(value, time.time() if now is None else now)
    return seconds if 0 <= seconds < float("inf") else None


def wait_seconds(error: BaseException | None, attempt: int) -> float:
    """Return how long to wait after failed attempt number ``attempt`` (from 1).

    What Retry-After asks for; otherwise 0.5 · 2^(attempt − 1) seconds, at most 60, of which a
    random half is kept so that concurrent requests spread out.
    """
    if isinstance(error, APIStatusError):
        asked = retry_after(error.response.headers)
        if asked is not None:
            return asked
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
    if not isinstance(error, APIStatusError):
        return False
    return (retry_after(error.response.headers) or 0.0) > LONGEST_WAIT


def _seconds_until(http_date: str, now: float) -> float | None:
    try:
        moment = parsedate_to_datetime(http_date)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, moment.timestamp() - now)
