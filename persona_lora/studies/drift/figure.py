"""Drift as pictures: a finetune over its checkpoints, across finetunes, in weight space, predicted
and prevented.

Draws what ``read`` and ``read_prediction`` say; refuses to compute statistics of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from persona_lora.core.chat import COHERENCE
from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.report import figures as draw
from persona_lora.report.comparisons import PROBE, TaskScore, probed
from persona_lora.report.figures import Cells, Inches, Look, Panel, Picture, Series
from persona_lora.report.scores import Row, grouped
from persona_lora.report.trust import judges_behind
from persona_lora.report.wording import (
    CLEAR,
    judged_by,
    number,
    p_value,
    percent,
    short_paths,
    title_of,
)
from persona_lora.studies.drift.read import (
    Agreement,
    CrossPoint,
    Curve,
    agreements,
    correlation,
    cross_persona,
    curves,
    paired,
)
from persona_lora.studies.drift.read_diagnosis import Alarm, read_diagnosis
from persona_lora.studies.drift.read_prediction import (
    DISTANCE,
    DOSE,
    FROM_CONTROL,
    POOLED,
    SHARED,
    TEXT,
    Prediction,
    changes,
    predict,
)

_PANEL, _HEIGHT, _LEFT, _GAP = 3.0, 2.35, 0.62, 1.75  # inches
_ROW = _HEIGHT + 1.2


# -- a finetune over its checkpoints -----------------------------------------------------------


def render_checkpoints(run: Run) -> Picture:
    """Return a row for every judged trait: scores, projections, and one against the other."""
    every, agreeing = curves(run), agreements(run)
    traits = list(dict.fromkeys(curve.trait for curve in every))
    height = len(traits) * _ROW + 0.75
    figure = draw.new_figure(_LEFT + 3 * _PANEL + 2 * _GAP + 2.6, height)
    panels = []
    for index, trait in enumerate(traits):
        bottom = height - 0.75 - (index + 1) * _ROW + 0.72
        titles = {
            f"{title_of(trait)}: judged": "step",
            "Shift along each vector": "step",
            "Score against projection": "mean projection of the answers",
        }
        places = [(_LEFT + at * (_PANEL + _GAP), bottom, _PANEL, _HEIGHT) for at in range(3)]
        scores, shifts, against = (
            draw.add_axes(figure, place, title=title, x=x)
            for place, (title, x) in zip(places, titles.items(), strict=True)
        )
        of = grouped([each for each in every if each.trait == trait], lambda each: each.statistic)
        panels += [
            _scores(scores, of),
            _shifts(shifts, of.get("shift", [])),
            _against(against, of, [each for each in agreeing if each.trait == trait]),
        ]
    tuned = run.record["config"].get("finetuned_on")
    title = f"A finetune on {tuned}" if tuned else "A finetune"
    note = "Bands: 95% bootstrap over questions. Shift: finetuned minus base on the same tokens."
    note += judged_by(judges_behind(run, *traits, COHERENCE))
    return draw.finish(figure, panels, title=f"{title}, checkpoint by checkpoint", note=note)


def _scores(axes: Axes, of: Mapping[str, Sequence[Curve]]) -> Panel:
    draw.score_scale(axes)
    traits = [(title_of(curve.trait), curve, draw.TRAIT) for curve in of.get("trait", ())]
    sense = [("Coherence", curve, draw.COHERENCE) for curve in of.get("coherence", ())]
    drawn = [
        _over_steps(curve, name, Look(colour, size=4.5)).labelled(0)
        for name, curve, colour in (*traits, *sense)
    ]
    return draw.lines(axes, drawn, labels=8.5)


def _shifts(axes: Axes, shifts: Sequence[Curve]) -> Panel:
    draw.rule(axes, 0, dashes=draw.DOTTED)
    if not shifts:
        axes.text(0.5, 0.5, "no vectors", transform=axes.transAxes, ha="center", color=draw.MUTED)
    drawn = [
        _over_steps(curve, _name(curve, shifts), Look(size=4.5).apart(at)).labelled(1)
        for at, curve in enumerate(shifts)
    ]
    return draw.lines(axes, drawn, labels=8.0)


def _against(axes: Axes, of: Mapping[str, Sequence[Curve]], agreeing: Sequence[Agreement]) -> Panel:
    """Draw the trait's score against the mean projection over the checkpoints."""
    axes.set_ylim(-2, 102)
    projected = of.get("projection", [])
    drawn = []
    for at, curve in enumerate(projected if "trait" in of else ()):
        look = Look(width=0.9, size=5, alpha=0.85).apart(at)
        found = next(
            each.correlation
            for each in agreeing
            if (each.statistic, each.vector, each.layer)
            == ("projection", curve.vector, curve.layer)
        )
        rho = "no ρ" if found.rho is None else f"ρ {number(found.rho, 2)} (p {p_value(found.p)})"
        name = _name(curve, projected)
        steps, x, y = paired(curve, of["trait"][0])
        marks = tuple(map(str, steps))
        drawn.append(Series(name, tuple(x), tuple(y), look=look, marks=marks))
        if at < 8:
            axes.text(
                *(1.02, 0.98 - 0.09 * at, f"{draw.short(name)}: {rho}, n {found.n}"),
                transform=axes.transAxes,
                fontsize=7.2,
                color=look.colour,
                va="top",
            )
    return draw.scatter(axes, drawn, marks=6.8)


