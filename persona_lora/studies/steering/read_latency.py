"""Timings of ways to steer, against the plain model, paired within rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from persona_lora.report.resampling import Interval

BASE, MERGED, LIVE, ACTIVATIONS, PROMPT = "base", "merged", "live", "activations", "prompt"
VARIANTS = (BASE, MERGED, LIVE, ACTIVATIONS, PROMPT)
FIRST_TOKEN, TOKENS = "first token", "tokens a second"


@dataclass(frozen=True)
class Timing:
    """One measurement: seconds to the first token, and tokens per second after it, in one round."""

    variant: str
    batch: int
    round: int
    first_token: float
    tokens_per_second: float


@dataclass(frozen=True)
class Ratio:
    """A variant's time against the base model's at one batch size: 1.2 is 20% slower.

    ``ratio`` is the geometric mean over rounds with its interval; ``median`` the variant's own
    median, in seconds (to the first token) or tokens per second.
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
            logs = [float(np.log(value / base[at])) for at, value in seconds_of.items()]
            median = float(np.median(list(seconds_of.values())))
            value = median if measure == FIRST_TOKEN else 1.0 / median
            found.append(Ratio(variant, batch, measure, _over_rounds(logs), value))
    return found


def _over_rounds(logs: Sequence[float]) -> Interval:
    """Return the geometric mean with a 95% interval by Student's t: rounds are few."""
    number, mean = len(logs), float(np.mean(logs))
    if number < 2:
        return Interval(float(np.exp(mean)), None, None, number, number, 1.0, "one round")
    half = float(student.ppf(0.975, number - 1) * np.std(logs, ddof=1) / np.sqrt(number))
    low, middle, high = (float(np.exp(mean + side * half)) for side in (-1, 0, 1))
    return Interval(middle, low, high, number, number, 1.0, None)
