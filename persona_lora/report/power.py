"""How many questions and seeds an effect needs, by simulation from what a pilot varied.

A planned experiment is drawn many times: its questions' effects and its rest from the pilot's own,
its seeds' from a normal distribution of the pilot's variance between seeds, and the planned effect
on top; then it is tested as a report tests it: by sign flips for one seed, over seeds and questions
for several. The share of the draws that is found is the power. Of finetunes the effect is a
correlation over data sets, tested by shuffling these. Knows arrays only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2, pearsonr

from persona_lora.core import progress
from persona_lora.core.errors import UserError
from persona_lora.report.resampling import Array, sign_flip_ps
from persona_lora.report.two_way import SAME, components, crossed_ps

QUESTIONS = (8, 12, 16, 20, 30, 40, 60, 80, 120, 160)
SEEDS = (3, 5, 8, 12)  # none under two_way.FEWEST_DRAWS
DATA_SETS = (4, 6, 8, 12, 16, 24, 40)
FINETUNES = (1, 2, 3, 5)
SHUFFLES = 999  # at least, and enough that the smallest p is a tenth of the level
SHUFFLED_SETS = 12  # of more the p of a shuffle is near Student's (Pitman 1937)
SIMULATIONS = 400
_CHUNK = 2_000_000  # numbers held at once by the shuffled correlations
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
    size: tuple[int, int]  # seeds, questions

    @classmethod
    def of(cls, values: Array) -> Pilot:
        """Return that of differences ``[seeds, questions]``; UserError for few or equal ones."""
        seeds, questions = values.shape
        if questions < FEWEST_QUESTIONS:
            raise UserError(
                f"the pilot has {questions} questions in common; at least {FEWEST_QUESTIONS} are "
                "needed to know how questions differ"
            )
        if np.ptp(values) < SAME:
            raise UserError(
                "all differences of the pilot are equal, which does not show how questions vary; "
                "give one whose answers differ"
            )
        by_question = values.mean(axis=0) - values.mean()
        if seeds == 1:
            return cls(
                by_question * np.sqrt(questions / (questions - 1)), np.zeros(1), None, values.shape
            )
        found = components(values)
        rest = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
        return cls(
            _spread(by_question, found.question),
            _spread(rest.ravel(), found.rest),
            float(np.sqrt(found.draw)),
            values.shape,
        )

    def wider(self) -> Pilot:
        """Return the same with its deviations at their upper limits, of 80% confidence.

        A pilot of few tells its own variance badly; planned by the limit, an experiment reaches the
        power asked for in four of five cases (Browne 1995).
        """
        seeds, questions = self.size
        spread = self.seed_spread
        return Pilot(
            self.questions * _upper(questions - 1),
            self.rest * _upper((questions - 1) * (seeds - 1)),
            None if spread is None else spread * _upper(seeds - 1),
            self.size,
        )

    def draw(self, rng: np.random.Generator, size: tuple[int, int, int], effect: float) -> Array:
        """Draw differences ``[experiments, seeds, questions]`` around an effect."""
        experiments, seeds, questions = size
        by_seed = rng.normal(0, self.seed_spread or 0.0, (experiments, seeds, 1))
        by_question = rng.choice(self.questions, (experiments, 1, questions))
        return effect + by_seed + by_question + rng.choice(self.rest, size)


def _upper(freedom: int) -> float:
    """Return the 80% upper limit of a standard deviation over its estimate; 1 without any."""
    return float(np.sqrt(freedom / chi2.ppf(0.2, freedom))) if freedom else 1.0


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
    planned = (1,) if pilot.seed_spread is None else SEEDS
    sizes = [(number, seeds) for seeds in planned for number in questions]
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
    shuffles = max(SHUFFLES, math.ceil(10 / alpha))
    sizes = [(number, each) for each in FINETUNES for number in DATA_SETS]
    found = []
    for number, each in progress.over("simulating", sizes):
        rng = np.random.default_rng([seed, number, each])
        x = rng.normal(size=(simulations, number))
        y = r * x + np.sqrt(1 - r**2) * rng.normal(size=x.shape)
        noise = np.sqrt(within / each)
        x, y = (side + noise * rng.normal(size=x.shape) for side in (x, y))
        drawn = number <= SHUFFLED_SETS
        p = _shuffled_ps(x, y, shuffles, rng) if drawn else pearsonr(x, y, axis=1).pvalue
        found.append(Planned(number, each, float(np.mean(p < alpha))))
    return found


def _shuffled_ps(x: Array, y: Array, shuffles: int, rng: np.random.Generator) -> Array:
    """Return the two-sided p of the correlation of each row ``[experiments, data sets]``.

    It is over shuffles, which all rows share; the observed order is counted in. A shuffle takes one
    of the products xᵢyⱼ for every i, so that those of all rows are one product of matrices.
    """
    experiments, number = x.shape
    x, y = (side - side.mean(axis=1, keepdims=True) for side in (x, y))
    products = (x[:, :, None] * y[:, None, :]).reshape(experiments, -1)
    observed = np.abs((x * y).sum(axis=1)) - 1e-12
    as_far, step = np.zeros(experiments), max(1, _CHUNK // (experiments + number**2))
    for start in range(0, shuffles, step):
        orders = np.tile(np.arange(number), (min(step, shuffles - start), 1))
        taken = np.zeros((number**2, len(orders)))
        places = np.arange(number) * number + rng.permuted(orders, axis=1)
        taken[places, np.arange(len(orders))[:, None]] = 1
        as_far += np.sum(np.abs(products @ taken) >= observed[:, None], axis=1)
    return (as_far + 1) / (shuffles + 1)


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
