"""The tables that commands end with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from persona_lora.cli.console import console, interval_cells

if TYPE_CHECKING:
    from persona_lora.report import sections
    from persona_lora.report.summary import SweepSummary
    from persona_lora.studies.steering.read_grid import GridSummary
    from persona_lora.studies.steering.run import SweepResult


def to_rich(table: sections.Table) -> Table:
    """Return a table of a report as the terminal shows it: headings on one line, no colours."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in table.columns:
        shown.add_column(heading.replace("\n", " "), no_wrap=True)
    for row in table.rows:
        shown.add_row(*(cell or "" for cell in row))
    return shown


def show_sweep(result: SweepResult) -> None:
    """Print what a sweep or a grid showed, and where its plot and report are."""
    from persona_lora.studies.steering.read_grid import GridSummary

    summary = result.summary
    if isinstance(summary, GridSummary):
        table, lines = _grid_table(summary), _grid_lines(summary)
    else:
        table, lines = _sweep_table(summary), _sweep_lines(summary)
    console.print(to_rich(table))
    for line in lines:
        console.print(line)
    console.print(f"plot:   {result.plot}\nreport: {result.report}")


def _sweep_table(summary: SweepSummary) -> sections.Table:
    from persona_lora.report import sections, wording

    weights = summary.layer is None
    norm = "‖cΔW‖/‖W‖" if weights else "‖cv‖/‖h‖"
    rows = []
    for each in wording.all_conditions(summary):
        mean, interval, _, scored = interval_cells(each.trait)
        cost = each.relative_weight_norm if weights else each.relative_state_norm
        rows.append(
            (
                *(wording.label(each), mean, interval, wording.number(each.coherence.mean, 1)),
                *(scored, wording.significant(cost), wording.significant(each.kl_p95)),
            )
        )
    headings = ("c", "trait", "95%", "coherent", "scored", norm, "KL p95")
    return sections.Table(headings, tuple(rows))


def _grid_table(grid: GridSummary) -> sections.Table:
    from persona_lora.report import sections, wording
    from persona_lora.studies.steering import read_words

    rows = []
    for layer in read_words.ranked(grid):
        best = layer.best
        cells: tuple[str | None, ...] = (layer.reason, None, None, None, None)
        if best is not None:
            cells = (
                *(wording.change(best.gain), wording.coefficient(best.coefficient)),
                *(wording.p_value(best.p_holm), wording.number(best.coherence, 1)),
                wording.interval(layer.rho_means, 2),
            )
        rows.append((str(layer.layer), *cells))
    headings = ("layer", "gain", "at c", "p (Holm)", "coherent", "ρ")
    return sections.Table(headings, tuple(rows))


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
