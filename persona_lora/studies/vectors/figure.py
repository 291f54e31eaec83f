"""Steering vectors as pictures: cosines between them at a layer, over layers, and separation.

Draws values; refuses to know a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes

from persona_lora.core.errors import UserError
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.report.figures import (
    INK,
    MUTED,
    Label,
    add_axes,
    new_figure,
    place_labels,
    png_of,
    short,
    style_axes,
    write_line,
    written,
)
from persona_lora.report.wording import number

_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#3b3f45")
_MOST_LINES = 7
_CELL = 0.62  # inches
Vectors = Mapping[str, SteeringVector]


def plot_cosines(vectors: Vectors, layer: int, path: Path) -> bytes:
    """Draw the cosine matrix at a layer, write the PNG to ``path`` and return its bytes."""
    return written(render_cosines(vectors, layer), path)


def plot_vectors_over_layers(vectors: Vectors, path: Path) -> bytes:
    """Draw norms and cosines over layers, write the PNG to ``path`` and return its bytes."""
    return written(render_vectors_over_layers(vectors), path)


def render_cosines(vectors: Vectors, layer: int) -> bytes:
    """Return the matrix of cosines between vectors at one layer, as PNG."""
    names = list(vectors)
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
    axes.imshow(matrix, cmap=colormaps["RdBu_r"], vmin=-1, vmax=1)
    for row, column in np.ndindex(matrix.shape):
        value = float(matrix[row, column])
        axes.text(
            column, row, number(value, 2), ha="center", va="center", fontsize=8.5,
            color="white" if abs(value) > 0.6 else INK,
        )  # fmt: skip
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8.5)
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.tick_params(length=0, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    write_line(figure, side + below + 0.35, f"Cosines at layer {layer}", size=13, bold=True)
    return png_of(figure)


def render_vectors_over_layers(vectors: Vectors) -> bytes:
    """Return the norm of each vector, and the cosine of each pair, over layers, as PNG."""
    if not vectors:
        raise UserError("there is no vector to plot")
    figure = new_figure(12.4, 4.1)
    norms, cosines = (add_axes(figure, (left, 0.62, 3.4, 2.5)) for left in (0.6, 6.1))
    _lines(norms, {name: vector.norms() for name, vector in vectors.items()}, digits=1)
    norms.set_title("Length ‖v‖", loc="left", fontsize=10.5, color=INK)
    pairs = {
        f"{one} · {other}": vectors[one].cosine(vectors[other])
        for one, other in combinations(vectors, 2)
    }
    _lines(cosines, dict(list(pairs.items())[:_MOST_LINES]), digits=2)
    cosines.set_ylim(-1.05, 1.05)
    left_out = max(0, len(pairs) - _MOST_LINES)
    note = f", {left_out} pairs left out" if left_out else ""
    cosines.set_title(f"Cosine of each pair{note}", loc="left", fontsize=10.5, color=INK)
    write_line(figure, 3.62, "Steering vectors over layers", size=13, bold=True)
    return png_of(figure)


def render_separation(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the AUC of every vector over layers, from the rows of ``separation.jsonl``."""
    if not rows:
        raise UserError("there are no rows of separation to plot")
    figure = new_figure(7.6, 3.9)
    axes = add_axes(figure, (0.6, 0.62, 4.6, 2.4))
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        curves.setdefault(str(row["vector"]), {})[int(row["layer"])] = float(row["auc"])
    for index, name in enumerate(curves):
        own = sorted((r for r in rows if r["vector"] == name), key=lambda r: r["layer"])
        axes.fill_between(
            [r["layer"] for r in own], [r["low"] for r in own], [r["high"] for r in own],
            color=_LINES[index % len(_LINES)], alpha=0.13, linewidth=0,
        )  # fmt: skip
    axes.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
    _lines(axes, curves, digits=2)
    axes.set_ylim(0.3, 1.03)
    title = "Do projections tell labelled answers apart? (AUC)"
    write_line(figure, 3.42, title, size=13, bold=True)
    return png_of(figure)


def _lines(axes: Axes, curves: Mapping[str, Mapping[int, float]], *, digits: int) -> None:
    """Draw each curve over layers, with its name and last value at its end."""
    labels = []
    for index, (name, values) in enumerate(curves.items()):
        colour = _LINES[index % len(_LINES)]
        layers = sorted(values)
        axes.plot(layers, [values[layer] for layer in layers], color=colour, linewidth=1.7)
        last = values[layers[-1]]
        labels.append(Label(last, f"{short(name)} {number(last, digits)}", colour))
    style_axes(axes)
    axes.set_xlabel("layer", fontsize=9, color=MUTED)
    axes.autoscale_view()
    place_labels(axes, labels, size=8.0)
