"""Does a number tell two groups of answers apart? AUC with an interval, and rank correlation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm, rankdata, spearmanr

from persona_lora.core.errors import UserError
from persona_lora.report.resampling import CONFIDENCE, Bounds

POSITIVE, NEGATIVE = 75, 25  # labels from and up to which an answer counts as one or the other


@dataclass(frozen=True)
class Separation:
    """How well a projection tells answers with the trait from answers without it.

    ``auc`` is the chance that a positive answer lies above a negative one (0.5: none), with the
    95% interval of ``auc_bounds`` over answers. ``rho`` is Spearman's rank
    correlation with the label over all answers, None where either does not vary.
    """

    auc: float
    low: float
    high: float
    rho: float | None
    n_positive: int
    n_negative: int
    n: int


def separation(values: Sequence[float], labels: Sequence[int]) -> Separation:
    """Compare values of answers labelled 75 and more with those labelled 25 and less."""
    x, y = np.asarray(values, dtype=float), np.asarray(labels)
    above, below = x[y >= POSITIVE], x[y <= NEGATIVE]
    if len(above) < 2 or len(below) < 2:
        raise UserError(
            f"{len(above)} answers are labelled {POSITIVE} or more and {len(below)} {NEGATIVE} or "
            "less; at least two of each are needed"
        )
    auc = auc_of(above, below)
    bounds = auc_bounds(auc, len(above), len(below))
    varies = len(set(x.tolist())) > 1 and len(set(y.tolist())) > 1
    return Separation(
        auc=auc,
        low=bounds.low,
        high=bounds.high,
        rho=float(spearmanr(x, y).statistic) if varies else None,
        n_positive=len(above),
        n_negative=len(below),
        n=len(x),
    )


def auc_of(above: np.ndarray, below: np.ndarray) -> float:
    """Return the share of pairs in which the one of ``above`` is larger; ties count half."""
    ranks = rankdata(np.concatenate([above, below]))
    positive = ranks[: len(above)].sum() - len(above) * (len(above) + 1) / 2
    return float(positive / (len(above) * len(below)))


def auc_bounds(auc: float, positives: int, negatives: int) -> Bounds:
    """Return the 95% score interval of an AUC of independent answers (Newcombe 2006, method 5).

    The ends are the areas whose own standard error puts ``auc`` at the edge of the central 95%, so
    that the interval of an AUC of 1 has a width. Where answers share questions, give the numbers of
    questions rather than of answers.
    """
    z = norm.ppf((1 + CONFIDENCE) / 2)
    half = (positives + negatives) / 2 - 1

    def excess(area: float) -> float:
        spread = 1 + half * (1 - area) / (2 - area) + half * area / (1 + area)
        return (auc - area) ** 2 - z**2 * area * (1 - area) * spread / (positives * negatives)

    beside = 1e-9  # an area of 0 or 1 is a root of its own
    low = brentq(excess, 0.0, auc - beside) if auc > 0 else 0.0
    high = brentq(excess, auc + beside, 1.0) if auc < 1 else 1.0
    return Bounds(float(low), float(high))
