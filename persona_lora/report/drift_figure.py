"""The drift of a finetune along persona directions, step by step, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from persona_lora.report.figures import (
    PALETTE,
    ZERO,
    Look,
    Panel,
    Picture,
    Series,
    add_axes,
    finish,
    lines,
    new_figure,
    short,
)
from persona_lora.report.wording import number, title_of


def render_drift(rows: Sequence[Mapping[str, Any]]) -> Picture:
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
