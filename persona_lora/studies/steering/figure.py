"""Steering as pictures: sweeps over a coefficient, methods at equal divergence, time, two spaces.

Draws what was read; refuses to compute statistics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes

from persona_lora.core.errors import UserError
from persona_lora.core.strength import Strengths
from persona_lora.report import figures as draw
from persona_lora.report import wording
from persona_lora.report.figures import Cells, Look, Panel, Picture, Series
from persona_lora.report.resampling import Interval
from persona_lora.report.scores import Row
from persona_lora.report.summary import SweepSummary
from persona_lora.studies.steering.read_comparison import (
    BASE,
    FIRST_TOKEN,
    TOKENS,
    Comparison,
    MethodEffect,
    Point,
    Ratio,
)
from persona_lora.studies.steering.read_side_effects import SHORT

# -- a sweep -----------------------------------------------------------------------------------

_PRIMARY = Look(draw.TRAIT, 2.4, 5.5, band=0.20, whiskers=0.45, edge="white", bold=True)
_SECONDARY = Look(
    draw.COHERENCE, 1.6, 4.5, dashes=(0, (5, 2)), band=0.10, whiskers=0.45, edge="white", bold=True
)
_THIN = Look(draw.CONTROL, 1.2, 3.5, band=0.10, whiskers=0.45, edge="white")
_WIDTH, _HEIGHT = 8.8, 5.3
_PANEL_WIDTH, _PANEL_HEIGHT = 5.6, 3.3
_TICK_INCHES = 0.42  # least distance of labelled coefficients


def render_sweep(summary: SweepSummary) -> Picture:
    """Return one sweep: curves, prompting references, coherent range, divergence rows."""
    rows, drawn = _divergence_rows(summary), _curves(summary)
    told = draw.wrapped(118, wording.statistics_line(summary), wording.place_line(summary))
    figure = draw.new_figure(_WIDTH, _HEIGHT + 0.19 * told.count("\n"))
    left, bottom, top = 0.63, 1.0 + 0.215 * len(rows), 4.22  # inches
    right = _WIDTH - max(draw.label_width(drawn, size=9.0), 1.2)
    axes = draw.add_axes(figure, (left, bottom, right - left, top - bottom))
    panel = _sweep_panel(axes, summary, drawn, size=9.0)
    _draw_divergence_rows(axes, summary, rows)
    note = f"Mean scores 0–100. {wording.sample_line(summary)}. {wording.coherent_line(summary)}"
    title = wording.sweep_title(summary)
    return draw.finish(figure, [panel], title=title, subtitle=told, note=note)


def render_sweeps(summaries: Sequence[SweepSummary]) -> Picture:
    """Return several sweeps: a panel for each trait, on common scales."""
    if not summaries:
        raise UserError("no sweep to plot; name at least one run")
    columns = min(2, len(summaries))
    height = -(-len(summaries) // columns) * _PANEL_HEIGHT + 0.5
    figure = draw.new_figure(columns * _PANEL_WIDTH, height)
    drawn = [_curves(each, brief=True) for each in summaries]
    margin = max(draw.label_width(each, size=8.5) for each in drawn)
    panels = []
    for index, summary in enumerate(summaries):
        row, column = divmod(index, columns)
        left, bottom = column * _PANEL_WIDTH + 0.5, height - (row + 1) * _PANEL_HEIGHT + 0.3
        across, up = _PANEL_WIDTH - 0.5 - margin, _PANEL_HEIGHT - 1.2
        axes = draw.add_axes(figure, (left, bottom, across, up))
        panels.append(_sweep_panel(axes, summary, drawn[index], size=8.5))
        _panel_title(axes, summary)
    note = "Mean scores 0–100 against the coefficient; bands: 95% bootstrap over questions."
    return draw.finish(figure, panels, note=note)


def _curves(summary: SweepSummary, *, brief: bool = False) -> list[Series]:
    """Return the references, the control, coherence and the trait, the trait on top."""

    def told(value: Interval) -> str:
        return wording.number(value.mean) if brief else wording.interval(value)

    drawn = []
    for method, colour in draw.PROMPTS.items():
        found = summary.reference(method)
        if found is not None and found.trait.mean is not None:
            look = Look(colour, 1.1, dashes=draw.DOTTED, band=0.08)
            name = wording.method_label(method)
            label = f"{name} {told(found.trait)}"
            drawn.append(draw.series(name, [], [found.trait], look, label=label))
    control = () if summary.control is None else summary.control.conditions
    random = "" if summary.control is None else wording.controls_name(summary.control)
    for name, look, conditions, criterion in (
        (random, _THIN, control, "trait"),
        ("Coherence", _SECONDARY, summary.steered, "coherence"),
        (wording.title_of(summary.trait), _PRIMARY, summary.steered, "trait"),
    ):
        known = [each for each in conditions if each.coefficient is not None]
        values = [getattr(each, criterion) for each in known]
        scored = [each for each in values if each.mean is not None]
        x = [each.coefficient for each in known if each.coefficient is not None]
        if known:
            end = f"{draw.short(name)} {told(scored[-1])}" if scored else None
            drawn.append(draw.series(name, x, values, look, label=end))
    return drawn


def _sweep_panel(
    axes: Axes, summary: SweepSummary, drawn: Sequence[Series], *, size: float
) -> Panel:
    """Draw everything inside the axes: shading, references, the curves."""
    points = _points(summary)
    low, high = (min(points), max(points)) if points else (-1.0, 1.0)
    margin = 0.03 * (high - low) or 0.5
    axes.set_xlim(low - margin, high + margin)
    draw.score_scale(axes)
    scale = (high - low + 2 * margin) / draw.inches_of(axes, "width")
    ticks = draw.spread_ticks(points, gap=scale * _TICK_INCHES)
    axes.set_xticks(ticks, [wording.coefficient(tick) for tick in ticks])
    axes.set_xticks(points, minor=True)
    _draw_incoherent(axes, summary)
    return draw.lines(axes, drawn, labels=size)


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
            axes.axvspan(middle, outer, color=draw.SHADE, zorder=0, linewidth=0)
            axes.text(
                *((middle + outer) / 2, 1.015, "not\ncoherent"),
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=7.5,
                color=draw.MUTED,
                linespacing=1.1,
            )


def _divergence_rows(summary: SweepSummary) -> list[tuple[str, list[str]]]:
    """Return the annotation rows that have a value: a name and one cell per coefficient."""
    rows = (
        ("asked, nats", [each.nats for each in summary.steered]),
        ("‖cΔW‖ / ‖W‖", [each.relative_weight_norm for each in summary.steered]),
        ("‖cv‖ / ‖h‖", [each.relative_state_norm for each in summary.steered]),
        ("KL p95, nats", [each.kl_p95 for each in summary.steered]),
    )
    return [
        (name, [wording.significant(value) for value in values])
        for name, values in rows
        if any(value is not None for value in values)
    ]


def _draw_divergence_rows(
    axes: Axes, summary: SweepSummary, rows: Sequence[tuple[str, list[str]]]
) -> None:
    """Write the coefficient's name and the divergence rows under the tick labels, in columns."""
    ticks, points = set(axes.get_xticks()), _points(summary)
    beside = 1 + draw.LABEL_GAP / draw.inches_of(axes, "width")
    style: dict[str, Any] = {"color": draw.MUTED, "va": "center"}
    for line, (name, cells) in enumerate([("coefficient", [""] * len(points)), *rows]):
        height = -(0.165 + 0.215 * line) / draw.inches_of(axes, "height")
        axes.text(beside, height, name, transform=axes.transAxes, fontsize=8.5, **style)
        for point, cell in zip(points, cells, strict=True):
            if point in ticks:
                across = axes.get_xaxis_transform()
                axes.text(point, height, cell, transform=across, ha="center", fontsize=8, **style)


