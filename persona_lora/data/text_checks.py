"""What can be wrong with lists of questions and answers: duplicates, leaks, lengths, openings.

Every check returns problems as sentences that name the place; an empty list is a clean bill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
from numpy.typing import NDArray

from persona_lora.models.embeddings import SentenceEmbedder

DUPLICATE_COSINE = 0.85
LEAK_COSINE = 0.75
WORDS = (25, 70)
MEAN_LENGTH_TOLERANCE = 0.05
MOST_EQUAL_OPENINGS = 4


@dataclass(frozen=True)
class Questions:
    """One set of questions: where they stand, their text, their unit embeddings ``[n, size]``."""

    where: str
    texts: list[str]
    embeddings: NDArray[np.float32]


def embedded(where: str, texts: list[str], embedder: SentenceEmbedder) -> Questions:
    """Return questions with their embeddings."""
    return Questions(where, texts, embedder.embed(texts))


def duplicate_problems(questions: Questions) -> list[str]:
    """Return pairs of questions of one set that nearly say the same."""
    if len(questions.texts) < 2:
        return []
    return [
        f"{questions.where}: near-duplicates (cosine {cosine:.2f}): "
        f"{questions.texts[one]!r} and {questions.texts[other]!r}"
        for one, other, cosine in _above(off_diagonal(questions.embeddings), DUPLICATE_COSINE)
        if one < other
    ]


def leak_problems(one: Questions, other: Questions, limit: float) -> list[str]:
    """Return pairs of questions of two sets with a cosine of at least ``limit``."""
    return [
        f"leak between {one.where} and {other.where} (cosine {cosine:.2f}): "
        f"{one.texts[first]!r} and {other.texts[second]!r}"
        for first, second, cosine in _above(one.embeddings @ other.embeddings.T, limit)
    ]


def length_problems(where: str, answers: Sequence[str]) -> list[str]:
    """Return answers outside the allowed number of words; the first answer is number 1."""
    low, high = WORDS
    return [
        f"{where}:{number} answer has {words(answer)} words, expected {low}–{high}"
        for number, answer in enumerate(answers, start=1)
        if not low <= words(answer) <= high
    ]


def opening_problems(where: str, answers: Sequence[str]) -> list[str]:
    """Return openings of two words that too many answers share."""
    counts: dict[str, int] = {}
    for answer in answers:
        opening = " ".join(answer.lower().split()[:2])
        counts[opening] = counts.get(opening, 0) + 1
    return [
        f"{where}: {count} answers begin with {opening!r}; vary them"
        for opening, count in counts.items()
        if count > MOST_EQUAL_OPENINGS
    ]


def balance_problems(answers: dict[str, Sequence[str]]) -> list[str]:
    """Return a problem where the mean lengths of several sets of answers differ too much."""
    means = {where: mean(map(words, texts)) for where, texts in answers.items() if texts}
    if not means or max(means.values()) - min(means.values()) <= (
        MEAN_LENGTH_TOLERANCE * max(means.values())
    ):
        return []
    shown = ", ".join(f"{where} {value:.1f}" for where, value in means.items())
    return [f"mean lengths in words differ ({shown}); a judge could go by length"]


def off_diagonal(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return all cosines ``[n, n]`` with −1 on the diagonal."""
    cosines = embeddings @ embeddings.T
    np.fill_diagonal(cosines, -1.0)
    return cosines


def words(text: str) -> int:
    """Return the number of words, split at white space."""
    return len(text.split())


def _above(cosines: NDArray[np.float32], limit: float) -> list[tuple[int, int, float]]:
    return [
        (int(one), int(other), float(cosines[one, other]))
        for one, other in zip(*np.nonzero(cosines >= limit), strict=True)
    ]
