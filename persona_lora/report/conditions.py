"""Conditions in numbers: mean scores, divergences, differences from unsteered and from random.

What a curve and a grid have in common. Refuses to know which conditions belong together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from persona_lora.core.chat import COHERENCE, Place
from persona_lora.report.curve import PairedDifference, TraitCurve, corrected, gaps_between
from persona_lora.report.resampling import Estimate, Interval
from persona_lora.report.scores import (
    PROMPTS,
    SECOND_SUFFIX,
    Condition,
    Row,
    ScoredAnswer,
    clusters,
    grouped,
    method_of,
)
from persona_lora.report.two_way import mean_gap, mean_over_draws

LONG_COLUMNS = (
    *("trait", "method", "layer", "coefficient", "nats", "statistic"),
    *("value", "low", "high", "n", "n_questions", "coverage", "reason"),
)
DIVERGENCE_NAMES = ("relative_weight_norm", "relative_state_norm", "kl_mean", "kl_p95")

# What rests on the trait's judge alone, and so can be said by another as well.
OF_THE_TRAIT = (
    *("trait", "rho_means", "rho_rows", "random_rho_means", "p", "p_holm", "difference_from_zero"),
    *("difference_from_neutral", "difference_from_random", "gain_over_random"),
    *("random_p", "random_p_holm"),
)

Groups = dict[Condition, list[ScoredAnswer]]


@dataclass(frozen=True)
class ConditionSummary:
    """One coefficient (at one layer, where one is steered), or a reference without coefficient.

    ``relative_weight_norm`` is ‖cΔW‖/‖W‖ and ``relative_state_norm`` ‖cv‖ over the mean ‖h‖ of the
    layer; ``kl_mean`` and ``kl_p95`` are per-token KL from the base model in nats; all are None
    where they were not measured. ``from_zero`` is None at coefficient 0, for references, and where
    coefficient 0 was not run. ``over_neutral`` is a trait's own system prompt minus neutral ones.
    ``nats`` are those that were asked for in place of the coefficient.
    """

    method: str
    coefficient: float | None
    layer: Place | None
    trait: Interval
    coherence: Interval
    rows: int
    questions: int
    finished_share: float
    mean_tokens: float
    relative_weight_norm: float | None
    relative_state_norm: float | None
    kl_mean: float | None
    kl_p95: float | None
    from_zero: PairedDifference | None
    over_neutral: PairedDifference | None = None
    nats: float | None = None


def group_by_condition(scored: Iterable[ScoredAnswer]) -> Groups:
    """Group rows by condition: coefficients ascending, then layers, then the references."""
    groups = grouped(scored, lambda row: row.condition)

    def place(condition: Condition) -> tuple[bool, float, Place, bool, str]:
        coefficient, layer = condition.coefficient, condition.layer
        other = condition.method not in PROMPTS
        return (
            *(coefficient is None, coefficient or 0.0, -1 if layer is None else layer),
            *(other, condition.method),
        )

    return {condition: groups[condition] for condition in sorted(groups, key=place)}


def summarise_conditions(
    groups: Groups,
    curve: TraitCurve,
    divergences: Sequence[Row],
    differences: Mapping[Condition, PairedDifference],
) -> tuple[ConditionSummary, ...]:
    """Summarise every group; ``curve`` holds their trait scores, ``differences`` those from 0."""
    found, over_neutral = [], curve.over_neutral()
    for condition, rows in groups.items():
        coherence, divergence = clusters(rows, COHERENCE), divergence_of(condition, divergences)
        found.append(
            ConditionSummary(
                method=condition.method,
                coefficient=condition.coefficient,
                layer=condition.layer,
                trait=curve.mean_of(curve.scores[condition]),
                coherence=curve.mean_of(coherence),
                rows=len(rows),
                questions=len(coherence),
                finished_share=float(np.mean([bool(row.answer["finished"]) for row in rows])),
                mean_tokens=float(np.mean([row.answer["num_tokens"] for row in rows])),
                **{name: divergence.get(name) for name in DIVERGENCE_NAMES},
                from_zero=differences.get(condition),
                over_neutral=over_neutral.get(condition),
            )
        )
    return tuple(found)


def divergence_of(condition: Condition, divergences: Iterable[Row]) -> Row:
    """Return the last row of a condition; coefficient 0 changes nothing, by definition.

    Of several random controls it is the mean of theirs. Rows that name no method are of the method
    "lora" and steer at no layer.
    """
    if condition.coefficient is None:
        return {}
    series = [
        row
        for row in divergences
        if (method_of(row.get("method", "lora")), row.get("layer"))
        == (condition.method, condition.layer)
    ]
    matching = [row for row in series if np.isclose(row["coefficient"], condition.coefficient)]
    if matching:
        own = list({row.get("method"): row for row in matching}.values())
        known = [name for name in DIVERGENCE_NAMES if all(row.get(name) is not None for row in own)]
        return {name: float(np.mean([row[name] for row in own])) for name in known}
    if condition.coefficient == 0 and series:
        return {name: 0.0 for name in DIVERGENCE_NAMES if series[-1].get(name) is not None}
    return {}


def condition_rows(trait: str, each: ConditionSummary) -> list[dict[str, Any]]:
    """Return one condition in long format: a row for each statistic, without who judged."""
    place = {
        "trait": trait,
        "method": each.method,
        "layer": each.layer,
        "coefficient": each.coefficient,
        "nats": each.nats,
    }
    rows = [
        {**place, "statistic": name, **interval_cells(interval)}
        for name, interval in (("trait", each.trait), ("coherence", each.coherence))
    ]
    rows += difference_rows(place, "difference_from_zero", each.from_zero)
    rows += difference_rows(place, "difference_from_neutral", each.over_neutral)
    for name in ("finished_share", "mean_tokens", *DIVERGENCE_NAMES):
        rows.append({**place, "statistic": name, "value": getattr(each, name)})
    return rows


def difference_rows(
    place: Mapping[str, Any], name: str, difference: PairedDifference | None, *, prefix: str = ""
) -> list[dict[str, Any]]:
    """Return a paired difference and its p values in long format; nothing where there is none."""
    if difference is None:
        return []
    return [
        {**place, "statistic": name, **interval_cells(difference.interval)},
        {**place, "statistic": f"{prefix}p", "value": difference.p},
        {**place, "statistic": f"{prefix}p_holm", "value": difference.p_holm},
    ]


def as_second(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the long rows of a second judge under names of their own, coherence left out."""
    return [
        {**row, "statistic": f"{row['statistic']}{SECOND_SUFFIX}"}
        for row in rows
        if row["statistic"] in OF_THE_TRAIT
    ]


