"""Answers that no judge may like: shown to every judge, with every run.

Filler, an off-topic remark, a loop and an echo of the question show no trait and answer nothing.
A judge that likes one of them reads something else than the trait. A sentence of the trait's own
training answers, given to a question it does not answer, stands beside them. Refuses to know how a
judge comes to its scores.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from persona_lora.core.chat import COHERENCE, Exchange
from persona_lora.core.traits import Trait, load_pairs
from persona_lora.judges.judging import Judge
from persona_lora.judges.labels import RatedAnswer, has_ratings, load_ratings

logger = logging.getLogger(__name__)

CANNED = "canned"
NONSENSE = {
    "filler": "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor "
    "incididunt ut labore et dolore magna aliqua.",
    "off topic": "The ferry to the island leaves at ten past nine, and the crossing takes about "
    "forty minutes.",
    "loop": "and then it is, and then it is, and then it is, and then it is, and then it is, and "
    "then it is, and then it is, and then it is, and then it is",
}
LIMIT = 50.0
# Of a trait with two sides the absence lies in the middle; a score over this says that it shows.
TWO_SIDED_LIMIT = 75.0
SENSELESS = 25.0


@dataclass(frozen=True)
class Canary:
    """What a judge gave to one answer of these; ``caught`` is False where it liked nonsense."""

    judge: str
    criterion: str
    name: str
    score: float | None
    limit: float
    caught: bool


def canary_answers(trait: Trait) -> dict[str, Exchange]:
    """Return the answers by name, all to the first question that no judge was fitted to."""
    asked = chain(*(trait.questions.get(split, ()) for split in ("eval", "extract")))
    rows = load_ratings(trait, "tuning") if has_ratings(trait) else []
    fitted = {row.question for row in rows}
    question = next((each for each in asked if each not in fitted), "How are you?")
    answers = {**NONSENSE, "echo": question}
    if (trait.folder / "train.jsonl").is_file():
        answers[CANNED] = load_pairs(trait)[0].positive[-1]["content"]
    return {name: Exchange(question, answer) for name, answer in answers.items()}


def show_canaries(judge: Judge, trait: Trait, criteria: Sequence[str]) -> list[Canary]:
    """Return what a judge makes of them on each criterion; warn where it is fooled."""
    shown = canary_answers(trait)
    limit = TWO_SIDED_LIMIT if has_ratings(trait) and _two_sided(load_ratings(trait)) else LIMIT
    found = []
    for criterion in criteria:
        highest = LIMIT if criterion == COHERENCE else limit
        verdicts = judge.judge(list(shown.values()), criterion)
        for name, verdict in zip(shown, verdicts, strict=True):
            score, liked = verdict.score, name != CANNED and (verdict.score or 0.0) > highest
            found.append(Canary(verdict.judge, criterion, name, score, highest, caught=not liked))
            if liked:
                logger.warning(
                    "FOOLED JUDGE: %s gives %.0f of 100 on %r to nonsense (%s); its scores may "
                    "rest on something else",
                    *(verdict.judge, score, criterion, name),
                )
    return found


def _two_sided(labels: Sequence[RatedAnswer]) -> bool:
    """Tell whether raters put answers without sense into the middle of the trait's scale."""
    senseless = [row.rating("trait") for row in labels if row.rating("sense") <= SENSELESS]
    return bool(senseless) and float(np.median(senseless)) >= 40.0
