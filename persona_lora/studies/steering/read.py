"""The sections of a report on steering: a sweep, a grid, methods compared, time, two spaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from persona_lora.core.chat import place_of
from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.conditions import ConditionSummary, ControlSummary
from persona_lora.report.curve import PairedDifference
from persona_lora.report.resampling import Interval
from persona_lora.report.scores import (
    CONTROL,
    SECOND,
    UNSTEERED,
    UNSTEERED_CONDITION,
    Condition,
    ScoredAnswer,
    Series,
    grouped,
    rows_of_series,
    score_answers,
)
from persona_lora.report.sections import (
    EXAMPLE_COEFFICIENTS,
    Block,
    Card,
    Cards,
    Content,
    Fold,
    Heading,
    Image,
    Note,
    Points,
    Question,
    Table,
    side_by_side,
)
from persona_lora.report.summary import SweepSummary, summarise_run
from persona_lora.report.trust import judge_blocks
from persona_lora.report.two_judges import (
    Beside,
    TwoJudges,
    judges_table,
    lead_of,
    of_pairs,
    pairs_of,
    two_judges,
)
from persona_lora.studies.steering import read_words
from persona_lora.studies.steering.figure import (
    MADE_EQUAL_ON,
    NAMES,
    SPLITS,
    render_comparison,
    render_latency,
    render_sweep,
)
from persona_lora.studies.steering.figure_grid import render_layers
from persona_lora.studies.steering.figure_side_effects import render_side_effects
from persona_lora.studies.steering.read_comparison import (
    ACTIVATION,
    BASE,
    LORA,
    MERGED,
    RANDOM,
    RANDOM_LORA,
    TOKENS,
    Comparison,
    Overall,
    Point,
    Ratio,
    Timing,
    corrected_effects,
    ratios,
    read_comparison,
)
from persona_lora.studies.steering.read_grid import GridSummary, LayerSummary, grid_of
from persona_lora.studies.steering.read_side_effects import (
    gap_by_turn,
    read_side_effects,
    side_effects_lines,
    side_effects_table,
)

# -- a sweep ---------------------------------------------------------------------------------------


def sweep_content(run: Run) -> Content:
    """Return the section of a sweep; raises UserError for a folder that holds none.

    The answers at the coefficients nearest to ``EXAMPLE_COEFFICIENTS`` stand side by side.
    """
    summary = summarise_run(run)
    scored = score_answers(run.read("answers"), run.read("verdicts"), summary.trait)
    chosen = _nearest(summary)
    both = two_judges(run, summary.trait)
    trait = wording.title_of(summary.trait)
    lead = lead_of(wording.headline(summary), both, run, summary.trait)
    alt = f"{trait} and coherence against the coefficient. {lead}"
    gaps = wording.gaps(summary)
    blocks: tuple[Block, ...] = (
        Image.of(render_sweep(summary), alt, ""),
        Note(_statistics(summary)),
        *judges_table(both),
        _conditions(summary),
        *([Points(tuple(gaps))] if gaps else []),
        *([_control(summary, summary.control)] if summary.control is not None else []),
        *_prompts(summary),
        *judge_blocks(run),
        *side_by_side(
            *(summary.trait, _rows(scored, summary)),
            {Condition(summary.method, each, summary.layer) for each in chosen},
            _references(summary, chosen),
        ),
    )
    return Content(trait + wording.at_layer(summary), lead, blocks, summary)


def _statistics(summary: SweepSummary) -> str:
    line = f"{wording.statistics_line(summary)}."
    if summary.method == UNSTEERED:
        return line
    return f"{line} Over single answers ρ is {wording.explained(summary.rho_rows)}."


def _conditions(summary: SweepSummary) -> Table:
    trait, weights = wording.title_of(summary.trait), summary.layer is None
    norm = "‖cΔW‖\n/ ‖W‖" if weights else "‖cv‖\n/ ‖h‖"
    told = (
        "‖cΔW‖ / ‖W‖ is the relative weight norm (plain)"
        if weights
        else "‖cv‖ / ‖h‖ is the vector’s length over the mean length of hidden states at its layer"
    )
    every = wording.all_conditions(summary)
    rows = (
        [wording.label(each), wording.interval(each.trait), wording.interval(each.coherence)]
        + [*_change(each, wording.interval), *_counts(each)]
        + [wording.significant(each.relative_weight_norm if weights else each.relative_state_norm)]
        + [wording.significant(each.kl_mean), wording.significant(each.kl_p95)]
        for each in every
    )
    return Table.of(
        f"Coefficient\nor prompt | {trait}\n[95%] | Coherence\n[95%] | Change from 0\n[95%] | "
        "p\n(Holm) | Scored, %\ntrait / coh. | Answers /\nquestions | Finished | Mean\ntokens | "
        f"{norm} | KL mean\n(nats) | KL p95\n(nats)",
        rows,
        "Conditions",
        f"{wording.sample_line(summary)}. Means are over scored answers; “Scored” is their share. "
        "The change from 0 is paired by question, its p value from a sign-flip permutation test "
        "over question means, Holm-corrected over the coefficients; (19 of 20): so many of the "
        "questions were scored under both. Grey text: outside the "
        f"coherent range. {told}, KL the per-token divergence from the base model on ordinary "
        "prompts; a dash was not measured.",
        [_style(each, summary) for each in every],
    )


def _change(each: ConditionSummary, say: Any) -> tuple[str, str]:
    """Return the change from coefficient 0, its pairs if not all questions, its corrected p."""
    if each.from_zero is None:
        return wording.NONE, wording.NONE
    gap = each.from_zero.interval
    p = wording.p_value(each.from_zero.p_holm)
    return say(gap) + wording.pairs(gap, each.questions), p


def _counts(each: ConditionSummary) -> tuple[str, str, str, str]:
    trait, coherence = (wording.number(100 * x.coverage) for x in (each.trait, each.coherence))
    finished = f"{wording.number(100 * each.finished_share)}%"
    tokens = wording.number(each.mean_tokens)
    return f"{trait} / {coherence}", f"{each.rows} / {each.questions}", finished, tokens


def _style(each: ConditionSummary, summary: SweepSummary) -> str:
    if each.coefficient is None or each.method == CONTROL:
        return "reference"
    coherent = each.coefficient in summary.coherent_range.coefficients
    return "" if coherent else "incoherent"


def _control(summary: SweepSummary, control: ControlSummary) -> Table:
    compared = [
        *((wording.coefficient(each.coefficient), each.difference) for each in control.comparisons),
        ("all of them, in the expected direction", control.overall),
    ]
    rows = (
        [place, wording.change(each.interval), wording.p_value(each.p)]
        + [wording.p_value(each.p_holm), str(each.interval.n_questions)]
        for place, each in compared
    )
    name = wording.controls_name(control)
    heading = f"{wording.title_of(summary.trait)}, {summary.method} minus {name}"
    return Table.of(
        f"{heading} | [95%] | p | p\n(Holm) | questions",
        rows,
        "Against a random direction" if control.draws == 1 else "Against random directions",
        "A random direction has the norm of the vector, at the same layer and coefficients; "
        f"differences are paired by question.{_drawn(control)} The last row is one test of all "
        "coefficients, incoherent ones included: the mean of sign(c) · (vector − random "
        f"direction). Spearman’s ρ of the {name} is {wording.explained(control.rho_means)}.",
        [*("" for _ in control.comparisons), "reference"],
        narrow=True,
    )


def _drawn(control: ControlSummary) -> str:
    """Say of several random directions how they are counted; "" for one."""
    if control.least is None:
        return ""
    return (
        f" The {control.draws} directions are drawn as the questions are: intervals and p (the "
        "larger of Student’s t and of the questions’ signs) are over both; over all coefficients "
        f"the difference is {wording.number(control.least)} from the strongest of them and "
        f"{wording.number(control.most)} from the weakest."
    )


def _prompts(summary: SweepSummary) -> tuple[Table, ...]:
    def name(value: float) -> str:
        return "unsteered" if summary.method == UNSTEERED else wording.coefficient(value)

    gaps = [
        (f"{name(each.coefficient)} minus {wording.method_label(each.prompt)}", each.difference)
        for each in summary.prompt_comparisons
    ]
    return _against_prompting(summary.trait, gaps, summary.conditions)


def _against_prompting(
    trait: str,
    gaps: Sequence[tuple[str, PairedDifference]],
    references: Sequence[ConditionSummary],
) -> tuple[Table, ...]:
    """Return what stands against prompts, and these against neutral ones; none without any."""
    beyond = [
        (f"{wording.method_label(each.method)} minus neutral ones", each.over_neutral)
        for each in references
        if each.over_neutral is not None
    ]
    rows = [
        [said, wording.interval(gap.interval), wording.p_value(gap.p_holm)]
        + [str(gap.interval.n_questions)]
        for said, gap in (*gaps, *beyond)
    ]
    columns = f"Paired difference in {trait} | [95%] | p (Holm) | questions"
    note = (
        "What is minus a prompt of the trait, and what is minus neutral ones, is corrected apart."
    )
    return (Table.of(columns, rows, "Against prompting", note, narrow=True),) if rows else ()


def _rows(scored: Sequence[ScoredAnswer], summary: SweepSummary) -> list[ScoredAnswer]:
    """Return the rows with the unsteered ones at coefficient 0 of the steered series."""
    series = Series(summary.method, summary.layer)
    others = [
        row
        for row in scored
        if row.condition.coefficient is None
        or (row.condition.method == CONTROL and row.condition.series != series)
    ]
    return [*rows_of_series(scored, series), *others]


def _nearest(summary: SweepSummary) -> set[float]:
    """Return the run coefficients nearest to the wanted ones; of two the one further out."""
    points = [each.coefficient for each in summary.steered if each.coefficient is not None]
    wanted = EXAMPLE_COEFFICIENTS if points else ()
    return {min(points, key=lambda point: (abs(point - each), -abs(point))) for each in wanted}


def _references(summary: SweepSummary, chosen: set[float]) -> set[Condition]:
    """Return the references, and the control at the outermost chosen coefficients."""
    references = {
        Condition(each.method, None, each.layer)
        for each in summary.conditions
        if each.coefficient is None
    }
    ends = {min(chosen), max(chosen)} - {0.0} if chosen else set()
    return references | {Condition(CONTROL, each, summary.layer) for each in ends}


# -- a grid ----------------------------------------------------------------------------------------


def grid_content(run: Run) -> Content:
    """Return the section of a grid."""
    grid = grid_of(run)
    layer = grid.layers[len(grid.layers) // 2] if grid.best_layer is None else grid.best_layer
    scored = [
        row
        for row in score_answers(run.read("answers"), run.read("verdicts"), grid.trait)
        if row.condition.layer == layer
        or row.condition == UNSTEERED_CONDITION
        or row.condition.coefficient is None
    ]
    both, trait = two_judges(run, grid.trait), wording.title_of(grid.trait)
    lead = lead_of(read_words.headline(grid), both, run, grid.trait)
    alt = f"{trait} and coherence by layer and coefficient. {lead}"
    grey = Note("Grey text: not coherent. A dash was not measured.")
    blocks: tuple[Block, ...] = (
        Note(grid.selection_note, "warning", "Not a held-out result."),
        Image.of(render_layers(grid), alt),
        _layers(grid),
        *_against_prompting(grid.trait, [], grid.references),
        Fold("All cells", (_cells(grid), grey, *judges_table(both))),
        *judge_blocks(run),
        *side_by_side(
            *(grid.trait, scored, _shown(grid, layer), _grid_references(grid, layer)),
            at=f"at layer {layer}",
            notes=(
                " 0 is the unsteered model.",
                "Answers at the other layers are in answers.jsonl of the run folder.",
            ),
        ),
    )
    return Content(read_words.title(grid), lead, blocks)


def _layers(grid: GridSummary) -> Table:
    ranked = read_words.ranked(grid)
    return Table.of(
        f"Layer | Gain\n[95%] | at c | p | p (Holm,\n{len(grid.steered)} cells) | Coherence | "
        "Spearman’s ρ\n[95%] | Best in, %\nof resamples | Beyond random\n[95%] | "
        "p (Holm,\nlayers)",
        (_layer_row(grid, each) for each in ranked),
        "Layers, the best first",
        f"{read_words.sample_line(grid)}. Best is {grid.rule}. The gain is paired by question and "
        "in the direction of the coefficient’s sign, its p value from a sign-flip permutation "
        f"test. {read_words.resolution_note(grid)} Resamples draw whole questions and repeat the "
        "choice. “Beyond random” is the mean over coefficients of sign(c) · (vector − random "
        "direction of the same norm); several directions are drawn as the questions are.",
        [
            "best" if each.layer == grid.best_layer else "incoherent" if each.best is None else ""
            for each in ranked
        ],
    )


def _layer_row(grid: GridSummary, each: LayerSummary) -> tuple[str | None, ...]:
    best, over = each.best, each.over_control
    gain: tuple[str | None, ...] = (each.reason or "", None, None, None, None)
    if best is not None:
        gain = (
            wording.change(best.gain),
            wording.coefficient(best.coefficient),
            wording.p_value(best.p),
            wording.p_value(best.p_holm),
            wording.number(best.coherence),
        )
    shares = None if grid.selection is None else grid.selection.layer_shares
    return (
        *(str(each.layer), *gain, wording.interval(each.rho_means, 2)),
        wording.NONE if shares is None else wording.number(100 * shares.get(each.layer, 0)),
        wording.NONE if over is None else wording.change(over.interval),
        wording.NONE if over is None else wording.p_value(over.p_holm),
    )


def _cells(grid: GridSummary) -> Table:
    zero = [] if grid.unsteered is None else [grid.unsteered]
    every = [*zero, *grid.references, *grid.cells]

    def name(each: ConditionSummary) -> str:
        if each.coefficient == 0:
            return "unsteered"
        said = wording.label(each)
        return said if each.layer is None else f"{each.layer}, {said}"

    def style(each: ConditionSummary) -> str:
        if each.layer is None:
            return "reference"
        mean = each.coherence.mean
        return "incoherent" if mean is None or mean < grid.coherent_threshold else ""

    rows = (
        [name(each), wording.interval(each.trait), wording.interval(each.coherence)]
        + [_change(each, wording.change)[0]]
        + [wording.p_value(None if each.from_zero is None else each.from_zero.p)]
        + [_change(each, wording.change)[1], *_counts(each)]
        for each in every
    )
    return Table.of(
        f"Layer, coefficient | {wording.title_of(grid.trait)}\n[95%] | Coherence\n[95%] | "
        "Change from\nunsteered [95%] | p | p\n(Holm) | Scored, %\ntrait / coh. | "
        "Answers /\nquestions | Finished | Mean\ntokens",
        rows,
        styles=map(style, every),
    )


def _shown(grid: GridSummary, layer: int) -> set[Condition]:
    """Return the unsteered model, the best coefficient, and the outermost of the other sign."""
    best = grid.coefficients[-1] if grid.best_coefficient is None else grid.best_coefficient
    others = [each for each in grid.coefficients if each * best < 0]
    chosen = [best, *([max(others, key=abs)] if others else [])]
    return {UNSTEERED_CONDITION, *(Condition(grid.method, each, layer) for each in chosen)}


def _grid_references(grid: GridSummary, layer: int) -> set[Condition]:
    prompts = {Condition(each.method, None, each.layer) for each in grid.references}
    best = grid.best_coefficient
    return prompts if best is None else prompts | {Condition(CONTROL, best, layer)}


# -- methods at equal divergence -------------------------------------------------------------------

EXAMPLES = 4
PLACES = {
    "eval": "On held-out questions",
    "ood": "Out of distribution",
    "extract": "On the extraction set",
}


def comparison_section(run: Run) -> Content:
    """Return the section of one comparison."""
    found = read_comparison(run)
    both = comparison_judges(run, found)
    verdicts = comparison_lines(run, found, both)
    title = f"{wording.title_of(found.trait)}: weights or activations?"
    statistic = "mean" if found.statistic == "mean" else "95th percentile"
    acting = place_of(run.record["config"]["layers"])
    points = Table.of(
        "Questions | Method | Coefficient | Mean KL | 95th percentile | "
        "Mean KL,\nordinary prompts | Trait [95%] | n | Scored | Coherence [95%] | "
        "Weights minus this [95%] | p (Holm)",
        map(_point_row, found.points),
        "Every level",
        f"KL: nats per token, from the base model, on {MADE_EQUAL_ON[found.calibrated_on]}; "
        f"matched by its {statistic}. The vector acts at {wording.layers(acting)}.",
    )
    blocks: tuple[Block, ...] = (
        *(Note(line, "") for line in verdicts),
        Image.of(render_comparison(found), f"{title}. {verdicts[0]}"),
        comparison_table(found),
        *corrected_effects(run, {(each.split, each.method): each for each in found.overall}),
        *judges_table(both),
        points,
        *_beyond_neutral(found),
        *judge_blocks(Run(run.folder / found.overall[0].split)),
        Heading("Answers at the highest level"),
        Cards(_examples(run, found)),
    )
    return Content(title, verdicts[0], blocks)


def comparison_table(found: Comparison) -> Table:
    """Return every method over all levels."""
    return Table.of(
        "Questions | Method | Effect [95%] | n | Weights minus this [95%] | p (Holm) | "
        "Coherence, weights minus this [95%]",
        map(_overall_row, found.overall),
        "Over all levels",
        "Effect: change of the trait score from the unsteered model, in the direction asked for; "
        "the mean over levels. Differences are paired by question; p: two-sided sign-flip test, "
        "corrected over methods and splits (of the vector beside its controls for themselves). "
        "Random controls, where there are several, are drawn as "
        "the questions are: intervals and p (the larger of Student’s t and of the questions’ "
        "signs) are over both, and from … to … are the weakest and the strongest of them.",
    )


def _beyond_neutral(found: Comparison) -> tuple[Table, ...]:
    """Return what the trait's own system prompts do beyond neutral ones."""
    rows = [
        [SPLITS[each.split], f"{wording.method_label(each.method)} minus neutral ones"]
        + [*wording.gap(gap.interval, gap.p_holm)]
        for each in found.points
        if (gap := each.over_neutral) is not None
    ]
    title = "System prompts beside neutral ones"
    columns = f"Questions | Paired difference in {found.trait} | [95%] | pairs | p (Holm)"
    return (Table.of(columns, rows, title, narrow=True),) if rows else ()


