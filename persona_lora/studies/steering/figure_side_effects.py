"""Side effects as a picture: other traits as a heat map, everything else as small forests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from matplotlib.axes import Axes

from persona_lora.report import figures as draw
from persona_lora.report import wording
from persona_lora.report.figures import Cells, Look, Panel, Picture, Series
from persona_lora.report.scores import grouped
from persona_lora.studies.steering.figure import COLOURS
from persona_lora.studies.steering.read_side_effects import OTHER, SHORT, Change

ACROSS, WIDE, GAP, LEFT = 3, 2.35, 0.45, 1.6  # panels in a row; inches
ROW = 0.3


def render_side_effects(
    trait: str,
    found: Sequence[Change],
    by_turn: Mapping[str, tuple[Sequence[int], Sequence[float]]] = MappingProxyType({}),
) -> Picture:
    """Return a heat map of methods by other traits, and a forest for each further measure.

    ``by_turn`` holds the turns of conversations and a method's effect in each.
    """
    methods = list(dict.fromkeys(each.method for each in found))
    others = [each for each in found if each.group == OTHER]
    further = grouped((each for each in found if each.group != OTHER), lambda each: each.measure)
    up = ROW * len(methods)
    below = math.ceil((len(further) + bool(by_turn)) / ACROSS) * (up + 0.75)
    height = below + (up + 1.15 if others else 0) + 1.35
    figure = draw.new_figure(LEFT + ACROSS * (WIDE + GAP), height)
    panels, top = [], height - 1.0
    if others:
        across = ACROSS * WIDE + (ACROSS - 1) * GAP
        title = "other traits on their own questions: points more than without steering"
        axes = draw.add_axes(figure, (LEFT, top - up, across, up), title=title, size=9)
        panels.append(_other_traits(axes, others, methods).named("other traits"))
        top -= up + 1.15
    for at, measure in enumerate([*further, *(["effect by turn"] if by_turn else [])]):
        row, column = divmod(at, ACROSS)
        place = (LEFT + column * (WIDE + GAP), top - up - row * (up + 0.75), WIDE, up)
        axes = draw.add_axes(figure, place, title=measure, size=8.5)
        if measure in further:
            panels.append(_forest(axes, further[measure], methods, named=column == 0))
        else:
            panels.append(draw.lines(axes, _curves(by_turn)))
    note = (
        "Every method at the same divergence. Hatched: not clear of chance "
        "(p ≥ 0.05, Holm). Bars: 95% intervals; of random controls over controls as well. Wrong "
        "way: % of questions; everything else is a change from the unsteered model."
        + wording.judged_by(*(each.judge for each in found))
    )
    title = f"{wording.title_of(trait)}: what else steering changes"
    return draw.finish(figure, panels, title=title, note=note)


def _other_traits(axes: Axes, others: Sequence[Change], methods: Sequence[str]) -> Panel:
    names = list(dict.fromkeys(each.measure for each in others))
    values = np.full((len(methods), len(names)), np.nan)
    unclear = np.zeros(values.shape, bool)
    for each in others:
        place = methods.index(each.method), names.index(each.measure)
        mean = None if each.value is None else each.value.mean
        values[place], unclear[place] = np.nan if mean is None else mean, not each.clear
    reach = max(10.0, float(np.nanmax(np.abs(values))))
    rows = tuple(SHORT[each] for each in methods)
    cells = Cells(values, rows, tuple(names), low=-reach, high=reach, hatched=unclear)
    return draw.heat_map(axes, cells, say=lambda *at: wording.number(at[2]), slanted=True)


def _forest(axes: Axes, own: Sequence[Change], methods: Sequence[str], *, named: bool) -> Panel:
    by_method = {each.method: each for each in own}
    drawn = [
        draw.series(
            SHORT[method],
            [0.0],
            [by_method[method].value if method in by_method else None],
            Look(_colour(method), 1.6, 5),
        )
        for method in methods
    ]
    draw.rule(axes, 0.0, upright=True, dashes=draw.DASHED)
    return draw.forest(axes, drawn, named=named)


def _curves(by_turn: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> list[Series]:
    return [
        Series(SHORT[method], tuple(turns), tuple(means), look=Look(_colour(method), 1.4, 2.5))
        for method, (turns, means) in by_turn.items()
    ]


def _colour(method: str) -> str:
    return {**COLOURS, **draw.PROMPTS}[method]
