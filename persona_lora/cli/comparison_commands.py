"""Commands that compare: weights with activations, models with models, runs with runs."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lora.cli import shared_options as shared
from persona_lora.cli.console import progress_bars, show
from persona_lora.cli.option_groups import refuse_useless
from persona_lora.cli.program import command
from persona_lora.core.chat import UNSTEERED, Conversation
from persona_lora.core.content import path_digest
from persona_lora.core.errors import UserError
from persona_lora.core.files import refuse_folder
from persona_lora.core.options import (
    ComparisonOptions,
    GenerationOptions,
    JudgesChoice,
    Replace,
    TaskOptions,
    TimingOptions,
)
from persona_lora.core.runs import Output, Run
from persona_lora.core.strength import Strength, coefficients_of
from persona_lora.core.traits import Trait, load_trait

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from persona_lora.core.lora_diff import LoRADiff
    from persona_lora.judges.verdicts import Judges
    from persona_lora.models.loading import ChatModel
    from persona_lora.studies.steering.read_comparison import Comparison
    from persona_lora.studies.steering.side_effects import Watched


Spoken = Annotated[GenerationOptions, ("max_new_tokens", "seed", "batch_size")]


@dataclass(frozen=True)
class PairOfWays:
    """The difference of weights and the vector that are compared, and where the vector acts."""

    diff: Annotated[Path, shared.ONE_DIFF]
    activation_vector: Annotated[Path, "A steering vector (.safetensors or published .pt)."]
    layers: shared.Layers = None
    positions: shared.Acting = "response"
    allow_other_base: shared.OtherBase = False
    random_controls: shared.RandomControls = 3
    coefficients: Annotated[
        tuple[Strength, ...],
        "Of the diff, or nats as in 0.05nat (calibrate); the vector is brought to the same "
        "divergence.",
    ] = ComparisonOptions.coefficients
    engine: shared.Engines = ()
    engine_tolerance: shared.EngineTolerance = None

    def record(self) -> dict[str, str]:
        """Return what a run's configuration keeps of the places of both, and of who answers."""
        places = {"diff": str(self.diff), "vector_path": str(self.activation_vector)}
        return {**places, **shared.EngineOptions(self.engine, self.engine_tolerance).record()}

    def answering(self) -> shared.EngineOptions:
        """Return who answers beside the model in this process; UserError for what is no URL."""
        engine = shared.EngineOptions(self.engine, self.engine_tolerance)
        engine.check(diffs_alone=False, shared=True)
        return engine

    def by_seed(self) -> dict[str, PairOfWays]:
        """Return the ways of every training seed in the diff's folder by its name."""
        found = shared.diffs_by_seed(self.diff, self.coefficients)
        return {name: dataclasses.replace(self, diff=at) for name, at in found.items()}

    def held(self) -> list[LoRADiff]:
        """Return what the engine has to hold: the diff, of all training seeds."""
        from persona_lora.core.lora_diff import LoRADiff

        return [LoRADiff.load(each.diff) for each in self.by_seed().values() if self.engine]

    def load(self, seed: int) -> tuple[Any, list[Any], tuple[float, ...]]:
        """Return the ways of steering, random ones beside them, and what they were made of.

        The coefficients of the diff come last; UserError for nats of none.
        """
        from persona_lora.core.lora_diff import LoRADiff, random_diff_like
        from persona_lora.core.steering_vector import length_of
        from persona_lora.core.vector_files import load_vector
        from persona_lora.steering.directions import random_like
        from persona_lora.studies.steering.calibration import acting_coefficients, bank_of_methods

        if self.allow_other_base:
            shared.refuse_nats(self.coefficients, shared.OTHER_MODEL)
        seeds = shared.control_seeds(seed, self.random_controls)
        weights, whole = LoRADiff.load(self.diff), load_vector(self.activation_vector)
        vector = whole.at(shared.layers_together(self.layers, whole.num_layers))
        length_of(weights, self.diff)
        length_of(vector, self.activation_vector)
        diffs = [random_diff_like(weights, each) for each in seeds]
        vectors = [random_like(vector, each) for each in seeds]
        bank = bank_of_methods(weights, vector, diffs, vectors, self.positions)
        values = coefficients_of(self.coefficients, self.diff, weights.content())
        acting_coefficients(values)
        return bank, [weights, whole], values


