"""Draws and questions, both taken as drawn: planted variances come back, intervals cover."""

from __future__ import annotations

import numpy as np
import pytest

from persona_lora.report.resampling import EQUAL, bootstrap_mean
from persona_lora.report.two_way import (
    components,
    crossed_mean,
    crossed_ps,
    mean_over_draws,
    shared_questions,
)


def planted(rng, size, *, effect=0.0, draw=6.0, question=12.0, rest=8.0):
    experiments, draws, questions = size
    return (
        effect
        + rng.normal(0, draw, (experiments, draws, 1))
        + rng.normal(0, question, (experiments, 1, questions))
        + rng.normal(0, rest, size)
    )


def test_planted_variances_are_found():
    found = components(planted(np.random.default_rng(0), (1, 300, 300))[0])
    assert np.allclose(np.sqrt(found), [12, 6, 8], rtol=0.1)


@pytest.mark.parametrize(("draws", "questions"), [(3, 12), (5, 12), (5, 40), (8, 20)])
@pytest.mark.parametrize("draw", [0.0, 6.0, 20.0])
def test_intervals_cover_and_the_test_keeps_its_level(draws, questions, draw):
    values = planted(np.random.default_rng(1), (1000, draws, questions), draw=draw)
    p = crossed_ps(values)
    assert np.mean(p < 0.05) < 0.075  # exact t over few draws: 92.4 to 97.5 of 100 cover
    first = crossed_mean(values[0])
    assert first.p == pytest.approx(p[0])
    assert (first.interval.low <= 0 <= first.interval.high) == (p[0] >= 0.05)


@pytest.mark.parametrize("rate", [0.5, 0.9])
@pytest.mark.parametrize("spread", [0.0, 1.5])  # of questions in log-odds; of seeds half of it
def test_the_test_keeps_its_level_on_scores_of_0_and_100(rate, spread):
    rng, size = np.random.default_rng(0), (4000, 3, 24)
    lean = np.log(rate / (1 - rate)) + rng.normal(0, spread, (size[0], 1, size[2]))
    shown = []
    for _ in range(2):
        odds = lean + rng.normal(0, spread / 2, (*size[:2], 1))
        shown.append(100.0 * (rng.random(size) < 1 / (1 + np.exp(-odds))))
    p = crossed_ps(shown[0] - shown[1])
    assert np.mean(p < 0.05) < 0.06
    assert np.mean(p < 0.05 / 136) < 0.0025  # Holm's first step of so many: tails are not exact


def test_questions_alone_would_be_too_sure_of_few_draws():
    """What resampling over draws is for: with it left out, half of the findings are of nothing."""
    values = planted(np.random.default_rng(2), (400, 3, 40), draw=10.0)
    by_question = values.mean(axis=1)
    errors = by_question.std(axis=1, ddof=1) / np.sqrt(40)
    assert np.mean(np.abs(by_question.mean(axis=1)) > 2 * errors) > 0.4


@pytest.mark.parametrize("size", [(1, 12), (2, 12), (3, 1), (0, 0)])
def test_too_few_of_either_have_no_interval(size):
    found = crossed_mean(np.zeros(size))
    assert found.p is None
    assert found.interval.low is None
    assert "too few" in found.interval.reason


def test_what_is_rest_alone_is_no_variance_of_questions_or_draws():
    noise = planted(np.random.default_rng(1), (1, 3, 300), draw=0.0, question=0.0)[0]
    found = components(noise)
    assert found.question < 10 < 50 < found.rest < 80  # 64 was planted
    assert found.draw < 2


def test_equal_values_of_all_draws_have_no_interval_of_no_width():
    found = crossed_mean(np.full((5, 4), 3.0))
    assert (found.interval.low, found.interval.reason) == (None, EQUAL)
    zeros = {at: [0.0] for at in range(10)}
    of_scores, alone = mean_over_draws([zeros] * 3), mean_over_draws([zeros])
    assert (of_scores.low, of_scores.high) == (alone.low, alone.high)  # on a scale others may lie
    assert (of_scores.low, of_scores.high > 10) == (0.0, True)
    assert crossed_mean(np.arange(20.0).reshape(5, 4)).interval.low is not None


