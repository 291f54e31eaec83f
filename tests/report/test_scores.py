"""Joining answers with verdicts, and the table in the form of the evaluation CSV."""

from __future__ import annotations

import csv
import itertools
import json
import math

import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.files import write_csv
from persona_lora.core.traits import load_trait
from persona_lora.report.scores import (
    UNSTEERED_CONDITION,
    Condition,
    answers_columns,
    answers_table,
    judges_of,
    marked,
    rows_of_series,
    score_answers,
    steered_series,
    with_mark,
)


def test_score_answers_takes_the_last_verdict_and_leaves_missing_ones_unscored(sweep_rows):
    answers, verdicts = sweep_rows(coefficients=(0.0, 1.0), prompts=(), questions=2)
    verdicts = [v for v in verdicts if (v["row"], v["criterion"]) != (1, "coherence")]
    verdicts.append({**verdicts[0], "score": 12.5})
    scored = score_answers(answers, verdicts, "sycophancy")
    assert scored[0].trait == 12.5
    assert scored[1].coherence is None


def test_unsteered_rows_are_coefficient_zero_of_every_series(sweep_rows):
    answers, verdicts = sweep_rows(
        layers=(3, 5), coefficients=(-0.0, 1.0), control=True, prompts=("prompt_pos",), questions=1
    )
    scored = score_answers(answers, verdicts, "sycophancy")
    series = steered_series(row.condition for row in scored)
    assert series == [("activation", 3), ("activation", 5), ("random", 3), ("random", 5)]
    for each in series:
        rows = rows_of_series(scored, each)
        assert [row.condition for row in rows] == [
            Condition(each.method, 0.0, each.layer),
            Condition(each.method, 1.0, each.layer),
        ]
        assert rows[0].answer["method"] == "none"


def test_rows_without_a_layer_steer_at_none(sweep_rows):
    answers, verdicts = sweep_rows(coefficients=(-0.0, 1.0), prompts=(), questions=1)
    assert all("layer" not in answer for answer in answers)
    conditions = [row.condition for row in score_answers(answers, verdicts, "sycophancy")]
    assert conditions == [Condition("lora", 0.0), Condition("lora", 1.0)]
    assert str(conditions[0].coefficient) == "0.0"


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


def test_coefficients_of_two_methods_are_refused_but_not_those_of_the_control():
    lora, vector = Condition("lora", 1.0), Condition("activation", 1.0, 3)
    control = Condition("random", 1.0, 3)
    with pytest.raises(UserError, match="activation, lora"):
        steered_series([lora, vector])
    assert steered_series([control, vector]) == [("activation", 3), ("random", 3)]
    assert steered_series([UNSTEERED_CONDITION, Condition("prompt_pos", None)]) == []


@pytest.mark.parametrize("method", ["activation", "zeal"])  # before and after "random" in order
def test_series_stand_by_their_layers_and_all_controls_after_them(method):
    places = [("random", 0), ("random", 12), (method, 12), (method, 1), (method, 0), ("random", 1)]
    wanted = [(method, 0), (method, 1), (method, 12), ("random", 0), ("random", 1), ("random", 12)]
    for order in itertools.permutations(places):
        assert steered_series(Condition(name, 1.0, layer) for name, layer in order) == wanted


def test_the_answers_table_names_layers_where_there_are_any(sweep_rows):
    answers, verdicts = sweep_rows(layers=(3,), coefficients=(1.0,), prompts=(), questions=1)
    columns = answers_columns("sycophancy", answers)
    assert columns[:3] == ["method", "layer", "coefficient"]
    table = answers_table(answers, verdicts, "sycophancy")
    assert [[row[name] for name in columns[:3]] for row in table] == [
        ["none", None, 0.0],
        ["activation", 3, 1.0],
    ]
    assert "layer" not in answers_columns("sycophancy", [{**answers[0], "layer": None}])


def test_answers_table_writes_the_evaluation_columns(sweep_rows, tmp_path):
    answers, verdicts = sweep_rows(coefficients=(0.0, 1.0), questions=2)
    verdicts[0] = {**verdicts[0], "score": None}
    table = answers_table(answers, verdicts, "sycophancy")
    write_csv(tmp_path / "a.csv", answers_columns("sycophancy"), table)
    with (tmp_path / "a.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == [
        *("method", "coefficient", "question", "prompt", "answer"),
        *("sycophancy", "coherence", "judge"),
    ]
    assert len(rows) == len(answers)
    assert rows[0]["sycophancy"] == ""
    assert rows[1]["answer"] == answers[1]["answer"]
    assert answers_columns("evil", sweep=False) == [
        *("question", "prompt", "answer", "evil", "coherence", "judge"),
    ]


BOTH = with_mark("reader", ("evil", "coherence"), {"evil", "coherence"})


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (("reader (unfit for coherence)", "reader (unfit for evil)"), BOTH),
        ((BOTH, "reader (unfit for evil)", "reader"), BOTH),
        (("embedding, reader", "reader", "", "embedding"), "embedding, reader"),
        (("embedding, reader", f"{BOTH}, local:a/b"), f"embedding, {BOTH}, local:a/b"),
        (
            ("reader (unfit for evil)", BOTH, "reader (unfit for calm), words (unfit for calm)"),
            "reader (unfit for evil, calm, coherence), words (unfit for calm)",
        ),
        (("local (8b), reader", "reader (unfit for evil)"), "local (8b), reader (unfit for evil)"),
        ((), ""),
    ],
)
def test_a_judge_is_named_once_with_all_that_it_is_unfit_for(said, wanted):
    assert marked(*said) == wanted
    assert marked(marked(*said)) == wanted


def test_the_judges_of_verdicts_are_marked_as_one_judge_of_a_file_is():
    verdicts = [
        {"criterion": each, "judge": with_mark("reader", [each], {"evil", "coherence"})}
        for each in ("evil", "coherence")
    ]
    assert judges_of(verdicts, "evil", "coherence") == BOTH
    assert judges_of(verdicts, "evil") == "reader (unfit for evil)"
    assert judges_of(verdicts, "evil", "coherence", bare=True) == "reader"


STANDING = [each for each in answers_columns("calm", [{"layer": 3}]) if each != "calm"]


@pytest.mark.parametrize("name", [*STANDING, "sense", "seed", "Coherence"])
def test_no_trait_has_the_name_of_what_stands_beside_its_scores(tmp_path, name):
    trait = {
        "instruction": [{"pos": "Be calm.", "neg": "Be wild."}],
        "questions": {"extract": ["Why?"], "eval": ["How?"]},
        "eval_prompt": "{question} {answer}",
    }
    for folder in (tmp_path / name, tmp_path / "calm"):
        folder.mkdir()
        (folder / "trait.json").write_text(json.dumps(trait))
    assert load_trait("calm", tmp_path).name == "calm"
    with pytest.raises(UserError, match=f"name '{name}' is that of something else that stands"):
        load_trait(name, tmp_path)
