"""A planned size has the power that was asked for, on data with a planted effect."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2, norm, pearsonr, permutation_test

from persona_lora.core.errors import UserError
from persona_lora.report import power
from persona_lora.report.power import (
    Pilot,
    Planned,
    cheapest,
    crossed_ps,
    plan_finetunes,
    plan_power,
    power_of,
)
from persona_lora.report.resampling import sign_flip_p, sign_flip_ps
from tests.report.test_two_way import planted

QUESTIONS = (8, 12, 16, 24, 32, 48)


def test_the_planned_questions_find_a_planted_effect_as_often_as_promised():
    rng = np.random.default_rng(0)
    pilot = Pilot.of(planted(rng, (1, 1, 60), draw=0)[0])
    found = plan_power(pilot, 8.0, 0.05, questions=QUESTIONS, simulations=300)
    needed = cheapest(found, 0.8)
    assert needed.seeds == 1
    assert needed.questions in (24, 32)
    real = planted(rng, (300, 1, needed.questions), effect=8.0, draw=0)[:, 0]
    assert np.mean(sign_flip_ps(real) < 0.05) == pytest.approx(needed.power, abs=0.1)


def test_the_planned_seeds_find_a_planted_effect_as_often_as_promised():
    spread = norm.ppf(np.linspace(0.005, 0.995, 100))  # a pilot that knows it all: few seeds do not
    pilot = Pilot(12 * spread / spread.std(), 8 * spread / spread.std(), 6.0, (100, 100))
    found = plan_power(pilot, 10.0, 0.05, questions=QUESTIONS, simulations=300)
    needed = cheapest(found, 0.8)
    assert needed.seeds > 3
    size = (1000, needed.seeds, needed.questions)
    real = planted(np.random.default_rng(1), size, effect=10.0)
    assert np.mean(crossed_ps(real) < 0.05) == pytest.approx(needed.power, abs=0.06)


def test_a_pilot_knows_what_its_seeds_and_questions_varied():
    pilot = Pilot.of(planted(np.random.default_rng(1), (1, 80, 60))[0])
    found = (pilot.questions.std(), pilot.rest.std(), pilot.seed_spread)
    assert found == pytest.approx((12, 8, 6), rel=0.2)


def test_the_upper_limits_hold_the_true_spread_in_four_of_five_pilots():
    rng = np.random.default_rng(4)
    one = [Pilot.of(planted(rng, (1, 1, 5), draw=0)[0]) for _ in range(1000)]
    true = (12**2 + 8**2) ** 0.5  # questions and what is left
    assert np.mean([each.wider().questions.std() >= true for each in one]) == pytest.approx(
        0.8, abs=0.04
    )
    assert np.mean([each.questions.std() >= true for each in one]) < 0.5
    several = Pilot.of(planted(rng, (1, 3, 200))[0])
    scaled = several.wider()
    assert scaled.seed_spread / several.seed_spread == pytest.approx(2.117, abs=0.001)
    assert scaled.rest.std() / several.rest.std() == pytest.approx(1.03, abs=0.01)
    few = Pilot.of(planted(rng, (1, 3, 5))[0])
    scale = few.wider().rest.std() / few.rest.std(), few.wider().questions / few.questions
    upper = [np.sqrt(freedom / chi2.ppf(0.2, freedom)) for freedom in (8, 4)]  # 4 · 2 and 4
    assert scale[0] == pytest.approx(upper[0])
    assert scale[1] == pytest.approx(upper[1])


def test_without_an_effect_power_is_the_level():
    pilot = Pilot.of(planted(np.random.default_rng(2), (1, 6, 40))[0])
    assert power_of(pilot, 1e-9, 20, 5, 0.05, simulations=1000) < 0.05


def test_a_seed_gives_the_same_plan_again():
    pilot = Pilot.of(planted(np.random.default_rng(3), (1, 1, 20))[0])
    plans = [
        plan_power(pilot, 5.0, 0.05, questions=(8, 12), simulations=50, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert plans[0] == plans[1] != plans[2]


def test_a_lucky_size_is_not_enough_where_a_larger_one_falls_short():
    found = [Planned(8, 1, 0.81), Planned(12, 1, 0.7), Planned(16, 1, 0.9), Planned(20, 1, 0.95)]
    assert cheapest(found, 0.8) == found[2]
    assert cheapest(found, 0.99) is None


def test_all_rows_are_tested_as_one_alone():
    for questions in (9, 20):
        rows = np.random.default_rng(4).normal(3, 10, (5, questions))
        assert sign_flip_ps(rows).tolist() == [sign_flip_p(row) for row in rows]


@pytest.mark.parametrize(
    ("effect", "values", "said"),
    [
        (0.0, np.eye(1, 8), "effect of 0"),
        (5.0, np.eye(1, 3), "at least 4"),
        (5.0, np.full((1, 8), 2.0), "differences of the pilot are equal"),
        (5.0, np.zeros((3, 8)), "differences of the pilot are equal"),
    ],
)
def test_what_cannot_be_planned_is_refused(effect, values, said):
    with pytest.raises(UserError, match=said):
        plan_power(Pilot.of(values), effect, 0.05)


def test_a_correlation_over_data_sets_needs_many_of_them():
    found = {
        (each.questions, each.seeds): each.power
        for each in plan_finetunes(0.3, 0.7, 0.05, simulations=100)
    }
    assert found[4, 5] < 0.3  # of four data sets at most 24 orders can be told apart
    assert found[40, 1] > 0.9
    assert found[12, 5] > found[12, 1] + 0.05  # finetunes average their own noise away
    assert found[12, 5] < found[40, 1]  # but are no data sets


@pytest.mark.parametrize("family", [10, 80, 300])
def test_a_strong_correlation_is_found_among_many_that_are_tested(family):
    """The smallest p of a shuffle lies below the level, however many share it."""
    found = {each.questions: each.power for each in plan_finetunes(
        0.05, 0.99, 0.05 / family, simulations=60
    ) if each.seeds == 5}  # fmt: skip
    assert found[12] > 0.9
    assert found[40] == 1.0
    assert (found[4], found[6] > 0) == (0.0, family == 10)  # they have 24 and 720 orders


def test_shuffles_and_students_p_agree_where_one_takes_over():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(200, power.SHUFFLED_SETS))
    y = 0.8 * x + 0.6 * rng.normal(size=x.shape)
    shuffled = power._shuffled_ps(x, y, 20_000, rng)
    assert shuffled[0] == pytest.approx(
        permutation_test((y[0],), lambda each: pearsonr(x[0], each).statistic,
                         permutation_type="pairings", n_resamples=2000, rng=rng).pvalue, abs=0.01
    )  # fmt: skip
    for level in (0.05, 0.005, 0.0005):
        found = [np.mean(p < level) for p in (shuffled, pearsonr(x, y, axis=1).pvalue)]
        assert found[0] == pytest.approx(found[1], abs=0.06)


def test_a_shuffled_correlation_keeps_its_level():
    found = plan_finetunes(0.3, 1e-9, 0.05, simulations=100)
    assert np.mean([each.power for each in found]) < 0.06
    with pytest.raises(UserError, match="a correlation between"):
        plan_finetunes(0.3, 10.0, 0.05)


@pytest.mark.parametrize("scale", [1e-3, 0.5, 30.0])
def test_deviations_have_the_variance_that_is_asked_for_however_small_they_were(scale):
    values = scale * np.array([-1.0, 0.0, 3.0, -2.0])
    assert power._spread(values, 4.0).var() == pytest.approx(4.0)
    assert power._spread(np.zeros(4), 4.0).tolist() == [0.0]
