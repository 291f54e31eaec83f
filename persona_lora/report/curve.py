"""How the trait score follows the coefficient: rank correlation, linear fit, paired differences.

Every statistic is over the same questions in all conditions and is resampled by question.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from persona_lora.report.resampling import (
    SCORES,
    Array,
    Estimate,
    Interval,
    bootstrap_mean,
    holm,
    rank_correlation,
    resampled_estimate,
    row_rank_correlation,
    sign_flip_p,
)
from persona_lora.report.scores import (
    NEUTRAL,
    PROMPTS,
    UNSTEERED_CONDITION,
    Cluster,
    Condition,
    ScoredAnswer,
    clusters,
    minus,
    question_means,
)

Found = TypeVar("Found", bound=Any)


def corrected(found: Sequence[Found]) -> list[Found]:
    """Return what was tested with ``p_holm``: its ``p`` by Holm's method, over all of it."""
    adjusted = holm([each.p for each in found])
    return [dataclasses.replace(each, p_holm=p) for each, p in zip(found, adjusted, strict=True)]


@dataclass(frozen=True)
class PairedDifference:
    """The trait score under one condition minus that under another, on the same questions.

    ``interval.mean`` is the mean over questions of the difference of question means; ``p`` is a
    two-sided sign-flip permutation test on those, ``p_holm`` corrected over all coefficients.
    """

    interval: Interval
    p: float | None
    p_holm: float | None = None


@dataclass(frozen=True)
class CoherentRange:
    """The longest run of neighbouring coefficients around 0 with mean coherence ≥ threshold."""

    low: float | None
    high: float | None
    coefficients: tuple[float, ...]
    threshold: float
    reason: str | None = None


@dataclass(frozen=True)
class LinearFit:
    """How the condition means follow the coefficient linearly over the coherent range.

    Each question that is scored at two coefficients or more has a slope of its own, whose mean
    ``slope`` is, and ``p`` a two-sided sign-flip test on them. ``intercept`` is that of a line of
    this slope through the middle of the means, ``r_squared`` the squared correlation of these with
    the coefficients.
    """

    slope: Estimate
    p: float | None = None
    intercept: float | None = None
    r_squared: float | None = None


@dataclass(frozen=True)
class PromptComparison:
    """An end of the coherent range minus the prompting reference of the same sign."""

    prompt: str
    coefficient: float
    difference: PairedDifference


