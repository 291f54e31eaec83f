"""A sweep as a picture: trait and coherence against the coefficient, with what it costs below.

Draws summaries on figures of its own (no global plotting state); refuses to compute statistics.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from persona_lora.core.errors import UserError
from persona_lora.report.conditions import ConditionSummary
from persona_lora.report.figures import (
    COHERENCE,
    CONTROL,
    INK,
    LABEL_GAP,
    MUTED,
    PROMPTS,
    SHADE,
    TRAIT,
    Label,
    add_axes,
    array_of,
    inches_of,
    label_width,
    new_figure,
    place_labels,
    png_of,
    score_scale,
    short,
    spread_ticks,
    style_axes,
    write_line,
    written,
)
from persona_lora.report.resampling import Interval
from persona_lora.report.summary import SweepSummary
from persona_lora.report.wording import (
    at_layer,
    coefficient,
    coherent_line,
    interval,
    method_label,
    number,
    place_line,
    questions_line,
    sample_line,
    significant,
    statistics_line,
    sweep_title,
    title_of,
)

_PRIMARY: dict[str, Any] = {"linewidth": 2.4, "markersize": 5.5}
_SECONDARY: dict[str, Any] = {"linewidth": 1.6, "markersize": 4.5, "linestyle": (0, (5, 2))}
_THIN: dict[str, Any] = {"linewidth": 1.2, "markersize": 3.5}
_WIDTH, _HEIGHT = 8.8, 5.3
_PANEL_WIDTH, _PANEL_HEIGHT = 5.6, 3.3
_TICK_INCHES = 0.42  # least distance of labelled coefficients


def plot_sweep(summary: SweepSummary, path: Path) -> bytes:
    """Draw one sweep, write it to ``path`` as PNG and return the same bytes."""
    return written(render_sweep(summary), path)


def plot_sweeps(summaries: Sequence[SweepSummary], path: Path) -> bytes:
    """Draw several sweeps as small multiples, write the PNG to ``path`` and return its bytes."""
    return written(render_sweeps(summaries), path)


def render_sweep(summary: SweepSummary) -> bytes:
    """Return one sweep as PNG: curves, prompting references, coherent range, cost rows."""
    rows, labels = _cost_rows(summary), _labels(summary)
    statistics = _statistics(summary)
    height = _HEIGHT + 0.19 * (len(statistics) - 1)
    figure = new_figure(_WIDTH, height)
    left, bottom, top = 0.63, 1.0 + 0.215 * len(rows), 4.22  # inches
    right = _WIDTH - max(label_width(labels, size=9.0), 1.2)
    axes = add_axes(figure, (left, bottom, right - left, top - bottom))
    _draw_curves(axes, summary)
    place_labels(axes, labels, size=9.0)
    _draw_cost_rows(axes, summary, rows)
    heading = sweep_title(summary)
    write_line(figure, height - 0.39, heading, size=14, bold=True)
    write_line(figure, height - 0.47, "\n".join(statistics), size=9, muted=True, anchor="top")
    caption = f"Mean scores 0–100. {sample_line(summary)}. {coherent_line(summary)}"
    write_line(figure, 0.13, "\n".join(textwrap.wrap(caption, 135)), size=7.8, muted=True)
    return png_of(figure)


def _statistics(summary: SweepSummary) -> list[str]:
    lines = textwrap.wrap(statistics_line(summary), 118)
    return [*lines, *textwrap.wrap(place_line(summary), 118)]


def render_sweeps(summaries: Sequence[SweepSummary]) -> bytes:
    """Return several sweeps as one PNG: a panel per trait on common scales."""
    if not summaries:
        raise UserError("no sweep to plot; name at least one run")
    columns = min(2, len(summaries))
    rows = -(-len(summaries) // columns)
    height = rows * _PANEL_HEIGHT + 0.5
    size = (columns * _PANEL_WIDTH, height)
    figure = new_figure(*size)
    margin = max(label_width(_labels(each, brief=True), size=8.5) for each in summaries)
    for index, summary in enumerate(summaries):
        row, column = divmod(index, columns)
        left, bottom = column * _PANEL_WIDTH + 0.5, height - (row + 1) * _PANEL_HEIGHT + 0.3
        axes = add_axes(figure, (left, bottom, _PANEL_WIDTH - 0.5 - margin, _PANEL_HEIGHT - 1.2))
        _draw_curves(axes, summary)
        place_labels(axes, _labels(summary, brief=True), size=8.5)
        _panel_title(axes, summary)
    note = "Mean scores 0–100 against the coefficient; bands: 95% bootstrap over questions."
    write_line(figure, 0.13, note, size=8, muted=True)
    return png_of(figure)


def _draw_curves(axes: Axes, summary: SweepSummary) -> None:
    """Draw everything inside the axes: shading, references, the two curves."""
    _style(axes, summary)
    _draw_incoherent(axes, summary)
    for method, colour in PROMPTS.items():
        reference = summary.reference(method)
        if reference is not None:
            _draw_reference(axes, reference.trait, colour)
    if summary.control is not None:
        control = [each for each in summary.control.conditions if each.coefficient is not None]
        _draw_curve(axes, control, lambda each: each.trait, CONTROL, _THIN)
    _draw_curve(axes, summary.steered, lambda each: each.coherence, COHERENCE, _SECONDARY)
    _draw_curve(axes, summary.steered, lambda each: each.trait, TRAIT, _PRIMARY)


def _style(axes: Axes, summary: SweepSummary) -> None:
    points = _points(summary)
    low, high = (min(points), max(points)) if points else (-1.0, 1.0)
    margin = 0.03 * (high - low) or 0.5
    axes.set_xlim(low - margin, high + margin)
    score_scale(axes)
    scale = (high - low + 2 * margin) / inches_of(axes, "width")
    ticks = spread_ticks(points, gap=scale * _TICK_INCHES)
    axes.set_xticks(ticks, [coefficient(tick) for tick in ticks])
    axes.set_xticks(points, minor=True)
    style_axes(axes)


def _draw_curve(
    axes: Axes,
    conditions: Sequence[ConditionSummary],
    criterion: Callable[[ConditionSummary], Interval],
    colour: str,
    style: dict[str, Any],
) -> None:
    """Draw one curve with its band; only the first one's band is strong."""
    scores = [criterion(each) for each in conditions]
    x = array_of([each.coefficient for each in conditions])
    low, high = array_of([each.low for each in scores]), array_of([each.high for each in scores])
    strength = 0.20 if style is _PRIMARY else 0.10
    axes.fill_between(x, low, high, color=colour, alpha=strength, linewidth=0)
    axes.vlines(x, low, high, color=colour, linewidth=1.0, alpha=0.45)
    mean = array_of([each.mean for each in scores])
    axes.plot(x, mean, color=colour, marker="o", markeredgecolor="white", **style)


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
            axes.axvspan(middle, outer, color=SHADE, zorder=0, linewidth=0)
            axes.text(
                (middle + outer) / 2,
                1.015,
                "not\ncoherent",
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=7.5,
                color=MUTED,
                linespacing=1.1,
            )


