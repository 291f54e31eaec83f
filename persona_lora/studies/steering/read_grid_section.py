"""The section of a report on a grid: maps, the ranking of layers, answers at the best layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from persona_lora.core.runs import Run
from persona_lora.report.scores import (
    CONTROL,
    UNSTEERED_CONDITION,
    Condition,
    ScoredAnswer,
    score_answers,
)
from persona_lora.report.sections import (
    Content,
    Listing,
    Question,
    ReportOptions,
    by_question,
    data_uri,
    examples,
    listing,
)
from persona_lora.studies.steering import read_words
from persona_lora.studies.steering.figure_grid import render_layers
from persona_lora.studies.steering.read_grid import GridSummary, grid_of


@dataclass(frozen=True)
class GridBody:
    """Everything the template shows of one grid; ``layer`` is the one whose answers are shown."""

    grid: GridSummary
    plot: str
    layer: int
    examples: tuple[Question, ...]
    listing: Listing


def grid_content(run: Run, options: ReportOptions) -> Content:
    """Return the section of a grid."""
    grid = grid_of(run, seed=options.seed)
    layer = grid.layers[len(grid.layers) // 2] if grid.best_layer is None else grid.best_layer
    scored = score_answers(run.read("answers"), run.read("verdicts"), grid.trait)
    questions = by_question(_rows(scored, layer))
    return Content(
        template="report_grid.html.j2",
        title=read_words.title(grid),
        lead=read_words.headline(grid),
        body=GridBody(
            grid=grid,
            plot=data_uri(render_layers(grid)),
            layer=layer,
            examples=examples(questions, _shown(grid, layer), _references(grid, layer)),
            listing=listing(questions),
        ),
    )


def _rows(scored: Sequence[ScoredAnswer], layer: int) -> list[ScoredAnswer]:
    """Return the rows at one layer, the unsteered ones and the references."""
    return [
        row
        for row in scored
        if row.condition.layer == layer
        or row.condition == UNSTEERED_CONDITION
        or row.condition.coefficient is None
    ]


def _shown(grid: GridSummary, layer: int) -> set[Condition]:
    """Return the unsteered model, the best coefficient, and the outermost of the other sign."""
    best = grid.coefficients[-1] if grid.best_coefficient is None else grid.best_coefficient
    others = [each for each in grid.coefficients if each * best < 0]
    chosen = [best, *([max(others, key=abs)] if others else [])]
    return {UNSTEERED_CONDITION, *(Condition(grid.method, each, layer) for each in chosen)}


def _references(grid: GridSummary, layer: int) -> set[Condition]:
    prompts = {Condition(each.method, None, each.layer) for each in grid.references}
    best = grid.best_coefficient
    return prompts if best is None else prompts | {Condition(CONTROL, best, layer)}
