"""The grammar of pictures: what is drawn is returned; labels keep apart, ticks have room."""

from __future__ import annotations

import numpy as np
import pytest

from persona_lora.report.figures import (
    Cells,
    Look,
    Picture,
    Series,
    add_axes,
    bars,
    finish,
    forest,
    heat_map,
    lines,
    new_figure,
    scatter,
    spread,
    spread_ticks,
)

TWO = (
    Series("rising", (1, 2, 3), (10.0, 20.0, 40.0), (8.0, 18.0, 38.0), (12.0, 23.0, 44.0)),
    Series("falling", (1, 2), (9.0, 5.0), label="falling 5"),
)


@pytest.fixture
def axes():
    return add_axes(new_figure(4, 3), (0.5, 0.5, 3, 2))


def data_of(axes):
    """Return the points of every line that stands in the data's own coordinates."""
    return [
        line.get_xydata().tolist()
        for line in axes.lines
        if line.get_transform() == axes.transData and len(line.get_xdata())
    ]


def test_lines_are_drawn_through_the_means_and_bands_between_the_bounds(axes):
    assert lines(axes, TWO, labels=8).drawn == TWO
    assert data_of(axes) == [[[1, 10], [2, 20], [3, 40]], [[1, 9], [2, 5]]]
    (band,) = axes.collections
    (path,) = band.get_paths()
    assert {(2.0, 18.0), (2.0, 23.0)} <= {tuple(each) for each in path.vertices.tolist()}
    (text,) = axes.texts
    assert (text.get_text(), text.get_position()[1]) == ("falling 5", pytest.approx(8.2, abs=3.5))


def test_a_level_is_a_line_across(axes):
    lines(axes, [Series("plain", (), (50.0,), (45.0,), (55.0,))])
    assert [line.get_ydata()[0] for line in axes.lines] == [50.0]
    assert axes.patches[0].get_y() == 45.0
    assert axes.patches[0].get_height() == 10.0


def test_points_are_where_they_belong_and_those_that_do_not_count_are_hollow(axes):
    points = Series("a", (1, 2), (3.0, 4.0), look=Look(width=0, size=4), marks=("x", "y"))
    assert scatter(axes, [points]).drawn == (points,)
    assert data_of(axes) == [[[1, 3], [2, 4]]]
    assert [(text.get_text(), text.xy) for text in axes.texts] == [("x", (1, 3)), ("y", (2, 4))]
    scatter(axes, [Series("b", (5, 6), (7.0, 8.0), look=points.look, hollow=(False, True))])
    full, empty = axes.lines[-2:]
    assert (full.get_xydata().tolist(), empty.get_xydata().tolist()) == ([[5, 7]], [[6, 8]])
    assert empty.get_markerfacecolor() == "white" != full.get_markerfacecolor()


def test_a_forest_has_a_row_for_each_name_with_its_value_and_interval(axes):
    rows = [
        Series("one", (0,), (2.0,), (1.0,), (3.0,), Look(size=5)),
        Series("two", (0,), (5.0,), (4.0,), (6.0,), Look(size=5), label="5 [4, 6]"),
    ]
    assert forest(axes, rows).drawn == tuple(rows)
    assert data_of(axes) == [[[1, 0], [3, 0]], [[2, 0]], [[4, 1], [6, 1]], [[5, 1]]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row above


def test_bars_are_as_long_as_their_values(axes):
    bars(axes, Series("mix", (0, 1), (0.5, -0.25)), ["calm", "loud"])
    assert [bar.get_width() for bar in axes.patches] == [0.5, -0.25]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["calm", "loud"]
    upright = add_axes(new_figure(4, 3), (0.5, 0.5, 3, 2))
    bars(upright, Series("layers", (3, 4), (1.0, -2.0)))
    assert [bar.get_height() for bar in upright.patches] == [1.0, -2.0]


def test_a_heat_map_says_each_value_in_its_own_cell(axes):
    cells = Cells(np.array([[0.1, np.nan], [-0.9, 0.4]]), ("a", "b"), ("x", "y"), missing="–")
    drawn = heat_map(axes, cells).drawn
    assert [each.name for each in drawn] == ["a", "b"]
    assert drawn[1].y == (-0.9, 0.4)
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {
        ((0, 0), "0.10"), ((1, 0), "–"), ((0, 1), "−0.90"), ((1, 1), "0.40"),
    }  # fmt: skip
    warm, cold = axes.patches[2].get_facecolor(), axes.patches[3].get_facecolor()
    assert warm[0] > warm[2]
    assert cold[2] > cold[0]


@pytest.mark.parametrize("width", [5.0, 14.2])
def test_a_long_note_stays_inside_the_picture(width):
    figure = new_figure(width, 4.0)
    finish(figure, [], note="WARNING: do not trust this fit. " * 12 + "\nThe second line.")
    (note,) = [text for text in figure.texts if text.get_text().startswith("WARNING")]
    assert note.get_window_extent().x1 <= figure.bbox.x1
    assert note.get_text().endswith("\nThe second line.")


def test_equal_pictures_have_equal_bytes(tmp_path):
    def picture():
        figure = new_figure(3, 2)
        lines(add_axes(figure, (0.5, 0.5, 2, 1)), TWO)
        return Picture(figure, ())

    png = picture().save(tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").read_bytes() == png == picture().png()


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


def test_spread_shares_the_room_where_there_is_too_little():
    assert spread([0.0, 1.0, 99.0], gap=60, low=0, high=100) == pytest.approx([0, 50, 100])
    assert spread([120.0], gap=6, low=0, high=100) == [100]
