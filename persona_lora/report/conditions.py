"""Conditions in numbers: mean scores, divergences, differences from unsteered and from random.

What a curve and a grid have in common. Refuses to know which conditions belong together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from persona_lora.core.chat import COHERENCE
from persona_lora.report.curve import PairedDifference, TraitCurve, corrected
from persona_lora.report.resampling import Estimate, Interval
from persona_lora.report.scores import (
    PROMPTS,
    Condition,
    Row,
    ScoredAnswer,
    clusters,
    question_means,
)

LONG_COLUMNS = (
    *("trait", "method", "layer", "coefficient", "statistic"),
    *("value", "low", "high", "n", "n_questions", "coverage", "reason"),
)
DIVERGENCE_NAMES = ("relative_weight_norm", "relative_state_norm", "kl_mean", "kl_p95")

Groups = dict[Condition, list[ScoredAnswer]]


@dataclass(frozen=True)
class ConditionSummary:
    """One coefficient (at one layer, where one is steered), or a reference without coefficient.

    ``relative_weight_norm`` is ‖cΔW‖/‖W‖ and ``relative_state_norm`` ‖cv‖ over the mean ‖h‖ of the
    layer; ``kl_mean`` and ``kl_p95`` are per-token KL from the base model in nats; all are None
    where they were not measured. ``from_zero`` is None at coefficient 0, for references, and where
    coefficient 0 was not run.
    """

    method: str
    coefficient: float | None
    layer: int | None
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


def group_by_condition(scored: Iterable[ScoredAnswer]) -> Groups:
    """Group rows by condition: coefficients ascending, then layers, then the references."""
    groups: Groups = {}
    for row in scored:
        groups.setdefault(row.condition, []).append(row)

    def place(condition: Condition) -> tuple[bool, float, int, bool, str]:
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
    return tuple(
        _summarise(
            condition,
            rows,
            curve,
            divergence_of(condition, divergences),
            differences.get(condition),
        )
        for condition, rows in groups.items()
    )


def divergence_of(condition: Condition, divergences: Iterable[Row]) -> Row:
    """Return the last row of a condition; coefficient 0 changes nothing, by definition.

    Rows that name no method are of the method "lora" and steer at no layer.
    """
    if condition.coefficient is None:
        return {}
    series = [
        row
        for row in divergences
        if (row.get("method", "lora"), row.get("layer")) == (condition.method, condition.layer)
    ]
    matching = [row for row in series if np.isclose(row["coefficient"], condition.coefficient)]
    if matching:
        return matching[-1]
    if condition.coefficient == 0 and series:
        return {name: 0.0 for name in DIVERGENCE_NAMES if series[-1].get(name) is not None}
    return {}


def condition_rows(trait: str, each: ConditionSummary) -> list[dict[str, Any]]:
    """Return one condition in long format: one row under ``LONG_COLUMNS`` for each statistic."""
    place = {
        "trait": trait,
        "method": each.method,
        "layer": each.layer,
        "coefficient": each.coefficient,
    }
    rows = [
        {**place, "statistic": name, **interval_cells(interval)}
        for name, interval in (("trait", each.trait), ("coherence", each.coherence))
    ]
    rows += difference_rows(place, "difference_from_zero", each.from_zero)
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


def interval_cells(interval: Interval) -> dict[str, Any]:
    """Return an interval under the names of the long format."""
    cells = dataclasses.asdict(interval)
    return {"value": cells.pop("mean"), **cells}


def _summarise(
    condition: Condition,
    rows: Sequence[ScoredAnswer],
    curve: TraitCurve,
    divergence: Row,
    from_zero: PairedDifference | None,
) -> ConditionSummary:
    coherence = clusters(rows, COHERENCE)
    return ConditionSummary(
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
        from_zero=from_zero,
    )


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
    """A control series beside a steered one.

    ``comparisons`` are steered minus control, Holm-corrected over the coefficients. ``overall``
    is one test of all of them: for every question the mean over coefficients c of
    sign(c) · (steered − control), so that positive means further in the expected direction.
    ``rho_means`` is Spearman's rho between coefficient and score of the control itself.
    """

    conditions: tuple[ConditionSummary, ...]
    comparisons: tuple[ControlComparison, ...]
    overall: PairedDifference
    rho_means: Estimate


def summarise_control(
    curve: TraitCurve, control: TraitCurve, conditions: Sequence[ConditionSummary]
) -> ControlSummary:
    """Compare a steered series with its control, whose conditions are summarised already."""
    shared = shared_coefficients(curve, control)
    gaps = [curve.paired(curve.scores_at(each), control.scores_at(each)) for each in shared]
    return ControlSummary(
        conditions=tuple(conditions),
        comparisons=tuple(map(ControlComparison, shared, corrected(gaps))),
        overall=overall_difference(curve, control),
        rho_means=control.rho_means(),
    )


def overall_difference(curve: TraitCurve, control: TraitCurve) -> PairedDifference:
    """Return the mean over coefficients c of sign(c) · (steered − control), by question.

    Of each question only the coefficients that were scored under both count.
    """
    by_question: dict[int, list[float]] = {}
    for coefficient in shared_coefficients(curve, control):
        sign = 1.0 if coefficient > 0 else -1.0
        steered = question_means(curve.scores_at(coefficient))
        random = question_means(control.scores_at(coefficient))
        for question in steered.keys() & random.keys():
            by_question.setdefault(question, []).append(
                sign * (steered[question] - random[question])
            )
    return curve.paired_values(
        {question: sum(gains) / len(gains) for question, gains in sorted(by_question.items())}
    )


def shared_coefficients(curve: TraitCurve, control: TraitCurve) -> list[float]:
    """Return the coefficients other than 0 that both series ran, ascending."""
    ran = {each.coefficient for each in control.scores}
    both = {each.coefficient for each in curve.scores if each.coefficient} & ran
    return sorted(each for each in both if each is not None)
