"""The corrected mean: right where the judge is wrong, with intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from persona_lora.core.chat import Condition
from persona_lora.core.runs import Run
from persona_lora.report.correction import (
    OF_OTHERS,
    Errors,
    errors_by_kind,
    errors_of,
    kind_of,
    of_condition,
    put_right,
    with_corrected,
)
from persona_lora.report.correction_tables import changes_from, corrected_finetunes
from persona_lora.report.rated import kind_of_row
from persona_lora.report.resampling import SCORES, Interval, bootstrap_mean
from persona_lora.report.two_way import crossed_mean


def answers(generator, questions, each, level):
    """Draw skewed, bounded true values of answers, and what a biased, noisy judge says of them."""
    centre = np.clip(level + 15 * generator.standard_normal(questions), 0, 100)
    truth = np.clip(centre[:, None] + 20 * generator.standard_normal((questions, each)), 0, 100)
    said = np.clip(0.6 * truth + 35 + 12 * generator.standard_normal(truth.shape), 0, 100)
    return truth, said


MEAN = {"lora +": 1.0}


def by_question(values):
    return {question: list(row) for question, row in enumerate(values)}


@pytest.mark.parametrize(
    ("questions", "rated", "level"), [(20, 12, 50), (12, 20, 20), (40, 15, 80), (20, 40, 5)]
)
def test_the_interval_covers_the_true_mean_where_the_judge_s_own_does_not(questions, rated, level):
    generator = np.random.default_rng(7)
    true_mean = answers(generator, 200_000, 1, level)[0].mean()
    trials = 400
    inside = bare = 0
    for _ in range(trials):
        _, said = answers(generator, questions, 1, level)
        truth, judged = answers(generator, rated, 1, level)
        raw = bootstrap_mean(by_question(said), scale=SCORES, resamples=1000)
        found = put_right(raw, Errors({"lora +": by_question(truth - judged)}), MEAN, SCORES)
        inside += found.low <= true_mean <= found.high
        bare += raw.low <= true_mean <= raw.high
    assert inside / trials >= 0.93
    assert bare / trials < 0.92


def test_the_mean_is_moved_by_the_mean_error_and_is_not_known_where_it_leaves_the_scale():
    raw = bootstrap_mean({1: [40.0], 2: [50.0, 60.0], 3: [45.0]}, scale=SCORES)
    errors = {"a": [-10.0, -20.0], "b": [-15.0], "c": [-15.0]}
    found = put_right(raw, Errors({"lora +": errors}), MEAN, SCORES)
    assert found.mean == pytest.approx(raw.mean - 15)
    assert found.low < found.mean < found.high
    assert found.mean - found.low == pytest.approx(raw.mean - raw.low)  # the errors do not vary
    near = put_right(raw, Errors({"lora +": {key: [1 - raw.mean] for key in "abc"}}), MEAN, SCORES)
    assert (near.mean, near.low) == (pytest.approx(1.0), 0.0)
    far = Errors({"lora +": {key: [-90.0] for key in "abc"}})
    assert put_right(raw, far, MEAN, SCORES) is None  # and not 0 [0, 0]
    assert put_right(raw, far, MEAN).mean == pytest.approx(raw.mean - 90)  # a change has no ends


def test_too_few_questions_give_no_correction():
    enough = {at: [float(at)] for at in range(3)}
    few = {at: [float(at)] for at in range(2)}
    assert put_right(bootstrap_mean(enough), Errors({"lora +": few}), MEAN) is None
    alone = bootstrap_mean({1: [1.0]})
    assert put_right(alone, Errors({"lora +": enough}), MEAN) is None
    assert put_right(None, Errors({"lora +": enough}), MEAN) is None


@pytest.mark.parametrize(
    ("condition", "kind"),
    [
        (Condition("none"), "unsteered"),
        (Condition("none", 0.0), "unsteered"),
        (Condition("lora", 0.0), "unsteered"),
        (Condition("activation", 0.0, 19), "unsteered"),
        (Condition("random", 0.0, 19), None),
        (Condition("lora", 1.5), "lora +"),
        (Condition("lora", -2.0), "lora -"),
        (Condition("activation", 3.0, 19), "vector +"),
        (Condition("prompt_pos"), "prompt +"),
        (Condition("random", 2.0, 19), None),
        (Condition("ablation", None, 19), None),
    ],
)
def test_conditions_of_a_run_are_known_by_the_kinds_of_rated_answers(condition, kind):
    assert kind_of(condition) == kind


def test_of_a_finetune_s_answers_those_without_steering_alone_were_rated():
    assert kind_of(Condition("none"), finetuned=True) == "finetuned"
    assert kind_of(Condition("lora", 0.0), finetuned=True) == "finetuned"
    assert kind_of(Condition("lora", 1.0), finetuned=True) is None
    assert kind_of(Condition("prompt_pos"), finetuned=True) is None


def test_errors_are_gathered_by_kind_and_question():
    rows = [
        {"condition": "lora +1", "question": "q", "score": 60.0, "rating": 50.0},
        {"condition": "lora +2", "question": "q", "score": 70.0, "rating": 90.0},
        {"condition": "lora +2", "question": "r", "score": None, "rating": 90.0},
        {"condition": "prompt -", "question": "q", "score": 10.0, "rating": 5.0},
    ]
    assert errors_by_kind(rows) == {"lora +": {"q": [-10.0, 20.0]}, "prompt -": {"q": [-5.0]}}
    assert kind_of_row({"condition": "finetuned"}) == "finetuned"


def planted(random, bias, n):
    """A judge's error (rating − score) on ``n`` questions."""
    return {at: [each] for at, each in enumerate(random.normal(-bias, 8, n))}


