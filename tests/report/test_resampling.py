"""Identities of the resampling statistics, and scipy as the reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from persona_lora.report import wording
from persona_lora.report.comparisons import score_items
from persona_lora.report.curve import CoherentRange, TraitCurve, gaps_between
from persona_lora.report.resampling import (
    ALIKE,
    EQUAL,
    SCORES,
    Bounds,
    bca_bounds,
    bca_mean_bounds,
    bootstrap_mean,
    correlation_bounds,
    correlation_gap_bounds,
    holm,
    question_weights,
    rank_correlation,
    resampled_estimate,
    row_rank_correlation,
    sign_flip_p,
    weighted_correlation,
    weighted_means,
)
from persona_lora.report.scores import Condition
from persona_lora.report.two_way import mean_gap, mean_over_draws
from persona_lora.studies.steering.read_comparison import over_draws


def test_equal_scores_have_no_interval_of_no_width():
    interval = bootstrap_mean({question: [70.3, 70.3 + 1e-12] for question in range(20)})
    assert interval.mean == pytest.approx(70.3)
    assert (interval.low, interval.high, interval.reason) == (None, None, EQUAL)
    assert wording.interval(interval, 1) == "70.3 [not known: all equal]"
    assert bootstrap_mean({question: [70.0 + question % 2] for question in range(20)}).low < 70.5


def estimates_of(rng):
    """Return every interval of a random small sweep: of its slope and over draws, too."""
    questions, conditions = rng.integers(1, 7), rng.integers(2, 5)
    coarse = [0.0, 50.0, 100.0] if rng.random() < 0.5 else list(range(101))
    scores = rng.choice([None, *coarse], size=(conditions, questions)).tolist()
    rise = 60.0 * rng.integers(0, 2)  # of some every resample has one order
    own = [
        {at: [None if score is None else (score + rise * c) / 3] for at, score in enumerate(row)}
        for c, row in enumerate(scores)
    ]
    conditions = [Condition("lora", float(at)) for at in range(len(own))]
    curve = TraitCurve(dict(zip(conditions, own, strict=True)), 0, 200)
    span = CoherentRange(0.0, 3.0, (0.0, 1.0, 2.0, 3.0), 50)
    yield from (curve.rho_means(), curve.rho_rows(), curve.fit(span).slope)
    yield from (curve.mean_of(each) for each in own)
    yield from (gap.interval for gap in curve.from_zero().values())
    yield mean_over_draws(own)
    yield mean_gap([gaps_between(each, own[0]) for each in own[1:]]).interval


def test_no_interval_is_without_width_whatever_was_drawn():
    """Three conditions have few rank correlations, and all resamples may have the same one."""
    rng, met = np.random.default_rng(0), set()
    for _ in range(400):
        for each in estimates_of(rng):
            assert (each.low is None) == (each.high is None) == (each.reason is not None), each
            assert each.low is None or each.low < each.high, each
            met.add(each.reason)
    assert {None, EQUAL, ALIKE} < met


def test_bootstrap_counts_scored_rows_questions_and_coverage():
    interval = bootstrap_mean({0: [10.0, None], 1: [30.0, 50.0], 2: [None, None]})
    assert (interval.n, interval.n_questions) == (3, 2)
    assert interval.coverage == pytest.approx(3 / 6)
    assert interval.mean == pytest.approx(25.0)  # of 10 and 40: a question counts once


@pytest.mark.parametrize(
    ("values", "reason"),
    [({}, "no scored"), ({0: [None]}, "no scored"), ({0: [40.0, 60.0]}, "one question")],
)
def test_bootstrap_of_degenerate_scores_gives_a_reason_instead_of_bounds(values, reason):
    interval = bootstrap_mean(values)
    assert interval.low is None
    assert interval.high is None
    assert reason in interval.reason


@pytest.mark.parametrize("value", [-50.0, 50.0])
def test_an_estimate_outside_all_resamples_still_has_bounds(value):
    rng = np.random.default_rng(0)
    found = bca_bounds(value, rng.normal(size=400), rng.normal(size=12))
    assert np.isfinite(found).all()


def test_expanded_bca_is_the_bca_of_scipy_at_the_expanded_level():
    scores = np.random.default_rng(1).exponential(20, 25)
    ours = bca_mean_bounds(scores[None], np.ones((1, 25)), resamples=20_000)
    expanded = stats.norm.cdf(np.sqrt(25 / 24) * stats.t.ppf(0.025, 24))
    theirs = stats.bootstrap(
        *((scores,), np.mean),
        n_resamples=20_000,
        method="BCa",
        confidence_level=1 - 2 * expanded,
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.35)
    assert ours.high == pytest.approx(theirs.high, abs=0.7)


def _floored(rng, n):
    return np.clip(rng.normal(8, 20, n), 0, 100)


def _skewed(rng, n):
    return 100 * rng.beta(0.3, 2, n)


def _ceiling_with_failures(rng, n):
    fails = rng.random(n) < 0.07
    return np.clip(np.where(fails, rng.normal(10, 5, n), rng.normal(95, 4, n)), 0, 100)


def _middle(rng, n):
    return np.clip(rng.normal(50, 15, n), 0, 100)


def _coverage(draw, n, *, scale, draws=200):
    rng, truth = np.random.default_rng(n), draw(np.random.default_rng(0), 400_000).mean()
    hits = 0
    for _ in range(draws):
        values = {i: [float(score)] for i, score in enumerate(draw(rng, n))}
        interval = bootstrap_mean(values, scale=scale, resamples=1000)
        hits += interval.low <= truth <= interval.high
    return hits / draws


@pytest.mark.parametrize("n", [8, 12, 20, 40])
@pytest.mark.parametrize("draw", [_floored, _skewed, _ceiling_with_failures, _middle])
def test_intervals_on_a_known_scale_cover(draw, n):
    assert _coverage(draw, n, scale=SCORES) >= 0.93


def test_without_the_ends_of_the_scale_rare_failures_are_not_covered():
    """What the known scale is for: half of all samples of twelve hold no failure to resample."""
    assert _coverage(_ceiling_with_failures, 12, scale=None) < 0.7


@pytest.mark.parametrize("n", [2, 3, 5, 7, 8, 12, 20])
def test_without_a_scale_covers_where_scores_are_in_the_middle(n):
    assert _coverage(_middle, n, scale=None) >= 0.92


@pytest.mark.parametrize("n", [12, 20, 40])
@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, n: rng.normal(5, 10, n),
        lambda rng, n: rng.standard_t(3, n),
        lambda rng, n: rng.exponential(20, n) - 5,
        lambda rng, n: np.maximum(0, rng.normal(15, 20, n)) - np.maximum(0, rng.normal(8, 20, n)),
        lambda rng, n: np.where(rng.random(n) < 0.5, rng.normal(50, 10, n), rng.normal(0, 3, n)),
    ],
    ids=["normal", "heavy tails", "skewed", "floored", "half rise"],
)
def test_differences_cover_whatever_their_shape(draw, n):
    """Student's alone covers skewed ones in 91 of 100 cases, expanded BCa heavy tails in 91."""
    assert _coverage(draw, n, scale=None) >= 0.925