@dataclass(frozen=True)
class FurtherOptions(TimingOptions):
    """What else is compared: time, the two spaces, and what else each way of steering changes."""

    latency: Annotated[bool, "Time all ways of steering as well."] = False
    spaces: Annotated[
        tuple[str, ...], "Compare both spaces over these traits as well: evil,sycophancy."
    ] = ()
    trait_vector_dir: Annotated[
        Path, "Where --spaces finds {trait}/diff (or {trait}/seed*/diff), and vectors/{trait}/."
    ] = Path("checkpoints")
    side_effects: Annotated[
        tuple[str, ...],
        "Measure what else changes as well: other traits by name, refusal, turns, capability.",
    ] = ()
    task_limit: Annotated[
        int | None, "Use only the first N items of each task of --side-effects capability."
    ] = None


@command("compare")
def compare(
    *,
    trait: shared.PromptedTraitOptions,
    ways: PairOfWays,
    compared: Annotated[ComparisonOptions, ("match", "calibrate_on", "split", "max_questions")],
    further: FurtherOptions,
    output: shared.HeldRunOptions,
    model: shared.ModelOptions,
    judging: JudgesChoice,
    generation: Spoken = GenerationOptions(max_new_tokens=60),
) -> None:
    """Compare weight steering with activation steering at equal divergence from the base model.

    Random differences and random vectors stand beside them, the trait's own prompts and neutral
    ones. A folder that train --seeds made is compared seed by seed, and the seeds are read
    together. Run again, it goes on where it stopped. An --engine answers unsteered, under prompts
    and steered by the diff; the model in this process does the rest.

    Example: persona-lora compare --trait evil --diff checkpoints/evil/diff --layers 19
    --activation-vector checkpoints/vectors/evil/evil_response_avg.safetensors
    """
    from persona_lora.judges.choice import make_judges
    from persona_lora.studies.steering import run as experiment
    from persona_lora.studies.steering.spaces import directions_among

    engine, loaded, parts = ways.answering(), trait.load(), ways.by_seed()
    first = next(iter(parts.values()))
    bank, made, coefficients = first.load(generation.seed)
    directions = _directions(further, loaded.name, bank, ways, seeds=len(parts))
    watched = _watched(further, trait, loaded, compared.max_questions)
    judged = (loaded, *watched.traits)
    judge = shared.judging_of(judging, judged)
    said = _conversations(loaded, watched, compared)
    folder = output.output or Path("results") / "compare" / loaded.name
    written = output.at_seeds(judge, {folder / name: way.record() for name, way in parts.items()})
    comparing = dataclasses.replace(compared, coefficients=coefficients)
    planned = experiment.planned_comparison(
        loaded, bank, comparing, generation, len(parts), trait.datasets_dir
    )
    made, held = [*made, *directions_among(*directions)], ways.held()
    engine.reach(held)
    chat_model = model.load(made, asked=said, runs=[(written[0], planned)])
    elsewhere = engine.open(chat_model, held)
    judges = {each.label: make_judges(each, chat_model, judge) for each in judged}
    compare_one = partial(
        experiment.compare, comparing=comparing, options=generation, datasets=trait.datasets_dir
    )
    with progress_bars():
        for to, (name, each) in zip(written, parts.items(), strict=True):
            # one seed's at a time: each brings random controls of its own, drawn anew
            bank = bank if each is first else each.load(_drawn_from(name, parts, generation))[0]
            bank = dataclasses.replace(bank, elsewhere=elsewhere)
            found = compare_one(chat_model, loaded, bank, judges[loaded.label], to)
        at = written[0], trait.datasets_dir
        more = _further(chat_model, loaded, bank, further, directions, *at)
        more += _side_effects(chat_model, loaded, bank, watched, judges, written[0], generation)
    if len(written) > 1:
        shared.show_seeds(folder, written)
    else:
        _show_compared(Run(written[0].path), found, more)


def _drawn_from(name: str, parts: Mapping[str, PairOfWays], generation: GenerationOptions) -> int:
    """Return the first seed of a training seed's random controls, which no other one has."""
    place = sorted(parts, key=lambda each: (len(each), each)).index(name)  # seed2 before seed10
    return generation.seed + place * parts[name].random_controls


def _show_compared(run: Run, found: Comparison, more: Sequence[Path]) -> None:
    """Write the report of a comparison, with what was measured beside it, and say what it holds."""
    from persona_lora.report.trust import standing
    from persona_lora.studies.report_page import write_report
    from persona_lora.studies.steering import read

    page = write_report([run.folder, *more], run.folder / "report.html")
    lines = read.comparison_lines(run, found, read.comparison_judges(run, found))
    show(standing(run), *lines, read.comparison_table(found).only(0, 1, 2, 4, 5))
    for each in more:
        if Run(each).record["command"] == "side-effects":
            changes = read.read_side_effects(Run(each))
            show(*read.side_effects_lines(changes), read.side_effects_table(changes))
    show(f"report: {page}")