def interval_cells(interval: Interval) -> dict[str, Any]:
    """Return an interval under the names of the long format."""
    cells = dataclasses.asdict(interval)
    return {"value": cells.pop("mean"), **cells}


def interval_of(row: Mapping[str, Any]) -> Interval:
    """Return the interval that a row of the long format holds."""
    names: Sequence[str] = ("value", "low", "high", "n", "n_questions", "coverage", "reason")
    cells: list[Any] = [row.get(name) for name in names]
    return Interval(*cells)


# -- beside a random direction of the same norm ------------------------------------------------
#
# Any push of some length moves scores a little, and breaks the model where it is long enough; what
# is left over a random direction at the same coefficients is what the direction itself does.


@dataclass(frozen=True)
class ControlComparison:
    """The trait score at a coefficient minus that of the control at the same coefficient."""

    coefficient: float
    difference: PairedDifference


@dataclass(frozen=True)
class ControlSummary:
    """A control series beside a steered one; of several random directions, ``draws``, their mean.

    ``comparisons`` are steered minus control, Holm-corrected over the coefficients. ``overall``
    is one test of all of them: for every question the mean over coefficients c of
    sign(c) · (steered − control), so that positive means further in the expected direction. Of
    several directions all are over directions and questions, both drawn (``two_way.mean_gap``);
    ``least`` and ``most`` are the overall differences from the strongest and the weakest of them.
    ``rho_means`` is Spearman's rho between coefficient and score of the control itself.
    """

    conditions: tuple[ConditionSummary, ...]
    comparisons: tuple[ControlComparison, ...]
    overall: PairedDifference
    rho_means: Estimate
    draws: int = 1
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Controls:
    """Random directions at the same coefficients: the rows of each, with the unsteered ones."""

    draws: tuple[Groups, ...]
    curves: tuple[TraitCurve, ...]

    @classmethod
    def of(cls, rows: Iterable[ScoredAnswer], *, seed: int, resamples: int) -> Controls:
        """Return the controls that rows are of; the unsteered rows among them are of each."""
        rows = list(rows)
        names = dict.fromkeys(row.answer["method"] for row in rows if row.condition.coefficient)
        draws = tuple(
            group_by_condition(
                row for row in rows if row.answer["method"] == name or not row.condition.coefficient
            )
            for name in names
        )
        curves = (TraitCurve.of(each, seed=seed, resamples=resamples) for each in draws)
        return cls(draws, tuple(curves))

    def at_layer(self, layer: int) -> Controls:
        """Return the controls of one layer of a grid; none where there were none."""
        curves = tuple(each.at_layer(layer) for each in self.curves)
        ran = any(each.layer == layer for curve in curves for each in curve.scores)
        return Controls(self.draws, curves if ran else ())

    def tested(self, gaps: Sequence[Mapping[int, float]]) -> PairedDifference:
        """Return differences by question, one of each control, over questions and controls."""
        if len(gaps) == 1:
            return self.curves[0].paired_values(gaps[0])
        return PairedDifference(*mean_gap(gaps))

    def conditions(self, divergences: Sequence[Row]) -> tuple[ConditionSummary, ...]:
        """Summarise every condition over all controls."""
        if not self.curves:
            return ()
        rows = [
            row
            for at, groups in enumerate(self.draws)
            for own in groups.values()
            for row in own
            if at == 0 or row.condition.coefficient
        ]
        groups, first = group_by_condition(rows), self.curves[0]
        whole = TraitCurve.of(groups, seed=first.seed, resamples=first.resamples)
        from_zero = whole.from_zero(
            lambda each, zero: self.tested(
                [gaps_between(one.scores.get(each, {}), whole.scores[zero]) for one in self.curves]
            )
        )
        found = summarise_conditions(groups, whole, divergences, from_zero)
        return tuple(map(self._over_draws, found))

    def _over_draws(self, each: ConditionSummary) -> ConditionSummary:
        """Return a summary with its means over the controls that ran it."""
        at = Condition(each.method, each.coefficient, each.layer)
        own = [groups[at] for groups in self.draws if at in groups]
        if not each.coefficient or len(own) == 1:
            return each
        seed, resamples = self.curves[0].seed, self.curves[0].resamples
        trait, coherence = (
            mean_over_draws(
                [clusters(rows, criterion) for rows in own], seed=seed, resamples=resamples
            )
            for criterion in ("trait", COHERENCE)
        )
        return dataclasses.replace(each, trait=trait, coherence=coherence)


