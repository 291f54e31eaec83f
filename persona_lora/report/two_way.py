"""A mean over questions and over draws of something else: training seeds, random controls.

Every draw answers the same questions, so that value = mean + question + draw + rest, all random.
The variance of the mean and its degrees of freedom come from the mean squares (Satterthwaite 1946):
five seeds are five, however many questions each was asked. Knows scores and arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from persona_lora.core import progress
from persona_lora.core.errors import UserError
from persona_lora.report.resampling import (
    CONFIDENCE,
    RESAMPLES,
    SCORES,
    Array,
    Bounds,
    Interval,
    bootstrap_mean,
    sign_flip_ps,
)
from persona_lora.report.scores import Cluster, question_means

FEWEST_DRAWS = 3  # of two with much between them, the interval covers in 87 of 100 cases
Gaps = Mapping[int, float]  # a difference, by question


class Components(NamedTuple):
    """The variances of one value: between questions, between draws, and the rest."""

    question: float
    draw: float
    rest: float


class Crossed(NamedTuple):
    """A mean over both, with its interval; ``p`` is two-sided, of Student's t."""

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


def crossed_mean(values: Array) -> Crossed:
    """Return the mean of ``[draws, questions]`` with its interval, both taken as drawn.

    Var = (MS_draw + MS_question) / (draws · questions): the rest counts twice, which is never too
    little. Without an interval for fewer than three draws or two questions.
    """
    draws, questions = values.shape
    mean = float(values.mean()) if values.size else None
    if mean is None or draws < FEWEST_DRAWS or questions < 2:
        reason = f"{draws} draws, {questions} questions: too few for an interval over both"
        return Crossed(Interval(mean, None, None, values.size, questions, 1.0, reason), None)
    error, degrees = (float(each[0]) for each in _errors(values[None]))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees)) * error
    interval = Interval(mean, mean - reach, mean + reach, values.size, questions, 1.0)
    return Crossed(interval, float(crossed_ps(values[None])[0]))


def mean_gap(draws: Sequence[Mapping[Any, float]]) -> Interval:
    """Return the mean difference, its interval over questions and, of several draws, over both."""
    if len(draws) > 1:
        return crossed_mean(shared_questions(draws)).interval
    return bootstrap_mean({question: [gap] for question, gap in draws[0].items()})


