"""AUC against scikit-learn, intervals around it, and groups that are too small."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm, spearmanr
from sklearn.metrics import roc_auc_score

from persona_lora.core.errors import UserError
from persona_lora.report.resampling import auc_bounds, auc_of, separation

LABELS = [0, 0, 25, 25, 50, 50, 75, 75, 100, 100]


def test_auc_equals_scikit_learn_with_ties():
    random = np.random.default_rng(0)
    above, below = random.integers(3, 9, 20), random.integers(0, 6, 30)
    truth = [1] * 20 + [0] * 30
    assert auc_of(above, below) == pytest.approx(roc_auc_score(truth, [*above, *below]))


def test_middle_labels_count_for_the_correlation_only():
    values = [0.1, 0.3, 0.2, 0.4, 9.0, -9.0, 0.5, 0.7, 0.6, 0.8]
    result = separation(values, LABELS)
    assert result.auc == result.high == 1.0
    assert 0.5 < result.low < 0.75  # four answers against four do not show an area of 1
    assert (result.n_positive, result.n_negative, result.n) == (4, 4, 10)
    assert result.rho == pytest.approx(spearmanr(values, LABELS).statistic)


def test_intervals_hold_the_estimate():
    random = np.random.default_rng(1)
    values = (np.array(LABELS * 6) / 50 + random.normal(size=60)).tolist()
    result = separation(values, LABELS * 6)
    assert 0.5 < result.low < result.auc < result.high < 1


def test_answers_to_one_question_are_one_draw():
    values, labels = [0.1, 0.5, 0.2, 0.4, 0.25, 0.3] * 4, [0, 100, 25, 75, 100, 0] * 4
    asked = ["a", "b", "c", "d", "d", "e"] * 4  # two questions above, three below
    result = separation(values, labels, asked)
    assert (result.low, result.high) == auc_bounds(result.auc, 2, 3)
    alone = separation(values, labels, list(range(24)))
    assert alone == separation(values, labels)
    assert result.low < alone.low < alone.high < result.high


@pytest.mark.parametrize(("auc", "n"), [(1.0, 6), (0.0, 6), (0.5, 10), (0.83, 25)])
def test_an_area_and_its_mirror_image_have_mirrored_bounds(auc, n):
    low, high = auc_bounds(auc, n, n + 3)
    assert auc_bounds(1 - auc, n, n + 3) == pytest.approx((1 - high, 1 - low), abs=1e-6)
    assert low < high
    assert auc_bounds(auc, 4 * n, 4 * n)[0] >= low


@pytest.mark.parametrize(("shift", "n"), [(0.0, 15), (1.0, 12), (2.5, 12), (2.5, 40)])
def test_intervals_of_an_area_cover_it(shift, n):
    random, truth = np.random.default_rng(2), norm.cdf(shift / np.sqrt(2))
    hits = 0
    for _ in range(400):
        auc = auc_of(random.normal(shift, 1, n), random.normal(0, 1, n))
        low, high = auc_bounds(auc, n, n)
        hits += low <= truth <= high
    assert hits / 400 >= 0.93


def test_no_variation_has_no_correlation_and_small_groups_are_refused():
    assert separation([1.0] * 10, LABELS).rho is None
    assert separation([1.0] * 10, LABELS).auc == 0.5
    with pytest.raises(UserError, match="1 answers are labelled 75 or more"):
        separation([1.0, 2.0, 3.0], [100, 0, 0])
