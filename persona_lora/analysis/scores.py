"""Answers joined with their verdicts: the rows that every reading of a run starts from.

Knows the rows of ``answers.jsonl`` and ``verdicts.jsonl``; refuses to know how they were made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from persona_lora.core.chat import COHERENCE
from persona_lora.core.errors import UserError

Row = Mapping[str, Any]
Cluster = dict[int, list[float | None]]

UNSTEERED = "none"
PROMPTS = ("prompt_neg", "prompt_pos")


class Condition(NamedTuple):
    """What produced an answer: a method, and its coefficient where it has one."""

    method: str
    coefficient: float | None


class ScoredAnswer(NamedTuple):
    """One answer row with its scores, 0–100; None is an answer without a score."""

    condition: Condition
    answer: Row
    trait: float | None
    coherence: float | None


def score_answers(
    answers: Iterable[Row], verdicts: Iterable[Row], trait: str
) -> list[ScoredAnswer]:
    """Join every answer with its scores for the trait and for coherence, in the answers' order.

    Of several verdicts on one row and criterion the last counts. Raises UserError for a verdict
    on a row that does not exist, for a score that is no number from 0 to 100, and for coefficients
    of more than one steering method.
    """
    answers = list(answers)
    method = steering_method(answers)
    known = {answer["row"] for answer in answers}
    scores: dict[tuple[int, str], float | None] = {}
    for verdict in verdicts:
        if verdict["row"] not in known:
            raise UserError(
                f"verdicts.jsonl judges row {verdict['row']!r}, which answers.jsonl does not hold; "
                "the files belong to different runs, judge this run again"
            )
        scores[verdict["row"], verdict["criterion"]] = _checked(verdict)
    return [
        ScoredAnswer(
            _condition_of(answer, method),
            answer,
            scores.get((answer["row"], trait)),
            scores.get((answer["row"], COHERENCE)),
        )
        for answer in answers
    ]


def steering_method(answers: Iterable[Row]) -> str:
    """Return the one method whose rows carry coefficients ("lora" where none does)."""
    methods = {answer["method"] for answer in answers if answer["coefficient"] is not None}
    methods.discard(UNSTEERED)
    if len(methods) > 1:
        raise UserError(
            f"the run has coefficients of several methods ({', '.join(sorted(methods))}); "
            "summarise one method at a time"
        )
    return str(methods.pop()) if methods else "lora"


def clusters(scored: Iterable[ScoredAnswer], criterion: str) -> Cluster:
    """Return the scores on one criterion by question id; ``criterion`` "coherence" or the trait."""
    by_question: Cluster = {}
    for row in scored:
        score = row.coherence if criterion == COHERENCE else row.trait
        by_question.setdefault(row.answer["question_id"], []).append(score)
    return dict(sorted(by_question.items()))


def judges_of(verdicts: Iterable[Row], criterion: str) -> str:
    """Return the names of the judges that gave verdicts on a criterion."""
    return ", ".join(sorted({str(v["judge"]) for v in verdicts if v["criterion"] == criterion}))


def answers_columns(trait: str, *, sweep: bool = True) -> list[str]:
    """Return the columns of the answers table; a sweep names method and coefficient first."""
    columns = ["question", "prompt", "answer", trait, COHERENCE]
    return ["method", "coefficient", *columns] if sweep else columns


def answers_table(
    answers: Sequence[Row], verdicts: Sequence[Row], trait: str
) -> list[dict[str, Any]]:
    """Return one row per answer for ``write_csv``; an unscored cell is None."""
    return [
        {
            "method": row.condition.method,
            "coefficient": row.condition.coefficient,
            "question": row.answer["question"],
            "prompt": row.answer["prompt"],
            "answer": row.answer["answer"],
            trait: row.trait,
            COHERENCE: row.coherence,
        }
        for row in score_answers(answers, verdicts, trait)
    ]


def _condition_of(answer: Row, method: str) -> Condition:
    if answer["method"] == UNSTEERED:
        return Condition(method, 0.0)
    coefficient = answer["coefficient"]
    # Adding 0.0 turns -0.0 into 0.0, which would print as another coefficient.
    return Condition(answer["method"], None if coefficient is None else float(coefficient) + 0.0)


def _checked(verdict: Row) -> float | None:
    score = verdict["score"]
    if score is None:
        return None
    if not isinstance(score, int | float) or not math.isfinite(score) or not 0 <= score <= 100:
        raise UserError(
            f"verdicts.jsonl scores row {verdict['row']} {score!r} on {verdict['criterion']}; "
            "expected a number from 0 to 100 or null, judge that row again"
        )
    return float(score)
