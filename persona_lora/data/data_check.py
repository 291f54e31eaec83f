"""Is the trait data sound? Schema, duplicates, leakage into held-out questions, balance, surface.

Every check returns problems as sentences that name the place; an empty list is a clean bill. Can
the surface alone tell a positive answer from a negative one? Training pairs whose sign can be read
off pronouns, punctuation or length teach a model and a judge those, and not the trait: nine counts,
and their AUC.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from persona_lora.core.errors import UserError
from persona_lora.core.traits import (
    FINETUNING_LEVELS,
    LABELS,
    ContrastivePair,
    LabelledAnswer,
    SurfaceException,
    Trait,
    list_variants,
    load_finetuning_rows,
    load_labelled_answers,
    load_pairs,
    load_trait,
)
from persona_lora.models.embeddings import SentenceEmbedder
from persona_lora.report.resampling import percentile_bounds, question_weights
from persona_lora.report.sections import Table

FOLDS = 5

# Matches per word of the text.
RATES = {
    "first person": re.compile(r"\b(i|me|my|mine|myself|we|us|our|ours|ourselves)\b", re.I),
    "second person": re.compile(r"\b(you|your|yours|yourself|yourselves)\b", re.I),
    "question marks": re.compile(r"\?"),
    "exclamation marks": re.compile(r"!"),
    "digits": re.compile(r"\d"),
    "negations": re.compile(
        r"\b(no|not|never|none|nobody|nothing|nowhere|neither|nor|cannot)\b|n['’]t\b", re.I
    ),
    "commas": re.compile(r","),
}
COUNTS = (*RATES, "words", "word length")
_WORD = re.compile(r"\w+(?:['’]\w+)*")


@dataclass(frozen=True)
class SurfaceAUC:
    """How well the counts tell positive from negative answers: 0.5 not at all, 1 always.

    ``low`` and ``high`` bound the 95% interval over pairs. ``weights`` has the coefficient of each
    standardised count in a regression on all pairs; a positive one points to positive answers.
    """

    auc: float
    low: float
    high: float
    weights: Mapping[str, float]


def surface_counts(text: str) -> list[float]:
    """Return the nine counts of one answer, in the order of ``COUNTS``."""
    found, split = _WORD.findall(text), len(text.split())
    rates = [len(pattern.findall(text)) / max(1, split) for pattern in RATES.values()]
    return [*rates, float(split), sum(map(len, found)) / max(1, len(found))]


def surface_auc(
    positives: Sequence[str], negatives: Sequence[str], *, without: Collection[str] = ()
) -> SurfaceAUC:
    """Return the cross-validated AUC of a logistic regression on the standardised counts.

    ``positives[i]`` and ``negatives[i]`` answer one question and stand in one fold. ``without``
    names counts to leave out. The interval draws whole pairs (their out-of-fold scores).

    Raises:
        UserError: Fewer pairs than folds, sides of unequal length, or an unknown count.
    """
    if len(positives) != len(negatives) or len(positives) < FOLDS:
        raise UserError(
            f"the surface AUC needs at least {FOLDS} pairs of answers, got {len(positives)} "
            f"positive and {len(negatives)} negative ones; write more"
        )
    if unknown := sorted(set(without) - set(COUNTS)):
        raise UserError(f"no surface count {unknown[0]!r}; there are {', '.join(COUNTS)}")
    kept = [name for name in COUNTS if name not in without]
    counts = np.array([surface_counts(text) for text in [*positives, *negatives]])
    counts = counts[:, [COUNTS.index(name) for name in kept]]  # [2 × pairs, counts]
    pairs = len(positives)
    signs = np.repeat([1, 0], pairs)
    regression = make_pipeline(StandardScaler(), LogisticRegression())
    folds = {"groups": np.tile(np.arange(pairs), 2), "cv": GroupKFold(FOLDS)}
    scores = cross_val_predict(regression, counts, signs, **folds, method="decision_function")
    weights = regression.fit(counts, signs)[-1].coef_[0]
    # [pairs, pairs]: 1 where a positive score exceeds a negative one, ½ where they are equal
    above = (np.sign(scores[:pairs, None] - scores[None, pairs:]) + 1) / 2
    drawn = question_weights(pairs)
    low, high = percentile_bounds(np.sum((drawn @ above) * drawn, axis=1) / pairs**2)
    named = dict(zip(kept, map(float, weights), strict=True))
    return SurfaceAUC(float(above.mean()), low, high, named)


DUPLICATE_COSINE = 0.85
LEAK_COSINE = 0.75
WORDS = (25, 70)
MEAN_LENGTH_TOLERANCE = 0.05
MOST_EQUAL_OPENINGS = 4
MOST_SURFACE_AUC = 0.70


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
    counts = Counter(" ".join(answer.lower().split()[:2]) for answer in answers)
    return [
        f"{where}: {count} answers begin with {opening!r}; vary them"
        for opening, count in counts.items()
        if count > MOST_EQUAL_OPENINGS
    ]


def balance_problems(answers: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a problem where the mean lengths of several sets of answers differ too much."""
    means = {where: mean(map(words, texts)) for where, texts in answers.items() if texts}
    if not means or max(means.values()) - min(means.values()) <= (
        MEAN_LENGTH_TOLERANCE * max(means.values())
    ):
        return []
    shown = ", ".join(f"{where} {value:.1f}" for where, value in means.items())
    return [f"mean lengths in words differ ({shown}); a judge could go by length"]


