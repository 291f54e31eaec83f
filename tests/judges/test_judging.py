"""Agreement of judges with labels."""

from __future__ import annotations

import logging

import pytest

from persona_lora.core.chat import Verdict
from persona_lora.judges.judging import agreement, coverage, rank_correlation, validate_judge


def verdicts(*scores: float | None) -> list[Verdict]:
    return [Verdict("flattery", score, "" if score is not None else "no", "j") for score in scores]


class LookupJudge:
    """Scores by the answer's text."""

    name = "lookup"

    def __init__(self, score) -> None:
        self._score = score

    def judge(self, exchanges, criterion):
        return [Verdict(criterion, self._score(each), "", self.name) for each in exchanges]


def test_coverage_counts_scored_and_is_zero_for_nothing():
    assert coverage(verdicts(1.0, None, 0.0, None)) == 0.5
    assert coverage([]) == 0.0


def test_agreement_auc_is_the_share_of_ordered_pairs_and_ignores_the_middle():
    scores = (10.0, 60.0, 99.0, 50.0, 90.0)
    labels = (0, 25, 50, 75, 100)
    # pairs (75 or 100) over (0 or 25): 50>10, 50<60, 90>10, 90>60
    validation = agreement(verdicts(*scores), labels)
    assert validation.auc == pytest.approx(3 / 4)
    assert (validation.n, validation.coverage) == (5, 1.0)


def test_agreement_leaves_unscored_out_and_reports_coverage():
    validation = agreement(verdicts(1.0, None, 2.0, 3.0), (0, 0, 75, 100))
    assert validation.auc == 1.0
    assert validation.spearman == pytest.approx(1.0)
    assert validation.coverage == 0.75


def test_agreement_is_undefined_without_both_classes_or_with_constant_scores():
    assert agreement(verdicts(1.0, 2.0), (0, 25)).auc is None
    constant = agreement(verdicts(5.0, 5.0, 5.0), (0, 50, 100))
    assert constant.spearman is None
    assert constant.auc == 0.5


def test_rank_correlation_needs_three_pairs():
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert rank_correlation([1.0, 2.0, 3.0], [9.0, 4.0, 1.0]) == pytest.approx(-1.0)


def test_validate_judge_warns_loudly_about_a_weak_judge_only(trait, caplog):
    good = LookupJudge(lambda each: 90.0 if "admire" in each.answer else 10.0)
    with caplog.at_level(logging.WARNING):
        assert validate_judge(good, trait).auc == 1.0
    assert not caplog.records
    bad = LookupJudge(lambda each: 10.0 if "admire" in each.answer else 90.0)
    with caplog.at_level(logging.WARNING):
        assert validate_judge(bad, trait).auc == 0.0
    assert "WEAK JUDGE" in caplog.text


def test_validate_judge_warns_when_nothing_is_scored(trait, caplog):
    validation = validate_judge(LookupJudge(lambda each: None), trait)
    assert (validation.auc, validation.coverage) == (None, 0.0)
    assert "NOT VALIDATED" in caplog.text
