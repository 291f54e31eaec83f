"""Plots: valid, repeatable images, also of degenerate sweeps; labels that do not collide."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import image

from persona_lora.core.errors import UserError
from persona_lora.core.strength import Moved, Strengths
from persona_lora.report.summary import summarise_run, summarise_sweep
from persona_lora.studies.steering.figure import render_strengths, render_sweep, render_sweeps

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def test_sweep_writes_the_bytes_it_returns_and_repeats_them(make_sweep_run, tmp_path):
    summary = summarise_run(make_sweep_run())
    png = render_sweep(summary).save(tmp_path / "plots" / "sweep.png")
    assert png.startswith(PNG_SIGNATURE)
    assert (tmp_path / "plots" / "sweep.png").read_bytes() == png
    assert render_sweep(summary).save(tmp_path / "again.png") == png
    pixels = image.imread(tmp_path / "again.png")
    assert pixels.shape[1] > 1200
    # Nothing runs into the right edge, where the labels stand.
    assert np.all(pixels[:, -8:, :3] == 1.0)


@pytest.mark.parametrize(
    "rows",
    [
        {"coefficients": ()},
        {"coefficients": (1.0,), "prompts": ()},
        {"questions": 1},
        {"coefficients": tuple(np.linspace(-4, 4, 41))},
        {"layers": (12,), "coefficients": (-1.0, 1.0), "control": True},
        {"layers": (12,), "coefficients": ()},
    ],
)
def test_sweep_draws_degenerate_and_crowded_sweeps(sweep_rows, tmp_path, rows):
    answers, verdicts = sweep_rows(**rows)
    for kept in (verdicts, []):
        summary = summarise_sweep(answers, kept, [], trait="sycophancy", resamples=50)
        assert render_sweep(summary).save(tmp_path / "sweep.png").startswith(PNG_SIGNATURE)


def test_sweep_with_a_control_draws_its_curve(sweep_rows, tmp_path):
    options = {"layers": (12,), "coefficients": (-2.0, 2.0), "seed": 5}
    pictures = {}
    for control in (False, True):
        answers, verdicts = sweep_rows(**options, control=control)
        summary = summarise_sweep(answers, verdicts, [], trait="sycophancy", resamples=50)
        render_sweep(summary).save(tmp_path / "sweep.png")
        pictures[control] = image.imread(tmp_path / "sweep.png")[:, :, :3]
    grey = np.array([0x77, 0x80, 0x8A]) / 255
    drawn = {
        control: int(np.sum(np.all(np.abs(pixels - grey) < 0.03, axis=2)))
        for control, pixels in pictures.items()
    }
    assert drawn[True] > drawn[False] + 200


def test_sweeps_draws_a_panel_per_trait(make_sweep_run, tmp_path):
    traits = ("evil", "sycophancy", "a_trait_whose_name_is_far_too_long_to_fit")
    summaries = [summarise_run(make_sweep_run(trait, trait=trait)) for trait in traits]
    heights = []
    for count in (1, 2, 3):
        render_sweeps(summaries[:count]).save(tmp_path / "all.png")
        heights.append(image.imread(tmp_path / "all.png").shape[0])
    assert heights[0] == heights[1] < heights[2]


def test_strengths_are_drawn_by_sign_hollow_where_answers_are_not_coherent(tmp_path):
    points = [
        Moved(s * c, c * c, 3 * c * c, coherence=90 - 40 * c) for s in (-1, 1) for c in (0.5, 1, 2)
    ]
    found = Strengths("", "", "", (Moved(0.0, 0.0, 0.0, coherence=90.0), *points), 50.0)
    picture = render_strengths({"a": found, "b": found})
    left, right = picture.panels
    assert (left.title, right.title) == ("negative", "positive")
    for panel in (left, right):
        for name in "ab":
            drawn = panel.of(name)
            assert (drawn.x, drawn.y) == ((0.5, 1, 2), (0.25, 1, 4))
            assert (drawn.low, drawn.high) == (drawn.y, (0.75, 3, 12))
            assert drawn.hollow == (False, False, True)
    assert picture.save(tmp_path / "a.png") == (tmp_path / "a.png").read_bytes()


def test_sweeps_refuses_nothing_to_plot():
    with pytest.raises(UserError, match="no sweep to plot"):
        render_sweeps([])