def surface_problems(
    surface: SurfaceAUC | None, exception: SurfaceException | None = None
) -> list[str]:
    """Return a problem where surface counts tell the signs; excepted ones are left out before."""
    if surface is None or surface.auc <= MOST_SURFACE_AUC:
        return []
    telling = sorted(surface.weights.items(), key=lambda each: -abs(each[1]))[:3]
    shown = ", ".join(f"{name} {weight:+.1f}" for name, weight in telling)
    besides = f" besides {', '.join(exception.counts)}" if exception else ""
    return [
        f"train.jsonl: surface counts{besides} tell positive from negative answers (AUC "
        f"{surface.auc:.2f}, at most {MOST_SURFACE_AUC:.2f}; most telling: {shown}); rewrite pairs"
    ]


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


LEAST_PAIRS = 80
LEAST_LABELLED = 60
LEAST_FINETUNING = 50
INSTRUCTION_PAIRS = 5
QUESTIONS_PER_SPLIT = 20


@dataclass(frozen=True)
class DataReport:
    """What a check of one trait found; ``problems`` is empty when the data is sound.

    ``num_finetuning`` counts the questions of the finetuning sets (0 where there are none).
    ``nearest_leak`` is the largest cosine between a training question and a held-out one,
    ``nearest_duplicate`` the largest between two training questions. ``surface`` says how well
    nine surface counts tell the signs; ``surface_without`` the same without the counts that
    ``exception`` names, None where it names none.
    """

    trait: str
    num_pairs: int
    num_labelled: int
    num_finetuning: int
    num_variants: int
    words_positive: float
    words_negative: float
    nearest_duplicate: float
    nearest_leak: float
    surface: SurfaceAUC | None
    surface_without: SurfaceAUC | None
    exception: SurfaceException | None
    problems: tuple[str, ...]


def check_trait(trait: Trait, embedder: SentenceEmbedder) -> DataReport:
    """Check all files of a trait; malformed files raise UserError with file and line."""
    pairs, labelled = load_pairs(trait), load_labelled_answers(trait)
    train = embedded("train.jsonl", [pair.prompt[-1]["content"] for pair in pairs], embedder)
    variants = [load_trait(trait.folder / f"{name}.json") for name in list_variants(trait)]
    held_out = [
        embedded("judge_eval.jsonl", sorted({each.question for each in labelled}), embedder),
        *(
            embedded(f"{where} {split}", list(each.questions[split]), embedder)
            for where, each in [("trait.json", trait), *((v.label, v) for v in variants)]
            for split, questions in each.questions.items()
            if questions
        ),
    ]
    surface, surface_without = _surface(trait, pairs)
    finetuning, finetuning_problems = _finetuning(trait, train, held_out, embedder)
    problems = [
        *_count_problems(trait, pairs, labelled),
        *(line for each in variants for line in _elicitation_problems(each.label, each)),
        *_answer_problems(_answers(pairs)),
        *surface_problems(surface_without or surface, trait.surface_exception),
        *(line for each in (train, *held_out) for line in duplicate_problems(each)),
        *(line for each in held_out for line in leak_problems(train, each, LEAK_COSINE)),
        *(
            line
            for one, other in combinations(held_out, 2)
            for line in leak_problems(one, other, DUPLICATE_COSINE)
        ),
        *finetuning_problems,
    ]
    return DataReport(
        trait=trait.name,
        num_pairs=len(pairs),
        num_labelled=len(labelled),
        num_finetuning=finetuning,
        num_variants=len(variants),
        words_positive=mean(words(pair.positive[-1]["content"]) for pair in pairs),
        words_negative=mean(words(pair.negative[-1]["content"]) for pair in pairs),
        nearest_duplicate=float(np.max(off_diagonal(train.embeddings))),
        nearest_leak=max(float(np.max(train.embeddings @ each.embeddings.T)) for each in held_out),
        surface=surface,
        surface_without=surface_without,
        exception=trait.surface_exception,
        problems=tuple(problems),
    )


