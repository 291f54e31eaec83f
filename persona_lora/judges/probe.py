"""A linear probe: ratings of 0–100 from hidden states, by ridge regression.

ŷ = b + w·z with z the states of one layer (or of all, side by side), standardised over the rows it
was fitted to, and w with an L2 penalty. Which layers and which penalty is decided by
cross-validation in which all answers to one question are held out together: a probe that knows
questions must not look good by it. Refuses to know what the states are of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
    """ŷ = b + Σ w·(h − center), over the layers at the places ``at`` among those of the states.

    ``center`` and ``weights``: ``[len(at), hidden]``, the standardisation folded into the weights.
    ``error`` is the root mean square error over held-out questions.
    """

    at: tuple[int, ...]
    center: Vector
    weights: Vector
    bias: float
    penalty: float
    error: float

    def predict(self, states: NDArray[np.floating]) -> Vector:
        """Return ŷ, cut to 0–100, for states ``[n, layers, hidden]``: ``[n]``."""
        chosen = states[:, list(self.at)].astype(np.float64) - self.center
        values: Vector = self.bias + np.einsum("nlh,lh->n", chosen, self.weights)
        return np.clip(values, 0.0, 100.0)


class Fitted(NamedTuple):
    """A probe, and what probes fitted without a row's question say of it: ``[n]``, 0–100."""

    probe: Probe
    held_out: Vector


def fit_probe(
    states: NDArray[np.floating], targets: Vector, groups: Sequence[str], *, seed: int = 0
) -> Fitted:
    """Fit to states ``[n, layers, hidden]`` and targets of 0–100 by groups (the questions).

    Raises UserError for fewer than 20 rows or 5 questions, and for targets that are all the same.
    """
    if len(targets) < FEWEST_ROWS or len(set(groups)) < FEWEST_QUESTIONS:
        raise UserError(
            f"{len(targets)} rated answers to {len(set(groups))} questions are too few to fit a "
            f"judge; it needs {FEWEST_ROWS} to {FEWEST_QUESTIONS} questions, a hundred to be good"
        )
    if np.ptp(targets) == 0:
        raise UserError(f"all answers are rated {targets[0]:g}; a judge needs some that differ")
    found: dict[tuple[tuple[int, ...], float], Vector] = {}
    with threadpool_limits(limits=1, user_api="blas"):
        for at in _layer_sets(states.shape[1]):
            held_out = _held_out(_flat(states, at), targets, groups, seed)
            found |= {(at, penalty): held_out[i] for i, penalty in enumerate(PENALTIES)}
        (at, penalty), guess = min(found.items(), key=lambda each: _error(each[1], targets))
        center, weights = _ridge(_flat(states, at), targets, (penalty,))
    shape = (len(at), states.shape[2])
    bias, error = float(targets.mean()), _error(guess, targets)
    probe = Probe(at, center.reshape(shape), weights.reshape(shape), bias, penalty, error)
    return Fitted(probe, guess)


def _layer_sets(count: int) -> Iterator[tuple[int, ...]]:
    yield from ((each,) for each in range(count))
    if count > 1:
        yield tuple(range(count))


def _flat(states: NDArray[np.floating], at: tuple[int, ...]) -> Vector:
    return states[:, list(at)].reshape(len(states), -1).astype(np.float64)


def _held_out(x: Vector, targets: Vector, groups: Sequence[str], seed: int) -> Vector:
    """Return what fits without a row's group say of it, by penalty: ``[len(PENALTIES), n]``."""
    guess = np.empty((len(PENALTIES), len(x)))
    folds = GroupKFold(FOLDS, shuffle=True, random_state=seed)
    for kept, held in folds.split(x, targets, np.unique(groups, return_inverse=True)[1]):
        center, weights = _ridge(x[kept], targets[kept], PENALTIES)
        guess[:, held] = targets[kept].mean() + weights @ (x[held] - center).T
    return np.clip(guess, 0.0, 100.0)


def _ridge(x: Vector, targets: Vector, penalties: Sequence[float]) -> tuple[Vector, Vector]:
    """Return the mean of x, and ridge regression's weights by penalty: ``[penalties, width]``.

    With z standardised, w = zᵀ(zzᵀ + λI)⁻¹(y − ȳ) with λ the penalty times the width: one
    eigendecomposition of ``[n, n]`` serves all penalties. The intercept is ȳ.
    """
    center, spread = x.mean(axis=0), x.std(axis=0)
    z = (x - center) / np.where(spread > 0, spread, 1.0)
    values, vectors = np.linalg.eigh(z @ z.T)
    damped = (
        vectors.T
        @ (targets - targets.mean())
        / (values + np.array(penalties)[:, None] * x.shape[1])
    )
    return center, damped @ vectors.T @ z / np.where(spread > 0, spread, 1.0)


def _error(guess: Vector, targets: Vector) -> float:
    return float(np.sqrt(np.mean((guess - targets) ** 2)))
