"""A sweep as a picture: trait and coherence against the coefficient, with what it costs below.

Draws summaries on figures of its own (no global plotting state); refuses to compute statistics.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from persona_lora.analysis.resampling import Array, Interval
from persona_lora.analysis.summary import ConditionSummary, SweepSummary
from persona_lora.analysis.wording import (
    coefficient,
    coherent_line,
    interval,
    method_label,
    number,
    questions_line,
    sample_line,
    significant,
    statistics_line,
    title_of,
)
from persona_lora.core.errors import UserError
from persona_lora.core.files import atomic_path

# After Okabe and Ito's palette (two hues darkened for text), safe for the common colour blindness.
_TRAIT, _COHERENCE = "#0072B2", "#D55E00"
_PROMPTS = {"prompt_pos": "#00795A", "prompt_neg": "#9C4F82"}
_INK, _MUTED, _FAINT, _SHADE = "#1f2328", "#656d76", "#d8dee4", "#f3f4f6"
_PRIMARY: dict[str, Any] = {"linewidth": 2.4, "markersize": 5.5}
_SECONDARY: dict[str, Any] = {"linewidth": 1.6, "markersize": 4.5, "linestyle": (0, (5, 2))}
_DPI = 160
_WIDTH, _HEIGHT = 8.8, 5.3
_PANEL_WIDTH, _PANEL_HEIGHT = 5.6, 3.3
_LABEL_GAP = 0.22  # inches between the axes and the labels beside them
_TICK_INCHES = 0.42  # least distance of labelled coefficients
_NAME_LENGTH = 24  # longer names of traits are shortened beside the curves


@dataclass(frozen=True)
class _Label:
    """Text to stand at the right of the axes, at the height of what it names."""

    score: float
    text: str
    colour: str
    weight: str = "normal"


def plot_sweep(summary: SweepSummary, path: Path) -> bytes:
    """Draw one sweep, write it to ``path`` as PNG and return the same bytes."""
    return _written(render_sweep(summary), path)


def plot_sweeps(summaries: Sequence[SweepSummary], path: Path) -> bytes:
    """Draw several sweeps as small multiples, write the PNG to ``path`` and return its bytes."""
    return _written(render_sweeps(summaries), path)


def render_sweep(summary: SweepSummary) -> bytes:
    """Return one sweep as PNG: curves, prompting references, coherent range, cost rows."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, facecolor="white")
    rows, labels = _cost_rows(summary), _labels(summary)
    left, bottom, top = 0.63, 1.0 + 0.215 * len(rows), 4.22  # inches
    right = _WIDTH - max(_label_width(labels, size=9.0), 1.2)
    axes = _axes(figure, (left, bottom, right - left, top - bottom))
    _draw_curves(axes, summary)
    _place_labels(axes, labels, size=9.0)
    _draw_cost_rows(axes, summary, rows)
    _write(figure, 4.91, f"{title_of(summary.trait)} against the coefficient", size=14, bold=True)
    statistics = "\n".join(textwrap.wrap(statistics_line(summary), 118))
    _write(figure, 4.83, statistics, size=9, muted=True, anchor="top")
    caption = f"Mean scores 0–100. {sample_line(summary)}. {coherent_line(summary)}"
    _write(figure, 0.13, "\n".join(textwrap.wrap(caption, 135)), size=7.8, muted=True)
    return _png(figure)