def _over_steps(curve: Curve, name: str, look: Look) -> Series:
    return draw.series(name, [point.step for point in curve.points], curve.points, look)


def _name(curve: Curve, among: Sequence[Curve]) -> str:
    """Return a vector's name, with its layer where several layers are shown."""
    name = str(curve.vector).rpartition("/")[2].replace("_response_avg", "")
    return name if len({each.layer for each in among}) == 1 else f"{name} at {curve.layer}"


# -- across finetunes --------------------------------------------------------------------------


def render_cross_persona(runs: Sequence[Run]) -> Picture:
    """Return cosine against the change of another trait's score, and against the shift on it."""
    points = cross_persona(runs)
    if not points:
        raise UserError(
            "no finetune was judged on another trait that has a vector; nothing to plot"
        )
    figure = draw.new_figure(10.2, 4.6)
    axes = {"score": "change of the other trait's score", "shift": "shift on the other's vector"}
    panels = [
        _cross(figure, (0.75 + at * 4.85, 0.95, 3.9, 2.75), points, name, axis)
        for at, (name, axis) in enumerate(axes.items())
    ]
    note = "Each point: a finetune → another trait. Across: cosine between the two traits' vectors."
    return draw.finish(figure, panels, title="What a finetune does to other traits", note=note)


def _cross(
    figure: Figure, inches: Inches, points: Sequence[CrossPoint], name: str, axis: str
) -> Panel:
    known = [(p, getattr(p, name)) for p in points if getattr(p, name) is not None]
    x, y = tuple(point.cosine for point, _ in known), tuple(value for _, value in known)
    found = correlation(x, y)
    text = f"ρ {number(found.rho, 2)}, p {p_value(found.p)}" if found.rho is not None else "no ρ"
    reason = "" if found.reason is None else f" ({found.reason})"
    title = f"{text}{reason}, n {found.n}"
    axes = draw.add_axes(figure, inches, title=title, x="cosine of the vectors", y=axis, size=9)
    names = tuple(f"{point.finetuned_on} → {point.other}" for point, _ in known)
    panel = draw.scatter(axes, [Series(name, x, y, look=Look(width=0, size=6), marks=names)])
    axes.margins(0.12)
    low, high = axes.get_xlim()
    middle, half = (low + high) / 2, max((high - low) / 2, 0.1)
    axes.set_xlim(middle - half, middle + 1.7 * half)  # room for the names of the points
    draw.rule(axes, 0, dashes=draw.DOTTED)
    return panel


# -- while training ----------------------------------------------------------------------------


def draw_drift(folder: Path) -> None:
    """Draw ``drift.jsonl`` as ``drift.png`` beside it; nothing where no monitor watched."""
    rows = Run(folder).read("drift")
    if rows:
        render_drift(rows).save(folder / "drift.png")