def _families(rng, n, r, bent):
    """A change and two predictors of r, of n families with one to four finetunes: 0.7 is shared."""
    family = np.repeat(np.arange(n), rng.integers(1, 5, n))
    root = np.linalg.cholesky([[1, r, r], [r, 1, 0.7], [r, 0.7, 1]])
    shared, own = root @ rng.normal(size=(3, n)), root @ rng.normal(size=(3, len(family)))
    found = 0.7**0.5 * shared[:, family] + 0.3**0.5 * own
    y, *xs = np.expm1(0.8 * found) if bent else found
    return family, y, xs


@pytest.mark.parametrize("n", [12, 20])
@pytest.mark.parametrize(("r", "bent"), [(0.0, False), (0.6, False), (0.8, False), (0.6, True)])
def test_intervals_of_r_over_families_cover(r, bent, n):
    """Percentiles hold it in 0.87 to 0.92."""
    _, y, xs = _families(np.random.default_rng(0), 100_000, r, bent)
    truth, rng, held = np.corrcoef(xs[0], y)[0, 1], np.random.default_rng(n), np.zeros(2)
    for _ in range(400):
        family, y, xs = _families(rng, n, r, bent)
        left = (family != np.arange(n)[:, None]).astype(float)
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=400)[:, family].astype(float)
        weights = np.ones((1, len(y))), drawn, left
        found = [[weighted_correlation(x[None], y[None], w) for w in weights] for x in xs]
        values = tuple(float(each[0][0]) for each in found)
        both = tuple(
            correlation_bounds(one, each[1], each[2])
            for one, each in zip(values, found, strict=True)
        )
        gap = correlation_gap_bounds(values, both, (found[0][2], found[1][2]))
        held += both[0].low <= truth <= both[0].high, gap.low <= 0 <= gap.high
    assert held.min() / 400 >= 0.93


