"""Resampling by question: intervals, rank correlations, paired tests, AUC. Knows arrays only.

Answers to one question are not independent, so whole questions are drawn with replacement. A
resample is a row of weights (how often each question was drawn), and every statistic is computed
for all resamples at once. Refuses to know what the scores measure.

Two intervals of a mean, for what is known of the scale:

- With both ends of the scale known, a Bayesian bootstrap (Rubin 1981) in which each end counts as
  one more question of weight ``END_WEIGHT``. The bounds of Gaffke (2005; see Learned-Miller and
  Thomas 2019) give the ends weight 1, which never covered too little and is wide; 0.4 was chosen by
  simulation. Twelve answers that all score 100 do not show that every answer would: a resample of
  them alone can only say 100.
- Without, and for differences (whose ends, -100 and 100, are so far away that they would hide every
  effect), at either end the wider one of Student's interval and of the expanded BCa bootstrap
  (Efron 1987, with the quantiles of Hesterberg 2015): BCa whose tails are those of a t
  distribution, widened by √(n/(n−1)). Student's covers too little where values are skewed, BCa
  where their tails are heavy or there are few, both where nearly all are equal and the rest are far
  away. Where all are equal there is none, with the reason ``EQUAL``: ten prompts that no change
  moved do not show that it moves none. Differences of shares, whose ends are often reached, are
  given their scale.

Pearson's r over units, each of several rows, has at either end the wider one of the same two:
Student's, of the jackknife on Fisher's z, and the expanded BCa bootstrap.

``benchmarks/coverage.py`` prints how often each covers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats
from scipy.optimize import brentq
from scipy.stats import norm, rankdata, spearmanr

from persona_lora.core.errors import UserError
from persona_lora.core.protocol import LEVEL

Array = NDArray[np.float64]

CONFIDENCE = LEVEL
RESAMPLES = 5000
_EXACT_QUESTIONS = 13  # up to here, all sign flips are enumerated
_RANDOM_FLIPS = 20_000
_EXACT_ORDERS = 7  # up to so many places every order is tried; above, a sample of orders
_RANDOM_ORDERS = 5000
_DIGITS = 9  # scores that differ by less are rounding noise, and count as ties
END_WEIGHT = 0.4  # of a question, that each end of a known scale counts
EQUAL = "all values are equal, which does not show how far others lie"
ALIKE = "interval not known: the same in 95% of resamples"
_CHUNK = 2_000_000  # numbers held at once by the row-wise rank correlation


@dataclass(frozen=True)
class Interval:
    """A mean score and its 95% interval over questions.

    ``n`` rows were scored, from ``n_questions`` questions; ``coverage`` is the scored share of
    all rows. Where ``mean``, or ``low`` and ``high``, are None, ``reason`` says why.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int
    n_questions: int
    coverage: float
    reason: str | None = None


