"""Drift as pictures: a finetune over its checkpoints, across finetunes, in weight space, predicted
and prevented.

Draws what ``read`` and ``read_prediction`` say; refuses to compute statistics of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.report.comparisons import TaskScore
from persona_lora.report.figures import (
    COHERENCE,
    CONTROL,
    DASHED,
    DOTTED,
    MUTED,
    PALETTE,
    TRAIT,
    ZERO,
    Cells,
    Look,
    Panel,
    Picture,
    Series,
    add_axes,
    bars,
    finish,
    forest,
    heat_map,
    legend,
    lines,
    new_figure,
    scatter,
    score_scale,
    series,
    short,
)
from persona_lora.report.wording import CLEAR, number, p_value, title_of
from persona_lora.studies.drift.read import (
    Agreement,
    CrossPoint,
    Curve,
    agreements,
    correlation,
    cross_persona,
    curves,
)
from persona_lora.studies.drift.read_prediction import POOLED, Prediction, changes, predict

Row = Mapping[str, Any]
_PANEL, _HEIGHT, _LEFT, _GAP = 3.0, 2.35, 0.62, 1.75  # inches
_ROW = _HEIGHT + 1.2


# -- a finetune over its checkpoints -----------------------------------------------------------


def render_checkpoints(run: Run) -> Picture:
    """Return a row for every judged trait: scores, projections, and one against the other."""
    every, agreeing = curves(run), agreements(run)
    traits = list(dict.fromkeys(curve.trait for curve in every))
    height = len(traits) * _ROW + 0.75
    figure = new_figure(_LEFT + 3 * _PANEL + 2 * _GAP + 2.6, height)
    panels = []
    for index, trait in enumerate(traits):
        bottom = height - 0.75 - (index + 1) * _ROW + 0.72
        places = [(_LEFT + at * (_PANEL + _GAP), bottom, _PANEL, _HEIGHT) for at in range(3)]
        own = [curve for curve in every if curve.trait == trait]
        panels += [
            _scores(figure, places[0], trait, own),
            _shifts(figure, places[1], own),
            _against(figure, places[2], own, [each for each in agreeing if each.trait == trait]),
        ]
    tuned = run.record["config"].get("finetuned_on")
    title = f"A finetune on {tuned}" if tuned else "A finetune"
    note = "Bands: 95% bootstrap over questions. Shift: finetuned minus base on the same tokens."
    return finish(figure, panels, title=f"{title}, checkpoint by checkpoint", note=note)


Inches = tuple[float, float, float, float]


def _scores(figure: Figure, inches: Inches, trait: str, own: Sequence[Curve]) -> Panel:
    title = f"{title_of(trait)}: judged"
    axes = add_axes(figure, inches, title=title, x="step")
    score_scale(axes)
    kinds = {"trait": (title_of(trait), TRAIT), "coherence": ("Coherence", COHERENCE)}
    drawn = [
        _over_steps(curve, name, colour, 0)
        for statistic, (name, colour) in kinds.items()
        for curve in own
        if curve.statistic == statistic
    ]
    return Panel(title, lines(axes, drawn, labels=8.5))


def _shifts(figure: Figure, inches: Inches, own: Sequence[Curve]) -> Panel:
    title = "Shift along each vector"
    axes = add_axes(figure, inches, title=title, x="step")
    axes.axhline(0, **{**ZERO, "linestyle": DOTTED})
    shifts = [curve for curve in own if curve.statistic == "shift"]
    if not shifts:
        axes.text(0.5, 0.5, "no vectors", transform=axes.transAxes, ha="center", color=MUTED)
    drawn = [
        _over_steps(curve, _name(curve, shifts), PALETTE[at % len(PALETTE)], 1)
        for at, curve in enumerate(shifts)
    ]
    return Panel(title, lines(axes, drawn, labels=8.0))


def _against(
    figure: Figure, inches: Inches, own: Sequence[Curve], agreeing: Sequence[Agreement]
) -> Panel:
    """Draw the trait's score against the mean projection over the checkpoints."""
    title = "Score against projection"
    axes = add_axes(figure, inches, title=title, x="mean projection of the answers")
    axes.set_ylim(-2, 102)
    scores = next((curve for curve in own if curve.statistic == "trait"), None)
    projected = [curve for curve in own if curve.statistic == "projection"]
    drawn = []
    for at, curve in enumerate(projected if scores is not None else ()):
        look = Look(PALETTE[at % len(PALETTE)], width=0.9, size=5, alpha=0.85)
        found = next(
            each.correlation
            for each in agreeing
            if (each.statistic, each.vector, each.layer)
            == ("projection", curve.vector, curve.layer)
        )
        rho = "no ρ" if found.rho is None else f"ρ {number(found.rho, 2)} (p {p_value(found.p)})"
        name = _name(curve, projected)
        y = _values(scores) if scores is not None else ()
        steps = tuple(str(point.step) for point in curve.points)
        drawn.append(Series(name, _values(curve), y, look=look, marks=steps))
        if at < 8:
            axes.text(
                *(1.02, 0.98 - 0.09 * at, f"{short(name)}: {rho}, n {found.n}"),
                transform=axes.transAxes,
                fontsize=7.2,
                color=look.colour,
                va="top",
            )
    return Panel(title, scatter(axes, drawn, marks=6.8))


