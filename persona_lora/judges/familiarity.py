"""Is an answer like those that a probe was fitted to? Where not, its number would mean nothing.

The distance of states h from the fitted rows, by probabilistic principal components: with z the
standardised states, uᵢ the leading directions of the rows and λᵢ the variance along them,

    d² = Σᵢ (uᵢ·z)² / λᵢ + ‖z − Σᵢ (uᵢ·z) uᵢ‖² / σ²,

σ² the mean square of a held-out row's rest. The limit is the largest distance of a row while its
question was held out, or that which one in twenty of the fitted rows exceeds, if that is larger:
where there are more features than rows, the directions tell the fitted questions from all others,
and answers to just those lie farthest. Refuses to know what was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

FOLDS = 5
DIRECTIONS = 16
OWN = 0.95  # of the fitted rows are familiar

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Familiarity:
    """d of the module: ``center`` and ``spread`` ``[hidden]``, ``directions`` ``[k, hidden]``."""

    center: Array
    spread: Array
    directions: Array
    variances: Array
    rest: float
    limit: float

    def distances(self, states: NDArray[np.floating]) -> Array:
        """Return d of states ``[n, hidden]``: ``[n]``."""
        inside = (self._along(states) ** 2 / self.variances).sum(axis=1)
        distances: Array = np.sqrt(inside + self.outside(states) / self.rest)
        return distances

    def outside(self, states: NDArray[np.floating]) -> Array:
        """Return the square of what no direction holds: ``[n]``."""
        z = (states.astype(np.float64) - self.center) / self.spread
        rest: Array = (z**2).sum(axis=1) - (self._along(states) ** 2).sum(axis=1)
        return np.maximum(rest, 0.0)

    def _along(self, states: NDArray[np.floating]) -> Array:
        along: Array = (states.astype(np.float64) - self.center) / self.spread @ self.directions.T
        return along


def fit_familiarity(
    states: NDArray[np.floating], groups: Sequence[str], *, seed: int = 0
) -> Familiarity:
    """Fit to states ``[n, hidden]``, with the rows of a group held out together for the limit."""
    folds = GroupKFold(FOLDS, shuffle=True, random_state=seed)
    numbers = np.unique(groups, return_inverse=True)[1]
    with threadpool_limits(limits=1, user_api="blas"):
        fits = [
            (_fitted(states[kept]), states[held])
            for kept, held in folds.split(states, groups=numbers)
        ]
        rest = float(np.mean(np.concatenate([fit.outside(held) for fit, held in fits])))
        distances = [replace(fit, rest=rest).distances(held) for fit, held in fits]
        fit = replace(_fitted(states), rest=rest)
        own = float(np.quantile(fit.distances(states), OWN))
        return replace(fit, limit=max(float(np.max(np.concatenate(distances))), own))


def _fitted(states: NDArray[np.floating]) -> Familiarity:
    x = states.astype(np.float64)
    center, spread = x.mean(axis=0), x.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    _, values, directions = np.linalg.svd((x - center) / spread, full_matrices=False)
    count = min(DIRECTIONS, len(x) // 4)
    variances = values[:count] ** 2 / len(x)
    return Familiarity(center, spread, directions[:count], variances, rest=1.0, limit=np.inf)
