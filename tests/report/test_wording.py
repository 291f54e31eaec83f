"""Numbers in words, and headlines that claim no more than the intervals allow."""

from __future__ import annotations

import numpy as np
import pytest

from persona_lora.report import wording
from persona_lora.report.resampling import ALIKE, EQUAL, FITS, Estimate, Interval, bootstrap_mean
from persona_lora.report.summary import summarise_sweep
from persona_lora.report.two_way import mean_gap


def test_wording_of_numbers_uses_true_minus_signs_and_no_negative_zero():
    assert wording.number(-3.26, 1) == "−3.3"
    assert wording.number(-0.04, 1) == "0.0"
    assert wording.number(None) == "–"
    assert [wording.signed(each) for each in (3.4, -3.4, 0.4, -0.4)] == ["+3", "−3", "0", "0"]
    assert [wording.coefficient(c) for c in (-1.5, 0.0, 2.0, None)] == ["−1.5", "0", "+2", "–"]
    assert [wording.significant(v) for v in (0, 0.9, 14.2, 0.0301)] == ["0", "0.90", "14", "0.030"]
    assert [wording.p_value(p) for p in (None, 0.00001, 0.04)] == ["–", "< 0.001", "0.040"]


def test_an_estimate_without_width_says_that_its_interval_is_not_known():
    alike = Estimate(0.5, None, None, 3, 20, ALIKE)
    assert wording.interval(alike, 2) == "0.50 [not known: resamples alike]"
    assert wording.explained(alike) == "0.50 (interval not known: the same in 95% of resamples)"
    assert wording.interval(Estimate(2.0, None, None, 3, 20, EQUAL)) == "2 [not known: all equal]"
    assert wording.explained(Estimate(0.5, 0.1, 0.9, 3, 20)) == "0.50 [0.10, 0.90]"


def test_a_token_that_does_not_print_is_written_out():
    assert [wording.token(each) for each in (" the", "\n", "a\x07", "\u200b")] == [
        "␣the", "⏎", "a\\x07", "\\u200b",
    ]  # fmt: skip


def test_wording_of_an_interval_drops_brackets_where_there_is_none():
    assert wording.interval(Interval(70.6, 64.2, 77, 20, 20, 1.0)) == "71 [64, 77]"
    assert wording.interval(Estimate(0.98, None, None, 9, 1, "one question"), 2) == "0.98"
    assert wording.interval(Interval(None, None, None, 0, 0, 0.0, "no scored answer")) == "–"
    changes = [Interval(mean, -90.0, 90.0, 20, 20, 1.0) for mean in (22.4, -22.4, 0.4)]
    found = [wording.change(each) for each in (*changes, None)]
    assert found == ["+22 [−90, 90]", "−22 [−90, 90]", "0 [−90, 90]", "–"]


@pytest.mark.parametrize(
    ("low", "high", "n", "p", "said"),
    [
        (-5.0, 5.0, 12, 0.5, "equal within 5 points"),
        (-5.1, 1.0, 12, 0.5, "undecided"),
        (-1.0, 5.1, 12, 0.5, "undecided"),
        (-1.0, 1.0, 11, 0.5, "undecided"),
        (
            None,
            None,
            40,
            0.5,
            "undecided",
        ),  # all equal, or two seeds: no interval excludes anything
        (1.0, 4.0, 12, 0.01, ""),
    ],
)
def test_a_difference_is_equal_only_where_larger_ones_are_excluded(low, high, n, p, said):
    assert wording.unclear(Interval(2.0, low, high, n, n, 1.0), p) == said
    on_fits = Interval(2.0, low and low / 25, high and high / 25, n, n, 1.0)
    told = said.replace("5 points", "0.2 points")
    assert wording.unclear(on_fits, p, before=": ", scale=FITS) == (told and f": {told}")
    assert wording.unclear(None, None) == "undecided"


SHAPES = {  # of mean 0 and deviation 1
    "normal": lambda random, size: random.normal(0, 1, size),
    "heavy tails": lambda random, size: random.standard_t(3, size) / 3**0.5,
    "skewed": lambda random, size: random.exponential(1, size) - 1,
    "skewed the other way": lambda random, size: 1 - random.exponential(1, size),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [12, 20, 40])
