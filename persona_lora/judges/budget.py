"""Counting requests, tokens and money, and stopping before a cap is passed.

Knows prices, caps and what they leave unscored; refuses to know what the requests are about.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from persona_lora.core.chat import Verdict
from persona_lora.core.errors import UserError

REQUEST_CAP = "request cap reached"
COST_CAP = "cost cap reached"

# A token of English text is about four bytes, of other scripts three or more: err on the safe side.
_BYTES_PER_TOKEN = 3
_PROMPT_OVERHEAD_TOKENS = 16


class CapReached(Exception):
    """The next request would pass a cap; says which."""


class Prices(NamedTuple):
    """US dollars for a million prompt tokens and for a million completion tokens."""

    prompt: float
    completion: float


KNOWN_PRICES = {
    "gpt-4.1-mini-2025-04-14": Prices(0.40, 1.60),
    "gpt-4.1-mini": Prices(0.40, 1.60),
    "gpt-4.1-nano": Prices(0.10, 0.40),
    "gpt-4.1": Prices(2.00, 8.00),
    "gpt-4o-mini": Prices(0.15, 0.60),
    "gpt-4o": Prices(2.50, 10.00),
}


class Usage(NamedTuple):
    """What a judge has used so far. ``dollars`` is an estimate, None without prices."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    dollars: float | None
    cache_hits: int


class Reservation(NamedTuple):
    """Tokens set aside for a request that is on its way."""

    prompt_tokens: int
    completion_tokens: int


@dataclass
class Budget:
    """A thread-safe running account with optional caps on requests and on US dollars.

    Every attempt, a retry too, is a request. What requests on their way may use is set aside
    first, so that concurrent requests cannot pass a cap together. Tokens are the endpoint's own
    count where it sends one, otherwise the estimate (bytes of UTF-8 / 3).
    """

    prices: Prices | None = None
    max_requests: int | None = None
    max_cost: float | None = None
    _requests: int = 0
    _prompt_tokens: int = 0
    _completion_tokens: int = 0
    _reserved: float = 0.0
    _cache_hits: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        for name, cap in (("max_requests", self.max_requests), ("max_cost", self.max_cost)):
            if cap is not None and not (math.isfinite(cap) and cap >= 0):
                raise UserError(f"{name} is {cap}; expected a number of at least 0, or none")
        if self.max_cost is not None and self.prices is None:
            raise UserError(
                "a cost cap needs the model's prices, which are not known here; leave out "
                f"--max-judge-cost, or ask one of {', '.join(KNOWN_PRICES)}"
            )

    def reserve(self, prompt: str, completion_tokens: int) -> Reservation:
        """Set one request aside; CapReached where a cap forbids it."""
        tokens = len(prompt.encode()) // _BYTES_PER_TOKEN + _PROMPT_OVERHEAD_TOKENS
        reservation = Reservation(tokens, completion_tokens)
        dollars = self._price(*reservation)
        with self._lock:
            if self.max_requests is not None and self._requests >= self.max_requests:
                raise CapReached(REQUEST_CAP)
            committed = self._price(self._prompt_tokens, self._completion_tokens) + self._reserved
            if self.max_cost is not None and committed + dollars > self.max_cost:
                raise CapReached(COST_CAP)
            self._requests += 1
            self._reserved += dollars
        return reservation

    def settle(self, reservation: Reservation, prompt_tokens: int, completion_tokens: int) -> None:
        """Replace what was set aside by what was used."""
        with self._lock:
            self._reserved -= self._price(*reservation)
            self._prompt_tokens += prompt_tokens
            self._completion_tokens += completion_tokens

    def count_cache_hit(self) -> None:
        """Count one verdict that was not paid for."""
        with self._lock:
            self._cache_hits += 1

    def usage(self) -> Usage:
        """Return the account as it stands."""
        with self._lock:
            spent = self._price(self._prompt_tokens, self._completion_tokens)
            return Usage(
                self._requests,
                self._prompt_tokens,
                self._completion_tokens,
                None if self.prices is None else spent,
                self._cache_hits,
            )

    def _price(self, prompt_tokens: int, completion_tokens: int) -> float:
        if self.prices is None:
            return 0.0
        dollars = prompt_tokens * self.prices.prompt + completion_tokens * self.prices.completion
        return dollars / 1_000_000


def cap_behind(score: float | None, reason: str) -> str | None:
    """Return the cap that left an answer unscored; None for another reason, and for a score.

    The reason may be made of those of several judges.
    """
    caps = (cap for cap in (REQUEST_CAP, COST_CAP) if cap in reason)
    return next(caps, None) if score is None else None


def reasons(first: Verdict, beside: Verdict | None) -> str:
    """Return a verdict's reason, and why a judge asked beside it gave no score."""
    if beside is None or beside.score is not None:
        return first.reason
    return "; ".join(filter(None, (first.reason, f"{beside.judge}: {beside.reason}")))


def refuse_spent(verdicts: Iterable[Verdict]) -> None:
    """UserError where a cap left an answer unscored: what is sought by these scores has to wait."""
    caps = (cap_behind(each.score, each.reason) for each in verdicts)
    cap = next(filter(None, caps), None)
    if cap is not None:
        raise UserError(
            f"judge: {cap}; what is judged is kept, and every finished generation of a search: run "
            "the same command again, with a higher --max-judge-cost, to go on"
        )
