"""Commands that train, extract, steer and ask: one trait, from its data to a curve."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from persona_lora.cli import shared_options as shared
from persona_lora.cli.console import progress_bars, show
from persona_lora.cli.option_groups import refuse_useless
from persona_lora.cli.program import PANELS, app, command
from persona_lora.core.chat import COHERENCE, UNSTEERED, Conversation
from persona_lora.core.errors import UserError
from persona_lora.core.files import refuse_unwritable
from persona_lora.core.options import (
    Elicitation,
    GenerationOptions,
    JudgeChoice,
    JudgesChoice,
    Replace,
    SweepOptions,
    Thresholds,
)
from persona_lora.core.runs import Output, Run
from persona_lora.core.strength import Nats, Strength, acting_at, coefficients_of
from persona_lora.core.traits import Trait, load_pairs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from persona_lora.judges.choice import JudgeOptions
    from persona_lora.studies.asking.run import Evaluation, Steering
    from persona_lora.studies.steering.run import Population, SweepResult
    from persona_lora.studies.vectors.run import Extracted

OWN_PARSER: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}


@app.command(**OWN_PARSER, rich_help_panel=PANELS["train"])
def train(context: typer.Context) -> None:
    """Train a positive and a negative LoRA for a trait, and write their difference.

    Flags are TRL's and PEFT's own names, also in the YAML: persona-lora train --help.

    Example: persona-lora train --config train_configs/sycophancy.yaml
    """
    from persona_lora.training.contrastive import main as train_main

    _say_what_happens()
    train_main(context.args)


@app.command(**OWN_PARSER, rich_help_panel=PANELS["finetune"])
def finetune(context: typer.Context) -> None:
    """Finetune a LoRA on a JSONL file of chats, keeping checkpoints along the way.

    Flags are TRL's and PEFT's own names, also in the YAML: persona-lora finetune --help.

    Example: persona-lora finetune --config train_configs/finetune_evil_misaligned_2.yaml
    """
    from persona_lora.studies.drift.figure import draw_drift
    from persona_lora.training.finetune import main as finetune_main

    _say_what_happens()
    for result in finetune_main(context.args):
        draw_drift(result.adapter.parent)


def _say_what_happens() -> None:
    """Show our own log: a run takes long, and its last line says where the result is."""
    logging.getLogger("persona_lora").setLevel(logging.INFO)


@dataclass(frozen=True, kw_only=True)
class CsvOptions(shared.Written):
    """The file that answers and scores are written to."""

    output: Annotated[Path, "The CSV to write; a run folder of the same name goes beside it."]
    protocol: shared.Protocol = None


@dataclass(frozen=True)
class EvaluateOptions(shared.MixOptions):
    """How one setting is steered: directions with coefficients, or a system prompt."""

    diff: Annotated[tuple[Path, ...], "Diffs; or a folder of train --seeds, by itself."] = ()
    method: shared.Method = None
    ablate: Annotated[bool, "Project the vectors out instead of adding them."] = False
    floor: Annotated[
        float | None, "Hold states at no less than this along the vector, instead of adding it."
    ] = None
    ceiling: Annotated[float | None, "The same: at no more than this."] = None
    condition: Annotated[
        Path | None, "A steering vector: add --vector only to states that are like it."
    ] = None
    threshold: Annotated[float, "With --condition: the cosine from which a state is like it."] = 0.0
    system_prompt: Annotated[
        str | None, 'pos or neg (the trait\'s own), neutral, or a text; "" is an empty one.'
    ] = None
    mode: Annotated[Literal["live", "merged"], "Diffs: unmerged, or merged."] = "live"

    def steering(self, prompt: str | None) -> Steering:
        """Return what is loaded of these options; UserError for vectors used in two ways."""
        from persona_lora.core.vector_files import load_vector

        ways = {
            "--ablate": self.ablate,
            "--floor or --ceiling": self.floor is not None or self.ceiling is not None,
            "--condition": self.condition is not None,
        }
        chosen = [name for name, used in ways.items() if used]
        if len(chosen) > 1:
            raise UserError(f"{' and '.join(chosen)} use vectors in different ways; choose one")
        refuse_useless("threshold", "without --condition", unless=self.condition)
        found = self.load(self.mode, ablate=self.ablate, prompt=prompt)
        if found.activation is None:
            return found
        setting = dataclasses.replace(
            found.activation,
            floor=self.floor,
            ceiling=self.ceiling,
            condition=None if self.condition is None else load_vector(self.condition),
            threshold=self.threshold,
        )
        return dataclasses.replace(found, activation=setting)

    def by_seed(self) -> dict[str, EvaluateOptions]:
        """Return the options of every training seed in the diff's folder by its name.

        UserError for such a folder beside other diffs.
        """
        from persona_lora.studies.read_seeds import diffs_of_seeds

        if len(self.diff) == 1:
            found = shared.diffs_by_seed(self.diff[0], self.coefficient)
            return {name: dataclasses.replace(self, diff=(at,)) for name, at in found.items()}
        for path in self.diff:
            seeds = diffs_of_seeds(path)
            if "" not in seeds:
                raise UserError(
                    f"{path} holds several training seeds and is evaluated by itself; beside "
                    f"other diffs give one seed of it: {next(iter(seeds.values()))}"
                )
        return {"": self}

    def record(self, steering: Steering) -> dict[str, Any]:
        """Return what a run's configuration keeps of the steering."""
        terms, activation = steering.terms, steering.activation
        found = {"diffs": [str(path) for path in self.diff], "coefficients": list(terms.values())}
        if activation is None:
            return found
        limits: dict[str, Any] = {"floor": self.floor, "ceiling": self.ceiling}
        if self.condition is not None:
            limits |= {"condition": str(self.condition), "threshold": self.threshold}
        return {
            **found,
            **{name: each for name, each in limits.items() if each is not None},
            "vectors": [str(path) for path in self.vector],
            "vector_coefficients": list(activation.vectors.values()),
            "layers": list(activation.layers or ()),
            "positions": activation.positions,
        }


