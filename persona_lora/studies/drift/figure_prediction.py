"""Predicted against judged drift as a picture: a scatter a kind, and the whole matrix of r."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from persona_lora.report.figures import (
    INK,
    MUTED,
    add_axes,
    new_figure,
    png_of,
    short,
    style_axes,
    write_line,
    written,
)
from persona_lora.report.wording import number, title_of
from persona_lora.studies.drift.read_prediction import POOLED, Prediction, changes, predict

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#3b3f45")
_PANEL, _GAP = 3.2, 1.0


def plot_prediction(
    judged: Sequence[Mapping[str, Any]], predictors: Sequence[Mapping[str, Any]], path: Path
) -> bytes:
    """Draw a study, write the PNG and return its bytes."""
    return written(render_prediction(judged, predictors), path)


def render_prediction(
    judged: Sequence[Mapping[str, Any]], predictors: Sequence[Mapping[str, Any]]
) -> bytes:
    """Return for every kind of predictor the scatter of own directions and the matrix of r."""
    found = predict(judged, predictors)
    kinds = list(dict.fromkeys(each.kind for each in found))
    figure = new_figure(0.9 + len(kinds) * (_PANEL + _GAP) + 0.6, 7.4)
    drift = changes(judged)
    for at, kind in enumerate(kinds):
        left = 0.9 + at * (_PANEL + _GAP)
        own = [row for row in predictors if row["kind"] == kind]
        _draw_scatter(add_axes(figure, (left, 4.0, _PANEL, 2.3)), own, drift, kind, found)
        _draw_matrix(add_axes(figure, (left + 0.5, 0.9, _PANEL - 0.5, 2.2)), kind, found)
    title = "Do projections predict what finetuning does to character?"
    write_line(figure, 6.98, title, size=14, bold=True)
    note = (
        "Above: change of the judged trait against the projection on its own direction, one dot a "
        "finetune. Below: Pearson's r of every judged trait (rows) with every direction."
    )
    write_line(figure, 0.13, note, size=7.8, muted=True)
    return png_of(figure)


def _draw_scatter(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    drift: Mapping[str, Mapping[str, float]],
    kind: str,
    found: Sequence[Prediction],
) -> None:
    for index, (trait, by_finetune) in enumerate(drift.items()):
        own = {row["finetune"]: row["value"] for row in rows if row["direction"] == trait}
        names = sorted(set(own) & set(by_finetune))
        axes.scatter(
            [own[name] for name in names],
            [by_finetune[name] for name in names],
            s=22,
            color=_COLOURS[index % len(_COLOURS)],
            label=short(title_of(trait)),
            linewidths=0,
            alpha=0.85,
        )
    axes.axhline(0, color=MUTED, linewidth=0.8)
    style_axes(axes)
    pooled = next(each for each in found if each.kind == kind and each.judged == POOLED)
    r = f"{number(pooled.r, 2)} [{number(pooled.r_low, 2)}, {number(pooled.r_high, 2)}]"
    axes.set_title(f"{kind}: pooled r {r}", fontsize=10, loc="left", color=INK)
    axes.set_ylabel("change of the judged score", fontsize=8.5, color=MUTED)
    axes.legend(fontsize=7.5, frameon=False, labelcolor=INK)


def _draw_matrix(axes: Axes, kind: str, found: Sequence[Prediction]) -> None:
    own = [each for each in found if each.kind == kind and each.judged != POOLED]
    judged = list(dict.fromkeys(each.judged for each in own))
    directions = list(dict.fromkeys(each.direction for each in own))
    values = np.array(
        [
            [next(e.r for e in own if (e.judged, e.direction) == (j, d)) for d in directions]
            for j in judged
        ]
    )
    axes.imshow(values, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for line, column in np.ndindex(*values.shape):
        axes.text(
            column,
            line,
            number(float(values[line, column]), 2),
            ha="center",
            va="center",
            fontsize=8.5,
            color="white" if abs(values[line, column]) > 0.65 else INK,
        )
    axes.set_xticks(range(len(directions)), [short(title_of(d)) for d in directions])
    axes.set_yticks(range(len(judged)), [short(title_of(j)) for j in judged])
    axes.tick_params(length=0, labelcolor=INK, labelsize=8)
    for side in axes.spines.values():
        side.set_visible(False)
