"""Persona searches as pictures: the way of a search, and methods beside one another.

Draws rows from disk and what ``fits`` says of them; refuses to compute statistics of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.report.figures import (
    COHERENCE,
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
from persona_lora.report.fits import (
    ConditionFit,
    Row,
    fits_over_personas,
    fits_over_prompts,
)
from persona_lora.report.resampling import Array
from persona_lora.report.wording import interval, number, title_of

NAMES = {
    "none": "unsteered",
    "mean": "distribution's mean",
    "incumbent": "incumbent",
    "lora": "LoRA, CMA-ES",
    "random": "LoRA, random search",
    "equal": "LoRA, equal weights",
    "svd": "SVD vectors, CMA-ES",
    "mean_diff": "mean-difference vectors, CMA-ES",
    "pca": "PCA vectors, CMA-ES",
    "prompt": "persona as system prompt",
}
_ROW = 0.42  # inches


def name_of(condition: str) -> str:
    """Return the words for a condition; "svd@20" is the SVD vectors at layer 20."""
    method, at, layers = condition.partition("@")
    name = NAMES.get(method, method)
    return f"{name}, at {layers}" if at else name


def plot_search(run: Run, path: Path) -> bytes:
    """Draw one search, write it to ``path`` as PNG and return the same bytes."""
    return written(render_search(run), path)


def plot_comparison(run: Run, path: Path) -> bytes:
    """Draw a comparison of methods, write it to ``path`` as PNG and return the same bytes."""
    return written(render_comparison(run), path)


def render_search(run: Run) -> bytes:
    """Return the values of all candidates by generation, the held-out fits, and the weights."""
    generations, held_out = run.read("generations"), run.read("held_out")
    if not generations or not held_out:
        raise UserError(f"{run.folder} holds no finished search")
    config = run.record["config"]
    fits = fits_over_prompts(held_out, "none")
    figure = new_figure(14.2, 4.5)
    _draw_history(add_axes(figure, (0.62, 0.95, 4.1, 2.6)), generations)
    _draw_fits(add_axes(figure, (6.6, 0.95, 2.3, 2.6)), fits)
    _draw_weights(add_axes(figure, (11.6, 0.95, 2.2, 2.6)), held_out)
    title = f"{config['persona']}: the search with {name_of(config['method'])}"
    write_line(figure, 4.1, title, size=14, bold=True)
    note = (
        f"Search: {len(config['prompts'])} training prompts, judge {config['judge']} of training "
        f"conversations. Held-out: {fits[0].fit.n_questions} other prompts, judge of test "
        "conversations; bars: 95% bootstrap over prompts."
    )
    write_line(figure, 0.13, note, size=7.8, muted=True)
    return png_of(figure)


def render_comparison(run: Run) -> bytes:
    """Return the held-out fit of every method, over personas and for each of them."""
    rows = run.read("held_out")
    if not rows:
        raise UserError(f"{run.folder} holds no held-out answers")
    fits = fits_over_personas(rows, "none")
    fits.sort(key=lambda each: each.fit.mean if each.fit.mean is not None else -np.inf)
    personas = list(dict.fromkeys(row["persona"] for row in rows))
    searched = next((f.condition for f in reversed(fits) if _weights(rows, f.condition)), None)
    weights = {} if searched is None else _weights(rows, searched)
    traits = sorted({trait for each in weights.values() for trait in each})
    below = _ROW * len(traits) + 0.9 if weights else 0.0
    height = 1.75 + _ROW * len(fits) + below
    figure = new_figure(13.6, height)
    bottom, up = 0.85 + below, _ROW * len(fits)
    _draw_fits(add_axes(figure, (2.6, bottom, 3.2, up)), fits, rows)
    gains = _gains(rows, fits, personas)
    axes = add_axes(figure, (7.9, bottom, 5.4, up))
    _draw_map(axes, gains, personas)
    _title(axes, "Change from the unsteered model, by persona")
    if searched is not None:
        values = np.array([[weights.get(p, {}).get(t, np.nan) for p in personas] for t in traits])
        axes = add_axes(figure, (7.9, 0.85, 5.4, below - 0.9))
        _draw_map(axes, values, personas)
        axes.set_yticks(range(len(traits)), [title_of(trait) for trait in traits], fontsize=8)
        _title(axes, f"Weights of the mix: {name_of(searched)}")
    write_line(figure, height - 0.4, "What gives the model a person's voice?", size=14, bold=True)
    note = (
        "Fit 1–5 on held-out prompts by a judge of held-out conversations. "
        f"{len(personas)} personas; bars: 95% bootstrap over personas; small dots: personas. "
        "Right: change of the mean fit from the unsteered model."
    )
    write_line(figure, 0.13, note, size=7.8, muted=True)
    return png_of(figure)


def _draw_history(axes: Axes, generations: Sequence[Row]) -> None:
    scored = [row for row in generations if row["value"] is not None]
    axes.scatter(
        [row["iteration"] for row in scored],
        [row["value"] for row in scored],
        s=9,
        color=CONTROL,
        alpha=0.5,
        linewidths=0,
        label="candidates",
    )
    steps = sorted({row["iteration"] for row in scored})
    means = [np.mean([r["value"] for r in scored if r["iteration"] == at]) for at in steps]
    best = np.maximum.accumulate(
        [max(r["value"] for r in scored if r["iteration"] == at) for at in steps]
    )
    axes.plot(steps, means, color=COHERENCE, linewidth=1.8, label="generation's mean")
    axes.plot(steps, best, color=TRAIT, linewidth=2.2, label="best so far")
    style_axes(axes)
    axes.set_xlabel("generation", fontsize=9, color=MUTED)
    _title(axes, "Value on training prompts")
    axes.legend(fontsize=8, frameon=False, loc="lower right", labelcolor=INK)


def _draw_fits(axes: Axes, fits: Sequence[ConditionFit], rows: Sequence[Row] = ()) -> None:
    for place, each in enumerate(fits):
        colour = CONTROL if each.condition == "none" else TRAIT
        for fit in _persona_means(rows, each.condition):
            axes.plot(fit, place, ".", color=colour, markersize=4, alpha=0.35, markeredgewidth=0)
        if each.fit.mean is None:
            continue
        if each.fit.low is not None and each.fit.high is not None:
            axes.plot([each.fit.low, each.fit.high], [place, place], color=colour, linewidth=2)
        axes.plot(each.fit.mean, place, "o", color=colour, markersize=6)
        axes.text(
            1.03,
            place,
            interval(each.fit, 2),
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=8.5,
            color=INK,
        )
    style_axes(axes)
    axes.grid(axis="x", color="#d8dee4", linewidth=0.7)
    axes.set_xlim(1, 5)
    axes.set_xticks([1, 2, 3, 4, 5])
    axes.set_ylim(-0.6, len(fits) - 0.4)
    axes.set_yticks(range(len(fits)), [name_of(f.condition) for f in fits])
    axes.tick_params(axis="y", labelcolor=INK, labelsize=9)
    _title(axes, "Fit on held-out prompts")


def _persona_means(rows: Sequence[Row], condition: str) -> list[float]:
    by_persona: dict[str, list[float]] = {}
    for row in rows:
        if row["condition"] == condition and row["score"] is not None:
            by_persona.setdefault(row["persona"], []).append(row["score"])
    return [float(np.mean(scores)) for scores in by_persona.values()]


def _draw_weights(axes: Axes, rows: Sequence[Row]) -> None:
    weights: dict[str, Any] = next(
        (row["weights"] for row in rows if row["condition"] == "mean"), {}
    )
    traits = sorted(weights, reverse=True)
    values = [weights[trait] for trait in traits]
    colours = [TRAIT if value > 0 else COHERENCE for value in values]
    axes.barh(range(len(traits)), values, color=colours, height=0.55)
    for place, value in enumerate(values):
        # Beside the bar, and on the free side of the axis where the bar goes left.
        axes.text(max(value, 0.0), place, f" {number(value, 2)}", va="center", fontsize=8.5)
    reach = 1.5 * max([abs(value) for value in values] + [0.1])
    axes.set_xlim(-reach, reach)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    style_axes(axes)
    axes.grid(visible=False)
    axes.set_yticks(range(len(traits)), [title_of(trait) for trait in traits])
    axes.tick_params(axis="y", labelcolor=INK, labelsize=9)
    _title(axes, "Weights of the mean")


def _weights(rows: Sequence[Row], condition: str) -> dict[str, dict[str, float]]:
    """Return the weights of a searched mix by persona; nothing for what was not searched."""
    if condition == "equal":
        return {}
    return {
        row["persona"]: row["weights"]
        for row in rows
        if row["condition"] == condition and row["weights"]
    }


def _gains(rows: Sequence[Row], fits: Sequence[ConditionFit], personas: Sequence[str]) -> Array:
    """Return the change from the unsteered model, ``[conditions, personas]``."""
    gains = np.full((len(fits), len(personas)), np.nan)
    for column, persona in enumerate(personas):
        own = {
            each.condition: each.difference
            for each in fits_over_prompts([r for r in rows if r["persona"] == persona], "none")
        }
        for line, each in enumerate(fits):
            gain = own.get(each.condition)
            if gain is not None and gain.mean is not None:
                gains[line, column] = gain.mean
    return gains


def _draw_map(axes: Axes, gains: Array, personas: Sequence[str]) -> None:
    reach = max(float(np.nanmax(np.abs(gains), initial=0.0)), 0.1)
    axes.imshow(gains, cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto", origin="lower")
    for line, column in np.ndindex(*gains.shape):
        if np.isfinite(gains[line, column]):
            dark = abs(gains[line, column]) > 0.65 * reach
            axes.text(
                column,
                line,
                number(float(gains[line, column]), 1),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else INK,
            )
    axes.set_xticks(range(len(personas)), [_tag(persona) for persona in personas], fontsize=8)
    axes.set_yticks([])
    axes.set_ylim(-0.6, len(gains) - 0.4)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, labelcolor=MUTED)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=10.5, loc="left", color=INK)


def _tag(persona: str) -> str:
    """Return what tells an id from others: "101_A" of "episode-000101_A"."""
    tail = persona.rpartition("-")[2].lstrip("0")
    return tail or persona
