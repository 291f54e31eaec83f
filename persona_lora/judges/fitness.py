"""How well a judge agrees with labels: on hand-written answers, and on a model's own.

Only the second tells how good it is at what it is used for. All conditions together say little:
telling a steered answer from a plain one is easier than telling which of two answers of one model
under one condition shows the trait more. So the rank correlation is also taken inside each
condition, and a judge that does not reach ``FIT_WITHIN`` there is called unfit. Refuses to know how
a judge comes to its scores.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score

from persona_lora.core.chat import COHERENCE, Exchange, Verdict
from persona_lora.core.traits import Trait, has_labels, load_labelled_answers
from persona_lora.judges.judging import Judge
from persona_lora.judges.labels import RatedAnswer, Scale, has_ratings, load_ratings
from persona_lora.report.resampling import auc_of

logger = logging.getLogger(__name__)

TRUSTED_AUC = 0.8
FIT_WITHIN = 0.5
POSITIVE_LABEL = 75
NEGATIVE_LABEL = 25
RELIABILITY_BINS = 5
KAPPA_STEP = 10  # ratings of 0–100 are compared as eleven grades
Pair = tuple[float, float]  # a score and a rating


class Agreement(NamedTuple):
    """What ``JudgeValidation`` holds over all, for a part of the answers."""

    auc: float | None
    spearman: float | None
    n: int


class Compared(NamedTuple):
    """A rated answer's condition and question, what a judge said of it, and the mean rating."""

    model: str
    condition: str
    question: str
    score: float | None
    rating: float


class Bin(NamedTuple):
    """Answers of like scores: if the judge is calibrated, both means are about the same."""

    score: float
    label: float
    n: int


@dataclass(frozen=True)
class OwnAnswers:
    """How a judge agrees with blind ratings of answers that models gave.

    ``within``: Spearman's ρ inside each model and condition, averaged with their numbers of answers
    as weights. ``bias``: mean score − mean rating, by condition. ``calibration_error``: the mean
    distance of both over the bins of ``reliability``, weighted by their answers (ECE), in points.
    ``compared`` has what the judge said of each answer, as dictionaries of ``Compared``.
    """

    within: float | None
    bias: dict[str, float]
    by_model: dict[str, Agreement]
    calibration_error: float
    reliability: tuple[Bin, ...]
    compared: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class JudgeValidation:
    """How well a judge's scores agree with known labels on one criterion.

    ``auc``: probability that a clearly positive item (label ≥ 75) outscores a clearly negative
    one (label ≤ 25), ties counted half. ``spearman``: rank correlation of score and label over
    all scored items. Both are None where they are undefined (a class without scored items, or
    constant scores). ``n``: items shown; ``coverage``: share of them that got a score. ``own`` is
    None where the labels are of hand-written answers. ``fit`` tells whether ``own.within`` reaches
    0.5; None where that is not known.
    """

    judge: str
    criterion: str
    auc: float | None
    spearman: float | None
    n: int
    coverage: float
    own: OwnAnswers | None = None
    fit: bool | None = None


@dataclass(frozen=True)
class RaterAgreement:
    """How far two blind passes agree on one scale: what a judge can hardly surpass.

    ``kappa`` is Cohen's, with quadratic weights, on grades of ten.
    """

    scale: Scale
    n: int
    kappa: float
    spearman: float
    within: float | None
    mean_difference: float


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's ρ, or None where it is undefined (under 3 pairs, a constant side)."""
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)


def within_groups(
    scores: Sequence[float], labels: Sequence[float], groups: Sequence[str]
) -> float | None:
    """Return Spearman's ρ inside each group, averaged with the groups' sizes as weights.

    A group of fewer than three items, or whose labels are all the same, says nothing and is left
    out; scores that are all the same beside labels that differ count as 0. None where none is left.
    """
    found: list[tuple[float, int]] = []
    for pairs in _parts(list(zip(scores, labels, strict=True)), groups).values():
        ours, theirs = _columns(pairs)
        if len(pairs) >= 3 and len(set(theirs)) > 1:
            found.append((rank_correlation(ours, theirs) or 0.0, len(pairs)))
    total = sum(size for _, size in found)
    return sum(rho * size for rho, size in found) / total if total else None


def agreement(verdicts: Sequence[Verdict], labels: Sequence[float]) -> JudgeValidation:
    """Compare one judge's verdicts on one criterion with labels from 0 to 100, item by item."""
    scored = [
        (verdict.score, float(label))
        for verdict, label in zip(verdicts, labels, strict=True)
        if verdict.score is not None
    ]
    over_all = _agreement(*_columns(scored))
    return JudgeValidation(
        judge=verdicts[0].judge if verdicts else "",
        criterion=verdicts[0].criterion if verdicts else "",
        auc=over_all.auc,
        spearman=over_all.spearman,
        n=len(verdicts),
        coverage=len(scored) / max(len(verdicts), 1),
    )


