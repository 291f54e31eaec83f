"""A linear probe: ratings of 0–100 from hidden states, by ridge regression.

ŷ is the mean over layers of b + w·z, with z the states of a layer, standardised over the rows it
was fitted to, and w with an L2 penalty. The penalty is decided for each layer by cross-validation
in which all answers to one question are held out together: a probe that knows questions must not
look good by it. Refuses to know what the states are of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from persona_lora.core.errors import UserError

FOLDS = 5
PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # for each feature: wide or narrow alike
FEWEST_ROWS, FEWEST_QUESTIONS = 20, FOLDS

Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Probe:
    """ŷ = b + Σ w·(h − center) over the layers.

    ``center`` and ``weights``: ``[layers, hidden]``, the standardisation and the mean over layers
    folded into the weights. ``penalties`` are those chosen by layer; ``error`` is the root mean
    square error over held-out questions.
    """

    center: Vector
    weights: Vector
    bias: float
    penalties: tuple[float, ...]
    error: float

    def predict(self, states: NDArray[np.floating]) -> Vector:
        """Return ŷ, cut to 0–100, for states ``[n, layers, hidden]``: ``[n]``."""
        moved = states.astype(np.float64) - self.center
        return np.clip(self.bias + np.einsum("nlh,lh->n", moved, self.weights), 0.0, 100.0)


class Fitted(NamedTuple):
    """A probe, and what probes fitted without a row's question say of it: ``[n]``, 0–100."""

    probe: Probe
    held_out: Vector


def fit_probe(
    states: NDArray[np.floating],
    targets: Vector,
    groups: Sequence[str],
    *,
    counts: Vector | None = None,
) -> Fitted:
    """Fit to states ``[n, layers, hidden]`` and targets of 0–100 by groups (the questions).

    ``counts``, ``[n]``: how much a row counts beside the others, in the fit and in the choice of
    the penalty; all alike by default. Raises UserError for fewer than 20 rows or 5 questions, and
    for targets that are all the same.
    """
    check_enough(groups)
    counts = np.ones(len(targets)) if counts is None else counts
    if np.ptp(targets) == 0:
        raise UserError(f"all answers are rated {targets[0]:g}; a judge needs some that differ")
    layers, guesses, penalties = [], [], []
    with threadpool_limits(limits=1, user_api="blas"):
        for at in range(states.shape[1]):
            x = states[:, at].astype(np.float64)
            held_out = _held_out(x, targets, counts, groups)
            best = int(np.argmin([_error(each, targets, counts) for each in held_out]))
            layers.append(_ridge(x, targets, counts, (PENALTIES[best],)))
            guesses.append(held_out[best])
            penalties.append(PENALTIES[best])
    guess = np.clip(np.mean(guesses, axis=0), 0.0, 100.0)
    center = np.stack([each for each, _ in layers])
    weights = np.concatenate([each for _, each in layers]) / len(layers)
    bias = float(np.average(targets, weights=counts))
    error = _error(guess, targets, counts)
    return Fitted(Probe(center, weights, bias, tuple(penalties), error), guess)


def check_enough(groups: Sequence[str]) -> None:
    """Raise UserError for fewer rows or questions than a probe can be fitted to."""
    if len(groups) < FEWEST_ROWS or len(set(groups)) < FEWEST_QUESTIONS:
        raise UserError(
            f"{len(groups)} rated answers to {len(set(groups))} questions are too few to fit a "
            f"judge; it needs {FEWEST_ROWS} to {FEWEST_QUESTIONS} questions, a hundred to be good"
        )


def _held_out(x: Vector, targets: Vector, counts: Vector, groups: Sequence[str]) -> Vector:
    """Return what fits without a row's group say of it, by penalty: ``[len(PENALTIES), n]``."""
    guess = np.empty((len(PENALTIES), len(x)))
    for kept, held in _folds(x, groups):
        center, weights = _ridge(x[kept], targets[kept], counts[kept], PENALTIES)
        mean = np.average(targets[kept], weights=counts[kept])
        guess[:, held] = mean + weights @ (x[held] - center).T
    return guess


