"""Steering vectors as pictures: cosines between them at a layer, over layers, and separation.

Draws values; refuses to know a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from matplotlib import colormaps

from persona_lora.core.errors import UserError
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.report.figures import (
    DOTTED,
    PALETTE,
    ZERO,
    Cells,
    Look,
    Panel,
    Picture,
    Series,
    add_axes,
    finish,
    heat_map,
    lines,
    new_figure,
    short,
)
from persona_lora.report.wording import number

_CELL = 0.62  # inches
Vectors = Mapping[str, SteeringVector]


def render_cosines(vectors: Vectors, layer: int) -> Picture:
    """Return the matrix of cosines between vectors at one layer."""
    names = tuple(vectors)
    if len(names) < 2:
        raise UserError("a cosine matrix needs at least two vectors")
    for vector in vectors.values():
        vector.at([layer])
    matrix = np.array(
        [[vectors[one].cosine(vectors[other])[layer] for other in names] for one in names]
    )
    side = _CELL * len(names)
    margin = 0.085 * max(map(len, names)) + 0.35
    below = 0.75 * margin
    figure = new_figure(max(margin + side + 0.5, 4.2), side + below + 0.75)
    axes = add_axes(figure, (margin, below, side, side))
    drawn = heat_map(axes, Cells(matrix, names, names, colours=colormaps["RdBu_r"]), slanted=True)
    title = f"Cosines at layer {layer}"
    return finish(figure, [Panel(title, drawn)], title=title)


def render_vectors_over_layers(vectors: Vectors) -> Picture:
    """Return the norm of each vector, and the cosine of each pair, over layers."""
    if not vectors:
        raise UserError("there is no vector to plot")
    pairs = {
        f"{one} · {other}": vectors[one].cosine(vectors[other])
        for one, other in combinations(vectors, 2)
    }
    shown = dict(list(pairs.items())[: len(PALETTE)])
    left_out = len(pairs) - len(shown)
    note = f", {left_out} pairs left out" if left_out else ""
    figure = new_figure(12.4, 4.1)
    panels = []
    for left, title, curves, digits in (
        (0.6, "Length ‖v‖", {name: vector.norms() for name, vector in vectors.items()}, 1),
        (6.1, f"Cosine of each pair{note}", shown, 2),
    ):
        axes = add_axes(figure, (left, 0.62, 3.4, 2.5), title=title, x="layer")
        if curves is shown:
            axes.set_ylim(-1.05, 1.05)
        drawn = [
            _over_layers(at, name, values, digits)
            for at, (name, values) in enumerate(curves.items())
        ]
        panels.append(Panel(title, lines(axes, drawn, labels=8.0)))
    return finish(figure, panels, title="Steering vectors over layers")


def render_separation(rows: Sequence[Mapping[str, Any]]) -> Picture:
    """Return the AUC of every vector over layers, from the rows of ``separation.jsonl``."""
    if not rows:
        raise UserError("there are no rows of separation to plot")
    figure = new_figure(7.6, 3.9)
    axes = add_axes(figure, (0.6, 0.62, 4.6, 2.4), x="layer")
    axes.axhline(0.5, **{**ZERO, "linestyle": DOTTED})
    axes.set_ylim(0.3, 1.03)
    drawn = []
    for at, name in enumerate(dict.fromkeys(str(row["vector"]) for row in rows)):
        own = sorted((r for r in rows if r["vector"] == name), key=lambda row: row["layer"])
        bounds = [tuple(float(row[side]) for row in own) for side in ("low", "high")]
        values = {int(row["layer"]): float(row["auc"]) for row in own}
        drawn.append(_over_layers(at, name, values, 2, *bounds))
    title = "Do projections tell labelled answers apart? (AUC)"
    return finish(figure, [Panel(title, lines(axes, drawn, labels=8.0))], title=title)


def _over_layers(
    at: int,
    name: str,
    values: Mapping[int, float],
    digits: int,
    low: tuple[float, ...] = (),
    high: tuple[float, ...] = (),
) -> Series:
    layers = sorted(values)
    y = tuple(float(values[layer]) for layer in layers)
    look = Look(PALETTE[at % len(PALETTE)], width=1.7)
    return Series(name, tuple(layers), y, low, high, look, f"{short(name)} {number(y[-1], digits)}")