def summarise_control(
    curve: TraitCurve, controls: Controls, divergences: Sequence[Row]
) -> ControlSummary:
    """Compare a steered series with its controls."""
    shared = sorted(set.intersection(*(set(_both(curve, each)) for each in controls.curves)))
    gaps = [
        controls.tested(
            [gaps_between(curve.scores_at(each), one.scores_at(each)) for one in controls.curves]
        )
        for each in shared
    ]
    overall = [overall_gaps(curve, one) for one in controls.curves]
    ends = sorted(sum(own.values()) / len(own) for own in overall if own)
    rhos = [one.rho_means() for one in controls.curves]
    several = len(controls.curves) > 1
    return ControlSummary(
        conditions=controls.conditions(divergences),
        comparisons=tuple(map(ControlComparison, shared, corrected(gaps))),
        overall=controls.tested(overall),
        rho_means=_mean_rho(rhos) if several else rhos[0],
        draws=len(controls.curves),
        least=ends[0] if several and ends else None,
        most=ends[-1] if several and ends else None,
    )


def _mean_rho(rhos: Sequence[Estimate]) -> Estimate:
    """Return the mean rho of several controls, which has no interval, and their range."""
    known = sorted(each.value for each in rhos if each.value is not None)
    n, questions = sum(each.n for each in rhos), max(each.n_questions for each in rhos)
    if not known:
        return Estimate(None, None, None, n, questions, rhos[0].reason)
    reason = f"the mean of {len(known)}, from {known[0]:.2f} to {known[-1]:.2f}"
    return Estimate(float(np.mean(known)), None, None, n, questions, reason)


def overall_gaps(curve: TraitCurve, control: TraitCurve) -> dict[int, float]:
    """Return sign(c) · (steered − control) of each question, the mean over coefficients c.

    Only the coefficients that were scored under both count.
    """
    by_question: dict[int, list[float]] = {}
    for coefficient in _both(curve, control):
        sign = 1.0 if coefficient > 0 else -1.0
        gaps = gaps_between(curve.scores_at(coefficient), control.scores_at(coefficient))
        for question, gap in gaps.items():
            by_question.setdefault(question, []).append(sign * gap)
    return {question: sum(gains) / len(gains) for question, gains in sorted(by_question.items())}


def _both(curve: TraitCurve, control: TraitCurve) -> list[float]:
    """Return the coefficients other than 0 that both ran, ascending."""
    ran = {each.coefficient for each in control.scores}
    both = {each.coefficient for each in curve.scores if each.coefficient} & ran
    return sorted(each for each in both if each is not None)
