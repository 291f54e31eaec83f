"""Answers that models really gave, rated blind twice: what a judge is fitted to and checked on.

How people rate a file of answers, and two sheets of theirs become those rows, stands below.

A trait's ``onpolicy.jsonl`` holds one answer a row: {"question", "answer", "model", "condition",
"part", "trait": [a, b], "sense": [a, b]}. Both scales are 0–100, a and b are of two passes that did
not see each other. A judge may be fitted to the part "tuning" alone; "validation" is for telling
how good it is. Beside it ``written.jsonl`` may hold answers that no model gave, of equal surface
and graded content, for fitting alone. Refuses to know how a judge scores, and who rated.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from persona_lora.core.chat import COHERENCE, Exchange
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError, checked_text
from persona_lora.core.files import (
    append_jsonl,
    drop_cut_line,
    numbered_jsonl,
    read_csv,
    read_jsonl,
    write_csv,
    write_jsonl,
)
from persona_lora.core.traits import ON_POLICY, WRITTEN, Trait
from persona_lora.judges.judging import Judge
from persona_lora.report.scores import JUDGE, marked, with_mark

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
    rows = _rows(path)
    missing = [each for each in get_args(Part) if all(row.part != each for row in rows)]
    if missing:
        raise UserError(f"{path} has no row of the part {missing[0]!r}; a judge needs both parts")
    return [row for row in rows if part in (None, row.part)]


def load_written(trait: Trait, labels: Sequence[RatedAnswer]) -> list[RatedAnswer]:
    """Load the answers that were written for a trait's judge; none where there is no such file.

    One row is {"question", "answer", "trait": [a, b], "sense": [a, b]}. Raises UserError as
    ``load_ratings`` does, and for a question of the validation part of ``labels``: a judge must not
    be fitted to it.
    """
    path = trait.folder / WRITTEN
    rows = _rows(path, model=WRITTEN, condition=WRITTEN, part="tuning") if path.is_file() else []
    unseen = {row.question for row in labels if row.part == "validation"}
    for row in rows:
        if row.question in unseen:
            raise UserError(
                f"{path} answers a question of the validation part ({row.question[:60]!r}); a "
                "judge must not be fitted to it: write to other questions"
            )
    return rows


def _rows(path: Path, **of_all: str) -> list[RatedAnswer]:
    """Return the rows of a file, with what is the same for all of them and stands in none."""
    rows = []
    places: dict[tuple[str, str], str] = {}
    for where, value in numbered_jsonl(path):
        row = _parsed(value, where, of_all)
        first = places.setdefault((row.question, row.answer), where)
        if first != where:
            line = first.rpartition(":")[2]
            raise UserError(f"{where} is the answer of line {line} again; leave one out")
        rows.append(row)
    return rows


def _parsed(
    row: dict[str, Any], where: str, of_all: Mapping[str, str] = MappingProxyType({})
) -> RatedAnswer:
    keys = KEYS - set(of_all)
    if set(row) != keys:
        lacking, strange = sorted(keys - set(row)), sorted(set(row) - keys)
        fault = f"has no {lacking[0]!r}" if lacking else f"has {strange[0]!r}, which is not known"
        raise UserError(f"{where} {fault}; expected the keys {', '.join(sorted(keys))}")
    row = {**row, **of_all}
    named = ("question", "answer", "model", "condition")
    texts = {key: checked_text(row[key], f"{where}: {key}") for key in named}
    if row["part"] not in get_args(Part):
        raise UserError(f"{where}: part must be tuning or validation, got {row['part']!r}")
    trait, sense = (_passes(row[scale], f"{where}: {scale}") for scale in SCALES)
    return RatedAnswer(**texts, part=row["part"], trait=trait, sense=sense)


def _passes(value: Any, where: str) -> tuple[float, float]:
    numbers = isinstance(value, list) and all(type(each) in (int, float) for each in value)
    if not numbers or len(value) != 2 or not all(0 <= each <= 100 for each in value):
        raise UserError(f"{where} must be two ratings from 0 to 100, got {ascii(value)[:60]}")
    return float(value[0]), float(value[1])


# -- rating -----------------------------------------------------------------------------------

UNKNOWN = "unknown"
TUNING_SHARE = 1 / 3  # of the questions


@dataclass(frozen=True)
class AnswerFile:
    """The rows of a file of answers, as they stand there."""

    path: Path
    rows: tuple[Mapping[str, Any], ...]

    @classmethod
    def read(cls, path: Path) -> AnswerFile:
        """Read a .jsonl or .csv file; UserError naming the row that lacks a question or answer."""
        if path.suffix not in (".jsonl", ".csv"):
            raise UserError(f"{path} is neither .jsonl nor .csv; those two are read")
        csv = path.suffix == ".csv"
        rows: list[Any] = read_csv(path, ("question", "answer")) if csv else read_jsonl(path)
        for number, row in enumerate(rows, start=1):
            for name in ("question", "answer"):
                if not isinstance(row.get(name), str):
                    raise UserError(f"{path}: row {number} has no text {name!r}")
        if not rows:
            raise UserError(f"{path} holds no rows; expected answers with their questions")
        return cls(path, tuple(rows))

    @property
    def exchanges(self) -> list[Exchange]:
        """The questions and answers."""
        return [Exchange(row["question"], row["answer"]) for row in self.rows]

    @property
    def said(self) -> list[int]:
        """The rows whose answer is not empty: the others cannot be rated."""
        return [at for at, row in enumerate(self.rows) if row["answer"].strip()]

    def text(self, row: int) -> str:
        """Return the digest of a row's question and answer."""
        return digest_of([self.rows[row]["question"], self.rows[row]["answer"]])[:16]


