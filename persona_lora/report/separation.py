"""Does a number tell two groups of answers apart? AUC with an interval, and rank correlation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata, spearmanr

from persona_lora.core.errors import UserError
from persona_lora.report.resampling import CONFIDENCE, RESAMPLES

POSITIVE, NEGATIVE = 75, 25  # labels from and up to which an answer counts as one or the other


@dataclass(frozen=True)
class Separation:
    """How well a projection tells answers with the trait from answers without it.

    ``auc`` is the chance that a positive answer lies above a negative one (0.5: none), with a
    bootstrap interval over answers, resampled within the groups. ``rho`` is Spearman's rank
    correlation with the label over all answers, None where either does not vary.
    """

    auc: float
    low: float
    high: float
    rho: float | None
    n_positive: int
    n_negative: int
    n: int


def separation(
    values: Sequence[float], labels: Sequence[int], *, seed: int = 0, resamples: int = RESAMPLES
) -> Separation:
    """Compare values of answers labelled 75 and more with those labelled 25 and less."""
    x, y = np.asarray(values, dtype=float), np.asarray(labels)
    above, below = x[y >= POSITIVE], x[y <= NEGATIVE]
    if len(above) < 2 or len(below) < 2:
        raise UserError(
            f"{len(above)} answers are labelled {POSITIVE} or more and {len(below)} {NEGATIVE} or "
            "less; at least two of each are needed"
        )
    random = np.random.default_rng(seed)
    drawn = [
        auc_of(random.choice(above, len(above)), random.choice(below, len(below)))
        for _ in range(min(resamples, 2000))
    ]
    tail = (1 - CONFIDENCE) / 2
    varies = len(set(x.tolist())) > 1 and len(set(y.tolist())) > 1
    return Separation(
        auc=auc_of(above, below),
        low=float(np.quantile(drawn, tail)),
        high=float(np.quantile(drawn, 1 - tail)),
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