@command("evaluate")
def evaluate(
    *,
    trait: shared.TraitOptions,
    asked: Annotated[SweepOptions, ("split", "max_questions")] = SweepOptions(),
    output: CsvOptions,
    model: shared.AdaptedModelOptions,
    steering: EvaluateOptions,
    judging: JudgesChoice,
    generation: GenerationOptions,
    engine: shared.EngineOptions = shared.EngineOptions(),
) -> None:
    """Ask a trait's held-out questions, judge the answers, write CSV and rows.

    A folder that train --seeds made is asked seed by seed, and the seeds are read together.

    Example: persona-lora evaluate --trait sycophancy --diff checkpoints/sycophancy/diff
    --coefficient 1.0 --output results/sycophancy_1.0.csv
    """
    from persona_lora.judges.choice import make_judges
    from persona_lora.studies.asking import run as evaluation

    evaluation.check_csv(output.output)
    loaded, prompt = trait.load().first_questions(asked.max_questions), _prompt(steering)
    engine.check(diffs_alone=not steering.vector and steering.mode == "live")
    model.refuse_nats_beside_adapter(steering.coefficient)
    judge = shared.judging_of(judging, [loaded])
    also, parts = {**model.worn(), **engine.record()}, steering.by_seed()
    also |= shared.questions_record(asked.max_questions)
    steered = {name: each.steering(prompt) for name, each in parts.items()}
    records = {name: {**each.record(steered[name]), **also} for name, each in parts.items()}
    written = _places(output, judge, records)
    directions = [direction for each in steered.values() for direction in each.directions]
    acting = next(iter(steered.values())).condition()
    said = evaluation.asked_of(loaded, [asked.split], [acting])
    planned = [
        evaluation.planned_evaluation(loaded, each, asked.split, generation, len(parts))
        for each in steered.values()
    ]
    places = [to.at(shared.run_folder(to.path)) for to in written]
    engine.reach(directions)
    chat_model = model.load(directions, asked=said, runs=zip(places, planned, strict=True))
    elsewhere = engine.open(chat_model, directions)
    with progress_bars():
        for each, to in zip(steered.values(), written, strict=True):
            judges = make_judges(loaded, chat_model, judge)
            own = dataclasses.replace(each, elsewhere=elsewhere)
            result = evaluation.evaluate(
                chat_model, loaded, judges, to, steering=own, split=asked.split, options=generation
            )
    _show_evaluated(output.output, loaded.name, dict(zip(parts, places, strict=True)), result)


