"""The tables that commands end with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from persona_lora.cli.console import console, interval_cells

if TYPE_CHECKING:
    from persona_lora.analysis.summary import SweepSummary
    from persona_lora.experiments.sweep import SweepResult


def show_sweep(result: SweepResult) -> None:
    """Print what a sweep showed, and where its plot and report are."""
    console.print(_sweep_table(result.summary))
    for line in _sweep_lines(result.summary):
        console.print(line)
    console.print(f"plot:   {result.plot}\nreport: {result.report}")


def _sweep_table(summary: SweepSummary) -> Table:
    from persona_lora.analysis import wording

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("c", "trait", "95%", "coherent", "scored", "‖cΔW‖/‖W‖", "KL p95"):
        table.add_column(heading, no_wrap=True)
    for condition in summary.conditions:
        mean, interval, _, scored = interval_cells(condition.trait)
        table.add_row(
            wording.label(condition),
            mean,
            interval,
            wording.number(condition.coherence.mean, 1),
            scored,
            wording.significant(condition.relative_weight_norm),
            wording.significant(condition.kl_p95),
        )
    return table


def _sweep_lines(summary: SweepSummary) -> list[str]:
    from persona_lora.analysis import wording

    return [wording.headline(summary), wording.statistics_line(summary)]