def render_sweeps(summaries: Sequence[SweepSummary]) -> bytes:
    """Return several sweeps as one PNG: a panel per trait on common scales."""
    if not summaries:
        raise UserError("no sweep to plot; name at least one run")
    columns = min(2, len(summaries))
    rows = -(-len(summaries) // columns)
    height = rows * _PANEL_HEIGHT + 0.5
    size = (columns * _PANEL_WIDTH, height)
    figure = Figure(figsize=size, dpi=_DPI, facecolor="white")
    margin = max(_label_width(_labels(each, brief=True), size=8.5) for each in summaries)
    for index, summary in enumerate(summaries):
        row, column = divmod(index, columns)
        left, bottom = column * _PANEL_WIDTH + 0.5, height - (row + 1) * _PANEL_HEIGHT + 0.3
        axes = _axes(figure, (left, bottom, _PANEL_WIDTH - 0.5 - margin, _PANEL_HEIGHT - 1.2))
        _draw_curves(axes, summary)
        _place_labels(axes, _labels(summary, brief=True), size=8.5)
        _panel_title(axes, summary)
    note = "Mean scores 0–100 against the coefficient; bands: 95% bootstrap over questions."
    _write(figure, 0.13, note, size=8, muted=True)
    return _png(figure)


def _axes(figure: Figure, inches: tuple[float, float, float, float]) -> Axes:
    """Add axes at left, bottom, width and height in inches."""
    width, height = figure.get_size_inches()
    left, bottom, across, up = inches
    return figure.add_axes((left / width, bottom / height, across / width, up / height))


def _write(
    figure: Figure,
    inches: float,
    text: str,
    *,
    size: float,
    bold: bool = False,
    muted: bool = False,
    anchor: str = "bottom",
) -> None:
    """Write text at the left edge of a figure, so many inches from its bottom."""
    width, height = figure.get_size_inches()
    figure.text(
        0.18 / width,
        inches / height,
        text,
        color=_MUTED if muted else _INK,
        fontsize=size,
        fontweight="bold" if bold else "normal",
        va=anchor,
        linespacing=1.45,
    )


def _draw_curves(axes: Axes, summary: SweepSummary) -> None:
    """Draw everything inside the axes: shading, references, the two curves."""
    _style(axes, summary)
    _draw_incoherent(axes, summary)
    for method, colour in _PROMPTS.items():
        reference = summary.reference(method)
        if reference is not None:
            _draw_reference(axes, reference.trait, colour)
    _draw_curve(axes, summary, lambda each: each.coherence, _COHERENCE, dashed=True)
    _draw_curve(axes, summary, lambda each: each.trait, _TRAIT, dashed=False)


def _style(axes: Axes, summary: SweepSummary) -> None:
    points = _points(summary)
    low, high = (min(points), max(points)) if points else (-1.0, 1.0)
    margin = 0.03 * (high - low) or 0.5
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(-2, 102)
    axes.set_yticks([0, 25, 50, 75, 100])
    scale = (high - low + 2 * margin) / _inches(axes, "width")
    ticks = _spread_ticks(points, gap=scale * _TICK_INCHES)
    axes.set_xticks(ticks, [coefficient(tick) for tick in ticks])
    axes.set_xticks(points, minor=True)
    axes.grid(axis="y", color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    axes.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=_MUTED)
    axes.tick_params(axis="x", which="both", length=3, labelsize=9, color=_MUTED, labelcolor=_INK)


def _draw_curve(
    axes: Axes,
    summary: SweepSummary,
    criterion: Callable[[ConditionSummary], Interval],
    colour: str,
    *,
    dashed: bool,
) -> None:
    scores = [criterion(each) for each in summary.steered]
    x = _points(summary)
    mean = _array([each.mean for each in scores])
    low = _array([each.low for each in scores])
    high = _array([each.high for each in scores])
    axes.fill_between(x, low, high, color=colour, alpha=0.10 if dashed else 0.20, linewidth=0)
    axes.vlines(x, low, high, color=colour, linewidth=1.0, alpha=0.45)
    style = _SECONDARY if dashed else _PRIMARY
    axes.plot(x, mean, color=colour, marker="o", markeredgecolor="white", **style)


def _array(values: Sequence[float | None]) -> Array:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _draw_reference(axes: Axes, trait: Interval, colour: str) -> None:
    if trait.low is not None and trait.high is not None:
        axes.axhspan(trait.low, trait.high, color=colour, alpha=0.08, linewidth=0)
    if trait.mean is not None:
        axes.axhline(trait.mean, color=colour, linewidth=1.1, linestyle=(0, (1, 2)))


def _draw_incoherent(axes: Axes, summary: SweepSummary) -> None:
    """Shade the coefficients outside the coherent range, up to half way to its ends."""
    span, points = summary.coherent_range, _points(summary)
    if span.low is None or span.high is None:
        return
    left, right = axes.get_xlim()
    below = [point for point in points if point < span.low]
    above = [point for point in points if point > span.high]
    for edge, near, outer in ((below[-1:], span.low, left), (above[:1], span.high, right)):
        if edge:
            middle = (edge[0] + near) / 2
            axes.axvspan(middle, outer, color=_SHADE, zorder=0, linewidth=0)
            axes.text(
                (middle + outer) / 2,
                1.015,
                "not\ncoherent",
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=7.5,
                color=_MUTED,
                linespacing=1.1,
            )


def _labels(summary: SweepSummary, *, brief: bool = False) -> list[_Label]:
    """Return the labels of both curves (at their last point) and of the references."""
    labels = []
    for name, colour, scores in (
        (_short(title_of(summary.trait)), _TRAIT, [each.trait for each in summary.steered]),
        ("Coherence", _COHERENCE, [each.coherence for each in summary.steered]),
    ):
        scored = [each for each in scores if each.mean is not None]
        if scored and scored[-1].mean is not None:
            value = number(scored[-1].mean) if brief else interval(scored[-1])
            labels.append(_Label(scored[-1].mean, f"{name} {value}", colour, "bold"))
    for method, colour in _PROMPTS.items():
        reference = summary.reference(method)
        if reference is not None and reference.trait.mean is not None:
            value = number(reference.trait.mean) if brief else interval(reference.trait)
            labels.append(_Label(reference.trait.mean, f"{method_label(method)} {value}", colour))
    return labels


def _label_width(labels: Sequence[_Label], *, size: float) -> float:
    """Return the room that labels need beside the axes, in inches (a generous estimate)."""
    em = size / 72
    widths = [len(each.text) * em * (0.66 if each.weight == "bold" else 0.57) for each in labels]
    return _LABEL_GAP + max(widths, default=0.0) + 0.1


def _short(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"


def _inches(axes: Axes, side: Literal["width", "height"]) -> float:
    """Return the width or height of axes in inches."""
    box = axes.get_window_extent()
    return float(box.width if side == "width" else box.height) / _DPI


def _place_labels(axes: Axes, labels: Sequence[_Label], *, size: float) -> None:
    """Write labels right of the axes, moved apart where they would collide, with leader lines."""
    gap = 1.55 * size / 72 / _inches(axes, "height") * 104  # a line of text, in score units
    ordered = sorted(labels, key=lambda each: each.score)
    heights = spread([each.score for each in ordered], gap=gap, low=0, high=100)
    transform = axes.get_yaxis_transform()
    inch = 1 / _inches(axes, "width")
    for each, height in zip(ordered, heights, strict=True):
        axes.plot(
            [1 + 0.02 * inch, 1 + 0.17 * inch],
            [each.score, height],
            transform=transform,
            color=each.colour,
            linewidth=0.8,
            alpha=0.7,
            clip_on=False,
        )
        axes.text(
            1 + _LABEL_GAP * inch,
            height,
            each.text,
            transform=transform,
            color=each.colour,
            fontsize=size,
            fontweight=each.weight,
            va="center_baseline",
        )


def spread(values: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Return ascending values moved as little as possible so that neighbours are ``gap`` apart.

    The result stays within ``low`` and ``high`` where there is room for that.
    """
    if not values:
        return []
    gap = min(gap, (high - low) / max(1, len(values) - 1))
    blocks: list[list[float]] = []
    for index, value in enumerate(values):
        blocks.append([value - index * gap])
        # Neighbours that would cross are pooled at their mean: isotonic regression.
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    levels = [float(np.mean(block)) for block in blocks for _ in block]
    top = high - (len(values) - 1) * gap
    return [min(max(level, low), top) + index * gap for index, level in enumerate(levels)]


def _cost_rows(summary: SweepSummary) -> list[tuple[str, list[str]]]:
    """Return the annotation rows that have a value: a name and one cell per coefficient."""
    rows = (
        ("‖cΔW‖ / ‖W‖", [each.relative_weight_norm for each in summary.steered]),
        ("KL p95, nats", [each.kl_p95 for each in summary.steered]),
    )
    return [
        (name, [significant(value) for value in values])
        for name, values in rows
        if any(value is not None for value in values)
    ]


def _draw_cost_rows(
    axes: Axes, summary: SweepSummary, rows: Sequence[tuple[str, list[str]]]
) -> None:
    """Write the coefficient's name and the cost rows under the tick labels, column by column."""
    ticks, points = set(axes.get_xticks()), _points(summary)
    beside = 1 + _LABEL_GAP / _inches(axes, "width")
    style: dict[str, Any] = {"color": _MUTED, "va": "center"}
    named: list[tuple[str, list[str]]] = [("coefficient", [""] * len(points)), *rows]
    for line, (name, cells) in enumerate(named):
        height = -(0.165 + 0.215 * line) / _inches(axes, "height")
        axes.text(beside, height, name, transform=axes.transAxes, fontsize=8.5, **style)
        for point, cell in zip(points, cells, strict=True):
            if point in ticks:
                across = axes.get_xaxis_transform()
                axes.text(point, height, cell, transform=across, ha="center", fontsize=8, **style)


def _panel_title(axes: Axes, summary: SweepSummary) -> None:
    rho = summary.rho_means
    text = "no ρ" if rho.value is None else f"ρ {interval(rho, 2)}"
    notes = [text, questions_line(summary), f"judge {summary.trait_judge or 'none'}"]
    axes.annotate(
        _short(title_of(summary.trait)),
        (0, 1),
        (-23, 38),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=11.5,
        fontweight="bold",
        color=_INK,
        va="bottom",
    )
    axes.annotate(
        "  ·  ".join(notes),
        (0, 1),
        (-23, 25),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8.5,
        color=_MUTED,
        va="bottom",
    )


def _points(summary: SweepSummary) -> list[float]:
    return [each.coefficient for each in summary.steered if each.coefficient is not None]


def _spread_ticks(points: Sequence[float], *, gap: float) -> list[float]:
    """Choose coefficients to label: 0 and the ends first, then those with room between them."""
    if not points:
        return []
    chosen: list[float] = []
    first = [point for point in (0.0, points[0], points[-1]) if point in points]
    for point in [*first, *points]:
        if all(abs(point - other) >= gap for other in chosen):
            chosen.append(point)
    return sorted(chosen)


def _png(figure: Figure) -> bytes:
    canvas = FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    # Without the software's version, equal summaries give equal bytes.
    canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _written(png: bytes, path: Path) -> bytes:
    with atomic_path(Path(path)) as temporary:
        temporary.write_bytes(png)
    return png
