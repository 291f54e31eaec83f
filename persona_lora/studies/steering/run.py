"""How does the trait move with the coefficient, and do weights move it further than activations?

All conditions are rows of the same batches. Beside the steered rows go the same questions under the
trait's positive and negative system prompt, prompting being the baseline to fear, and under neutral
ones, which are the floor of these. A steering vector is
swept over layers as well, with a random direction of the same norm as control. In a comparison a
diff, a steering vector and a random control of each are brought to the same divergence from the
base model first, and are asked held-out questions and ones out of distribution.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from persona_lora.core import progress
from persona_lora.core.chat import UNSTEERED, Condition, place_of
from persona_lora.core.content import digest_of, numbered
from persona_lora.core.errors import UserError
from persona_lora.core.files import write_csv
from persona_lora.core.lora_diff import LoRADiff, finite_coefficient
from persona_lora.core.options import ComparisonOptions, GenerationOptions, SweepOptions
from persona_lora.core.protocol import Design
from persona_lora.core.runs import Output, Planned, Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.traits import NEUTRAL_INPUTS, Split, Trait
from persona_lora.judges.judging import Judge
from persona_lora.judges.verdicts import judge_answers, lazily
from persona_lora.models.loading import ChatModel
from persona_lora.projections.inputs import load_ordinary_prompts
from persona_lora.report import wording
from persona_lora.report.scores import (
    CONTROL,
    SECOND,
    answers_columns,
    answers_table,
    control_name,
    method_of,
)
from persona_lora.report.summary import SweepSummary, write_summary
from persona_lora.steering.activations import Positions
from persona_lora.steering.bank import Bank, Elsewhere, check_layers
from persona_lora.studies.asking.run import (
    answer_rows,
    directions_of_others,
    open_planned,
    plan_rows,
)
from persona_lora.studies.report_page import write_report
from persona_lora.studies.steering.calibration import (
    Level,
    beside_prompts,
    match_divergence,
    on_own_answers,
    on_prompts,
)
from persona_lora.studies.steering.divergence import measure_divergences, ordinary_texts
from persona_lora.studies.steering.figure import render_comparison, render_sweep
from persona_lora.studies.steering.figure_grid import render_layers
from persona_lora.studies.steering.read_comparison import (
    LORA,
    METHODS,
    Comparison,
    read_comparison,
    write_points,
)
from persona_lora.studies.steering.read_grid import GridSummary, is_grid, write_grid

LEVELS = "levels"
CALIBRATED_ON = 12  # questions, spread over those that are asked
REFERENCES = (Condition("prompt_pos"), Condition("prompt_neg"), Condition("prompt_neutral"))


@dataclass(frozen=True, eq=False)
class Population:
    """Conditions, the unsteered one (or coefficient 0) among them, and the directions they name.

    ``made`` are the directions that were made beforehand, whole.
    """

    conditions: tuple[Condition, ...]
    bank: Bank = field(default_factory=Bank)
    made: tuple[LoRADiff | SteeringVector, ...] = ()

    def answered_by(self, elsewhere: Elsewhere | None) -> Population:
        """Return the same, with who answers its rows; None is the model in this process."""
        return replace(self, bank=replace(self.bank, elsewhere=elsewhere))


def diff_population(diff: LoRADiff, coefficients: Sequence[float]) -> Population:
    """Return one diff, held live, at many coefficients; 0 is always among them."""
    values = _values(coefficients)
    bank = Bank(
        diffs={"lora": diff},
        record={"diff_norm": diff.norm(), "coefficients": values},
        inputs=diff.inputs("the diff"),
    )
    return Population(tuple(Condition("lora", value) for value in values), bank, (diff,))


def vector_population(
    vector: SteeringVector,
    layers: Sequence[int],
    coefficients: Sequence[float],
    positions: Positions = "response",
    controls: Sequence[SteeringVector] = (),
    *,
    at_once: bool = False,
) -> Population:
    """Return a steering vector at many coefficients at each of several layers, one layer per row.

    ``at_once``: at all of the layers in each row, with the same coefficient. ``controls`` are
    other vectors (random ones of the same norm) that get the same layers and coefficients under
    the methods "random", "random#2" …
    """
    check_layers(layers)
    values = _values(coefficients)
    random = {control_name(CONTROL, at): each for at, each in enumerate(controls)}
    vectors = {"activation": vector, **random}
    groups = [list(layers)] if at_once else [[layer] for layer in layers]
    places = {place_of(group): group for group in groups}
    places_of_each = [(method, place) for method in vectors for place in places]
    bank = Bank(
        vectors={
            Condition(method, layer=place).direction: vectors[method].at(places[place])
            for method, place in places_of_each
        },
        positions=positions,
        record={
            "method": "activation",
            "vector": {
                "trait": vector.trait,
                "method": vector.method,
                "position": vector.position,
                "norms": {str(at): norm for at, norm in vector.at(layers).norms().items()},
            },
            "layers": list(places),
            "coefficients": values,
            "positions": positions,
            "controls": [dict(each.sources) for each in controls],
        },
        inputs={
            "the vector": vector.content(),
            **numbered("random vector", [each.content() for each in controls]),
        },
    )
    steered = [
        Condition(method, value, place)
        for method, place in places_of_each
        for value in values
        if value
    ]
    return Population((UNSTEERED, *steered), bank, (vector,))


def prompt_population() -> Population:
    """Return only the model as it is, to stand beside the prompting references."""
    return Population((UNSTEERED,), Bank(record={"method": "prompt"}))


def _values(coefficients: Sequence[float]) -> list[float]:
    values = sorted({finite_coefficient(value) + 0.0 for value in coefficients} | {0.0})
    if len(values) < 2:
        raise UserError("a sweep needs at least one coefficient other than 0")
    return values


@dataclass(frozen=True)
class SweepResult:
    """The summary of a sweep (a grid where several layers were run), and where its files are."""

    summary: SweepSummary | GridSummary
    run: Path
    plot: Path
    report: Path


def sweep(
    chat_model: ChatModel,
    trait: Trait,
    population: Population,
    judge: Callable[[], Judge],
    output: Output | Path,
    *,
    sweeping: SweepOptions = SweepOptions(),
    options: GenerationOptions = GenerationOptions(),
    datasets: Path | None = None,
) -> SweepResult:
    """Run a sweep into the folder ``output``; run again, it goes on where it stopped.

    Writes the run's rows (answers, verdicts, divergence, validation), ``sweep.csv``, the summary as
    JSON and CSV, a plot and ``report.html``. The unsteered model is always among the rows: it is
    what the others are compared with.
    """
    seeds = Output.of(output).seeds
    planned = planned_sweep(trait, population, sweeping, options, seeds, datasets)
    conditions = [*population.conditions, *(REFERENCES if sweeping.references else ())]
    plan = plan_rows(
        trait,
        sweeping.split,
        conditions,
        samples=options.samples,
        max_questions=sweeping.max_questions,
    )
    bank = population.bank
    rows = [row.condition.coefficients for row in plan]
    steerer = bank.answering(chat_model, rows)
    run = open_planned(output, planned, chat_model)
    with run:
        answer_rows(chat_model, plan, steerer, run, options)
        if sweeping.divergence and not run.read("divergence"):
            with progress.stage("divergence"):
                prompts = load_ordinary_prompts(datasets)
                divergences = measure_divergences(chat_model, bank, population.conditions, prompts)
            run.write("divergence", [dataclasses.asdict(each) for each in divergences])
        judge_answers(run, judge, trait)
    return write_results(run, trait.name)


def planned_sweep(
    trait: Trait,
    population: Population,
    sweeping: SweepOptions,
    options: GenerationOptions,
    seeds: int = 1,
    datasets: Path | None = None,
) -> Planned:
    """Return what is known of a sweep before its model is loaded."""
    bank = population.bank
    config = {
        "trait": trait.name,
        **bank.record,
        **sweeping.record(),
        "generation": dataclasses.asdict(options),
        **directions_of_others(trait, population.made),
    }
    inputs = {**trait.inputs(), **bank.inputs}
    if sweeping.divergence:
        inputs["the ordinary prompts"] = digest_of(load_ordinary_prompts(datasets))
    inputs |= NEUTRAL_INPUTS if sweeping.references else {}
    questions = set(trait.questions[sweeping.split][: sweeping.max_questions])
    asked: dict[str, int] = {sweeping.split: len(questions)}
    design = Design.of("sweep", asked, _family(population.conditions), seeds)
    return Planned("sweep", config, options.seed, inputs, design)


def _family(conditions: Sequence[Condition]) -> tuple[str, ...]:
    """Return what is compared with the unsteered model as a protocol names it: "layer 12, +1"."""
    return tuple(
        ("" if each.layer is None else f"{wording.layers(each.layer)}, ") + f"{each.coefficient:+g}"
        for each in conditions
        if each.coefficient and method_of(each.method) != CONTROL
    )


def write_results(run: Run, trait: str) -> SweepResult:
    """Write tables, statistics, plot and report from the rows of a sweep."""
    answers, second = run.read("answers"), run.read(SECOND)
    table = answers_table(answers, run.read("verdicts"), trait, second)
    columns = answers_columns(trait, answers, second=bool(second))
    write_csv(run.folder / "sweep.csv", columns, table)
    page = run.folder / "report.html"
    summary: SweepSummary | GridSummary
    if is_grid(run):
        summary, plot = write_grid(run), run.folder / "layers.png"
        render_layers(summary).save(plot)
    else:
        summary, plot = write_summary(run), run.folder / "sweep.png"
        render_sweep(summary).save(plot)
    write_report([run.folder], page)
    return SweepResult(summary, run.folder, plot, page)


# -- weights beside activations ------------------------------------------------------------------


def compare(
    chat_model: ChatModel,
    trait: Trait,
    bank: Bank,
    judge: Callable[[], Judge],
    output: Output | Path,
    *,
    comparing: ComparisonOptions = ComparisonOptions(),
    options: GenerationOptions = GenerationOptions(),
    datasets: Path | None = None,
) -> Comparison:
    """Calibrate, ask, judge and compare; run again, it goes on where it stopped.

    The other methods are brought to the divergences of the diff at its coefficients, on what
    ``comparing.calibrate_on`` names; what that does to ordinary prompts stands beside. Writes
    ``levels.jsonl``, a run folder a split with answers and verdicts, ``comparison.csv``,
    ``comparison.png`` and ``report.html``.
    """
    output = Output.of(output)
    planned = planned_comparison(trait, bank, comparing, options, output.seeds, datasets)
    asked, prompts = questions_of(trait, comparing), load_ordinary_prompts(datasets)
    shared = lazily(judge)  # by both sets of questions
    most = comparing.max_questions
    run = open_planned(output, planned, chat_model, parts=list(asked))
    with run:
        levels = _calibrated(run, chat_model, bank, prompts, asked, comparing)
        conditions = [UNSTEERED, *(level.condition for level in levels), *REFERENCES]
        for split in asked:
            below = {**planned.config, "split": split, "max_questions": most}
            part = open_planned(
                Output(run.folder / split, config=output.config, inputs=output.inputs),
                replace(planned, command="compare split", config=below, design=None),
                chat_model,
            )
            with part:
                plan = plan_rows(
                    trait, split, conditions, samples=options.samples, max_questions=most
                )
                mixes = [row.condition.coefficients for row in plan]
                answer_rows(chat_model, plan, bank.answering(chat_model, mixes), part, options)
                judge_answers(part, shared, trait)
            run.write("validation", part.read("validation"))  # of the judge, the same for all
        run.write("splits", [{"split": split} for split in asked])
        found = read_comparison(run)
        write_points(run, found)
        render_comparison(found).save(run.folder / "comparison.png")
    write_report([run.folder], run.folder / "report.html")
    return found


def planned_comparison(
    trait: Trait,
    bank: Bank,
    comparing: ComparisonOptions,
    options: GenerationOptions,
    seeds: int = 1,
    datasets: Path | None = None,
) -> Planned:
    """Return what is known of a comparison before its model is loaded."""
    config = {
        "trait": trait.name,
        "coefficients": list(comparing.coefficients),
        "statistic": comparing.match,
        "calibrate_on": comparing.calibrate_on,
        **bank.record,
        "generation": dataclasses.asdict(options),
    }
    prompts = digest_of(load_ordinary_prompts(datasets))
    inputs = {**trait.inputs(), **bank.inputs, "the ordinary prompts": prompts, **NEUTRAL_INPUTS}
    asked = questions_of(trait, comparing)
    family = [f"{split}: {method}" for split in asked for method in METHODS if method != LORA]
    numbers: dict[str, int] = {split: len(each) for split, each in asked.items()}
    design = Design.of("compare", numbers, tuple(family), seeds)
    return Planned("compare", config, options.seed, inputs, design)


def questions_of(trait: Trait, comparing: ComparisonOptions) -> dict[Split, tuple[str, ...]]:
    """Return the questions of the splits that have any; UserError where none has."""
    most = comparing.max_questions
    asked = {each: tuple(trait.questions[each][:most]) for each in comparing.split}
    if not any(asked.values()):
        raise UserError(f"the trait {trait.name} has no {' or '.join(comparing.split)} questions")
    return {split: questions for split, questions in asked.items() if questions}


def _calibrated(
    run: Run,
    chat_model: ChatModel,
    bank: Bank,
    prompts: Sequence[str],
    asked: Mapping[Split, Sequence[str]],
    comparing: ComparisonOptions,
) -> list[Level]:
    """Return the levels of the run; where it has none yet they are calibrated."""
    levels = levels_of(run.folder)
    if levels:
        return levels
    with progress.stage("calibration"):
        ordinary = on_prompts(chat_model, bank, ordinary_texts(chat_model, prompts))
        measured = ordinary
        if comparing.calibrate_on != "prompts":
            questions = [question for each in asked.values() for question in each]
            step = max(1, math.ceil(len(questions) / CALIBRATED_ON))
            measured = on_own_answers(chat_model, bank, questions[::step])
        levels = match_divergence(measured, comparing.coefficients, statistic=comparing.match)
        levels = levels if measured is ordinary else beside_prompts(levels, ordinary)
    run.write(LEVELS, [dataclasses.asdict(level) for level in levels])
    return levels


def levels_of(output: Path) -> list[Level]:
    """Return the levels that a comparison has calibrated."""
    return [Level(**row) for row in Run(output).read(LEVELS)]