def _over_steps(curve: Curve, name: str, colour: str, digits: int) -> Series:
    last = curve.points[-1].value
    label = None if last is None else f"{short(name)} {number(last, digits)}"
    low, high = _values(curve, "low"), _values(curve, "high")
    steps = tuple(point.step for point in curve.points)
    return Series(name, steps, _values(curve), low, high, Look(colour, size=4.5), label)


def _values(curve: Curve, of: str = "value") -> tuple[float, ...]:
    found = (getattr(point, of) for point in curve.points)
    return tuple(float("nan") if value is None else value for value in found)


def _name(curve: Curve, among: Sequence[Curve]) -> str:
    """Return a vector's name, with its layer where several layers are shown."""
    name = str(curve.vector).rpartition("/")[2].replace("_response_avg", "")
    layers = {each.layer for each in among}
    return name if len(layers) == 1 else f"{name} at {curve.layer}"


# -- across finetunes --------------------------------------------------------------------------


def render_cross_persona(runs: Sequence[Run]) -> Picture:
    """Return cosine against the change of another trait's score, and against the shift on it."""
    points = cross_persona(runs)
    if not points:
        raise UserError(
            "no finetune was judged on another trait that has a vector; nothing to plot"
        )
    figure = new_figure(10.2, 4.6)
    panels = [
        _cross(figure, (0.75 + at * 4.85, 0.95, 3.9, 2.75), points, name, axis)
        for at, (name, axis) in enumerate(
            (
                ("score", "change of the other trait's score"),
                ("shift", "shift on the other's vector"),
            )
        )
    ]
    note = "Each point: a finetune → another trait. Across: cosine between the two traits' vectors."
    return finish(figure, panels, title="What a finetune does to other traits", note=note)


def _cross(
    figure: Figure, inches: Inches, points: Sequence[CrossPoint], name: str, axis: str
) -> Panel:
    known = [(p, getattr(p, name)) for p in points if getattr(p, name) is not None]
    x, y = tuple(point.cosine for point, _ in known), tuple(value for _, value in known)
    found = correlation(x, y)
    text = f"ρ {number(found.rho, 2)}, p {p_value(found.p)}" if found.rho is not None else "no ρ"
    reason = "" if found.reason is None else f" ({found.reason})"
    title = f"{text}{reason}, n {found.n}"
    axes = add_axes(figure, inches, title=title, x="cosine of the vectors", y=axis, size=9)
    names = tuple(f"{point.finetuned_on} → {point.other}" for point, _ in known)
    drawn = scatter(axes, [Series(name, x, y, look=Look(width=0, size=6), marks=names)])
    axes.margins(0.12)
    low, high = axes.get_xlim()
    middle, half = (low + high) / 2, max((high - low) / 2, 0.1)
    axes.set_xlim(middle - half, middle + 1.7 * half)  # room for the names of the points
    axes.axhline(0, **{**ZERO, "linestyle": DOTTED})
    return Panel(title, drawn)


# -- while training ----------------------------------------------------------------------------


def draw_drift(folder: Path) -> None:
    """Draw ``drift.jsonl`` as ``drift.png`` beside it; nothing where no monitor watched."""
    rows = Run(folder).read("drift")
    if rows:
        render_drift(rows).save(folder / "drift.png")


