"""Nats as coefficients: what is written, what lies between two measurements, what is refused."""

from __future__ import annotations

import dataclasses
import math

import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.settings import typed_value
from persona_lora.core.strength import (
    Moved,
    Nats,
    Strength,
    Strengths,
    coefficient_of,
    coefficients_of,
    file_beside,
    strength_line,
)


@pytest.fixture
def quadratic():
    """A direction whose KL is c² to one side and 4c² to the other, measured at powers of two."""
    sizes = [2.0**power for power in range(-3, 2)]
    points = [Moved(c, c * c, c) for c in sizes] + [Moved(-c, 4 * c * c, c) for c in sizes]
    return Strengths("digest", "", "prompts", tuple(points))


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.05nat", Nats(0.05)), ("-.5 nats", Nats(-0.5)), ("2", 2.0), (1.5, 1.5)],
)
def test_a_strength_is_a_number_or_nats(text, value):
    assert typed_value(Strength, text, "--coefficient") == value


@pytest.mark.parametrize("text", ["nat", "0.05nut", "1e999x", "nan nat"])
def test_anything_else_is_refused(text):
    with pytest.raises(UserError, match="--coefficient must be"):
        typed_value(Strength, text, "--coefficient")


def test_what_takes_numbers_alone_says_so_of_nats():
    for hint in (float, float | None, int | float):
        with pytest.raises(UserError, match=r"--bound takes no nats, got '0\.1nat'"):
            typed_value(hint, "0.1nat", "--bound")
    with pytest.raises(UserError, match=r"must be a number, got '0\.1nut'"):
        typed_value(float, "0.1nut", "--bound")


def test_between_and_under_what_was_measured_a_quadratic_is_met_exactly(quadratic):
    for nats in (1e-6, 0.0201, 0.3, 3.99):
        assert quadratic.coefficient(nats, "d") == pytest.approx(math.sqrt(nats))
        assert quadratic.coefficient(-nats, "d") == pytest.approx(-math.sqrt(nats) / 2)
    assert quadratic.coefficient(0.0, "d") == 0.0


def test_beyond_what_was_measured_or_rises_no_more_nothing_is_guessed(quadratic):
    one = Strengths("", "", "", (Moved(0.5, 0.2, 1),))
    for found, most, end in ((quadratic, 4.0, 2.0), (one, 0.2, 0.5)):
        assert found.coefficient(most * (1 + 5e-10), "d") == pytest.approx(end)  # a rounding more
    with pytest.raises(UserError, match=r"d was measured up to 4nat, got 4\.1nat"):
        quadratic.coefficient(4.1, "d")
    falling = Strengths("", "", "", (*quadratic.points, Moved(4.0, 3.9, 1), Moved(8.0, 99.0, 1)))
    with pytest.raises(UserError, match="up to 4nat"):
        falling.coefficient(5.0, "d")


def test_where_a_coefficient_did_nothing_the_next_one_is_the_least(quadratic):
    still = [each._replace(nats=0.0) if abs(each.coefficient) < 0.2 else each
             for each in quadratic.points]  # fmt: skip
    found = dataclasses.replace(quadratic, points=tuple(still))
    for nats in (1e-6, 0.0201, 0.3, 3.99):
        assert found.coefficient(nats, "d") == pytest.approx(math.sqrt(nats))
        assert found.coefficient(-nats, "d") == pytest.approx(-math.sqrt(nats) / 2)


def test_a_side_that_does_nothing_or_was_not_measured_has_no_coefficient(quadratic, tmp_path):
    upwards = tuple(each for each in quadratic.points if each.coefficient > 0)
    still = tuple(
        each._replace(nats=0.0) if each.coefficient < 0 else each for each in quadratic.points
    )
    for points in (upwards, still, ()):
        found = dataclasses.replace(quadratic, points=points)
        with pytest.raises(
            UserError, match=r"d does nothing there as far as was measured.*-0\.1nat"
        ):
            found.coefficient(-0.1, "d")
        found.save(tmp_path / "diff")
        assert strength_line(tmp_path / "diff", "digest") == ""


@pytest.mark.parametrize(
    ("scores", "ends"),
    [
        # between 80 and 49, by the logarithm; what comes after a gap does not count
        ((90, 80, 49, 90, 90), (-0.25 * 2 ** (30 / 31), 0.25 * 2 ** (30 / 31))),
        ((90, 90, 80, 20, 90), (-0.5 * 2**0.5, 0.5 * 2**0.5)),
        ((49, 90, 90, 90, 90), (0.0, 0.0)),
        ((50, 50, 50, 50, 50), (-2.0, 2.0)),
        ((90, None, 90, 90, 90), (-0.125, 0.125)),
    ],
)
def test_the_coherent_range_goes_outwards_from_zero(quadratic, scores, ends):
    points = [each._replace(coherence=scores[at % 5]) for at, each in enumerate(quadratic.points)]
    assert dataclasses.replace(quadratic, points=tuple(points), floor=50.0).coherent() == (
        pytest.approx(ends)
    )


def test_beyond_the_coherent_range_a_coefficient_is_warned_of(quadratic, tmp_path, caplog):
    path = tmp_path / "diff"
    points = [each._replace(coherence=50.0 if each.nats <= 1 else 9.0) for each in quadratic.points]
    dataclasses.replace(quadratic, points=tuple(points), floor=50.0).save(path)
    within = [0.5, Nats(1.0), Nats(-1.0), -0.5, 0.0]
    assert coefficients_of(within, path, "digest") == pytest.approx((0.5, 1.0, -0.5, -0.5, 0.0))
    coefficients_of([math.nan, math.inf], path, "digest")  # refused as no coefficients
    assert not caplog.records
    assert coefficients_of([0.5, Nats(2.0), -3.0], path, "digest")[2] == -3.0
    (record,) = caplog.records
    assert "coherent from -0.5 to +1, as calibrate measured it, and no further: +1.41, -3" in (
        record.getMessage()
    )
    assert coefficients_of([-3.0], path, "other") == (-3.0,)  # of another direction: not known
    quadratic.save(path)
    assert coefficients_of([-3.0], path, "digest") == (-3.0,)  # not judged
    assert len(caplog.records) == 1


def test_what_was_measured_is_told_in_a_line(quadratic, tmp_path):
    path = tmp_path / "diff"
    assert strength_line(path, "digest") == ""
    dataclasses.replace(quadratic, floor=50.0).save(path)
    line = "-0.05nat at -0.112, +0.05nat at +0.224; coherent from +0 to +0"
    assert strength_line(path, "digest") == line
    assert strength_line(path, "other") == ""
    quadratic.save(path)
    assert strength_line(path, "digest").endswith("; whether answers are coherent was not judged")


def test_strengths_belong_to_their_direction_and_place(quadratic, tmp_path):
    path = tmp_path / "diff"
    with pytest.raises(UserError, match=r"were not measured; .*calibrate"):
        coefficient_of(Nats(0.25), path, "digest")
    assert quadratic.save(path) == file_beside(path) == tmp_path / "diff.strength.json"
    assert coefficient_of(Nats(0.25), path, "digest") == pytest.approx(0.5)
    assert coefficient_of(0.25, path, "other") == 0.25
    with pytest.raises(UserError, match="of another direction"):
        coefficient_of(Nats(0.25), path, "other")
    with pytest.raises(UserError, match="acts at layers 3"):
        coefficient_of(Nats(0.25), path, "digest", "layers 3")
    file_beside(path).write_text('{"points": [1]}')
    with pytest.raises(UserError, match="holds no strengths"):
        coefficient_of(Nats(0.25), path, "digest")