def own_agreement(verdicts: Sequence[Verdict], rows: Sequence[RatedAnswer]) -> JudgeValidation:
    """Compare one judge's verdicts on one criterion with blind ratings of models' answers."""
    scale: Scale = "sense" if verdicts[0].criterion == COHERENCE else "trait"
    whole = agreement(verdicts, [row.rating(scale) for row in rows])
    compared = [
        Compared(row.model, row.condition, row.question, verdict.score, row.rating(scale))
        for verdict, row in zip(verdicts, rows, strict=True)
    ]
    rated = [each for each in compared if each.score is not None]
    pairs = [(each.score, each.rating) for each in compared if each.score is not None]
    within = within_groups(*_columns(pairs), [f"{each.model}: {each.condition}" for each in rated])
    reliability = _reliability(pairs)
    gaps = [abs(each.score - each.label) * each.n for each in reliability]
    by_condition = _parts(pairs, [each.condition for each in rated])
    by_model = _parts(pairs, [each.model for each in rated])
    own = OwnAnswers(
        within=within,
        bias={
            name: float(np.mean([score - rating for score, rating in some]))
            for name, some in by_condition.items()
        },
        by_model={name: _agreement(*_columns(some)) for name, some in by_model.items()},
        calibration_error=sum(gaps) / max(1, len(pairs)),
        reliability=reliability,
        compared=tuple(each._asdict() for each in compared),
    )
    return replace(whole, own=own, fit=within is not None and within >= FIT_WITHIN)


def _columns(pairs: Sequence[Pair]) -> tuple[list[float], list[float]]:
    """Return the scores and the ratings of pairs."""
    return [score for score, _ in pairs], [rating for _, rating in pairs]


def _parts(pairs: Sequence[Pair], names: Sequence[str]) -> dict[str, list[Pair]]:
    """Return the pairs of each name, in alphabetical order."""
    return {
        name: [pair for pair, each in zip(pairs, names, strict=True) if each == name]
        for name in sorted(set(names))
    }


def _agreement(scores: Sequence[float], labels: Sequence[float]) -> Agreement:
    ours, theirs = np.array(scores), np.array(labels)
    above, below = ours[theirs >= POSITIVE_LABEL], ours[theirs <= NEGATIVE_LABEL]
    auc = auc_of(above, below) if len(above) and len(below) else None
    return Agreement(auc, rank_correlation(scores, labels), len(scores))


def _reliability(pairs: Sequence[Pair]) -> tuple[Bin, ...]:
    """Return bins of about equal numbers of answers, in the order of their scores."""
    parts = np.array_split(np.array(sorted(pairs)).reshape(-1, 2), RELIABILITY_BINS)
    means = [(part.mean(axis=0).tolist(), len(part)) for part in parts if len(part)]
    return tuple(Bin(score, label, n) for (score, label), n in means)


def rater_agreement(rows: Sequence[RatedAnswer], scale: Scale) -> RaterAgreement:
    """Compare the two passes over rated answers."""
    first, second = np.array([row.passes(scale) for row in rows]).T
    grades = [np.round(each / KAPPA_STEP).astype(int) for each in (first, second)]
    return RaterAgreement(
        scale,
        len(rows),
        float(cohen_kappa_score(*grades, weights="quadratic")),
        float(spearmanr(first, second).statistic),
        within_groups(first, second, [f"{row.model}: {row.condition}" for row in rows]),
        float((second - first).mean()),
    )


def validate_judge(judge: Judge, trait: Trait) -> JudgeValidation:
    """Judge answers whose labels are known and compare: models' own where the trait has them.

    Those are the validation part of ``onpolicy.jsonl``; without it the hand-written answers of
    ``judge_eval.jsonl``. Logs a warning where the judge should not be trusted.
    """
    if has_ratings(trait):
        rows = load_ratings(trait, "validation")
        validation = own_agreement(judge.judge([row.exchange for row in rows], trait.name), rows)
    elif has_labels(trait):
        labelled = load_labelled_answers(trait)
        asked = [Exchange(each.question, each.answer) for each in labelled]
        validation = agreement(judge.judge(asked, trait.name), [each.label for each in labelled])
    else:
        logger.warning(
            "JUDGE NOT VALIDATED: the trait %s has no judge_eval.jsonl of labelled answers; how "
            "far its scores can be trusted is not known",
            trait.name,
        )
        return JudgeValidation(judge.name, trait.name, auc=None, spearman=None, n=0, coverage=0.0)
    warn_if_untrusted(validation)
    return validation


def warn_if_untrusted(validation: JudgeValidation) -> None:
    """Log a warning for an AUC under 0.8, or none, and for a judge that is unfit."""
    if validation.own is not None and not validation.fit:
        logger.warning(
            "UNFIT JUDGE: %s on %r: within a condition its rank correlation with blind ratings of "
            "models' own answers is %s, under %.1f; compare conditions by another judge",
            validation.judge,
            validation.criterion,
            "undefined" if validation.own.within is None else f"{validation.own.within:.2f}",
            FIT_WITHIN,
        )
    if validation.auc is None:
        logger.warning(
            "JUDGE NOT VALIDATED: %s scored too few labelled answers on %r to compute an AUC "
            "(coverage %.0f%% of %d); do not trust its scores",
            validation.judge,
            validation.criterion,
            100 * validation.coverage,
            validation.n,
        )
    elif validation.auc < TRUSTED_AUC:
        logger.warning(
            "WEAK JUDGE: %s has AUC %.2f on %r (%d labelled answers), under %.1f; do not trust "
            "its scores: use another judge, or better training answers",
            validation.judge,
            validation.auc,
            validation.criterion,
            validation.n,
            TRUSTED_AUC,
        )
