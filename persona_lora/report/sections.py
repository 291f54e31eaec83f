"""What the sections of a report share: answers as cards, the judge's validation, provenance.

Reads run folders into plain values for templates. Refuses to know kinds of runs.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.figures import Picture
from persona_lora.report.scores import CONTROL, Condition, ScoredAnswer

EXAMPLE_COEFFICIENTS = (-1.5, 0.0, 1.5)
EXAMPLE_QUESTIONS = 4
LISTED_ANSWERS = 3000
WEAK_AUC = 0.8


@dataclass(frozen=True)
class ReportOptions:
    """``coefficients`` whose answers stand side by side; the seed of all resampling."""

    coefficients: tuple[float, ...] = EXAMPLE_COEFFICIENTS
    seed: int = 0


@dataclass(frozen=True)
class Content:
    """What one run has to say: a title, its finding, and the body that ``template`` shows."""

    template: str
    title: str
    lead: str
    body: Any


@dataclass(frozen=True)
class Card:
    """One answer as shown: what produced it, its text and its scores."""

    label: str
    answer: str
    trait: float | None
    coherence: float | None
    finished: bool


@dataclass(frozen=True)
class Question:
    """One question with the answers to it, side by side; references are the prompted ones."""

    text: str
    steered: tuple[Card, ...]
    references: tuple[Card, ...]


@dataclass(frozen=True)
class Listing:
    """Whole questions with all their answers, and how many answers are left out."""

    questions: tuple[Question, ...]
    unlisted: int


@dataclass(frozen=True)
class Validation:
    """How well a judge agreed with hand-labelled answers on one criterion."""

    criterion: str
    judge: str
    auc: float | None
    spearman: float | None
    n: int
    coverage: float

    @property
    def weak(self) -> bool:
        """Whether the judge misses the AUC below which its scores say little."""
        return self.auc is None or self.auc < WEAK_AUC


def by_question(scored: Iterable[ScoredAnswer]) -> list[list[ScoredAnswer]]:
    """Group answers by question; within each: coefficients, the control, then references."""

    def place(row: ScoredAnswer) -> tuple[int, bool, bool, float, str, int]:
        method, coefficient = row.condition.method, row.condition.coefficient
        order = (coefficient is None, method == CONTROL, coefficient or 0.0, method)
        return (row.answer["question_id"], *order, row.answer["sample"])

    ordered = sorted(scored, key=place)
    return [list(rows) for _, rows in groupby(ordered, key=lambda row: row.answer["question_id"])]


def examples(
    questions: Sequence[Sequence[ScoredAnswer]],
    steered: Collection[Condition],
    references: Collection[Condition],
) -> tuple[Question, ...]:
    """Return questions spread evenly over the list, with the first sample of each condition."""
    step = max(1, len(questions) // EXAMPLE_QUESTIONS)
    return tuple(
        _example(rows, steered, references) for rows in questions[: step * EXAMPLE_QUESTIONS : step]
    )


def listing(questions: Sequence[Sequence[ScoredAnswer]]) -> Listing:
    """Return whole questions with all their answers, up to a limit of answers."""
    listed: list[Question] = []
    shown = 0
    for rows in questions:
        if listed and shown + len(rows) > LISTED_ANSWERS:
            break
        shown += len(rows)
        listed.append(Question(str(rows[0].answer["question"]), tuple(map(card, rows)), ()))
    return Listing(tuple(listed), sum(map(len, questions)) - shown)


def card(row: ScoredAnswer) -> Card:
    """Return one answer as it is shown."""
    return Card(
        label=wording.condition_label(row.condition.method, row.condition.coefficient),
        answer=str(row.answer["answer"]),
        trait=row.trait,
        coherence=row.coherence,
        finished=bool(row.answer["finished"]),
    )


def validations(run: Run) -> tuple[Validation, ...]:
    """Return how the run's judge agreed with hand-labelled answers, by criterion."""
    return tuple(
        Validation(
            criterion=str(row["criterion"]),
            judge=str(row["judge"]),
            auc=row["auc"],
            spearman=row["spearman"],
            n=int(row["n"]),
            coverage=float(row["coverage"]),
        )
        for row in run.read("validation")
    )


def provenance(run: Run, record: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return where a run's numbers come from, as names and values."""
    config = record["config"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    arguments = " ".join(record["arguments"])
    steered = (("Diff", "diff"), ("Vector", "vector_path"))
    return (
        ("Run folder", str(run.folder)),
        ("Model", text_of(config.get("model"))),
        *((name, text_of(config[key])) for name, key in steered if key in config),
        ("Judge", text_of(config.get("judge"))),
        ("Command", f"persona-lora {arguments}" if arguments else str(record["command"])),
        ("Seed", str(record["seed"])),
        ("Commit", text_of(record["git_commit"])),
        ("Versions", versions),
        ("Started", text_of(record["started"])),
        ("Ended", text_of(record["ended"])),
    )


def text_of(value: Any) -> str:
    """Return a recorded value as text."""
    if value is None:
        return "not recorded"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def data_uri(picture: Picture) -> str:
    """Return a picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(picture.png()).decode("ascii")


def _example(
    rows: Sequence[ScoredAnswer],
    steered: Collection[Condition],
    references: Collection[Condition],
) -> Question:
    first: dict[Condition, ScoredAnswer] = {}
    for row in rows:
        first.setdefault(row.condition, row)
    return Question(
        str(rows[0].answer["question"]),
        tuple(card(row) for condition, row in first.items() if condition in steered),
        tuple(card(row) for condition, row in first.items() if condition in references),
    )