def _show_evaluated(
    path: Path, trait: str, written: Mapping[str, Output], last: Evaluation
) -> None:
    """Say what was found, of one run or of all training seeds, whose scores go to one CSV."""
    from persona_lora.report.trust import standing
    from persona_lora.studies.asking.run import write_scores

    if "" not in written:
        write_scores(path, trait, {name: Run(each.path) for name, each in written.items()})
    if len(written) > 1:
        shared.show_seeds(path.with_suffix(""), written.values())
    else:
        show(standing(Run(last.run)), last.table(trait), *last.lines(trait))


def _places(
    output: CsvOptions, judge: JudgeOptions, records: Mapping[str, Mapping[str, Any]]
) -> list[Output]:
    """Return where each seed's run is written; UserError where something else is."""
    path, folder = output.output, output.output.with_suffix("")
    if "" not in records and not folder.is_dir():
        shared.refuse_to_replace(path, output.overwrite)
    places = {folder / f"{name}{path.suffix}" if name else path: name for name in records}
    return output.at_seeds(judge, {at: records[name] for at, name in places.items()})


def _prompt(steering: EvaluateOptions) -> str | None:
    """Return the system prompt of an evaluation; UserError for idle options."""
    given = {"lora": steering.diff, "activation": steering.vector, "prompt": steering.system_prompt}
    chosen = shared.steering_method(steering.method, given)
    _refuse_of_other_methods(chosen)
    if steering.ablate:
        refuse_useless("coefficient", "with --ablate, which takes directions out whole")
    if steering.floor is not None or steering.ceiling is not None:
        refuse_useless("coefficient", "with --floor or --ceiling, which say where states are held")
    prompt = steering.system_prompt
    return "pos" if chosen == "prompt" and prompt is None else prompt


# What only some ways of steering use, in evaluate and in sweep.
USED_BY = {
    "lora": "mode coefficient coefficients divergence allow_other_base",
    "activation": "layers positions ablate floor ceiling condition threshold control "
    "random_controls "
    "coefficient coefficients divergence allow_other_base",
}


def _refuse_of_other_methods(method: str) -> None:
    """UserError for an option that another way of steering uses, and this one does not."""
    own = USED_BY.get(method, "").split()
    others = [name for names in USED_BY.values() for name in names.split() if name not in own]
    refuse_useless(" ".join(others), f"with --method {method}")


