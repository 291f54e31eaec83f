"""A vector against a random direction: paired by question, and honest where it does no better."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict

import numpy as np
import pytest

from persona_lora.report import wording
from persona_lora.report.summary import summarise_run, summarise_sweep, write_summary
from persona_lora.report.two_judges import two_judges
from persona_lora.report.two_way import crossed_mean
from persona_lora.studies.steering.read import sweep_content

COEFFICIENTS = (-2.0, -1.0, 1.0, 2.0)
LAYER = 12


def _scored(sweep_rows, score, *, questions=12, control=1, **options):
    """Return the summary of a controlled sweep whose trait scores are a function of the row."""
    answers, verdicts = sweep_rows(
        layers=(LAYER,),
        coefficients=COEFFICIENTS,
        control=control,
        prompts=(),
        questions=questions,
        **options,
    )
    verdicts = [
        {**each, "score": score(answers[each["row"]])}
        if each["criterion"] == "sycophancy"
        else each
        for each in verdicts
    ]
    return summarise_sweep(answers, verdicts, [], trait="sycophancy", resamples=400)


def _line(slopes):
    """Return a score that follows the coefficient with a slope by method; questions differ."""
    return lambda row: (
        40 + 2 * row["question_id"] + slopes.get(row["method"], 0) * (row["coefficient"] or 0)
    )


def test_differences_from_the_control_are_those_of_the_slopes(sweep_rows):
    summary = _scored(sweep_rows, _line({"activation": 8, "random": 3}))
    control = summary.control
    assert [each.coefficient for each in control.comparisons] == list(COEFFICIENTS)
    for each in control.comparisons:
        assert each.difference.interval.mean == pytest.approx(5 * each.coefficient)
        assert each.difference.p == pytest.approx(2 / 2**12)
        assert each.difference.p_holm == pytest.approx(4 * 2 / 2**12)
    # The mean over coefficients of sign(c) · 5c.
    assert control.overall.interval.mean == pytest.approx(5 * np.mean(np.abs(COEFFICIENTS)))
    assert control.overall.p == pytest.approx(2 / 2**12)
    assert control.rho_means.value == pytest.approx(1.0)
    assert [each.coefficient for each in control.conditions] == [-2.0, -1.0, 0.0, 1.0, 2.0]
    # The main curve is as without a control.
    assert summary.rho_means.value == pytest.approx(1.0)
    assert len(summary.steered) == 5


@pytest.mark.parametrize(
    ("slopes", "words"),
    [
        ({"activation": 8, "random": 1}, "The vector beats a random direction"),
        ({"activation": 1, "random": 8}, "The vector does worse than a random direction"),
        ({"activation": 5, "random": 5}, "The vector is not clear of a random direction"),
    ],
)
def test_headline_says_whether_the_vector_beats_the_random_direction(sweep_rows, slopes, words):
    noise = np.random.default_rng(0).normal(0, 6, 1000)
    line = _line(slopes)
    summary = _scored(sweep_rows, lambda row: line(row) + noise[row["row"]])
    text = wording.headline(summary)
    first, second = "Steered at layer 12, sycophancy", words
    if "beats" not in words:
        first, second = second, first
    assert text.startswith(first)
    assert second in text
    assert "activation at layer 12  ·  random direction ρ" in wording.place_line(summary)


def test_a_push_in_the_wrong_direction_does_not_beat_the_control(sweep_rows):
    """Lower scores at positive coefficients are a clear difference, but not the expected one."""
    summary = _scored(sweep_rows, _line({"activation": -8}))
    assert summary.control.overall.interval.mean < 0
    assert "does worse" in wording.headline(summary)


def test_a_control_scored_on_other_questions_gives_a_reason(sweep_rows):
    line = _line({"activation": 8})
    summary = _scored(
        sweep_rows,
        lambda row: (
            None if (row["question_id"] % 2 == 0) == (row["method"] == "random") else line(row)
        ),
    )
    assert "both conditions" in summary.control.overall.interval.reason
    assert "could not be compared" in wording.headline(summary)
    assert "no comparison" in wording.place_line(summary)
    json.dumps(asdict(summary), allow_nan=False)


def test_one_question_has_differences_and_no_test(sweep_rows):
    summary = _scored(sweep_rows, _line({"activation": 8}), questions=1)
    assert summary.control.overall.p is None
    assert summary.control.overall.interval.mean == pytest.approx(8 * 1.5)
    assert "With one question" in wording.headline(summary)
    json.dumps(asdict(summary), allow_nan=False)


def test_the_control_is_in_the_written_summary_and_its_zero_once(make_sweep_run):
    run = make_sweep_run(layers=(LAYER,), coefficients=(-1.0, 1.0), control=True)
    summary = write_summary(run)
    written = json.loads((run.folder / "summary.json").read_text())
    assert written["control"]["overall"]["p"] == summary.control.overall.p
    with (run.folder / "summary.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    at = {(r["method"], r["layer"], r["coefficient"], r["statistic"]): r for r in rows}
    assert len(at) == len(rows)
    assert ("random", "12", "0.0", "trait") not in at
    trait = summary.control.conditions[-1].trait
    assert float(at["random", "12", "1.0", "trait"]["value"]) == trait.mean
    overall = at["activation", "12", "", "gain_over_random"]
    assert float(overall["value"]) == summary.control.overall.interval.mean
    assert float(at["activation", "12", "1.0", "random_p"]["value"]) > 0


def test_a_random_direction_alone_is_a_curve_of_its_own(sweep_rows):
    answers, verdicts = sweep_rows(layers=(3,), coefficients=COEFFICIENTS, control=True)
    kept = {row["row"] for row in answers if row["method"] != "activation"}
    summary = summarise_sweep(
        [row for row in answers if row["row"] in kept],
        [each for each in verdicts if each["row"] in kept],
        [],
        trait="sycophancy",
        resamples=100,
    )
    assert (summary.method, summary.control) == ("random", None)
    assert len(summary.steered) == 5


SLOPES = {"activation": 8, "random": -1, "random#2": 1, "random#3": 6}


def test_several_random_directions_are_drawn_as_the_questions_are(sweep_rows):
    """The middle one alone would be beaten beyond doubt; one of three does nearly as much."""
    alone = _scored(sweep_rows, _line(SLOPES | {"random": 2})).control
    assert (alone.draws, alone.least, alone.most) == (1, None, None)
    summary = _scored(sweep_rows, _line(SLOPES), control=3)
    control, size = summary.control, np.mean(np.abs(COEFFICIENTS))
    gaps = np.array([[(8 - slope) * size] * 12 for slope in (-1, 1, 6)])
    assert control.overall.interval.mean == pytest.approx(alone.overall.interval.mean)
    assert control.overall.interval.low == pytest.approx(crossed_mean(gaps).interval.low)
    assert control.overall.p == pytest.approx(crossed_mean(gaps).p)
    assert control.overall.p > 0.05 > alone.overall.p
    said = wording.headline(summary)
    assert "is not clear of 3 random directions" in said
    assert f"(p {wording.p_equals(control.overall.p)}; undecided)" in said
    assert (control.draws, control.least, control.most) == pytest.approx((3, 2 * size, 9 * size))
    assert control.rho_means.value == pytest.approx(1 / 3)
    two = control.conditions[-1]
    assert (two.coefficient, two.rows, two.trait.n) == (2.0, 36, 36)
    assert two.trait.mean == pytest.approx(40 + 11 + 2 * 2)
    assert two.trait.high - two.trait.low > 15  # the slopes differ by 7, and 2 · 7 is 14
    assert two.from_zero.interval.mean == pytest.approx(4)
    assert two.from_zero.p > 0.05
    assert [each.difference.interval.mean for each in control.comparisons] == pytest.approx(
        [6 * each for each in COEFFICIENTS]
    )
    assert control.conditions[2].trait == summary.steered[2].trait  # unsteered, once


def test_a_page_says_how_many_random_directions_there_were(make_sweep_run):
    run = make_sweep_run(layers=(LAYER,), coefficients=(-1.0, 1.0), control=3, questions=4)
    content = sweep_content(run)
    (table,) = [each for each in content.blocks if "Against random" in getattr(each, "title", "")]
    assert "minus mean of 3 random directions" in table.columns[0]
    assert "The 3 directions are drawn as the questions are" in table.note
    labels = {
        card.label
        for block in content.blocks
        for fold in getattr(block, "blocks", ())
        for question in getattr(fold, "questions", ())
        for card in question.steered
    }
    assert {"random +1", "random 2 +1", "random 3 +1"} < labels


def test_two_judges_count_random_directions_as_draws(make_sweep_run):
    run = make_sweep_run(layers=(LAYER,), coefficients=(1.0,), control=3, questions=6)
    own = [row for row in run.read("verdicts") if row["criterion"] == "sycophancy"]
    run.write("second_verdicts", [{**row, "judge": "other"} for row in own])
    found = two_judges(run, "sycophancy")
    effects = {each.place: each.first for each in found.effects}
    condition = summarise_run(run).control.conditions[-1]
    assert effects["random +1 at layer 12"].low == pytest.approx(condition.from_zero.interval.low)
