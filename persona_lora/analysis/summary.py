"""A sweep as numbers: means with intervals by condition, and how the trait follows the coefficient.

Everything is resampled by question and paired by question. What the data cannot support (one
question, nothing scored, no variation) is None with a reason, never NaN and never 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from persona_lora.analysis.curve import (
    CoherentRange,
    LinearFit,
    PairedDifference,
    PromptComparison,
    TraitCurve,
)
from persona_lora.analysis.resampling import CONFIDENCE, RESAMPLES, Estimate, Interval
from persona_lora.analysis.scores import (
    PROMPTS,
    Condition,
    Row,
    ScoredAnswer,
    clusters,
    judges_of,
    score_answers,
)
from persona_lora.core.chat import COHERENCE
from persona_lora.core.errors import UserError
from persona_lora.core.files import write_csv, write_json
from persona_lora.core.runs import Run

COHERENT_THRESHOLD = 50.0
_LONG_COLUMNS = (
    *("trait", "method", "coefficient", "statistic"),
    *("value", "low", "high", "n", "n_questions", "coverage", "reason"),
)


@dataclass(frozen=True)
class ConditionSummary:
    """One coefficient, or one prompting reference (coefficient None).

    ``relative_weight_norm`` is ‖cΔW‖/‖W‖; ``kl_mean`` and ``kl_p95`` are per-token KL from the base
    model in nats; all three are None where they were not measured. ``from_zero`` is None at
    coefficient 0, for prompting references, and where coefficient 0 was not run.
    """

    method: str
    coefficient: float | None
    trait: Interval
    coherence: Interval
    rows: int
    questions: int
    finished_share: float
    mean_tokens: float
    relative_weight_norm: float | None
    kl_mean: float | None
    kl_p95: float | None
    from_zero: PairedDifference | None


@dataclass(frozen=True)
class SweepSummary:
    """What a sweep showed; ``as_dict`` is ready for JSON."""

    trait: str
    trait_judge: str
    coherence_judge: str
    conditions: tuple[ConditionSummary, ...]
    rho_means: Estimate
    rho_rows: Estimate
    coherent_range: CoherentRange
    fit: LinearFit
    prompt_comparisons: tuple[PromptComparison, ...]
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

    def as_dict(self) -> dict[str, Any]:
        """Return nested plain values without NaN."""
        return dataclasses.asdict(self)


def summarise_sweep(
    answers: Sequence[Row],
    verdicts: Sequence[Row],
    costs: Sequence[Row],
    *,
    trait: str,
    coherent_threshold: float = COHERENT_THRESHOLD,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> SweepSummary:
    """Summarise the rows of a sweep run; see the module for what is resampled.

    Raises UserError when there are no answers, or when the verdicts are of another run.
    """
    if not answers:
        raise UserError(f"the sweep of {trait} holds no answers; run the sweep first")
    scored = score_answers(answers, verdicts, trait)
    groups = _grouped(scored)
    curve = TraitCurve.of(groups, seed=seed, resamples=resamples)
    differences = curve.from_zero()
    conditions = tuple(
        _summarise_condition(
            condition, rows, _cost_of(condition, costs), differences.get(condition), curve
        )
        for condition, rows in groups.items()
    )
    coherent = _coherent_range(conditions, coherent_threshold)
    return SweepSummary(
        trait=trait,
        trait_judge=judges_of(verdicts, trait),
        coherence_judge=judges_of(verdicts, COHERENCE),
        conditions=conditions,
        rho_means=curve.rho_means(),
        rho_rows=curve.rho_rows(),
        coherent_range=coherent,
        fit=curve.fit(coherent),
        prompt_comparisons=curve.against_prompts(coherent),
        confidence=CONFIDENCE,
        resamples=resamples,
        seed=seed,
    )


def summarise_run(
    run: Run, *, coherent_threshold: float = COHERENT_THRESHOLD, seed: int = 0
) -> SweepSummary:
    """Summarise the rows of a run folder; the trait is the one its configuration names."""
    return summarise_sweep(
        run.read("answers"),
        run.read("verdicts"),
        run.read("costs"),
        trait=trait_of(run),
        coherent_threshold=coherent_threshold,
        seed=seed,
    )


def trait_of(run: Run) -> str:
    """Return the trait that a run's configuration names; UserError where it names none."""
    trait = run.record["config"].get("trait")
    if not isinstance(trait, str) or not trait:
        raise UserError(f"{run.folder / 'run.json'} names no trait; expected the run of a sweep")
    return trait


