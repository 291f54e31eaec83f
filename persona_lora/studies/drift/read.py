"""Reading ``evaluate-checkpoints`` runs: curves over steps, agreement, and cross-persona tables.

Every function starts from the rows of ``checkpoints.jsonl`` and ``cosines.jsonl``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import pearsonr, rankdata, spearmanr

from persona_lora.core.chat import COHERENCE
from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.comparisons import PROBE, TaskScore, score_items
from persona_lora.report.correction import errors_of, kind_of_model, less, put_right
from persona_lora.report.resampling import SCORES, rank_correlation, share_of_orders
from persona_lora.report.scores import Row, grouped
from persona_lora.report.sections import Table
from persona_lora.report.trust import judges_behind

FEWEST_POINTS = 4


@dataclass(frozen=True)
class Point:
    """One statistic of one checkpoint, with its interval; None where it could not be had."""

    step: int
    mean: float | None
    low: float | None
    high: float | None


NOWHERE = Point(0, None, None, None)  # of a curve that was not measured


@dataclass(frozen=True)
class Curve:
    """One statistic over the steps of a finetune."""

    trait: str
    statistic: str
    vector: str | None
    layer: int | None
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Correlation:
    """How two numbers go together over ``n`` points; ``p`` is a permutation test on ρ.

    None with a reason where there are too few points, or one of them does not vary.
    """

    rho: float | None
    r: float | None
    p: float | None
    n: int
    reason: str | None = None


@dataclass(frozen=True)
class Agreement:
    """Over checkpoints: does a projection (or shift) on a vector go with the judged trait?"""

    trait: str
    statistic: str
    vector: str
    layer: int
    correlation: Correlation


@dataclass(frozen=True)
class CrossPoint:
    """One finetune looked at through another trait's vector.

    ``cosine`` is between the vectors of the trait finetuned on and of the other trait;
    ``score`` is the other trait's judged score at the last checkpoint minus the base's, and
    ``shift`` the finetuning shift on the other trait's vector there.
    """

    finetuned_on: str
    other: str
    layer: int
    cosine: float
    score: float | None
    shift: float | None


def curves(run: Run) -> list[Curve]:
    """Return every curve of a run, in the order of its rows."""
    rows = run.read("checkpoints")
    if not rows:
        raise UserError(f"{run.folder} holds no rows of checkpoints; run evaluate-checkpoints")
    places = grouped(rows, lambda r: (r["trait"], r["statistic"], r["vector"], r["layer"]))
    by_step = {at: sorted(own, key=lambda row: int(row["step"])) for at, own in places.items()}
    return [
        Curve(*at, tuple(Point(r["step"], r["value"], r["low"], r["high"]) for r in own))
        for at, own in by_step.items()
    ]


def answers_of(run: Run, trait: str) -> dict[str, Run]:
    """Return the runs that hold the answers on a trait, by checkpoint."""
    names = dict.fromkeys(row["checkpoint"] for row in run.read("checkpoints"))
    return {name: Run(run.folder / "answers" / f"{name}_{trait}") for name in names}


def prevention_scores(run: Run, rows: Sequence[Row], reference: str) -> list[TaskScore]:
    """Return ``score_items`` of a comparison of finetunes, with who judged what a judge gave.

    The trait of answers that nothing probed is corrected for the judge's error: probed ones are of
    no kind that was rated.
    """
    trait = run.record["config"]["trait"]
    judges = {"trait": judges_behind(run, trait), COHERENCE: judges_behind(run, COHERENCE)}
    labels = {row["condition"]: f"{row['condition']} {row.get('seed', '')}".strip() for row in rows}
    answers = {name: Run(run.folder / "answers" / label) for name, label in labels.items()}
    kinds = {
        name: {kind_of_model(own, finetuned=bool(own.record["config"].get("adapter"))): 1.0}
        for name, own in answers.items()
    }
    errors = errors_of(answers[reference], trait)
    found = []
    for each in score_items(rows, reference):
        if each.task == "trait":
            kind = kinds[each.condition]
            gap = put_right(each.difference, errors, less(kind, kinds[reference]))
            score = put_right(each.score, errors, kind, SCORES)
            each = replace(each, score_corrected=score, difference_corrected=gap)
        found.append(replace(each, judge=judges.get(each.task.partition(PROBE)[0], "")))
    return found


def agreements(run: Run) -> list[Agreement]:
    """Return the correlation of every projection and shift with the score of the same trait."""
    every = curves(run)
    scores = {curve.trait: curve for curve in every if curve.statistic == "trait"}
    return [
        Agreement(
            c.trait, c.statistic, c.vector, c.layer, correlation(*paired(c, scores[c.trait])[1:])
        )
        for c in every
        if c.vector is not None and c.layer is not None and c.trait in scores
    ]


def cross_persona(runs: Sequence[Run]) -> list[CrossPoint]:
    """Return one point for every finetune and every other trait that was judged and has a vector.

    Vectors are matched to traits by the beginning of their own trait, or of their name where they
    have none: those of variants belong to the trait.
    """
    points = []
    for run in runs:
        tuned = run.record["config"].get("finetuned_on")
        if tuned is None:
            raise UserError(f"{run.folder} does not say what it was finetuned on (--finetuned-on)")
        by_place = {(c.trait, c.statistic, c.vector, c.layer): c.points for c in curves(run)}
        traits = sorted({trait for trait, *_ in by_place})
        for row in run.read("cosines"):
            names, layer = (row["vector"], row["other"]), row["layer"]
            told = {row[each]: row.get(f"{each}_trait") for each in ("vector", "other")}
            own = next((name for name in names if _is_of(name, told[name], tuned)), None)
            vector = names[1] if names[0] == own else names[0]
            other = next((trait for trait in traits if _is_of(vector, told[vector], trait)), None)
            if own is None or other in (None, tuned):
                continue
            scores = by_place.get((other, "trait", None, None), [NOWHERE])
            shifts = by_place.get((other, "shift", vector, layer), ())
            first, last = scores[0].mean, scores[-1].mean
            change = None if first is None or last is None else last - first
            shift = {point.step: point.mean for point in shifts}.get(scores[-1].step)
            points.append(CrossPoint(tuned, other, layer, row["cosine"], change, shift))
    return points


def correlation(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Return Spearman's ρ with its permutation p, and Pearson's r, of paired numbers."""
    n = len(x)
    if n < FEWEST_POINTS:
        return Correlation(None, None, None, n, f"{n} points, at least {FEWEST_POINTS} needed")
    if len(set(x)) == 1 or len(set(y)) == 1:
        return Correlation(None, None, None, n, "one of the two does not vary")
    rho, r = (float(each(x, y).statistic) for each in (spearmanr, pearsonr))
    ranks_x, ranks_y = rankdata(x), rankdata(y)
    p = share_of_orders(lambda orders: np.abs(rank_correlation(ranks_x, ranks_y[orders])), n)
    return Correlation(rho, r, p, n)


def paired(one: Curve, other: Curve) -> tuple[list[int], list[float], list[float]]:
    """Return the steps at which both of two curves have a value, and the values of each."""
    first, second = (
        {point.step: point.mean for point in curve.points if point.mean is not None}
        for curve in (one, other)
    )
    both = [step for step in first if step in second]
    return both, [first[step] for step in both], [second[step] for step in both]


def _is_of(vector: str, told: str | None, trait: str) -> bool:
    name = told or vector.rpartition("/")[2]
    return name == trait or name.startswith(f"{trait}_")


def checkpoints_table(run: Run) -> Table:
    """Return every statistic of every checkpoint."""
    rows = (
        [row["checkpoint"], row["trait"], row["statistic"], row["vector"] or ""]
        + ["" if row["layer"] is None else str(row["layer"]), wording.number(row["value"], 2)]
        + [wording.span(row["low"], row["high"], 2)]
        for row in run.read("checkpoints")
    )
    return Table.of("checkpoint | asked on | what | vector | layer | mean | 95%", rows)