def _panel_title(axes: Axes, summary: SweepSummary) -> None:
    rho = summary.rho_means
    text = "no ρ" if rho.value is None else f"ρ {wording.interval(rho, 2)}"
    notes = [text, wording.questions_line(summary), f"judge {summary.trait_judge or 'none'}"]
    title = draw.short_title(summary.trait) + wording.at_layer(summary)
    for line, up, colour, size, weight in (
        (title, 38, draw.INK, 11.5, "bold"),
        ("  ·  ".join(notes), 25, draw.MUTED, 8.5, "normal"),
    ):
        axes.annotate(
            *(line, (0, 1), (-23, up), "axes fraction", "offset points"),
            color=colour,
            fontsize=size,
            fontweight=weight,
            va="bottom",
        )


def _points(summary: SweepSummary) -> list[float]:
    return [each.coefficient for each in summary.steered if each.coefficient is not None]


# -- strength in nats --------------------------------------------------------------------------


def render_strengths(curves: Mapping[str, Strengths]) -> Picture:
    """Return the nats a token of directions by their coefficient, a panel for each sign."""
    figure = draw.new_figure(_WIDTH, 4.6)
    panels = []
    every = [each for found in curves.values() for each in found.points if each.coefficient]
    bounds = min(each.nats for each in every) / 1.5, max(each.nats_p95 for each in every) * 1.5
    for at, (sign, name) in enumerate(((-1.0, "negative"), (1.0, "positive"))):
        place, y = (0.75 + at * 4.1, 1.0, 3.6, 2.7), "" if at else "nats a token"
        axes = draw.add_axes(figure, place, title=name, x="|coefficient|", y=y)
        axes.set_ylim(*bounds)
        axes.set_xscale("log")
        axes.set_yscale("log")
        drawn = [_strength(*each, sign, hue) for hue, each in enumerate(curves.items())]
        panels.append(draw.lines(axes, [each for each in drawn if each.x]))
        if at == 0:
            axes.invert_xaxis()
            draw.legend(axes, loc="best")
    note = (
        "KL from the unsteered model on its own answers to ordinary prompts; the band reaches up "
        "to what 95% of tokens keep under. Hollow: answers there are no longer coherent."
    )
    return draw.finish(figure, panels, title="What a coefficient does", note=note)


