"""One self-contained HTML file on one or several sweeps: plot, table, answers, provenance.

Reads run folders and writes text. Every number comes from ``summary``; nothing is loaded from the
network when the file is opened.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from persona_lora.analysis import wording
from persona_lora.analysis.plots.sweep import render_sweep, render_sweeps
from persona_lora.analysis.scores import Condition, ScoredAnswer, score_answers
from persona_lora.analysis.summary import SweepSummary, summarise_run
from persona_lora.core.errors import UserError
from persona_lora.core.files import write_text
from persona_lora.core.runs import Run

EXAMPLE_COEFFICIENTS = (-1.5, 0.0, 1.5)
EXAMPLE_QUESTIONS = 4
LISTED_ANSWERS = 3000
WEAK_AUC = 0.8


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


@dataclass(frozen=True)
class Section:
    """Everything the template shows of one run."""

    anchor: str
    summary: SweepSummary
    plot: str
    validations: tuple[Validation, ...]
    examples: tuple[Question, ...]
    listed: tuple[Question, ...]
    unlisted: int
    status: str
    provenance: tuple[tuple[str, str], ...]
    settings: tuple[tuple[str, str], ...]


def write_report(
    runs: Path | Sequence[Path],
    path: Path,
    *,
    coefficients: Sequence[float] = EXAMPLE_COEFFICIENTS,
    seed: int = 0,
) -> Path:
    """Write the report of one or several sweep run folders to ``path`` and return it.

    ``coefficients`` are those whose answers stand side by side; where one was not run, the nearest
    is shown. Raises UserError for a folder that holds no sweep.
    """
    folders = [Path(runs)] if isinstance(runs, str | Path) else [Path(run) for run in runs]
    if not folders:
        raise UserError("no run to report on; name at least one run folder")
    sections = [
        _section(Run(folder), f"run-{index}", coefficients, seed)
        for index, folder in enumerate(folders, start=1)
    ]
    summaries = [section.summary for section in sections]
    overview = _data_uri(render_sweeps(summaries)) if len(summaries) > 1 else None
    template = _environment().get_template("report.html.j2")
    write_text(Path(path), template.render(sections=sections, overview=overview))
    return Path(path)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("persona_lora", "analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["wording"] = wording
    environment.globals["weak_auc"] = WEAK_AUC
    return environment


def _section(run: Run, anchor: str, coefficients: Sequence[float], seed: int) -> Section:
    record = run.record
    summary = summarise_run(run, seed=seed)
    scored = score_answers(run.read("answers"), run.read("verdicts"), summary.trait)
    questions = _questions(scored)
    chosen = _nearest(summary, coefficients)
    step = max(1, len(questions) // EXAMPLE_QUESTIONS)
    listed, unlisted = _listed(questions)
    return Section(
        anchor=anchor,
        summary=summary,
        plot=_data_uri(render_sweep(summary)),
        validations=tuple(_validation(row) for row in run.read("validation")),
        examples=tuple(
            _example(rows, chosen) for rows in questions[: step * EXAMPLE_QUESTIONS : step]
        ),
        listed=listed,
        unlisted=unlisted,
        status=record["status"],
        provenance=_provenance(run, record),
        settings=tuple((key, _text(value)) for key, value in record["config"].items()),
    )


def _nearest(summary: SweepSummary, coefficients: Sequence[float]) -> list[float]:
    """Return the run coefficients nearest to the wanted ones, ascending, each once."""
    points = [each.coefficient for each in summary.steered if each.coefficient is not None]
    if not points:
        return []
    return sorted({min(points, key=lambda point: abs(point - wanted)) for wanted in coefficients})


def _questions(scored: Sequence[ScoredAnswer]) -> list[list[ScoredAnswer]]:
    """Group the answers by question, in the order of condition and sample within each."""

    def place(row: ScoredAnswer) -> tuple[int, bool, float, str, int]:
        method, coefficient = row.condition
        answer = row.answer
        order = (coefficient is None, coefficient or 0.0, method, answer["sample"])
        return (answer["question_id"], *order)

    ordered = sorted(scored, key=place)
    return [list(rows) for _, rows in groupby(ordered, key=lambda row: row.answer["question_id"])]


def _example(rows: Sequence[ScoredAnswer], coefficients: Sequence[float]) -> Question:
    """Return one question with the first sample at each chosen coefficient and prompt."""
    first: dict[Condition, ScoredAnswer] = {}
    for row in rows:
        first.setdefault(row.condition, row)
    steered = [row for condition, row in first.items() if condition.coefficient in coefficients]
    prompted = [row for condition, row in first.items() if condition.coefficient is None]
    text = str(rows[0].answer["question"])
    return Question(text, tuple(map(_card, steered)), tuple(map(_card, prompted)))


def _listed(questions: Sequence[Sequence[ScoredAnswer]]) -> tuple[tuple[Question, ...], int]:
    """Return whole questions with all their answers up to the limit, and how many are left out."""
    listed: list[Question] = []
    shown = 0
    for rows in questions:
        if listed and shown + len(rows) > LISTED_ANSWERS:
            break
        shown += len(rows)
        listed.append(Question(str(rows[0].answer["question"]), tuple(map(_card, rows)), ()))
    return tuple(listed), sum(map(len, questions)) - shown


def _card(row: ScoredAnswer) -> Card:
    return Card(
        label=_label(row.condition),
        answer=str(row.answer["answer"]),
        trait=row.trait,
        coherence=row.coherence,
        finished=bool(row.answer["finished"]),
    )


def _label(condition: Condition) -> str:
    if condition.coefficient is not None:
        return wording.coefficient(condition.coefficient)
    return wording.method_label(condition.method)


def _validation(row: Mapping[str, Any]) -> Validation:
    return Validation(
        criterion=str(row["criterion"]),
        judge=str(row["judge"]),
        auc=row["auc"],
        spearman=row["spearman"],
        n=int(row["n"]),
        coverage=float(row["coverage"]),
    )


def _provenance(run: Run, record: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    arguments = " ".join(record["arguments"])
    return (
        ("Run folder", str(run.folder)),
        ("Model", _text(record["config"].get("model"))),
        ("Diff", _text(record["config"].get("diff"))),
        ("Judge", _text(record["config"].get("judge"))),
        ("Command", f"persona-lora {arguments}" if arguments else str(record["command"])),
        ("Seed", str(record["seed"])),
        ("Commit", _text(record["git_commit"])),
        ("Versions", versions),
        ("Started", _text(record["started"])),
        ("Ended", _text(record["ended"])),
    )


def _text(value: Any) -> str:
    if value is None:
        return "not recorded"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
