"""Prevention as a picture: what was learnt against what came with it, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from persona_lora.core.errors import UserError
from persona_lora.report.figures import (
    CONTROL,
    INK,
    MUTED,
    TRAIT,
    add_axes,
    new_figure,
    png_of,
    style_axes,
    write_line,
    written,
)
from persona_lora.report.items import TaskScore
from persona_lora.report.wording import title_of

_ROW, _LEFT, _PANEL, _GAP = 0.3, 2.3, 1.9, 0.25  # inches
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def plot_prevention(scores: Sequence[TaskScore], trait: str, path: Path) -> bytes:
    """Draw a comparison, write it to ``path`` as PNG and return the same bytes."""
    return written(render_prevention(scores, trait), path)


def render_prevention(scores: Sequence[TaskScore], trait: str) -> bytes:
    """Return a panel a measure, a row a model, with intervals; the first model is the line."""
    if not scores:
        raise UserError("there are no scores to draw")
    models = list(dict.fromkeys(each.condition for each in scores))
    panels = list(dict.fromkeys((each.task, each.metric) for each in scores))
    up = _ROW * len(models)
    figure = new_figure(_LEFT + len(panels) * (_PANEL + _GAP) + 0.15, up + 1.75)
    for at, (task, metric) in enumerate(panels):
        axes = add_axes(figure, (_LEFT + at * (_PANEL + _GAP), 0.75, _PANEL, up))
        by_model = {e.condition: e for e in scores if (e.task, e.metric) == (task, metric)}
        _draw(axes, [by_model.get(name) for name in models], models[0])
        title = title_of(trait) if task == "trait" else f"{task} ({metric})"
        axes.set_title("coherence" if task == "coherence" else title, fontsize=9.5, loc="left")
        axes.set_yticks(range(len(models)), models if at == 0 else [""] * len(models))
    write_line(figure, up + 1.42, "What prevention buys, and what it costs", size=13, bold=True)
    note = (
        f"Mean and 95% interval over items. The dashed line is {models[0]}; filled dots differ "
        "from it (Holm, p < 0.05)."
    )
    write_line(figure, 0.12, note, size=7.8, muted=True)
    return png_of(figure)


def _draw(axes: Axes, scores: Sequence[TaskScore | None], reference: str) -> None:
    for row, each in enumerate(scores):
        if each is None or each.score.mean is None:
            continue
        if each.condition == reference:
            axes.axvline(each.score.mean, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        colour = CONTROL if each.condition == reference else TRAIT
        if each.score.low is not None and each.score.high is not None:
            axes.plot([each.score.low, each.score.high], [row, row], color=colour, linewidth=1.6)
        clear = each.p_holm is not None and each.p_holm < 0.05
        face = colour if clear or each.condition == reference else "white"
        axes.plot(each.score.mean, row, "o", markersize=5.5, color=colour, markerfacecolor=face)
    style_axes(axes)
    axes.grid(visible=False, axis="y")
    axes.set_ylim(len(scores) - 0.5, -0.5)
    axes.tick_params(axis="y", labelsize=8.5, labelcolor=INK)
    axes.tick_params(axis="x", labelsize=8)