def comparison_judges(run: Run, found: Comparison) -> TwoJudges | None:
    """Return what both judges say of every method, and of the diff beside it; None of one judge."""
    splits = dict.fromkeys(each.split for each in found.overall)
    parts = [Run(run.folder / split) for split in splits]

    def name(condition: Condition) -> str:
        return NAMES[condition.method]

    by_part = (pairs_of(part, found.trait, name, within=part.folder.name) for part in parts)
    pairs = [pair for own in by_part for pair in own]
    if not pairs:
        return None
    effects, gaps = [], []
    for one, two in zip(found.overall, read_comparison(run, by=SECOND).overall, strict=True):
        place = f"{NAMES[one.method]}, {SPLITS[one.split]}"
        effects.append(Beside(place, one.effect, two.effect))
        if one.difference is not None and two.difference is not None:
            gaps.append(Beside(f"weights minus {place}", one.difference, two.difference))
        if one.vector_gap is not None and two.vector_gap is not None:
            gaps.append(Beside(f"activations minus {place}", one.vector_gap, two.vector_gap))
    return of_pairs(found.trait, parts, pairs, [*gaps, *effects], by_place=False)


def comparison_lines(run: Run, found: Comparison, both: TwoJudges | None) -> tuple[str, ...]:
    """Return the lines of a comparison; how the judges agree stands in the first one."""
    first, *others = verdict_lines(found)
    part = Run(run.folder / found.overall[0].split)
    return lead_of(first, both, part, found.trait), *others


