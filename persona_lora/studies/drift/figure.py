"""Finetunes as pictures: scores and projections over steps, one against the other, and across.

Draws what ``finetunes`` read; refuses to compute statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.report.figures import (
    COHERENCE,
    INK,
    MUTED,
    TRAIT,
    Label,
    add_axes,
    array_of,
    new_figure,
    place_labels,
    png_of,
    score_scale,
    short,
    style_axes,
    write_line,
    written,
)
from persona_lora.report.wording import number, p_value, title_of
from persona_lora.studies.drift.read import (
    Agreement,
    CrossPoint,
    Curve,
    agreements,
    correlation,
    cross_persona,
    curves,
)

# Okabe and Ito's palette without its yellow, for lines told apart by their labels.
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#3b3f45")
_PANEL, _HEIGHT, _LEFT, _GAP = 3.0, 2.35, 0.62, 1.75  # inches
_ROW = _HEIGHT + 1.2


def plot_checkpoints(run: Run, path: Path) -> bytes:
    """Draw one finetune, write it to ``path`` as PNG and return the same bytes."""
    return written(render_checkpoints(run), path)


def plot_cross_persona(runs: Sequence[Run], path: Path) -> bytes:
    """Draw what several finetunes did to other traits, write the PNG and return its bytes."""
    return written(render_cross_persona(runs), path)


def render_checkpoints(run: Run) -> bytes:
    """Return a row for every judged trait: scores, projections, and one against the other."""
    every, agreeing = curves(run), agreements(run)
    traits = list(dict.fromkeys(curve.trait for curve in every))
    height = len(traits) * _ROW + 0.75
    width = _LEFT + 3 * _PANEL + 2 * _GAP + 2.6
    figure = new_figure(width, height)
    for index, trait in enumerate(traits):
        bottom = height - 0.75 - (index + 1) * _ROW + 0.72
        own = [curve for curve in every if curve.trait == trait]
        panels = [
            add_axes(figure, (_LEFT + at * (_PANEL + _GAP), bottom, _PANEL, _HEIGHT))
            for at in range(3)
        ]
        _draw_scores(panels[0], trait, own)
        _draw_projections(panels[1], own)
        _draw_against(panels[2], trait, own, [each for each in agreeing if each.trait == trait])
    tuned = run.record["config"].get("finetuned_on")
    title = f"A finetune on {tuned}" if tuned else "A finetune"
    write_line(figure, height - 0.42, f"{title}, checkpoint by checkpoint", size=14, bold=True)
    note = "Bands: 95% bootstrap over questions. Shift: finetuned minus base on the same tokens."
    write_line(figure, 0.13, note, size=7.8, muted=True)
    return png_of(figure)


def render_cross_persona(runs: Sequence[Run]) -> bytes:
    """Return cosine against the change of another trait's score, and against the shift on it."""
    points = cross_persona(runs)
    if not points:
        raise UserError(
            "no finetune was judged on another trait that has a vector; nothing to plot"
        )
    figure = new_figure(10.2, 4.6)
    for at, (name, axis) in enumerate(
        (("score", "change of the other trait's score"), ("shift", "shift on the other's vector"))
    ):
        axes = add_axes(figure, (0.75 + at * 4.85, 0.95, 3.9, 2.75))
        _draw_cross(axes, points, name, axis)
    write_line(figure, 4.18, "What a finetune does to other traits", size=14, bold=True)
    note = "Each point: a finetune → another trait. Across: cosine between the two traits' vectors."
    write_line(figure, 0.13, note, size=7.8, muted=True)
    return png_of(figure)


def _draw_scores(axes: Axes, trait: str, own: Sequence[Curve]) -> None:
    labels = []
    for statistic, name, colour in (
        ("trait", title_of(trait), TRAIT),
        ("coherence", "Coherence", COHERENCE),
    ):
        for curve in own:
            if curve.statistic == statistic:
                _draw_curve(axes, curve, colour)
                labels += _end_label(curve, short(name), colour, 0)
    style_axes(axes)
    score_scale(axes)
    axes.set_title(f"{title_of(trait)}: judged", loc="left", fontsize=10.5, color=INK)
    axes.set_xlabel("step", fontsize=9, color=MUTED)
    place_labels(axes, labels, size=8.5)


