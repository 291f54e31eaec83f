"""A mean over questions and over draws of something else: training seeds, random controls.

Every draw answers the same questions, so that value = mean + question + draw + rest, all random.
The variance of the mean and its degrees of freedom come from the mean squares (Satterthwaite 1946):
five seeds are five, however many questions each was asked. Questions are not normal as draws may
be: scores lie near the end of their scale, differences are skewed. So at neither end is an interval
narrower, nor a p smaller, than that over questions alone of the draws' means. Knows scores and
arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from persona_lora.report.resampling import (
    CONFIDENCE,
    RESAMPLES,
    SCORES,
    Array,
    Bounds,
    Interval,
    bootstrap_mean,
    sign_flip_p,
    sign_flip_ps,
)
from persona_lora.report.scores import Cluster, question_means

SAME = 1e-9  # values that differ by less are equal but for rounding; of variances this share
FEWEST_DRAWS = 3  # of two with much between them, the interval covers in 87 of 100 cases
Gaps = Mapping[Any, float]  # a difference, by question (or what else is asked)


class Components(NamedTuple):
    """The variances of one value: between questions, between draws, and the rest."""

    question: float
    draw: float
    rest: float


class Crossed(NamedTuple):
    """A mean over both, with its interval; ``p`` is two-sided."""

    interval: Interval
    p: float | None


def shared_questions(draws: Sequence[Gaps]) -> Array:
    """Return the values of the questions that every draw has, ``[draws, questions]``."""
    common = sorted(set.intersection(*(set(each) for each in draws))) if draws else []
    return np.array([[each[question] for question in common] for each in draws], dtype=float)


def components(values: Array) -> Components:
    """Return the variance components of ``[draws, questions]``, none below 0."""
    draws, questions = values.shape
    between, over, rest = (float(each[0]) for each in _mean_squares(values[None]))
    return Components(max(0.0, (over - rest) / draws), max(0.0, (between - rest) / questions), rest)


def crossed_mean(values: Array, scale: Bounds | None = None) -> Crossed:
    """Return the mean of ``[draws, questions]`` with its interval, both taken as drawn.

    Var = (MS_draw + MS_question) / (draws · questions): the rest counts twice, which is never too
    little on the mean. Without an interval for fewer than three draws or two questions, and of
    equal values that are on no known ``scale``.
    """
    draws, questions = values.shape
    mean = float(values.mean()) if values.size else None
    if mean is None or draws < FEWEST_DRAWS or questions < 2:
        reason = f"{draws} draws, {questions} questions: too few for an interval over both"
        return Crossed(Interval(mean, None, None, values.size, questions, 1.0, reason), None)
    p = float(crossed_ps(values[None])[0])
    alone = _over_questions(values.mean(axis=0), scale)
    if np.ptp(values) < SAME:
        return Crossed(replace(alone, n=values.size), p)
    error, degrees = (float(each[0]) for each in _errors(values[None]))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees)) * error
    low, high = mean - reach, mean + reach
    if alone.low is not None and alone.high is not None:
        low, high = min(low, alone.low), max(high, alone.high)
    if scale is not None:
        low, high = max(low, scale.low), min(high, scale.high)
    return Crossed(Interval(mean, low, high, values.size, questions, 1.0), p)


def _over_questions(values: Array, scale: Bounds | None) -> Interval:
    return bootstrap_mean({at: [value] for at, value in enumerate(values.tolist())}, scale=scale)


def mean_gap(draws: Sequence[Gaps], scale: Bounds | None = None) -> Crossed:
    """Return the mean difference, its interval over questions and, of several draws, over both.

    ``scale`` is that of differences, where its ends are often reached. ``coverage`` is the share of
    the draws' values that are of questions which all of them have.
    """
    values = shared_questions(draws)
    if len(draws) > 1:
        found, p = crossed_mean(values, scale)
        return Crossed(replace(found, coverage=values.size / max(1, sum(map(len, draws)))), p)
    several = values.shape[-1] > 1
    return Crossed(_over_questions(values[0], scale), sign_flip_p(values[0]) if several else None)


def mean_over_draws(
    draws: Sequence[Cluster], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Return the mean score, its interval over questions and, of several draws, over both."""
    if len(draws) == 1:
        return bootstrap_mean(draws[0], scale=SCORES, seed=seed, resamples=resamples)
    by_question = [question_means(each) for each in draws]
    found = crossed_mean(shared_questions(by_question), SCORES).interval
    common = set.intersection(*map(set, by_question))
    used = [score for each in draws for question in common for score in each[question]]
    known = sum(score is not None for score in used)
    rows = sum(len(own) for each in draws for own in each.values())
    return replace(found, n=known, coverage=known / rows)


def crossed_ps(values: Array) -> Array:
    """Return the p value of each of ``[experiments, draws, questions]``.

    The larger one of Student's t over both and of the sign flips of questions' means over draws.
    Where nothing varies at all it is that of flipping the signs of draws, not 0.
    """
    means, (errors, degrees) = np.abs(values.mean(axis=(1, 2))), _errors(values)
    constant = np.where(means > SAME, 2.0 ** (1 - values.shape[1]), 1.0)
    varied = np.ptp(values, axis=(1, 2)) >= SAME
    away = np.divide(means, errors, out=np.zeros_like(means), where=varied)
    over_both = np.where(varied, 2 * stats.t.sf(away, degrees), constant)
    return np.maximum(over_both, sign_flip_ps(values.mean(axis=1)))


def _errors(values: Array) -> tuple[Array, Array]:
    """Return the standard errors of means, and their degrees of freedom, ``[experiments]``."""
    _, draws, questions = values.shape
    between, over, rest = _mean_squares(values)
    total, parts = between + over, between**2 / (draws - 1) + over**2 / (questions - 1)
    bare = total <= SAME * rest  # all means are equal: the rest alone says how far values lie apart
    parts = np.where(bare, rest**2 / ((draws - 1) * (questions - 1)), parts)
    total = np.where(bare, rest, total)
    degrees = np.divide(total**2, parts, out=np.ones_like(total), where=parts > 0)
    return np.sqrt(total / (draws * questions)), degrees


def _mean_squares(values: Array) -> tuple[Array, Array, Array]:
    """Return the mean squares between draws, between questions, and of the rest."""
    _, draws, questions = values.shape
    grand = values.mean(axis=(1, 2), keepdims=True)
    by_draw = values.mean(axis=2, keepdims=True) - grand
    by_question = values.mean(axis=1, keepdims=True) - grand
    rest = values - grand - by_draw - by_question
    return (
        questions * np.sum(by_draw**2, axis=(1, 2)) / (draws - 1),
        draws * np.sum(by_question**2, axis=(1, 2)) / (questions - 1),
        np.sum(rest**2, axis=(1, 2)) / ((draws - 1) * (questions - 1)),
    )
