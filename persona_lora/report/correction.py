"""Means corrected for their judge's error, by answers that were also rated.

A judge that is 10 points too kind to steered answers makes a steering of 10 points out of nothing.
Where answers of a condition's kind were rated, the mean is put right by what the judge gets wrong
there, and the interval carries both uncertainties (prediction-powered inference):

    θ = f̄ + (y − f)‾,    Var θ = Var(f̄) + Var((y − f)‾)

with f̄ over the run's answers, and y − f, rating minus score, over the rated ones; the units are
questions. A change between conditions is put right by the errors of either side. What is of no
rated kind is not corrected: of random directions, of probed answers and of other traits' diffs it
is not known how far the judge misses. Nor is a single answer, nor what is not linear in the scores,
such as a distance or a share. Refuses to know which judge it was.

Source:
    Angelopoulos et al. 2023, "Prediction-powered inference", Science 382; arXiv:2301.09633.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

from persona_lora.core.chat import Condition
from persona_lora.core.runs import Run
from persona_lora.report.conditions import interval_of
from persona_lora.report.rated import kind_of_row, models_of, rated_answers
from persona_lora.report.resampling import SCORES, Bounds, Interval
from persona_lora.report.scores import SECOND, Row, condition_of
from persona_lora.report.two_way import SAME

FEWEST_QUESTIONS = 3
CONFIDENCE = 0.95
OF_OTHERS = "directions of"  # other traits than the one that is judged, in a run's configuration

# What rated answers call the kinds of conditions; a sign follows where there is a coefficient.
UNSTEERED, FINETUNED = "unsteered", "finetuned"
KINDS = {
    "none": UNSTEERED,
    "lora": "lora",
    "activation": "vector",
    "prompt_pos": "prompt +",
    "prompt_neg": "prompt -",
}


class Errors(NamedTuple):
    """Rating − score by kind of condition and question, and whose answers were rated."""

    by_kind: Mapping[str, Mapping[str, Sequence[float]]]
    models: tuple[str, ...] = ()


def errors_of(run: Run, trait: str, *, by: str = "verdicts") -> Errors:
    """Return how far a run's judge misses the ratings of answers on a trait: none without any.

    They are of the run's own model where that was rated, else of all; ``by`` is the file of the
    judge's verdicts. None, too, of a run whose answers were steered otherwise than rated ones: with
    a system prompt beside, on a condition, or by what was made of another trait.
    """
    config, inputs = run.record["config"], run.record.get("inputs") or {}
    beside = (config.get("condition") or {}).get("system_prompt")
    if beside is not None or "the condition" in inputs or config.get(OF_OTHERS):
        return Errors({})
    rows = run.read("second_validation" if by == SECOND else "validation")
    own = [row for row in rows if row["criterion"] == trait]
    rated = rated_answers(own, run.record["config"].get("model"))
    return Errors(errors_by_kind(rated), tuple(models_of(rated)))


def put_right(
    found: Interval | None,
    errors: Errors,
    weights: Mapping[str | None, float],
    scale: Bounds | None = None,
) -> Interval | None:
    """Return a mean, or a change between conditions, put right by the errors of their kinds.

    ``weights``: by how much each kind of condition stands in it (1 for a mean, 1 and −1 for one
    minus another). The ends move by the shift, and further out as variances of independent errors
    add up; what one question adds to the errors of several kinds is added first. ``scale`` is that
    of a mean, which ends there; one that would leave it shows that the judge errs otherwise here.
    None then, where a kind was rated on fewer than three questions or, None, is none that is rated,
    where there is no interval, and where the same kinds cancel.
    """
    parts = {kind: weight for kind, weight in weights.items() if abs(weight) > SAME}
    if found is None or found.mean is None or found.low is None or found.high is None or not parts:
        return None
    by_kind = {kind: errors.by_kind.get(kind or "", {}) for kind in parts}
    least = min(map(len, by_kind.values()))
    if least < FEWEST_QUESTIONS:
        return None
    shift, added = 0.0, dict[str, float]()
    for kind, weight in parts.items():
        means = {each: float(np.mean(of)) for each, of in by_kind[kind].items()}
        mean = float(np.mean([*means.values()]))
        shift += weight * mean
        for question, own in means.items():
            added[question] = added.get(question, 0.0) + weight * (own - mean) / len(means)
    variance = sum(each**2 for each in added.values()) * least / (least - 1)
    reach = float(student.ppf((1 + CONFIDENCE) / 2, least - 1)) * math.sqrt(variance)
    below, above = (math.hypot(found.mean - end, reach) for end in (found.low, found.high))
    mean = found.mean + shift
    low, high = mean - below, mean + above
    if scale is not None:
        if not scale.low <= mean <= scale.high:
            return None
        low, high = max(scale.low, low), min(scale.high, high)
    return replace(found, mean=mean, low=low, high=high)


def of_condition(
    kind: str | None, mean: Interval | None, change: Interval | None, errors: Errors
) -> tuple[Interval | None, Interval | None]:
    """Return the mean of a kind of condition, and its change from unsteered, put right."""
    own = {kind: 1.0}
    return (
        put_right(mean, errors, own, SCORES),
        put_right(change, errors, less(own, {UNSTEERED: 1.0})),
    )


def less(
    first: Mapping[str | None, float], second: Mapping[str | None, float]
) -> dict[str | None, float]:
    """Return by how much each kind of condition stands in one difference minus another."""
    return {each: first.get(each, 0.0) - second.get(each, 0.0) for each in {**first, **second}}


def kind_of(condition: Condition, *, finetuned: bool = False) -> str | None:
    """Return what rated answers call a condition's kind; None where none is of it.

    Of a finetune's answers those without any steering alone were rated.
    """
    name = KINDS.get(condition.method)
    if name is not None and condition.coefficient is not None:
        plain = condition.coefficient == 0
        name = UNSTEERED if plain else f"{name} {'+' if condition.coefficient > 0 else '-'}"
    if finetuned:
        return FINETUNED if name == UNSTEERED else None
    return name


def errors_by_kind(rated: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return rating − score by kind of condition and question, of rows that a judge scored."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rated:
        if row["score"] is not None:
            of_kind = found.setdefault(kind_of_row(row), {})
            of_kind.setdefault(str(row["question"]), []).append(row["rating"] - row["score"])
    return found


def kind_of_model(run: Run, *, finetuned: bool) -> str | None:
    """Return of which kind all answers of a model are; None where that is not one, or not rated."""
    kinds = {kind_of(condition_of(row), finetuned=finetuned) for row in run.read("answers")}
    return kinds.pop() if len(kinds) == 1 else None


# -- as columns: "low" of a mean is beside "…_corrected_low", empty where nothing corrects it ------

_ENDS = {"corrected": "mean", "corrected_low": "low", "corrected_high": "high"}
LONG_CORRECTED = tuple(f"value_{name}" for name in _ENDS)


def corrected_columns(*names: str) -> dict[str, str]:
    """Return columns, for ``comparisons.write_found``, of intervals called "<name>_corrected"."""
    return {
        f"{each}_{name}": f"{each}_corrected.{end}" for each in names for name, end in _ENDS.items()
    }


def corrected_cells(right: Interval | None) -> dict[str, float | None]:
    """Return a corrected value under the names of the long format."""
    ends = (None if right is None else getattr(right, end) for end in _ENDS.values())
    return dict(zip(LONG_CORRECTED, ends, strict=True))


def with_corrected(rows: Iterable[Row], errors: Errors, *, finetuned: bool) -> list[dict[str, Any]]:
    """Return long rows with the corrected means of the trait and changes from coefficient 0."""
    found = []
    for row in rows:
        told, right = row["statistic"], None
        if told in ("trait", "difference_from_zero"):
            kind = kind_of(Condition(row["method"], row["coefficient"]), finetuned=finetuned)
            mean, change = of_condition(kind, interval_of(row), interval_of(row), errors)
            right = mean if told == "trait" else change
        found.append({**row, **corrected_cells(right)})
    return found
