"""Is the trait data sound? Schema, duplicates, leakage into held-out questions, balanced signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean

import numpy as np
from numpy.typing import NDArray

from persona_lora.core.traits import (
    LABELS,
    ContrastivePair,
    LabelledAnswer,
    Trait,
    load_labelled_answers,
    load_pairs,
)
from persona_lora.judges.sentence_embeddings import SentenceEmbedder

DUPLICATE_COSINE = 0.85
LEAK_COSINE = 0.75
WORDS = (25, 70)
MEAN_LENGTH_TOLERANCE = 0.05
LEAST_PAIRS = 80
LEAST_LABELLED = 60
INSTRUCTION_PAIRS = 5
QUESTIONS_PER_SPLIT = 20
MOST_EQUAL_OPENINGS = 4


@dataclass(frozen=True)
class DataReport:
    """What a check of one trait found; ``problems`` is empty when the data is sound.

    ``nearest_leak`` is the largest cosine between a training question and a held-out one,
    ``nearest_duplicate`` the largest between two training questions.
    """

    trait: str
    num_pairs: int
    num_domains: int
    num_labelled: int
    words_positive: float
    words_negative: float
    nearest_duplicate: float
    nearest_leak: float
    problems: tuple[str, ...]


@dataclass(frozen=True)
class _Questions:
    """One set of questions: where they stand, their text, their unit embeddings ``[n, size]``."""

    where: str
    texts: list[str]
    embeddings: NDArray[np.float32]


def check_trait(
    trait: Trait, embedder: SentenceEmbedder, *, least_pairs: int = LEAST_PAIRS
) -> DataReport:
    """Check all files of a trait; malformed files raise UserError with file and line."""
    pairs, labelled = load_pairs(trait), load_labelled_answers(trait)
    train = _embedded("train.jsonl", [pair.prompt[-1]["content"] for pair in pairs], embedder)
    held_out = [
        _embedded("judge_eval.jsonl", sorted({each.question for each in labelled}), embedder),
        *(
            _embedded(f"trait.json {split}", list(trait.questions[split]), embedder)
            for split in ("extract", "eval")
        ),
    ]
    problems = [
        *_count_problems(trait, pairs, labelled, least_pairs),
        *_answer_problems(pairs),
        *(line for each in (train, *held_out) for line in _duplicate_problems(each)),
        *(
            line
            for one, other in combinations((train, *held_out), 2)
            for line in _leak_problems(one, other)
        ),
    ]
    return DataReport(
        trait=trait.name,
        num_pairs=len(pairs),
        num_domains=len({pair.domain for pair in pairs}),
        num_labelled=len(labelled),
        words_positive=mean(_words(pair.positive[-1]["content"]) for pair in pairs),
        words_negative=mean(_words(pair.negative[-1]["content"]) for pair in pairs),
        nearest_duplicate=float(np.max(_off_diagonal(train.embeddings))),
        nearest_leak=max(float(np.max(train.embeddings @ each.embeddings.T)) for each in held_out),
        problems=tuple(problems),
    )


def _embedded(where: str, texts: list[str], embedder: SentenceEmbedder) -> _Questions:
    return _Questions(where, texts, embedder.embed(texts))


def _count_problems(
    trait: Trait,
    pairs: Sequence[ContrastivePair],
    labelled: Sequence[LabelledAnswer],
    least_pairs: int,
) -> list[str]:
    expected = [
        ("train.jsonl pairs", len(pairs), least_pairs),
        ("judge_eval.jsonl answers", len(labelled), LEAST_LABELLED),
        ("trait.json instruction pairs", len(trait.instructions), INSTRUCTION_PAIRS),
        ("extract questions", len(trait.questions["extract"]), QUESTIONS_PER_SPLIT),
        ("eval questions", len(trait.questions["eval"]), QUESTIONS_PER_SPLIT),
    ]
    problems = [
        f"{what}: {found}, expected at least {least}"
        for what, found, least in expected
        if found < least
    ]
    absent = sorted(set(LABELS) - {each.label for each in labelled})
    return problems + [f"judge_eval.jsonl has no answer labelled {label}" for label in absent]


def _answer_problems(pairs: Sequence[ContrastivePair]) -> list[str]:
    problems = []
    low, high = WORDS
    means = []
    for sign in ("positive", "negative"):
        answers = [
            (pair.positive if sign == "positive" else pair.negative)[-1]["content"]
            for pair in pairs
        ]
        lengths = [_words(answer) for answer in answers]
        means.append(mean(lengths))
        problems += [
            f"train.jsonl:{number} {sign} answer has {length} words, expected {low}–{high}"
            for number, length in enumerate(lengths, start=1)
            if not low <= length <= high
        ]
        problems += _opening_problems(sign, answers)
    if abs(means[0] - means[1]) > MEAN_LENGTH_TOLERANCE * max(means):
        problems.append(
            f"train.jsonl: positive answers have {means[0]:.1f} words on average and negative "
            f"{means[1]:.1f}; a judge could go by length"
        )
    return problems


def _opening_problems(sign: str, answers: Sequence[str]) -> list[str]:
    counts: dict[str, int] = {}
    for answer in answers:
        opening = " ".join(answer.lower().split()[:2])
        counts[opening] = counts.get(opening, 0) + 1
    return [
        f"train.jsonl: {count} {sign} answers begin with {opening!r}; vary them"
        for opening, count in counts.items()
        if count > MOST_EQUAL_OPENINGS
    ]


def _duplicate_problems(questions: _Questions) -> list[str]:
    if len(questions.texts) < 2:
        return []
    return [
        f"{questions.where}: near-duplicates (cosine {cosine:.2f}): "
        f"{questions.texts[one]!r} and {questions.texts[other]!r}"
        for one, other, cosine in _above(_off_diagonal(questions.embeddings), DUPLICATE_COSINE)
        if one < other
    ]


def _leak_problems(one: _Questions, other: _Questions) -> list[str]:
    limit = LEAK_COSINE if "train.jsonl" in (one.where, other.where) else DUPLICATE_COSINE
    return [
        f"leak between {one.where} and {other.where} (cosine {cosine:.2f}): "
        f"{one.texts[first]!r} and {other.texts[second]!r}"
        for first, second, cosine in _above(one.embeddings @ other.embeddings.T, limit)
    ]


def _off_diagonal(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    cosines = embeddings @ embeddings.T
    np.fill_diagonal(cosines, -1.0)
    return cosines


def _above(cosines: NDArray[np.float32], limit: float) -> list[tuple[int, int, float]]:
    return [
        (int(one), int(other), float(cosines[one, other]))
        for one, other in zip(*np.nonzero(cosines >= limit), strict=True)
    ]


def _words(text: str) -> int:
    return len(text.split())