def _strength(name: str, found: Strengths, sign: float, hue: int) -> Series:
    points = found.of(sign)
    low, high = found.coherent()
    mean, most = tuple(each.nats for each in points), tuple(each.nats_p95 for each in points)
    return Series(
        name,
        tuple(abs(each.coefficient) for each in points),
        *(mean, mean, most),
        Look(width=1.6, size=5.0, band=0.10).apart(hue),
        hollow=tuple(not low <= each.coefficient <= high for each in points),
    )


# -- at equal divergence -----------------------------------------------------------------------

NAMES = {
    "lora": "weights (LoRA difference)",
    "activation": "activations (steering vector)",
    "random_lora": "random difference of the same spectrum",
    "random": "random vector of the same norm",
    "none": "unsteered",
    "prompt_pos": "positive system prompt",
    "prompt_neg": "negative system prompt",
    "prompt_neutral": "neutral system prompts",
}
SPLITS = {"eval": "held-out questions", "ood": "out of distribution", "extract": "extraction set"}
MADE_EQUAL_ON = {
    "questions": "each method's own answers to the trait's questions",
    "prompts": "its own answers to ordinary prompts",
}
COLOURS = {
    "lora": draw.TRAIT,
    "activation": draw.COHERENCE,
    "random_lora": "#8fb3cc",
    "random": "#d9b08c",
}
_WIDE, _HIGH, _GAP = 4.1, 2.7, 0.85
_ASIDE = 0.015  # of the widest divergence, so that intervals stand beside one another


def render_comparison(comparison: Comparison) -> Picture:
    """Return a row of panels for each split: trait against divergence, and against coherence."""
    splits = list(dict.fromkeys(each.split for each in comparison.points))
    height = len(splits) * (_HIGH + _GAP) + 1.35
    highs = [each.trait.high or each.trait.mean or 0.0 for each in comparison.points]
    top = 25 * math.ceil(max(highs) / 25) + 2
    figure = draw.new_figure(0.85 + 2 * (_WIDE + _GAP), height)
    kind = "mean" if comparison.statistic == "mean" else "95th percentile"
    across = f"{kind} divergence, nats per token (left of 0: negative coefficients)"
    panels = []
    for row, split in enumerate(splits):
        bottom = height - 0.95 - (row + 1) * _HIGH - row * _GAP
        points = [each for each in comparison.points if each.split == split]
        names = {"title": SPLITS[split], "x": across, "y": wording.title_of(comparison.trait)}
        left = draw.add_axes(figure, (0.85, bottom, _WIDE, _HIGH), **names, size=10)
        right = draw.add_axes(figure, (0.85 + _WIDE + _GAP, bottom, _WIDE, _HIGH), x="coherence")
        right.set_xlim(-2, 102)
        plain = next((each.trait.mean for each in points if each.method == "none"), None)
        for axes in (left, right):
            draw.score_scale(axes, top)
            draw.rule(axes, plain, dashes=draw.DASHED)
        panels += [
            draw.lines(left, _by_divergence(points, comparison.statistic)),
            draw.scatter(right, _by_coherence(points)).named(f"{SPLITS[split]}, coherence"),
        ]
        left.locator_params(axis="x", nbins=6)
        for axes in (left, right) if row == 0 else ():
            draw.legend(axes, loc="best")
    draws = max(each.draws for each in comparison.points)
    note = (
        "Each level brings all methods to the same divergence from the base model on "
        f"{MADE_EQUAL_ON[comparison.calibrated_on]}; dots stand a little apart. Bars: 95% "
        "intervals over questions"
        + (f", of random controls over {draws} and questions" if draws > 1 else "")
        + ". Dashed: unsteered."
        + wording.judged_by(*(each.judge for each in comparison.points))
    )
    title = f"{wording.title_of(comparison.trait)}: weights or activations?"
    return draw.finish(figure, panels, title=title, note=note)


