"""The summary of a sweep: identities on known curves, and honesty on degenerate data."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict

import numpy as np
import pytest
from scipy.stats import spearmanr

from persona_lora.core.errors import UserError
from persona_lora.report import wording
from persona_lora.report.conditions import divergence_of
from persona_lora.report.curve import CoherentRange, TraitCurve
from persona_lora.report.resampling import ALIKE, EQUAL, holm
from persona_lora.report.scores import Condition
from persona_lora.report.summary import long_rows, summarise_run, summarise_sweep, write_summary

LINE = (-1.0, -0.5, 0.0, 0.5, 1.0)


def _with_scores(answers, verdicts, score, criterion="sycophancy"):
    """Replace the scores on one criterion by a function of the answer row."""
    return [
        {**v, "score": score(answers[v["row"]])} if v["criterion"] == criterion else v
        for v in verdicts
    ]


def _summary(answers, verdicts, divergences=(), **options):
    return summarise_sweep(
        answers, verdicts, list(divergences), trait="sycophancy", resamples=400, **options
    )


def test_summary_of_an_exact_line_recovers_slope_and_rank_correlation(sweep_rows):
    answers, verdicts = sweep_rows(coefficients=LINE, prompts=())
    exact = _with_scores(answers, verdicts, lambda a: 50 + 20 * a["coefficient"])
    summary = _summary(answers, exact)
    assert summary.rho_means.value == pytest.approx(1.0)
    assert (summary.rho_means.low, summary.rho_means.reason) == (None, ALIKE)
    assert summary.rho_rows.value == pytest.approx(1.0)
    assert summary.fit.slope.value == pytest.approx(20.0)
    assert summary.fit.slope.reason == EQUAL  # each question's own
    assert summary.fit.p < 0.05
    assert summary.fit.intercept == pytest.approx(50.0)
    assert summary.fit.r_squared == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_said_of_a_curve_is_that_of_the_means_beside_it(sweep_rows, seed):
    """However many answers of a question are scored at each coefficient: it counts once."""
    rng = np.random.default_rng(seed)
    answers, verdicts = sweep_rows(questions=4, samples=5, layers=(12,), control=2)
    level = rng.uniform(0, 80, 4)
    unequal = _with_scores(
        answers, verdicts, lambda a: None if rng.random() < 0.6 else
        level[a["question_id"]] + rng.uniform(0, 20),
    )  # fmt: skip
    summary = _summary(answers, unequal)
    x, means = zip(*((e.coefficient, e.trait.mean) for e in summary.steered), strict=True)
    assert summary.rho_means.value == pytest.approx(spearmanr(x, means).statistic)
    inside = summary.coherent_range.coefficients
    x, means = zip(*(at for at in zip(x, means, strict=True) if at[0] in inside), strict=True)
    assert summary.fit.r_squared == pytest.approx(np.corrcoef(x, means)[0, 1] ** 2)
    expected = np.mean(means) - summary.fit.slope.value * np.mean(x)
    assert summary.fit.intercept == pytest.approx(expected)
    said = {row["statistic"]: row["value"] for row in long_rows(summary)}
    assert said["rho_means"] == summary.rho_means.value
    alone = [a for a in answers if a["method"] in ("none", "random")]
    kept = [v for v in unequal if answers[v["row"]] in alone]
    x, means = zip(*((e.coefficient, e.trait.mean) for e in _summary(alone, kept).steered),
                   strict=True)  # fmt: skip
    assert _summary(alone, kept).rho_means.value == pytest.approx(spearmanr(x, means).statistic)


def test_summary_orders_conditions_and_joins_their_costs(make_sweep_run):
    summary = summarise_run(make_sweep_run())
    names = [(each.method, each.coefficient) for each in summary.conditions]
    assert names[0] == ("lora", -2.0)
    prompts = [("prompt_neg", None), ("prompt_neutral", None), ("prompt_pos", None)]
    assert names[-3:] == prompts
    last = summary.steered[-1]
    assert (last.relative_weight_norm, last.kl_mean, last.kl_p95) == (0.06, 0.4, 2.0)
    reference = summary.reference("prompt_pos")
    assert reference.kl_p95 is None
    assert reference.trait.mean == pytest.approx(75, abs=6)
    assert reference.from_zero is None


def test_summary_counts_rows_questions_coverage_and_finished_answers(sweep_rows):
    answers, verdicts = sweep_rows(coefficients=(0.0, 1.0), prompts=(), questions=5, samples=2)
    gaps = _with_scores(answers, verdicts, lambda a: None if a["row"] < 3 else 60.0)
    zero, one = _summary(answers, gaps).conditions
    assert (zero.rows, zero.questions, zero.trait.n, zero.trait.n_questions) == (10, 5, 7, 4)
    assert (zero.trait.coverage, one.trait.coverage) == (0.7, 1.0)
    assert zero.trait.mean == 60.0
    assert zero.coherence.coverage == 1.0
    assert zero.finished_share == 0.9
    assert zero.mean_tokens == np.mean([a["num_tokens"] for a in answers[:10]])


def test_summary_finds_the_coherent_range_around_zero(sweep_rows):
    answers, verdicts = sweep_rows()
    summary = _summary(answers, verdicts)
    assert (summary.coherent_range.low, summary.coherent_range.high) == (-1.5, 1.5)
    assert len(summary.coherent_range.coefficients) == 7
    again = _with_scores(
        answers, verdicts, lambda a: 10.0 if a["coefficient"] == 1.0 else 90.0, "coherence"
    )
    # +1.5 and +2 are coherent again, but no longer joined to 0.
    assert _summary(answers, again).coherent_range.high == 0.5


@pytest.mark.parametrize(
    ("unsteered", "floor"), [(95.0, 50.0), (60.0, 50.0), (42.0, 32.0), (25.0, 20.0), (5.0, 20.0)]
)
def test_what_is_coherent_is_told_from_the_unsteered_answers(sweep_rows, unsteered, floor):
    answers, verdicts = sweep_rows()

    def coherence(answer):
        return {0.0: unsteered, 0.5: floor, 1.0: floor - 1}.get(answer["coefficient"], 90.0)

    found = _summary(answers, _with_scores(answers, verdicts, coherence, "coherence"))
    assert found.coherent_range.threshold == floor
    assert found.coherent_range.high == (0.5 if unsteered >= 20 else None)


def test_summary_pairs_differences_by_question(sweep_rows):
    answers, verdicts = sweep_rows(coefficients=LINE, prompts=(), questions=10)
    paired = _with_scores(
        answers, verdicts, lambda a: 5.0 * a["question_id"] + 10 * a["coefficient"] + 20
    )
    summary = _summary(answers, paired)
    by_coefficient = {each.coefficient: each for each in summary.steered}
    assert by_coefficient[0.0].from_zero is None
    change = by_coefficient[1.0].from_zero
    # The questions differ widely, their differences not at all.
    assert by_coefficient[1.0].trait.high - by_coefficient[1.0].trait.low > 10
    assert change.interval.mean == pytest.approx(10.0)
    assert (change.interval.low, change.interval.reason) == (None, EQUAL)
    assert change.interval.n_questions == 10
    assert change.p == pytest.approx(2 / 2**10)
    assert change.p_holm == pytest.approx(4 * 2 / 2**10)


def test_summary_compares_the_coherent_ends_with_the_prompts(sweep_rows):
    answers, verdicts = sweep_rows()
    ends = {each.prompt: each for each in _summary(answers, verdicts).prompt_comparisons}
    assert ends["prompt_pos"].coefficient == 1.5
    assert ends["prompt_neg"].coefficient == -1.5
    assert ends["prompt_pos"].difference.interval.mean == pytest.approx(11, abs=6)


def test_a_prompt_of_the_trait_stands_beside_neutral_ones(sweep_rows):
    """Any system prompt moves a model: what one asks for is what it does beyond a neutral one."""
    answers, verdicts = sweep_rows()
    summary = _summary(answers, verdicts)
    over = {
        name: summary.reference(name).over_neutral
        for name in ("prompt_pos", "prompt_neg", "prompt_neutral")
    }
    assert over.pop("prompt_neutral") is None
    assert over["prompt_pos"].interval.mean == pytest.approx(20, abs=6)
    assert over["prompt_neg"].interval.mean == pytest.approx(-30, abs=6)
    p = [each.p for each in over.values()]
    assert [each.p_holm for each in over.values()] == holm(p)
    assert all(each.over_neutral is None for each in summary.steered)
    told = wording.headline(summary)
    assert "neutral ones 5" in told
    assert "undecided" not in told
    rows = [row for row in long_rows(summary) if row["statistic"] == "difference_from_neutral"]
    assert [row["method"] for row in rows] == ["prompt_neg", "prompt_pos"]


def test_a_sweep_without_neutral_prompts_says_nothing_of_them(sweep_rows):
    answers, verdicts = sweep_rows(prompts=("prompt_pos", "prompt_neg"))
    summary = _summary(answers, verdicts)
    assert summary.reference("prompt_pos").over_neutral is None
    assert "The positive system prompt alone reaches" in wording.headline(summary)
    assert "neutral" not in wording.headline(summary)


def test_summary_without_coefficient_zero_has_no_paired_differences(sweep_rows):
    answers, verdicts = sweep_rows(coefficients=(-1.0, 1.0))
    assert all(each.from_zero is None for each in _summary(answers, verdicts).conditions)


def test_summary_repeats_with_its_seed(sweep_rows):
    answers, verdicts = sweep_rows()
    assert _summary(answers, verdicts, seed=3) == _summary(answers, verdicts, seed=3)


def test_summary_with_nothing_scored_says_why(sweep_rows):
    answers, _ = sweep_rows()
    summary = _summary(answers, [])
    assert summary.conditions[0].trait.reason == "no scored answer"
    assert summary.rho_means.value is None
    assert summary.rho_rows.value is None
    assert summary.coherent_range.reason == "coherence was not scored"
    assert summary.fit.slope.value is None
    assert summary.conditions[0].from_zero.p is None
    json.dumps(asdict(summary), allow_nan=False)


def test_summary_of_one_question_has_values_but_no_intervals(sweep_rows):
    answers, verdicts = sweep_rows(questions=1)
    summary = _summary(answers, verdicts)
    assert summary.rho_means.value is not None
    assert summary.rho_means.low is None
    assert "one question" in summary.rho_rows.reason
    assert "one question" in summary.fit.slope.reason
    assert "one question" in summary.conditions[0].from_zero.interval.reason
    json.dumps(asdict(summary), allow_nan=False)


def test_summary_of_equal_scores_says_that_they_do_not_vary(sweep_rows):
    answers, verdicts = sweep_rows()
    summary = _summary(answers, _with_scores(answers, verdicts, lambda a: 50.0))
    assert "do not vary" in summary.rho_means.reason
    assert "do not vary" in summary.rho_rows.reason
    assert summary.fit.slope.value == pytest.approx(0.0)
    assert summary.fit.r_squared is None
    assert summary.conditions[0].from_zero.p == 1.0
    json.dumps(asdict(summary), allow_nan=False)


def test_summary_of_prompts_alone_has_no_curve(sweep_rows):
    answers, verdicts = sweep_rows(coefficients=())
    summary = _summary(answers, verdicts)
    assert summary.steered == ()
    assert summary.coherent_range.reason == "no coefficient was run"
    json.dumps(asdict(summary), allow_nan=False)


def test_summary_incoherent_at_zero_has_no_coherent_range(sweep_rows):
    answers, verdicts = sweep_rows()
    low = _with_scores(answers, verdicts, lambda a: 5.0, "coherence")
    summary = _summary(answers, low)
    assert "not coherent at coefficient 0" in summary.coherent_range.reason
    assert summary.fit.slope.value is None
    assert summary.prompt_comparisons == ()


def test_summary_of_scores_mostly_missing_in_resamples_is_still_json(sweep_rows):
    answers, verdicts = sweep_rows(coefficients=LINE, prompts=(), questions=8)
    sparse = _with_scores(
        answers, verdicts, lambda a: 40.0 + a["coefficient"] if a["question_id"] == 0 else None
    )
    json.dumps(asdict(_summary(answers, sparse)), allow_nan=False)
    # Each coefficient scored on another question: no pair, and most resamples lack a condition.
    disjoint = _with_scores(
        answers,
        verdicts,
        lambda a: 50 + a["coefficient"] if LINE[a["question_id"] % 5] == a["coefficient"] else None,
    )
    summary = _summary(answers, disjoint)
    assert "both conditions" in summary.conditions[0].from_zero.interval.reason
    json.dumps(asdict(summary), allow_nan=False)


def test_summary_of_a_vector_has_its_layer_and_costs(make_sweep_run):
    run = make_sweep_run(layers=(12,), coefficients=(-1.0, 1.0), control=True)
    summary = summarise_run(run)
    assert (summary.method, summary.layer) == ("activation", 12)
    assert [(each.method, each.coefficient, each.layer) for each in summary.conditions] == [
        *(("activation", value, 12) for value in (-1.0, 0.0, 1.0)),
        ("prompt_neg", None, None),
        ("prompt_neutral", None, None),
        ("prompt_pos", None, None),
    ]
    low, zero, high = summary.steered
    assert (low.relative_state_norm, high.kl_p95) == (0.1, 0.5)
    # Coefficient 0 was not measured: it changes nothing by definition.
    assert (zero.relative_state_norm, zero.kl_mean, zero.relative_weight_norm) == (0.0, 0.0, None)
    assert high.from_zero.interval.mean > 20


def test_costs_are_matched_by_method_layer_and_coefficient():
    divergences = [
        {"coefficient": 1.0, "kl_mean": 1.0},
        {"method": "activation", "layer": 3, "coefficient": 1.0, "kl_mean": 2.0},
        {"method": "activation", "layer": 4, "coefficient": 1.0, "kl_mean": 3.0},
        {"method": "random", "layer": 3, "coefficient": 1.0, "kl_mean": 4.0},
    ]
    for condition, expected in (
        (Condition("lora", 1.0), 1.0),
        (Condition("activation", 1.0, 3), 2.0),
        (Condition("activation", 1.0, 4), 3.0),
        (Condition("random", 1.0, 3), 4.0),
        (Condition("random", 1.0, 4), None),
        (Condition("lora", 2.0), None),
        (Condition("prompt_pos", None), None),
    ):
        assert divergence_of(condition, divergences).get("kl_mean") == expected


def test_summary_of_unsteered_rows_alone_compares_them_with_the_prompts(sweep_rows):
    answers, verdicts = sweep_rows(layers=(3,), coefficients=())
    summary = _summary(answers, verdicts)
    assert (summary.method, summary.layer, summary.control) == ("none", None, None)
    assert [each.coefficient for each in summary.steered] == [0.0]
    differences = {each.prompt: each.difference.interval for each in summary.prompt_comparisons}
    assert differences["prompt_pos"].mean == pytest.approx(-25, abs=6)
    assert differences["prompt_neg"].mean == pytest.approx(25, abs=6)


def test_summary_refuses_several_layers(grid_rows):
    answers, verdicts = grid_rows(questions=1)
    with pytest.raises(UserError, match=r"several layers \(4, 8, 12, 16\)"):
        _summary(answers, verdicts)


def test_summary_refuses_an_empty_sweep():
    with pytest.raises(UserError, match="no answers"):
        summarise_sweep([], [], [], trait="evil")


def test_write_summary_writes_json_and_long_csv(make_sweep_run):
    run = make_sweep_run()
    summary = write_summary(run)
    written = json.loads((run.folder / "summary.json").read_text())
    assert written == json.loads(json.dumps(asdict(summary)))
    with (run.folder / "summary.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    at = {(r["method"], r["coefficient"], r["statistic"]): r for r in rows}
    assert float(at["lora", "1.0", "trait"]["value"]) == summary.steered[6].trait.mean
    assert float(at["lora", "1.0", "kl_p95"]["value"]) == 0.5
    assert float(at["", "", "rho_means"]["value"]) == summary.rho_means.value
    assert at["prompt_pos", "", "trait"]["n_questions"] == "12"


def test_summarise_run_refuses_a_run_without_a_trait(make_sweep_run):
    run = make_sweep_run()
    record = json.loads((run.folder / "run.json").read_text())
    del record["config"]["trait"]
    (run.folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="names no trait"):
        summarise_run(run)


def test_a_question_counts_for_the_slope_where_it_is_scored(sweep_rows):
    answers, verdicts = sweep_rows(coefficients=LINE, prompts=())
    exact = _with_scores(answers, verdicts, lambda a: 50 + 20 * a["coefficient"])
    for at, row in enumerate(each for each in exact if each["criterion"] == "sycophancy"):
        if at % 7 == 0:
            row["score"] = None
    fit, whole = _summary(answers, exact).fit, _summary(answers, verdicts).fit
    assert fit.slope.value == pytest.approx(20.0)
    assert fit.slope.n_questions == whole.slope.n_questions


def test_a_slope_is_claimed_by_its_test_alone():
    """Questions differ in slope around none: an interval that is too narrow would claim a trend."""
    random, claimed = np.random.default_rng(0), 0
    span = CoherentRange(-2.0, 2.0, (-2.0, -1.0, 0.0, 1.0, 2.0), 50.0)
    for _ in range(300):
        slopes = random.normal(0, 5, 12)
        scores = {
            Condition("lora", c): {at: [50 + c * slope] for at, slope in enumerate(slopes)}
            for c in span.coefficients
        }
        fit = TraitCurve(scores, seed=0, resamples=200).fit(span)
        assert fit.slope.value == pytest.approx(slopes.mean())
        claimed += fit.p < 0.05
    assert claimed / 300 < 0.08
