"""Does a vector do more than a random direction of the same norm? Paired by question.

Any push of some length moves scores a little, and breaks the model where it is long enough; what
is left over a random direction at the same coefficients is what the direction itself does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from persona_lora.report.conditions import ConditionSummary
from persona_lora.report.curve import PairedDifference, TraitCurve
from persona_lora.report.resampling import Estimate, holm
from persona_lora.report.scores import question_means


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
    raw = [curve.paired(curve.scores_at(each), control.scores_at(each)) for each in shared]
    corrected = holm([each.p for each in raw])
    return ControlSummary(
        conditions=tuple(conditions),
        comparisons=tuple(
            ControlComparison(coefficient, dataclasses.replace(difference, p_holm=p))
            for coefficient, difference, p in zip(shared, raw, corrected, strict=True)
        ),
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
