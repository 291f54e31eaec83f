"""Means corrected for their judge's error, by answers that were also rated.

A judge that is 10 points too kind to steered answers makes a steering of 10 points out of nothing.
Where answers of a condition's kind were rated, the mean is put right by what the judge gets wrong
there, and the interval carries both uncertainties (prediction-powered inference):

    θ = f̄ + (y − f)‾,    Var θ = Var(f̄) + Var((y − f)‾)

with f̄ over the run's answers, and y − f, rating minus score, over the rated ones; the units are
questions, the quantile Student's with Welch and Satterthwaite's degrees of freedom. A change
between conditions is put right by the errors of either side. Refuses to know which judge it was.

Source:
    Angelopoulos et al. 2023, "Prediction-powered inference", Science 382; arXiv:2301.09633.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

from persona_lora.core.chat import Condition
from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.rated import kind_of_row, models_of, rated_answers
from persona_lora.report.resampling import Interval
from persona_lora.report.scores import clusters, condition_of, minus, question_means, score_answers
from persona_lora.report.sections import Table
from persona_lora.report.two_way import SAME, Crossed, mean_gap

FEWEST_QUESTIONS = 3
CONFIDENCE = 0.95

# What rated answers call the kinds of conditions; a sign follows where there is a coefficient.
UNSTEERED, FINETUNED = "unsteered", "finetuned"
KINDS = {
    "none": UNSTEERED,
    "lora": "lora",
    "activation": "vector",
    "prompt_pos": "prompt +",
    "prompt_neg": "prompt -",
}


class CorrectedMean(NamedTuple):
    """The judge's own mean, the corrected one with its interval, and the rated answers used."""

    raw: float
    corrected: float
    low: float
    high: float
    n_rated: int


def corrected_mean(
    scores: Mapping[Any, Sequence[float]], errors: Mapping[Any, Sequence[float]]
) -> CorrectedMean | None:
    """Return the mean of scores by question, corrected by errors (rating − score) by question.

    None where either has fewer than three questions, and where neither varies: nothing is known of
    their spread then.
    """
    if min(len(scores), len(errors)) < FEWEST_QUESTIONS:
        return None
    means = [np.array([np.mean(each) for each in part.values()]) for part in (scores, errors)]
    variances = [float(each.var(ddof=1)) / len(each) for each in means]
    raw, error, variance = float(means[0].mean()), float(means[1].mean()), sum(variances)
    if max(np.ptp(each) for each in means) < SAME:
        return None
    degrees = variance**2 / sum(v**2 / (len(m) - 1) for v, m in zip(variances, means, strict=True))
    reach = float(student.ppf((1 + CONFIDENCE) / 2, degrees)) * math.sqrt(variance)
    low, high = (min(100.0, max(0.0, raw + error + side * reach)) for side in (-1, 1))
    return CorrectedMean(
        raw, min(100.0, max(0.0, raw + error)), low, high, sum(map(len, errors.values()))
    )


def corrected_change(
    change: Interval,
    errors: Mapping[str, Mapping[str, Sequence[float]]],
    weights: Mapping[str, float],
) -> Interval | None:
    """Return a change between conditions, put right by the errors of their kinds.

    ``weights``: by how much each kind of condition stands in the change (1 and −1 for one minus
    another). The ends move by the shift, and further out as variances of independent errors add up;
    what one question adds to the errors of several kinds is added first. None where a kind was
    rated on fewer than three questions, or the change has no interval.
    """
    parts = {kind: weight for kind, weight in weights.items() if abs(weight) > SAME}
    if change.mean is None or change.low is None or change.high is None or not parts:
        return None
    if any(len(errors.get(kind, {})) < FEWEST_QUESTIONS for kind in parts):
        return None
    shift, added = 0.0, dict[str, float]()
    for kind, weight in parts.items():
        means = {each: float(np.mean(of)) for each, of in errors[kind].items()}
        mean = float(np.mean([*means.values()]))
        shift += weight * mean
        for question, own in means.items():
            added[question] = added.get(question, 0.0) + weight * (own - mean) / len(means)
    least = min(len(errors[kind]) for kind in parts)
    variance = sum(each**2 for each in added.values()) * least / (least - 1)
    reach = float(student.ppf((1 + CONFIDENCE) / 2, least - 1)) * math.sqrt(variance)
    low, high = (math.hypot(change.mean - end, reach) for end in (change.low, change.high))
    centre = change.mean + shift
    return replace(change, mean=centre, low=centre - low, high=centre + high)