def test_an_interval_of_r_rests_on_no_single_unit():
    resampled = np.array([0.1, 0.5, np.nan, 0.7])
    assert correlation_bounds(0.5, resampled, np.array([0.5, np.nan, 0.4])) == (-1, 1)
    assert correlation_bounds(0.5, np.full(4, np.nan), np.array([0.5, 0.4])) == (-1, 1)
    assert correlation_bounds(1.0, np.ones(4), np.ones(4)) == pytest.approx((1, 1))
    wide = correlation_bounds(0.5, resampled[:2], np.array([0.5, 0.4, 0.6]))
    assert wide.low < 0.1
    assert 0.6 < wide.high < 1


def test_what_two_correlations_share_is_no_doubt_of_their_difference():
    left, bounds = np.array([0.4, 0.5, 0.7]), Bounds(0.1, 0.8)
    same = correlation_gap_bounds((0.5, 0.5), (bounds, bounds), (left, left))
    other = correlation_gap_bounds((0.5, 0.5), (bounds, bounds), (left, -left))
    constant = correlation_gap_bounds((0.5, 0.5), (bounds, bounds), (left, np.full(3, 0.5)))
    assert same == pytest.approx((-0.1, 0.1))  # a = 0.4 and b = 0.3
    assert other == pytest.approx((-0.7, 0.7))
    assert constant == pytest.approx((-0.5, 0.5))


def test_a_difference_of_two_correlations_is_unknown_where_either_is_and_over_two_units():
    bounds, left = Bounds(0.1, 0.8), np.array([0.4, 0.5, 0.7])
    both = (left, np.array([0.1, np.nan, 0.2]))
    assert correlation_gap_bounds((0.5, 0.2), (bounds, Bounds(-1, 1)), both) == (-2, 2)
    assert correlation_gap_bounds((0.5, 0.2), (bounds, bounds), (left[:2], left[:2])) == (-2, 2)


def test_a_difference_has_the_wider_one_of_two_intervals_at_either_end():
    values = np.random.default_rng(5).exponential(20, 15)
    found = bootstrap_mean({question: [float(each)] for question, each in enumerate(values)})
    bca = bca_mean_bounds(values[None], np.ones((1, 15)))
    student = stats.ttest_1samp(values, 0).confidence_interval()
    assert student.low < bca.low
    assert student.high < bca.high
    assert (found.low, found.high) == pytest.approx((student.low, bca.high))