def _further(
    chat_model: ChatModel,
    trait: Any,
    bank: Any,
    further: FurtherOptions,
    directions: Any,
    written: Output,
    datasets: Path | None,
) -> list[Path]:
    """Measure latency and both spaces, where they are asked for; return their runs."""
    from persona_lora.studies.steering.latency import run_latency
    from persona_lora.studies.steering.run import levels_of
    from persona_lora.studies.steering.spaces import run_spaces

    written = Output(written.path, written.overwrite)
    latency, spaces = written.path / "latency", written.path / "spaces"
    if further.latency:
        timing = TimingOptions(further.batches, rounds=further.rounds)
        levels, to = levels_of(written.path), written.at(latency)
        run_latency(chat_model, trait, bank, levels, to, timing=timing, datasets=datasets)
    if further.spaces:
        (layer,) = bank.record["layers"]
        diffs, vectors = directions
        run_spaces(chat_model, diffs, vectors, layer, written.at(spaces), datasets=datasets)
    return [latency] * further.latency + [spaces] * bool(further.spaces)


def _directions(
    further: FurtherOptions, trait: str, bank: Any, ways: PairOfWays, *, seeds: int
) -> Any:
    """Return the directions of all traits of --spaces; UserError for options without their part."""
    from persona_lora.studies.steering.spaces import trait_directions

    more = [further.latency, further.spaces, further.side_effects]
    for flag, asked in zip(("--latency", "--spaces", "--side-effects"), more, strict=True):
        if asked and seeds > 1:
            raise UserError(
                f"{flag} is of one diff, and {ways.diff} holds {seeds} training seeds; give one of "
                "them as --diff, or leave it out"
            )
    refuse_useless("batches rounds", "without --latency", unless=further.latency)
    capability = "capability" in further.side_effects
    refuse_useless("task_limit", "without --side-effects capability", unless=capability)
    refuse_useless("trait_vector_dir", "without --spaces", unless=further.spaces)
    if not further.spaces:
        return {}, {}
    if len(bank.record["layers"]) > 1:
        raise UserError(f"--spaces compares at one layer; --layers {ways.layers!r} names several")
    named = dict.fromkeys([trait, *further.spaces])
    return trait_directions(list(named), further.trait_vector_dir)


def _conversations(
    trait: Trait, watched: Watched, compared: ComparisonOptions
) -> list[Conversation]:
    """Return all that the model is asked; UserError for a trait without such questions."""
    from persona_lora.studies.asking.run import asked_of
    from persona_lora.studies.steering.run import REFERENCES, questions_of

    splits, most = questions_of(trait, compared), compared.max_questions
    said = asked_of(trait, splits, [UNSTEERED, *REFERENCES], most)
    for other in watched.traits:
        said += asked_of(other, ["eval"], most=most)
    return said


def _watched(
    further: FurtherOptions, trait: shared.TraitOptions, steered: Trait, max_questions: int | None
) -> Watched:
    """Return what --side-effects names; UserError for the steered trait, or one there is not."""
    from persona_lora.studies.steering.side_effects import PARTS, Watched

    named = dict.fromkeys(further.side_effects)
    parts = tuple(each for each in named if each in PARTS)
    traits = tuple(load_trait(each, trait.datasets_dir) for each in named if each not in PARTS)
    if any(each.name == steered.name for each in traits):
        raise UserError(
            f"--side-effects names {steered.name}, which is what is steered; name other traits, or "
            f"{', '.join(PARTS)}"
        )
    tasks = TaskOptions(limit=further.task_limit, datasets_dir=trait.datasets_dir)
    watched = Watched(traits, parts, max_questions, tasks)
    watched.check(steered)
    return watched


def _side_effects(
    chat_model: ChatModel,
    trait: Trait,
    bank: Any,
    watched: Watched,
    judges: Mapping[str, Judges],
    written: Output,
    generation: GenerationOptions,
) -> list[Path]:
    """Measure what else the methods of a comparison change; return its run, if there is one."""
    from persona_lora.studies.steering.side_effects import run_side_effects

    if not (watched.traits or watched.parts):
        return []
    compared = Run(written.path)
    beside = dataclasses.replace(written.at(compared.folder / "side_effects"), protocol=None)
    run_side_effects(chat_model, trait, bank, compared, watched, judges, beside, options=generation)
    return [beside.path]