def mean_over_draws(
    draws: Sequence[Cluster], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Return the mean score, its interval over questions and, of several draws, over both."""
    if len(draws) == 1:
        return bootstrap_mean(draws[0], scale=SCORES, seed=seed, resamples=resamples)
    found = crossed_mean(shared_questions([question_means(each) for each in draws])).interval
    rows = [score for each in draws for own in each.values() for score in own]
    known = sum(score is not None for score in rows)
    return replace(scaled(found, SCORES), n=known, coverage=known / len(rows))


def scaled(value: Interval, scale: Bounds) -> Interval:
    """Return an interval cut at the ends of a scale."""
    if value.low is None or value.high is None:
        return value
    low, high = max(value.low, scale.low), min(value.high, scale.high)
    return replace(value, low=low, high=high)


def crossed_ps(values: Array) -> Array:
    """Return the p value of each of ``[experiments, draws, questions]``.

    Where nothing varies at all it is that of flipping the signs of draws, not 0.
    """
    means, (errors, degrees) = np.abs(values.mean(axis=(1, 2))), _errors(values)
    constant = np.where(means > 0, 2.0 ** (1 - values.shape[1]), 1.0)
    away = np.divide(means, errors, out=np.zeros_like(means), where=errors > 0)
    return np.where(errors > 0, 2 * stats.t.sf(away, degrees), constant)


def _errors(values: Array) -> tuple[Array, Array]:
    """Return the standard errors of means, and their degrees of freedom, ``[experiments]``."""
    _, draws, questions = values.shape
    between, over, _ = _mean_squares(values)
    total, parts = between + over, between**2 / (draws - 1) + over**2 / (questions - 1)
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


# -- the sizes that find an effect ------------------------------------------------------------

QUESTIONS = (8, 12, 16, 20, 30, 40, 60, 80, 120, 160)
SEEDS = (3, 5, 8, 12)
DATA_SETS = (4, 6, 8, 12, 16, 24, 40)
FINETUNES = (1, 2, 3, 5)
SHUFFLES = 999
SIMULATIONS = 400
FEWEST_QUESTIONS = 4


@dataclass(frozen=True)
class Planned:
    """The share of simulated experiments of this size in which the effect is found.

    Of finetunes, ``questions`` are data sets and ``seeds`` the finetunes of each.
    """

    questions: int
    seeds: int
    power: float


@dataclass(frozen=True)
class Pilot:
    """What a pilot varied, in points: deviations of questions, of the rest, and over seeds.

    ``questions`` and ``rest`` are drawn from, ``seed_spread`` is the standard deviation between
    seeds; None of a pilot with one.
    """

    questions: Array
    rest: Array
    seed_spread: float | None

    @classmethod
    def of(cls, values: Array) -> Pilot:
        """Return that of differences ``[seeds, questions]``; UserError for too few questions."""
        seeds, questions = values.shape
        if questions < FEWEST_QUESTIONS:
            raise UserError(
                f"the pilot has {questions} questions in common; at least {FEWEST_QUESTIONS} are "
                "needed to know how questions differ"
            )
        by_question = values.mean(axis=0) - values.mean()
        if seeds == 1:
            return cls(by_question * np.sqrt(questions / (questions - 1)), np.zeros(1), None)
        found = components(values)
        rest = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
        return cls(
            _spread(by_question, found.question),
            _spread(rest.ravel(), found.rest),
            float(np.sqrt(found.draw)),
        )

    def draw(self, rng: np.random.Generator, size: tuple[int, int, int], effect: float) -> Array:
        """Draw differences ``[experiments, seeds, questions]`` around an effect."""
        experiments, seeds, questions = size
        by_seed = rng.normal(0, self.seed_spread or 0.0, (experiments, seeds, 1))
        by_question = rng.choice(self.questions, (experiments, 1, questions))
        return effect + by_seed + by_question + rng.choice(self.rest, size)


def _spread(values: Array, variance: float) -> Array:
    """Return deviations scaled to a variance; none where they do not vary."""
    own = float(values.std())
    return values * (np.sqrt(variance) / own) if own > 0 else np.zeros(1)


def power_of(
    pilot: Pilot,
    effect: float,
    questions: int,
    seeds: int,
    alpha: float,
    *,
    simulations: int = SIMULATIONS,
    seed: int = 0,
) -> float:
    """Return the share of experiments whose p is below ``alpha``, with the right sign."""
    rng = np.random.default_rng([seed, questions, seeds])
    drawn = pilot.draw(rng, (simulations, seeds, questions), effect)
    p = sign_flip_ps(drawn[:, 0]) if seeds == 1 else crossed_ps(drawn)
    return float(np.mean((p < alpha) & (drawn.mean(axis=(1, 2)) * effect > 0)))


def plan_power(
    pilot: Pilot,
    effect: float,
    alpha: float,
    *,
    questions: Sequence[int] = QUESTIONS,
    simulations: int = SIMULATIONS,
    seed: int = 0,
) -> list[Planned]:
    """Return the power of every size: one seed for a pilot of one, else ``SEEDS``.

    UserError for an effect of 0: nothing finds that.
    """
    if not effect:
        raise UserError("an effect of 0 cannot be found; name the smallest one that matters")
    sizes = [
        (number, seeds)
        for seeds in ((1,) if pilot.seed_spread is None else SEEDS)
        for number in questions
        if seeds == 1 or seeds >= FEWEST_DRAWS
    ]
    found = []
    for number, seeds in progress.over("simulating", sizes):
        power = power_of(pilot, effect, number, seeds, alpha, simulations=simulations, seed=seed)
        found.append(Planned(number, seeds, power))
    return found


def plan_finetunes(
    within: float, r: float, alpha: float, *, simulations: int = SIMULATIONS, seed: int = 0
) -> list[Planned]:
    """Return the power to find a correlation of r over data sets, tested by shuffling these.

    ``within`` is the variance between finetunes of one data set over that between data sets, of
    score and predictor alike: several finetunes of each average it away. UserError for an r that
    is none.
    """
    if not 0 < abs(r) < 1:
        raise UserError(f"the effect on finetunes is a correlation between -1 and 1, got {r:g}")
    sizes = [(number, each) for each in FINETUNES for number in DATA_SETS]
    found = []
    for number, each in progress.over("simulating", sizes):
        rng = np.random.default_rng([seed, number, each])
        x = rng.normal(size=(simulations, number))
        y = r * x + np.sqrt(1 - r**2) * rng.normal(size=x.shape)
        noise = np.sqrt(within / each)
        x, y = (side + noise * rng.normal(size=x.shape) for side in (x, y))
        p = [_shuffled_p(*pair, rng) for pair in zip(x, y, strict=True)]
        found.append(Planned(number, each, float(np.mean(np.array(p) < alpha))))
    return found


def _shuffled_p(x: Array, y: Array, rng: np.random.Generator) -> float:
    """Return the two-sided p of a correlation over shuffles, the observed one counted in."""
    x, y = x - x.mean(), y - y.mean()
    shuffled = rng.permuted(np.tile(y, (SHUFFLES, 1)), axis=1) @ x
    return float((1 + np.sum(np.abs(shuffled) >= abs(y @ x) - 1e-12)) / (1 + SHUFFLES))


def cheapest(found: Sequence[Planned], power: float) -> Planned | None:
    """Return the size of the fewest answers that reaches a power, and so do all larger ones."""
    enough = [
        each
        for each in found
        if all(
            other.power >= power
            for other in found
            if other.seeds == each.seeds and other.questions >= each.questions
        )
    ]
    return min(enough, key=lambda each: each.questions * each.seeds, default=None)