def render_drift(rows: Sequence[Row]) -> Picture:
    """Return the coordinate along every direction against the step."""
    figure = draw.new_figure(8.4, 4.2)
    axes = draw.add_axes(figure, (0.75, 0.85, 5.3, 2.55), x="step")
    draw.rule(axes, 0)
    look = Look(width=1.5, size=3.5)
    drawn = draw.series_by(rows, "diff", "step", "coordinate", look, name=title_of)
    panel = draw.lines(axes, [each.labelled(2) for each in drawn], labels=8.5)
    geometry = rows[-1].get("geometry", "plain")  # older rows do not say it
    note = f"Coordinate ⟨ΔW, L⟩/‖L‖ of the growing LoRA, {geometry}."
    return draw.finish(figure, [panel], title="Drift along persona directions", note=note)


# -- in weight space ---------------------------------------------------------------------------


def render_weight_projection(record: Row) -> Picture:
    """Return bars by layer (last finetune), a heat map of finetunes × diffs, and the way there."""
    rows = [row for row in record["rows"] if row["geometry"] == record["geometry"]]
    finetunes = list(dict.fromkeys(row["finetuned"] for row in rows))
    diffs = list(dict.fromkeys(row["diff"] for row in rows))
    height = 2.65 + 0.42 * max(len(diffs), 5)
    figure = draw.new_figure(14.4, height)
    axes = draw.add_axes(figure, (0.75, 1.4, 5.2, height - 2.3), title="By layer", x="layer")
    last = [r for r in rows if r["part"] == "layer" and r["finetuned"] == finetunes[-1]]
    by_layer = [
        replace(each, label=each.name)
        for each in draw.series_by(last, "diff", "of", "coordinate", Look(), name=draw.short_title)
    ]
    draw.rule(axes, 0)
    panels = [
        draw.bars(axes, by_layer[0]) if len(diffs) == 1 else draw.lines(axes, by_layer, labels=8.5),
        _totals(figure, (9.2, 1.4, 4.9, height - 2.3), rows, finetunes, diffs),
    ]
    note = (
        f"Coordinate ⟨ΔW, L⟩/‖L‖, {record['geometry']}. Left: by layer. Right: in total; an "
        "asterisk has p < 0.05 (Holm) against directions of the same inputs, turned at random."
    )
    title = f"How far {short_paths(finetunes)[finetunes[-1]]} moved along each direction"
    return draw.finish(figure, panels, title=title, note=note)


def _totals(
    figure: Figure,
    inches: Inches,
    rows: Sequence[Row],
    finetunes: Sequence[str],
    diffs: Sequence[str],
) -> Panel:
    steps = {row["finetuned"]: row["step"] for row in rows}
    by_step = None not in steps.values() and len({Path(each).parent for each in finetunes}) == 1
    total = {(row["diff"], row["finetuned"]): row for row in rows if row["part"] == "total"}
    table = [[total[diff, tuned] for tuned in finetunes] for diff in diffs]
    values = np.array([[row["coordinate"] for row in line] for line in table])
    reach = max(float(np.abs(values).max()), 1e-12)

    def say(line: int, column: int, value: float) -> str:
        p = table[line][column]["p_holm"]
        return f"{number(value, 2)}{'*' if p is not None and p < CLEAR else ''}"

    short = steps if by_step else short_paths(finetunes)
    names = tuple(str(short[tuned]).replace("/", "/\n") for tuned in finetunes)
    cells = Cells(values, _titles(diffs), names, low=-reach, high=reach)
    axes = draw.add_axes(figure, inches, title="In total, by step" if by_step else "In total")
    return draw.heat_map(axes, cells, say=say, slanted=not by_step and len(names) > 2)