@command("benchmark")
def benchmark(
    *,
    tasks: TaskOptions,
    mix: shared.MixOptions = shared.MixOptions(positions="all"),
    model: shared.AdaptedModelOptions,
    output: shared.RunOptions = shared.RunOptions(Path("results/benchmark")),
) -> None:
    """Measure capability before and after steering (or a finetune), item by item.

    The reference is the plain model: without the adapter where one is given, unsteered. Needs the
    extra "benchmark" for tasks of the harness.

    Example: persona-lora benchmark --tasks choice,steps,perplexity
    --diff checkpoints/evil/diff --coefficient 1.0 --output results/benchmark/evil
    """
    from persona_lora.report.comparisons import task_table
    from persona_lora.studies.asking.capability import check_tasks, run_benchmarks

    check_tasks(tasks)
    refuse_useless("layers positions", "without --vector", unless=mix.vector)
    if not mix.diff and not mix.vector:
        refuse_useless("coefficient allow_other_base", "without --diff or --vector")
    if not (mix.diff or mix.vector or model.adapter):
        raise UserError("there is nothing to compare; give --diff, --vector or --adapter")
    model.refuse_nats_beside_adapter(mix.coefficient)
    steering = mix.load()
    record = {
        "diffs": [str(path) for path in mix.diff],
        "vectors": [str(path) for path in mix.vector],
        "coefficients": steering.coefficients,
        "layers": mix.layers,
        **model.worn(),
    }
    inputs = {str(path): path_digest(path) for path in (*mix.diff, *mix.vector)}
    written = dataclasses.replace(output.at(output.folder, record=record), inputs=inputs)
    chat_model = model.load(steering.directions)
    conditions: dict[str, AbstractContextManager[Any]] = {
        "plain": chat_model.base(),
        "changed": steering.steerer(chat_model),
    }
    scores = run_benchmarks(chat_model, conditions, tasks, written)
    show(task_table(scores), f"{output.folder / 'scores.csv'}")


@command("paired")
def paired(
    *,
    reference: Annotated[Path, typer.Argument(help="A run of evaluate to compare with.")],
    runs: Annotated[list[Path], typer.Argument(help="Runs of evaluate on the same questions.")],
    output: Annotated[Path | None, "A CSV to write the table to."] = None,
    overwrite: Replace = False,
) -> None:
    """Compare runs of evaluate with one of them, paired by question.

    Example: persona-lora paired results/drift/evil/plain results/drift/evil/weights
    """
    from persona_lora.report.comparisons import RUN_COLUMNS, compare_runs, run_table, write_found
    from persona_lora.report.wording import judged_by

    if output is not None:
        shared.refuse_to_replace(output, overwrite)
    first, *others = (Run(shared.run_folder(path)) for path in (reference, *runs))
    found = compare_runs(others, first)
    show(run_table(found), judged_by(*(each.judge for each in found)).strip())
    if output is not None:
        write_found(output, RUN_COLUMNS, found)


@command("report")
def report(
    *,
    runs: Annotated[list[Path], typer.Argument(help="Runs: sweep, evaluate, compare, optimize …")],
    output: Annotated[Path, "The HTML file to write; a page that is there is replaced."] = Path(
        "results/report.html"
    ),
) -> None:
    """Write one self-contained HTML page about one or several runs.

    Example: persona-lora report results/sweep/evil results/sweep/sycophancy
    """
    from persona_lora.studies.report_page import write_report

    refuse_folder(output)
    write_report([shared.run_folder(path) for path in runs], output)
    show(f"report: {output.resolve()}")


@command("research-questions")
def research_questions(
    *,
    results: Annotated[Path, "Where scripts/reproduce.sh left its runs."] = Path("results"),
    output: Annotated[
        Path,
        "The page to write, with its pictures in figures/ beside it (those are replaced).",
    ] = Path("results/answers.md"),
    overwrite: Replace = False,
) -> None:
    """Answer the five research questions on one page, from the runs that are there.

    Example: persona-lora research-questions --results results --output results/answers.md
    """
    from persona_lora.studies.research_questions import write_research_questions

    shared.refuse_to_replace(output, overwrite)
    missing = write_research_questions(results, output)
    if missing:
        show(f"not measured yet: {', '.join(missing)}")
    show(f"page: {output.resolve()}")
