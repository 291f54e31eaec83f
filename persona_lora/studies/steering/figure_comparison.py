"""Methods at equal divergence as a picture: the trait against what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from persona_lora.report.figures import (
    CONTROL,
    INK,
    MUTED,
    PROMPTS,
    add_axes,
    new_figure,
    png_of,
    score_scale,
    style_axes,
    write_line,
    written,
)
from persona_lora.report.wording import title_of
from persona_lora.studies.steering.read_comparison import Comparison, Point

NAMES = {
    "lora": "weights (LoRA difference)",
    "activation": "activations (steering vector)",
    "random_lora": "random difference of the same spectrum",
    "random": "random vector of the same norm",
    "none": "unsteered",
    "prompt_pos": "positive system prompt",
    "prompt_neg": "negative system prompt",
}
SPLITS = {"eval": "held-out questions", "ood": "out of distribution", "extract": "extraction set"}
COLOURS = {
    "lora": "#0072B2",
    "activation": "#D55E00",
    "random_lora": "#8fb3cc",
    "random": "#d9b08c",
}
_WIDE, _HIGH, _GAP = 4.1, 2.7, 0.85
_ASIDE = 0.015  # of the widest divergence, so that intervals stand beside one another


def plot_comparison(comparison: Comparison, path: Path) -> bytes:
    """Draw a comparison, write it to ``path`` as PNG and return the same bytes."""
    return written(render_comparison(comparison), path)


def render_comparison(comparison: Comparison) -> bytes:
    """Return a row of panels a split: trait against divergence, and trait against coherence."""
    splits = list(dict.fromkeys(each.split for each in comparison.points))
    height = len(splits) * (_HIGH + _GAP) + 1.35
    highs = [each.trait.high or each.trait.mean or 0.0 for each in comparison.points]
    top = 25 * math.ceil(max(highs) / 25) + 2
    figure = new_figure(0.85 + 2 * (_WIDE + _GAP), height)
    for row, split in enumerate(splits):
        bottom = height - 0.95 - (row + 1) * _HIGH - row * _GAP
        points = [each for each in comparison.points if each.split == split]
        left = add_axes(figure, (0.85, bottom, _WIDE, _HIGH))
        right = add_axes(figure, (0.85 + _WIDE + _GAP, bottom, _WIDE, _HIGH))
        _draw_divergence(left, points, comparison.statistic)
        _draw_coherence(right, points)
        left.set_title(SPLITS[split], fontsize=10, loc="left", color=INK)
        left.set_ylabel(title_of(comparison.trait), fontsize=9, color=MUTED)
        for axes in (left, right):
            axes.set_ylim(-2, top)
        if row == 0:
            right.legend(fontsize=7.5, frameon=False, labelcolor=INK, loc="best")
            left.legend(fontsize=7.5, frameon=False, labelcolor=INK, loc="best")
    write_line(
        figure, height - 0.4, f"{title_of(comparison.trait)}: weights or activations?",
        size=14, bold=True,
    )  # fmt: skip
    note = (
        "Each level brings all methods to the same divergence from the base model on ordinary "
        "prompts; dots stand a little apart. Bars: 95% intervals over questions. Dashed: unsteered."
    )
    write_line(figure, 0.12, note, size=7.8, muted=True)
    return png_of(figure)


def _draw_divergence(axes: Axes, points: Sequence[Point], statistic: str) -> None:
    widest = max(_kl(each, statistic) for each in points)
    for at, (method, colour) in enumerate(COLOURS.items()):
        own = [each for each in points if each.method == method and each.trait.mean is not None]
        aside = (at - 1.5) * _ASIDE * widest
        for sign in (1.0, -1.0):
            side = sorted(
                (each for each in own if (each.coefficient or 0.0) * sign > 0),
                key=lambda each: _kl(each, statistic),
            )
            label = NAMES[method] if side and (sign > 0 or not _has_positive(own)) else None
            xs = [sign * _kl(each, statistic) + aside for each in side]
            axes.plot(xs, [_mean(each) for each in side], color=colour, linewidth=1.4, label=label)
            for x, each in zip(xs, side, strict=True):
                _dot(axes, x, each, colour)
    _plain_line(axes, points)
    style_axes(axes)
    score_scale(axes)
    axes.locator_params(axis="x", nbins=6)
    kind = "mean" if statistic == "mean" else "95th percentile"
    axes.set_xlabel(
        f"{kind} divergence, nats a token (left of 0: negative coefficients)", fontsize=8,
        color=MUTED,
    )  # fmt: skip


def _draw_coherence(axes: Axes, points: Sequence[Point]) -> None:
    for each in points:
        if each.trait.mean is None or each.coherence.mean is None:
            continue
        colour = COLOURS.get(each.method, PROMPTS.get(each.method, CONTROL))
        marker = "o" if each.level is not None else "s"
        label = NAMES[each.method] if each.level is None else None
        axes.plot(
            each.coherence.mean, each.trait.mean, marker, color=colour, markersize=5, label=label
        )
    _plain_line(axes, points)
    style_axes(axes)
    score_scale(axes)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("coherence", fontsize=8.5, color=MUTED)


def _plain_line(axes: Axes, points: Sequence[Point]) -> None:
    plain = next((each.trait.mean for each in points if each.method == "none"), None)
    if plain is not None:
        axes.axhline(plain, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))


def _dot(axes: Axes, x: float, point: Point, colour: str) -> None:
    if point.trait.low is not None and point.trait.high is not None:
        axes.plot([x, x], [point.trait.low, point.trait.high], color=colour, linewidth=1.1)
    axes.plot(x, _mean(point), "o", color=colour, markersize=4.5)


def _mean(point: Point) -> float:
    return float("nan") if point.trait.mean is None else point.trait.mean


def _kl(point: Point, statistic: str) -> float:
    value = point.kl_mean if statistic == "mean" else point.kl_p95
    return float(value or 0.0)


def _has_positive(points: Sequence[Point]) -> bool:
    return any((each.coefficient or 0.0) > 0 for each in points)
