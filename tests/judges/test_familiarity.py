"""What is unlike the rows that a probe was fitted to is told by its distance."""

from __future__ import annotations

import numpy as np
import pytest

from persona_lora.judges.probe import fit_familiarity


@pytest.fixture
def rows():
    """Rows near a plane of three directions, of twelve groups."""
    generator = np.random.default_rng(0)
    plane = generator.standard_normal((3, 40))
    return generator.standard_normal((200, 3)) @ plane + 0.3 * generator.standard_normal((200, 40))


def groups(count):
    return [f"q{at % 12}" for at in range(count)]


def test_rows_like_those_fitted_are_familiar_and_others_are_not(rows):
    familiarity = fit_familiarity(rows[:100], groups(100))
    like = familiarity.distances(rows[100:])
    assert (like <= familiarity.limit).mean() > 0.95
    far_out = familiarity.distances(8 * rows[100:110])
    off_the_plane = familiarity.distances(
        rows[100:110] + 4 * np.random.default_rng(1).standard_normal((10, 40))
    )
    assert (far_out > familiarity.limit).all()
    assert (off_the_plane > familiarity.limit).all()


def test_the_limit_is_that_of_rows_held_out(rows):
    familiarity = fit_familiarity(rows[:100], groups(100))
    assert familiarity.limit > familiarity.distances(rows[:100]).max()


def test_answers_to_the_fitted_questions_are_familiar_where_features_tell_the_questions():
    """More features than rows, most of them the question's: no held-out row lies that far."""
    generator = np.random.default_rng(3)
    asked = generator.standard_normal((34, 800))
    rows = asked[np.arange(170) % 34] + 0.4 * generator.standard_normal((170, 800))
    familiarity = fit_familiarity(rows, [f"q{at % 34}" for at in range(170)])
    again = asked[np.arange(68) % 34] + 0.4 * generator.standard_normal((68, 800))
    assert (familiarity.distances(rows) <= familiarity.limit).mean() > 0.94
    assert (familiarity.distances(again) <= familiarity.limit).mean() > 0.9


def test_the_distance_inside_the_directions_is_that_of_mahalanobis(rows):
    familiarity = fit_familiarity(rows[:100], groups(100))
    z = (rows[100:] - familiarity.center) / familiarity.spread
    along = z @ familiarity.directions.T
    covariance = (
        familiarity.directions
        @ np.cov(((rows[:100] - familiarity.center) / familiarity.spread).T, bias=True)
        @ familiarity.directions.T
    )
    inside = np.einsum("ni,ij,nj->n", along, np.linalg.inv(covariance), along)
    rest = familiarity.outside(rows[100:]) / familiarity.rest
    np.testing.assert_allclose(familiarity.distances(rows[100:]), np.sqrt(inside + rest), rtol=1e-6)
