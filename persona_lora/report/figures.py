"""The look that all pictures share: colours, axes in inches, labels that keep apart, PNG bytes.

Draws on figures of its own (no global plotting state). Refuses to know what a picture shows.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from persona_lora.core.files import atomic_path
from persona_lora.report.resampling import Array

# After Okabe and Ito's palette (two hues darkened for text), safe for the common colour blindness.
TRAIT, COHERENCE = "#0072B2", "#D55E00"
PROMPTS = {"prompt_pos": "#00795A", "prompt_neg": "#9C4F82"}
INK, MUTED, FAINT, SHADE = "#1f2328", "#656d76", "#d8dee4", "#f3f4f6"
CONTROL = "#77808a"
DPI = 160
LABEL_GAP = 0.22  # inches between the axes and the labels beside them
_NAME_LENGTH = 24  # longer names of traits are shortened beside the curves


@dataclass(frozen=True)
class Label:
    """Text to stand at the right of the axes, at the height of what it names."""

    score: float
    text: str
    colour: str
    weight: str = "normal"


def new_figure(width: float, height: float) -> Figure:
    """Return a white figure of that size in inches."""
    return Figure(figsize=(width, height), dpi=DPI, facecolor="white")


def add_axes(figure: Figure, inches: tuple[float, float, float, float]) -> Axes:
    """Add axes at left, bottom, width and height in inches."""
    width, height = figure.get_size_inches()
    left, bottom, across, up = inches
    return figure.add_axes((left / width, bottom / height, across / width, up / height))


def write_line(
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
        color=MUTED if muted else INK,
        fontsize=size,
        fontweight="bold" if bold else "normal",
        va=anchor,
        linespacing=1.45,
    )


def style_axes(axes: Axes) -> None:
    """Leave only the bottom spine, horizontal grid lines and quiet ticks."""
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=MUTED)
    axes.tick_params(axis="x", which="both", length=3, labelsize=9, color=MUTED, labelcolor=INK)


def score_scale(axes: Axes) -> None:
    """Set the vertical scale of scores, 0–100."""
    axes.set_ylim(-2, 102)
    axes.set_yticks([0, 25, 50, 75, 100])


def spread_ticks(points: Sequence[float], *, gap: float) -> list[float]:
    """Choose points to label: 0 and the ends first, then those with room between them."""
    if not points:
        return []
    chosen: list[float] = []
    first = [point for point in (0.0, points[0], points[-1]) if point in points]
    for point in [*first, *points]:
        if all(abs(point - other) >= gap for other in chosen):
            chosen.append(point)
    return sorted(chosen)


def array_of(values: Sequence[float | None]) -> Array:
    """Return values as floats, None as NaN (which lines leave out)."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def label_width(labels: Sequence[Label], *, size: float) -> float:
    """Return the room that labels need beside the axes, in inches (a generous estimate)."""
    em = size / 72
    widths = [len(each.text) * em * (0.66 if each.weight == "bold" else 0.57) for each in labels]
    return LABEL_GAP + max(widths, default=0.0) + 0.1


def short(name: str) -> str:
    """Return a name shortened to what fits beside a curve."""
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"


def inches_of(axes: Axes, side: Literal["width", "height"]) -> float:
    """Return the width or height of axes in inches."""
    box = axes.get_window_extent()
    return float(box.width if side == "width" else box.height) / DPI


def place_labels(axes: Axes, labels: Sequence[Label], *, size: float) -> None:
    """Write labels right of the axes, moved apart where they would collide, with leader lines."""
    bottom, top = axes.get_ylim()
    gap = 1.55 * size / 72 / inches_of(axes, "height") * (top - bottom)  # a line of text
    margin = (top - bottom) / 52
    ordered = sorted(labels, key=lambda each: each.score)
    heights = spread(
        [each.score for each in ordered], gap=gap, low=bottom + margin, high=top - margin
    )
    transform = axes.get_yaxis_transform()
    inch = 1 / inches_of(axes, "width")
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
            1 + LABEL_GAP * inch,
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


def png_of(figure: Figure) -> bytes:
    """Return a figure as PNG; equal figures give equal bytes."""
    canvas = FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    # The software's version would make bytes differ between installations.
    canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def written(png: bytes, path: Path) -> bytes:
    """Write PNG bytes to ``path``, atomically, and return them."""
    with atomic_path(Path(path)) as temporary:
        temporary.write_bytes(png)
    return png
