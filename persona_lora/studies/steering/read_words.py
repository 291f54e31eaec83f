"""What a grid of layers and coefficients showed, in words that claim no more than it does."""

from __future__ import annotations

from persona_lora.report import wording
from persona_lora.report.scores import NEUTRAL
from persona_lora.studies.steering.read_grid import DirectedGain, GridSummary, LayerSummary

BEYOND = "Beyond a random direction"


def headline(grid: GridSummary) -> str:
    """Return the finding in a few sentences, with intervals and without overstatement."""
    best, control = best_line(grid), control_line(grid)
    first = (best, control) if control.startswith(BEYOND) else (control, best)
    sentences = [*first, stability_line(grid)]
    prompted = wording.prompt_alone(grid.reference("prompt_pos"), grid.reference(NEUTRAL))
    return " ".join(sentence for sentence in (*sentences, prompted) if sentence)


def best_line(grid: GridSummary) -> str:
    """Return which layer is best and what it does, or why none is."""
    best, trait = grid.best, grid.trait
    if best is None or best.gain.mean is None:
        reasons = dict.fromkeys(each.reason for each in grid.by_layer if each.reason)
        return f"There is no best layer: {'; '.join(reason for reason in reasons if reason)}."
    if best.gain.mean <= 0:
        return (
            f"No layer moves {trait} in the expected direction at a coherent coefficient; the "
            f"least bad is layer {grid.best_layer} ({wording.change(best.gain)} at "
            f"{wording.coefficient(best.coefficient)})."
        )
    clear = wording.clear_sign(best.gain, best.p_holm) > 0
    verdict = "" if clear else "; that is not clear of chance"
    if verdict and resolution_note(grid):
        verdict = "; with so few questions no cell could pass that correction"
    return (
        f"Steering works best at layer {grid.best_layer}: coefficient "
        f"{wording.coefficient(best.coefficient)} moves {trait} {wording.change(best.gain)} points "
        f"in the expected direction{_from_to(grid)}, with coherence "
        f"{wording.number(best.coherence)} ({_corrected(grid, best)}){verdict}."
    )


def control_line(grid: GridSummary) -> str:
    """Return how the best layer compares with a random direction there; "" without one.

    A headline says it first where it is not clearly beyond one.
    """
    over = None if grid.best_layer is None else grid.at_layer(grid.best_layer).over_control
    if over is None or over.interval.mean is None:
        return ""
    layer = grid.best_layer
    said = (
        f"{BEYOND} at layer {layer} the vector gains"
        if wording.direction_of(over) > 0
        else f"At layer {layer} the vector does not clearly beat a random direction:"
    )
    return (
        f"{said} {wording.change(over.interval)} points over all its coefficients (p "
        f"{wording.p_equals(over.p_holm)}, Holm over layers{wording.unclear_of(over, '; ')})."
    )


def stability_line(grid: GridSummary) -> str:
    """Return how stable the choice is, and what it gives on questions left out of it."""
    if grid.selection is None or grid.best_layer is None:
        return ""
    share = grid.selection.layer_shares.get(grid.best_layer, 0.0)
    said = "In resamples of the questions that layer wins "
    said += f"{wording.number(100 * share)}% of the time"
    if grid.selection.left_out_gain is None:
        return f"{said}."
    gain = wording.number(grid.selection.left_out_gain)
    return f"{said}, and the chosen cell gains {gain} on questions left out of the choice."


def resolution_note(grid: GridSummary) -> str:
    """Return a warning where too few questions were asked for any cell to pass the correction."""
    questions = max((each.questions for each in grid.steered), default=0)
    cells = len(grid.steered)
    least = wording.least_p(questions, cells)
    if least < wording.CLEAR:
        return ""
    return (
        f"With {questions} question{'s' * (questions != 1)} the least p value possible for one of "
        f"{cells} cells is {wording.p_value(least)} after Holm's correction: no cell could pass it."
    )


def sample_line(grid: GridSummary) -> str:
    """Return how many questions and answers stand behind the numbers, and who judged them."""
    questions = max((each.questions for each in grid.steered), default=0)
    zero = [] if grid.unsteered is None else [grid.unsteered]
    return (
        f"{questions} question{'s' * (questions != 1)}, "
        f"{wording.answers_line([*zero, *grid.references, *grid.cells])}; "
        f"judge: {wording.judges_line(grid.trait_judge, grid.coherence_judge)}"
    )


def title(grid: GridSummary) -> str:
    """Return the title of a grid's picture."""
    return f"{wording.title_of(grid.trait)} by layer and coefficient"


def subtitle(grid: GridSummary) -> str:
    """Return the best layer and its gain on one line."""
    best = grid.best
    if best is None or grid.best_layer is None:
        return best_line(grid)
    return (
        f"best layer {grid.best_layer}: {wording.change(best.gain)} at "
        f"{wording.coefficient(best.coefficient)}, coherence {wording.number(best.coherence)}  ·  "
        "chosen on these questions, to be reported on others"
    )


def ranked(grid: GridSummary) -> list[LayerSummary]:
    """Return the layers from the best to the worst, those without a gain last."""
    rest = [each for each in grid.by_layer if each.layer not in grid.ranking]
    return [*(grid.at_layer(layer) for layer in grid.ranking), *rest]


def _from_to(grid: GridSummary) -> str:
    best, layer = grid.best, grid.best_layer
    cell = None if best is None or layer is None else grid.cell(layer, best.coefficient)
    if cell is None or grid.unsteered is None:
        return ""
    return (
        f" (from {wording.number(grid.unsteered.trait.mean)} to {wording.number(cell.trait.mean)})"
    )


def _corrected(grid: GridSummary, best: DirectedGain) -> str:
    if best.p_holm is None:
        return "one question: no test"
    return f"paired, p {wording.p_equals(best.p_holm)} after Holm over {len(grid.steered)} cells"