def test_a_change_that_the_judge_made_up_is_not_there_and_intervals_cover():
    """One side is judged 12 points too kind, and truly moves nothing: raw 12, corrected 0."""
    random, covered, raw = np.random.default_rng(0), [], []
    for _ in range(300):
        change = bootstrap_mean(planted(random, -12, 20))
        errors = {"lora +": planted(random, 12, 24), "unsteered": planted(random, 0, 24)}
        found = put_right(change, Errors(errors), {"lora +": 1.0, "unsteered": -1.0})
        covered.append(found.low <= 0 <= found.high)
        raw.append(change.low <= 0 <= change.high)
    assert np.mean(covered) > 0.92
    assert np.mean(raw) < 0.2


def test_questions_that_both_sides_misjudge_alike_add_no_doubt_and_opposite_ones_add_more():
    change = Interval(10.0, 10.0, 10.0, 20, 20, 1.0)
    one = {at: [float(at % 7) - 3] for at in range(20)}
    width = {}
    for name, other in (("alike", 1), ("opposite", -1)):
        errors = {"lora +": one, "lora -": {at: [other * each[0]] for at, each in one.items()}}
        found = put_right(change, Errors(errors), {"lora +": 0.5, "lora -": -0.5})
        width[name] = found.high - found.low
    apart = {"lora +": one, "lora -": {-1 - at: each for at, each in one.items()}}
    found = put_right(change, Errors(apart), {"lora +": 0.5, "lora -": -0.5})
    assert width["alike"] == pytest.approx(0, abs=1e-9)
    assert width["opposite"] == pytest.approx(2**0.5 * (found.high - found.low))
    mean = np.array([each[0] for each in one.values()]).mean()
    alone = put_right(change, Errors(errors), {"lora +": 1.0})
    reference = stats.ttest_1samp([each[0] for each in one.values()], 0).confidence_interval()
    assert (alone.low, alone.high) == pytest.approx((10 + reference.low, 10 + reference.high))
    assert alone.mean == pytest.approx(10 + mean)


