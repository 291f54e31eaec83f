"""Steering as pictures: sweeps over a coefficient, methods at equal divergence, time, two spaces.

Draws what was read; refuses to compute statistics.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from persona_lora.core.errors import UserError
from persona_lora.report.conditions import ConditionSummary
from persona_lora.report.figures import (
    COHERENCE,
    CONTROL,
    DASHED,
    DOTTED,
    INK,
    LABEL_GAP,
    MUTED,
    PALETTE,
    PROMPTS,
    SHADE,
    TRAIT,
    ZERO,
    Cells,
    Look,
    Panel,
    Picture,
    Series,
    add_axes,
    finish,
    forest,
    heat_map,
    inches_of,
    label_width,
    legend,
    lines,
    new_figure,
    scatter,
    score_scale,
    series,
    short,
    spread_ticks,
    write_line,
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
from persona_lora.studies.steering.read_comparison import Comparison, Point
from persona_lora.studies.steering.read_latency import BASE, FIRST_TOKEN, TOKENS, Ratio

Row = Mapping[str, Any]
Inches = tuple[float, float, float, float]

# -- a sweep -----------------------------------------------------------------------------------

_PRIMARY = Look(TRAIT, 2.4, 5.5, band=0.20, whiskers=0.45, edge="white", bold=True)
_SECONDARY = Look(
    COHERENCE, 1.6, 4.5, dashes=(0, (5, 2)), band=0.10, whiskers=0.45, edge="white", bold=True
)
_THIN = Look(CONTROL, 1.2, 3.5, band=0.10, whiskers=0.45, edge="white")
_WIDTH, _HEIGHT = 8.8, 5.3
_PANEL_WIDTH, _PANEL_HEIGHT = 5.6, 3.3
_TICK_INCHES = 0.42  # least distance of labelled coefficients


def render_sweep(summary: SweepSummary) -> Picture:
    """Return one sweep: curves, prompting references, coherent range, cost rows."""
    rows, drawn = _cost_rows(summary), _curves(summary)
    told = [*textwrap.wrap(statistics_line(summary), 118), *textwrap.wrap(place_line(summary), 118)]
    height = _HEIGHT + 0.19 * (len(told) - 1)
    figure = new_figure(_WIDTH, height)
    left, bottom, top = 0.63, 1.0 + 0.215 * len(rows), 4.22  # inches
    right = _WIDTH - max(label_width(drawn, size=9.0), 1.2)
    axes = add_axes(figure, (left, bottom, right - left, top - bottom))
    panel = _sweep_panel(axes, summary, drawn, size=9.0)
    _draw_cost_rows(axes, summary, rows)
    write_line(figure, height - 0.47, "\n".join(told), size=9, muted=True, anchor="top")
    caption = f"Mean scores 0–100. {sample_line(summary)}. {coherent_line(summary)}"
    note = "\n".join(textwrap.wrap(caption, 135))
    return finish(figure, [panel], title=sweep_title(summary), note=note)


def render_sweeps(summaries: Sequence[SweepSummary]) -> Picture:
    """Return several sweeps: a panel for each trait, on common scales."""
    if not summaries:
        raise UserError("no sweep to plot; name at least one run")
    columns = min(2, len(summaries))
    height = -(-len(summaries) // columns) * _PANEL_HEIGHT + 0.5
    figure = new_figure(columns * _PANEL_WIDTH, height)
    drawn = [_curves(each, brief=True) for each in summaries]
    margin = max(label_width(each, size=8.5) for each in drawn)
    panels = []
    for index, summary in enumerate(summaries):
        row, column = divmod(index, columns)
        left, bottom = column * _PANEL_WIDTH + 0.5, height - (row + 1) * _PANEL_HEIGHT + 0.3
        axes = add_axes(figure, (left, bottom, _PANEL_WIDTH - 0.5 - margin, _PANEL_HEIGHT - 1.2))
        panels.append(_sweep_panel(axes, summary, drawn[index], size=8.5))
        _panel_title(axes, summary)
    note = "Mean scores 0–100 against the coefficient; bands: 95% bootstrap over questions."
    return finish(figure, panels, note=note)


def _curves(summary: SweepSummary, *, brief: bool = False) -> list[Series]:
    """Return the references, the control, coherence and the trait, the trait on top."""

    def told(value: Interval) -> str:
        return number(value.mean) if brief else interval(value)

    drawn = []
    for method, colour in PROMPTS.items():
        found = summary.reference(method)
        if found is not None and found.trait.mean is not None:
            look = Look(colour, 1.1, dashes=DOTTED, band=0.08)
            name = method_label(method)
            label = f"{name} {told(found.trait)}"
            drawn.append(series(name, [], [found.trait], look, label=label))
    control = () if summary.control is None else summary.control.conditions
    for name, look, conditions, score in (
        ("random direction", _THIN, control, _trait_of),
        ("Coherence", _SECONDARY, summary.steered, _coherence_of),
        (title_of(summary.trait), _PRIMARY, summary.steered, _trait_of),
    ):
        known = [each for each in conditions if each.coefficient is not None]
        values = [score(each) for each in known]
        scored = [each for each in values if each.mean is not None]
        x = [each.coefficient for each in known if each.coefficient is not None]
        if known:
            end = f"{short(name)} {told(scored[-1])}" if scored else None
            drawn.append(series(name, x, values, look, label=end))
    return drawn


def _trait_of(each: ConditionSummary) -> Interval:
    return each.trait


def _coherence_of(each: ConditionSummary) -> Interval:
    return each.coherence


def _sweep_panel(
    axes: Axes, summary: SweepSummary, drawn: Sequence[Series], *, size: float
) -> Panel:
    """Draw everything inside the axes: shading, references, the curves."""
    points = _points(summary)
    low, high = (min(points), max(points)) if points else (-1.0, 1.0)
    margin = 0.03 * (high - low) or 0.5
    axes.set_xlim(low - margin, high + margin)
    score_scale(axes)
    scale = (high - low + 2 * margin) / inches_of(axes, "width")
    ticks = spread_ticks(points, gap=scale * _TICK_INCHES)
    axes.set_xticks(ticks, [coefficient(tick) for tick in ticks])
    axes.set_xticks(points, minor=True)
    _draw_incoherent(axes, summary)
    return Panel(title_of(summary.trait), lines(axes, drawn, labels=size))


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
                *((middle + outer) / 2, 1.015, "not\ncoherent"),
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=7.5,
                color=MUTED,
                linespacing=1.1,
            )


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
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    place |= {"va": "bottom"}
    title = short(title_of(summary.trait)) + at_layer(summary)
    axes.annotate(title, (0, 1), (-23, 38), fontsize=11.5, fontweight="bold", color=INK, **place)
    axes.annotate("  ·  ".join(notes), (0, 1), (-23, 25), fontsize=8.5, color=MUTED, **place)


def _points(summary: SweepSummary) -> list[float]:
    return [each.coefficient for each in summary.steered if each.coefficient is not None]


# -- at equal divergence -----------------------------------------------------------------------

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
_COLOURS = {"lora": TRAIT, "activation": COHERENCE, "random_lora": "#8fb3cc", "random": "#d9b08c"}
_WIDE, _HIGH, _GAP = 4.1, 2.7, 0.85
_ASIDE = 0.015  # of the widest divergence, so that intervals stand beside one another


def render_comparison(comparison: Comparison) -> Picture:
    """Return a row of panels for each split: trait against divergence, and against coherence."""
    splits = list(dict.fromkeys(each.split for each in comparison.points))
    height = len(splits) * (_HIGH + _GAP) + 1.35
    highs = [each.trait.high or each.trait.mean or 0.0 for each in comparison.points]
    top = 25 * math.ceil(max(highs) / 25) + 2
    figure = new_figure(0.85 + 2 * (_WIDE + _GAP), height)
    kind = "mean" if comparison.statistic == "mean" else "95th percentile"
    across = f"{kind} divergence, nats per token (left of 0: negative coefficients)"
    panels = []
    for row, split in enumerate(splits):
        bottom = height - 0.95 - (row + 1) * _HIGH - row * _GAP
        points = [each for each in comparison.points if each.split == split]
        title, y = SPLITS[split], title_of(comparison.trait)
        left = add_axes(figure, (0.85, bottom, _WIDE, _HIGH), title=title, x=across, y=y, size=10)
        right = add_axes(figure, (0.85 + _WIDE + _GAP, bottom, _WIDE, _HIGH), x="coherence")
        right.set_xlim(-2, 102)
        plain = next((each.trait.mean for each in points if each.method == "none"), None)
        for axes in (left, right):
            score_scale(axes, top)
            _dashed(axes, plain, upright=False)
        panels += [
            Panel(title, lines(left, _by_divergence(points, comparison.statistic))),
            Panel(f"{title}, coherence", scatter(right, _by_coherence(points))),
        ]
        left.locator_params(axis="x", nbins=6)
        if row == 0:
            legend(left, loc="best")
            legend(right, loc="best")
    note = (
        "Each level brings all methods to the same divergence from the base model on ordinary "
        "prompts; dots stand a little apart. Bars: 95% intervals over questions. Dashed: unsteered."
    )
    title = f"{title_of(comparison.trait)}: weights or activations?"
    return finish(figure, panels, title=title, note=note)


def _by_divergence(points: Sequence[Point], statistic: str) -> list[Series]:
    """Return every method's trait scores against its divergence, each sign a line of its own."""
    widest = max(_kl(each, statistic) for each in points)
    drawn = []
    for at, (method, colour) in enumerate(_COLOURS.items()):
        look = Look(colour, 1.4, 4.5, band=0, whiskers=1.0)
        own = [each for each in points if each.method == method and each.trait.mean is not None]
        for sign in (1.0, -1.0):
            side = [each for each in own if (each.coefficient or 0.0) * sign > 0]
            side.sort(key=lambda each: _kl(each, statistic))
            aside = (at - 1.5) * _ASIDE * widest
            x = [sign * _kl(each, statistic) + aside for each in side]
            drawn.append(series(NAMES[method], x, [each.trait for each in side], look))
    return [each for each in drawn if each.x]


