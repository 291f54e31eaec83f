"""Steering vectors as pictures: cosines between them at a layer, over layers, and separation.

Draws values; refuses to know a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes

from persona_lora.core.errors import UserError
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.report import figures as draw
from persona_lora.report.figures import Cells, Look, Panel, Picture
from persona_lora.report.scores import Row

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
    figure = draw.new_figure(max(margin + side + 0.5, 4.2), side + below + 0.75)
    axes = draw.add_axes(figure, (margin, below, side, side))
    cells = Cells(matrix, names, names, colours=colormaps["RdBu_r"])
    panel = draw.heat_map(axes, cells, slanted=True)
    return draw.finish(figure, [panel], title=f"Cosines at layer {layer}")


def render_vectors_over_layers(vectors: Vectors) -> Picture:
    """Return the norm of each vector, and the cosine of each pair, over layers."""
    if not vectors:
        raise UserError("there is no vector to plot")
    pairs = {
        f"{one} · {other}": vectors[one].cosine(vectors[other])
        for one, other in combinations(vectors, 2)
    }
    shown = dict(list(pairs.items())[: len(draw.PALETTE)])
    left_out = len(pairs) - len(shown)
    note = f", {left_out} pairs left out" if left_out else ""
    figure = draw.new_figure(12.4, 4.1)
    panels = []
    for left, title, curves, digits in (
        (0.6, "Length ‖v‖", {name: vector.norms() for name, vector in vectors.items()}, 1),
        (6.1, f"Cosine of each pair{note}", shown, 2),
    ):
        axes = draw.add_axes(figure, (left, 0.62, 3.4, 2.5), title=title, x="layer")
        if curves is shown:
            axes.set_ylim(-1.05, 1.05)
        rows = [
            {"name": name, "layer": layer, "value": float(value)}
            for name, values in curves.items()
            for layer, value in values.items()
        ]
        panels.append(_over_layers(axes, rows, "name", "value", digits))
    return draw.finish(figure, panels, title="Steering vectors over layers")


def render_separation(rows: Sequence[Row]) -> Picture:
    """Return the AUC of every vector over layers, from the rows of ``separation.jsonl``."""
    if not rows:
        raise UserError("there are no rows of separation to plot")
    figure = draw.new_figure(7.6, 3.9)
    axes = draw.add_axes(figure, (0.6, 0.62, 4.6, 2.4), x="layer")
    draw.rule(axes, 0.5, dashes=draw.DOTTED)
    axes.set_ylim(0.3, 1.03)
    panel = _over_layers(axes, rows, "vector", "auc", 2, ("low", "high"))
    return draw.finish(figure, [panel], title="Do projections tell labelled answers apart? (AUC)")


def _over_layers(
    axes: Axes, rows: Sequence[Row], by: str, y: str, digits: int, bounds: Sequence[str] = ()
) -> Panel:
    drawn = draw.series_by(rows, by, "layer", y, Look(width=1.7), bounds=bounds)
    return draw.lines(axes, [each.labelled(digits) for each in drawn], labels=8.0)
