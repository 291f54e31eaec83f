"""What steering costs in time, as a picture: a panel a measure, a row a variant and batch."""

from __future__ import annotations

from collections.abc import Sequence

from persona_lora.report.figures import (
    INK,
    MUTED,
    add_axes,
    new_figure,
    png_of,
    style_axes,
    write_line,
)
from persona_lora.studies.steering.read_latency import BASE, FIRST_TOKEN, TOKENS, Ratio

COLOURS = {"merged": "#0072B2", "live": "#56B4E9", "activations": "#D55E00", "prompt": "#00795A"}
_ROW, _PANEL = 0.24, 3.6


def render_latency(ratios: Sequence[Ratio]) -> bytes:
    """Return PNG bytes: the time of every variant over the base model's, with intervals."""
    shown = [each for each in ratios if each.variant != BASE]
    places = sorted({(each.batch, each.variant) for each in shown}, key=lambda p: (p[0], p[1]))
    up = _ROW * len(places)
    figure = new_figure(1.9 + 2 * (_PANEL + 0.3), up + 1.5)
    for at, measure in enumerate((FIRST_TOKEN, TOKENS)):
        axes = add_axes(figure, (1.8 + at * (_PANEL + 0.3), 0.7, _PANEL, up))
        by_place = {(e.batch, e.variant): e.ratio for e in shown if e.measure == measure}
        for row, place in enumerate(places):
            each, colour = by_place[place], COLOURS[place[1]]
            if each.mean is None:
                continue
            if each.low is not None and each.high is not None:
                axes.plot([each.low, each.high], [row, row], color=colour, linewidth=1.6)
            axes.plot(each.mean, row, "o", color=colour, markersize=5)
        axes.axvline(1.0, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        style_axes(axes)
        axes.grid(visible=False, axis="y")
        axes.set_ylim(len(places) - 0.5, -0.5)
        labels = [f"{variant}, batch {batch}" for batch, variant in places]
        axes.set_yticks(range(len(places)), labels if at == 0 else [""] * len(places))
        axes.tick_params(axis="y", labelsize=8, labelcolor=INK)
        what = "to the first token" if measure == FIRST_TOKEN else "for each further token"
        axes.set_title(f"time {what}", fontsize=9.5, loc="left", color=INK)
    write_line(figure, up + 1.15, "What steering costs in time", size=13, bold=True)
    note = "Over the base model's, in the same round; geometric mean and 95% interval over rounds."
    write_line(figure, 0.12, note, size=7.8, muted=True)
    return png_of(figure)
