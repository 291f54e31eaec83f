"""The five forms look as they did when they were looked at: sizes, places, colours and order.

Where this fails after a change that is meant: look at the picture, then pin it anew.
"""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from persona_lora.report import figures as draw
from persona_lora.report.figures import Cells, Look, Series
from persona_lora.report.resampling import Interval
from tests.pinned import hold


def rounded(values):
    return np.nan_to_num(np.round(np.array(values, dtype=float), 4), nan=-999).tolist()


def text_of(text):
    return [
        text.get_text(), rounded(text.get_position()), text.get_fontsize(), text.get_fontweight(),
        to_hex(text.get_color()), text.get_va(), text.get_ha(), text.get_rotation(),
    ]  # fmt: skip


def line_of(line):
    return [
        rounded(line.get_xydata()), to_hex(line.get_color()), line.get_linewidth(),
        str(line._unscaled_dash_pattern), line.get_marker(), line.get_markersize(),
        to_hex(line.get_markerfacecolor()), to_hex(line.get_markeredgecolor()),
        line.get_markeredgewidth(), line.get_alpha(), line.get_zorder(), line.get_clip_on(),
        line.get_label() if not line.get_label().startswith("_") else "", line.get_solid_capstyle(),
    ]  # fmt: skip


def axes_of(axes):
    ticks = [axes.get_xticklabels(), axes.get_yticklabels()]
    marks = [axes.xaxis.get_major_ticks(), axes.yaxis.get_major_ticks()]
    return {
        "place": rounded(axes.get_position().bounds),
        "limits": [rounded(axes.get_xlim()), rounded(axes.get_ylim())],
        "names": [text_of(axes.title), text_of(axes._left_title)[:6],
                  *(text_of(each.label)[::2] for each in (axes.xaxis, axes.yaxis))],
        "ticks": [[text_of(text)[2:] for text in each[:1]] for each in ticks],
        "marks": [[each[0].tick1line.get_markersize(), str(each[0].tick1line.get_color())]
                  for each in marks if each],
        "grid": [[bool(each.gridline.get_visible()), to_hex(each.gridline.get_color()),
                  each.gridline.get_linewidth()] for each in (marks[0][:1] + marks[1][:1])],
        "below": axes.get_axisbelow(),
        "spines": [[side, spine.get_visible(), to_hex(spine.get_edgecolor())]
                   for side, spine in axes.spines.items()],
        "lines": [line_of(line) for line in axes.lines],
        "texts": [text_of(text) for text in axes.texts],
        "shapes": [[rounded(each.get_path().get_extents(each.get_patch_transform()).bounds),
                    to_hex(each.get_facecolor(), keep_alpha=True), each.get_linewidth(),
                    to_hex(each.get_edgecolor(), keep_alpha=True), each.get_hatch(),
                    each.get_alpha()]
                   for each in axes.patches],
        "areas": [[rounded(each.get_datalim(axes.transData).bounds), each.get_alpha(),
                   rounded(each.get_linewidth()), rounded(each.get_facecolor())]
                  for each in axes.collections],
    }  # fmt: skip


def pinned(name: str, figure: Figure) -> None:
    found = {
        "size": [*rounded(figure.get_size_inches()), figure.dpi, to_hex(figure.get_facecolor())],
        "texts": [[*text_of(text), text._linespacing] for text in figure.texts],
        "axes": [axes_of(axes) for axes in figure.axes],
    }
    hold(f"picture_{name}", found)


@pytest.fixture
def figure():
    return draw.new_figure(6, 4)


@pytest.fixture
def axes(figure):
    return draw.add_axes(figure, (0.6, 0.5, 3.5, 2.8), title="Title", x="across", y="up")


def many(look=None):
    """Several series whose labels would collide, one without bounds, one with a gap."""
    values = [Interval(20.0 + 9 * at, 18 + 9 * at, 24 + 9 * at, 5, 5, 1.0) for at in range(3)]
    return [
        draw.series("rising", (0, 1, 2), values, Look(draw.TRAIT, bold=True), label="rising 38"),
        draw.series("gone", (0, 1, 2), [values[0], None, values[2]], look or Look(draw.COHERENCE),
                    label="gone 38"),
        Series("flat", (0, 1, 2), (37.0, 37.5, 37.0), look=Look(width=1.0, size=4).apart(1),
               hollow=(True, False, False)),
        Series("level", (), (50.0,), (45.0,), (55.0,),
               Look(draw.CONTROL, dashes=draw.DOTTED, band=0.08)),
        Series("a name that is longer than fits", (0, 1), (3.0, 4.0)).labelled(1),
    ]  # fmt: skip


def test_lines(figure, axes):
    drawn = many()
    draw.score_scale(axes)
    draw.lines(axes, drawn, labels=8.5)
    draw.rule(axes, 30.0, dashes=draw.DASHED)
    draw.legend(axes, loc="upper left")
    draw.finish(figure, [], title="All", subtitle="of it", note="A note. " * 40 + "\nAnd a line.")
    assert [text.get_fontsize() for text in axes.get_legend().get_texts()] == [7.5] * 4
    assert draw.label_width(drawn, size=8.5) == pytest.approx(2.2042, abs=1e-3)
    pinned("lines", figure)


def test_scatter(figure, axes):
    points = Look(
        width=0, size=4, whiskers=0.5, band=0, edge="black", alpha=0.4, marker="s", order=7
    )
    series = Series("a", (1, 2), (3.0, 4.0), (2.0, 3.5), (4.0, 6.0), points, marks=("x", "y"))
    draw.scatter(axes, [series, *many(Look(whiskers=0.3))])
    assert [each.xyann for each in axes.texts if each.get_text() == "x"] == [(4, 3)]
    pinned("scatter", figure)


def test_forest_and_bars(figure, axes):
    rows = [
        Series("one", (0,), (2.0,), (1.0,), (3.0,), Look(size=5)),
        Series("two", (0,), (5.0,), (float("nan"),), (6.0,), Look(size=5), label="5 [4, 6]"),
    ]
    draw.forest(axes, rows, upwards=True)
    beside = draw.add_axes(figure, (4.4, 0.5, 1.2, 1.2), size=8)
    draw.forest(beside, rows, named=False)
    above = draw.add_axes(figure, (4.4, 2.2, 1.2, 1.2))
    draw.bars(above, Series("mix", (0, 1), (0.5, -0.25)), ["calm", "loud"])
    draw.bars(
        draw.add_axes(figure, (0.6, 3.5, 1, 0.4)), Series("up", (3, 4), (1.0, -2.0), label="up")
    )
    pinned("rows", figure)


def test_heat_maps(figure, axes):
    values = np.array([[0.1, np.nan, 0.99], [-0.95, 0.4, 0.0]])
    hatched = np.array([[True, False, False], [False, False, True]])
    cells = Cells(
        values, ("a", "b"), ("x", "y", "z"), (4.0, 8.0, 16.0), hatched=hatched, missing="–"
    )
    draw.heat_map(axes, cells, slanted=True)
    beside = draw.add_axes(figure, (4.4, 0.5, 1.2, 1.2))
    plain = Cells(values, ("a", "b"), ("x", "y", "z"), low=-2, high=2)
    draw.heat_map(beside, plain, size=7, upwards=True, say=lambda row, at, value: f"{row}{at}")
    pinned("cells", figure)
