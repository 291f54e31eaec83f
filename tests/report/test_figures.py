"""The shared look: labels that keep apart, ticks that have room."""

from __future__ import annotations

import numpy as np
import pytest

from persona_lora.report.figures import spread, spread_ticks


def test_spread_ticks_keeps_zero_and_the_ends():
    assert spread_ticks([-2.0, -1.0, 0.0, 1.0, 2.0], gap=1.0) == [-2, -1, 0, 1, 2]
    assert spread_ticks([-2.0, -1.0, 0.0, 1.0, 2.0], gap=1.5) == [-2, 0, 2]
    assert spread_ticks([float(each) for each in range(30)], gap=10) == [0, 10, 29]
    assert spread_ticks([], gap=1.0) == []


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