@dataclass(frozen=True)
class Estimate:
    """Another statistic of ``n`` values from ``n_questions`` questions, with its 95% interval.

    Where ``value``, or ``low`` and ``high``, are None, ``reason`` says why.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    n_questions: int
    reason: str | None = None


class Bounds(NamedTuple):
    """The ends of an interval, or of a scale."""

    low: float
    high: float


SCORES = Bounds(0.0, 100.0)  # the scale of a judge's scores
FITS = Bounds(1.0, 5.0)  # of a persona judge's fits and of people's ratings
SHARES = Bounds(0.0, 1.0)  # of right answers
UNKNOWN_R = Bounds(-1.0, 1.0)


def bootstrap_mean(
    values_by_question: Mapping[Any, Sequence[float | None]],
    *,
    scale: Bounds | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """Return the mean of questions' mean values and its 95% interval over questions.

    None is an unscored value: left out of the mean, counted in ``coverage``. Every question counts
    once, however many of its values are scored, as in differences and their tests. ``scale`` holds
    the smallest and the largest value there can be, where both are known: it chooses the interval,
    as the module says. Raises ValueError for a value outside it.
    """
    rows = sum(len(values) for values in values_by_question.values())
    scored = [
        [value for value in values if value is not None] for values in values_by_question.values()
    ]
    scored = [values for values in scored if values]
    n, questions = sum(map(len, scored)), len(scored)
    coverage = n / rows if rows else 0.0
    if n == 0:
        return Interval(None, None, None, 0, 0, coverage, "no scored answer")
    means = np.array([math.fsum(values) / len(values) for values in scored])
    mean = float(means.mean())
    if questions == 1:
        reason = "one question: no interval over questions"
        return Interval(mean, None, None, n, 1, coverage, reason)
    if scale is None and np.ptp(means) < 10**-_DIGITS:
        return Interval(mean, None, None, n, questions, coverage, EQUAL)
    if scale is None:
        both = (
            t_bounds(means),
            bca_mean_bounds(means[None], np.ones_like(means)[None], seed=seed, resamples=resamples),
        )
        bounds = Bounds(min(each.low for each in both), max(each.high for each in both))
    else:
        outside = [value for values in scored for value in values if not _within(value, scale)]
        if outside:
            raise ValueError(f"{outside[0]} lies outside the scale {scale.low} to {scale.high}")
        bounds = scaled_bounds(means, scale, seed=seed, resamples=resamples)
    return Interval(mean, bounds.low, bounds.high, n, questions, coverage)


def _within(value: float, scale: Bounds) -> bool:
    noise = 10**-_DIGITS
    return scale.low - noise <= value <= scale.high + noise


def t_bounds(values: Array) -> Bounds:
    """Return Student's 95% interval of a mean of values, one of each question."""
    mean, questions = float(values.mean()), len(values)
    error = float(values.std(ddof=1)) / math.sqrt(questions)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, questions - 1)) * error
    return Bounds(mean - reach, mean + reach)


def bca_mean_bounds(
    sums: Array, counts: Array, *, seed: int = 0, resamples: int = RESAMPLES
) -> Bounds:
    """Return ``bca_bounds`` of a mean; ``sums`` and ``counts`` are ``[1, questions]``."""
    questions = sums.shape[1]
    weights = question_weights(questions, resamples=resamples, seed=seed)
    resampled = weighted_means(sums, counts, weights)[:, 0]
    jackknife = np.ones((questions, questions)) - np.eye(questions)  # row i: without question i
    left_out = weighted_means(sums, counts, jackknife)[:, 0]
    return bca_bounds(float(sums.sum() / counts.sum()), resampled, left_out)


def scaled_bounds(
    values: Array, scale: Bounds, *, seed: int = 0, resamples: int = RESAMPLES
) -> Bounds:
    """Return the 95% interval of a mean on a scale with known ends, of a value of each question.

    The lower bound is the tail of the Bayesian bootstrap with one more question, of weight
    ``END_WEIGHT``, that scored the lowest value; the upper bound that with the highest.
    """
    weights, extra = _dirichlet_weights(len(values), resamples, seed)
    drawn = weights.sum(axis=1) + extra
    tail = (1 - CONFIDENCE) / 2
    low = np.quantile((weights @ values + extra * scale.low) / drawn, tail)
    high = np.quantile((weights @ values + extra * scale.high) / drawn, 1 - tail)
    return Bounds(max(scale.low, float(low)), min(scale.high, float(high)))


@lru_cache(maxsize=4)
def _dirichlet_weights(questions: int, resamples: int, seed: int) -> tuple[Array, Array]:
    """Return gamma weights ``[resamples, questions]`` and those of an end of the scale; read-only.

    Divided by their sum they are Dirichlet: one for each question, ``END_WEIGHT`` for the end.
    """
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=(resamples, questions))
    extra = rng.gamma(END_WEIGHT, size=resamples)
    weights.flags.writeable = extra.flags.writeable = False
    return weights, extra