def kind_of(condition: Condition) -> str | None:
    """Return what rated answers call a condition's kind; None where none is of it."""
    name = KINDS.get(condition.method)
    if name is None or condition.coefficient is None:
        return name
    if condition.coefficient == 0:
        return UNSTEERED
    return f"{name} {'+' if condition.coefficient > 0 else '-'}"


def errors_by_kind(rated: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return rating − score by kind of condition and question, of rows that a judge scored."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rated:
        if row["score"] is not None:
            of_kind = found.setdefault(kind_of_row(row), {})
            of_kind.setdefault(str(row["question"]), []).append(row["rating"] - row["score"])
    return found


def effects_table(rows: Sequence[tuple[str, ...]], models: Sequence[str], said: str = "") -> Table:
    """Return effects, raw and corrected by the ratings of ``models``; ``said`` ends the note."""
    note = (
        "Put right by how far the judge misses the ratings of answers of the same kinds of "
        f"condition ({', '.join(models)}); intervals carry both uncertainties. It is assumed that "
        "the answers at hand are misjudged by as many points as those that were rated: too many "
        f"where their effects are smaller.{said}"
    )
    columns = ("Questions", "Effect", "Raw", "Corrected")[-len(rows[0]) :]
    title = "Effects corrected for the judge’s error"
    return Table(columns, tuple(rows), title, note, narrow=True)


# -- finetunes -----------------------------------------------------------------------------------

OF_FINETUNES = (
    " Rated as finetuned are answers of other finetunes: whether these ones, prevented ones among "
    "them, are misjudged by as much is not known. The same error on both sides, it leaves the "
    "difference of two finetunes as it is."
)


def changes_from(trait: str, runs: Mapping[str, Sequence[Run]], base: str) -> dict[str, Crossed]:
    """Return every model's mean trait minus that of ``base``, paired by question, with its test.

    ``runs`` hold answers and verdicts: one of each training seed of a model, one of the base.
    """
    means = {name: [_means(run, trait) for run in own] for name, own in runs.items()}
    (plain,) = means.pop(base)
    return {name: mean_gap([minus(each, plain) for each in own]) for name, own in means.items()}


def _means(run: Run, trait: str) -> dict[int, float]:
    scored = score_answers(run.read("answers"), run.read("verdicts"), trait)
    return question_means(clusters(scored, trait))


def corrected_finetunes(
    trait: str, runs: Mapping[str, Sequence[Run]], base: str
) -> tuple[Table, ...]:
    """Return ``changes_from`` the base, raw and corrected by errors on finetunes in general.

    Nothing without the base, nor where none was rated; a finetune that is steered on top is of no
    rated kind.
    """
    validation = [row for run in runs.get(base, ()) for row in run.read("validation")]
    if not validation:
        return ()
    rated = rated_answers(validation, runs[base][0].record["config"].get("model"))
    errors, rows = errors_by_kind(rated), []
    for name, (change, _) in changes_from(trait, runs, base).items():
        kinds = {kind_of(condition_of(row)) for row in runs[name][0].read("answers")}
        if kinds == {UNSTEERED}:
            right = corrected_change(change, errors, {FINETUNED: 1.0, UNSTEERED: -1.0})
            if right is not None:
                cells = wording.change(change), wording.change(right)
                rows.append((f"{name} − {base}", *cells))
    return (effects_table(rows, models_of(rated), OF_FINETUNES),) if rows else ()
