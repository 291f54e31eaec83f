"""Persona searches as pictures: the way of a search, and methods beside one another.

Draws rows from disk and what ``fits`` says of them; refuses to compute statistics of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.report import figures as draw
from persona_lora.report.comparisons import ConditionFit, Row, fits_over_prompts
from persona_lora.report.figures import Cells, Look, Panel, Picture, Series
from persona_lora.report.resampling import Array, Interval
from persona_lora.report.scores import grouped
from persona_lora.report.wording import interval, number, title_of
from persona_lora.studies.personas.read_fits import (
    BOUNDS,
    UNSTEERED,
    condition_fits,
    limits_of,
    order_line,
    over_personas,
    rows_of,
)
from persona_lora.studies.personas.read_goals import (
    RANDOM_MIX,
    front_means,
    goal_fits,
    is_front,
    judge_of,
    sought,
    targets_of,
    trait_means,
    undominated,
)

NAMES = {
    "none": "unsteered",
    "mean": "distribution's mean",
    "incumbent": "incumbent",
    "lora": "LoRA, CMA-ES",
    "random": "LoRA, random search",
    "tpe": "LoRA, TPE",
    "random_mix": "random mixes of its length",
    "equal": "LoRA, equal weights",
    "likelihood": "LoRA, likeliest lines",
    "svd": "SVD vectors, CMA-ES",
    "mean_diff": "mean-difference vectors, CMA-ES",
    "pca": "PCA vectors, CMA-ES",
    "prompt": "persona as system prompt",
    "canned": "one of the person's sentences to all",
    "retrieval": "the person's nearest sentence",
    "salad": "the person's words in any order",
    "real": "the person's real utterances",
}
SEARCHERS = {"cmaes": "CMA-ES", "tpe": "TPE", "random": "random search"}
FITS = "Fit on held-out prompts"
_ROW = 0.42  # inches


def name_of(condition: str) -> str:
    """Return the words for a condition; "svd@20" is the SVD vectors at layer 20."""
    method, at, layers = condition.partition("@")
    name = NAMES.get(method, method.replace("_", " "))
    return f"{name}, at {layers}" if at else name


def way_of(config: Mapping[str, Any]) -> str:
    """Return the words for the directions of a run and how they were searched."""
    return name_of(config["method"]).replace("CMA-ES", SEARCHERS[config["searcher"]])


def render_search(run: Run) -> Picture:
    """Return the values of all candidates by generation, the held-out fits, and the weights."""
    generations, rows = run.read("generations"), rows_of(run)
    if not generations or not rows:
        raise UserError(f"{run.folder} holds no finished search")
    config = run.record["config"]
    fits = condition_fits(rows, limits_of(run))
    figure = draw.new_figure(14.2, 4.5)
    history, found, mix = (
        draw.add_axes(figure, (left, 0.95, width, 2.6), title=title, x=x)
        for left, width, title, x in (
            (0.62, 3.4, "Value on training prompts", "generation"),
            (6.6, 2.3, FITS, ""),
            (11.6, 2.2, "Weights of the mean", ""),
        )
    )
    panels = [_history(history, generations), _fits(found, fits), _weights(mix, rows)]
    note = (
        f"Search: {len(config['prompts'])} training prompts, judge {config['judge']} of training "
        f"conversations. Held-out: {fits[0].fit.n_questions} other prompts, judge of test "
        f"conversations; bars: 95% bootstrap over prompts. {order_line(fits)}{_hollow(generations)}"
    )
    title = f"{config['persona']}: the search with {way_of(config)}"
    return draw.finish(figure, panels, title=title, note=note)


def render_goal(run: Run) -> Picture:
    """Return the search, the held-out values, scores beside targets, the weights."""
    generations, rows, config = run.read("generations"), run.read("held_out"), run.record["config"]
    if not generations or not rows:
        raise UserError(f"{run.folder} holds no finished search")
    fits = goal_fits(rows, config, limits_of(run))
    traits, several = trait_means(rows), is_front(config)
    mixes = {each["condition"]: each["weights"] for each in rows if each["weights"]}
    mixes.pop(RANDOM_MIX)
    up = max(2.6, _ROW * max(len(fits), *map(len, mixes.values())))
    room = 1.5 if several else 0.0  # of the names beside the front
    figure = draw.new_figure(14.2 + room + 3.1 * len(traits), up + 1.9)
    title, x = ("Candidates", "") if several else ("Value on training prompts", "generation")
    searched = draw.add_axes(figure, (0.62, 0.95, 3.4, up), title=title, x=x)
    panels = [
        _front(searched, generations, rows, config) if several else _history(searched, generations)
    ]
    names = [name_of(each.condition) for each in fits]
    found = draw.add_axes(figure, (6.6 + room, 0.95, 1.9, up), title="Value on held-out prompts")
    panels.append(_levels(found, names, [each.fit for each in fits]))
    for at, (trait, scores) in enumerate(traits.items()):
        place = 10.0 + room + 3.1 * at, 0.95, 1.9, up
        axes = draw.add_axes(figure, place, title=title_of(trait))
        own = [scores.get(each.condition) for each in fits]
        panels.append(_levels(axes, [""] * len(names), own))
        axes.set_xlim(0, 100)
        draw.rule(axes, targets_of(config)[trait], upright=True, dashes=draw.DASHED)
    title = "Weights of the front" if several else "Weights of the mean"
    last = 11.8 + room + 3.1 * len(traits)
    mix = draw.add_axes(figure, (last, 0.95, 2.0, up), title=title)
    panels.append(_front_weights(mix, mixes) if several else _weights(mix, rows))
    front = (
        " Line: what no other candidate that keeps the constraints is nearer than to every target."
    )
    note = (
        f"Search: {len(config['prompts'])} training prompts, judge {judge_of(run, traits)}. "
        f"Held-out: {fits[0].fit.n_questions} other prompts, the same judge; bars: 95% bootstrap "
        f"over prompts. Dashed: the target. Random mixes: another for every prompt."
        f"{front if several else _hollow(generations)}"
    )
    return draw.finish(figure, panels, title=f"A search for {sought(config)}", note=note)


def _front(axes: Axes, generations: Sequence[Row], rows: Sequence[Row], config: Any) -> Panel:
    """Draw how far candidates are from the first two targets; of two, the front as steps."""
    known = [
        (tuple(row["details"]["parts"].values()), row["violation"])
        for row in generations
        if row["value"] is not None
    ]
    kept = [point for point, broken in known if not broken]
    edge = sorted(p for p, on in zip(kept, undominated(kept), strict=True) if on)[::-1]
    steps = [corner for a, b in pairwise(edge) for corner in (a, (b[0], a[1]))] + edge[-1:]
    means = {
        name: tuple(np.nan if each.mean is None else -each.mean for each in by.values())
        for name, by in front_means(rows, config).items()
    }
    drawn = {
        "breaks a constraint": Look(draw.CONTROL, width=0, size=3, alpha=0.35),
        "candidates": Look(draw.CONTROL, width=0, size=3),
        "front": Look(draw.TRAIT, width=1.8 if len(targets_of(config)) == 2 else 0, size=0),
        "front, held-out": Look(draw.COHERENCE, width=0, size=5),
        "unsteered, held-out": Look(draw.INK, width=0, size=5, marker="s"),
    }
    points = (
        [point for point, broken in known if broken],
        kept,
        steps,
        [point for name, point in means.items() if name.startswith("front")],
        [means[UNSTEERED]],
    )
    panel = draw.lines(
        axes,
        [
            Series(name, tuple(-x for x, *_ in own), tuple(-y for _, y, *_ in own), look=look)
            for (name, look), own in zip(drawn.items(), points, strict=True)
            if own
        ],
    )
    (first, x), (second, y) = list(targets_of(config).items())[:2]
    axes.set_xlabel(f"distance from {title_of(first)} {x:g}", fontsize=9, color=draw.MUTED)
    axes.set_ylabel(f"distance from {title_of(second)} {y:g}", fontsize=9, color=draw.MUTED)
    draw.legend(axes, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the points
    return panel


def _levels(axes: Axes, names: Sequence[str], values: Sequence[Interval | None]) -> Panel:
    """Draw a row for every condition, of which only the mixes that were searched are coloured."""
    drawn = [
        draw.series(
            str(at),
            [0.0],
            [each],
            Look(draw.TRAIT if 0 < at < len(values) - 1 else draw.CONTROL, width=2, size=6),
            label=None if each is None else interval(each, 1),
        )
        for at, each in enumerate(values)
    ]
    panel = draw.forest(axes, drawn, upwards=True)
    axes.set_yticklabels(names)
    axes.grid(axis="x", color=draw.FAINT, linewidth=0.7)
    return panel


def render_comparison(run: Run) -> Picture:
    """Return the held-out fit of every method, over personas and for each of them."""
    rows = rows_of(run)
    if not rows:
        raise UserError(f"{run.folder} holds no held-out answers")
    fits = list(condition_fits(rows, limits_of(run), over=over_personas))
    said = order_line(fits)
    fits.sort(key=lambda each: each.fit.mean if each.fit.mean is not None else -np.inf)
    personas = list(dict.fromkeys(row["persona"] for row in rows))
    searched = next((f.condition for f in reversed(fits) if _mixes(rows, f.condition)), None)
    weights = {} if searched is None else _mixes(rows, searched)
    traits = sorted({trait for each in weights.values() for trait in each})
    below = _ROW * len(traits) + 0.9 if weights else 0.0
    bottom, up = 0.85 + below, _ROW * len(fits)
    figure = draw.new_figure(13.6, 1.75 + up + below)
    panels = [_fits(draw.add_axes(figure, (2.6, bottom, 3.2, up), title=FITS), fits, rows)]
    right = draw.add_axes(
        figure, (7.9, bottom, 5.4, up), title="Change from the unsteered model, by persona"
    )
    panels.append(_map(right, _gains(rows, fits, personas), [""] * len(fits), personas))
    if searched is not None:
        title = f"Weights of the mix: {name_of(searched)}"
        axes = draw.add_axes(figure, (7.9, 0.85, 5.4, below - 0.9), title=title)
        mix = [[weights.get(p, {}).get(t, np.nan) for p in personas] for t in traits]
        panels.append(_map(axes, np.array(mix), list(map(title_of, traits)), personas))
    note = (
        "Fit 1–5 on held-out prompts by a judge of held-out conversations. "
        f"{len(personas)} personas; bars: 95% bootstrap over personas; small dots: personas. "
        f"Right: change of the mean fit from the unsteered model. {said}"
    )
    return draw.finish(figure, panels, title="What gives the model a person's voice?", note=note)


def _history(axes: Axes, generations: Sequence[Row]) -> Panel:
    scored = [row for row in generations if row["value"] is not None]
    by_step = grouped(
        sorted(scored, key=lambda row: row["iteration"]), lambda row: int(row["iteration"])
    )
    values = [[row["value"] for row in rows] for rows in by_step.values()]
    steps, means = tuple(by_step), tuple(float(np.mean(each)) for each in values)
    tops = (max(rows, key=_standing) for rows in by_step.values())
    best = tuple(row["value"] for row in accumulate(tops, partial(max, key=_standing)))
    panel = draw.lines(
        axes,
        [
            Series(
                "candidates",
                tuple(row["iteration"] for row in scored),
                tuple(row["value"] for row in scored),
                look=Look(draw.CONTROL, width=0, size=2.2, alpha=0.5, order=1),
                hollow=tuple(row["violation"] > 0 for row in scored),
            ),
            Series("generation's mean", steps, means, look=Look(draw.COHERENCE)),
            Series("best so far", steps, best, look=Look(draw.TRAIT, width=2.2)),
        ],
    )
    draw.legend(axes, loc="lower right")
    return panel


def _hollow(generations: Sequence[Row]) -> str:
    broken = any(row["value"] is not None and row["violation"] for row in generations)
    return " Hollow: candidates that break the constraints." * broken


def _standing(row: Row) -> tuple[float, float]:
    return -row["violation"], row["value"]


def _fits(axes: Axes, fits: Sequence[ConditionFit], rows: Sequence[Row] = ()) -> Panel:
    """Draw the fit of every condition, with the mean of every persona where rows are given."""
    drawn = []
    for each in fits:
        name = name_of(each.condition)
        colour = draw.CONTROL if each.condition in ("none", *BOUNDS) else draw.TRAIT
        means, dots = _persona_means(rows, each.condition), Look(colour, size=1.6, alpha=0.35)
        label = None if each.fit.mean is None else interval(each.fit, 2)
        drawn += [
            draw.series(name, [0.0], [each.fit], Look(colour, width=2, size=6), label=label),
            Series(name, (), means, look=dots),
        ]
    axes.set_xlim(1, 5)
    axes.set_xticks([1, 2, 3, 4, 5])
    panel = draw.forest(axes, drawn, upwards=True)
    axes.grid(axis="x", color=draw.FAINT, linewidth=0.7)
    return panel


def _persona_means(rows: Sequence[Row], condition: str) -> tuple[float, ...]:
    own = [row for row in rows if row["condition"] == condition and row["score"] is not None]
    by_persona = grouped(own, lambda row: row["persona"])
    return tuple(float(np.mean([row["score"] for row in each])) for each in by_persona.values())


def _weights(axes: Axes, rows: Sequence[Row]) -> Panel:
    mixes = (row["weights"] for row in rows if row["condition"] == "mean")
    weights = sorted(next(mixes, {}).items(), reverse=True)
    drawn = Series("weights", tuple(range(len(weights))), tuple(value for _, value in weights))
    return draw.bars(axes, drawn, [title_of(trait) for trait, _ in weights])


def _front_weights(axes: Axes, mixes: Mapping[str, Mapping[str, float]]) -> Panel:
    values = np.array([list(each.values()) for each in mixes.values()])
    traits = tuple(map(title_of, next(iter(mixes.values()))))
    return _map(axes, values, list(map(name_of, mixes)), traits)


def _mixes(rows: Sequence[Row], condition: str) -> Mapping[str, Mapping[str, float]]:
    """Return the weights of a searched mix by persona; nothing for what was not searched."""
    if condition == "equal":
        return {}
    return {
        row["persona"]: row["weights"]
        for row in rows
        if row["condition"] == condition and row["weights"]
    }


def _gains(rows: Sequence[Row], fits: Sequence[ConditionFit], personas: Sequence[str]) -> Array:
    """Return the change from the unsteered model, ``[conditions, personas]``."""
    by_persona = [
        {
            each.condition: None if each.difference is None else each.difference.mean
            for each in fits_over_prompts([r for r in rows if r["persona"] == persona], "none")
        }
        for persona in personas
    ]
    gains = [[own.get(each.condition) for own in by_persona] for each in fits]
    return np.array(gains, dtype=float)  # None becomes NaN


def _map(axes: Axes, values: Array, names: Sequence[str], personas: Sequence[str]) -> Panel:
    reach = max(float(np.nanmax(np.abs(values), initial=0.0)), 0.1)
    cells = Cells(values, tuple(names), tuple(map(_tag, personas)), low=-reach, high=reach)
    panel = draw.heat_map(
        axes, cells, say=lambda row, column, value: number(value, 1), size=8, upwards=True
    )
    axes.set_ylim(-0.6, len(names) - 0.4)  # as the forest beside it
    return panel


def _tag(persona: str) -> str:
    """Return what tells an id from others: "101_A" of "episode-000101_A"."""
    return persona.rpartition("-")[2].lstrip("0") or persona