@lru_cache(maxsize=4)
def question_weights(questions: int, *, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """Return how often each question is drawn in each resample: ``[resamples, questions]``.

    Read-only, because the last few draws are kept: a grid asks for the same ones in every cell.
    """
    rng = np.random.default_rng(seed)
    shares = np.full(questions, 1 / questions)
    weights = rng.multinomial(questions, shares, size=resamples).astype(np.float64)
    weights.flags.writeable = False
    return weights


def weighted_means(sums: Array, counts: Array, weights: Array) -> Array:
    """Return the mean score of every condition in every resample, ``[resamples, conditions]``.

    ``sums`` and ``counts`` of the scored rows are ``[conditions, questions]``. A resample that
    draws no scored row of a condition gives NaN there.
    """
    drawn = weights @ counts.T
    means = np.full(drawn.shape, np.nan)
    return np.divide(weights @ sums.T, drawn, out=means, where=drawn > 0)


def percentile_bounds(resampled: Array) -> Bounds:
    """Return the central 95% of a resampled statistic."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Bounds(float(low), float(high))


def bca_bounds(value: float, resampled: Array, left_out: Array) -> Bounds:
    """Return the expanded 95% BCa interval of a statistic, from resampled and jackknife values.

    ``left_out`` is ``[questions]``, so that it also says from how many the resamples were drawn.
    """
    noise = 10**-_DIGITS
    if np.ptp(resampled) < noise:
        return Bounds(value, value)
    # Coarse scores give many resamples equal to the estimate: half of them count as below it.
    below = np.mean(resampled < value - noise) + np.mean(np.abs(resampled - value) <= noise) / 2
    edge = 0.5 / len(resampled)
    bias = special.ndtri(np.clip(below, edge, 1 - edge))
    distance = left_out.mean() - left_out
    spread = float(np.sum(distance**2))
    skew = float(np.sum(distance**3)) / (6 * spread**1.5) if spread > 0 else 0.0
    questions = len(left_out)
    tail = math.sqrt(questions / (questions - 1)) * stats.t.ppf((1 - CONFIDENCE) / 2, questions - 1)
    shifted = bias + np.array([tail, -tail])
    low, high = np.quantile(resampled, special.ndtr(bias + shifted / (1 - skew * shifted)))
    return Bounds(float(low), float(high))


def correlation_bounds(r: float, resampled: Array, left_out: Array) -> Bounds:
    """Return the 95% interval of Pearson's r over units, from resampled and jackknife values.

    At either end the wider one of ``bca_bounds`` and of z ± t · se on Fisher's scale
    z = artanh r, with se² = (n − 1)/n Σ (zᵢ − z̄)² over the zᵢ of ``left_out``, n values each
    without one unit, and Student's t of n − 1. From −1 to 1 where there are no resamples, or where
    without one of the units there is no r: it rests on that one.
    """
    known = resampled[np.isfinite(resampled)]
    if not len(known) or not np.isfinite([r, *left_out]).all():
        return UNKNOWN_R
    edge = 1 - 10**-_DIGITS  # beyond any that is told apart from 1
    z, z_left = (np.arctanh(np.clip(each, -edge, edge)) for each in (r, left_out))
    n = len(left_out)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * math.sqrt((n - 1) * z_left.var())
    low, high = bca_bounds(r, known, left_out)
    return Bounds(min(low, r, math.tanh(z - reach)), max(high, r, math.tanh(z + reach)))


def correlation_gap_bounds(
    r: tuple[float, float], bounds: tuple[Bounds, Bounds], left_out: tuple[Array, Array]
) -> Bounds:
    """Return the 95% interval of r₁ − r₂ over the same units, from those of both (Zou 2007).

    Below it reaches √(a² + b² − 2cab), with a from r₁ to its lower and b from r₂ to its upper
    bound, above likewise; c is the correlation of both jackknifes, 0 where one does not vary. From
    −2 to 2 where nothing is known of one of them, and over two units, whose c says nothing.
    """
    if UNKNOWN_R in bounds or len(left_out[0]) < 3:
        return Bounds(-2.0, 2.0)
    varies = min(map(np.ptp, left_out)) > 10**-_DIGITS
    c = float(np.corrcoef(*left_out)[0, 1]) if varies else 0.0

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a + b * b - 2 * c * a * b))

    below = reach(r[0] - bounds[0].low, bounds[1].high - r[1])
    above = reach(bounds[0].high - r[0], r[1] - bounds[1].low)
    return Bounds(max(-2.0, r[0] - r[1] - below), min(2.0, r[0] - r[1] + above))


def resampled_estimate(
    statistic: Callable[[Array], Array],
    sums: Array,
    counts: Array,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Estimate a statistic of the condition means, with its 95% interval over questions.

    ``statistic`` maps means ``[resamples, conditions]`` to ``[resamples]``, NaN where it is
    undefined. All conditions share the drawn questions, so the pairing by question is kept. The
    interval is the percentile one: rank correlations sit on their bound, where BCa breaks down.
    Where that has no width there is none, with the reason ``ALIKE``: of three conditions ρ takes
    few values, and resamples that all give one do not show that others would.
    """
    conditions, questions = sums.shape
    value = float(statistic(weighted_means(sums, counts, np.ones((1, questions))))[0])
    if not math.isfinite(value):
        return Estimate(None, None, None, conditions, questions, "the means do not vary")
    if questions == 1:
        reason = "one question: no interval over questions"
        return Estimate(value, None, None, conditions, 1, reason)
    weights = question_weights(questions, resamples=resamples, seed=seed)
    return _bounded(value, statistic(weighted_means(sums, counts, weights)), conditions, questions)


def rank_correlation(x: Array, means: Array) -> Array:
    """Return Spearman's rho between ``x [conditions]`` and each row of means; NaN if constant."""
    ranks_x = stats.rankdata(x)
    ranks = stats.rankdata(np.round(means, _DIGITS), axis=1)
    return weighted_correlation(ranks_x[None, :], ranks, np.ones_like(ranks))


def row_rank_correlation(
    x: Array,
    scores: Array,
    question: NDArray[np.intp],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Estimate Spearman's rho over rows, with its 95% percentile interval over questions.

    ``x``, ``scores`` and ``question`` (an index) are ``[rows]``; a question drawn twice counts all
    its rows twice, with ties at their mean rank.
    """
    questions = int(question.max()) + 1 if len(question) else 0
    if len(np.unique(x)) < 2 or len(np.unique(scores)) < 2:
        return Estimate(None, None, None, len(x), questions, "the rows do not vary")
    value = float(_weighted_spearman(x, scores, np.ones((1, len(x))))[0])
    if questions == 1:
        return Estimate(value, None, None, len(x), 1, "one question: no interval over questions")
    weights = question_weights(questions, resamples=resamples, seed=seed)
    step = max(1, _CHUNK // len(x))
    parts = [
        _weighted_spearman(x, scores, weights[start : start + step][:, question])
        for start in range(0, resamples, step)
    ]
    return _bounded(value, np.concatenate(parts), len(x), questions)


def sign_flip_p(differences: Array, *, seed: int = 0) -> float:
    """Return the two-sided p value of a paired permutation test on question differences.

    Under the null the sign of each difference is arbitrary. All flips are enumerated for few
    questions; otherwise random ones are drawn, and the observed one counted among them (Phipson
    and Smyth 2010). Ties and zeros need no correction, unlike in the signed-rank test.
    """
    return float(sign_flip_ps(differences[None, :], seed=seed)[0])


def sign_flip_ps(differences: Array, *, seed: int = 0) -> Array:
    """Return the p value of ``sign_flip_p`` for each row of ``[experiments, questions]``."""
    observed = np.abs(differences.sum(axis=1)) - 10**-_DIGITS
    questions = differences.shape[1]
    flips = _sign_flips(questions, seed)
    step = max(1, _CHUNK // len(flips))
    chunks = [slice(at, at + step) for at in range(0, len(differences), step)]
    as_far = np.concatenate(
        [np.sum(np.abs(flips @ differences[at].T) >= observed[at], axis=0) for at in chunks]
    )
    if questions <= _EXACT_QUESTIONS:
        return as_far / len(flips)
    return (as_far + 1) / (_RANDOM_FLIPS + 1)


@lru_cache(maxsize=2)
def _sign_flips(questions: int, seed: int) -> Array:
    """Return all signs of few questions, or random ones: ``[flips, questions]``, read-only."""
    if questions <= _EXACT_QUESTIONS:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=questions)))
    else:
        rng = np.random.default_rng(seed)
        signs = rng.choice((-1.0, 1.0), size=(_RANDOM_FLIPS, questions))
    signs.flags.writeable = False
    return signs


def share_of_orders(statistic: Callable[[NDArray[np.intp]], Array], size: int) -> float:
    """Return the share of orders whose statistic is at least that of the true one: its p value.

    ``statistic`` maps orders ``[N, size]`` to ``[N]``. All orders of few are tried, of which the
    true one is one; of more a sample of a fixed seed, and it is counted among them.
    """
    if exact := size <= _EXACT_ORDERS:
        orders = np.array(list(itertools.permutations(range(size))))
    else:
        rng = np.random.default_rng(0)
        orders = np.array([rng.permutation(size) for _ in range(_RANDOM_ORDERS)])
    least = statistic(np.arange(size)[None])[0] - 10**-_DIGITS
    hits, own = int(np.sum(statistic(orders) >= least)), int(not exact)
    return (hits + own) / (len(orders) + own)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p values adjusted by Holm's step-down method; None (no test) stays None."""
    tested = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - rank)))
        adjusted[index] = largest
    return adjusted