def _by_coherence(points: Sequence[Point]) -> list[Series]:
    """Return the trait scores against coherence; only what has no coefficient is named."""
    drawn = []
    for each in points:
        if each.trait.mean is not None and each.coherence.mean is not None:
            colour = _COLOURS.get(each.method, PROMPTS.get(each.method, CONTROL))
            marker = "o" if each.level is not None else "s"
            name = f"_{each.method}" if each.level is not None else NAMES[each.method]
            look = Look(colour, width=0, size=5, marker=marker)
            drawn.append(Series(name, (each.coherence.mean,), (each.trait.mean,), look=look))
    return drawn


def _kl(point: Point, statistic: str) -> float:
    return float((point.kl_mean if statistic == "mean" else point.kl_p95) or 0.0)


def _dashed(axes: Axes, at: float | None, *, upright: bool) -> None:
    if at is not None:
        line = axes.axvline if upright else axes.axhline
        line(at, color=MUTED, linewidth=0.9, linestyle=DASHED)


# -- time --------------------------------------------------------------------------------------

_VARIANTS = {"merged": TRAIT, "live": "#56B4E9", "activations": COHERENCE, "prompt": "#00795A"}


def render_latency(ratios: Sequence[Ratio]) -> Picture:
    """Return the time of every variant over the base model's, with intervals."""
    shown = sorted(
        (each for each in ratios if each.variant != BASE), key=lambda e: (e.batch, e.variant)
    )
    up = 0.24 * len({(each.batch, each.variant) for each in shown})
    figure = new_figure(1.9 + 2 * 3.9, up + 1.5)
    panels = []
    for at, measure in enumerate((FIRST_TOKEN, TOKENS)):
        title = (
            f"time {'to the first token' if measure == FIRST_TOKEN else 'for each further token'}"
        )
        axes = add_axes(figure, (1.8 + at * 3.9, 0.7, 3.6, up), title=title, size=9.5)
        drawn = [
            series(
                f"{each.variant}, batch {each.batch}",
                [0.0],
                [each.ratio],
                Look(_VARIANTS[each.variant], 1.6, 5),
            )
            for each in shown
            if each.measure == measure
        ]
        panels.append(Panel(title, forest(axes, drawn, named=at == 0)))
        _dashed(axes, 1.0, upright=True)
    note = "Over the base model's, in the same round; geometric mean and 95% interval over rounds."
    return finish(figure, panels, title="What steering costs in time", note=note)


