"""Joining answers with verdicts, and the table in the form of the evaluation CSV."""

from __future__ import annotations

import csv
import math

import pytest

from persona_lora.analysis.scores import answers_columns, answers_table, score_answers
from persona_lora.core.errors import UserError
from persona_lora.core.files import write_csv


def test_score_answers_takes_the_last_verdict_and_leaves_missing_ones_unscored(sweep_rows):
    answers, verdicts = sweep_rows(coefficients=(0.0, 1.0), prompts=(), questions=2)
    verdicts = [v for v in verdicts if (v["row"], v["criterion"]) != (1, "coherence")]
    verdicts.append({**verdicts[0], "score": 12.5})
    scored = score_answers(answers, verdicts, "sycophancy")
    assert scored[0].trait == 12.5
    assert scored[1].coherence is None


def test_score_answers_counts_unsteered_rows_as_coefficient_zero(sweep_rows):
    answers, verdicts = sweep_rows(coefficients=(-0.0, 1.0), prompts=(), questions=1)
    answers[0] = {**answers[0], "method": "none", "coefficient": None}
    conditions = [row.condition for row in score_answers(answers, verdicts, "sycophancy")]
    assert conditions == [("lora", 0.0), ("lora", 1.0)]


def test_score_answers_refuses_verdicts_of_another_run(sweep_rows):
    answers, verdicts = sweep_rows(questions=2)
    with pytest.raises(UserError, match="different runs"):
        score_answers(answers[:-1], verdicts, "sycophancy")


@pytest.mark.parametrize("score", [math.nan, 101, -1, "80"])
def test_score_answers_refuses_a_score_that_is_no_number_from_0_to_100(sweep_rows, score):
    answers, verdicts = sweep_rows(questions=1)
    verdicts[3] = {**verdicts[3], "score": score}
    with pytest.raises(UserError, match="from 0 to 100"):
        score_answers(answers, verdicts, "sycophancy")


def test_score_answers_refuses_coefficients_of_two_methods(sweep_rows):
    answers, verdicts = sweep_rows(questions=1)
    answers[1] = {**answers[1], "method": "activation"}
    with pytest.raises(UserError, match="activation, lora"):
        score_answers(answers, verdicts, "sycophancy")


def test_answers_table_writes_the_evaluation_columns(sweep_rows, tmp_path):
    answers, verdicts = sweep_rows(coefficients=(0.0, 1.0), questions=2)
    verdicts[0] = {**verdicts[0], "score": None}
    table = answers_table(answers, verdicts, "sycophancy")
    write_csv(tmp_path / "a.csv", answers_columns("sycophancy"), table)
    with (tmp_path / "a.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == [
        *("method", "coefficient", "question", "prompt", "answer"),
        *("sycophancy", "coherence"),
    ]
    assert len(rows) == len(answers)
    assert rows[0]["sycophancy"] == ""
    assert rows[1]["answer"] == answers[1]["answer"]
    assert answers_columns("evil", sweep=False) == [
        *("question", "prompt", "answer", "evil", "coherence"),
    ]