@dataclass(frozen=True)
class VariedOptions:
    """What a sweep varies: the coefficient of one direction, and the layers it acts at."""

    diff: Annotated[Path | None, shared.ONE_DIFF] = None
    vector: Annotated[Path | None, "A steering vector (.safetensors or published .pt)."] = None
    method: shared.Method = None
    coefficients: Annotated[
        tuple[Strength, ...], "Coefficients to try: -1,0,1; or nats, as in 0.05nat (calibrate)."
    ] = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
    layers: Annotated[
        str | None,
        'Decoder layers from 0: one by one, as in "10,20" or "0-29", or at once, "10+20"; about '
        "0.55 deep by default.",
    ] = None
    positions: shared.Acting = "response"
    control: Annotated[
        bool | None,
        "Random directions of the same norm beside a vector; on for one layer, or several at once.",
    ] = None
    random_controls: shared.RandomControls = 3
    allow_other_base: shared.OtherBase = False

    def by_seed(self) -> dict[str, VariedOptions]:
        """Return the options of every training seed in the diff's folder by its name."""
        if self.diff is None:
            return {"": self}
        found = shared.diffs_by_seed(self.diff, self.coefficients)
        return {name: dataclasses.replace(self, diff=at) for name, at in found.items()}

    def load(self, method: str, seed: int) -> Any:
        """Load what is varied; random controls go beside a vector at a single layer."""
        from persona_lora.core.lora_diff import LoRADiff
        from persona_lora.core.steering_vector import length_of
        from persona_lora.core.vector_files import load_vector
        from persona_lora.steering.directions import random_like
        from persona_lora.studies.steering import run

        if self.allow_other_base:
            shared.refuse_nats(self.coefficients, shared.OTHER_MODEL)
        if method == "lora" and self.diff is not None:
            diff = LoRADiff.load(self.diff)
            length_of(diff, self.diff)
            values = coefficients_of(self.coefficients, self.diff, diff.content())
            return self._with_nats(run.diff_population(diff, values), values)
        if method != "activation" or self.vector is None:
            return run.prompt_population()
        loaded = load_vector(self.vector)
        chosen = shared.layers_together(self.layers, loaded.num_layers)
        length_of(loaded.at(chosen), self.vector)
        at_once = self.layers is not None and "+" in self.layers
        one_place = at_once or len(chosen) == 1
        wanted = one_place if self.control is None else self.control
        refuse_useless("random_controls", "without --control", unless=wanted)
        seeds = shared.control_seeds(seed, self.random_controls) if wanted else ()
        controls = [random_like(loaded, each) for each in seeds]
        if not one_place:
            told = "nats belong to one layer (or to several at once, 10+20), and there are several"
            shared.refuse_nats(self.coefficients, told)
        acting = acting_at(chosen, self.positions)
        values = coefficients_of(self.coefficients, self.vector, loaded.content(), acting)
        found = run.vector_population(
            loaded, chosen, values, self.positions, controls, at_once=at_once
        )
        return self._with_nats(found, values)

    def _with_nats(self, population: Population, values: Sequence[float]) -> Population:
        """Return what is swept, its record with the coefficients that were asked for in nats."""
        given = zip(values, self.coefficients, strict=True)
        nats = [[value, asked.value] for value, asked in given if isinstance(asked, Nats)]
        record = {**population.bank.record, "nats": nats} if nats else population.bank.record
        bank = dataclasses.replace(population.bank, record=record)
        return dataclasses.replace(population, bank=bank)

    def record(self) -> dict[str, str]:
        """Return what a run's configuration keeps of the direction's place."""
        if self.diff is not None:
            return {"diff": str(self.diff)}
        return {"vector_path": str(self.vector)} if self.vector is not None else {}


@dataclass(frozen=True)
class CalibratedOptions:
    """The directions whose strength is measured, and where vectors act."""

    diff: shared.Diffs = ()
    vector: shared.Vectors = ()
    layers: shared.Layers = None
    positions: shared.Acting = "response"
    num_prompts: Annotated[int, "Ordinary prompts to measure on."] = 8
    output: Annotated[
        Path | None, "One picture of all curves; by default each has its own beside it."
    ] = None
    overwrite: Annotated[bool, "Replace the picture that is there already."] = False

    def load(self) -> dict[Path, tuple[Any, str, str]]:
        """Load every direction, with its digest and where it acts.

        UserError for none, for one that is zero, and for idle options.
        """
        from persona_lora.core.lora_diff import LoRADiff
        from persona_lora.core.steering_vector import length_of
        from persona_lora.core.vector_files import load_vector

        if not (self.diff or self.vector):
            raise UserError("name a direction: --diff FOLDER, or --vector FILE")
        refuse_useless("layers positions", "without --vector", unless=self.vector)
        found: dict[Path, tuple[Any, str, str]] = {}
        for path in self.diff:
            diff = LoRADiff.load(path)
            found[path] = diff, diff.content(), ""
        for path in self.vector:
            vector = load_vector(path)
            layers = shared.layers_together(self.layers, vector.num_layers)
            found[path] = vector.at(layers), vector.content(), acting_at(layers, self.positions)
        for path, (direction, *_) in found.items():
            length_of(direction, path)
            refuse_unwritable(path if path.is_dir() else path.parent)
        return found


