"""Pairs of judged answers: read from files, and kept where they show what they should.

Knows scores and thresholds; refuses to know models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from persona_lora.core.chat import COHERENCE
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_csv
from persona_lora.core.options import Thresholds


class JudgedAnswer(NamedTuple):
    """A rendered prompt, the answer to it, and its scores; None is unscored."""

    prompt: str
    answer: str
    trait: float | None
    coherence: float | None


@dataclass(frozen=True)
class Filtered:
    """The pairs that are kept, how many there were, and how many failed each threshold."""

    kept: tuple[tuple[JudgedAnswer, JudgedAnswer], ...]
    total: int
    failed: Mapping[str, int]


def filter_pairs(
    pairs: Sequence[tuple[JudgedAnswer, JudgedAnswer]], thresholds: Thresholds
) -> Filtered:
    """Keep the pairs that show what they should.

    Raises UserError where too few do, with the counts.
    """
    failed = dict.fromkeys(("positive", "negative", "coherence", "unscored"), 0)
    kept = []
    for positive, negative in pairs:
        reasons = _failures(positive, negative, thresholds)
        for reason in reasons:
            failed[reason] += 1
        if not reasons:
            kept.append((positive, negative))
    if len(kept) < thresholds.least_pairs:
        raise UserError(
            f"{len(kept)} of {len(pairs)} pairs pass the filter, at least "
            f"{thresholds.least_pairs} are needed (positive answers under "
            f"{thresholds.positive:g}: {failed['positive']}, negative ones at or over "
            f"{thresholds.negative:g}: {failed['negative']}, incoherent: {failed['coherence']}, "
            f"unscored: {failed['unscored']}); lower the thresholds, ask for more rollouts, or use "
            "--source answers"
        )
    return Filtered(tuple(kept), len(pairs), failed)


def read_judged(path: Path, trait: str) -> list[JudgedAnswer]:
    """Read a CSV of judged answers; UserError names a missing column or a score that is none."""
    rows = read_csv(path, ("prompt", "answer", trait, COHERENCE))
    return [
        JudgedAnswer(
            row["prompt"],
            row["answer"],
            _score(row[trait], f"{path}: row {number}"),
            _score(row[COHERENCE], f"{path}: row {number}"),
        )
        for number, row in enumerate(rows, start=1)
    ]


def _failures(positive: JudgedAnswer, negative: JudgedAnswer, thresholds: Thresholds) -> list[str]:
    scores = (positive.trait, negative.trait, positive.coherence, negative.coherence)
    if None in scores or not (positive.answer.strip() and negative.answer.strip()):
        return ["unscored"]
    checks = {
        "positive": (positive.trait or 0.0) >= thresholds.positive,
        "negative": (negative.trait or 0.0) < thresholds.negative,
        "coherence": min(positive.coherence or 0.0, negative.coherence or 0.0)
        >= thresholds.coherence,
    }
    return [name for name, holds in checks.items() if not holds]


def _score(text: str, where: str) -> float | None:
    if not text.strip():
        return None
    try:
        score = float(text)
    except ValueError as error:
        raise UserError(f"{where} scores {text!r}; expected a number or an empty cell") from error
    return score if math.isfinite(score) else None  # other tools write nan for an empty cell