# -- two spaces --------------------------------------------------------------------------------


def render_spaces(
    shifts: Sequence[Row],
    spectra: Sequence[Row],
    cosines: Sequence[Row],
    interference: Sequence[Row],
) -> Picture:
    """Return shift against vector, effective rank, cosines, and interference."""
    figure = new_figure(11.2, 7.7)
    traits = list(dict.fromkeys(row["trait"] for row in shifts))
    title = "cosine of the shift under a difference with the trait's vector (grey: other traits')"
    above = add_axes(figure, (0.8, 4.4, 4.6, 2.3), title=title, x="layer", size=8.5)
    above.axhline(0, **ZERO)
    panels = [
        Panel(title, lines(above, _shifts(shifts, traits))),
        _ranks(figure, (6.3, 4.4, 4.6, 2.3), spectra, traits),
        _cosines(figure, (0.8, 1.1, 2.6, 2.3), cosines),
    ]
    for at, method in enumerate(("weights", "activations")):
        title = f"steered by {method}"
        axes = add_axes(figure, (5.2 + at * 3.3, 1.1, 2.3, 2.3), title=title, size=9)
        of = {(r["steered"], r["read"]): r["value"] for r in interference if r["method"] == method}
        values = np.array([[of[one, other] for other in traits] for one in traits])
        names = tuple(short(title_of(trait)) for trait in traits)
        rows = names if at == 0 else ("",) * len(names)
        cells = Cells(values, rows, names, colours=colormaps["RdBu_r"])
        panels.append(Panel(title, heat_map(axes, cells, size=7.5, slanted=True)))
    note = (
        "Below right: a row steers a trait; how far it moves along the other traits' own shifts "
        "(1: as far as their own steering)."
    )
    return finish(figure, panels, title="Weights and activations: two spaces", note=note)