@pytest.mark.parametrize("rows", [1, 3])
def test_few_questions_have_students_interval_however_many_rows_each_has(rows):
    values = [3.0, -4.0, 11.0, 6.5, 0.0]
    found = bootstrap_mean({question: [value] * rows for question, value in enumerate(values)})
    reference = stats.ttest_1samp(values, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx(reference)


def test_questions_of_unequal_size_count_alike():
    """Else a mean and the paired difference of two could be of different signs."""
    values = {0: [2.0, 4.0, 6.0], 1: [0.0], 2: [8.0, 8.0]}
    found, single = bootstrap_mean(values), bootstrap_mean({0: [4.0], 1: [0.0], 2: [8.0]})
    assert (found.mean, found.low, found.high) == (single.mean, single.low, single.high)
    reach = stats.t.ppf(0.975, 2) * 4 / np.sqrt(3)
    assert (found.low, found.high) == pytest.approx((4 - reach, 4 + reach))


@pytest.mark.parametrize("n", [10, 20])
@pytest.mark.parametrize(
    ("before", "after"), [(0, 0.02), (0, 0.05), (0, 0.1), (0.1, 0.1), (1, 0.95)]
)
def test_differences_of_shares_cover_where_events_are_rare(n, before, after):
    """A change that happens to one prompt in twenty is not seen in most samples of ten."""
    items = range(n)
    rng, hits, equal, draws = np.random.default_rng(n), 0, 0, 400
    found = {}
    for _ in range(draws):
        one, two = rng.random(n) < before, rng.random(n) < after
        gaps = tuple(sorted((100.0 * two - 100.0 * one).tolist()))
        if gaps not in found:
            rows = [
                {"condition": name, "task": "refusal", "metric": "score", "item": at, "score": told}
                for name, scores in (("plain", [0.0] * n), ("steered", gaps))
                for at, told in zip(items, scores, strict=True)
            ]
            found[gaps] = over_draws([dict(enumerate(gaps))], Bounds(-100.0, 100.0))[0]
            if min(gaps) >= 0:
                assert found[gaps] == score_items(rows, "plain")[1].difference
        hits += found[gaps].low <= 100 * (after - before) <= found[gaps].high
        equal += bootstrap_mean(dict(enumerate([[gap] for gap in gaps]))).reason == EQUAL
    assert hits / draws >= 0.94
    assert equal / draws == pytest.approx(
        (before * after + (1 - before) * (1 - after)) ** n, abs=0.08
    )


@pytest.mark.parametrize("n", [10, 20])
def test_a_share_that_changed_is_covered_whatever_it_is(n):
    """By enumeration: how often k of n change, and whether the interval of k of n holds p."""
    of = [
        over_draws([{at: 100.0 * (at < k) for at in range(n)}], Bounds(-100.0, 100.0))[0]
        for k in range(n + 1)
    ]
    low, high = (np.array([getattr(each, end) for each in of])[:, None] for end in ("low", "high"))
    p = np.arange(0.01, 1, 0.01)
    chance = stats.binom.pmf(np.arange(n + 1)[:, None], n, p)
    covered = (chance * ((low <= 100 * p) & (100 * p <= high))).sum(axis=0)
    assert covered.mean() > 0.96
    assert covered.min() > 0.89
    assert covered[:5].min() > 0.99  # rare events: most samples hold none


def test_equal_scores_at_an_end_of_the_scale_leave_room_on_the_other_side_only():
    interval = bootstrap_mean({i: [100.0] for i in range(12)}, scale=SCORES)
    assert interval.high == 100.0
    assert 75 < interval.low < 97


def test_intervals_follow_the_scale_and_mirror():
    scores = np.random.default_rng(13).uniform(0, 100, 15)
    one = bootstrap_mean({i: [float(s)] for i, s in enumerate(scores)}, scale=SCORES)
    tenth = bootstrap_mean({i: [float(s) / 10] for i, s in enumerate(scores)}, scale=Bounds(0, 10))
    mirrored = bootstrap_mean({i: [100 - float(s)] for i, s in enumerate(scores)}, scale=SCORES)
    assert (tenth.low, tenth.high) == pytest.approx((one.low / 10, one.high / 10))
    assert (mirrored.low, mirrored.high) == pytest.approx((100 - one.high, 100 - one.low))


def test_a_value_outside_the_scale_is_refused():
    with pytest.raises(ValueError, match=r"101\.0 lies outside the scale 0\.0 to 100\.0"):
        bootstrap_mean({0: [3.0], 1: [101.0]}, scale=SCORES)


def test_bootstrap_by_question_is_wider_than_by_rows_when_samples_repeat():
    scores = np.random.default_rng(3).uniform(0, 100, 15)
    by_question = bootstrap_mean({i: [float(s)] * 8 for i, s in enumerate(scores)})
    repeated = np.repeat(scores, 8)
    by_row = bootstrap_mean({i: [float(s)] for i, s in enumerate(repeated)})
    assert by_question.mean == pytest.approx(by_row.mean)
    assert by_question.high - by_question.low > 2 * (by_row.high - by_row.low)


def test_bootstrap_repeats_with_its_seed():
    scores = np.random.default_rng(11).uniform(0, 100, 12)
    values = {i: [float(score)] for i, score in enumerate(scores)}
    assert bootstrap_mean(values, seed=4) == bootstrap_mean(values, seed=4)
    assert bootstrap_mean(values, seed=4) != bootstrap_mean(values, seed=5)


def test_weighted_means_equal_means_of_repeated_rows():
    rng = np.random.default_rng(5)
    scores = rng.uniform(0, 100, (3, 6))
    weights = question_weights(6, resamples=50, seed=6)
    means = weighted_means(scores, np.ones_like(scores), weights)
    for index in range(50):
        drawn = np.repeat(np.arange(6), weights[index].astype(int))
        np.testing.assert_allclose(means[index], scores[:, drawn].mean(axis=1))


def test_rank_correlation_of_monotone_means_is_one_and_agrees_with_scipy():
    x = np.array([-1.0, 0.0, 1.0, 2.0])
    means = np.array([[1.0, 2.0, 30.0, 31.0], [4.0, 3.0, 2.0, 1.0], [5.0, 9.0, 9.0, 1.0]])
    ours = rank_correlation(x, means)
    assert ours[0] == pytest.approx(1.0)
    assert ours[1] == pytest.approx(-1.0)
    assert ours[2] == pytest.approx(stats.spearmanr(x, means[2]).statistic)


def test_rank_correlation_treats_rounding_noise_as_ties():
    x = np.array([0.0, 1.0, 2.0])
    assert np.isnan(rank_correlation(x, np.array([[50.0, 50.0 + 1e-12, 50.0 - 1e-12]]))[0])


def test_row_rank_correlation_equals_scipy_and_resamples_whole_questions():
    rng = np.random.default_rng(7)
    x = np.tile([-1.0, 0.0, 1.0], 10)
    scores = np.round(50 + 10 * x + rng.normal(0, 12, 30))
    question = np.repeat(np.arange(10), 3)
    estimate = row_rank_correlation(x, scores, question, seed=8, resamples=200)
    assert estimate.value == pytest.approx(stats.spearmanr(x, scores).statistic)
    naive = []
    for weights in question_weights(10, resamples=200, seed=8):
        rows = np.repeat(np.arange(30), weights[question].astype(int))
        naive.append(stats.spearmanr(x[rows], scores[rows]).statistic)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(np.quantile(naive, [0.025, 0.975])))