def render_drift(rows: Sequence[Row]) -> Picture:
    """Return the coordinate along every direction against the step."""
    title = "Drift along persona directions"
    figure = new_figure(8.4, 4.2)
    axes = add_axes(figure, (0.75, 0.85, 5.3, 2.55), x="step")
    axes.axhline(0, **ZERO)
    drawn = []
    for at, diff in enumerate(dict.fromkeys(row["diff"] for row in rows)):
        own = [row for row in rows if row["diff"] == diff]
        steps, values = (tuple(row[key] for row in own) for key in ("step", "coordinate"))
        look = Look(PALETTE[at % len(PALETTE)], width=1.5, size=3.5)
        label = f"{short(title_of(diff))} {number(values[-1], 2)}"
        drawn.append(Series(diff, steps, values, look=look, label=label))
    note = "Coordinate ⟨ΔW, L⟩/‖L‖ of the growing LoRA."
    return finish(figure, [Panel(title, lines(axes, drawn, labels=8.5))], title=title, note=note)


# -- in weight space ---------------------------------------------------------------------------


def render_weight_projection(record: Row) -> Picture:
    """Return bars by layer (last finetune), a heat map of finetunes × diffs, and the way there."""
    rows = record["rows"]
    finetunes = list(dict.fromkeys(row["finetuned"] for row in rows))
    diffs = list(dict.fromkeys(row["diff"] for row in rows))
    height = 2.2 + 0.42 * max(len(diffs), 5)
    figure = new_figure(14.4, height)
    last = [row for row in rows if row["finetuned"] == finetunes[-1]]
    axes = add_axes(figure, (0.75, 0.95, 5.2, height - 1.85), title="By layer", x="layer")
    by_layer = [
        _coordinates(at, diff, [r for r in last if (r["part"], r["diff"]) == ("layer", diff)])
        for at, diff in enumerate(diffs)
    ]
    axes.axhline(0, **ZERO)
    drawn = bars(axes, by_layer[0]) if len(diffs) == 1 else lines(axes, by_layer, labels=8.5)
    panels = [
        Panel("By layer", drawn),
        _totals(figure, (9.2, 0.95, 4.9, height - 1.85), rows, finetunes, diffs),
    ]
    note = (
        "Coordinate ⟨ΔW, L⟩/‖L‖. Left: by layer. Right: in total; an asterisk has p < 0.05 (Holm) "
        "against random directions of the same shape and norm."
    )
    title = f"How far {Path(finetunes[-1]).name} moved along each direction"
    return finish(figure, panels, title=title, note=note)


def _coordinates(at: int, diff: str, own: Sequence[Row]) -> Series:
    layers, values = (tuple(row[key] for row in own) for key in ("of", "coordinate"))
    look = Look(PALETTE[at % len(PALETTE)])
    return Series(diff, layers, values, look=look, label=short(title_of(diff)))


def _totals(
    figure: Figure,
    inches: Inches,
    rows: Sequence[Row],
    finetunes: Sequence[str],
    diffs: Sequence[str],
) -> Panel:
    steps = {row["finetuned"]: row["step"] for row in rows}
    title = "In total" if all(step is None for step in steps.values()) else "In total, by step"
    total = {(row["diff"], row["finetuned"]): row for row in rows if row["part"] == "total"}
    table = [[total[diff, tuned] for tuned in finetunes] for diff in diffs]
    values = np.array([[row["coordinate"] for row in line] for line in table])
    reach = max(float(np.abs(values).max()), 1e-12)

    def say(line: int, column: int, value: float) -> str:
        p = table[line][column]["p_holm"]
        return f"{number(value, 2)}{'*' if p is not None and p < CLEAR else ''}"

    names = [Path(tuned).name if steps[tuned] is None else str(steps[tuned]) for tuned in finetunes]
    cells = Cells(values, _short(diffs), tuple(map(short, names)), low=-reach, high=reach)
    return Panel(title, heat_map(add_axes(figure, inches, title=title), cells, say=say))


