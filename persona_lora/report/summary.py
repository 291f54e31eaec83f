"""A sweep as numbers: means with intervals by condition, and how the trait follows the coefficient.

Everything is resampled by question and paired by question. What the data cannot support (one
question, nothing scored, no variation) is None with a reason, never NaN and never 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

from persona_lora.core.chat import COHERENCE, Place
from persona_lora.core.errors import UserError
from persona_lora.core.files import write_csv, write_json
from persona_lora.core.runs import Run
from persona_lora.report.conditions import (
    DIVERGENCE_NAMES,
    LONG_COLUMNS,
    ConditionSummary,
    Controls,
    ControlSummary,
    as_second,
    condition_rows,
    difference_rows,
    group_by_condition,
    summarise_conditions,
    summarise_control,
)
from persona_lora.report.correction import LONG_CORRECTED, errors_of, with_corrected
from persona_lora.report.curve import CoherentRange, LinearFit, PromptComparison, TraitCurve
from persona_lora.report.resampling import CONFIDENCE, RESAMPLES, Estimate
from persona_lora.report.scores import (
    CONTROL,
    JUDGE,
    SECOND,
    UNSTEERED,
    Row,
    ScoredAnswer,
    Series,
    judges_of,
    rows_of_series,
    score_answers,
    steered_series,
)

COHERENT, SENSELESS, TOLERATED = 50.0, 20.0, 10.0
S = TypeVar("S", bound=Any)


@dataclass(frozen=True)
class SweepSummary:
    """What one steered series showed, in nested plain values without NaN.

    ``method`` is "none", and coefficient 0 the only one, where nothing was steered. ``control`` is
    the series of a random direction at the same layer, or None where it was not run.
    """

    trait: str
    trait_judge: str
    coherence_judge: str
    method: str
    layer: Place | None
    conditions: tuple[ConditionSummary, ...]
    rho_means: Estimate
    rho_rows: Estimate
    coherent_range: CoherentRange
    fit: LinearFit
    prompt_comparisons: tuple[PromptComparison, ...]
    control: ControlSummary | None
    confidence: float
    resamples: int
    seed: int

    @property
    def steered(self) -> tuple[ConditionSummary, ...]:
        """The conditions with a coefficient, in ascending order."""
        return tuple(each for each in self.conditions if each.coefficient is not None)

    def reference(self, method: str) -> ConditionSummary | None:
        """Return the prompting reference of that name, or None where it was not run."""
        found = (each for each in self.conditions if each.method == method)
        return next((each for each in found if each.coefficient is None), None)


def summarise_sweep(
    answers: Sequence[Row],
    verdicts: Sequence[Row],
    divergences: Sequence[Row],
    *,
    trait: str,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> SweepSummary:
    """Summarise the rows of a sweep of one series; see the module for what is resampled.

    Raises UserError when there are no answers, when the verdicts are of another run, and when
    coefficients belong to several methods or layers.
    """
    if not answers:
        raise UserError(f"the sweep of {trait} holds no answers; run the sweep first")
    scored = score_answers(answers, verdicts, trait)
    series, control_series = _series_of(scored)
    references = [row for row in scored if row.condition.coefficient is None]
    groups = group_by_condition([*rows_of_series(scored, series), *references])
    curve = TraitCurve.of(groups, seed=seed, resamples=resamples)
    conditions = summarise_conditions(groups, curve, divergences, curve.from_zero())
    coherent = _coherent_range(conditions, coherence_floor(conditions))
    beside = [] if control_series is None else rows_of_series(scored, control_series)
    control = Controls.of(beside, seed=seed, resamples=resamples)
    return SweepSummary(
        trait=trait,
        trait_judge=judges_of(verdicts, trait),
        coherence_judge=judges_of(verdicts, COHERENCE),
        method=series.method,
        layer=series.layer,
        conditions=conditions,
        rho_means=curve.rho_means(),
        rho_rows=curve.rho_rows(),
        coherent_range=coherent,
        fit=curve.fit(coherent),
        prompt_comparisons=curve.against_prompts(coherent),
        control=summarise_control(curve, control, divergences) if control.curves else None,
        confidence=CONFIDENCE,
        resamples=resamples,
        seed=seed,
    )


def _series_of(scored: Sequence[ScoredAnswer]) -> tuple[Series, Series | None]:
    """Return the steered series of a sweep, and its control where there is one."""
    found = steered_series(row.condition for row in scored)
    steered = [each for each in found if each.method != CONTROL] or found[:1]
    if len(steered) > 1:
        layers = ", ".join(str(each.layer) for each in steered)
        raise UserError(f"the sweep steers at several layers ({layers}); summarise it as a grid")
    if not steered:
        return Series(UNSTEERED, None), None
    control = Series(CONTROL, steered[0].layer)
    return steered[0], control if control in found and control != steered[0] else None


def summarise_run(run: Run, *, by: str = "verdicts") -> SweepSummary:
    """Summarise the rows of a run folder; the trait is the one its configuration names.

    ``by`` is the file of the verdicts; a second judge's say nothing of coherence.
    """
    found = summarise_sweep(
        run.read("answers"), run.read(by), run.read("divergence"), trait=trait_of(run)
    )
    asked = dict(run.record["config"].get("nats", ()))
    if not asked:
        return found

    def named(conditions: Iterable[ConditionSummary]) -> tuple[ConditionSummary, ...]:
        return tuple(
            dataclasses.replace(each, nats=asked.get(each.coefficient)) for each in conditions
        )

    control = found.control
    if control is not None:
        control = dataclasses.replace(control, conditions=named(control.conditions))
    return dataclasses.replace(found, conditions=named(found.conditions), control=control)


def trait_of(run: Run) -> str:
    """Return the trait that a run's configuration names; raises UserError where it names none."""
    trait = run.record["config"].get("trait")
    if not isinstance(trait, str) or not trait:
        raise UserError(f"{run.folder / 'run.json'} names no trait; expected the run of a sweep")
    return trait