def _bounded(value: float, resampled: Array, n: int, questions: int) -> Estimate:
    defined = resampled[np.isfinite(resampled)]
    if 2 * len(defined) < len(resampled):
        reason = "undefined in most resamples: no interval"
        return Estimate(value, None, None, n, questions, reason)
    bounds = percentile_bounds(defined)
    if bounds.high - bounds.low < 10**-_DIGITS:
        return Estimate(value, None, None, n, questions, ALIKE)
    return Estimate(value, bounds.low, bounds.high, n, questions)


def _weighted_spearman(x: Array, y: Array, weights: Array) -> Array:
    """Return Spearman's rho of rows repeated ``weights [resamples, rows]`` times."""
    return weighted_correlation(_weighted_ranks(x, weights), _weighted_ranks(y, weights), weights)


def _weighted_ranks(values: Array, weights: Array) -> Array:
    """Return the mean rank of every row among the rows repeated ``weights`` times."""
    unique, inverse = np.unique(np.round(values, _DIGITS), return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    starts = np.searchsorted(inverse[order], np.arange(len(unique)))
    totals = np.add.reduceat(weights[:, order], starts, axis=1)
    ranks = np.cumsum(totals, axis=1) - totals / 2
    return np.asarray(ranks[:, inverse])


def weighted_correlation(x: Array, y: Array, weights: Array) -> Array:
    """Return the weighted Pearson correlation of each row; NaN where one side is constant."""
    total = weights.sum(axis=1, keepdims=True)
    x = x - (weights * x).sum(axis=1, keepdims=True) / total
    y = y - (weights * y).sum(axis=1, keepdims=True) / total
    shared = (weights * x * y).sum(axis=1)
    scale = np.sqrt((weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1))
    out = np.full(shared.shape, np.nan)
    return np.clip(np.divide(shared, scale, out=out, where=scale > 10**-_DIGITS), -1.0, 1.0)


# -- two groups of answers --------------------------------------------------------------------

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


def separation(
    values: Sequence[float], labels: Sequence[int], questions: Sequence[str] | None = None
) -> Separation:
    """Compare values of answers labelled 75 and more with those labelled 25 and less.

    ``questions`` are what each of them answers: answers to one question are alike.
    """
    x, y = np.asarray(values, dtype=float), np.asarray(labels)
    asked = np.arange(len(x)) if questions is None else np.asarray(questions)
    sides = y >= POSITIVE, y <= NEGATIVE
    above, below = (x[side] for side in sides)
    if len(above) < 2 or len(below) < 2:
        raise UserError(
            f"{len(above)} answers are labelled {POSITIVE} or more and {len(below)} {NEGATIVE} or "
            "less; at least two of each are needed"
        )
    auc = auc_of(above, below)
    bounds = auc_bounds(auc, *(len(np.unique(asked[side])) for side in sides))
    varies = len(set(x.tolist())) > 1 and len(set(y.tolist())) > 1
    rho = float(spearmanr(x, y).statistic) if varies else None
    return Separation(auc, *bounds, rho, len(above), len(below), len(x))


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
