"""The section of a report on one steered series: curve, conditions, control, prompts, answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.scores import (
    CONTROL,
    Condition,
    ScoredAnswer,
    Series,
    rows_of_series,
    score_answers,
)
from persona_lora.report.sections import (
    Content,
    Listing,
    Question,
    ReportOptions,
    by_question,
    data_uri,
    examples,
    listing,
)
from persona_lora.report.summary import SweepSummary, summarise_run
from persona_lora.studies.steering.figure import render_sweep


@dataclass(frozen=True)
class SweepBody:
    """Everything the template shows of one sweep."""

    summary: SweepSummary
    plot: str
    examples: tuple[Question, ...]
    listing: Listing


def sweep_content(run: Run, options: ReportOptions) -> Content:
    """Return the section of a sweep; UserError for a folder that holds none."""
    summary = summarise_run(run, seed=options.seed)
    scored = score_answers(run.read("answers"), run.read("verdicts"), summary.trait)
    questions = by_question(_rows(scored, summary))
    chosen = _nearest(summary, options.coefficients)
    return Content(
        template="report_sweep.html.j2",
        title=wording.title_of(summary.trait) + wording.at_layer(summary),
        lead=wording.headline(summary),
        body=SweepBody(
            summary=summary,
            plot=data_uri(render_sweep(summary)),
            examples=examples(questions, _at(summary, chosen), _references(summary, chosen)),
            listing=listing(questions),
        ),
    )


def _rows(scored: Sequence[ScoredAnswer], summary: SweepSummary) -> list[ScoredAnswer]:
    """Return the rows with the unsteered ones at coefficient 0 of the steered series."""
    series = Series(summary.method, summary.layer)
    steered = rows_of_series(scored, series)
    others = [
        row
        for row in scored
        if row.condition.coefficient is None
        or (row.condition.method == CONTROL and row.condition.series != series)
    ]
    return [*steered, *others]


def _nearest(summary: SweepSummary, coefficients: Sequence[float]) -> set[float]:
    """Return the run coefficients nearest to the wanted ones; of two the one further out."""
    points = [each.coefficient for each in summary.steered if each.coefficient is not None]
    if not points:
        return set()
    return {
        min(points, key=lambda point: (abs(point - wanted), -abs(point))) for wanted in coefficients
    }


def _at(summary: SweepSummary, chosen: set[float]) -> set[Condition]:
    return {Condition(summary.method, each, summary.layer) for each in chosen}


def _references(summary: SweepSummary, chosen: set[float]) -> set[Condition]:
    """Return the references, and the control at the outermost chosen coefficients."""
    references = {
        Condition(each.method, None, each.layer)
        for each in summary.conditions
        if each.coefficient is None
    }
    ends = {min(chosen), max(chosen)} - {0.0} if chosen else set()
    return references | {Condition(CONTROL, each, summary.layer) for each in ends}