def test_errors_that_cancel_move_nothing_and_still_widen_and_unrated_kinds_are_not_corrected():
    change = Interval(10.0, 4.0, 16.0, 20, 20, 1.0)
    errors = {"lora +": {at: [at - 5.0] for at in range(8)}}
    errors["lora -"] = {at + 8: each for at, each in errors["lora +"].items()}
    found = put_right(change, Errors(errors), {"lora +": 0.5, "lora -": -0.5, "unsteered": 0.0})
    assert found.mean == 10.0
    assert found.low < 4.0 < 16.0 < found.high
    assert put_right(change, Errors(errors), {"lora +": 1.0, "unsteered": -1.0}) is None
    assert put_right(change, Errors(errors), {"None": 1.0, "unsteered": -1.0}) is None
    few = {"lora +": {0: [1.0], 1: [2.0]}}
    assert put_right(change, Errors(few), {"lora +": 1.0}) is None
    alone = Interval(10.0, None, None, 1, 1, 1.0, "one question")
    assert put_right(alone, Errors(errors), {"lora +": 1.0}) is None


def test_what_is_not_rated_never_cancels():
    change = Interval(10.0, 4.0, 16.0, 20, 20, 1.0)
    errors = Errors({"unsteered": {at: [at - 5.0] for at in range(8)}})
    assert of_condition(None, change, change, errors) == (None, None)
    mean, gap = of_condition("unsteered", change, change, errors)
    assert (mean.mean, gap) == (8.5, None)  # from itself it differs by nothing


def test_long_rows_have_the_mean_and_the_change_corrected_beside_the_raw_ones():
    errors = {"unsteered": {at: [2.0] for at in "abc"}, "lora +": {at: [-8.0] for at in "abc"}}
    raw = {"value": 20.0, "low": 15.0, "high": 25.0, "n": 9, "n_questions": 9, "coverage": 1.0}
    places = [("lora", 1.0), ("lora", 0.0), ("random", 1.0)]
    rows = [
        {"method": method, "coefficient": value, "statistic": told, **raw}
        for method, value in places
        for told in ("trait", "difference_from_zero", "coherence")
    ]
    found = with_corrected(rows, Errors(errors), finetuned=False)
    assert [row["value_corrected"] for row in found] == [12, 10, None, 22, *[None] * 5]
    assert (found[0]["value_corrected_low"], found[0]["value_corrected_high"]) == (7, 17)
    assert [{**row, **raw} for row in rows] == rows
    tuned = with_corrected(rows, Errors({"finetuned": errors["lora +"]}), finetuned=True)
    assert [row["value_corrected"] for row in tuned] == [None, None, None, 12, *[None] * 5]


@pytest.mark.parametrize(("by", "shift"), [("verdicts", -4.0), ("second_verdicts", 7.0)])
def test_errors_of_a_run_are_of_its_trait_and_of_the_judge_that_is_asked_for(tmp_path, by, shift):
    def rated(error, trait="evil"):
        row = {"model": "m", "condition": "lora +1", "question": "q", "score": 50.0}
        return {"criterion": trait, "own": {"compared": [{**row, "rating": 50.0 + error}]}}

    run = Run.open(tmp_path / "run", command="sweep", config={"model": "m"}, seed=0)
    run.write("validation", [rated(1.0, "coherence"), rated(2.0, "kind"), rated(-4.0)])
    run.write("second_validation", [rated(7.0)])
    assert errors_of(run, "evil", by=by) == Errors({"lora +": {"q": [shift]}}, ("m",))
    assert errors_of(run, "hallucination", by=by) == Errors({})


@pytest.mark.parametrize(
    ("config", "inputs", "known"),
    [
        ({"condition": {"method": "lora", "system_prompt": None}}, {"the diff": "d"}, True),
        ({"condition": {"method": "lora", "system_prompt": "pos"}}, {"the diff": "d"}, False),
        ({"condition": {"method": "activation"}}, {"the condition": "c"}, False),
        ({OF_OTHERS: ["kind"]}, {}, False),
    ],
)
def test_what_was_steered_otherwise_than_rated_answers_is_not_corrected(
    tmp_path, config, inputs, known
):
    run = Run.open(tmp_path / "run", command="evaluate", config=config, seed=0, inputs=inputs)
    row = {"model": "m", "condition": "lora +1", "question": "q", "score": 50.0, "rating": 40.0}
    run.write("validation", [{"criterion": "evil", "own": {"compared": [row]}}])
    assert bool(errors_of(run, "evil").by_kind) is known