def verdict_lines(comparison: Comparison) -> tuple[str, ...]:
    """Return the answer in a line for each split, and a line on the controls."""
    by_split = grouped(comparison.overall, lambda each: each.split)
    lines = [_verdict({e.method: e for e in own}, split) for split, own in by_split.items()]
    said = "; ".join(
        f"{_method(each)}, {SPLITS[each.split]}: {wording.interval(each.effect)}"
        for each in comparison.overall
        if each.method in RANDOMS
    )
    return (*lines, f"Random controls at the same divergence moved it by: {said}.")


def _verdict(own: Mapping[str, Overall], split: str) -> str:
    """Say who steered further; before it which of both did not beat its random controls."""
    lora, activation = own[LORA], own[ACTIVATION]
    gap = activation.difference
    where = PLACES[split]
    if gap is None or gap.mean is None:
        return f"{where} nothing could be paired."
    said = {
        1: "weights steered further",
        -1: "activations steered further",
        0: "neither steered clearly further than the other",
    }[wording.clear_sign(gap, activation.p_holm)]
    lost = f"; coherence with weights is {wording.interval(activation.coherence)} higher"
    lost = "" if activation.coherence is None else lost
    beyond = [_beyond(own[each]) for each in RANDOMS if each in own]
    short = " and ".join(line for sign, line in beyond if sign < 1)
    clear = " and ".join(line for sign, line in beyond if sign == 1)
    return (
        f"{where}, at equal divergence, {f'{short}. Between the two, ' if short else ''}"
        f"{said}: weights moved the trait by "
        f"{wording.interval(lora.effect)} points, activations by "
        f"{wording.interval(activation.effect)}, a paired difference of {wording.interval(gap)} "
        f"(p {wording.p_value(activation.p_holm)}, Holm"
        f"{wording.unclear(gap, activation.p_holm, before='; ')}){lost}."
        f"{f' {clear[0].upper()}{clear[1:]}.' if clear else ''}"
    )