def _shifts(rows: Sequence[Row], traits: Sequence[str]) -> list[Series]:
    drawn = []
    for at, trait in enumerate(traits):
        for other in traits:
            own = [row for row in rows if (row["trait"], row["other"]) == (trait, other)]
            line = sorted((row["layer"], row["cosine"]) for row in own)
            x, y = (tuple(point[axis] for point in line) for axis in (0, 1))
            mine = Look(PALETTE[at % len(PALETTE)], order=3)
            look = mine if trait == other else Look(CONTROL, width=0.6, alpha=0.45, order=1)
            drawn.append(Series(f"{trait}, {other}", x, y, look=look))
    return drawn


def _ranks(figure: Figure, inches: Inches, rows: Sequence[Row], traits: Sequence[str]) -> Panel:
    title = "effective rank of the difference, mean over modules"
    axes = add_axes(figure, inches, title=title, x="layer", size=8.5)
    drawn = []
    for at, trait in enumerate(traits):
        own = [row for row in rows if row["trait"] == trait and row["layer"] is not None]
        layers = tuple(sorted({row["layer"] for row in own}))
        means = tuple(
            float(np.mean([r["effective_rank"] for r in own if r["layer"] == n])) for n in layers
        )
        look = Look(PALETTE[at % len(PALETTE)], width=1.6)
        drawn.append(Series(short(title_of(trait)), layers, means, look=look))
    shown = lines(axes, drawn)
    axes.set_ylim(bottom=0)
    legend(axes, ncol=3, loc="lower center")
    return Panel(title, shown)


def _cosines(figure: Figure, inches: Inches, rows: Sequence[Row]) -> Panel:
    title = "pairs of traits: cosine in both spaces"
    axes = add_axes(
        figure, inches, title=title, x="of the differences", y="of the vectors", size=8.5
    )
    axes.axhline(0, **ZERO)
    axes.axvline(0, **ZERO)
    named = _apart(rows)
    marks = tuple(f"{row['trait'][:4]}–{row['other'][:4]}" if row in named else "" for row in rows)
    x, y = (tuple(row[key] for row in rows) for key in ("weights", "activations"))
    pairs = Series("pairs", x, y, look=Look(width=0, size=5), marks=marks)
    return Panel(title, scatter(axes, [pairs], marks=6.5))


def _apart(rows: Sequence[Row]) -> list[Row]:
    """Return the pairs whose names have room, those with the largest cosines first."""
    spread = {key: np.ptp([row[key] for row in rows]) or 1.0 for key in ("weights", "activations")}
    kept: list[Row] = []
    for row in sorted(rows, key=lambda each: -abs(each["activations"])):
        far = (
            abs(row["weights"] - other["weights"]) > 0.3 * spread["weights"]
            or abs(row["activations"] - other["activations"]) > 0.05 * spread["activations"]
            for other in kept
        )
        if all(far):
            kept.append(row)
    return kept
