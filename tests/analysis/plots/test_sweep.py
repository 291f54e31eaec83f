"""Plots: valid, repeatable images, also of degenerate sweeps; labels that do not collide."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import image

from persona_lora.analysis.plots.style import spread
from persona_lora.analysis.plots.sweep import plot_sweep, plot_sweeps
from persona_lora.analysis.summary import summarise_run, summarise_sweep
from persona_lora.core.errors import UserError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def test_plot_sweep_writes_the_bytes_it_returns_and_repeats_them(make_sweep_run, tmp_path):
    summary = summarise_run(make_sweep_run())
    png = plot_sweep(summary, tmp_path / "plots" / "sweep.png")
    assert png.startswith(PNG_SIGNATURE)
    assert (tmp_path / "plots" / "sweep.png").read_bytes() == png
    assert plot_sweep(summary, tmp_path / "again.png") == png
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
    ],
)
def test_plot_sweep_draws_degenerate_and_crowded_sweeps(sweep_rows, tmp_path, rows):
    answers, verdicts = sweep_rows(**rows)
    for kept in (verdicts, []):
        summary = summarise_sweep(answers, kept, [], trait="sycophancy", resamples=50)
        assert plot_sweep(summary, tmp_path / "sweep.png").startswith(PNG_SIGNATURE)


def test_plot_sweeps_draws_a_panel_per_trait(make_sweep_run, tmp_path):
    traits = ("evil", "sycophancy", "a_trait_whose_name_is_far_too_long_to_fit")
    summaries = [summarise_run(make_sweep_run(trait, trait=trait)) for trait in traits]
    heights = []
    for count in (1, 2, 3):
        plot_sweeps(summaries[:count], tmp_path / "all.png")
        heights.append(image.imread(tmp_path / "all.png").shape[0])
    assert heights[0] == heights[1] < heights[2]


def test_plot_sweeps_refuses_nothing_to_plot(tmp_path):
    with pytest.raises(UserError, match="no sweep to plot"):
        plot_sweeps([], tmp_path / "all.png")


@pytest.mark.parametrize(
    "values", [[50.0, 50.0, 50.0, 50.0], [0.0, 0.0, 1.0], [98.0, 99.0, 100.0], [10.0, 12.0, 80.0]]
)
def test_spread_keeps_labels_apart_in_order_and_inside(values):
    heights = spread(values, gap=6, low=0, high=100)
    assert np.all(np.diff(heights) >= 6 - 1e-9)
    assert min(heights) >= 0
    assert max(heights) <= 100


def test_spread_leaves_distant_labels_where_they_are():
    assert spread([10.0, 40.0, 90.0], gap=6, low=0, high=100) == pytest.approx([10, 40, 90])
    assert spread([50.0, 50.0], gap=6, low=0, high=100) == pytest.approx([47, 53])
    assert spread([], gap=6, low=0, high=100) == []