@dataclass(frozen=True)
class TraitCurve:
    """Trait scores of every condition by question, and how they are resampled."""

    scores: dict[Condition, Cluster]
    seed: int
    resamples: int

    @classmethod
    def of(
        cls, groups: dict[Condition, list[ScoredAnswer]], *, seed: int, resamples: int
    ) -> TraitCurve:
        scores = {condition: clusters(rows, "trait") for condition, rows in groups.items()}
        return cls(scores, seed, resamples)

    def mean_of(self, scores: Cluster) -> Interval:
        return bootstrap_mean(scores, scale=SCORES, seed=self.seed, resamples=self.resamples)

    def steered(self) -> list[Condition]:
        """Return the conditions with a coefficient and at least one scored answer."""
        return [
            condition
            for condition, cluster in self.scores.items()
            if condition.coefficient is not None and question_means(cluster)
        ]

    def at(self, coefficient: float) -> Condition | None:
        matching = (each for each in self.scores if each.coefficient == coefficient)
        return next(matching, None)

    def scores_at(self, coefficient: float) -> Cluster:
        """Return the scores at a coefficient by question; none where it was not run."""
        condition = self.at(coefficient)
        return {} if condition is None else self.scores[condition]

    def at_layer(self, layer: int) -> TraitCurve:
        """Return the curve of one layer of a grid, the unsteered rows at its coefficient 0."""
        scores = {
            condition: cluster
            for condition, cluster in self.scores.items()
            if condition.layer == layer or condition == UNSTEERED_CONDITION
        }
        return dataclasses.replace(self, scores=scores)

    def difference(self, one: Condition, other: Condition) -> PairedDifference:
        """Return one condition minus another over the questions scored under both."""
        return self.paired_values(gaps_between(self.scores[one], self.scores[other]))

    def paired_values(self, gaps: Mapping[int, float]) -> PairedDifference:
        """Return the mean of differences by question, with its interval and test."""
        by_question = {question: [gap] for question, gap in gaps.items()}
        interval = bootstrap_mean(by_question, seed=self.seed, resamples=self.resamples)
        if not gaps:
            reason = "no question was scored under both conditions"
            return PairedDifference(dataclasses.replace(interval, reason=reason), None)
        if len(gaps) == 1:
            return PairedDifference(interval, None)
        values = np.array(list(gaps.values()))
        return PairedDifference(interval, sign_flip_p(values, seed=self.seed))

    def from_zero(
        self, difference: Callable[[Condition, Condition], PairedDifference] | None = None
    ) -> dict[Condition, PairedDifference]:
        """Return every other coefficient against 0, Holm-corrected; nothing where 0 was not run.

        ``difference`` takes the place of the method of that name.
        """
        zero = self.at(0.0)
        others = [each for each in self.scores if each.coefficient]
        if zero is None:
            return {}
        tested = difference or self.difference
        differences = corrected([tested(each, zero) for each in others])
        return dict(zip(others, differences, strict=True))

    def rho_means(self) -> Estimate:
        """Return Spearman's rho between coefficient and condition mean."""
        conditions = self.steered()
        if len(conditions) < 3:
            return _too_few(conditions, "scored coefficients")
        x, means, known = self._arrays(conditions)
        return resampled_estimate(
            lambda drawn: rank_correlation(x, drawn),
            means,
            known,
            seed=self.seed,
            resamples=self.resamples,
        )

    def rho_rows(self) -> Estimate:
        """Return Spearman's rho between coefficient and score over single answers."""
        conditions = self.steered()
        if len(conditions) < 2:
            return _too_few(conditions, "scored coefficients", least="two")
        rows = [
            (condition.coefficient, score, question)
            for condition in conditions
            for question, scores in self.scores[condition].items()
            for score in scores
            if score is not None
        ]
        x, y, question = (np.array(column) for column in zip(*rows, strict=True))
        index = np.unique(question, return_inverse=True)[1]
        return row_rank_correlation(x, y, index, seed=self.seed, resamples=self.resamples)

    def fit(self, coherent: CoherentRange) -> LinearFit:
        """Fit the condition means linearly over the coherent range."""
        conditions = [each for each in self.steered() if each.coefficient in coherent.coefficients]
        if len(conditions) < 3:
            return LinearFit(_too_few(conditions, "coherent, scored coefficients"))
        points: dict[int, list[tuple[float, float]]] = {}
        for each in conditions:
            for question, mean in question_means(self.scores[each]).items():
                points.setdefault(question, []).append((float(each.coefficient or 0.0), mean))
        slopes = {at: _slope(*zip(*own, strict=True)) for at, own in points.items() if own[1:]}
        tested = self.paired_values(slopes)
        found = tested.interval
        slope = Estimate(
            found.mean, found.low, found.high, len(conditions), len(slopes), found.reason
        )
        x, by_question, known = self._arrays(conditions)
        means = by_question.sum(axis=1) / known.sum(axis=1)
        total = float(np.sum((means - means.mean()) ** 2))
        explained = _slope(x, means) ** 2 * float(np.sum((x - x.mean()) ** 2))
        intercept = None if slope.value is None else float(means.mean() - x.mean() * slope.value)
        return LinearFit(slope, tested.p, intercept, explained / total if total > 1e-9 else None)

    def against_prompts(self, coherent: CoherentRange) -> tuple[PromptComparison, ...]:
        """Compare the ends of the coherent range with the prompting references that were run."""
        wanted = []
        for prompt, end in (("prompt_neg", coherent.low), ("prompt_pos", coherent.high)):
            reference = Condition(prompt, None)
            steered = None if end is None else self.at(end)
            if reference in self.scores and end is not None and steered is not None:
                wanted.append((prompt, end, self.difference(steered, reference)))
        tested = corrected([difference for *_, difference in wanted])
        return tuple(
            PromptComparison(prompt, end, difference)
            for (prompt, end, _), difference in zip(wanted, tested, strict=True)
        )

    def over_neutral(self) -> dict[Condition, PairedDifference]:
        """Return the trait's own prompts against neutral ones, Holm-corrected; none without any."""
        neutral = Condition(NEUTRAL, None)
        asked = [each for each in self.scores if each.method in PROMPTS and each != neutral]
        if neutral not in self.scores:
            return {}
        differences = corrected([self.difference(each, neutral) for each in asked])
        return dict(zip(asked, differences, strict=True))

    def _arrays(self, conditions: Sequence[Condition]) -> tuple[Array, Array, Array]:
        """Return coefficients ``[conditions]``, question means, and 1 where there is one, else 0.

        Both are ``[conditions, questions]``: a question counts once, however often it was scored.
        """
        means = [question_means(self.scores[each]) for each in conditions]
        questions = sorted({question for own in means for question in own})
        values = np.array([[own.get(question, 0.0) for question in questions] for own in means])
        known = np.array([[float(question in own) for question in questions] for own in means])
        return np.array([each.coefficient for each in conditions], dtype=float), values, known


def gaps_between(ones: Cluster, others: Cluster) -> dict[int, float]:
    """Return one minus the other for every question that both have scored."""
    return minus(question_means(ones), question_means(others))


def _slope(x: Sequence[float] | Array, y: Sequence[float] | Array) -> float:
    """Return the slope of least squares; the x differ."""
    centred = np.asarray(x) - np.mean(x)
    return float(centred @ np.asarray(y) / (centred @ centred))


def _too_few(conditions: Sequence[Condition], what: str, *, least: str = "three") -> Estimate:
    reason = f"{len(conditions)} {what}, at least {least} needed"
    return Estimate(None, None, None, len(conditions), 0, reason)