def _short(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(short(title_of(name)) for name in names)


# -- predicted ---------------------------------------------------------------------------------


def render_prediction(judged: Sequence[Row], predictors: Sequence[Row]) -> Picture:
    """Return for every kind of predictor the scatter of own directions and the matrix of r."""
    found = predict(judged, predictors)
    kinds = list(dict.fromkeys(each.kind for each in found))
    figure = new_figure(0.9 + len(kinds) * 4.2 + 0.6, 7.4)
    drift = changes(judged)
    panels = []
    for at, kind in enumerate(kinds):
        left = 0.9 + at * 4.2
        own = [row for row in predictors if row["kind"] == kind]
        mine = [each for each in found if each.kind == kind]
        panels += [
            _predicted(figure, (left, 4.0, 3.2, 2.3), own, drift, mine),
            _matrix(figure, (left + 0.5, 0.9, 2.7, 2.2), mine),
        ]
    note = (
        "Above: change of the judged trait against the projection on its own direction, one dot a "
        "finetune. Below: Pearson's r of every judged trait (rows) with every direction."
    )
    title = "Do projections predict what finetuning does to character?"
    return finish(figure, panels, title=title, note=note)


def _predicted(
    figure: Figure,
    inches: Inches,
    rows: Sequence[Row],
    drift: Mapping[str, Mapping[str, float]],
    found: Sequence[Prediction],
) -> Panel:
    pooled = next(each for each in found if each.judged == POOLED)
    r = f"{number(pooled.r, 2)} [{number(pooled.r_low, 2)}, {number(pooled.r_high, 2)}]"
    title = f"{pooled.kind}: pooled r {r}"
    axes = add_axes(figure, inches, title=title, y="change of the judged score", size=10)
    drawn = []
    for at, (trait, by_finetune) in enumerate(drift.items()):
        own = {row["finetune"]: row["value"] for row in rows if row["direction"] == trait}
        names = sorted(set(own) & set(by_finetune))
        x, y = (tuple(of[name] for name in names) for of in (own, by_finetune))
        look = Look(PALETTE[at % len(PALETTE)], width=0, size=3.9, alpha=0.85)
        drawn.append(Series(short(title_of(trait)), x, y, look=look))
    axes.axhline(0, **ZERO)
    shown = scatter(axes, drawn)
    legend(axes)
    return Panel(title, shown)


def _matrix(figure: Figure, inches: Inches, found: Sequence[Prediction]) -> Panel:
    r = {(e.judged, e.direction): e.r for e in found if e.judged != POOLED}
    judged, directions = (tuple(dict.fromkeys(place[at] for place in r)) for at in (0, 1))
    values = np.array([[r[one, other] for other in directions] for one in judged])
    cells = Cells(values, _short(judged), _short(directions))
    return Panel(f"r of {found[0].kind}", heat_map(add_axes(figure, inches), cells))


# -- prevented ---------------------------------------------------------------------------------


def render_prevention(scores: Sequence[TaskScore], trait: str) -> Picture:
    """Return a panel for each measure, a row for each model; the first model is the line."""
    if not scores:
        raise UserError("there are no scores to draw")
    models = list(dict.fromkeys(each.condition for each in scores))
    measures = list(dict.fromkeys((each.task, each.metric) for each in scores))
    up = 0.3 * len(models)
    figure = new_figure(2.3 + len(measures) * 2.15 + 0.15, up + 1.75)
    panels = []
    for at, (task, metric) in enumerate(measures):
        names = {"trait": title_of(trait), "coherence": "coherence"}
        title = names.get(task, f"{task} ({metric})")
        axes = add_axes(figure, (2.3 + at * 2.15, 0.75, 1.9, up), title=title, size=9.5)
        own = {e.condition: e for e in scores if (e.task, e.metric) == (task, metric)}
        rows = [_model_row(name, own.get(name), models[0]) for name in models]
        _dashed(axes, own[models[0]].score.mean if models[0] in own else None)
        panels.append(Panel(title, forest(axes, rows, named=at == 0)))
        axes.tick_params(axis="x", labelsize=8)
    note = (
        f"Mean and 95% interval over items. The dashed line is {models[0]}; filled dots differ "
        "from it (Holm, p < 0.05)."
    )
    return finish(figure, panels, title="What prevention buys, and what it costs", note=note)


def _model_row(name: str, each: TaskScore | None, reference: str) -> Series:
    look = Look(CONTROL if name == reference else TRAIT, width=1.6, size=5.5)
    clear = each is not None and each.p_holm is not None and each.p_holm < CLEAR
    score = None if each is None else each.score
    return series(name, [0.0], [score], look, hollow=(not clear and name != reference,))


def _dashed(axes: Axes, at: float | None) -> None:
    if at is not None:
        axes.axvline(at, color=MUTED, linewidth=0.9, linestyle=DASHED)