RANDOMS = {RANDOM_LORA: ("weights", "random difference"), RANDOM: ("activations", "random vector")}


def _beyond(control: Overall) -> tuple[int, str]:
    """Return whether a direction clearly beat its random controls (1, 0 or −1), in words."""
    direction, name = RANDOMS[control.method]
    of_weights = control.method == RANDOM_LORA
    gap = control.difference if of_weights else control.vector_gap
    p = control.p_holm if of_weights else control.vector_p
    random = f"a {name}" if control.draws == 1 else f"{control.draws} {name}s"
    if gap is None or gap.mean is None:
        return 0, f"{direction} could not be compared with {random}"
    sign = wording.clear_sign(gap, p)
    said = {
        1: "steered further than",
        0: "did not steer clearly further than",
        -1: "steered less far than",
    }[sign]
    points = f"{wording.change(gap)} points, p {wording.p_value(p)}"
    unclear = wording.unclear(gap, p, before="; ")
    return sign, f"{direction} {said} {random} ({points}{unclear})"


def _method(each: Overall | Point) -> str:
    """Return a method's name, and of how many random controls it is the mean."""
    return NAMES[each.method] + (f", mean of {each.draws}" if each.draws > 1 else "")


def _effect(each: Overall) -> str:
    """Return the effect, and of several random controls that of the weakest and the strongest."""
    said = wording.interval(each.effect)
    if each.least is None:
        return said
    return f"{said}, from {wording.number(each.least)} to {wording.number(each.most)}"