@command("calibrate")
def calibrate(
    *,
    calibrated: CalibratedOptions,
    model: shared.ModelOptions,
    datasets_dir: shared.DatasetsDir = None,
) -> None:
    """Measure how far directions move the model, so that --coefficient takes nats: 0.05nat.

    KL of the next token a token, on the model's own answers to ordinary prompts, from a quarter of
    0.03 nats' coefficient to sixteen times it, with both signs, and how coherent the answers are
    there, as the packaged reader judges them. Kept beside each direction, with a picture: what was
    measured of it before is replaced.

    Example: persona-lora calibrate --diff checkpoints/evil/diff,checkpoints/sycophancy/diff
    """
    from persona_lora.judges.choice import sense_judge
    from persona_lora.projections.inputs import load_ordinary_prompts
    from persona_lora.studies.steering.calibration import strengths_of, strengths_table
    from persona_lora.studies.steering.figure import render_strengths

    if calibrated.output is not None:
        shared.refuse_to_replace(calibrated.output, calibrated.overwrite)
    directions = calibrated.load()
    made = [direction for direction, *_ in directions.values()]
    prompts = load_ordinary_prompts(datasets_dir)[: calibrated.num_prompts]
    chat_model = model.load(made)
    with progress_bars():
        judge = sense_judge(chat_model)
    curves, at = {}, calibrated.positions
    for path, (direction, content, acting) in directions.items():
        with progress_bars():
            found = strengths_of(
                chat_model, direction, prompts, judge, content=content, acting=acting, positions=at
            )
        kept, curves[str(path)] = found.save(path), found
        show(
            strengths_table(found, str(path)),
            f"{found.coherent_line()} (mean coherence of {found.floor:g} and more)",
            f"{kept}",
        )
        if calibrated.output is None:
            render_strengths({str(path): found}).save(kept.with_suffix(".png"))
    if calibrated.output is not None:
        render_strengths(curves).save(calibrated.output)
        show(f"{calibrated.output}")


@command("sweep")
def sweep(
    *,
    trait: shared.PromptedTraitOptions,
    varied: VariedOptions,
    asked: SweepOptions = SweepOptions(divergence=None),
    output: shared.HeldRunOptions,
    model: shared.AdaptedModelOptions,
    judging: JudgesChoice,
    generation: GenerationOptions,
    engine: shared.EngineOptions = shared.EngineOptions(),
) -> None:
    """Steer at many coefficients (and layers) in the same batches; judge, summarise, plot.

    The run goes to results/sweep/<trait>, or to …/<trait>_<method> for other methods than lora. A
    folder that train --seeds made is swept seed by seed, and the seeds are read together.

    Example: persona-lora sweep --trait sycophancy --diff checkpoints/sycophancy/diff
    --coefficients "-1.5,-1,-0.5,0,0.5,1,1.5"

    Example: persona-lora sweep --trait evil --vector evil_response_avg.safetensors
    --layers 0-29 --coefficients 1,2 --split extract --max-questions 10
    """
    from persona_lora.judges.choice import make_judges
    from persona_lora.studies.asking.run import asked_of
    from persona_lora.studies.steering import run as experiment

    loaded = trait.load()
    judge = shared.judging_of(judging, [loaded])
    chosen = _swept_method(varied, model, engine)
    parts = varied.by_seed()
    populations = [each.load(chosen, generation.seed) for each in parts.values()]
    sweeping = _asked(asked, chosen, populations[0])
    made = [direction for each in populations for direction in each.made]
    suffix = "" if chosen == "lora" else f"_{chosen}"
    folder = output.output or Path("results") / "sweep" / f"{loaded.name}{suffix}"
    also = {**model.worn(), **engine.record()}
    records = {folder / name: {**each.record(), **also} for name, each in parts.items()}
    written = output.at_seeds(judge, records)
    conditions = [UNSTEERED, *(experiment.REFERENCES if sweeping.references else ())]
    said = asked_of(loaded, [sweeping.split], conditions, sweeping.max_questions)
    planned = [
        experiment.planned_sweep(loaded, each, sweeping, generation, len(parts), trait.datasets_dir)
        for each in populations
    ]
    engine.reach(made)
    chat_model = model.load(made, asked=said, runs=zip(written, planned, strict=True))
    elsewhere = engine.open(chat_model, made)
    sweep_one = partial(
        experiment.sweep, sweeping=sweeping, options=generation, datasets=trait.datasets_dir
    )
    with progress_bars():
        for to, each in zip(written, populations, strict=True):
            judges = make_judges(loaded, chat_model, judge)
            result = sweep_one(chat_model, loaded, each.answered_by(elsewhere), judges, to)
    shared.show_seeds(folder, written) if len(written) > 1 else _show_swept(result)


