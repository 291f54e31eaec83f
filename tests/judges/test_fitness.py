"""Agreement of judges with labels."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest

from persona_lora.core.chat import Verdict
from persona_lora.judges.fitness import (
    agreement,
    own_agreement,
    rater_agreement,
    validate_judge,
)
from persona_lora.judges.labels import load_ratings
from persona_lora.report.rated import by_part, model_of, reliability
from tests.judges.rated import rated_rows, write_ratings


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
    assert agreement(verdicts(1.0, None, 0.0, None), [0.0] * 4).coverage == 0.5
    assert agreement([], []).coverage == 0.0


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


def test_a_judge_that_knows_conditions_and_nothing_inside_them_is_unfit(trait, caplog):
    write_ratings(trait, rated_rows())
    rows = load_ratings(trait)
    level = {"unsteered": 20.0, "lora +1": 80.0, "prompt": 50.0}
    rows = [
        dataclasses.replace(row, trait=(level[row.condition] + at % 7,) * 2)
        for at, row in enumerate(rows)
    ]
    blind = [Verdict("flattery", level[row.condition], "", "j") for row in rows]
    validation = own_agreement(blind, rows)
    assert validation.spearman > 0.9
    assert (validation.own.within, validation.fit) == (0.0, False)
    seeing = [Verdict("flattery", row.rating("trait"), "", "j") for row in rows]
    assert own_agreement(seeing, rows).fit is True


def test_bias_calibration_and_models_are_told_apart(trait):
    write_ratings(trait, rated_rows())
    rows = load_ratings(trait)
    shift = {"unsteered": 0.0, "lora +1": 10.0, "prompt": -5.0}
    scores = [row.rating("trait") + shift[row.condition] for row in rows]
    verdicts = [Verdict("flattery", score, "", "j") for score in scores]
    own = own_agreement([*verdicts[:-1], Verdict("flattery", None, "no", "j")], rows).own
    kinds = by_part(own.compared, lambda row: row["condition"])
    assert {name: each.bias for name, each in kinds.items()} == pytest.approx(shift)
    models = by_part(own.compared, model_of)
    assert {name: each.n for name, each in models.items()} == {"small": 26, "large": 18}
    assert sum(each.n for each in reliability(own.compared)) == len(rows) - 1
    exact = own_agreement([Verdict("flattery", row.rating("trait"), "", "j") for row in rows], rows)
    assert exact.own.calibration_error == pytest.approx(0.0)
    assert own.calibration_error > 1


def test_coherence_is_held_against_the_sense_ratings(trait):
    write_ratings(trait, rated_rows())
    rows = load_ratings(trait)
    verdicts = [Verdict("coherence", row.rating("sense"), "", "j") for row in rows]
    assert own_agreement(verdicts, rows).spearman == pytest.approx(1.0)


def test_a_trait_with_rated_answers_validates_any_judge_on_their_validation_part(trait, caplog):
    write_ratings(trait, rated_rows())
    good = LookupJudge(lambda each: 90.0 if "admire" in each.answer else 10.0)
    with caplog.at_level(logging.WARNING):
        validation = validate_judge(good, trait)
    assert validation.n == len(load_ratings(trait, "validation"))
    assert validation.fit is (validation.own.within >= 0.5)
    with caplog.at_level(logging.WARNING):
        assert validate_judge(LookupJudge(lambda each: 5.0), trait).fit is False
    assert "UNFIT JUDGE: lookup on 'flattery'" in caplog.text


def test_a_grade_that_nobody_gave_is_still_a_step(trait):
    """Without all labels the distance from 10 to 90 would be that of neighbours."""
    rows = rated_rows()
    pairs = [(0, 10), (10, 0), (90, 100), (100, 90), (15, 25)] * 9
    write_ratings(
        trait,
        [row | {"trait": list(pair)} for row, pair in zip(rows, pairs, strict=True)],
    )
    first, second = (np.floor(np.array(each) / 10 + 0.5) for each in zip(*pairs, strict=True))
    by_chance = (np.subtract.outer(first, second) ** 2).mean()
    expected = 1 - ((first - second) ** 2).mean() / by_chance
    assert rater_agreement(load_ratings(trait), "trait").kappa == pytest.approx(expected)


def test_raters_are_compared_by_scale(trait):
    write_ratings(trait, rated_rows())
    found = rater_agreement(load_ratings(trait), "trait")
    assert (found.scale, found.n) == ("trait", 45)
    assert 0.9 < found.kappa <= 1
    assert found.spearman > 0.9
    assert found.mean_difference > 0  # the second pass never takes anything off
