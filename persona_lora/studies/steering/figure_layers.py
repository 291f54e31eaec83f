"""A grid as a picture: trait and coherence by layer and coefficient, as maps and as lines.

The maps show where steering works, the lines by how much. Draws summaries; refuses to compute
statistics.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from persona_lora.report.conditions import ConditionSummary
from persona_lora.report.figures import (
    INK,
    MUTED,
    PROMPTS,
    SHADE,
    Label,
    add_axes,
    array_of,
    inches_of,
    new_figure,
    place_labels,
    png_of,
    score_scale,
    spread_ticks,
    style_axes,
    write_line,
    written,
)
from persona_lora.report.resampling import Array, Interval
from persona_lora.report.wording import coefficient, method_label, number, title_of
from persona_lora.studies.steering import read_words
from persona_lora.studies.steering.read_grid import GridSummary

# Light in the middle, where steering changes nothing; safe for the common colour blindness.
_CHANGE = colormaps["RdBu"]
# White where answers are coherent: ink marks the damage.
_DAMAGE = LinearSegmentedColormap.from_list("damage", ["#7f2704", "#d55e00", "#fdc08c", "#fffaf5"])
_LEFT, _PANEL, _GUTTER, _RIGHT = 0.78, 4.2, 1.95, 1.4  # inches, left to right
_BOTTOM, _LINES, _SPACE, _ABOVE = 1.0, 2.55, 0.62, 1.2  # inches, upwards
_MAP_ROW, _LEAST_MAP, _LARGEST_MAP = 0.34, 0.5, 2.5
_LEAST_SPREAD = 10.0  # the colours of a trait span at least so many points on either side
_CELL_TEXT = 0.27  # cells at least so wide hold their number
_FEW = 3  # so many lines may have bands


_RGBA = tuple[float, float, float, float]
_Colour = str | _RGBA


@dataclass(frozen=True)
class _Criterion:
    """One of the two columns: what it shows, in which colours."""

    name: str
    score: Callable[[ConditionSummary], Interval]
    colours: Colormap
    scale: Normalize
    unsteered: float | None


def plot_layers(grid: GridSummary, path: Path) -> bytes:
    """Draw a grid, write it to ``path`` as PNG and return the same bytes."""
    return written(render_layers(grid), path)


def render_layers(grid: GridSummary) -> bytes:
    """Return a grid as PNG: maps above lines, the trait on the left, coherence on the right."""
    map_height = min(max(len(grid.coefficients) * _MAP_ROW, _LEAST_MAP), _LARGEST_MAP)
    width = _LEFT + 2 * _PANEL + _GUTTER + _RIGHT
    upper = _BOTTOM + _LINES + _SPACE
    height = upper + map_height + _ABOVE
    figure = new_figure(width, height)
    for column, criterion in enumerate((_trait(grid), _coherence(grid))):
        left = _LEFT + column * (_PANEL + _GUTTER)
        above = add_axes(figure, (left, upper, _PANEL, map_height))
        below = add_axes(figure, (left, _BOTTOM, _PANEL, _LINES))
        _draw_map(figure, above, grid, criterion)
        _draw_lines(below, grid, criterion)
    write_line(figure, height - 0.39, read_words.title(grid), size=14, bold=True)
    write_line(
        figure,
        height - 0.47,
        _wrapped(read_words.subtitle(grid)),
        size=9,
        muted=True,
        anchor="top",
    )
    write_line(figure, 0.13, _wrapped(_caption(grid)), size=7.8, muted=True)
    return png_of(figure)


def _trait(grid: GridSummary) -> _Criterion:
    """Colour the trait by its distance from the unsteered model, alike on both sides."""
    scores = [each.trait.mean for each in grid.steered if each.trait.mean is not None]
    zero = None if grid.unsteered is None else grid.unsteered.trait.mean
    centre = 50.0 if zero is None else zero
    furthest = max((abs(score - centre) for score in scores), default=0.0)
    half = max(furthest, _LEAST_SPREAD)
    scale = Normalize(centre - half, centre + half)
    return _Criterion(title_of(grid.trait), lambda each: each.trait, _CHANGE, scale, zero)


def _coherence(grid: GridSummary) -> _Criterion:
    zero = None if grid.unsteered is None else grid.unsteered.coherence.mean
    return _Criterion("Coherence", lambda each: each.coherence, _DAMAGE, Normalize(0, 100), zero)


def _draw_map(figure: Figure, axes: Axes, grid: GridSummary, criterion: _Criterion) -> None:
    """Draw one heat map: layers across (to scale), coefficients upwards (one row each)."""
    scores = _matrix(grid, criterion)
    for (row, column), score in np.ndenumerate(scores):
        finite = bool(np.isfinite(score))
        face = criterion.colours(criterion.scale(score)) if finite else SHADE
        axes.add_patch(_box(grid, column, row, face=face, edge="white", width=0.7))
        if _is_incoherent(grid.cell(grid.layers[column], grid.coefficients[row]), grid):
            axes.add_patch(_box(grid, column, row, edge="#00000055", width=0.0, hatch="/////"))
    _style_map(axes, grid)
    _write_cells(axes, grid, criterion, scores)
    _mark_best(axes, grid)
    axes.set_title(criterion.name, loc="left", fontsize=11, fontweight="bold", color=INK, pad=17)
    _draw_key(figure, axes, criterion)


def _style_map(axes: Axes, grid: GridSummary) -> None:
    axes.set_xlim(*_span(grid))
    axes.set_ylim(-0.5, len(grid.coefficients) - 0.5)
    _layer_ticks(axes, grid)
    names = [coefficient(each) for each in grid.coefficients]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylabel("coefficient", fontsize=8, color=MUTED, labelpad=2)
    axes.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=INK)
    axes.tick_params(axis="x", length=2, labelsize=8, color=MUTED, labelcolor=MUTED)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _layer_ticks(axes: Axes, grid: GridSummary) -> None:
    low, high = _span(grid)
    gap = 0.26 * (high - low) / inches_of(axes, "width")
    ticks = [int(tick) for tick in spread_ticks([float(each) for each in grid.layers], gap=gap)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])


def _write_cells(axes: Axes, grid: GridSummary, criterion: _Criterion, scores: Array) -> None:
    """Write the numbers into cells that have room, and a dash where nothing was scored."""
    low, high = _span(grid)
    roomy = 2 * _half(grid) / (high - low) * inches_of(axes, "width") >= _CELL_TEXT
    for (row, column), score in np.ndenumerate(scores):
        if not roomy and np.isfinite(score):
            continue
        finite = bool(np.isfinite(score))
        dark = finite and _luminance(criterion.colours(criterion.scale(score))) < 0.5
        axes.text(
            grid.layers[column],
            row,
            number(float(score)) if finite else "–",
            ha="center",
            va="center",
            fontsize=7,
            color="white" if dark else INK if finite else MUTED,
        )


def _mark_best(axes: Axes, grid: GridSummary) -> None:
    """Frame the best cell, and name the best layer above the map."""
    if grid.best_layer is None or grid.best_coefficient is None:
        return
    column = grid.layers.index(grid.best_layer)
    row = grid.coefficients.index(grid.best_coefficient)
    axes.add_patch(_box(grid, column, row, edge=INK, width=1.8, clip=False))
    axes.annotate(
        f"best layer {grid.best_layer}",
        (grid.best_layer, len(grid.coefficients) - 0.5),
        (0, 9),
        textcoords="offset points",
        arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 0.9, "shrinkB": 0},
        fontsize=8,
        color=INK,
        ha=_side(axes, grid.best_layer),
        va="bottom",
        annotation_clip=False,
    )


def _box(
    grid: GridSummary,
    column: int,
    row: int,
    *,
    edge: str,
    width: float,
    face: _Colour = "none",
    hatch: str | None = None,
    clip: bool = True,
) -> Rectangle:
    """Return a cell, as wide as the least distance of layers: those not run are left blank."""
    half = _half(grid)
    return Rectangle(
        (grid.layers[column] - half, row - 0.5),
        2 * half,
        1,
        facecolor=face,
        edgecolor=edge,
        linewidth=width,
        hatch=hatch,
        zorder=2 if clip else 4,
        clip_on=clip,
    )


def _draw_key(figure: Figure, axes: Axes, criterion: _Criterion) -> None:
    """Draw the colour key right of a map, with a mark at the unsteered level."""
    width, height = figure.get_size_inches()
    box = axes.get_position()
    key = figure.add_axes((box.x1 + 0.14 / width, box.y0, 0.11 / width, box.height))
    low, high = max(criterion.scale.vmin or 0.0, 0.0), min(criterion.scale.vmax or 100.0, 100.0)
    bar = figure.colorbar(ScalarMappable(criterion.scale, criterion.colours), cax=key)
    bar.outline.set_visible(False)
    key.set_ylim(low, high)
    key.tick_params(length=2, labelsize=7.5, color=MUTED, labelcolor=MUTED)
    ticks = [float(each) for each in np.linspace(low, high, 3 if box.height * height < 1.2 else 5)]
    if criterion.unsteered is not None:
        # No tick under the name of the unsteered level, which says its score.
        room = 0.16 / (box.height * height) * (high - low)
        ticks = [each for each in ticks if abs(each - criterion.unsteered) > room]
    bar.set_ticks(ticks, labels=[number(tick) for tick in ticks])
    if criterion.unsteered is not None:
        key.axhline(criterion.unsteered, color=INK, linewidth=1.2)
        key.annotate(
            f"unsteered {number(criterion.unsteered)}",
            (1, criterion.unsteered),
            (5, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=8,
            color=INK,
            va="center",
            annotation_clip=False,
        )


def _draw_lines(axes: Axes, grid: GridSummary, criterion: _Criterion) -> None:
    """Draw one line over the layers for each coefficient, beside the unsteered level."""
    axes.set_xlim(*_span(grid))
    score_scale(axes)
    style_axes(axes)
    _layer_ticks(axes, grid)
    axes.set_xlabel("layer", fontsize=8.5, color=MUTED, labelpad=2)
    labels: list[Label] = _draw_levels(axes, grid, criterion)
    for value, colour in _line_colours(grid.coefficients).items():
        cells = [grid.cell(layer, value) for layer in grid.layers]
        best = value == grid.best_coefficient
        if best or len(grid.coefficients) <= _FEW:
            _draw_band(axes, grid.layers, cells, criterion, colour)
        last = _draw_line(axes, grid, cells, criterion, colour, best=best)
        if last is not None:
            labels.append(Label(last, coefficient(value), colour, "bold" if best else "normal"))
    if grid.best_layer is not None:
        axes.axvline(grid.best_layer, color=INK, linewidth=0.9, alpha=0.6, zorder=1)
    place_labels(axes, labels, size=8)


def _draw_line(
    axes: Axes,
    grid: GridSummary,
    cells: Sequence[ConditionSummary | None],
    criterion: _Criterion,
    colour: str,
    *,
    best: bool,
) -> float | None:
    """Draw one coefficient over the layers, incoherent cells hollow; return its last score."""
    means = array_of([None if each is None else criterion.score(each).mean for each in cells])
    width, size, order = (2.4, 5.0, 3) if best else (1.4, 3.6, 2)
    axes.plot(grid.layers, means, color=colour, linewidth=width, zorder=order)
    broken = np.array([_is_incoherent(each, grid) for each in cells])
    for chosen, face in ((~broken, colour), (broken, "white")):
        axes.plot(
            np.array(grid.layers)[chosen],
            means[chosen],
            linestyle="none",
            marker="o",
            markersize=size,
            markerfacecolor=face,
            markeredgecolor=colour,
            markeredgewidth=0.9,
            zorder=order,
        )
    scored = means[np.isfinite(means)]
    return float(scored[-1]) if len(scored) else None


def _is_incoherent(cell: ConditionSummary | None, grid: GridSummary) -> bool:
    mean = None if cell is None else cell.coherence.mean
    return mean is not None and mean < grid.coherent_threshold


def _draw_levels(axes: Axes, grid: GridSummary, criterion: _Criterion) -> list[Label]:
    """Draw the unsteered level and, for the trait, what the prompts reach; return the labels."""
    levels = [("unsteered", grid.unsteered, MUTED)]
    if criterion.name != "Coherence":
        levels += [
            (method_label(name), grid.reference(name), each) for name, each in PROMPTS.items()
        ]
    labels = []
    for name, level, colour in levels:
        mean = None if level is None else criterion.score(level).mean
        if mean is not None:
            dashes = (0, (4, 2)) if name == "unsteered" else (0, (1, 2))
            axes.axhline(mean, color=colour, linewidth=1.1, linestyle=dashes, zorder=1)
            labels.append(Label(mean, f"{name} {number(mean)}", colour))
    return labels


def _draw_band(
    axes: Axes,
    layers: Sequence[int],
    cells: Sequence[ConditionSummary | None],
    criterion: _Criterion,
    colour: str,
) -> None:
    scores = [None if each is None else criterion.score(each) for each in cells]
    low = array_of([None if each is None else each.low for each in scores])
    high = array_of([None if each is None else each.high for each in scores])
    axes.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0, zorder=1)


def _line_colours(coefficients: Sequence[float]) -> dict[float, str]:
    """Return a colour for each coefficient: reds below 0, blues above, darker further out."""
    colours = {}
    for sign, start, end in ((-1, 0.21, 0.0), (1, 0.79, 1.0)):
        side = sorted((each for each in coefficients if each * sign > 0), key=abs)
        for index, value in enumerate(side):
            share = index / max(1, len(side) - 1) if len(side) > 1 else 0.6
            colours[value] = to_hex(_CHANGE(start + share * (end - start)))
    return {value: colours[value] for value in coefficients}


def _matrix(grid: GridSummary, criterion: _Criterion) -> Array:
    """Return the mean scores ``[coefficients, layers]``, NaN where there is none."""
    cells = [[grid.cell(layer, value) for layer in grid.layers] for value in grid.coefficients]
    return np.array(
        [
            array_of([None if each is None else criterion.score(each).mean for each in row])
            for row in cells
        ]
    )


def _half(grid: GridSummary) -> float:
    """Return half the width of a cell, in layers."""
    return min(np.diff(grid.layers), default=1) / 2


def _span(grid: GridSummary) -> tuple[float, float]:
    """Return the limits of the axis of layers."""
    return grid.layers[0] - _half(grid), grid.layers[-1] + _half(grid)


def _luminance(colour: _RGBA) -> float:
    red, green, blue = colour[:3]
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _side(axes: Axes, layer: int) -> str:
    """Return how text above a layer is to stand, so that it stays beside the axes' name."""
    low, high = axes.get_xlim()
    return "right" if (layer - low) / (high - low) > 0.8 else "center"


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


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 180))