def test_no_p_is_0():
    assert crossed_mean(np.ones((5, 9))).p == 2**-4
    assert crossed_mean(np.ones((9, 5))).p == 2**-4  # nor is it below that of the questions' signs
    assert crossed_mean(np.zeros((5, 4))).p == 1


@pytest.mark.parametrize("questions", [8, 12, 20])
def test_scores_near_an_end_of_their_scale_are_covered_whatever_the_number_of_draws(questions):
    """A few questions fail under every seed: most data sets do not hold one of them."""
    rng, held = np.random.default_rng(4), []
    true = 0.93 * 95 + 0.07 * 5
    for _ in range(300):
        fails = rng.random(questions) < 0.07
        level = np.where(fails, 5.0, 95.0)
        values = np.clip(level + rng.normal(0, 2, (3, questions)), 0, 100)
        draws = [{at: [score] for at, score in enumerate(row)} for row in values.tolist()]
        found = mean_over_draws(draws, resamples=400)
        held.append(found.low <= true <= found.high)
    assert np.mean(held) > 0.93


@pytest.mark.parametrize("questions", [12, 20])
def test_skewed_differences_over_draws_keep_what_one_draw_keeps(questions):
    rng, held, found = np.random.default_rng(5), [], []
    for _ in range(300):
        by_question = rng.exponential(10, (1, questions)) - 10
        values = by_question + rng.normal(0, 1, (3, 1)) + rng.normal(0, 2, (3, questions))
        several, one = (
            crossed_mean(values),
            bootstrap_mean(dict(enumerate(values.mean(0)[:, None].tolist()))),
        )
        assert several.interval.low <= one.low < one.high <= several.interval.high
        held.append(several.interval.low <= 0 <= several.interval.high)
        found.append(several.p < 0.05)
    assert np.mean(held) > 0.9
    assert np.mean(found) < 0.1


@pytest.mark.parametrize("unit", [1e-7, 1e-3, 1e4])
def test_an_interval_does_not_hang_on_the_unit(unit):
    values = planted(np.random.default_rng(3), (1, 3, 12), draw=20.0, effect=30.0)[0]
    found, scaled = crossed_mean(values), crossed_mean(values * unit)
    assert scaled.p == pytest.approx(found.p)
    assert scaled.interval.low == pytest.approx(found.interval.low * unit)


def test_what_rounding_leaves_of_nothing_is_no_difference():
    assert crossed_mean(np.full((8, 4), 1e-17)).p == 1


def test_answers_that_no_mean_rests_on_are_not_counted():
    draws = [
        {at: [None if at == draw else 50.0 + at, 60.0] for at in range(6)} for draw in range(3)
    ]
    assert (mean_over_draws(draws).n, mean_over_draws(draws).coverage) == (33, 33 / 36)
    lost = [{at: [None] if at % 3 == draw else [50.0 + at] for at in range(9)} for draw in range(3)]
    found = mean_over_draws([{**each, 9: [40.0], 10: [41.0]} for each in lost])
    assert (found.n, found.n_questions, found.mean) == (6, 2, 40.5)
    assert found.coverage == pytest.approx(6 / 33)


def test_only_questions_that_every_draw_has_count():
    found = shared_questions([{1: 1.0, 2: 2.0, 3: 3.0}, {2: 20.0, 3: 30.0, 4: 40.0}])
    assert found.tolist() == [[2, 3], [20, 30]]


def test_values_that_are_equal_but_for_rounding_are_equal():
    for value in (0.1, 100 / 3):
        assert crossed_mean(np.full((3, 20), value)).p == 2**-2


def test_values_whose_means_alone_are_equal_are_not_called_equal():
    found = crossed_mean(np.eye(3) * 100)
    assert found.interval.reason is None
    assert found.interval.low < 0 < 100 / 3 < found.interval.high
    assert found.p > 0.05
