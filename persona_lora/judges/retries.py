"""Faults of an endpoint: which pass by waiting, what it refuses, and when to stop asking.

Knows HTTP statuses, Retry-After and the names of a chat completion's parameters; refuses to know
what was asked. A dead endpoint is not asked ten thousand times."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Collection, Mapping
from dataclasses import KW_ONLY, dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from persona_lora.core.errors import UserError

logger = logging.getLogger(__name__)

FIRST_WAIT = 0.5
LONGEST_WAIT = 60.0
_PASSING_STATUSES = {408, 409, 425, 429}
_QUOTA_CODE = "insufficient_quota"


@dataclass(eq=False)
class Fault(Exception):
    """What came instead of a reply.

    ``reason`` is one line without secrets. ``status`` is the HTTP status, None where no whole
    reply came; ``code`` and ``said`` are the endpoint's own words about it; ``retry_after`` is how
    many seconds it asks to wait. ``passing`` tells whether a fault without a status may pass.
    """

    reason: str
    _: KW_ONLY
    status: int | None = None
    code: str = ""
    said: str = ""
    retry_after: float | None = None
    passing: bool = False


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


Body = Mapping[str, Any]

TOP_LOGPROBS = (20, 10, 8, 5)  # limits that endpoints are known to have
REASONING_ROOM = 2048  # tokens
_REFUSING_STATUSES = (400, 422)


class Dialect:
    """The requests of one endpoint: shared by all of them, and learnt from its refusals.

    ``optional`` names parameters that may be left out; ``room`` is how many more tokens a reply
    gets once the model is seen to reason before it answers, 0 where that would not help.
    """

    def __init__(self, name: str, *, optional: Collection[str] = (), room: int = 0) -> None:
        self._name = name
        self._optional = tuple(optional)
        self._room = room
        self._renamed = False
        self._left_out: set[str] = set()
        self._most_logprobs = TOP_LOGPROBS[0]
        self._extra_tokens = 0

    def spoken(self, body: Body) -> dict[str, Any]:
        """Return ``body`` as this endpoint takes it."""
        said = {name: value for name, value in body.items() if name not in self._left_out}
        if "top_logprobs" in said:
            said["top_logprobs"] = min(said["top_logprobs"], self._most_logprobs)
        if "max_tokens" in said:
            tokens = said.pop("max_tokens") + self._extra_tokens
            said["max_completion_tokens" if self._renamed else "max_tokens"] = tokens
        return said

    def learn(self, fault: Fault, sent: Body) -> bool:
        """Take a refusal of a parameter into account; False where it is about something else."""
        if fault.status not in _REFUSING_STATUSES:
            return False
        said = fault.said.lower()
        if "max_tokens" in sent and "max_completion_tokens" in said:
            self._renamed = True
            return True
        if "top_logprobs" in sent and "top_logprobs" in said:
            fewer = [number for number in TOP_LOGPROBS if number < sent["top_logprobs"]]
            self._most_logprobs = max(fewer, default=self._most_logprobs)
            return bool(fewer)
        for name in self._optional:
            if name in sent and name in said:
                logger.warning("%s refuses %s and is asked without it", self._name, name)
                self._left_out.add(name)
                return True
        return False

    def give_room(self) -> bool:
        """Let replies be longer, so that reasoning ends before they do; False where it cannot."""
        if self._room == self._extra_tokens:
            return False
        self._extra_tokens = self._room
        logger.warning(
            "%s reasons before it answers; its replies may be %d tokens longer from here on",
            self._name,
            self._room,
        )
        return True


FAULTS_IN_A_ROW = 5
FORMLESS_IN_A_ROW = 20

Outcome = Literal["good", "about the text", "formless", "fault", "lasting"]
"""What became of one reply.

"about the text": there is none because of what was asked (a refusal, a filter); "formless": the
model answered, but not in the form that was asked for; "fault": the endpoint failed, after all
retries; "lasting": every reply will lack the same.
"""


class Series:
    """The outcomes of one reader or writer over its life; ``kept`` counts the good ones.

    ``note`` raises UserError, with what is kept and how to go on, after five faults in a row,
    after twenty formless replies where none has ever been good, and at once for what lasts.
    """

    def __init__(self, name: str) -> None:
        self.kept = 0
        self._name = name
        self._faults = 0
        self._formless = 0

    def note(self, outcome: Outcome, reason: str) -> None:
        """Take one outcome into account; ``reason`` is why it is not good."""
        if outcome == "good":
            self.kept += 1
            self._faults = self._formless = 0
        elif outcome == "lasting" and not self.kept:
            self.stop(reason)
        elif outcome in ("fault", "lasting"):
            self._faults += 1
            if self._faults >= FAULTS_IN_A_ROW:
                self.stop(f"{self._name} failed {self._faults} times in a row: {reason}")
        elif outcome == "formless":
            self._formless += 1
            if self._formless >= FORMLESS_IN_A_ROW and not self.kept:
                self.stop(f"none of {self._formless} replies of {self._name} is usable: {reason}")

    def stop(self, reason: str) -> None:
        """Raise UserError with what is kept; a later call starts a new series."""
        self._faults = self._formless = 0
        kept = f"kept so far: {self.kept}; " if self.kept else ""
        raise UserError(f"{reason}; {kept}the same command goes on from here once that is mended")
