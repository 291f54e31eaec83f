"""The drift of a finetune along persona directions, step by step, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def plot_drift(rows: Sequence[Mapping[str, Any]], path: Path) -> bytes:
    """Draw the rows of a drift monitor, write the PNG and return its bytes."""
    return written(render_drift(rows), path)


def render_drift(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the coordinate along every direction against the step."""
    figure = new_figure(8.4, 4.2)
    axes = add_axes(figure, (0.75, 0.85, 5.3, 2.55))
    labels = []
    for index, diff in enumerate(dict.fromkeys(row["diff"] for row in rows)):
        own = [row for row in rows if row["diff"] == diff]
        colour = _COLOURS[index % len(_COLOURS)]
        values = [row["coordinate"] for row in own]
        axes.plot([row["step"] for row in own], values, "o-", color=colour, markersize=3.5)
        labels.append(Label(values[-1], f"{short(title_of(diff))} {number(values[-1], 2)}", colour))
    axes.axhline(0, color=MUTED, linewidth=0.8)
    style_axes(axes)
    axes.set_xlabel("step", fontsize=9, color=INK)
    place_labels(axes, labels, size=8.5)
    write_line(figure, 3.8, "Drift along persona directions", size=14, bold=True)
    write_line(figure, 0.13, "Coordinate ⟨ΔW, L⟩/‖L‖ of the growing LoRA.", size=7.8, muted=True)
    return png_of(figure)
