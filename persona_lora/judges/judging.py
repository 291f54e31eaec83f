"""What a judge is, several judges as one, and how well one agrees with hand-written labels.

Works for any judge; refuses to know how a judge comes to its scores."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from persona_lora.core.chat import Exchange, Verdict
from persona_lora.core.errors import UserError
from persona_lora.core.traits import Trait, has_labels, load_labelled_answers

logger = logging.getLogger(__name__)

TRUSTED_AUC = 0.8
POSITIVE_LABEL = 75
NEGATIVE_LABEL = 25


class Judge(Protocol):
    """Scores answers on a criterion: the name of the judge's trait, or ``COHERENCE``."""

    @property
    def name(self) -> str:
        """What verdicts carry as ``judge``."""

    def judge(self, exchanges: Sequence[Exchange], criterion: str) -> list[Verdict]:
        """Return one verdict per exchange, in order; raises UserError for an unknown criterion."""


@dataclass(frozen=True)
class JudgeValidation:
    """How well a judge's scores agree with known labels on one criterion.

    ``auc``: probability that a clearly positive item (label ≥ 75) outscores a clearly negative
    one (label ≤ 25), ties counted half. ``spearman``: rank correlation of score and label over
    all scored items. Both are None where they are undefined (a class without scored items, or
    constant scores). ``n``: items shown; ``coverage``: share of them that got a score.
    """

    judge: str
    criterion: str
    auc: float | None
    spearman: float | None
    n: int
    coverage: float


def coverage(verdicts: Sequence[Verdict]) -> float:
    """Return the share of verdicts with a score, in [0, 1]; 0 for no verdicts."""
    return sum(verdict.score is not None for verdict in verdicts) / max(len(verdicts), 1)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's ρ, or None where it is undefined (under 3 pairs, a constant side)."""
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)


def agreement(verdicts: Sequence[Verdict], labels: Sequence[float]) -> JudgeValidation:
    """Compare one judge's verdicts on one criterion with labels from 0 to 100, item by item."""
    scored = [
        (verdict.score, label)
        for verdict, label in zip(verdicts, labels, strict=True)
        if verdict.score is not None
    ]
    clear = [
        (score, label >= POSITIVE_LABEL)
        for score, label in scored
        if label >= POSITIVE_LABEL or label <= NEGATIVE_LABEL
    ]
    both_classes = len({positive for _, positive in clear}) == 2
    auc = (
        roc_auc_score([each for _, each in clear], [each for each, _ in clear])
        if both_classes
        else None
    )
    return JudgeValidation(
        judge=verdicts[0].judge if verdicts else "",
        criterion=verdicts[0].criterion if verdicts else "",
        auc=None if auc is None else float(auc),
        spearman=rank_correlation([each for each, _ in scored], [each for _, each in scored]),
        n=len(verdicts),
        coverage=coverage(verdicts),
    )


def validate_judge(judge: Judge, trait: Trait) -> JudgeValidation:
    """Judge the trait's hand-labelled answers (``judge_eval.jsonl``) and compare with the labels.

    Logs a warning when the AUC is under 0.8 or undefined, and when a trait has no labelled answers:
    such scores should not be trusted.
    """
    if not has_labels(trait):
        logger.warning(
            "JUDGE NOT VALIDATED: the trait %s has no judge_eval.jsonl of labelled answers; how "
            "far its scores can be trusted is not known",
            trait.name,
        )
        return JudgeValidation(judge.name, trait.name, auc=None, spearman=None, n=0, coverage=0.0)
    labelled = load_labelled_answers(trait)
    exchanges = [Exchange(each.question, each.answer) for each in labelled]
    validation = agreement(judge.judge(exchanges, trait.name), [each.label for each in labelled])
    warn_if_untrusted(validation)
    return validation


def warn_if_untrusted(validation: JudgeValidation) -> None:
    """Log a warning when ``validation`` shows an AUC under 0.8, or none."""
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


class MultiJudge:
    """The mean of several judges' scores, over those that scored.

    A verdict's reason lists each judge's score, then their range and standard deviation (of the
    judges at hand, not of a population); for a judge that did not score it says why.
    """

    def __init__(self, judges: Sequence[Judge]) -> None:
        names = [judge.name for judge in judges]
        if not names or len(set(names)) < len(names):
            raise UserError(f"a multi-judge needs judges of different names, got {names}")
        self.judges = tuple(judges)

    @property
    def name(self) -> str:
        """The judges' names, joined by a plus sign."""
        return "multi:" + "+".join(judge.name for judge in self.judges)

    def judge(self, exchanges: Sequence[Exchange], criterion: str) -> list[Verdict]:
        """Return one mean verdict per exchange, in order."""
        by_judge = [judge.judge(exchanges, criterion) for judge in self.judges]
        return [_mean_verdict(item, criterion, self.name) for item in zip(*by_judge, strict=True)]


def _mean_verdict(verdicts: Sequence[Verdict], criterion: str, name: str) -> Verdict:
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    parts = [
        f"{verdict.judge}: "
        + (f"unscored ({verdict.reason})" if verdict.score is None else f"{verdict.score:.1f}")
        for verdict in verdicts
    ]
    if not scores:
        return Verdict(criterion, None, "; ".join(parts), name)
    spread = f"range {max(scores) - min(scores):.1f}, sd {statistics.pstdev(scores):.1f}"
    return Verdict(criterion, statistics.fmean(scores), "; ".join([*parts, spread]), name)
