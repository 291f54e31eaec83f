"""The picture of a grid: valid, repeatable, and drawn for odd grids too."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import image

from persona_lora.studies.steering.figure_grid import render_layers
from persona_lora.studies.steering.read_grid import summarise_grid

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _grid(rows):
    answers, verdicts = rows
    return summarise_grid(answers, verdicts, trait="sycophancy", resamples=50)


def test_layers_writes_the_bytes_it_returns_and_repeats_them(grid_rows, tmp_path):
    grid = _grid(grid_rows())
    png = render_layers(grid).save(tmp_path / "plots" / "layers.png")
    assert png.startswith(PNG_SIGNATURE)
    assert (tmp_path / "plots" / "layers.png").read_bytes() == png
    assert render_layers(grid).save(tmp_path / "again.png") == png
    pixels = image.imread(tmp_path / "again.png")
    assert pixels.shape[1] > 1500
    # Nothing runs into the right edge, where the labels stand.
    assert np.all(pixels[:, -8:, :3] == 1.0)


@pytest.mark.parametrize(
    "rows",
    [
        {"coefficients": (2.0,), "prompts": ()},
        {"coefficients": (-3.0, -1.0, -0.5), "layers": (0, 10, 11, 29)},
        {"questions": 1, "control": True},
        {"layers": tuple(range(30)), "coefficients": (-4, -3, -2, -1, 1, 2, 3, 4), "questions": 2},
    ],
)
def test_layers_draws_odd_and_crowded_grids(grid_rows, rows):
    answers, verdicts = grid_rows(**rows)
    for kept in (verdicts, verdicts[: len(verdicts) // 2], []):
        assert render_layers(_grid((answers, kept))).png().startswith(PNG_SIGNATURE)


def test_a_taller_map_makes_a_taller_picture(grid_rows, tmp_path):
    heights = []
    for coefficients in ((1.0,), (1.0, 2.0, 3.0, 4.0)):
        render_layers(_grid(grid_rows(coefficients=coefficients))).save(tmp_path / "layers.png")
        heights.append(image.imread(tmp_path / "layers.png").shape[0])
    assert heights[0] < heights[1]