def write_summary(run: Run) -> SweepSummary:
    """Summarise a run and write ``summary.json`` and ``summary.csv`` into it."""
    return write_both(run, "summary", summarise_run, long_rows)


def write_both(
    run: Run, name: str, summarise: Callable[..., S], rows_of: Callable[[S], list[dict[str, Any]]]
) -> S:
    """Summarise a run and write ``{name}.json`` and ``{name}.csv`` (long format) into it.

    What a second judge says of the trait stands in the table as well.
    """
    summary = summarise(run)
    write_json(run.folder / f"{name}.json", dataclasses.asdict(summary))
    rows = _judged(run, "verdicts", summary, rows_of(summary))
    if run.read(SECOND):
        second = summarise(run, by=SECOND)
        rows += as_second(_judged(run, SECOND, second, rows_of(second)))
    write_csv(run.folder / f"{name}.csv", (*LONG_COLUMNS, *LONG_CORRECTED, JUDGE), rows)
    return summary


def _judged(run: Run, file: str, summary: Any, rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Return long rows with the judge that each rests on, and corrected for its error.

    None is behind what was measured.
    """
    by = dict.fromkeys(("finished_share", "mean_tokens", *DIVERGENCE_NAMES), "")
    by |= dict.fromkeys((COHERENCE, "coherent_low", "coherent_high"), summary.coherence_judge)
    finetuned = bool(run.record["config"].get("adapter"))
    right = with_corrected(rows, errors_of(run, summary.trait, by=file), finetuned=finetuned)
    return [{**row, JUDGE: by.get(row["statistic"], summary.trait_judge)} for row in right]


def long_rows(summary: SweepSummary) -> list[dict[str, Any]]:
    """Return the summary as rows: one statistic of one condition, or of the whole sweep, each."""
    rows = [row for each in summary.conditions for row in condition_rows(summary.trait, each)]
    rows += _control_rows(summary)
    for name, estimate in (
        ("rho_means", summary.rho_means),
        ("rho_rows", summary.rho_rows),
        ("slope", summary.fit.slope),
    ):
        rows.append({"trait": summary.trait, "statistic": name, **dataclasses.asdict(estimate)})
    for name, value in (
        ("slope_p", summary.fit.p),
        ("r_squared", summary.fit.r_squared),
        ("coherent_low", summary.coherent_range.low),
        ("coherent_high", summary.coherent_range.high),
    ):
        rows.append({"trait": summary.trait, "statistic": name, "value": value})
    return rows


def _control_rows(summary: SweepSummary) -> list[dict[str, Any]]:
    """Return steered minus control, at every coefficient and over all, in long format."""
    if summary.control is None:
        return []
    place = {"trait": summary.trait, "method": summary.method, "layer": summary.layer}
    # The unsteered rows stand at its coefficient 0 as well, and are listed already.
    steered = [each for each in summary.control.conditions if each.coefficient]
    rows = [row for each in steered for row in condition_rows(summary.trait, each)]
    nats = {each.coefficient: each.nats for each in summary.conditions}
    for each in summary.control.comparisons:
        at = {**place, "coefficient": each.coefficient, "nats": nats.get(each.coefficient)}
        rows += difference_rows(at, "difference_from_random", each.difference, prefix="random_")
    overall = summary.control.overall
    rows += difference_rows(place, "gain_over_random", overall, prefix="random_")
    rho = dataclasses.asdict(summary.control.rho_means)
    return [*rows, {"trait": summary.trait, "statistic": "random_rho_means", **rho}]


def coherence_floor(conditions: Iterable[ConditionSummary]) -> float:
    """Return what mean coherence still counts as coherent: 50, or 10 under the unsteered model's.

    A small model's own answers may make less sense than that, and steering is not to blame for it;
    under 20 nothing is coherent.
    """
    means = [each.coherence.mean for each in conditions if each.coefficient == 0]
    return floor_under(means[0] if means else None)


def floor_under(unsteered: float | None) -> float:
    """Return the same for the mean coherence of unsteered answers; None where there is none."""
    if unsteered is None:
        return COHERENT
    # In whole points, so that what a report says of it is what was asked for.
    return float(round(min(COHERENT, max(SENSELESS, unsteered - TOLERATED))))


def _coherent_range(conditions: Iterable[ConditionSummary], threshold: float) -> CoherentRange:
    """Walk outwards from the coefficient nearest 0 while the mean coherence holds."""
    means = {each.coefficient: each.coherence.mean for each in conditions}
    points = sorted(point for point in means if point is not None)
    if all(means[point] is None for point in points):
        reason = "coherence was not scored" if points else "no coefficient was run"
        return CoherentRange(None, None, (), threshold, reason)
    nearest = min(points, key=abs)
    runs = [
        list(run)
        for holds, run in groupby(points, key=lambda point: (means[point] or 0.0) >= threshold)
        if holds
    ]
    coherent = next((tuple(run) for run in runs if nearest in run), ())
    if not coherent:
        reason = f"answers are not coherent at coefficient {nearest:g}, the nearest to 0"
        return CoherentRange(None, None, (), threshold, reason)
    return CoherentRange(coherent[0], coherent[-1], coherent, threshold)