def test_resampled_estimate_of_constant_means_says_that_they_do_not_vary():
    sums = np.full((4, 6), 50.0)
    x = np.arange(4.0)
    estimate = resampled_estimate(lambda m: rank_correlation(x, m), sums, np.ones((4, 6)))
    assert estimate.value is None
    assert "do not vary" in estimate.reason


def test_sign_flip_p_by_enumeration_is_exact():
    differences = np.array([3.0, 1.0, 4.0, -1.0, 5.0])
    flips = [abs(np.dot(s, differences)) for s in itertools.product((-1, 1), repeat=5)]
    expected = np.mean([total >= abs(differences.sum()) for total in flips])
    assert sign_flip_p(differences) == pytest.approx(expected)
    assert sign_flip_p(np.full(5, 2.0)) == pytest.approx(2 / 2**5)


def test_sign_flip_p_of_zero_differences_is_one():
    assert sign_flip_p(np.zeros(4)) == 1.0
    assert sign_flip_p(np.zeros(40)) == 1.0


def test_sign_flip_p_by_random_flips_agrees_with_scipy():
    differences = np.random.default_rng(9).normal(0.45, 1, 20)
    theirs = stats.permutation_test(
        (differences, np.zeros(20)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=np.random.default_rng(10),
    ).pvalue
    assert sign_flip_p(differences) == pytest.approx(theirs, abs=0.01)


def test_holm_matches_a_hand_computed_example():
    # Sorted: 0.005·4 = 0.02; 0.01·3 = 0.03; 0.03·2 = 0.06; 0.04·1 = 0.04, raised to 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_skips_what_was_not_tested_and_stops_at_one():
    assert holm([None, 0.02, None]) == [None, 0.02, None]
    assert holm([0.7, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