def _show_swept(result: SweepResult) -> None:
    from persona_lora.report.trust import standing
    from persona_lora.studies.steering.read import summary_lines, summary_table

    run = Run(result.run)
    show(standing(run), summary_table(result.summary), *summary_lines(result.summary, run))
    show(f"plot:   {result.plot}\nreport: {result.report}")


def _asked(asked: SweepOptions, method: str, population: Any) -> SweepOptions:
    """Return what a sweep asks: its defaults depend on the method, and on how many layers."""
    one_layer = len(population.bank.record.get("layers", [0])) == 1
    divergence = one_layer if asked.divergence is None else asked.divergence
    if not asked.references or method == "none":
        refuse_useless("positive_prompt negative_prompt", "where no prompts are asked")
    return dataclasses.replace(
        asked,
        references=asked.references and method != "none",
        divergence=method in ("lora", "activation") and divergence,
    )


def _swept_method(
    varied: VariedOptions, model: shared.AdaptedModelOptions, engine: shared.EngineOptions
) -> str:
    """Return the way of steering; UserError for idle options, and for what an engine cannot do."""
    model.refuse_nats_beside_adapter(varied.coefficients)
    given = {"lora": varied.diff, "activation": varied.vector, "prompt": None}
    chosen = shared.steering_method(varied.method, given)
    if varied.method is None and chosen == "none":
        raise UserError("a sweep needs --diff or --vector, or --method prompt or none")
    _refuse_of_other_methods(chosen)
    if chosen == "none":
        refuse_useless("references", "with --method none, which asks the plain model")
    engine.check(diffs_alone=chosen != "activation")
    return chosen


@dataclass(frozen=True)
class PairOptions:
    """Where the pairs of answers come from, and which vectors are made of them."""

    source: Annotated[
        Literal["prompts", "answers", "files"] | None,
        "Ask, judge and filter (the default); take the training pairs; or read judged answers from "
        "files (the default with --pos-path).",
    ] = None
    pos_path: Annotated[Path | None, "CSV of judged positive answers (source files)."] = None
    neg_path: Annotated[Path | None, "CSV of judged negative answers, paired row by row."] = None
    methods: Annotated[tuple[str, ...], "How: mean_diff, svd, pca, or several."] = ("mean_diff",)
    positions: Annotated[
        tuple[str, ...], "Which tokens: response_avg, prompt_avg, prompt_last, or several."
    ] = ("response_avg", "prompt_avg", "prompt_last")
    layers: Annotated[str | None, 'Decoder layers, as in "16", "10,20" or "0-29"; all.'] = None
    form: Annotated[
        Literal["vectors", "diff"],
        "Steering vectors, or one diff of rank 1 for --diff of every command: no training.",
    ] = "vectors"

    def checked(self) -> str:
        """Return the source; UserError for what it does not use, and for what it lacks."""
        chosen = self.source or ("files" if self.pos_path or self.neg_path else "prompts")
        if chosen == "files" and (self.pos_path is None or self.neg_path is None):
            raise UserError("--source files needs both --pos-path and --neg-path")
        others = " ".join(name for sources, name in USED_FROM if chosen not in sources)
        refuse_useless(others, f"with --source {chosen}")
        if self.form == "diff":
            refuse_useless("methods positions", "with --form diff, of the answers' tokens")
        return chosen


