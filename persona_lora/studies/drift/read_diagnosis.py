"""What a diagnosis found: traits beside their controls, an alarm with its errors, places, words.

A trait is flagged when the coordinate lies further from the mean of the controls than another
control would: t·s·√(1 + 1/n), with s their standard deviation, at 5% over all traits together
(Bonferroni); and further from 0 than along a direction turned at random, at the same level: a large
change along one trait has a small share in all. Each control in turn plays the finetune, with the
others as its controls, and the null of what is left without their mean: how often it is flagged is
the rate of false alarms, and how often with a direction of stated weighted norm added that of
finding it. Too few controls leave the null of turned directions alone, which says nothing of real
finetunes: they lie outside it whatever they were trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from persona_lora.core.errors import UserError
from persona_lora.core.protocol import LEVEL
from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.resampling import Array

# Of rows: the finetune and the controls, whole or less the mean of the controls.
WHOLE, APART, CONTROL, CONTROL_APART = "whole", "apart", "control", "control apart"
PLACES = ("while reading", "as the first word of the answer")
ENOUGH = 5  # controls, for a threshold
DOSES = (0.1, 0.3, 1.0)  # planted, in mean norms of the controls


@dataclass(frozen=True)
class Share:
    """How many of so many, with the exact 95% interval of the share (Clopper and Pearson)."""

    k: int
    of: int
    low: float
    high: float

    @classmethod
    def count(cls, which: NDArray[np.bool_]) -> Self:
        """Return how many are true."""
        k, of = int(which.sum()), len(which)
        found = stats.binomtest(k, of).proportion_ci(LEVEL)
        return cls(k, of, float(found.low), float(found.high))

    def __str__(self) -> str:
        low, high = map(wording.percent, (self.low, self.high))
        return f"{self.k} of {self.of} [{low}, {high}]"


@dataclass(frozen=True)
class Alarm:
    """Whether a trait is flagged; ``coordinate`` is less the mean of the controls, if any.

    ``half`` of its 95% interval is over which controls were taken. ``false`` counts
    controls that would be flagged, ``found`` those with ``DOSES`` of the direction added;
    ``found_from`` is the norm that is found in all of them, ``controls`` how far each lies from the
    mean of the others. None or empty where controls
    are too few.
    """

    trait: str
    coordinate: float
    threshold: float
    half: float | None = None
    false: Share | None = None
    found: tuple[Share, ...] = ()
    found_from: float | None = None
    controls: tuple[float, ...] = ()

    @property
    def flagged(self) -> bool:
        """Whether the coordinate is over the threshold, on either side."""
        return abs(self.coordinate) > self.threshold


@dataclass(frozen=True)
class Diagnosis:
    """The alarms, nearest trait first; ``any_false`` counts controls flagged for any trait.

    ``doses`` are the weighted norms that were planted.
    """

    alarms: tuple[Alarm, ...]
    any_false: Share | None
    doses: tuple[float, ...]


def totals(run: Run, what: str) -> list[dict[str, Any]]:
    """Return the rows of total projections of the finetune, or of the controls."""
    return [row for row in run.read("projections") if (row["what"], row["part"]) == (what, "total")]


def headline_of(run: Run) -> str:
    """Return which projection of the finetune is read: less the controls' mean, where there are."""
    return APART if totals(run, APART) else WHOLE


def read_diagnosis(run: Run) -> Diagnosis:
    """Return what is flagged, and how far that is to be believed."""
    rows = {row["diff"]: row for row in totals(run, headline_of(run)) if row["geometry"] != "plain"}
    names = sorted(rows, key=lambda name: -rows[name]["cosine"])
    z = float(stats.norm.ppf(1 - (1 - LEVEL) / 2 / len(names)))
    by_chance = {name: z * rows[name]["null_sd"] for name in names}
    usual = _of_controls(run, names, CONTROL, "coordinate")
    n = len(usual)
    if n < ENOUGH:
        alone = [Alarm(each, rows[each]["coordinate"], by_chance[each]) for each in names]
        return Diagnosis(tuple(alone), None, ())
    # C less the mean of the n - 1 others is n / (n - 1) times C less the mean of all.
    nulls = _of_controls(run, names, CONTROL_APART, "null_sd") * n / (n - 1)
    if len(nulls) < n:
        raise UserError(f"{run.folder} has no nulls of its controls; run diagnose again")
    norms = [each["delta_norm"] for each in finetunes_of(run, CONTROL)]
    doses = tuple(share * float(np.mean(norms)) for share in DOSES)
    left_out = [_usual(np.delete(usual, at, axis=0)) for at in range(n)]
    apart = usual - np.array([mean for mean, _ in left_out])  # [controls, traits]
    limits = np.maximum([limit for _, limit in left_out], z * nulls)
    flagged = np.abs(apart) > limits
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * usual.std(axis=0, ddof=1) / math.sqrt(n)
    alarms = [
        Alarm(
            name,
            rows[name]["coordinate"],
            max(float(_usual(usual)[1][at]), by_chance[name]),
            float(half[at]),
            Share.count(flagged[:, at]),
            tuple(Share.count(np.abs(apart[:, at] + dose) > limits[:, at]) for dose in doses),
            float((limits - apart)[:, at].max()),
            tuple(apart[:, at].tolist()),
        )
        for at, name in enumerate(names)
    ]
    return Diagnosis(tuple(alarms), Share.count(flagged.any(axis=1)), doses)


def _of_controls(run: Run, names: Sequence[str], what: str, column: str) -> Array:
    """Return a column of the weighted projections of every control, ``[controls, traits]``."""
    found: dict[str, dict[str, float]] = {}
    for row in totals(run, what):
        if row["geometry"] != "plain":
            found.setdefault(row["finetuned"], {})[row["diff"]] = row[column]
    return np.array([[each[name] for name in names] for each in found.values()])


def _usual(usual: Array) -> tuple[Array, Array]:
    """Return the mean of controls by trait, and how far another one may lie from it."""
    n, traits = usual.shape
    t = stats.t.ppf(1 - (1 - LEVEL) / 2 / traits, n - 1)
    return usual.mean(axis=0), t * usual.std(axis=0, ddof=1) * math.sqrt(1 + 1 / n)


def finetunes_of(run: Run, what: str) -> list[dict[str, Any]]:
    """Return the weighted norms and what goes with them, of the finetune or of the controls."""
    rows = run.read("finetunes")
    return [row for row in rows if (row["what"], row["geometry"]) == (what, "weighted")]


def diagnosis_record(run: Run) -> dict[str, Any]:
    """Return the diagnosis as plain values."""
    found = read_diagnosis(run)
    return {
        **asdict(found),
        "alarms": [{**asdict(each), "flagged": each.flagged} for each in found.alarms],
        "finetunes": run.read("finetunes"),
        "shares": run.read("shares"),
        "words": run.read("words"),
    }
