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
from persona_lora.report.rated import (
    FIT_WITHIN,
    of_model,
    rank_correlation,
    reliability,
    within,
    within_groups,
)
from persona_lora.report.resampling import auc_of

logger = logging.getLogger(__name__)

TRUSTED_AUC = 0.8
POSITIVE_LABEL = 75
NEGATIVE_LABEL = 25
KAPPA_STEP = 10  # ratings of 0–100 are compared as eleven grades


class Compared(NamedTuple):
    """A rated answer's condition and question, what a judge said of it, and the mean rating."""

    model: str
    condition: str
    question: str
    score: float | None
    rating: float


@dataclass(frozen=True)
class OwnAnswers:
    """How a judge agrees with blind ratings of answers that models gave.

    ``within``: Spearman's ρ inside each model and condition, averaged with their numbers of answers
    as weights. ``calibration_error``: the mean distance of score and rating over bins of like
    scores, weighted by their answers (ECE), in points. ``compared`` has what the judge said of each
    answer, as dictionaries of ``Compared``.
    """

    within: float | None
    calibration_error: float
    compared: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class JudgeValidation:
    """How well a judge's scores agree with known labels on one criterion.

    ``auc``: probability that a clearly positive item (label ≥ 75) outscores a clearly negative
    one (label ≤ 25), ties counted half. ``spearman``: rank correlation of score and label over
    all scored items. Both are None where they are undefined (a class without scored items, or
    constant scores). ``n``: items shown; ``coverage``: share of them that got a score. ``own`` is
    None where the labels are of hand-written answers. ``fit`` tells whether ``own.within`` reaches
    0.5, and in a run also that of its own model's answers, where some were rated; None where that
    is not known.
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


def agreement(verdicts: Sequence[Verdict], labels: Sequence[float]) -> JudgeValidation:
    """Compare one judge's verdicts on one criterion with labels from 0 to 100, item by item."""
    scored = [
        (verdict.score, float(label))
        for verdict, label in zip(verdicts, labels, strict=True)
        if verdict.score is not None
    ]
    ours, theirs = [score for score, _ in scored], [label for _, label in scored]
    return JudgeValidation(
        judge=verdicts[0].judge if verdicts else "",
        criterion=verdicts[0].criterion if verdicts else "",
        auc=_auc(scored),
        spearman=rank_correlation(ours, theirs),
        n=len(verdicts),
        coverage=len(scored) / max(len(verdicts), 1),
    )


def own_agreement(verdicts: Sequence[Verdict], rows: Sequence[RatedAnswer]) -> JudgeValidation:
    """Compare one judge's verdicts on one criterion with blind ratings of models' answers."""
    scale: Scale = "sense" if verdicts[0].criterion == COHERENCE else "trait"
    whole = agreement(verdicts, [row.rating(scale) for row in rows])
    compared = tuple(
        Compared(row.model, row.condition, row.question, verdict.score, row.rating(scale))._asdict()
        for verdict, row in zip(verdicts, rows, strict=True)
    )
    rho, bins = within(compared), reliability(compared)
    gaps = [abs(each.score - each.rating) * each.n for each in bins]
    own = OwnAnswers(rho, sum(gaps) / max(1, sum(each.n for each in bins)), compared)
    return replace(whole, own=own, fit=rho is not None and rho >= FIT_WITHIN)


def fit_of(validation: JudgeValidation, model: Any) -> JudgeValidation:
    """Return the validation with ``fit`` of all models' answers and of those of ``model``.

    Logs a warning where the judge is unfit on the second alone.
    """
    theirs = () if validation.own is None else of_model(validation.own.compared, model)
    rho = within(theirs)
    if not validation.fit or rho is None or rho >= FIT_WITHIN:
        return validation
    _warn_unfit(validation, f"answers of {model}", rho)
    return replace(validation, fit=False)


def _auc(pairs: Sequence[tuple[float, float]]) -> float | None:
    above = [score for score, label in pairs if label >= POSITIVE_LABEL]
    below = [score for score, label in pairs if label <= NEGATIVE_LABEL]
    return auc_of(np.array(above), np.array(below)) if above and below else None


def rater_agreement(rows: Sequence[RatedAnswer], scale: Scale) -> RaterAgreement:
    """Compare the two passes over rated answers."""
    first, second = np.array([row.passes(scale) for row in rows]).T
    grades = [np.floor(each / KAPPA_STEP + 0.5).astype(int) for each in (first, second)]
    labels = np.arange(100 // KAPPA_STEP + 1)
    return RaterAgreement(
        scale,
        len(rows),
        float(cohen_kappa_score(*grades, labels=labels, weights="quadratic")),
        float(spearmanr(first, second).statistic),
        within_groups(first, second, [f"{row.model}: {row.condition}" for row in rows]),
        float((second - first).mean()),
    )


def validate_judge(judge: Judge, trait: Trait, criterion: str | None = None) -> JudgeValidation:
    """Judge answers whose labels are known and compare: models' own where the trait has them.

    Those are the validation part of ``onpolicy.jsonl``, which are rated for coherence as well;
    without it the hand-written answers of ``judge_eval.jsonl``, for the trait alone. Logs a warning
    where the judge should not be trusted.
    """
    if has_ratings(trait):
        rows = load_ratings(trait, "validation")
        verdicts = judge.judge([row.exchange for row in rows], criterion or trait.name)
        validation = own_agreement(verdicts, rows)
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
        _warn_unfit(validation, "models' own answers", validation.own.within)
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


def _warn_unfit(validation: JudgeValidation, answers: str, rho: float | None) -> None:
    logger.warning(
        "UNFIT JUDGE: %s on %r: within a condition its rank correlation with blind ratings of "
        "%s is %s, under %.1f; compare conditions by another judge",
        validation.judge,
        validation.criterion,
        answers,
        "undefined" if rho is None else f"{rho:.2f}",
        FIT_WITHIN,
    )
