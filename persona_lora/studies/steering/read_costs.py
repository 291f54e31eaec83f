"""The sections of a report on latency, and on the two spaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.sections import Content, ReportOptions, data_uri
from persona_lora.studies.steering.figure import render_latency, render_spaces
from persona_lora.studies.steering.read_latency import BASE, MERGED, TOKENS, Ratio, Timing, ratios

Row = Mapping[str, Any]


@dataclass(frozen=True)
class TableBody:
    """Lines of text, a picture, and tables: a heading, the columns' names, and rows of cells."""

    lines: tuple[str, ...]
    plot: str
    tables: tuple[tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]], ...]
    note: str


def latency_content(run: Run, options: ReportOptions) -> Content:
    """Return the section on what steering costs in time and memory."""
    found = ratios([Timing(**row) for row in run.read("timings")])
    rows = tuple(_latency_row(each) for each in found)
    costs = tuple(wording.cost(**row) for row in run.read("costs"))
    body = TableBody(
        (_latency_line(found),),
        data_uri(render_latency(found)),
        (
            (
                "Every variant",
                ("Batch", "Variant", "Measure", "Median", "Time over base [95%]"),
                rows,
            ),
            ("Swaps, and what is kept beside the model", ("What", "Cost"), costs),
        ),
        "Ratios are taken within a round; intervals are by Student's t over rounds. Merging keeps "
        "a copy of the weights that it touches, to restore them bit for bit.",
    )
    return Content(
        "report_tables.html.j2", "What steering costs in time", _latency_line(found), body
    )


def _latency_line(found: Sequence[Ratio]) -> str:
    batch = max(each.batch for each in found)
    said = ", ".join(
        f"{each.variant} {wording.interval(each.ratio, 2)}"
        for each in found
        if each.batch == batch and each.measure == TOKENS and each.variant != BASE
    )
    merged = next(
        each.ratio for each in found
        if (each.batch, each.measure, each.variant) == (batch, TOKENS, MERGED)
    )  # fmt: skip
    inside = (merged.low or 0.0) <= 1.0 <= (merged.high or 0.0)
    told = "cannot be told from" if inside else "differs from"
    return (
        f"Time for a token over the base model's at batch {batch}: {said}. Merged {told} the base."
    )


def _latency_row(each: Ratio) -> tuple[str, ...]:
    median = (
        f"{wording.number(each.median, 1)} tokens/s"
        if each.measure == TOKENS
        else f"{wording.number(1000 * each.median, 0)} ms"
    )
    return (
        str(each.batch), each.variant, each.measure, median, wording.interval(each.ratio, 2),
    )  # fmt: skip


def spaces_content(run: Run, options: ReportOptions) -> Content:
    """Return the section on weight space and activation space."""
    shifts, spectra, cosines = run.read("shifts"), run.read("spectra"), run.read("cosines")
    layer = run.record["config"]["layer"]
    own = [row["cosine"] for row in shifts
           if row["trait"] == row["other"] and row["layer"] == layer]  # fmt: skip
    others = [row["cosine"] for row in shifts
              if row["trait"] != row["other"] and row["layer"] == layer]  # fmt: skip
    (agreed,) = run.read("agreement")
    line = (
        f"At layer {layer} the shift of the hidden states under a trait's difference has a cosine "
        f"of {wording.number(float(np.mean(own)), 2)} with the trait's own vector (mean over "
        f"{len(own)} traits), and of {wording.number(float(np.mean(others)), 2)} with the others'. "
        f"Over {agreed['n']} pairs of traits the cosines of both spaces have a Spearman's ρ of "
        f"{wording.number(agreed['rho'], 2)} (p {wording.p_equals(agreed['p'])})."
    )
    linear = tuple(
        (row["method"], row["trait"], row["other"], wording.number(row["residual"], 3))
        for row in run.read("linearity")
    )
    pairs = tuple(
        (row["trait"], row["other"], wording.number(row["weights"], 3),
         wording.number(row["activations"], 3))
        for row in cosines
    )  # fmt: skip
    body = TableBody(
        (line,),
        data_uri(render_spaces(shifts, spectra, cosines, run.read("interference"))),
        (
            ("Pairs of traits", ("Trait", "Other", "Cosine of differences", "of vectors"), pairs),
            ("Two at once against the sum", ("Method", "Trait", "Other", "Residual"), linear),
        ),
        "All directions are at equal effect. Residual: ‖s₁₂ − s₁ − s₂‖ / ‖s₁ + s₂‖ of the last "
        "layer's mean shift; a trait with itself has twice the coefficient. Vectors act at all "
        "positions here. Pairs share traits: the p-value of ρ permutes the traits of one space "
        "(Mantel).",
    )
    return Content("report_tables.html.j2", "Weights and activations: two spaces", line, body)