USED_FROM = (
    (("files",), "pos_path neg_path"),
    (("prompts", "files"), "positive_threshold negative_threshold coherence_threshold min_pairs"),
    (("prompts",), "assistant_name negative_assistant_name"),
    (("prompts",), "max_new_tokens temperature samples seed batch_size"),
    (("prompts",), "judge judge_model judge_url judge_mode max_judge_cost"),
)


@command("extract")
def extract(
    *,
    trait: shared.TraitOptions,
    pairs: PairOptions,
    elicitation: Elicitation,
    thresholds: Thresholds,
    output: shared.RunOptions,
    model: shared.ModelOptions,
    judging: JudgeChoice,
    generation: GenerationOptions,
) -> None:
    """Extract a trait's steering vectors: one direction per layer, for every position and method.

    Example: persona-lora extract --trait evil --source prompts --samples 3 --temperature 1

    Example: persona-lora extract --trait evil --source answers --methods mean_diff,svd

    Example: persona-lora extract --trait evil --source answers --form diff
    --output checkpoints/task_vectors/evil
    """
    from persona_lora.judges.choice import make_judges
    from persona_lora.studies.vectors import run as extraction

    chosen, loaded = pairs.checked(), trait.load()
    judge = shared.judging_of(judging, [loaded] if chosen == "prompts" else ())
    path = output.output or Path("checkpoints") / "vectors" / loaded.label
    written = output.at(path, judge if chosen == "prompts" else None)
    methods, positions = (tuple(dict.fromkeys(each)) for each in (pairs.methods, pairs.positions))
    extraction.check_places(methods, positions)
    layers = shared.layer_numbers(pairs.layers, shared.depth_of(model)) if pairs.layers else None
    said = _asked_of(pairs, chosen, loaded, elicitation, thresholds, generation.samples)
    making = extraction.Extraction(
        model.load(asked=said), loaded, written, methods, positions, layers, pairs.form
    )
    with progress_bars():
        if chosen == "answers":
            result = making.from_answers()
        elif pairs.pos_path is not None and pairs.neg_path is not None:
            result = making.from_files(pairs.pos_path, pairs.neg_path, thresholds=thresholds)
        else:
            judges = make_judges(loaded, making.chat_model, judge)
            result = making.from_prompts(
                judges, elicitation=elicitation, thresholds=thresholds, generation=generation
            )
    _show_vectors(result)


def _asked_of(
    pairs: PairOptions,
    source: str,
    trait: Trait,
    elicitation: Elicitation,
    thresholds: Thresholds,
    samples: int,
) -> list[Conversation]:
    """Return what the model is asked; UserError where the source of pairs has none to use."""
    from persona_lora.studies.vectors import run as extraction

    if source == "answers":
        extraction.check_of_answers(pairs.positions)
        load_pairs(trait)
    elif pairs.pos_path is not None and pairs.neg_path is not None:
        extraction.read_pairs(pairs.pos_path, pairs.neg_path, trait.name, thresholds)
    else:
        plan = extraction.plan_pairs(trait, elicitation, samples, thresholds.least_pairs)
        return [row.conversation for row in plan]
    return []