def test_what_lies_at_the_margin_is_seldom_called_equal(shape, n):
    """In 5 of 100 cases at most (6 of skewed ones), and what is equal mostly is found to be."""
    draws, random, equal = 400, np.random.default_rng(n), {0.0: 0, 5.0: 0}
    for _ in range(draws):
        values = 3 * SHAPES[shape](random, n)
        for truth in equal:
            own = {at: [value + truth] for at, value in enumerate(values)}
            gap = bootstrap_mean(own, resamples=1000)
            equal[truth] += wording.unclear(gap, 1.0).startswith("equal")
    noise = 2 * (0.05 * 0.95 / draws) ** 0.5
    assert equal[5.0] / draws <= (0.06 if shape == "skewed" else 0.05) + noise / 2
    assert equal[0.0] / draws > 0.85


@pytest.mark.parametrize("n", [12, 20, 40])
def test_over_three_seeds_what_lies_at_the_margin_is_seldom_called_equal(n):
    draws, random, equal = 200, np.random.default_rng(1), 0
    for _ in range(draws):
        values = (
            5 + random.normal(0, 3, n) + random.normal(0, 1, (3, 1)) + random.normal(0, 1, (3, n))
        )
        gap = mean_gap([dict(enumerate(seed)) for seed in values]).interval
        equal += wording.unclear(gap, 1.0).startswith("equal")
    assert equal / draws <= 0.05 + (0.05 * 0.95 / draws) ** 0.5


def test_a_flat_sweep_says_what_its_ends_exclude(sweep_rows):
    answers, verdicts = sweep_rows(coefficients=(-1.0, 0.0, 1.0), prompts=(), questions=12)
    scored = [
        {**v, "score": 50.0 + answers[v["row"]]["row"] * 7 % 5}
        if v["criterion"] == "sycophancy"
        else v
        for v in verdicts
    ]
    summary = summarise_sweep(answers, scored, [], trait="sycophancy", resamples=200)
    ends = "(equal within 5 points at −1, equal within 5 points at +1)"
    assert f"does not clearly change with the coefficient {ends}" in wording.headline(summary)


@pytest.mark.parametrize(
    ("slope", "words"),
    [(30, "rises with the coefficient"), (-30, "falls with the coefficient"), (0, "not clearly")],
)
def test_headline_follows_the_intervals_at_the_ends(sweep_rows, slope, words):
    answers, verdicts = sweep_rows(coefficients=(-1.0, 0.0, 1.0), prompts=())
    verdicts = [
        {**v, "score": 50 + slope * answers[v["row"]]["coefficient"] + answers[v["row"]]["row"] % 7}
        if v["criterion"] == "sycophancy"
        else v
        for v in verdicts
    ]
    summary = summarise_sweep(answers, verdicts, [], trait="sycophancy", resamples=200)
    assert words in wording.headline(summary)


def test_headline_blames_too_few_questions_where_no_answers_could_pass_the_test(sweep_rows):
    answers, verdicts = sweep_rows(coefficients=(-1.0, 0.0, 1.0), prompts=(), questions=4)
    summary = summarise_sweep(answers, verdicts, [], trait="sycophancy", resamples=200)
    said = wording.headline(summary)
    assert "cannot be shown to change by 4 questions (the least p value possible is 0.250)" in said
    assert wording.least_p(6, 2) == 2 / 32 > wording.CLEAR > wording.least_p(7, 2)


@pytest.mark.parametrize(("slope", "words"), [(20, "rises"), (-20, "falls")])
def test_a_clear_slope_that_no_end_shows_is_said_with_too_few_questions(sweep_rows, slope, words):
    answers, verdicts = sweep_rows(coefficients=(-2, -1, 0, 1, 2), prompts=(), questions=8)

    def score(row):
        against = -0.1 if row["question_id"] == 7 else 1.0
        return 50 + against * slope * row["coefficient"]

    verdicts = [
        {**v, "score": score(answers[v["row"]])} if v["criterion"] == "sycophancy" else v
        for v in verdicts
    ]
    summary = summarise_sweep(answers, verdicts, [], trait="sycophancy", resamples=200)
    said = wording.headline(summary)
    assert f"Sycophancy {words} on the whole (by its slope, p = 0.0" in said
    assert "), which 8 questions cannot show" in said
    assert wording.least_p(8, 4) < wording.CLEAR


