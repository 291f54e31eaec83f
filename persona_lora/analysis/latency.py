"""Timings of ways to steer, against the plain model, paired within rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from persona_lora.analysis.resampling import Interval, bootstrap_mean

BASE, MERGED, LIVE, ACTIVATIONS, PROMPT = "base", "merged", "live", "activations", "prompt"
VARIANTS = (BASE, MERGED, LIVE, ACTIVATIONS, PROMPT)
FIRST_TOKEN, TOKENS = "first token", "tokens a second"


@dataclass(frozen=True)
class Timing:
    """One measurement: seconds to the first token, and tokens a second after it, in one round."""

    variant: str
    batch: int
    round: int
    first_token: float
    tokens_per_second: float


@dataclass(frozen=True)
class Ratio:
    """A variant's time against the base model's at one batch size: 1.2 is 20% slower.

    ``ratio`` is the geometric mean over rounds with a bootstrap interval; ``median`` the variant's
    own median, in seconds (to the first token) or tokens a second.
    """

    variant: str
    batch: int
    measure: str
    ratio: Interval
    median: float


def ratios(timings: Sequence[Timing]) -> list[Ratio]:
    """Return every variant against the base model, paired within rounds."""
    found = []
    for measure in (FIRST_TOKEN, TOKENS):
        by_place: dict[tuple[str, int], dict[int, float]] = {}
        for each in timings:
            seconds = each.first_token if measure == FIRST_TOKEN else 1.0 / each.tokens_per_second
            by_place.setdefault((each.variant, each.batch), {})[each.round] = seconds
        for (variant, batch), seconds_of in by_place.items():
            base = by_place[BASE, batch]
            logs = {at: [float(np.log(value / base[at]))] for at, value in seconds_of.items()}
            median = float(np.median(list(seconds_of.values())))
            value = median if measure == FIRST_TOKEN else 1.0 / median
            found.append(Ratio(variant, batch, measure, _exponential(bootstrap_mean(logs)), value))
    return found


def _exponential(interval: Interval) -> Interval:
    def up(value: float | None) -> float | None:
        return None if value is None else float(np.exp(value))

    return Interval(
        up(interval.mean), up(interval.low), up(interval.high), interval.n, interval.n_questions,
        interval.coverage, interval.reason,
    )  # fmt: skip