def _labels(summary: SweepSummary, *, brief: bool = False) -> list[Label]:
    """Return the labels of both curves (at their last point) and of the references."""
    labels = []
    control = summary.control.conditions if summary.control is not None else ()
    for name, colour, weight, scores in (
        (short(title_of(summary.trait)), TRAIT, "bold", [each.trait for each in summary.steered]),
        ("Coherence", COHERENCE, "bold", [each.coherence for each in summary.steered]),
        ("random direction", CONTROL, "normal", [each.trait for each in control]),
    ):
        scored = [each for each in scores if each.mean is not None]
        if scored and scored[-1].mean is not None:
            value = number(scored[-1].mean) if brief else interval(scored[-1])
            labels.append(Label(scored[-1].mean, f"{name} {value}", colour, weight))
    for method, colour in PROMPTS.items():
        reference = summary.reference(method)
        if reference is not None and reference.trait.mean is not None:
            value = number(reference.trait.mean) if brief else interval(reference.trait)
            labels.append(Label(reference.trait.mean, f"{method_label(method)} {value}", colour))
    return labels


def _cost_rows(summary: SweepSummary) -> list[tuple[str, list[str]]]:
    """Return the annotation rows that have a value: a name and one cell per coefficient."""
    rows = (
        ("‖cΔW‖ / ‖W‖", [each.relative_weight_norm for each in summary.steered]),
        ("‖cv‖ / ‖h‖", [each.relative_state_norm for each in summary.steered]),
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
    beside = 1 + LABEL_GAP / inches_of(axes, "width")
    style: dict[str, Any] = {"color": MUTED, "va": "center"}
    named: list[tuple[str, list[str]]] = [("coefficient", [""] * len(points)), *rows]
    for line, (name, cells) in enumerate(named):
        height = -(0.165 + 0.215 * line) / inches_of(axes, "height")
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
        short(title_of(summary.trait)) + at_layer(summary),
        (0, 1),
        (-23, 38),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=11.5,
        fontweight="bold",
        color=INK,
        va="bottom",
    )
    axes.annotate(
        "  ·  ".join(notes),
        (0, 1),
        (-23, 25),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8.5,
        color=MUTED,
        va="bottom",
    )


def _points(summary: SweepSummary) -> list[float]:
    return [each.coefficient for each in summary.steered if each.coefficient is not None]