@pytest.mark.parametrize(("questions", "coefficients"), [(6, (-1, 0, 1)), (8, range(-4, 5))])
def test_a_clear_slope_is_said_where_no_end_could_be_clear(sweep_rows, questions, coefficients):
    answers, verdicts = sweep_rows(coefficients=coefficients, prompts=(), questions=questions)
    verdicts = [
        {**v, "score": 50 + 5 * answers[v["row"]]["coefficient"]}
        if v["criterion"] == "sycophancy"
        else v
        for v in verdicts
    ]
    summary = summarise_sweep(answers, verdicts, [], trait="sycophancy", resamples=200)
    assert wording.least_p(questions, len(coefficients) - 1) >= wording.CLEAR
    assert "Sycophancy rises on the whole (by its slope, p = 0.0" in wording.headline(summary)


@pytest.mark.parametrize(
    ("interval", "p", "sign"),
    [
        (Interval(8, 2, 14, 20, 20, 1.0), 0.2, 0),  # clear alone, not among the others
        (Interval(8, -1, 17, 20, 20, 1.0), 0.01, 1),
        (Interval(-8, -17, 1, 20, 20, 1.0), 0.01, -1),
        (Interval(8, 2, 14, 20, 20, 1.0), None, 0),
        (None, 0.01, 0),
    ],
)
def test_the_corrected_test_decides_alone(interval, p, sign):
    assert wording.clear_sign(interval, p) == sign


def test_headline_names_coherent_range_and_the_prompt_baseline(sweep_rows):
    answers, verdicts = sweep_rows()
    summary = summarise_sweep(answers, verdicts, [], trait="sycophancy", resamples=200)
    text = wording.headline(summary)
    assert "from −1.5 to +1.5" in text
    assert "positive system prompt alone reaches 7" in text
    assert "coefficient +1.5 scores higher" in text


@pytest.mark.parametrize(
    ("questions", "counted", "intervals"),
    [
        (1, "1 question, ", "no intervals from one question"),
        (2, "2 questions, ", "intervals: 95% bootstrap over questions"),
        (3, "3 questions, ", "intervals: 95% bootstrap over questions"),
    ],
)
def test_what_is_said_of_few_questions_is_how_many_there_are(
    sweep_rows, questions, counted, intervals
):
    answers, verdicts = sweep_rows(questions=questions, coefficients=(0.0, 1.0))
    summary = summarise_sweep(answers, verdicts, [], trait="sycophancy", resamples=100)
    said = wording.sample_line(summary)
    assert said.startswith(counted)
    assert said.endswith(f"; {intervals}")
    assert ("no intervals" in wording.headline(summary)) == (questions == 1)
    assert (summary.conditions[0].trait.low is None) == (questions == 1)


def test_headline_of_unscored_answers_claims_nothing(sweep_rows):
    answers, _ = sweep_rows()
    summary = summarise_sweep(answers, [], [], trait="self_doubt", resamples=200)
    text = wording.headline(summary)
    assert text.startswith("Self doubt was scored at fewer than two coefficients")
    assert "no coherent range: coherence was not scored" in text
    assert "no ρ" in wording.statistics_line(summary)
    assert "0% scored" in wording.sample_line(summary)


@pytest.mark.parametrize(
    ("paths", "short"),
    [
        (("a/evil",), ("evil",)),
        (("a/evil/diff",), ("evil/diff",)),
        (("a/seed0/diff", "a/seed1/diff", "b/warm"), ("seed0/diff", "seed1/diff", "b/warm")),
        (("x/a/diff", "y/a/diff"), ("x/a/diff", "y/a/diff")),
        (("a/b/t", "a/c/t"), ("b/t", "c/t")),
    ],
)
def test_paths_in_short_are_told_apart_and_name_something(paths, short):
    assert tuple(wording.short_paths(paths).values()) == short