def _show_vectors(result: Extracted) -> None:
    from persona_lora.studies.vectors.read import norms_table

    show(f"{result.pairs} of {result.total} pairs kept")
    show(*(f"  {count} failed: {reason}" for reason, count in result.failed.items() if count))
    if result.vectors:
        show(norms_table(result.vectors))
    show(f"{result.paths[0]}" if not result.vectors else f"run: {result.run.folder}")


@command("tune-prompt")
def tune_prompt(
    *,
    trait: shared.TraitOptions,
    sign: Annotated[Literal["pos", "neg"], "For the trait, or against it."] = "pos",
    output: shared.RunOptions,
    model: shared.AdaptedModelOptions,
    judging: JudgesChoice,
    generation: GenerationOptions,
) -> None:
    """Race wordings of a trait's system prompts; report the best on questions it never saw.

    Chosen on the questions of extract, reported on those of eval, beside the trait's own prompts
    and neutral ones.
    Then: sweep or compare --positive-prompt with prompt.txt, or evaluate --system-prompt.

    Example: persona-lora tune-prompt --trait sycophancy --output results/prompts/sycophancy
    """
    from persona_lora.judges.choice import make_judges
    from persona_lora.report.trust import fitness_tables
    from persona_lora.studies.asking import prompt_tuning as study

    loaded = trait.load()
    judge = shared.judging_of(judging, [loaded])
    path = output.output or Path("results") / "prompts" / f"{loaded.label}_{sign}"
    written = output.at(path, judge, model.worn())
    chat_model = model.load(asked=study.conversations_of(loaded, sign))
    with progress_bars():
        judges = make_judges(loaded, chat_model, judge)
        found = study.tune_prompt(
            chat_model, loaded, judges, written, sign=sign, options=generation
        )
    show(study.tuned_table(found, loaded.name), study.judges_line(found, loaded.name))
    show(*fitness_tables([found.held_out], (loaded.name, COHERENCE)))
    show(f"{found.wording}: {found.prompt}", f"prompt: {path / 'prompt.txt'}")


@command("vectors convert")
def convert_vector(
    *,
    source: Annotated[Path, typer.Argument(help="A .safetensors of ours, or a published .pt.")],
    target: Annotated[Path, typer.Argument(help="The file to write.")],
    form: Annotated[
        Literal["safetensors", "published", "gguf", "lm-eval"],
        "Ours, the papers' .pt, llama.cpp's, or the harness's .pt.",
    ],
    layers: Annotated[str | None, 'Only these layers, as in "16", "10,20" or "0-29".'] = None,
    coefficient: Annotated[float, "lm-eval stores it beside the vector."] = 1.0,
    model_hint: Annotated[str, "gguf: the model's architecture (llama, qwen2 …)."] = "llama",
    overwrite: Replace = False,
) -> None:
    """Convert a steering vector between the forms of this project, papers, llama.cpp and lm-eval.

    Example: persona-lora vectors convert evil_response_avg.safetensors evil.gguf --form gguf
    """
    from persona_lora.core import vector_files as files

    refuse_useless("coefficient", f"with --form {form}", unless=form == "lm-eval")
    refuse_useless("model_hint", f"with --form {form}", unless=form == "gguf")
    if form == "lm-eval" and layers is None:
        raise UserError("lm-eval steers every layer in the file; name those with --layers")
    shared.refuse_to_replace(target, overwrite)
    vector = files.load_vector(source)
    if layers is not None:
        vector = vector.at(shared.layer_numbers(layers, vector.num_layers))
    if form == "safetensors":
        vector.save(target)
    elif form == "published":
        files.write_published(vector, target)
    elif form == "gguf":
        held = files.write_gguf(vector, target, model_hint=model_hint)
        if len(held) < len(vector.layers):
            show("layer 0 was left out: llama.cpp has no place for it")
    else:
        files.write_lm_eval(vector, target, layers=vector.layers, coefficient=coefficient)
    show(f"vector: {target}")
