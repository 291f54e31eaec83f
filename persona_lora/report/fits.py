"""Persona fit by condition, and paired differences between conditions. Knows rows only.

A row is one answer to one held-out prompt: ``persona``, ``condition``, ``prompt_id``, ``score``
(1–5 or None), ``coherence`` and ``relevance`` (0–100 or None).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from persona_lora.report.resampling import Interval, bootstrap_mean, holm, sign_flip_p

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ConditionFit:
    """The mean fit, coherence and relevance of a condition; intervals over prompts or personas.

    ``difference`` is its fit minus that of the reference on the same prompts, ``p`` a two-sided
    sign-flip test on the units' means, ``p_holm`` corrected over the conditions compared, and
    ``effect_size`` the mean of the units' differences over their standard deviation (Cohen's d_z).
    All four are None for the reference itself.
    """

    condition: str
    fit: Interval
    coherence: Interval
    relevance: Interval
    difference: Interval | None
    p: float | None
    effect_size: float | None = None
    p_holm: float | None = None


def fits_over_prompts(rows: Sequence[Row], reference: str) -> list[ConditionFit]:
    """Return the fit of every condition of one persona; the units are prompts."""
    return _fits(rows, reference, unit="prompt_id")


def fits_over_personas(rows: Sequence[Row], reference: str) -> list[ConditionFit]:
    """Return the fit of every condition over personas: whole personas are drawn, not prompts."""
    return _fits(rows, reference, unit="persona")


def strict_rows(rows: Sequence[Row], least: float) -> list[dict[str, Any]]:
    """Return rows in which an answer of a coherence under ``least`` has the worst fit, 1.

    A judge of style is fooled by broken text; what of a fit is left then is there in sentences.
    """
    return [
        {**row, "score": 1.0}
        if row["coherence"] is not None and row["coherence"] < least
        else dict(row)
        for row in rows
    ]


def _fits(rows: Sequence[Row], reference: str, *, unit: str) -> list[ConditionFit]:
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    units = {name: at for at, name in enumerate(dict.fromkeys(row[unit] for row in rows))}
    ours = _scores(rows, reference)
    found = [
        ConditionFit(
            name,
            bootstrap_mean(_grouped(rows, name, unit, units, "score")),
            bootstrap_mean(_grouped(rows, name, unit, units, "coherence")),
            bootstrap_mean(_grouped(rows, name, unit, units, "relevance")),
            *_against(rows, name, unit, units, ours if name != reference else {}),
        )
        for name in conditions
    ]
    corrected = holm([each.p for each in found])
    return [replace(each, p_holm=adjusted) for each, adjusted in zip(found, corrected, strict=True)]


def _scores(rows: Sequence[Row], condition: str) -> dict[tuple[Any, Any], float]:
    return {
        (row["persona"], row["prompt_id"]): row["score"]
        for row in rows
        if row["condition"] == condition and row["score"] is not None
    }


def _grouped(
    rows: Sequence[Row], condition: str, unit: str, units: Mapping[Any, int], key: str
) -> dict[int, list[float | None]]:
    grouped: dict[int, list[float | None]] = {}
    for row in rows:
        if row["condition"] == condition:
            grouped.setdefault(units[row[unit]], []).append(row[key])
    return grouped


def _against(
    rows: Sequence[Row],
    condition: str,
    unit: str,
    units: Mapping[Any, int],
    reference: Mapping[tuple[Any, Any], float],
) -> tuple[Interval | None, float | None, float | None]:
    if not reference:
        return None, None, None
    at = {"persona": 0, "prompt_id": 1}[unit]
    differences: dict[int, list[float | None]] = {}
    for place, score in _scores(rows, condition).items():
        if place in reference:
            differences.setdefault(units[place[at]], []).append(score - reference[place])
    if not differences:
        return None, None, None
    means = np.array([np.mean([value for value in each if value is not None])
                      for each in differences.values()])  # fmt: skip
    spread = float(means.std(ddof=1)) if len(means) > 1 else 0.0
    size = float(means.mean()) / spread if spread > 0 else None
    return bootstrap_mean(differences), sign_flip_p(means), size
