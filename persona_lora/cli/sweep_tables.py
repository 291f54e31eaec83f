"""The tables that sweeps end with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from persona_lora.cli.console import console, interval_cells, show_table

if TYPE_CHECKING:
    from persona_lora.report.summary import SweepSummary
    from persona_lora.studies.steering.read_grid import GridSummary
    from persona_lora.studies.steering.run import SweepResult


def show_sweep(result: SweepResult) -> None:
    """Print what a sweep or a grid showed, and where its plot and report are."""
    from persona_lora.studies.steering.read_grid import GridSummary

    if isinstance(result.summary, GridSummary):
        _show_grid(result.summary)
    else:
        _show_coefficients(result.summary)
    console.print(f"plot:   {result.plot}\nreport: {result.report}")


def _show_coefficients(summary: SweepSummary) -> None:
    from persona_lora.report import wording

    weights = summary.layer is None
    rows = []
    for condition in wording.all_conditions(summary):
        mean, interval, _, scored = interval_cells(condition.trait)
        norm = condition.relative_weight_norm if weights else condition.relative_state_norm
        coherent = wording.number(condition.coherence.mean, 1)
        costs = wording.significant(norm), wording.significant(condition.kl_p95)
        rows.append([wording.label(condition), mean, interval, coherent, scored, *costs])
    norm_heading = "‖cΔW‖/‖W‖" if weights else "‖cv‖/‖h‖"
    show_table(f"c | trait | 95% | coherent | scored | {norm_heading} | KL p95", rows)
    console.print(wording.headline(summary))
    console.print(wording.statistics_line(summary))


def _show_grid(grid: GridSummary) -> None:
    from persona_lora.report import wording
    from persona_lora.studies.steering import read_words

    rows = []
    for layer in read_words.ranked(grid):
        best = layer.best
        cells = [layer.reason or ""]
        if best is not None:
            cells = [
                wording.change(best.gain),
                wording.coefficient(best.coefficient),
                wording.p_value(best.p_holm),
                wording.number(best.coherence, 1),
                wording.interval(layer.rho_means, 2),
            ]
        rows.append([str(layer.layer), *cells])
    show_table("layer | gain | at c | p (Holm) | coherent | ρ", rows)
    notes = read_words.headline(grid), read_words.resolution_note(grid), grid.selection_note
    for line in filter(None, notes):
        console.print(line)
