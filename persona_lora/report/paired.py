"""Runs of ``evaluate`` beside one of them, paired by question.

Knows rows of answers and verdicts; refuses to know what made the runs differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from persona_lora.core.chat import COHERENCE
from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.report.resampling import Interval, bootstrap_mean, holm, sign_flip_p
from persona_lora.report.summary import trait_of

COLUMNS = (
    "run", "trait", "low", "high", "n", "coverage", "coherence", "difference", "difference_low",
    "difference_high", "p", "p_holm",
)  # fmt: skip

Scores = dict[int, list[float | None]]


@dataclass(frozen=True)
class PairedRun:
    """One run: mean trait score and coherence, and the difference from the reference.

    ``difference`` is over questions that both runs have, ``p`` a two-sided sign-flip test on the
    questions' means, ``p_holm`` corrected over the runs compared; None for the reference itself.
    """

    name: str
    trait: Interval
    coherence: Interval
    difference: Interval | None
    p: float | None
    p_holm: float | None = None


def cells_of(each: PairedRun) -> dict[str, Any]:
    """Return a run as a row of a table of ``COLUMNS``."""
    gap = each.difference
    return {
        "run": each.name,
        "trait": each.trait.mean,
        "low": each.trait.low,
        "high": each.trait.high,
        "n": each.trait.n_questions,
        "coverage": each.trait.coverage,
        "coherence": each.coherence.mean,
        "difference": None if gap is None else gap.mean,
        "difference_low": None if gap is None else gap.low,
        "difference_high": None if gap is None else gap.high,
        "p": each.p,
        "p_holm": each.p_holm,
    }


def compare_runs(runs: Sequence[Run], reference: Run) -> list[PairedRun]:
    """Return the reference and every run, compared with it.

    UserError for runs of different traits, or without a question in common.
    """
    traits = {trait_of(run) for run in (reference, *runs)}
    if len(traits) > 1:
        raise UserError(f"the runs are of different traits: {', '.join(sorted(traits))}")
    trait = traits.pop()
    ours = _scores(reference, trait)
    found = [_compared(reference, trait, None)]
    found += [_compared(run, trait, ours) for run in runs]
    corrected = holm([each.p for each in found])
    return [
        PairedRun(each.name, each.trait, each.coherence, each.difference, each.p, adjusted)
        for each, adjusted in zip(found, corrected, strict=True)
    ]


def _compared(
    run: Run, trait: str, reference: Mapping[int, list[float | None]] | None
) -> PairedRun:
    scores = _scores(run, trait)
    difference, p = None, None
    if reference is not None:
        theirs, ours = _means(scores), _means(reference)
        both = sorted(set(theirs) & set(ours))
        if not both:
            raise UserError(f"{run.folder} and the reference have no scored question in common")
        gaps = {question: theirs[question] - ours[question] for question in both}
        difference = bootstrap_mean({question: [gap] for question, gap in gaps.items()})
        p = sign_flip_p(np.array(list(gaps.values())))
    return PairedRun(
        run.folder.name,
        bootstrap_mean(scores),
        bootstrap_mean(_scores(run, COHERENCE)),
        difference,
        p,
    )


def _scores(run: Run, criterion: str) -> Scores:
    question_of = {row["row"]: row["question_id"] for row in run.read("answers")}
    scores: Scores = {}
    for verdict in run.read("verdicts"):
        if verdict["criterion"] == criterion:
            scores.setdefault(question_of[verdict["row"]], []).append(verdict["score"])
    if not scores:
        raise UserError(f"{run.folder} holds no verdicts on {criterion}; is it a run of evaluate?")
    return scores


def _means(scores: Mapping[int, Sequence[float | None]]) -> dict[int, float]:
    known = {
        question: [value for value in values if value is not None]
        for question, values in scores.items()
    }
    return {question: float(np.mean(values)) for question, values in known.items() if values}