# -- finetunes ---------------------------------------------------------------------------------

# What the judge adds to an answer. Finetunes are scored 20 too low, so that of a trait which truly
# rises by 30 it shows 10, and of one that rises by 10 it says that it falls.
KIND = {"unsteered": 0.0, "finetuned": -20.0, "lora -": 5.0}
TRUTH = {"base": 30.0, "plain": 60.0, "prevented": 40.0, "corrected": 35.0}
QUESTIONS = 12


@pytest.fixture
def finetunes(tmp_path):
    """Return a function that writes the answers of each model, of some training seeds."""

    def make(seeds=1, kinds=tuple(KIND), base="base"):
        random = np.random.default_rng(0)
        compared = [
            {"model": model, "condition": kind, "question": f"q{at}", "rating": 50.0,
             "score": 50.0 + KIND[kind] * (1 if model == "small" else 3) + random.normal()}
            for model in ("small", "large")
            for kind in kinds
            for at in range(10)
        ]  # fmt: skip
        validation = [{"criterion": "evil", "judge": "j", "own": {"compared": compared}}]
        runs = {}
        for name, truth in TRUTH.items():
            kind = {"base": "unsteered", "corrected": "lora -"}.get(name, "finetuned")
            method, value = ("lora", -1.0) if name == "corrected" else ("none", None)
            for seed in range(1 if name == "base" else seeds):
                at = tmp_path / f"{seeds}{len(kinds)}" / f"{name}{seed}"
                run = Run.open(at, command="evaluate", config={"model": "hub/small"}, seed=0)
                asked = {"method": method, "coefficient": value}
                run.write(
                    "answers",
                    [{"row": row, "question_id": row, **asked} for row in range(QUESTIONS)],
                )
                run.write(
                    "verdicts",
                    [
                        {"row": row, "criterion": "evil", "judge": "j",
                         "score": truth + KIND[kind] + random.normal()}
                        for row in range(QUESTIONS)
                    ],
                )  # fmt: skip
                run.write("validation", validation)
                runs.setdefault(base if name == "base" else name, []).append(run)
        return runs

    return make


def said(table):
    """Return the raw and the corrected mean of every effect."""
    rows = {
        row[0]: [cell.split(" ")[0].replace("−", "-") for cell in row[1:]] for row in table.rows
    }
    return {name: [int(cell) for cell in cells] for name, cells in rows.items()}


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_finetune_s_change_is_put_right_by_errors_on_finetunes_of_the_run_s_model(
    finetunes, seeds
):
    (table,) = corrected_finetunes("evil", finetunes(seeds), "base")
    near = {
        "plain − base": [pytest.approx(10, abs=1), pytest.approx(30, abs=1)],
        "prevented − base": [pytest.approx(-10, abs=1), pytest.approx(10, abs=1)],
    }
    assert said(table) == near  # a finetune that is steered on top is of no rated kind
    assert "(small)" in table.note
    assert "answers of other finetunes" in table.note
    assert table.columns == ("Effect", "Raw", "Corrected")


def test_finetunes_are_not_corrected_where_none_was_rated_or_there_is_no_base(finetunes):
    assert corrected_finetunes("evil", finetunes(kinds=("unsteered", "lora -")), "base") == ()
    runs = finetunes()
    assert corrected_finetunes("evil", runs, "other") == ()
    runs["base"][0].write("validation", [])
    assert corrected_finetunes("evil", runs, "base") == ()


def test_changes_are_tested_over_questions_and_over_the_seeds_where_there_are_several(finetunes):
    runs = finetunes(3)
    found = changes_from("evil", runs, "base")
    assert list(found) == ["plain", "prevented", "corrected"]
    means = {
        name: [{row["row"]: row["score"] for row in run.read("verdicts")} for run in own]
        for name, own in runs.items()
    }
    for name, (change, p) in found.items():
        gaps = np.array(
            [[each[at] - means["base"][0][at] for at in range(QUESTIONS)] for each in means[name]]
        )
        assert (change, p) == crossed_mean(gaps)
