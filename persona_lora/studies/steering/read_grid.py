"""Layers × coefficients as numbers: every cell against the unsteered model, and the best layer.

Paired and resampled by question, as a sweep is. A best layer is the best of many on these
questions, so its gain is too high; the summary says how stable the choice is and what it gives on
questions left out of it, and refuses to call that a held-out result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from persona_lora.core.chat import COHERENCE
from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.report.conditions import (
    ConditionSummary,
    Controls,
    condition_rows,
    difference_rows,
    group_by_condition,
    interval_cells,
    overall_gaps,
    summarise_conditions,
)
from persona_lora.report.curve import PairedDifference, TraitCurve, corrected
from persona_lora.report.resampling import (
    CONFIDENCE,
    RESAMPLES,
    Array,
    Estimate,
    Interval,
    question_weights,
    weighted_means,
)
from persona_lora.report.scores import (
    CONTROL,
    UNSTEERED_CONDITION,
    Condition,
    Row,
    ScoredAnswer,
    clusters,
    condition_of,
    judges_of,
    minus,
    question_means,
    score_answers,
    steered_series,
)
from persona_lora.report.summary import coherence_floor, trait_of, write_both

RULE = (
    "the layer with the largest paired gain in the expected direction, "
    "sign(c) · (steered − unsteered), at any coefficient c with mean coherence of at least {:g}; "
    "of equal layers the lower"
)
SELECTION_NOTE = (
    "The layer was chosen on these questions: its gain is the best of many and therefore too "
    "high. Report it on questions that took no part in the choice."
)


@dataclass(frozen=True)
class DirectedGain:
    """A cell minus the unsteered model, times the sign of its coefficient: positive is expected."""

    coefficient: float
    gain: Interval
    p: float | None
    p_holm: float | None
    coherence: float


@dataclass(frozen=True)
class LayerSummary:
    """One layer: how the trait follows the coefficient there, and its best coherent coefficient.

    ``best`` is None, with a ``reason``, where no coefficient was coherent and scored.
    ``over_control`` is the mean over coefficients of sign(c) · (steered − random direction),
    Holm-corrected over the layers, and of several directions over these as well; None where no
    control was run at this layer.
    """

    layer: int
    rho_means: Estimate
    best: DirectedGain | None
    reason: str | None
    over_control: PairedDifference | None


@dataclass(frozen=True)
class Selection:
    """The rule for the best layer, repeated in bootstrap resamples of the questions.

    ``layer_shares`` says how often each layer won. ``left_out_gain`` is the mean gain of the
    winner on the questions that its resample did not draw: an estimate without the bias of
    choosing and reporting on the same questions, though of choices from fewer questions.
    """

    layer_shares: dict[int, float]
    left_out_gain: float | None


@dataclass(frozen=True)
class GridSummary:
    """What a grid showed, in nested plain values without NaN.

    ``cells`` are all conditions with a coefficient other than 0, of ``method`` and of the random
    control, by layer and coefficient; Holm's correction is over all cells of one method.
    ``ranking`` holds the layers with a gain, the best first; ``best_layer`` is its head.
    """

    trait: str
    trait_judge: str
    coherence_judge: str
    method: str
    layers: tuple[int, ...]
    coefficients: tuple[float, ...]
    best_layer: int | None
    best_coefficient: float | None
    rule: str
    selection_note: str
    selection: Selection | None
    ranking: tuple[int, ...]
    by_layer: tuple[LayerSummary, ...]
    unsteered: ConditionSummary | None
    references: tuple[ConditionSummary, ...]
    cells: tuple[ConditionSummary, ...]
    coherent_threshold: float
    confidence: float
    resamples: int
    seed: int

    @property
    def steered(self) -> tuple[ConditionSummary, ...]:
        """The cells of the steered method, by layer and coefficient."""
        return tuple(each for each in self.cells if each.method == self.method)

    @property
    def best(self) -> DirectedGain | None:
        """The gain at the best layer."""
        return None if self.best_layer is None else self.at_layer(self.best_layer).best

    def at_layer(self, layer: int) -> LayerSummary:
        """Return the summary of a layer of the grid."""
        return next(each for each in self.by_layer if each.layer == layer)

    def cell(self, layer: int, coefficient: float) -> ConditionSummary | None:
        """Return one steered cell, or None where it was not run."""
        found = (each for each in self.steered if each.layer == layer)
        return next((each for each in found if each.coefficient == coefficient), None)

    def reference(self, method: str) -> ConditionSummary | None:
        """Return the prompting reference of that name, or None where it was not run."""
        return next((each for each in self.references if each.method == method), None)


def is_grid(run: Run) -> bool:
    """Return whether the answers of a run were steered at more than one layer each in turn."""
    conditions = {condition_of(answer) for answer in run.read("answers")}
    layers = {each.layer for each in conditions if each.coefficient}
    return len(layers - {None}) > 1


def summarise_grid(
    answers: Sequence[Row],
    verdicts: Sequence[Row],
    divergences: Sequence[Row] = (),
    *,
    trait: str,
    coherent_threshold: float | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> GridSummary:
    """Summarise the rows of a grid; see ``RULE`` for how the best layer is found.

    Raises UserError when there are no steered rows, or when some steer at no single layer.
    """
    scored = [_unsteered_at_zero(row) for row in score_answers(answers, verdicts, trait)]
    method, layers = _method_and_layers(scored, trait)
    groups = group_by_condition(_rows_of(scored, method))
    curve = TraitCurve.of(groups, seed=seed, resamples=resamples)
    conditions = summarise_conditions(groups, curve, divergences, curve.from_zero())
    if coherent_threshold is None:
        coherent_threshold = coherence_floor(conditions)
    cells = _by_place(conditions)
    beside = _rows_of(scored, CONTROL) if method != CONTROL else []
    control = Controls.of(beside, seed=seed, resamples=resamples)
    by_layer = _summarise_layers(layers, cells, curve, control, coherent_threshold)
    ranking = _ranking(by_layer)
    best = next((each for each in by_layer if ranking and each.layer == ranking[0]), None)
    zero = [each for each in conditions if each.coefficient == 0]
    return GridSummary(
        trait=trait,
        trait_judge=judges_of(verdicts, trait),
        coherence_judge=judges_of(verdicts, COHERENCE),
        method=method,
        layers=layers,
        coefficients=tuple(sorted({each.coefficient for each in cells if each.coefficient})),
        best_layer=best.layer if best else None,
        best_coefficient=best.best.coefficient if best and best.best else None,
        rule=RULE.format(coherent_threshold),
        selection_note=SELECTION_NOTE,
        selection=resample_selection(curve, groups, threshold=coherent_threshold) if best else None,
        ranking=ranking,
        by_layer=by_layer,
        unsteered=zero[0] if zero else None,
        references=tuple(each for each in conditions if each.coefficient is None),
        cells=(*cells, *_by_place(control.conditions(divergences))),
        coherent_threshold=coherent_threshold,
        confidence=CONFIDENCE,
        resamples=resamples,
        seed=seed,
    )


def write_grid(run: Run) -> GridSummary:
    """Summarise a run and write ``grid.json`` and ``grid.csv`` into it."""
    return write_both(run, "grid", grid_of, long_rows)


def grid_of(run: Run, *, by: str = "verdicts") -> GridSummary:
    """Summarise the rows of a run folder; the trait is the one its configuration names.

    ``by`` is the file of the verdicts; a second judge's say nothing of coherence.
    """
    return summarise_grid(
        run.read("answers"), run.read(by), run.read("divergence"), trait=trait_of(run)
    )


def long_rows(grid: GridSummary) -> list[dict[str, Any]]:
    """Return the grid as rows: one statistic of one cell, of a layer, or of a reference, each."""
    conditions = [*([grid.unsteered] if grid.unsteered else []), *grid.references, *grid.cells]
    rows = [row for each in conditions for row in condition_rows(grid.trait, each)]
    for layer in grid.by_layer:
        place = {"trait": grid.trait, "method": grid.method, "layer": layer.layer}
        rho = dataclasses.asdict(layer.rho_means)
        rows.append({**place, "statistic": "rho_means", **rho})
        if layer.best is not None:
            at = {**place, "coefficient": layer.best.coefficient}
            rows.append({**at, "statistic": "best_gain", **interval_cells(layer.best.gain)})
        over = layer.over_control
        rows += difference_rows(place, "gain_over_random", over, prefix="random_")
    return rows


def _unsteered_at_zero(row: ScoredAnswer) -> ScoredAnswer:
    """Count a coefficient of 0 at any layer as what it is: the unsteered model."""
    zero = row.condition.coefficient == 0
    return row._replace(condition=UNSTEERED_CONDITION) if zero else row


def _method_and_layers(scored: Sequence[ScoredAnswer], trait: str) -> tuple[str, tuple[int, ...]]:
    series = steered_series(row.condition for row in scored)
    if not series:
        raise UserError(f"the grid of {trait} holds no steered answers; run the sweep first")
    method = series[0].method
    layers = [each.layer for each in series if each.method == method]
    known = tuple(layer for layer in layers if isinstance(layer, int))
    if len(known) < len(layers):
        raise UserError(f"answers of {method} are steered at no single layer; expected a grid")
    return method, known


def _rows_of(scored: Sequence[ScoredAnswer], method: str) -> list[ScoredAnswer]:
    """Return the rows of a method and the unsteered ones, and the references of the real one."""
    return [
        row
        for row in scored
        if row.condition.method == method
        or row.condition == UNSTEERED_CONDITION
        or (row.condition.coefficient is None and method != CONTROL)
    ]


def _by_place(conditions: Sequence[ConditionSummary]) -> tuple[ConditionSummary, ...]:
    cells = [each for each in conditions if each.coefficient]
    return tuple(sorted(cells, key=lambda each: (each.layer or 0, each.coefficient or 0.0)))


def _summarise_layers(
    layers: Sequence[int],
    cells: Sequence[ConditionSummary],
    curve: TraitCurve,
    control: Controls,
    threshold: float,
) -> tuple[LayerSummary, ...]:
    beside = {each: control.at_layer(each) for each in layers}
    controlled = [each for each in layers if beside[each].curves]
    over = [
        beside[each].tested(
            [overall_gaps(curve.at_layer(each), one) for one in beside[each].curves]
        )
        for each in controlled
    ]
    over_control = dict(zip(controlled, corrected(over), strict=True))
    summaries = []
    for layer in layers:
        best, reason = _best_of([each for each in cells if each.layer == layer], threshold)
        rho = curve.at_layer(layer).rho_means()
        summaries.append(LayerSummary(layer, rho, best, reason, over_control.get(layer)))
    return tuple(summaries)


def _best_of(
    cells: Sequence[ConditionSummary], threshold: float
) -> tuple[DirectedGain | None, str | None]:
    """Return the largest directed gain among coherent cells, or None and why there is none."""
    if all(each.from_zero is None for each in cells):
        return None, "the unsteered model was not run"
    if all(each.coherence.mean is None for each in cells):
        return None, "coherence was not scored"
    gains = [
        gain
        for each in cells
        if each.coherence.mean is not None and each.coherence.mean >= threshold
        if (gain := _directed(each, each.coherence.mean)) is not None
    ]
    if not gains:
        return None, f"no scored coefficient keeps a mean coherence of {threshold:g}"
    return min(gains, key=lambda each: (-_rounded(each), abs(each.coefficient))), None


def _directed(cell: ConditionSummary, coherence: float) -> DirectedGain | None:
    change, coefficient = cell.from_zero, cell.coefficient
    if change is None or coefficient is None or change.interval.mean is None:
        return None
    gain = change.interval
    if coefficient < 0:
        ends = (gain.mean, gain.high, gain.low)
        mean, low, high = (None if each is None else -each for each in ends)
        gain = dataclasses.replace(gain, mean=mean, low=low, high=high)
    return DirectedGain(coefficient, gain, change.p, change.p_holm, coherence)


def _ranking(by_layer: Sequence[LayerSummary]) -> tuple[int, ...]:
    gains = {each.layer: _rounded(each.best) for each in by_layer if each.best is not None}
    return tuple(sorted(gains, key=lambda layer: (-gains[layer], layer)))


def _rounded(gain: DirectedGain) -> float:
    """Return a gain without rounding noise, which would decide between equal layers."""
    return round(gain.gain.mean or 0.0, 9)


# -- how far the choice is to be trusted: made again in every resample ---------------------------


def resample_selection(
    curve: TraitCurve, groups: Mapping[Condition, Sequence[ScoredAnswer]], *, threshold: float
) -> Selection | None:
    """Repeat the choice in resamples; None where one question, or no unsteered row, is there."""
    zero = question_means(curve.scores.get(UNSTEERED_CONDITION, {}))
    cells = sorted(
        (each for each in curve.scores if each.coefficient),
        key=lambda each: (each.layer or 0, abs(each.coefficient or 0.0)),
    )
    if len(zero) < 2 or not cells:
        return None
    questions = sorted(zero)
    gains = [
        {
            at: gap if (cell.coefficient or 0.0) > 0 else -gap
            for at, gap in minus(question_means(curve.scores[cell]), zero).items()
        }
        for cell in cells
    ]  # sign(c) · (steered − unsteered)
    coherence = [question_means(clusters(groups[each], COHERENCE)) for each in cells]
    weights = question_weights(len(questions), resamples=curve.resamples, seed=curve.seed)
    resampled = _weighted_means(gains, questions, weights)
    coherent = _weighted_means(coherence, questions, weights) >= threshold  # NaN is not coherent
    eligible = np.where(coherent & np.isfinite(resampled), resampled, -np.inf)
    chose = np.isfinite(eligible).any(axis=1)
    # The first of equal cells wins: the lower layer, as the cells are sorted.
    winners = eligible.argmax(axis=1)[chose]
    if not len(winners):
        return None
    left_out = _weighted_means(gains, questions, (weights == 0).astype(np.float64))[chose]
    held = left_out[np.arange(len(winners)), winners]
    layers = np.array([each.layer for each in cells])[winners]
    found, counts = np.unique(layers, return_counts=True)
    return Selection(
        {int(at): float(count / len(winners)) for at, count in zip(found, counts, strict=True)},
        float(np.nanmean(held)) if np.isfinite(held).any() else None,
    )


def _weighted_means(
    values: Sequence[Mapping[int, float]], questions: Sequence[int], weights: Array
) -> Array:
    """Return the weighted mean of every cell over its questions: ``[resamples, cells]``."""
    sums = np.array([[each.get(question, 0.0) for question in questions] for each in values])
    counts = np.array([[float(question in each) for question in questions] for each in values])
    return weighted_means(sums, counts, weights)
