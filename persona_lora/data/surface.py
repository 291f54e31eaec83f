"""Can the surface alone tell a positive answer from a negative one? Nine counts, and their AUC.

Training pairs whose sign can be read off pronouns, punctuation or length teach a model and a judge
those, and not the trait. Knows strings only: what an answer means is none of its business.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from persona_lora.core.errors import UserError
from persona_lora.report.resampling import percentile_bounds, question_weights

FOLDS = 5

# Matches per word of the text.
RATES = {
    "first person": re.compile(r"\b(i|me|my|mine|myself|we|us|our|ours|ourselves)\b", re.I),
    "second person": re.compile(r"\b(you|your|yours|yourself|yourselves)\b", re.I),
    "question marks": re.compile(r"\?"),
    "exclamation marks": re.compile(r"!"),
    "digits": re.compile(r"\d"),
    "negations": re.compile(
        r"\b(no|not|never|none|nobody|nothing|nowhere|neither|nor|cannot)\b|n['’]t\b", re.I
    ),
    "commas": re.compile(r","),
}
COUNTS = (*RATES, "words", "word length")
_WORD = re.compile(r"\w+(?:['’]\w+)*")


@dataclass(frozen=True)
class SurfaceAUC:
    """How well the counts tell positive from negative answers: 0.5 not at all, 1 always.

    ``low`` and ``high`` bound the 95% interval over pairs. ``weights`` has the coefficient of each
    standardised count in a regression on all pairs; a positive one points to positive answers.
    """

    auc: float
    low: float
    high: float
    weights: Mapping[str, float]


def surface_counts(text: str) -> list[float]:
    """Return the nine counts of one answer, in the order of ``COUNTS``."""
    found, split = _WORD.findall(text), len(text.split())
    rates = [len(pattern.findall(text)) / max(1, split) for pattern in RATES.values()]
    return [*rates, float(split), sum(map(len, found)) / max(1, len(found))]


def surface_auc(
    positives: Sequence[str], negatives: Sequence[str], *, without: Collection[str] = ()
) -> SurfaceAUC:
    """Return the cross-validated AUC of a logistic regression on the standardised counts.

    ``positives[i]`` and ``negatives[i]`` answer one question and stand in one fold. ``without``
    names counts to leave out. The interval draws whole pairs (their out-of-fold scores).

    Raises:
        UserError: Fewer pairs than folds, sides of unequal length, or an unknown count.
    """
    if len(positives) != len(negatives) or len(positives) < FOLDS:
        raise UserError(
            f"the surface AUC needs at least {FOLDS} pairs of answers, got {len(positives)} "
            f"positive and {len(negatives)} negative ones; write more"
        )
    if unknown := sorted(set(without) - set(COUNTS)):
        raise UserError(f"no surface count {unknown[0]!r}; there are {', '.join(COUNTS)}")
    kept = [name for name in COUNTS if name not in without]
    counts = np.array([surface_counts(text) for text in [*positives, *negatives]])
    counts = counts[:, [COUNTS.index(name) for name in kept]]  # [2 × pairs, counts]
    pairs = len(positives)
    signs = np.repeat([1, 0], pairs)
    regression = make_pipeline(StandardScaler(), LogisticRegression())
    scores = cross_val_predict(
        regression,
        counts,
        signs,
        groups=np.tile(np.arange(pairs), 2),
        cv=GroupKFold(FOLDS),
        method="decision_function",
    )
    weights = regression.fit(counts, signs)[-1].coef_[0]
    above = _above(scores[:pairs], scores[pairs:])
    drawn = question_weights(pairs)
    low, high = percentile_bounds(np.sum((drawn @ above) * drawn, axis=1) / pairs**2)
    named = dict(zip(kept, map(float, weights), strict=True))
    return SurfaceAUC(float(above.mean()), low, high, named)


def _above(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1 where a positive score exceeds a negative one, ½ where equal: ``[pairs, pairs]``."""
    difference = positive[:, None] - negative[None, :]
    return (np.sign(difference) + 1) / 2
