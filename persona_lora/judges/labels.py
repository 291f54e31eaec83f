"""Answers that models really gave, rated blind twice: what a judge is fitted to and checked on.

A trait's ``onpolicy.jsonl`` holds one answer a row: {"question", "answer", "model", "condition",
"part", "trait": [a, b], "sense": [a, b]}. Both scales are 0–100, a and b are of two passes that did
not see each other. A judge may be fitted to the part "tuning" alone; "validation" is for telling
how good it is. Refuses to know judges, and who rated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from persona_lora.core.chat import Exchange
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_jsonl
from persona_lora.core.traits import ON_POLICY, Trait

Part = Literal["tuning", "validation"]
Scale = Literal["trait", "sense"]
SCALES: tuple[Scale, ...] = get_args(Scale)
KEYS = {"question", "answer", "model", "condition", "part", *SCALES}


@dataclass(frozen=True)
class RatedAnswer:
    """An answer, what gave it, and what each of two blind passes found, 0–100."""

    question: str
    answer: str
    model: str
    condition: str
    part: Part
    trait: tuple[float, float]
    sense: tuple[float, float]

    @property
    def exchange(self) -> Exchange:
        """What a judge sees of it."""
        return Exchange(self.question, self.answer)

    def rating(self, scale: Scale) -> float:
        """Return the mean of both passes."""
        return sum(self.passes(scale)) / 2

    def passes(self, scale: Scale) -> tuple[float, float]:
        """Return what each pass found on a scale."""
        return self.trait if scale == "trait" else self.sense


def has_ratings(trait: Trait) -> bool:
    """Tell whether a trait has rated answers of models."""
    return (trait.folder / ON_POLICY).is_file()


def load_ratings(trait: Trait, part: Part | None = None) -> list[RatedAnswer]:
    """Load a trait's rated answers, all or those of one part.

    Raises UserError, naming the line, for a row that lacks a key or has another, a rating that is
    no number of 0–100, and an answer that stands there twice.
    """
    path = trait.folder / ON_POLICY
    rows = [_parsed(row, f"{path}:{line}") for line, row in enumerate(read_jsonl(path), start=1)]
    lines: dict[tuple[str, str], int] = {}
    for line, row in enumerate(rows, start=1):
        first = lines.setdefault((row.question, row.answer), line)
        if first != line:
            raise UserError(f"{path}:{line} is the answer of line {first} again; leave one out")
    missing = [each for each in get_args(Part) if all(row.part != each for row in rows)]
    if missing:
        raise UserError(f"{path} has no row of the part {missing[0]!r}; a judge needs both parts")
    return [row for row in rows if part in (None, row.part)]


def _parsed(row: dict[str, Any], where: str) -> RatedAnswer:
    if set(row) != KEYS:
        lacking, strange = sorted(KEYS - set(row)), sorted(set(row) - KEYS)
        fault = f"has no {lacking[0]!r}" if lacking else f"has {strange[0]!r}, which is not known"
        raise UserError(f"{where} {fault}; expected the keys {', '.join(sorted(KEYS))}")
    texts = {key: row[key] for key in ("question", "answer", "model", "condition")}
    for key, value in texts.items():
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: {key} must be a text that is not empty, got {value!r}")
    if row["part"] not in get_args(Part):
        raise UserError(f"{where}: part must be tuning or validation, got {row['part']!r}")
    trait, sense = (_passes(row[scale], f"{where}: {scale}") for scale in SCALES)
    return RatedAnswer(**texts, part=row["part"], trait=trait, sense=sense)


def _passes(value: Any, where: str) -> tuple[float, float]:
    numbers = isinstance(value, list) and len(value) == 2 and all(map(_is_rating, value))
    if not numbers:
        raise UserError(f"{where} must be two ratings from 0 to 100, got {ascii(value)[:60]}")
    return float(value[0]), float(value[1])


def _is_rating(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 100