def _folds(rows: Any, groups: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    """Yield the rows to fit to and those held out, by place; a group is held out together."""
    numbers = np.unique(groups, return_inverse=True)[1]
    yield from GroupKFold(FOLDS, shuffle=True, random_state=0).split(rows, groups=numbers)


def _ridge(
    x: Vector, targets: Vector, counts: Vector, penalties: Sequence[float]
) -> tuple[Vector, Vector]:
    """Return the mean of x, and ridge regression's weights by penalty: ``[penalties, width]``.

    With z standardised and c the rows' counts, w = zᵀ√c(√c zzᵀ √c + λI)⁻¹√c(y − ȳ) with λ the
    penalty times the width: one eigendecomposition of ``[n, n]`` serves all penalties. Means are
    weighted by the counts; the intercept is ȳ.
    """
    center = np.average(x, axis=0, weights=counts)
    spread = np.sqrt(np.average((x - center) ** 2, axis=0, weights=counts))
    roots = np.sqrt(counts)
    z = roots[:, None] * (x - center) / np.where(spread > 0, spread, 1.0)
    moved = roots * (targets - np.average(targets, weights=counts))
    values, vectors = np.linalg.eigh(z @ z.T)
    damped = vectors.T @ moved / (values + np.array(penalties)[:, None] * x.shape[1])
    return center, damped @ vectors.T @ z / np.where(spread > 0, spread, 1.0)


def _error(guess: Vector, targets: Vector, counts: Vector) -> float:
    return float(np.sqrt(np.average((guess - targets) ** 2, weights=counts)))


# -- familiarity ------------------------------------------------------------------------------

DIRECTIONS = 16
OWN = 0.95  # of the fitted rows are familiar


@dataclass(frozen=True, eq=False)
class Familiarity:
    """Is an answer like those that a probe was fitted to? Where not, its number would mean nothing.

    The distance of states h from the fitted rows, by probabilistic principal components: with z the
    standardised states, uᵢ the leading directions of the rows and λᵢ the variance along them,

        d² = Σᵢ (uᵢ·z)² / λᵢ + ‖z − Σᵢ (uᵢ·z) uᵢ‖² / σ²,

    σ² the mean square of a held-out row's rest. The limit is the largest distance of a row while
    its question was held out, or that which one in twenty of the fitted rows exceeds, if that is
    larger: where there are more features than rows, the directions tell the fitted questions from
    all others, and answers to just those lie farthest. ``center`` and ``spread`` are ``[hidden]``,
    ``directions`` ``[k, hidden]``.
    """

    center: Vector
    spread: Vector
    directions: Vector
    variances: Vector
    rest: float
    limit: float

    def distances(self, states: NDArray[np.floating]) -> Vector:
        """Return d of states ``[n, hidden]``: ``[n]``."""
        inside = (self._along(states) ** 2 / self.variances).sum(axis=1)
        return np.sqrt(inside + self.outside(states) / self.rest)

    def outside(self, states: NDArray[np.floating]) -> Vector:
        """Return the square of what no direction holds: ``[n]``."""
        z = (states.astype(np.float64) - self.center) / self.spread
        return np.maximum((z**2).sum(axis=1) - (self._along(states) ** 2).sum(axis=1), 0.0)

    def _along(self, states: NDArray[np.floating]) -> Vector:
        return (states.astype(np.float64) - self.center) / self.spread @ self.directions.T


def fit_familiarity(states: NDArray[np.floating], groups: Sequence[str]) -> Familiarity:
    """Fit to states ``[n, hidden]``, with the rows of a group held out together for the limit."""
    with threadpool_limits(limits=1, user_api="blas"):
        fits = [(_fitted(states[kept]), states[held]) for kept, held in _folds(states, groups)]
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
