"""Projections in weight space as a picture: by layer for every direction, and over checkpoints.

Draws rows that were computed elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

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
from persona_lora.report.wording import number, title_of

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#3b3f45")
_PANEL = 5.6


def plot_weight_projection(record: Mapping[str, Any], path: Path) -> bytes:
    """Draw a projection's record, write it to ``path`` as PNG and return the same bytes."""
    return written(render_weight_projection(record), path)


def render_weight_projection(record: Mapping[str, Any]) -> bytes:
    """Return bars by layer (last finetune), a heat map of finetunes × diffs, and the way there."""
    rows = record["rows"]
    finetunes = list(dict.fromkeys(row["finetuned"] for row in rows))
    diffs = list(dict.fromkeys(row["diff"] for row in rows))
    height = 2.2 + 0.42 * max(len(diffs), 5)
    figure = new_figure(14.4, height)
    up = height - 1.85
    last = [row for row in rows if row["finetuned"] == finetunes[-1]]
    _draw_layers(add_axes(figure, (0.75, 0.95, _PANEL - 0.4, up)), last, diffs)
    right = add_axes(figure, (9.2, 0.95, 4.9, up))
    _draw_totals(right, rows, finetunes, diffs)
    name = Path(finetunes[-1]).name
    title = f"How far {name} moved along each direction"
    write_line(figure, height - 0.42, title, size=14, bold=True)
    note = (
        "Coordinate ⟨ΔW, L⟩/‖L‖. Left: by layer. Right: in total; an asterisk has p < 0.05 (Holm) "
        "against random directions of the same shape and norm."
    )
    write_line(figure, 0.13, note, size=7.8, muted=True)
    return png_of(figure)


def _draw_layers(axes: Axes, rows: Sequence[Mapping[str, Any]], diffs: Sequence[str]) -> None:
    labels = []
    for index, diff in enumerate(diffs):
        own = [row for row in rows if row["part"] == "layer" and row["diff"] == diff]
        layers, values = [row["of"] for row in own], [row["coordinate"] for row in own]
        colour = _COLOURS[index % len(_COLOURS)]
        if len(diffs) == 1:
            axes.bar(layers, values, color=colour, width=0.8)
        else:
            axes.plot(layers, values, color=colour, linewidth=1.8)
        labels.append(Label(values[-1], short(title_of(diff)), colour))
    axes.axhline(0, color=MUTED, linewidth=0.8)
    style_axes(axes)
    axes.set_xlabel("layer", fontsize=9, color=MUTED)
    axes.set_title("By layer", fontsize=10.5, loc="left", color=INK)
    place_labels(axes, labels, size=8.5)


def _draw_totals(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    finetunes: Sequence[str],
    diffs: Sequence[str],
) -> None:
    total = {(row["finetuned"], row["diff"]): row for row in rows if row["part"] == "total"}
    values = np.array([[total[tuned, diff]["coordinate"] for tuned in finetunes] for diff in diffs])
    reach = max(float(np.abs(values).max()), 1e-12)
    axes.imshow(values, cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto")
    for line, column in np.ndindex(*values.shape):
        row = total[finetunes[column], diffs[line]]
        star = "*" if row["p_holm"] is not None and row["p_holm"] < 0.05 else ""
        dark = abs(values[line, column]) > 0.65 * reach
        axes.text(
            column,
            line,
            f"{number(float(values[line, column]), 2)}{star}",
            ha="center",
            va="center",
            fontsize=8.5,
            color="white" if dark else INK,
        )
    steps = {row["finetuned"]: row["step"] for row in rows}
    names = [Path(tuned).name if steps[tuned] is None else str(steps[tuned]) for tuned in finetunes]
    axes.set_xticks(range(len(finetunes)), [short(name) for name in names], fontsize=8)
    axes.set_yticks(range(len(diffs)), [short(title_of(diff)) for diff in diffs], fontsize=9)
    axes.tick_params(length=0, labelcolor=INK)
    for side in axes.spines.values():
        side.set_visible(False)
    shown = "In total" if all(step is None for step in steps.values()) else "In total, by step"
    axes.set_title(shown, fontsize=10.5, loc="left", color=INK)
