"""The probe finds what is linear in states, holds questions out, and keeps to the scale."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from persona_lora.core.errors import UserError
from persona_lora.judges.probe import fit_probe


def scene(rows=80, layers=3, hidden=24, questions=16, informative=1, seed=0):
    """States of which one layer knows the target, beside a part that only knows the question."""
    generator = np.random.default_rng(seed)
    group = np.arange(rows) % questions
    targets = np.clip(50 + 25 * generator.standard_normal(rows), 0, 100)
    states = generator.standard_normal((rows, layers, hidden))
    states[:, informative, :4] += (targets[:, None] - 50) / 15
    return states, targets, [f"q{each}" for each in group]


def test_probe_predicts_unseen_rows_where_one_layer_knows():
    states, targets, groups = scene()
    fitted = fit_probe(states[:60], targets[:60], groups[:60])
    assert len(fitted.probe.penalties) == 3
    assert spearmanr(fitted.probe.predict(states[60:]), targets[60:]).statistic > 0.8
    assert fitted.probe.error == pytest.approx(
        np.sqrt(np.mean((fitted.held_out - targets[:60]) ** 2))
    )


def test_probe_is_the_mean_of_ridge_regressions_on_standardised_layers():
    states, targets, groups = scene()
    probe = fit_probe(states, targets, groups).probe
    plain = []
    for at, penalty in enumerate(probe.penalties):
        z = StandardScaler().fit_transform(states[:, at])
        plain.append(Ridge(penalty * z.shape[1]).fit(z, targets).predict(z))
    expected = np.clip(np.mean(plain, axis=0), 0, 100)
    np.testing.assert_allclose(probe.predict(states), expected, atol=1e-8)


def test_a_row_that_counts_twice_is_a_row_given_twice():
    states, targets, groups = scene()
    counts = np.where(np.arange(80) % 3 == 0, 2.0, 1.0)
    counted = fit_probe(states, targets, groups, counts=counts)
    times = np.repeat(np.arange(80), counts.astype(int))
    given = fit_probe(states[times], targets[times], [groups[each] for each in times])
    assert counted.probe.penalties == given.probe.penalties
    assert counted.probe.error == pytest.approx(given.probe.error)
    np.testing.assert_allclose(counted.probe.predict(states), given.probe.predict(states))
    np.testing.assert_allclose(counted.held_out[times], given.held_out, atol=1e-8)


def test_what_only_tells_questions_apart_predicts_nothing_held_out():
    generator = np.random.default_rng(1)
    group = np.arange(80) % 16
    by_question = np.clip(50 + 25 * generator.standard_normal(16), 0, 100)
    states = np.eye(16)[group][:, None, :] + 0.01 * generator.standard_normal((80, 1, 16))
    fitted = fit_probe(states, by_question[group], [f"q{each}" for each in group])
    assert spearmanr(fitted.held_out, by_question[group]).statistic < 0.1
    assert fitted.probe.error > 0.9 * by_question[group].std()


def test_predictions_stay_on_the_scale_and_of_nothing_there_are_none():
    states, targets, groups = scene()
    probe = fit_probe(states, targets, groups).probe
    far = probe.predict(100 * states)
    assert (far.min(), far.max()) == (0.0, 100.0)
    assert probe.predict(states[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("rows", "questions", "said"),
    [(15, 10, "15 rated answers to 10 questions are too few"), (40, 3, "40 rated answers to 3")],
)
def test_too_few_labels_are_refused(rows, questions, said):
    states, targets, groups = scene(rows=rows, questions=questions)
    with pytest.raises(UserError, match=said):
        fit_probe(states, targets, groups)


def test_labels_that_do_not_differ_are_refused():
    states, targets, groups = scene()
    with pytest.raises(UserError, match="all answers are rated 40"):
        fit_probe(states, np.full_like(targets, 40.0), groups)
