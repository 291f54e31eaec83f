"""The tables that commands end with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from persona_lora.cli.console import console, interval_cells

if TYPE_CHECKING:
    from persona_lora.report.summary import SweepSummary
    from persona_lora.studies.steering.read_grid import GridSummary
    from persona_lora.studies.steering.run import SweepResult


def show_sweep(result: SweepResult) -> None:
    """Print what a sweep or a grid showed, and where its plot and report are."""
    from persona_lora.studies.steering.read_grid import GridSummary

    summary = result.summary
    if isinstance(summary, GridSummary):
        table, lines = _grid_table(summary), _grid_lines(summary)
    else:
        table, lines = _sweep_table(summary), _sweep_lines(summary)
    console.print(table)
    for line in lines:
        console.print(line)
    console.print(f"plot:   {result.plot}\nreport: {result.report}")


def _sweep_table(summary: SweepSummary) -> Table:
    from persona_lora.report import wording

    weights = summary.layer is None
    norm = "‖cΔW‖/‖W‖" if weights else "‖cv‖/‖h‖"
    table = _plain_table("c", "trait", "95%", "coherent", "scored", norm, "KL p95")
    for condition in wording.all_conditions(summary):
        mean, interval, _, scored = interval_cells(condition.trait)
        table.add_row(
            wording.label(condition),
            mean,
            interval,
            wording.number(condition.coherence.mean, 1),
            scored,
            wording.significant(
                condition.relative_weight_norm if weights else condition.relative_state_norm
            ),
            wording.significant(condition.kl_p95),
        )
    return table


def _grid_table(grid: GridSummary) -> Table:
    from persona_lora.report import wording
    from persona_lora.studies.steering import read_words

    table = _plain_table("layer", "gain", "at c", "p (Holm)", "coherent", "ρ")
    for layer in read_words.ranked(grid):
        best = layer.best
        cells = (
            [layer.reason or ""]
            if best is None
            else [
                wording.change(best.gain),
                wording.coefficient(best.coefficient),
                wording.p_value(best.p_holm),
                wording.number(best.coherence, 1),
                wording.interval(layer.rho_means, 2),
            ]
        )
        table.add_row(str(layer.layer), *cells)
    return table


def _plain_table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table


def _sweep_lines(summary: SweepSummary) -> list[str]:
    from persona_lora.report import wording

    return [wording.headline(summary), wording.statistics_line(summary)]


def _grid_lines(grid: GridSummary) -> list[str]:
    from persona_lora.studies.steering import read_words

    lines = (
        read_words.headline(grid),
        read_words.resolution_note(grid),
        grid.selection_note,
    )
    return [line for line in lines if line]