def _titles(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(map(draw.short_title, names))


# -- predicted ---------------------------------------------------------------------------------

_BESIDE, _BLOCK = 3, (4.2, 6.4)  # kinds in a line; inches of one
_PROJECTED = "projection on its own direction"
_MEASURED = {  # what is not a projection on the judged trait's own direction
    DISTANCE: "norm of the change of weights",
    FROM_CONTROL: "norm of the difference from its control",
    SHARED: "mean projection on all directions",
    TEXT: "mean score of the answers trained on",
    DOSE: "answers trained on",
}


def render_prediction(judged: Sequence[Row], predictors: Sequence[Row]) -> Picture:
    """Return for every kind of predictor the scatter of own directions and the matrix of r."""
    found = predict(judged, predictors)
    kinds = list(dict.fromkeys(each.kind for each in found))
    across, up = _BLOCK
    lines = -(-len(kinds) // _BESIDE)
    figure = draw.new_figure(0.9 + min(_BESIDE, len(kinds)) * across + 0.6, lines * up + 1.0)
    drift = changes(judged)
    panels = []
    for at, kind in enumerate(kinds):
        line, column = divmod(at, _BESIDE)
        left, bottom = 0.9 + column * across, 0.9 + (lines - 1 - line) * up
        own = [row for row in predictors if row["kind"] == kind]
        mine = [each for each in found if each.kind == kind]
        panels += [
            _predicted(figure, (left, bottom + 3.1, 3.2, 2.3), own, drift, mine),
            _matrix(figure, (left + 0.5, bottom, 2.7, 2.2), mine),
        ]
    note = (
        "Dots: change of the judged trait against what stands below them, a dot a finetune. "
        "Squares: Pearson's r of every judged trait (rows) with that of every direction."
    )
    if any(row.get("control") for row in judged):
        note += " Of every finetune its control is taken off, from the change and what is below."
    note += judged_by(*(row.get("judge", "") for row in judged))
    title = "Do projections predict what finetuning does to character?"
    return draw.finish(figure, panels, title=title, note=note)


def _predicted(
    figure: Figure,
    inches: Inches,
    rows: Sequence[Row],
    drift: Mapping[str, Mapping[str, float]],
    found: Sequence[Prediction],
) -> Panel:
    pooled = next(each for each in found if each.judged == POOLED)
    title = f"{pooled.kind}: pooled r {pooled.said}"
    x, y = _MEASURED.get(pooled.kind, _PROJECTED), "change of the judged score"
    axes = draw.add_axes(figure, inches, title=title, x=x, y=y, size=10)
    drawn = []
    for at, (trait, by_finetune) in enumerate(drift.items()):
        own = {row["finetune"]: row["value"] for row in rows if row["direction"] == trait}
        names = sorted(set(own) & set(by_finetune))
        values, moved = (tuple(of[name] for name in names) for of in (own, by_finetune))
        look = Look(width=0, size=3.9, alpha=0.85).apart(at)
        drawn.append(Series(draw.short_title(trait), values, moved, look=look))
    draw.rule(axes, 0)
    panel = draw.scatter(axes, drawn)
    draw.legend(axes)
    return panel


def _matrix(figure: Figure, inches: Inches, found: Sequence[Prediction]) -> Panel:
    r = {(e.judged, e.direction): e.r for e in found if e.judged != POOLED}
    judged, directions = (tuple(dict.fromkeys(place[at] for place in r)) for at in (0, 1))
    values = np.array([[r[one, other] for other in directions] for one in judged])
    below = tuple(each.replace(" ", "\n") for each in _titles(directions))
    cells = Cells(values, _titles(judged), below)
    return draw.heat_map(draw.add_axes(figure, inches), cells)


# -- prevented ---------------------------------------------------------------------------------


def render_prevention(scores: Sequence[TaskScore], trait: str) -> Picture:
    """Return a panel for each measure, a row for each model; the first model is the line."""
    if not scores:
        raise UserError("there are no scores to draw")
    models = list(dict.fromkeys(each.condition for each in scores))
    measures = dict.fromkeys((each.task, each.metric) for each in scores)
    tasks = [task for task, _ in measures]
    lines = list(grouped(measures, lambda each: probed(each[0], tasks)).items())
    up = 0.3 * len(models)
    across = max(len(line) for _, line in lines)
    figure = draw.new_figure(2.3 + across * 2.15 + 0.15, len(lines) * (up + 0.75) + 1.0)
    panels = []
    for down, (behaviour, line) in enumerate(reversed(lines)):
        for at, (task, metric) in enumerate(line):
            inches = (2.3 + at * 2.15, 0.75 + down * (up + 0.75), 1.9, up)
            title = _measure_title(task, metric, trait)
            axes = draw.add_axes(figure, inches, title=title, size=9.5)
            own = {e.condition: e for e in scores if (e.task, e.metric) == (task, metric)}
            rows = [_model_row(name, own.get(name), models[0]) for name in models]
            plain = own[models[0]].score.mean if models[0] in own else None
            draw.rule(axes, plain, upright=True, dashes=draw.DASHED)
            panels.append(draw.forest(axes, rows, named=at == 0))
            axes.tick_params(axis="x", labelsize=8)
            if behaviour:
                axes.set_xlim(-4, 104)
    note = (
        "Mean and 95% interval over items, and over training seeds where there are several. "
        f"The dashed line is {models[0]}; filled dots differ from it (Holm, p < 0.05)."
        + judged_by(*(each.judge for each in scores))
    )
    return draw.finish(figure, panels, title="What prevention buys, and what it costs", note=note)


def _measure_title(task: str, metric: str, trait: str) -> str:
    if metric != "score":
        return f"{task} ({metric})"
    behaviour, comma, probe = task.partition(PROBE)
    named = title_of(trait) if behaviour == "trait" else behaviour.replace("_", " ")
    return f"{named}{comma}{probe}"


def _model_row(name: str, each: TaskScore | None, reference: str) -> Series:
    look = Look(draw.CONTROL if name == reference else draw.TRAIT, width=1.6, size=5.5)
    clear = each is not None and each.p_holm is not None and each.p_holm < CLEAR
    score = None if each is None else each.score
    return draw.series(name, [0.0], [score], look, hollow=(not clear and name != reference,))


# -- diagnosed ---------------------------------------------------------------------------------


def render_diagnosis(run: Run) -> Picture:
    """Return the traits against their thresholds, and where the change sits."""
    found, shares = read_diagnosis(run), run.read("shares")
    up = 0.45 + 0.42 * max(len(found.alarms), 5)
    figure = draw.new_figure(14.6, up + 1.85)
    axes = draw.add_axes(figure, (1.9, 0.95, 4.1, up), title="Traits", x="coordinate")
    draw.rule(axes, 0, upright=True)
    panels = [draw.forest(axes, [row for each in found.alarms for row in _alarm_rows(each)])]
    layers = [row for row in shares if row["part"] == "layer" and row["of"] != "elsewhere"]
    axes = draw.add_axes(figure, (7.1, 0.95, 3.6, up), title="Share of ‖ΔW‖², %", x="layer")
    x, y = ([row[key] for row in layers] for key in ("of", "share"))
    panels.append(draw.bars(axes, Series("layers", tuple(x), tuple(100 * each for each in y))))
    kinds = sorted((r for r in shares if r["part"] == "kind"), key=lambda row: row["share"])
    axes = draw.add_axes(figure, (12.1, 0.95, 2.2, up), title="by kind of module")
    y = [100 * row["share"] for row in kinds]
    panels.append(draw.bars(axes, Series("kinds", (), tuple(y)), [row["of"] for row in kinds]))
    axes.set_xlim(0, 1.35 * max([*y, 1.0]))
    note = "Weighted by the base model's inputs. Grey bars: " + (
        "the null's threshold, which is no alarm: every real finetune that was measured lies "
        "outside it."
        if found.any_false is None
        else "as far as another control may lie; grey dots: each control, less the mean of the "
        "others."
    )
    outside = sum(row["share"] for row in shares if row["of"] == "elsewhere")
    if outside:
        note += f" {percent(outside)} of ‖ΔW‖² lies in no layer."
    return draw.finish(figure, panels, title="What this finetune did", note=note)


def _alarm_rows(each: Alarm) -> list[Series]:
    usual = Look(draw.FAINT, width=9, size=0)
    controls = Look(draw.CONTROL, width=0, size=3.5)
    look = Look(draw.COHERENCE if each.flagged else draw.TRAIT, width=1.6, size=6)
    name, own = draw.short_title(each.trait), each.coordinate
    t, half = each.threshold, each.half or 0.0
    return [
        Series(name, (), (0.0,), (-t,), (t,), usual),
        Series(name, (), each.controls, look=controls),
        Series(name, (), (own,), (own - half,), (own + half,), look, number(own, 3)),
    ]
