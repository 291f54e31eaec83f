"""Weight space and activation space beside one another, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from persona_lora.report.figures import (
    CONTROL,
    INK,
    MUTED,
    TRAIT,
    add_axes,
    new_figure,
    png_of,
    short,
    style_axes,
    write_line,
)
from persona_lora.report.wording import number, title_of

Row = Mapping[str, Any]
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def render_spaces(
    shifts: Sequence[Row],
    spectra: Sequence[Row],
    cosines: Sequence[Row],
    interference: Sequence[Row],
) -> bytes:
    """Return PNG bytes: shift against vector, effective rank, cosines, and interference."""
    figure = new_figure(11.2, 7.7)
    traits = list(dict.fromkeys(row["trait"] for row in shifts))
    _draw_shifts(add_axes(figure, (0.8, 4.4, 4.6, 2.3)), shifts, traits)
    _draw_ranks(add_axes(figure, (6.3, 4.4, 4.6, 2.3)), spectra, traits)
    _draw_cosines(add_axes(figure, (0.8, 1.1, 2.6, 2.3)), cosines)
    for at, method in enumerate(("weights", "activations")):
        axes = add_axes(figure, (5.2 + at * 3.3, 1.1, 2.3, 2.3))
        _draw_grid(axes, [row for row in interference if row["method"] == method], traits, at == 0)
        axes.set_title(f"steered by {method}", fontsize=9, loc="left", color=INK)
    write_line(figure, 7.3, "Weights and activations: two spaces", size=14, bold=True)
    note = (
        "Below right: a row steers a trait; how far it moves along the other traits' own shifts "
        "(1: as far as their own steering)."
    )
    write_line(figure, 0.12, note, size=7.8, muted=True)
    return png_of(figure)


def _draw_shifts(axes: Axes, rows: Sequence[Row], traits: Sequence[str]) -> None:
    for at, trait in enumerate(traits):
        own = [row for row in rows if row["trait"] == trait]
        for other in traits:
            line = sorted((r["layer"], r["cosine"]) for r in own if r["other"] == other)
            mine = trait == other
            axes.plot(
                [layer for layer, _ in line], [value for _, value in line],
                color=_COLOURS[at % len(_COLOURS)] if mine else CONTROL,
                linewidth=1.8 if mine else 0.6, alpha=1.0 if mine else 0.45,
                zorder=3 if mine else 1,
            )  # fmt: skip
    axes.axhline(0, color=MUTED, linewidth=0.8)
    style_axes(axes)
    axes.set_title(
        "cosine of the shift under a difference with the trait's vector (grey: other traits')",
        fontsize=8.5, loc="left", color=INK,
    )  # fmt: skip
    axes.set_xlabel("layer", fontsize=8.5, color=MUTED)


def _draw_ranks(axes: Axes, rows: Sequence[Row], traits: Sequence[str]) -> None:
    for at, trait in enumerate(traits):
        own = [row for row in rows if row["trait"] == trait and row["layer"] is not None]
        layers = sorted({row["layer"] for row in own})
        means = [np.mean([r["effective_rank"] for r in own if r["layer"] == n]) for n in layers]
        colour = _COLOURS[at % len(_COLOURS)]
        axes.plot(layers, means, color=colour, linewidth=1.6, label=short(title_of(trait)))
    style_axes(axes)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7.5, frameon=False, labelcolor=INK, ncol=3, loc="lower center")
    axes.set_title("effective rank of the difference, mean over modules", fontsize=8.5, loc="left")
    axes.set_xlabel("layer", fontsize=8.5, color=MUTED)


def _draw_cosines(axes: Axes, rows: Sequence[Row]) -> None:
    axes.plot(
        [row["weights"] for row in rows], [row["activations"] for row in rows], "o",
        color=TRAIT, markersize=5,
    )  # fmt: skip
    for row in _apart(rows):
        axes.annotate(
            f"{short(row['trait'])[:4]}–{short(row['other'])[:4]}",
            (row["weights"], row["activations"]), fontsize=6.5, color=MUTED,
            xytext=(4, 3), textcoords="offset points",
        )  # fmt: skip
    axes.axhline(0, color=MUTED, linewidth=0.6)
    axes.axvline(0, color=MUTED, linewidth=0.6)
    style_axes(axes)
    axes.set_title("pairs of traits: cosine in both spaces", fontsize=8.5, loc="left", color=INK)
    axes.set_xlabel("of the differences", fontsize=8.5, color=MUTED)
    axes.set_ylabel("of the vectors", fontsize=8.5, color=MUTED)


def _apart(rows: Sequence[Row]) -> list[Row]:
    """Return the pairs whose names have room, those with the largest cosines first."""
    spread = {key: np.ptp([row[key] for row in rows]) or 1.0 for key in ("weights", "activations")}
    kept: list[Row] = []
    for row in sorted(rows, key=lambda each: -abs(each["activations"])):
        far = (
            abs(row["weights"] - other["weights"]) > 0.3 * spread["weights"]
            or abs(row["activations"] - other["activations"]) > 0.05 * spread["activations"]
            for other in kept
        )
        if all(far):
            kept.append(row)
    return kept


def _draw_grid(axes: Axes, rows: Sequence[Row], traits: Sequence[str], labelled: bool) -> None:
    values = np.array(
        [
            [next(r["value"] for r in rows if (r["steered"], r["read"]) == (one, other))
             for other in traits]
            for one in traits
        ]
    )  # fmt: skip
    axes.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            dark = abs(value) > 0.6
            axes.text(x, y, number(float(value), 2), ha="center", va="center", fontsize=7.5,
                      color="white" if dark else INK)  # fmt: skip
    names = [short(title_of(trait)) for trait in traits]
    axes.set_xticks(
        range(len(traits)), names, fontsize=7.5, rotation=30, ha="right", rotation_mode="anchor",
        color=INK,
    )  # fmt: skip
    axes.set_yticks(range(len(traits)), names if labelled else [""] * len(traits), fontsize=7.5)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