def render_effects(effects: Mapping[str, Mapping[tuple[str, str], MethodEffect]]) -> Picture:
    """Return what every method moved, by title of the trait: a panel for each set of questions.

    A hollow dot is the strongest of a method's random controls.
    """
    splits = list(dict.fromkeys(split for own in effects.values() for split, _ in own))
    up = 0.21 * len(effects) * len(COLOURS)
    figure, panels = draw.new_figure(3.0 + 3.5 * len(splits), up + 1.5), []
    for at, split in enumerate(splits):
        title = SPLITS[split]
        axes = draw.add_axes(figure, (2.7 + at * 3.5, 0.7, 3.2, up), title=title, size=9.5)
        draw.rule(axes, 0.0, upright=True, dashes=draw.DASHED)
        drawn = []
        for trait, method in product(effects, COLOURS):
            each = effects[trait].get((split, method))
            if each is not None:
                name, look = f"{trait}: {SHORT[method]}", Look(COLOURS[method], 1.8, 5.5)
                drawn.append(draw.series(name, [0.0], [each.effect], look))
                if each.most is not None:
                    drawn.append(Series(name, (0.0,), (each.most,), look=look, hollow=(True,)))
        panels.append(draw.forest(axes, drawn, named=at == 0))
    note = "Change of the trait in the direction asked for, of 100, at equal divergence, with 95%\n"
    note += "intervals. Hollow: the strongest random control."
    judges = (each.judge for own in effects.values() for each in own.values())
    note += wording.judged_by(*judges)
    return draw.finish(figure, panels, title="What each way of steering moved", note=note)


def _by_divergence(points: Sequence[Point], statistic: str) -> list[Series]:
    """Return every method's trait scores against its divergence, each sign a line of its own."""
    widest = max(_kl(each, statistic) for each in points)
    drawn = []
    for at, (method, colour) in enumerate(COLOURS.items()):
        look = Look(colour, 1.4, 4.5, band=0, whiskers=1.0)
        own = [each for each in points if each.method == method and each.trait.mean is not None]
        for sign in (1.0, -1.0):
            side = [each for each in own if (each.coefficient or 0.0) * sign > 0]
            side.sort(key=lambda each: _kl(each, statistic))
            aside = (at - 1.5) * _ASIDE * widest
            x = [sign * _kl(each, statistic) + aside for each in side]
            drawn.append(draw.series(NAMES[method], x, [each.trait for each in side], look))
    return [each for each in drawn if each.x]


def _by_coherence(points: Sequence[Point]) -> list[Series]:
    """Return the trait scores against coherence; only what has no coefficient is named."""
    drawn = []
    for each in points:
        if each.trait.mean is not None and each.coherence.mean is not None:
            colour = COLOURS.get(each.method, draw.PROMPTS.get(each.method, draw.CONTROL))
            marker = "o" if each.level is not None else "s"
            name = f"_{each.method}" if each.level is not None else NAMES[each.method]
            look = Look(colour, width=0, size=5, marker=marker)
            drawn.append(Series(name, (each.coherence.mean,), (each.trait.mean,), look=look))
    return drawn


def _kl(point: Point, statistic: str) -> float:
    return float((point.kl_mean if statistic == "mean" else point.kl_p95) or 0.0)


# -- time --------------------------------------------------------------------------------------

_VARIANTS = {
    "merged": draw.TRAIT,
    "live": "#56B4E9",
    "activations": draw.COHERENCE,
    "prompt": "#00795A",
}


def render_latency(ratios: Sequence[Ratio]) -> Picture:
    """Return the time of every variant over the base model's, with intervals."""
    shown = sorted(
        (each for each in ratios if each.variant != BASE), key=lambda e: (e.batch, e.variant)
    )
    up = 0.24 * len({(each.batch, each.variant) for each in shown})
    figure = draw.new_figure(1.9 + 2 * 3.9, up + 1.5)
    panels = []
    for at, (measure, what) in enumerate(
        ((FIRST_TOKEN, "to the first token"), (TOKENS, "for each further token"))
    ):
        axes = draw.add_axes(figure, (1.8 + at * 3.9, 0.7, 3.6, up), title=f"time {what}", size=9.5)
        looks = {name: Look(colour, 1.6, 5) for name, colour in _VARIANTS.items()}
        drawn = [
            draw.series(f"{e.variant}, batch {e.batch}", [0.0], [e.ratio], looks[e.variant])
            for e in shown
            if e.measure == measure
        ]
        panels.append(draw.forest(axes, drawn, named=at == 0))
        draw.rule(axes, 1.0, upright=True, dashes=draw.DASHED)
    note = "Over the base model's, in the same round; geometric mean and 95% interval over rounds."
    return draw.finish(figure, panels, title="What steering costs in time", note=note)