def _draw_projections(axes: Axes, own: Sequence[Curve]) -> None:
    labels = []
    shifts = [curve for curve in own if curve.statistic == "shift"]
    for index, curve in enumerate(shifts):
        colour = _LINES[index % len(_LINES)]
        _draw_curve(axes, curve, colour)
        labels += _end_label(curve, short(_name(curve, shifts)), colour, 1)
    style_axes(axes)
    axes.axhline(0, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.set_title("Shift along each vector", loc="left", fontsize=10.5, color=INK)
    axes.set_xlabel("step", fontsize=9, color=MUTED)
    if labels:
        place_labels(axes, labels, size=8.0)
    else:
        axes.text(0.5, 0.5, "no vectors", transform=axes.transAxes, ha="center", color=MUTED)


def _draw_against(
    axes: Axes, trait: str, own: Sequence[Curve], agreeing: Sequence[Agreement]
) -> None:
    """Scatter the mean projection against the trait's score over the checkpoints."""
    scores = next((c for c in own if c.statistic == "trait"), None)
    projected = [curve for curve in own if curve.statistic == "projection"]
    lines = []
    for index, curve in enumerate(projected):
        if scores is None:
            break
        colour = _LINES[index % len(_LINES)]
        x = array_of([point.value for point in curve.points])
        y = array_of([point.value for point in scores.points])
        axes.plot(x, y, color=colour, marker="o", markersize=5, linewidth=0.9, alpha=0.85)
        for point, across, up in zip(curve.points, x, y, strict=True):
            axes.annotate(
                str(point.step), (across, up), (3, 3), textcoords="offset points",
                fontsize=6.8, color=MUTED,
            )  # fmt: skip
        found = next(
            each.correlation
            for each in agreeing
            if (each.statistic, each.vector, each.layer)
            == ("projection", curve.vector, curve.layer)
        )
        rho = "no ρ" if found.rho is None else f"ρ {number(found.rho, 2)} (p {p_value(found.p)})"
        lines.append((f"{short(_name(curve, projected))}: {rho}, n {found.n}", colour))
    style_axes(axes)
    axes.set_ylim(-2, 102)
    axes.set_title("Score against projection", loc="left", fontsize=10.5, color=INK)
    axes.set_xlabel("mean projection of the answers", fontsize=9, color=MUTED)
    for index, (text, colour) in enumerate(lines[:8]):
        axes.text(
            1.02, 0.98 - 0.09 * index, text, transform=axes.transAxes, fontsize=7.2, color=colour,
            va="top",
        )  # fmt: skip


def _draw_curve(axes: Axes, curve: Curve, colour: str) -> None:
    steps = [point.step for point in curve.points]
    low, high = (array_of([getattr(p, side) for p in curve.points]) for side in ("low", "high"))
    axes.fill_between(steps, low, high, color=colour, alpha=0.13, linewidth=0)
    values = array_of([point.value for point in curve.points])
    axes.plot(steps, values, color=colour, marker="o", markersize=4.5, linewidth=1.8)


def _end_label(curve: Curve, name: str, colour: str, digits: int) -> list[Label]:
    last = curve.points[-1].value
    return [] if last is None else [Label(last, f"{name} {number(last, digits)}", colour)]


def _name(curve: Curve, among: Sequence[Curve]) -> str:
    """Return a vector's name, with its layer where several layers are shown."""
    name = str(curve.vector).rpartition("/")[2].replace("_response_avg", "")
    layers = {each.layer for each in among}
    return name if len(layers) == 1 else f"{name} at {curve.layer}"


def _draw_cross(axes: Axes, points: Sequence[CrossPoint], name: str, axis: str) -> None:
    known = [(p, getattr(p, name)) for p in points if getattr(p, name) is not None]
    for point, value in known:
        axes.plot(point.cosine, value, marker="o", markersize=6, color=TRAIT, linestyle="")
        axes.annotate(
            f"{point.finetuned_on} → {point.other}", (point.cosine, value), (5, 4),
            textcoords="offset points", fontsize=7.2, color=MUTED,
        )  # fmt: skip
    found = correlation([point.cosine for point, _ in known], [value for _, value in known])
    text = f"ρ {number(found.rho, 2)}, p {p_value(found.p)}" if found.rho is not None else "no ρ"
    reason = "" if found.reason is None else f" ({found.reason})"
    style_axes(axes)
    axes.margins(0.12)
    low, high = axes.get_xlim()
    middle, half = (low + high) / 2, max((high - low) / 2, 0.1)
    axes.set_xlim(middle - half, middle + 1.7 * half)  # room for the names of the points
    axes.axhline(0, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.set_title(f"{text}{reason}, n {found.n}", loc="left", fontsize=9, color=MUTED)
    axes.set_xlabel("cosine of the vectors", fontsize=9, color=MUTED)
    axes.set_ylabel(axis, fontsize=9, color=MUTED)