def _overall_row(each: Overall) -> tuple[str, ...]:
    return (
        *(SPLITS[each.split], _method(each), _effect(each)),
        str(each.effect.n_questions),
        wording.interval(each.difference) + wording.pairs(each.difference, each.effect.n_questions),
        *(wording.p_value(each.p_holm), wording.interval(each.coherence)),
    )


def _point_row(each: Point) -> tuple[str, ...]:
    unmatched = " (not matched)" if each.matched is False else ""
    return (
        *(SPLITS[each.split], _method(each), wording.number(each.coefficient, 2)),
        *(f"{wording.number(each.kl_mean, 3)}{unmatched}", wording.number(each.kl_p95, 2)),
        wording.number(each.ordinary_mean, 3),
        *(wording.interval(each.trait), str(each.trait.n), f"{100 * each.trait.coverage:.0f}%"),
        wording.interval(each.coherence),
        wording.interval(each.difference) + wording.pairs(each.difference, each.trait.n_questions),
        wording.p_value(each.p_holm),
    )


def _examples(run: Run, comparison: Comparison) -> tuple[Question, ...]:
    """Return the first questions with the answers of every method at the highest level."""
    levels = run.read("levels")
    highest = max(levels, key=lambda row: row["target"])["level"]
    wanted: set[tuple[str, float | None]] = {("none", None), ("prompt_pos", None)}
    wanted |= {(r["method"], r["coefficient"]) for r in levels if r["level"] == highest}
    by_question: dict[str, dict[str, str]] = {}
    for row in Run(run.folder / comparison.points[0].split).read("answers"):
        name = NAMES.get(row["method"])  # of several controls the first
        if name is not None and (row["method"], row["coefficient"]) in wanted:
            by_question.setdefault(row["question"], {})[name] = row["answer"]
    return tuple(
        Question(question, tuple(Card(*each) for each in found.items()))
        for question, found in list(by_question.items())[:EXAMPLES]
    )