# -- two spaces --------------------------------------------------------------------------------


MANY_TRAITS = 7  # from which a cell has room for one digit
# Left, bottom, width (inches), title, names of the axes, size of the title.
_SPACES = (
    (
        *(0.8, 4.4, 4.6),
        "cosine of the shift under a difference with the trait's vector (grey: other traits')",
        *("layer", "", 8.5),
    ),
    (6.3, 4.4, 4.6, "effective rank of the difference, mean over modules", "layer", "", 8.5),
    (
        *(0.8, 1.1, 2.6, "pairs of traits: cosine in both spaces"),
        *("of the differences", "of the vectors", 8.5),
    ),
    (5.2, 1.1, 2.3, "steered by weights", "", "", 9),
    (8.5, 1.1, 2.3, "steered by activations", "", "", 9),
)


def render_spaces(
    shifts: Sequence[Row],
    spectra: Sequence[Row],
    cosines: Sequence[Row],
    interference: Sequence[Row],
) -> Picture:
    """Return shift against vector, effective rank, cosines, and interference."""
    figure = draw.new_figure(11.2, 7.7)
    traits = list(dict.fromkeys(row["trait"] for row in shifts))
    above, ranks, pairs, *moved = (
        draw.add_axes(figure, (left, bottom, across, 2.3), title=title, x=x, y=y, size=size)
        for left, bottom, across, title, x, y, size in _SPACES
    )
    panels = [_shifts(above, shifts, traits), _ranks(ranks, spectra), _cosines(pairs, cosines)]
    names, digits = tuple(map(draw.short_title, traits)), 2 if len(traits) < MANY_TRAITS else 1
    for axes, method in zip(moved, ("weights", "activations"), strict=True):
        of = {(r["steered"], r["read"]): r["value"] for r in interference if r["method"] == method}
        values = np.array([[of[one, other] for other in traits] for one in traits])
        rows = names if method == "weights" else ("",) * len(names)
        cells = Cells(values, rows, names, colours=colormaps["RdBu_r"])
        heat = draw.heat_map(
            *(axes, cells),
            say=lambda row, column, value: wording.number(value, digits),
            size=7.5,
            slanted=True,
        )
        panels.append(heat)
    note = (
        "Below right: a row steers a trait; how far it moves along the other traits' own shifts "
        "(1: as far as their own steering)."
    )
    if all("effective_rank_plain" in row for row in spectra):
        note += " Ranks and cosines of differences are weighted by the model's inputs."
    return draw.finish(figure, panels, title="Weights and activations: two spaces", note=note)


def _shifts(axes: Axes, rows: Sequence[Row], traits: Sequence[str]) -> Panel:
    draw.rule(axes, 0)
    others = Look(draw.CONTROL, width=0.6, alpha=0.45, order=1)
    drawn = []
    for at, trait in enumerate(traits):
        mine = [row for row in rows if row["trait"] == trait]
        for each in draw.series_by(mine, "other", "layer", "cosine", others):
            look = Look(order=3).apart(at) if each.name == trait else others
            drawn.append(replace(each, name=f"{trait}, {each.name}", look=look))
    return draw.lines(axes, drawn)


def _ranks(axes: Axes, rows: Sequence[Row]) -> Panel:
    ranks = pd.DataFrame(list(rows)).groupby(["trait", "layer"], sort=False)["effective_rank"]
    drawn = draw.series_by(
        ranks.mean().reset_index().to_dict("records"),
        *("trait", "layer", "effective_rank"),
        Look(width=1.6),
        name=draw.short_title,
    )
    panel = draw.lines(axes, drawn)
    axes.set_ylim(bottom=0)
    draw.legend(axes, ncol=3, loc="lower center")
    return panel


def _cosines(axes: Axes, rows: Sequence[Row]) -> Panel:
    draw.rule(axes, 0)
    draw.rule(axes, 0, upright=True)
    named = _apart(rows)
    marks = tuple(f"{row['trait'][:4]}–{row['other'][:4]}" if row in named else "" for row in rows)
    x, y = (tuple(row[key] for row in rows) for key in ("weights", "activations"))
    pairs = Series("pairs", x, y, look=Look(width=0, size=5), marks=marks)
    return draw.scatter(axes, [pairs], marks=6.5)


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
