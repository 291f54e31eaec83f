"""What the sections of a page consist of: tables, pictures, notes, answers as cards, facts.

A section is a title, its finding, and blocks; the one template ``page.html.j2`` shows each kind.
Reads run folders into plain values. Refuses to know kinds of runs.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined

from persona_lora.core.chat import COHERENCE
from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.figures import Picture
from persona_lora.report.scores import CONTROL, Condition, ScoredAnswer

EXAMPLE_COEFFICIENTS = (-1.5, 0.0, 1.5)
EXAMPLE_QUESTIONS = 4
LISTED_ANSWERS = 3000


# -- blocks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Columns and rows of text, for a page, for Markdown and for the terminal.

    A line end in a heading is one on the page; a cell that is None belongs to the one before it.
    ``styles`` has a word for each row (or none at all):
    "reference", "incoherent", "best". ``note`` says below what the numbers are.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str | None, ...], ...]
    title: str = ""
    note: str = ""
    styles: tuple[str, ...] = ()
    narrow: bool = False
    kind: ClassVar[str] = "table"

    @classmethod
    def of(
        cls,
        columns: str,
        rows: Iterable[Sequence[str | None]],
        title: str = "",
        note: str = "",
        styles: Iterable[str] = (),
        narrow: bool = False,
    ) -> Table:
        """Return a table whose headings stand in one text with " | " between them."""
        cells = tuple(map(tuple, rows))
        return cls(tuple(columns.split(" | ")), cells, title, note, tuple(styles), narrow)

    @staticmethod
    def spans(row: Sequence[str | None]) -> list[tuple[str, int]]:
        """Return the cells of a row, each with how many columns it takes."""
        starts = [at for at, cell in enumerate(row) if cell is not None]
        ends = [*starts[1:], len(row)]
        return [(row[at] or "", end - at) for at, end in zip(starts, ends, strict=True)]

    @property
    def headings(self) -> list[str]:
        """The headings, each on one line."""
        return [column.replace("\n", " ") for column in self.columns]

    def only(self, *places: int) -> Table:
        """Return it with these columns alone, counted from 0: what a terminal has room for."""
        columns = tuple(self.columns[at] for at in places)
        rows = tuple(tuple(row[at] for at in places) for row in self.rows)
        return replace(self, columns=columns, rows=rows)

    def markdown(self) -> str:
        """Return the columns and rows as a table in Markdown."""
        lines = [self.headings, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(cell or "" for cell in line) + " |" for line in lines)


@dataclass(frozen=True)
class Image:
    """A picture as an address that holds it, as wide as its look asks for."""

    address: str
    alt: str
    style: str = "wide"
    kind: ClassVar[str] = "image"

    @classmethod
    def of(cls, picture: Picture, alt: str, style: str = "wide") -> Image:
        data = base64.b64encode(picture.png()).decode("ascii")
        return cls(f"data:image/png;base64,{data}", alt, style)


@dataclass(frozen=True)
class Note:
    """A paragraph; ``style`` is "note", "warning" or "" for plain text, ``strong`` stands first."""

    text: str
    style: str = "note"
    strong: str = ""
    kind: ClassVar[str] = "note"


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    text: str
    kind: ClassVar[str] = "heading"


@dataclass(frozen=True)
class Points:
    """Sentences one below another."""

    lines: tuple[str, ...]
    kind: ClassVar[str] = "points"


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    rows: tuple[tuple[str, str], ...]
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Score:
    """A score of an answer from 0 to 100, or None where it was not scored."""

    name: str
    value: float | None
    style: str


@dataclass(frozen=True)
class Card:
    """One answer as shown: what produced it, its text and its scores."""

    label: str
    answer: str
    scores: tuple[Score, ...] = ()
    finished: bool = True


@dataclass(frozen=True)
class Question:
    """One question with the answers to it, side by side; references are the prompted ones."""

    text: str
    steered: tuple[Card, ...]
    references: tuple[Card, ...] = ()


@dataclass(frozen=True)
class Cards:
    """Questions with their answers."""

    questions: tuple[Question, ...]
    kind: ClassVar[str] = "cards"


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown when their summary is clicked, or from the start."""

    summary: str
    blocks: tuple[Block, ...]
    open: bool = False
    kind: ClassVar[str] = "fold"


Block = Table | Image | Note | Heading | Points | Facts | Cards | Fold


@dataclass(frozen=True)
class Content:
    """What one run has to say: a title, its finding, and blocks; the summary behind a sweep."""

    title: str
    lead: str
    blocks: tuple[Block, ...]
    subject: Any = None