# -- time ------------------------------------------------------------------------------------------


def latency_content(run: Run) -> Content:
    """Return the section on the time and memory that steering takes."""
    found = ratios([Timing(**row) for row in run.read("timings")])
    title, line = "What steering costs in time", _latency_line(found)
    columns = "Batch | Variant | Measure | Median | Time over base [95%]"
    variants = Table.of(columns, map(_latency_row, found), "Every variant")
    swaps = Table.of(
        "What | Time or memory",
        (wording.time_or_memory(**row) for row in run.read("times")),
        "Swaps, and what is kept beside the model",
        "Ratios are taken within a round; intervals are by Student's t over rounds. Merging keeps "
        "a copy of the weights that it touches, to restore them bit for bit.",
    )
    picture = Image.of(render_latency(found), f"{title}. {line}")
    return Content(title, line, (Note(line, ""), picture, variants, swaps))


def _latency_line(found: Sequence[Ratio]) -> str:
    batch = max(each.batch for each in found)
    times = {e.variant: e.ratio for e in found if (e.batch, e.measure) == (batch, TOKENS)}
    said = (f"{name} {wording.interval(each, 2)}" for name, each in times.items() if name != BASE)
    return (
        f"Time for a token over the base model's at batch {batch}: {', '.join(said)}. Merged "
        f"{speed_beside_base([times[MERGED]])}."
    )


