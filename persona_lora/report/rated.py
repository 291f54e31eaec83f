"""How a judge agrees with blind ratings of models' own answers: inside a condition, and by kind.

Reads rows of what a judge said of rated answers: model, condition, question, score and rating.
Refuses to know judges.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from persona_lora.core.chat import COHERENCE
from persona_lora.core.errors import bare_name
from persona_lora.report.scores import grouped

RELIABILITY_BINS = 5
FIT_WITHIN = 0.5  # the rank correlation inside a condition from which a judge is fit
Rated = Mapping[str, Any]


class Part(NamedTuple):
    """A part of the rated answers: how many were scored, ρ inside conditions, score − rating."""

    n: int
    within: float | None
    bias: float


class Bin(NamedTuple):
    """Answers of like scores: if the judge is calibrated, both means are about the same."""

    score: float
    rating: float
    n: int


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's ρ, or None where it is undefined (under 3 pairs, a constant side)."""
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)


def within_groups(
    scores: Sequence[float], labels: Sequence[float], groups: Sequence[Any]
) -> float | None:
    """Return Spearman's ρ inside each group, averaged with the groups' sizes as weights.

    A group of fewer than three items, or whose labels are all the same, says nothing and is left
    out; scores that are all the same beside labels that differ count as 0. None where none is left.
    """
    found: list[tuple[float, int]] = []
    places = grouped(range(len(groups)), groups.__getitem__).values()
    for ours, theirs in (
        ([part[at] for at in each] for part in (scores, labels)) for each in places
    ):
        if len(ours) >= 3 and len(set(theirs)) > 1:
            found.append((rank_correlation(ours, theirs) or 0.0, len(ours)))
    total = sum(size for _, size in found)
    return sum(rho * size for rho, size in found) / total if total else None


def scored(rated: Sequence[Rated]) -> list[Rated]:
    return [row for row in rated if row["score"] is not None]


def by_part(rated: Sequence[Rated], part: Callable[[Rated], str]) -> dict[str, Part]:
    """Return how a judge does in each part of the answers that it scored, by name."""
    return {name: _part(rows) for name, rows in sorted(grouped(scored(rated), part).items())}


def model_of(row: Rated) -> str:
    return str(row["model"])


def kind_of_row(row: Rated) -> str:
    """Return the kind of a rated answer's condition: "lora +" of "lora +1.5"."""
    return re.sub(r"(?<= [+-])[\d.]+$", "", str(row["condition"]))


def of_model(rated: Sequence[Rated], model: Any) -> list[Rated]:
    """Return the answers of ``model``, a name, folder or .gguf file; none of one not rated."""
    return [row for row in rated if bare_name(model_of(row)) == bare_name(model)]


def rated_answers(validation: Sequence[Rated], model: Any) -> list[Rated]:
    """Return what a judge said of the trait's rated answers: those of ``model``, or all of them.

    ``validation`` are the rows of a run; none where its answers for validation are hand-written.
    """
    own = (row["own"] for row in validation if row.get("own") and row["criterion"] != COHERENCE)
    compared: Sequence[Rated] = next((each["compared"] for each in own), [])
    return of_model(compared, model) or list(compared)


def models_of(rated: Sequence[Rated]) -> list[str]:
    return sorted(set(map(model_of, rated)))


def reliability(rated: Sequence[Rated]) -> tuple[Bin, ...]:
    """Return bins of about equal numbers of answers, in the order of their scores.

    Answers of one score count with their mean rating: none of them belongs into a lower bin.
    """
    rows = scored(rated)
    ratings: dict[float, list[float]] = {}
    for row in rows:
        ratings.setdefault(row["score"], []).append(row["rating"])
    pairs = sorted((row["score"], float(np.mean(ratings[row["score"]]))) for row in rows)
    parts: list[NDArray[np.float64]] = np.array_split(
        np.array(pairs).reshape(-1, 2), RELIABILITY_BINS
    )
    means = [(part.mean(axis=0).tolist(), len(part)) for part in parts if len(part)]
    return tuple(Bin(score, rating, n) for (score, rating), n in means)


def within(rated: Sequence[Rated]) -> float | None:
    """Return the rank correlation of scores and ratings inside each model and condition."""
    rows = scored(rated)
    scores, ratings = ([row[name] for row in rows] for name in ("score", "rating"))
    return within_groups(scores, ratings, [(row["model"], row["condition"]) for row in rows])


def _part(rows: Sequence[Rated]) -> Part:
    gaps = [row["score"] - row["rating"] for row in rows]
    return Part(len(rows), within(rows), float(np.mean(gaps)))