def fill_template(name: str, **values: Any) -> str:
    """Return a template of this room, filled; values are escaped unless it is Markdown."""
    markdown = name.endswith(".md.j2")
    environment = Environment(
        loader=PackageLoader("persona_lora", "report"),
        autoescape=not markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=markdown,
    )
    environment.globals["number"] = wording.number
    return environment.get_template(name).render(**values)


# -- answers -------------------------------------------------------------------------------------


def by_question(scored: Iterable[ScoredAnswer]) -> list[list[ScoredAnswer]]:
    """Group answers by question; within each: coefficients, the control, then references."""

    def place(row: ScoredAnswer) -> tuple[int, bool, bool, float, str, int]:
        method, coefficient = row.condition.method, row.condition.coefficient
        order = (coefficient is None, method == CONTROL, coefficient or 0.0, method)
        return (row.answer["question_id"], *order, row.answer["sample"])

    ordered = sorted(scored, key=place)
    return [list(rows) for _, rows in groupby(ordered, key=lambda row: row.answer["question_id"])]


def side_by_side(
    trait: str,
    scored: Iterable[ScoredAnswer],
    steered: Collection[Condition],
    references: Collection[Condition],
    *,
    at: str = "",
    notes: tuple[str, str] = ("", ""),
) -> tuple[Block, ...]:
    """Return a few questions with the first answers under conditions, and all answers, folded.

    ``at`` says where the answers were steered; ``notes`` go on under the heading and in the fold.
    """
    questions = by_question(scored)
    shown = min(EXAMPLE_QUESTIONS, len(questions))
    chosen = [questions[at * len(questions) // shown] for at in range(shown)]
    listed, unlisted = _listed(trait, questions)
    further = [f"{unlisted} further answers are in answers.jsonl of the run folder."]
    return (
        Heading(f"The same question, side by side{f', {at}' if at else ''}"),
        Note(
            "Questions are spread evenly over the list, not chosen by their scores; the first "
            f"sample of each is shown.{notes[0]}"
        ),
        Cards(tuple(_example(trait, rows, steered, references) for rows in chosen)),
        Fold(
            f"All answers{f' {at}' if at else ''}, question by question",
            (
                Cards(listed),
                *map(Note, further if unlisted else ()),
                *map(Note, notes[1:] if notes[1] else ()),
            ),
        ),
    )


def _listed(
    trait: str, questions: Sequence[Sequence[ScoredAnswer]]
) -> tuple[tuple[Question, ...], int]:
    """Return whole questions with all their answers, up to a limit, and how many are left out."""
    listed: list[Question] = []
    shown = 0
    for rows in questions:
        if listed and shown + len(rows) > LISTED_ANSWERS:
            break
        shown += len(rows)
        cards = tuple(_card(trait, row) for row in rows)
        listed.append(Question(str(rows[0].answer["question"]), cards))
    return tuple(listed), sum(map(len, questions)) - shown


def _example(
    trait: str,
    rows: Sequence[ScoredAnswer],
    steered: Collection[Condition],
    references: Collection[Condition],
) -> Question:
    first: dict[Condition, ScoredAnswer] = {}
    for row in rows:
        first.setdefault(row.condition, row)
    shown = (
        tuple(_card(trait, row) for condition, row in first.items() if condition in wanted)
        for wanted in (steered, references)
    )
    return Question(str(rows[0].answer["question"]), *shown)


def _card(trait: str, row: ScoredAnswer) -> Card:
    # Of several random controls each is called by its own name.
    own = str(row.answer["method"]) if row.condition.method == CONTROL else row.condition.method
    return Card(
        label=wording.condition_label(own, row.condition.coefficient),
        answer=str(row.answer["answer"]),
        scores=(
            Score(wording.title_of(trait), row.trait, "trait"),
            Score("Coherence", row.coherence, COHERENCE),
        ),
        finished=bool(row.answer["finished"]),
    )


# -- provenance ------------------------------------------------------------------------------------


def provenance(run: Run, record: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return where a run's numbers come from, as names and values."""
    config = record["config"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    arguments = " ".join(record["arguments"])
    if_any = (("Diff", "diff"), ("Vector", "vector_path"), ("Judge", "judge"))
    return (
        ("Run folder", str(run.folder)),
        ("Model", text_of(config.get("model"))),
        *((name, text_of(config[key])) for name, key in if_any if key in config),
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
