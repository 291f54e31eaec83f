"""A grid as a picture: trait and coherence by layer and coefficient, as maps and as lines.

The maps show where steering works, the lines by how much. Draws summaries; refuses to compute
statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from persona_lora.report import figures as draw
from persona_lora.report.conditions import ConditionSummary
from persona_lora.report.figures import Cells, Look, Panel, Picture, Series
from persona_lora.report.resampling import Array, Interval
from persona_lora.report.wording import NONE, coefficient, method_label, number, title_of
from persona_lora.studies.steering import read_words
from persona_lora.studies.steering.read_grid import GridSummary

# White where answers are coherent: ink marks the damage.
_DAMAGE = LinearSegmentedColormap.from_list("damage", ["#7f2704", "#d55e00", "#fdc08c", "#fffaf5"])
_LEFT, _PANEL, _GUTTER, _RIGHT = 0.78, 4.2, 1.95, 1.4  # inches, left to right
_BOTTOM, _LINES, _SPACE, _ABOVE = 1.0, 2.55, 0.62, 1.2  # inches, upwards
_MAP_ROW, _LEAST_MAP, _LARGEST_MAP = 0.34, 0.5, 2.5
_LEAST_SPREAD = 10.0  # the colours of a trait span at least so many points on either side
_CELL_TEXT = 0.27  # cells at least so wide hold their number
_FEW = 3  # so many lines may have bands


@dataclass(frozen=True)
class _Criterion:
    """One of the two columns: which score of a condition it shows, in which colours."""

    name: str
    score: str
    colours: Colormap
    low: float
    high: float

    def of(self, cell: ConditionSummary | None) -> Interval | None:
        return None if cell is None else getattr(cell, self.score)

    def mean(self, cell: ConditionSummary | None) -> float | None:
        score = self.of(cell)
        return None if score is None else score.mean


_COHERENCE = _Criterion("Coherence", "coherence", _DAMAGE, 0, 100)


def render_layers(grid: GridSummary) -> Picture:
    """Return a grid: maps above lines, the trait on the left, coherence on the right."""
    map_height = min(max(len(grid.coefficients) * _MAP_ROW, _LEAST_MAP), _LARGEST_MAP)
    upper = _BOTTOM + _LINES + _SPACE
    height = upper + map_height + _ABOVE
    figure = draw.new_figure(_LEFT + 2 * _PANEL + _GUTTER + _RIGHT, height)
    panels = []
    for column, criterion in enumerate((_trait(grid), _COHERENCE)):
        left = _LEFT + column * (_PANEL + _GUTTER)
        above = draw.add_axes(figure, (left, upper, _PANEL, map_height), y="coefficient")
        below = draw.add_axes(figure, (left, _BOTTOM, _PANEL, _LINES), x="layer")
        cells = _cells(grid, criterion)
        panels += [
            _map(above, grid, criterion, cells).named(f"{criterion.name}, map"),
            _lines(below, grid, criterion, cells).named(f"{criterion.name}, lines"),
        ]
        _draw_key(figure, above, criterion, criterion.mean(grid.unsteered))
    subtitle, note = (
        draw.wrapped(180, text) for text in (read_words.subtitle(grid), _caption(grid))
    )
    return draw.finish(figure, panels, title=read_words.title(grid), subtitle=subtitle, note=note)


def _trait(grid: GridSummary) -> _Criterion:
    """Colour the trait by its distance from the unsteered model, alike on both sides."""
    scores = [each.trait.mean for each in grid.steered if each.trait.mean is not None]
    zero = None if grid.unsteered is None else grid.unsteered.trait.mean
    centre = 50.0 if zero is None else zero
    half = max([abs(score - centre) for score in scores] + [_LEAST_SPREAD])
    return _Criterion(title_of(grid.trait), "trait", draw.CHANGE, centre - half, centre + half)


def _cells(grid: GridSummary, criterion: _Criterion) -> Cells:
    """Return the means ``[coefficients, layers]``, those of incoherent cells hatched."""
    found = [[grid.cell(layer, value) for layer in grid.layers] for value in grid.coefficients]

    def values(of: _Criterion) -> Array:
        return np.array([[of.mean(each) for each in row] for row in found], dtype=float)

    return Cells(
        values(criterion),
        tuple(map(coefficient, grid.coefficients)),
        tuple(map(str, grid.layers)),
        at=tuple(map(float, grid.layers)),
        low=criterion.low,
        high=criterion.high,
        colours=criterion.colours,
        missing=NONE,
        hatched=values(_COHERENCE) < grid.coherent_threshold,
    )


def _map(axes: Axes, grid: GridSummary, criterion: _Criterion, cells: Cells) -> Panel:
    """Draw one heat map: layers across (to scale), coefficients upwards (one row each)."""
    across = cells.places[-1] - cells.places[0] + 2 * cells.half
    roomy = 2 * cells.half / across * draw.inches_of(axes, "width") >= _CELL_TEXT

    def say(row: int, column: int, value: float) -> str:
        return number(value) if roomy else ""

    panel = draw.heat_map(axes, cells, say=say, size=7, upwards=True)
    _layer_ticks(axes, cells)
    axes.tick_params(axis="x", length=2, labelsize=8, color=draw.MUTED, labelcolor=draw.MUTED)
    axes.set_title(
        criterion.name, loc="left", fontsize=11, fontweight="bold", color=draw.INK, pad=17
    )
    if grid.best_layer is not None and grid.best_coefficient is not None:
        _mark_best(axes, cells, grid.best_layer, grid.coefficients.index(grid.best_coefficient))
    return panel


def _layer_ticks(axes: Axes, cells: Cells) -> None:
    low, high = cells.places[0] - cells.half, cells.places[-1] + cells.half
    axes.set_xlim(low, high)
    ticks = draw.spread_ticks(cells.places, gap=0.26 * (high - low) / draw.inches_of(axes, "width"))
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _mark_best(axes: Axes, cells: Cells, layer: int, row: int) -> None:
    """Frame the best cell, and name the best layer above the map."""
    frame = Rectangle((layer - cells.half, row - 0.5), 2 * cells.half, 1, clip_on=False, zorder=4)
    frame.set(facecolor="none", edgecolor=draw.INK, linewidth=1.8)
    axes.add_patch(frame)
    low, high = axes.get_xlim()
    axes.annotate(
        f"best layer {layer}",
        (layer, len(cells.rows) - 0.5),
        (0, 9),
        textcoords="offset points",
        arrowprops={"arrowstyle": "-|>", "color": draw.INK, "linewidth": 0.9, "shrinkB": 0},
        fontsize=8,
        color=draw.INK,
        # Beside the axes' name, which stands at the right.
        ha="right" if (layer - low) / (high - low) > 0.8 else "center",
        va="bottom",
        annotation_clip=False,
    )


def _draw_key(figure: Figure, axes: Axes, criterion: _Criterion, unsteered: float | None) -> None:
    """Draw the colour key right of a map, with a mark at the unsteered level."""
    width, height = figure.get_size_inches()
    box = axes.get_position()
    key = figure.add_axes((box.x1 + 0.14 / width, box.y0, 0.11 / width, box.height))
    scale = Normalize(criterion.low, criterion.high)
    bar = figure.colorbar(ScalarMappable(scale, criterion.colours), cax=key)
    bar.outline.set_visible(False)
    low, high = max(criterion.low, 0.0), min(criterion.high, 100.0)
    key.set_ylim(low, high)
    key.tick_params(length=2, labelsize=7.5, color=draw.MUTED, labelcolor=draw.MUTED)
    ticks = [float(each) for each in np.linspace(low, high, 3 if box.height * height < 1.2 else 5)]
    if unsteered is not None:
        # No tick under the name of the unsteered level, which says its score.
        room = 0.16 / (box.height * height) * (high - low)
        ticks = [each for each in ticks if abs(each - unsteered) > room]
        key.axhline(unsteered, color=draw.INK, linewidth=1.2)
        key.annotate(
            f"unsteered {number(unsteered)}",
            (1, unsteered),
            (5, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=8,
            color=draw.INK,
            va="center",
            annotation_clip=False,
        )
    bar.set_ticks(ticks, labels=[number(tick) for tick in ticks])


def _lines(axes: Axes, grid: GridSummary, criterion: _Criterion, cells: Cells) -> Panel:
    """Draw one line over the layers for each coefficient, beside the unsteered level."""
    draw.score_scale(axes)
    _layer_ticks(axes, cells)
    if grid.best_layer is not None:
        axes.axvline(grid.best_layer, color=draw.INK, linewidth=0.9, alpha=0.6, zorder=1)
    drawn = _levels(grid, criterion)
    for row, (value, colour) in enumerate(_line_colours(grid.coefficients).items()):
        best = value == grid.best_coefficient
        look = Look(
            colour,
            width=2.4 if best else 1.4,
            size=5.0 if best else 3.6,
            band=0.15 if best or len(grid.coefficients) <= _FEW else 0.0,
            bold=best,
            order=3 if best else 2,
        )
        scores = [criterion.of(grid.cell(layer, value)) for layer in grid.layers]
        name, hollow = coefficient(value), tuple(cells.is_hatched[row].tolist())
        drawn.append(draw.series(name, cells.places, scores, look, label=name, hollow=hollow))
    return draw.lines(axes, drawn, labels=8)


def _levels(grid: GridSummary, criterion: _Criterion) -> list[Series]:
    """Return the unsteered level and, for the trait, what the prompts reach."""
    look = Look(draw.MUTED, 1.1, dashes=(0, (4, 2)), band=0, order=1)
    levels = [("unsteered", grid.unsteered, look)]
    for name, colour in draw.PROMPTS.items() if criterion is not _COHERENCE else ():
        look = Look(colour, 1.1, dashes=draw.DOTTED, band=0, order=1)
        levels.append((method_label(name), grid.reference(name), look))
    return [
        Series(name, (), (mean,), look=look, label=f"{name} {number(mean)}")
        for name, level, look in levels
        if (mean := criterion.mean(level)) is not None
    ]


def _line_colours(coefficients: Sequence[float]) -> dict[float, str]:
    """Return a colour for each coefficient: reds below 0, blues above, darker further out."""
    colours = {}
    for sign, start, end in ((-1, 0.21, 0.0), (1, 0.79, 1.0)):
        side = sorted((each for each in coefficients if each * sign > 0), key=abs)
        for index, value in enumerate(side):
            share = index / (len(side) - 1) if len(side) > 1 else 0.6
            colours[value] = to_hex(draw.CHANGE(start + share * (end - start)))
    return {value: colours[value] for value in coefficients}


def _caption(grid: GridSummary) -> str:
    shown = "bands" if len(grid.coefficients) <= _FEW else "band of the best coefficient"
    bands = f"{shown}: 95% bootstrap over questions"
    if all(each.trait.low is None for each in grid.steered):
        bands = "no intervals"
    return (
        f"Mean scores 0–100. {read_words.sample_line(grid)}; {bands}. Hatched and hollow: mean "
        f"coherence below {grid.coherent_threshold:g}. Colours of the left map are centred on the "
        "unsteered model; a dash was not scored."
    )