def speed_beside_base(ratios: Sequence[Interval]) -> str:
    """Say of a variant whether it is as fast as the base, by its ratios at all batch sizes.

    Equal only where every whole interval is within 5% of 1: two one-sided tests at 2.5% each.
    """
    bounds = [(each.low or 0.0, each.high or np.inf) for each in ratios]
    if all(low >= 1 - wording.MARGIN and high <= 1 + wording.MARGIN for low, high in bounds):
        return f"is as fast as the base within {100 * wording.MARGIN:g}%"
    if all(low <= 1.0 <= high for low, high in bounds):
        return "is not shown to be faster or slower than the base"
    return "differs from the base in speed"


def _latency_row(each: Ratio) -> tuple[str, ...]:
    median = f"{wording.number(1000 * each.median, 0)} ms"
    if each.measure == TOKENS:
        median = f"{wording.number(each.median, 1)} tokens/s"
    return (str(each.batch), each.variant, each.measure, median, wording.interval(each.ratio, 2))


# -- side effects ---------------------------------------------------------------------------------


def side_effects_content(run: Run) -> Content:
    """Return the section on what steering changed besides its trait."""
    found, second = read_side_effects(run), read_side_effects(run, "second")
    lines, trait = side_effects_lines(found), run.record["config"]["trait"]
    title = f"{wording.title_of(trait)}: side effects"
    note = (
        "At the highest level, whose divergence all methods share (the prompt has its own). Change "
        "from the unsteered model [95%], paired by question; capability by item, and there vectors "
        "act on all tokens. “Every turn” is the slope over the turns of conversations; what is "
        "refused is told by a rule. Questions went the wrong way where the steered trait moved "
        "against what was asked for; a star there: another share than that of the weights. "
        "* p < 0.05, corrected within each kind of measure (Holm); random controls are not tested. "
        "Scores are the judge’s own: how it misses other traits’ answers under these directions "
        "was not rated, so that nothing corrects them."
    )
    tables = [replace(side_effects_table(found), title="Every measure", note=note)]
    if second:
        tables.append(replace(side_effects_table(second), title="By the second judge"))
    drawn = render_side_effects(trait, found, gap_by_turn(run, trait))
    picture = Image.of(drawn, f"{title}. {lines[0]}")
    blocks = (*(Note(line, "") for line in lines), picture, *tables, *judge_blocks(run))
    return Content(title, lines[0], blocks)


# -- in the terminal -------------------------------------------------------------------------------


def summary_lines(summary: SweepSummary | GridSummary, run: Run) -> list[str]:
    """Say what a sweep or a grid showed, and how the judges of the run agree on it."""
    if isinstance(summary, SweepSummary):
        lead, *others = wording.headline(summary), wording.statistics_line(summary)
    else:
        lead = read_words.headline(summary)
        others = [read_words.resolution_note(summary), summary.selection_note]
    lead = lead_of(lead, two_judges(run, summary.trait), run, summary.trait)
    return [line for line in (lead, *others) if line]


def summary_table(summary: SweepSummary | GridSummary) -> Table:
    """Return the conditions of a sweep, or the layers of a grid, in fewer columns than a page's."""
    if isinstance(summary, GridSummary):
        return _layers(summary).only(0, 1, 2, 4, 5, 6)
    return _conditions(summary).only(0, 1, 2, 5, 6, 9, 11)
