"""How far is a choice of the best cell to be trusted? The choice again, in every resample.

Knows cells and questions as arrays; refuses to know what was steered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from persona_lora.core.chat import COHERENCE
from persona_lora.report.curve import TraitCurve
from persona_lora.report.resampling import Array, question_weights, weighted_means
from persona_lora.report.scores import (
    UNSTEERED_CONDITION,
    Cluster,
    Condition,
    ScoredAnswer,
    clusters,
    question_means,
)


@dataclass(frozen=True)
class Selection:
    """The rule for the best layer, repeated in bootstrap resamples of the questions.

    ``layer_shares`` says how often each layer won. ``left_out_gain`` is the mean gain of the
    winner on the questions that its resample did not draw: an estimate without the bias of
    choosing and reporting on the same questions, though of choices from fewer questions.
    """

    layer_shares: dict[int, float]
    left_out_gain: float | None


def resample_selection(
    curve: TraitCurve,
    groups: Mapping[Condition, Sequence[ScoredAnswer]],
    *,
    threshold: float,
) -> Selection | None:
    """Repeat the choice in resamples; None where one question, or no unsteered row, is there."""
    zero = question_means(curve.scores.get(UNSTEERED_CONDITION, {}))
    cells = sorted(
        (each for each in curve.scores if each.coefficient),
        key=lambda each: (each.layer or 0, abs(each.coefficient or 0.0)),
    )
    if len(zero) < 2 or not cells:
        return None
    questions = sorted(zero)
    gains = [_gains(curve.scores[each], zero, each) for each in cells]
    coherence = [question_means(clusters(groups[each], COHERENCE)) for each in cells]
    weights = question_weights(len(questions), resamples=curve.resamples, seed=curve.seed)
    resampled = _means(gains, questions, weights)
    coherent = _means(coherence, questions, weights) >= threshold  # NaN is not coherent
    eligible = np.where(coherent & np.isfinite(resampled), resampled, -np.inf)
    chose = np.isfinite(eligible).any(axis=1)
    # The first of equal cells wins: the lower layer, as the cells are sorted.
    winners = eligible.argmax(axis=1)[chose]
    if not len(winners):
        return None
    left_out = _means(gains, questions, (weights == 0).astype(np.float64))[chose]
    held = left_out[np.arange(len(winners)), winners]
    layers = np.array([each.layer for each in cells])[winners]
    found, counts = np.unique(layers, return_counts=True)
    return Selection(
        {int(at): float(count / len(winners)) for at, count in zip(found, counts, strict=True)},
        float(np.nanmean(held)) if np.isfinite(held).any() else None,
    )


def _gains(scores: Cluster, zero: Mapping[int, float], cell: Condition) -> dict[int, float]:
    """Return sign(c) · (steered − unsteered) of every question scored under both."""
    sign = 1.0 if (cell.coefficient or 0.0) > 0 else -1.0
    steered = question_means(scores)
    return {
        question: sign * (steered[question] - zero[question])
        for question in steered.keys() & zero.keys()
    }


def _means(
    values: Sequence[Mapping[int, float]], questions: Sequence[int], weights: Array
) -> Array:
    """Return the weighted mean of every cell over its questions: ``[resamples, cells]``."""
    sums = np.array([[each.get(question, 0.0) for question in questions] for each in values])
    counts = np.array([[float(question in each) for question in questions] for each in values])
    return weighted_means(sums, counts, weights)