def _surface(
    trait: Trait, pairs: Sequence[ContrastivePair]
) -> tuple[SurfaceAUC | None, SurfaceAUC | None]:
    """Return the AUC of all surface counts, and without those that the trait excepts, if any."""
    positives, negatives = _answers(pairs).values()
    if len(pairs) < FOLDS:
        return None, None
    surface, excepted = surface_auc(positives, negatives), trait.surface_exception
    if excepted is None:
        return surface, None
    return surface, surface_auc(positives, negatives, without=excepted.counts)


def _finetuning(
    trait: Trait, train: Questions, held_out: Sequence[Questions], embedder: SentenceEmbedder
) -> tuple[int, list[str]]:
    """Return the number of finetuning questions, and what is wrong with the three sets."""
    present = [x for x in FINETUNING_LEVELS if (trait.folder / f"{x}.jsonl").is_file()]
    if not present:
        return 0, []
    if len(present) < len(FINETUNING_LEVELS):
        missing = sorted(set(FINETUNING_LEVELS) - set(present))
        return 0, [f"{missing[0]}.jsonl is missing beside {present[0]}.jsonl"]
    rows = {level: load_finetuning_rows(trait, level) for level in FINETUNING_LEVELS}
    answers = {f"{level}.jsonl": [row.answer for row in each] for level, each in rows.items()}
    asked = [[row.question for row in each] for each in rows.values()]
    problems = [] if asked[0] == asked[1] == asked[2] else ["the finetuning questions differ"]
    if len(asked[0]) < LEAST_FINETUNING:
        problems.append(f"normal.jsonl rows: {len(asked[0])}, expected {LEAST_FINETUNING}")
    questions = embedded("finetuning questions", asked[0], embedder)
    return len(asked[0]), [
        *problems,
        *_answer_problems(answers),
        *duplicate_problems(questions),
        *leak_problems(questions, train, DUPLICATE_COSINE),
        *(line for each in held_out for line in leak_problems(questions, each, LEAK_COSINE)),
    ]


def _elicitation_problems(where: str, trait: Trait) -> list[str]:
    """Check the counts of system prompts and questions."""
    return _too_few(
        (f"{where} instruction pairs", trait.instructions, INSTRUCTION_PAIRS),
        (f"{where} extract questions", trait.questions["extract"], QUESTIONS_PER_SPLIT),
        (f"{where} eval questions", trait.questions["eval"], QUESTIONS_PER_SPLIT),
    )


def _too_few(*counted: tuple[str, Sequence[Any], int]) -> list[str]:
    return [
        f"{what}: {len(found)}, expected at least {least}"
        for what, found, least in counted
        if len(found) < least
    ]


def _count_problems(
    trait: Trait, pairs: Sequence[ContrastivePair], labelled: Sequence[LabelledAnswer]
) -> list[str]:
    absent = sorted(set(LABELS) - {each.label for each in labelled})
    return [
        *_too_few(
            ("train.jsonl pairs", pairs, LEAST_PAIRS),
            ("judge_eval.jsonl answers", labelled, LEAST_LABELLED),
        ),
        *_elicitation_problems("trait.json", trait),
        *(f"judge_eval.jsonl has no answer labelled {label}" for label in absent),
    ]


def _answers(pairs: Sequence[ContrastivePair]) -> dict[str, Sequence[str]]:
    return {
        "train.jsonl positive": [pair.positive[-1]["content"] for pair in pairs],
        "train.jsonl negative": [pair.negative[-1]["content"] for pair in pairs],
    }


def _answer_problems(answers: Mapping[str, Sequence[str]]) -> list[str]:
    problems = []
    for where, texts in answers.items():
        problems += [*length_problems(where, texts), *opening_problems(where, texts)]
    return [*problems, *balance_problems(answers)]


def check_table(reports: Sequence[DataReport]) -> Table:
    """Return the figures of every trait."""
    rows = (
        [each.trait, str(each.num_pairs)]
        + [f"{each.words_positive:.1f} / {each.words_negative:.1f}", str(each.num_labelled)]
        + [str(each.num_finetuning), str(each.num_variants), f"{each.nearest_duplicate:.2f}"]
        + [f"{each.nearest_leak:.2f}", _surface_cell(each.surface), str(len(each.problems))]
        for each in reports
    )
    columns = "trait | pairs | words +/− | judged | finetune | variants"
    return Table.of(f"{columns} | max cosine | max leak | surface AUC | problems", rows)


def exception_lines(reports: Sequence[DataReport]) -> Iterator[str]:
    """Say which counts are a trait's nature, and what the surface tells without them."""
    for each in reports:
        if each.exception is not None:
            rest = f"{each.trait}: surface AUC {_surface_cell(each.surface_without)} without"
            yield f"{rest} {', '.join(each.exception.counts)}: {each.exception.reason}"


def _surface_cell(surface: SurfaceAUC | None) -> str:
    return "" if surface is None else f"{surface.auc:.2f} [{surface.low:.2f}, {surface.high:.2f}]"
