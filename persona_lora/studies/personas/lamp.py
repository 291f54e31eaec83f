"""LaMP-7: does a persona help to paraphrase a tweet as its author would have written it?

Reads a local copy of the benchmark's files (Salemi et al. 2023, arXiv:2304.11406): questions with
``id``, ``input`` and the author's ``profile``, and the golds apart. Scored is the overlap with what
the author wrote, as ROUGE-1 and ROUGE-L (F of unstemmed words).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from rouge_score.rouge_scorer import RougeScorer

from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_json, write_csv
from persona_lora.core.personas import Coefficients
from persona_lora.core.runs import Output
from persona_lora.report import wording
from persona_lora.report.comparisons import ConditionFit, cells_of, fits_over_personas
from persona_lora.report.resampling import SHARES
from persona_lora.report.sections import Table
from persona_lora.studies.asking.run import Row, open_run
from persona_lora.studies.personas.objective import Speaker
from persona_lora.studies.personas.run import FIT_COLUMNS

MEASURES = ("rouge1", "rougeL")
NONE, PROFILE, MIX = "none", "profile", "mix"
COLUMNS = ("measure", "condition", "mean", "low", "high", "n", "gain", "gain_low", "gain_high", "p")


class LampQuestion(NamedTuple):
    """One question of one user: what is asked, what the user wrote, and earlier texts of theirs."""

    id: str
    input: str
    gold: str
    profile: tuple[str, ...]


@dataclass(frozen=True)
class LampScores:
    """ROUGE by measure and condition; units are users, differences are from the plain model."""

    fits: Mapping[str, tuple[ConditionFit, ...]]
    folder: Path

    def table(self) -> Table:
        """Return every condition by every measure."""
        rows = (
            [measure, each.condition, wording.interval(each.fit, 3), str(each.fit.n_questions)]
            + [*wording.gap(each.difference, each.p_holm, 3)]
            for measure, fits in self.fits.items()
            for each in fits
        )
        return Table.of("measure | condition | F (0–1) | users | gain | pairs | p (Holm)", rows)


def load_lamp(questions: Path, outputs: Path) -> list[LampQuestion]:
    """Read a LaMP-7 questions file and its golds; UserError for what is missing in either."""
    asked, told = read_json(questions), read_json(outputs)
    golds = told.get("golds") if isinstance(told, dict) else None
    if not isinstance(asked, list) or not isinstance(golds, list):
        raise UserError(
            f"{questions} must be a list of questions and {outputs} hold a list of 'golds', as "
            "LaMP-7 does"
        )
    texts = {
        _text(each, "id", at): _text(each, "output", at)
        for number, each in enumerate(golds, start=1)
        for at in [f"{outputs}: gold {number}"]
    }
    if len(texts) < len(golds):
        raise UserError(f"{outputs} has several golds of one id; leave one of each")
    found = []
    for number, each in enumerate(asked, start=1):
        at = f"{questions}: question {number}"
        question, profile = _text(each, "id", at), each.get("profile")
        if question not in texts:
            raise UserError(f"{outputs} has no gold for the question {question!r}")
        if not isinstance(profile, list):
            raise UserError(f"{at} has no 'profile'; LaMP-7 lists texts of the author there")
        earlier = tuple(_text(text, "text", f"{at}, in its profile,") for text in profile)
        found.append(LampQuestion(question, _text(each, "input", at), texts[question], earlier))
    if not found:
        raise UserError(f"{questions} holds no questions")
    return found


def _text(holder: Any, key: str, at: str) -> str:
    """Return a text (an id may be a number); UserError says at what place it is missing."""
    value = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(value, str | int if key == "id" else str):
        raise UserError(
            f"{at} has no text under {key!r}: {ascii(holder)[:80]}; give a LaMP-7 file, with "
            '{"id", "input", "profile": [{"text"}]} of questions and {"id", "output"} of golds'
        )
    return str(value)


def profile_prompt(question: LampQuestion, number: int = 8) -> str:
    """Return the prompt baseline: the user's first texts, to be imitated."""
    listed = "\n".join(f"- {text}" for text in question.profile[:number])
    return f"You write as the author of these texts does:\n{listed}"


def score_lamp(
    speaker: Speaker,
    questions: Sequence[LampQuestion],
    mix: Coefficients | None,
    output: Output | Path,
) -> LampScores:
    """Answer every question plainly, with the user's texts as system prompt, and under ``mix``.

    Writes ``answers.jsonl`` (kept by a second run of the same configuration) and ``scores.csv``.
    """
    conditions = (NONE, PROFILE) if mix is None else (NONE, PROFILE, MIX)
    config = {
        "questions": [question.id for question in questions],
        "mix": None if mix is None else mix.as_dict(),
        "generation": dataclasses.asdict(speaker.options),
    }
    read = (
        speaker.inputs(),
        {"the questions": digest_of([question._asdict() for question in questions])},
    )

    def answered() -> list[dict[str, Any]]:
        answers = speaker.answers(rows_of(questions, conditions, mix))
        scorer, rows = RougeScorer(list(MEASURES)), []
        for (name, question), answer in zip(product(conditions, questions), answers, strict=True):
            said = answer.answer
            overlap = scorer.score(question.gold, said)
            told = {"user": question.id, "condition": name, "answer": said, "gold": question.gold}
            rows.append({**told, **{each: overlap[each].fmeasure for each in MEASURES}})
        return rows

    run = open_run(output, "lamp", speaker.chat_model, config, *read, seed=speaker.options.seed)
    with run:
        rows = run.resume_rows("answers") or answered()
        run.write("answers", rows)
        fits = {
            measure: tuple(fits_over_personas(_of(rows, measure), NONE, scale=SHARES))
            for measure in MEASURES
        }
        cells = [
            {**cells_of(fit, FIT_COLUMNS), "measure": name, "mean": fit.fit.mean, "p": fit.p_holm}
            for name, each in fits.items()
            for fit in each
        ]
        write_csv(run.folder / "scores.csv", COLUMNS, cells)
    return LampScores(fits, run.folder)


def rows_of(
    questions: Sequence[LampQuestion], conditions: Sequence[str], mix: Coefficients | None
) -> list[Row[Coefficients | None]]:
    """Return every question under every condition."""
    return [
        Row(
            question.input,
            mix if name == MIX else None,
            profile_prompt(question) if name == PROFILE else None,
            index,
        )
        for name in conditions
        for index, question in enumerate(questions)
    ]


def _of(rows: Sequence[Mapping[str, Any]], measure: str) -> list[dict[str, Any]]:
    """Return rows as ``fits`` reads them: a user is a unit, the measure its score."""
    unmeasured = {"prompt_id": 0, "coherence": None, "relevance": None}
    return [
        {"persona": row["user"], "condition": row["condition"], "score": row[measure], **unmeasured}
        for row in rows
    ]