def write_summary(
    run: Run, *, coherent_threshold: float = COHERENT_THRESHOLD, seed: int = 0
) -> SweepSummary:
    """Summarise a run and write ``summary.json`` and ``summary.csv`` (long format) into it."""
    summary = summarise_run(run, coherent_threshold=coherent_threshold, seed=seed)
    write_json(run.folder / "summary.json", summary.as_dict())
    write_csv(run.folder / "summary.csv", _LONG_COLUMNS, long_rows(summary))
    return summary


def long_rows(summary: SweepSummary) -> list[dict[str, Any]]:
    """Return the summary as rows: one statistic of one condition, or of the whole sweep, each."""
    rows = []
    for each in summary.conditions:
        place = {"trait": summary.trait, "method": each.method, "coefficient": each.coefficient}
        for name, interval in (("trait", each.trait), ("coherence", each.coherence)):
            rows.append({**place, "statistic": name, **_interval_cells(interval)})
        if each.from_zero is not None:
            cells = _interval_cells(each.from_zero.interval)
            rows.append({**place, "statistic": "difference_from_zero", **cells})
            for name in ("p", "p_holm"):
                rows.append({**place, "statistic": name, "value": getattr(each.from_zero, name)})
        for name in ("finished_share", "mean_tokens", "relative_weight_norm", "kl_mean", "kl_p95"):
            rows.append({**place, "statistic": name, "value": getattr(each, name)})
    for name, estimate in (
        ("rho_means", summary.rho_means),
        ("rho_rows", summary.rho_rows),
        ("slope", summary.fit.slope),
    ):
        rows.append({"trait": summary.trait, "statistic": name, **dataclasses.asdict(estimate)})
    for name, value in (
        ("r_squared", summary.fit.r_squared),
        ("coherent_low", summary.coherent_range.low),
        ("coherent_high", summary.coherent_range.high),
    ):
        rows.append({"trait": summary.trait, "statistic": name, "value": value})
    return rows


def _interval_cells(interval: Interval) -> dict[str, Any]:
    cells = dataclasses.asdict(interval)
    return {"value": cells.pop("mean"), **cells}


def _grouped(scored: Iterable[ScoredAnswer]) -> dict[Condition, list[ScoredAnswer]]:
    """Group rows by condition: coefficients ascending, then the prompting references."""
    groups: dict[Condition, list[ScoredAnswer]] = {}
    for row in scored:
        groups.setdefault(row.condition, []).append(row)

    def place(condition: Condition) -> tuple[bool, float, bool, str]:
        unlisted = condition.method not in PROMPTS
        coefficient = condition.coefficient
        return coefficient is None, coefficient or 0.0, unlisted, condition.method

    return {condition: groups[condition] for condition in sorted(groups, key=place)}


def _cost_of(condition: Condition, costs: Iterable[Row]) -> Row:
    if condition.coefficient is None:
        return {}
    matching = [row for row in costs if np.isclose(row["coefficient"], condition.coefficient)]
    return matching[-1] if matching else {}


def _summarise_condition(
    condition: Condition,
    rows: Sequence[ScoredAnswer],
    cost: Row,
    from_zero: PairedDifference | None,
    curve: TraitCurve,
) -> ConditionSummary:
    coherence = clusters(rows, COHERENCE)
    return ConditionSummary(
        method=condition.method,
        coefficient=condition.coefficient,
        trait=curve.mean_of(curve.scores[condition]),
        coherence=curve.mean_of(coherence),
        rows=len(rows),
        questions=len(coherence),
        finished_share=float(np.mean([bool(row.answer["finished"]) for row in rows])),
        mean_tokens=float(np.mean([row.answer["num_tokens"] for row in rows])),
        relative_weight_norm=cost.get("relative_weight_norm"),
        kl_mean=cost.get("kl_mean"),
        kl_p95=cost.get("kl_p95"),
        from_zero=from_zero,
    )


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