def score_file(
    judge: Judge, trait: str, answers: AnswerFile, output: Path, unfit: Collection[str] = ()
) -> dict[str, Any]:
    """Judge answers on the trait and on coherence, and write their rows with both scores.

    The columns are named after the trait and ``coherence``; an empty cell is an unscored answer.
    The last one, ``judge``, says who judged, with what of both the judge is ``unfit`` for.
    Returns the scores by criterion. Raises UserError for what ``check_output`` refuses.
    """
    check_output(output, answers, trait)
    verdicts = {each: judge.judge(answers.exchanges, each) for each in (trait, COHERENCE)}
    scores = {name: [each.score for each in own] for name, own in verdicts.items()}
    by = {with_mark(each.judge, [name], unfit) for name, own in verdicts.items() for each in own}
    said = {JUDGE: marked(*sorted(by))}
    rows = [
        {**row, **{name: each[at] for name, each in scores.items()}, **said}
        for at, row in enumerate(answers.rows)
    ]
    if output.suffix == ".csv":
        names = dict.fromkeys(name for row in answers.rows for name in row)
        write_csv(output, [*names, *scores, *said], rows)
    else:
        write_jsonl(output, rows)
    return scores


def check_output(output: Path, answers: AnswerFile, trait: str) -> None:
    """Raise UserError for a file that scores cannot go to, and for answers that were judged."""
    if output.suffix not in (".jsonl", ".csv"):
        raise UserError(f"output must end in .jsonl or .csv, got {output}")
    for name in (trait, COHERENCE, JUDGE):
        if any(name in row for row in answers.rows):
            raise UserError(f"{answers.path} has a column {name!r} already; rename or drop it")


@dataclass(frozen=True)
class RatingSheet:
    """The ratings of one rater, answer by answer in an order of the rater's own; resumable."""

    answers: AnswerFile
    path: Path

    def ratings(self) -> dict[int, tuple[float, float]]:
        """Return trait and sense by row, the last ones where an answer was rated twice.

        UserError for ratings of other answers, or that are none, and where there is no file.
        """
        found: dict[int, tuple[float, float]] = {}
        texts = {at + 1: self.answers.text(at) for at in range(len(self.answers.rows))}
        for where, given in numbered_jsonl(self.path):
            row = given.get("row")
            if row not in texts or given.get("text") != texts[row]:
                raise UserError(
                    f"{where} rates no answer of {self.answers.path}; the answers have "
                    "changed, or the ratings are of another file"
                )
            trait, sense = (
                read_rating(given.get(scale), f"{where}: {scale}: ") for scale in SCALES
            )
            found[row - 1] = trait, sense
        return found

    def remaining(self) -> list[int]:
        """Return the answers that are not rated yet, shuffled by the name of the rater's file.

        Empty ones are none of them. A last line that a kill cut short is dropped.
        """
        if self.path.is_file():
            drop_cut_line(self.path)
        rated = self.ratings() if self.path.exists() else {}
        order = self.answers.said
        random.Random(self.path.name).shuffle(order)
        return [row for row in order if row not in rated]

    def add(self, row: int, trait: float, sense: float) -> None:
        """Keep one answer's ratings."""
        text = self.answers.text(row)
        append_jsonl(self.path, [{"row": row + 1, "text": text, "trait": trait, "sense": sense}])


def read_rating(value: Any, where: str = "") -> float:
    """Return a rating as a number of 0–100; UserError, after ``where``, for any other value."""
    try:
        rating = float(value)
    except (TypeError, ValueError):
        rating = float("nan")
    if isinstance(value, bool) or not 0 <= rating <= 100:
        raise UserError(f"{where}a rating is a number from 0 to 100, got {value!r}")
    return rating


def rated_rows(sheets: Sequence[RatingSheet]) -> list[RatedAnswer]:
    """Join two raters' sheets into rated answers, as ``onpolicy.jsonl`` holds them.

    A third of the questions, the same ones each time, is for tuning. Answers that one of the two
    has not rated, and empty ones, are left out. Raises UserError for other than two sheets, where
    none is left, for an answer that was rated as two rows, and naming a row that cannot be kept.
    """
    if len(sheets) != 2:
        raise UserError(
            f"got {len(sheets)} files of ratings; a judge is fitted to two passes that did not see "
            "each other: rate once more under another --rater"
        )
    first, second = (sheet.ratings() for sheet in sheets)
    answers = sheets[0].answers
    both = [row for row in answers.said if row in first and row in second]
    if not both:
        raise UserError(f"no answer of {answers.path} is rated in both files; rate some first")
    rows: dict[tuple[str, str], int] = {}
    for row in both:
        same = rows.setdefault((answers.rows[row]["question"], answers.rows[row]["answer"]), row)
        if same != row:
            raise UserError(
                f"{answers.path}: row {row + 1} is the answer of row {same + 1} again; take its "
                "line out of one file of ratings"
            )
    questions = sorted({answers.rows[row]["question"] for row in both}, key=digest_of)
    tuning = set(questions[: round(TUNING_SHARE * len(questions))])
    return [
        _parsed(
            {
                **{key: rated[key] for key in ("question", "answer")},
                **{key: _told(rated.get(key)) for key in ("model", "condition")},
                "part": "tuning" if rated["question"] in tuning else "validation",
                **{scale: [first[row][at], second[row][at]] for at, scale in enumerate(SCALES)},
            },
            f"{answers.path}: row {row + 1}",
        )
        for row in both
        for rated in [answers.rows[row]]
    ]


def _told(value: Any) -> Any:
    """Return what a file says of an answer's origin: numbers as text, unknown where it is blank."""
    if value is None or not str(value).strip():
        return UNKNOWN
    return str(value) if isinstance(value, int | float) else value
