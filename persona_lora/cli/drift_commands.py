"""Commands about finetunes: what they did along a direction, what predicts it, what prevents it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from persona_lora.cli import shared_options as shared
from persona_lora.cli.console import progress_bars, show
from persona_lora.cli.option_groups import refuse_useless
from persona_lora.cli.program import command
from persona_lora.core.chat import Conversation
from persona_lora.core.errors import UserError
from persona_lora.core.options import (
    GenerationOptions,
    JudgesChoice,
    ProbeOptions,
    Replace,
    Split,
    TaskOptions,
)
from persona_lora.core.runs import Run
from persona_lora.core.settings import typed_value
from persona_lora.core.traits import Trait, load_labelled_answers, load_trait
from persona_lora.models.load_options import DEFAULT_MODEL, LoadOptions

if TYPE_CHECKING:
    from persona_lora.core.lora_diff import LoRADiff
    from persona_lora.core.steering_vector import SteeringVector
    from persona_lora.models.loading import ChatModel
    from persona_lora.projections.inputs import ModuleInputs

TextPositions = Annotated[
    Literal[
        "proj", "response_avg", "prompt_last", "prompt_last_proj", "prompt_avg", "prompt_avg_proj"
    ],
    "Which tokens: proj (mean over the answer), prompt_last or prompt_avg.",
]
Traits = Annotated[tuple[str, ...], "Traits to judge: evil,sycophancy."]
Briefly = Annotated[GenerationOptions, ("max_new_tokens", "seed")]
SIXTY = GenerationOptions(max_new_tokens=60)


@dataclass(frozen=True)
class Texts:
    """What is projected, on which vectors, where."""

    vectors: shared.Vectors
    file: Annotated[Path | None, "Texts: CSV (prompt, answer) or JSONL (messages)."] = None
    labelled: Annotated[
        str | None, "A trait instead: project its hand-labelled answers, and report the AUC."
    ] = None
    layers: shared.Layers = None
    positions: TextPositions = "proj"
    columns: Annotated[bool, "Also write the file with one column for each projection."] = False
    datasets_dir: shared.DatasetsDir = None


@dataclass(frozen=True)
class Shift:
    """What is compared with the model before finetuning."""

    base_model: Annotated[
        str | None, "The model before finetuning, for the shift; an adapter knows its own."
    ] = None
    shift: Annotated[
        bool | None, "Measure finetuned minus base; on with --base-model or --adapter."
    ] = None


@dataclass(frozen=True)
class NamedRun(shared.Written):
    """The folder of a run, which must be named."""

    output: Annotated[Path, "The folder of the run."]


@command("project activations")
def project_activations(
    *, texts: Texts, shift: Shift, output: NamedRun, model: shared.AdaptedModelOptions
) -> None:
    """Project hidden states on steering vectors, and what finetuning shifted along them.

    Example: persona-lora project activations --file results/baseline.csv
    --vectors checkpoints/vectors/evil/evil_response_avg.safetensors --layers 15,19
    --output results/projection/evil
    """
    from persona_lora.projections.activation_space import Along
    from persona_lora.studies.vectors import text_projection
    from persona_lora.studies.vectors.read import best_layers, projections_table, separation_table

    _refuse_useless_of_texts(texts, shift)
    if shift.shift and shift.base_model is None and model.adapter is None:
        raise UserError(f"{model.model} has no adapter; name its base with --base-model")
    vectors = load_vectors(texts.vectors)
    layers = shared.layers_in(texts.layers, vectors.values())
    read = text_projection.read_texts(texts.file) if texts.file is not None else None
    if read is None:
        trait = load_trait(str(texts.labelled), texts.datasets_dir)
        load_labelled_answers(trait)
    record = {
        "vectors": {name: str(path) for name, path in zip(vectors, texts.vectors, strict=True)},
        **model.worn(),
        "base_model": shift.base_model,
    }
    written = output.at(output.output, record=record)
    chat_model = model.load(vectors.values())
    along = Along(vectors, layers, (_tokens(texts.positions),))
    with progress_bars():
        if read is None:
            run = text_projection.separate_labelled(chat_model, trait, along, written)
        else:
            base = _base(chat_model, shift, adapted=model.adapter is not None)
            run = text_projection.project_texts(
                chat_model, read, along, written, base=base, columns=texts.columns
            )
    if read is None:
        best = best_layers(run.read("separation"))
        table = separation_table(best, "Every vector at the layer with its largest AUC")
    else:
        table = projections_table(run.read("projections"))
    show(table, f"run: {run.folder}")


def _refuse_useless_of_texts(texts: Texts, shift: Shift) -> None:
    if (texts.file is None) == (texts.labelled is None):
        raise UserError("project either a --file or the answers of a trait with --labelled")
    refuse_useless("datasets_dir", "without --labelled", unless=texts.labelled)
    refuse_useless("base_model shift columns", "with --labelled", unless=texts.file)
    refuse_useless("base_model", "with --no-shift", unless=shift.shift is not False)


def _tokens(positions: str) -> str:
    """Return the name that the library has for published names of positions."""
    return "response_avg" if positions == "proj" else positions.removesuffix("_proj")


def load_vectors(paths: Sequence[Path]) -> dict[str, SteeringVector]:
    """Load vectors by the stem of their file; equal stems get their folder's name before them."""
    from persona_lora.core.vector_files import load_vector

    stems = [path.stem for path in paths]
    names = [
        stem if stems.count(stem) == 1 else f"{path.parent.name}/{stem}"
        for stem, path in zip(stems, paths, strict=True)
    ]
    if len(set(names)) < len(names):
        raise UserError(f"--vectors names {next(n for n in names if names.count(n) > 1)!r} twice")
    return {name: load_vector(path) for name, path in zip(names, paths, strict=True)}


def questions_of(traits: Sequence[Trait], split: Split) -> list[Conversation]:
    """Return the questions of a split that a model is asked; UserError for a trait without any."""
    from persona_lora.studies.asking.run import asked_of

    return [each for trait in traits for each in asked_of(trait, [split])]


def _base(
    chat_model: ChatModel, shift: Shift, *, adapted: bool
) -> AbstractContextManager[ChatModel] | None:
    from persona_lora.studies.vectors.text_projection import base_of_adapter

    wanted = shift.base_model is not None or adapted if shift.shift is None else shift.shift
    if not wanted:
        return None
    if shift.base_model is None:
        return base_of_adapter(chat_model)
    return _other(chat_model, shift.base_model)


@contextmanager
def _other(chat_model: ChatModel, base_model: str) -> Iterator[ChatModel]:
    yield shared.load_other(
        base_model, chat_model.options.elsewhere()
    )  # after the first has been read


@dataclass(frozen=True)
class Weighing:
    """Whether changes of weights are weighted by a model's inputs, and on what these are taken."""

    prompts: Annotated[
        Path | None, "JSONL with a prompt a row, to take inputs on; datasets/ordinary by default."
    ] = None
    plain: Annotated[bool, "Plain weight space alone; the original model is not loaded."] = False

    def inputs_of(
        self, model: str, loading: LoadOptions, diffs: Iterable[LoRADiff]
    ) -> ModuleInputs | None:
        """Return the inputs of the diffs' model, from the cache of them where they are there."""
        from persona_lora.projections.inputs import kept_inputs, load_ordinary_prompts, read_prompts
        from persona_lora.steering.placement import warn_of_other_names

        if self.plain:
            own = (each.name for each in dataclasses.fields(LoadOptions) if each.name != "revision")
            refuse_useless(" ".join(("prompts", *own)), "with --plain")
            warn_of_other_names(model, [each.base_model for each in diffs])
            return None
        asked = load_ordinary_prompts() if self.prompts is None else read_prompts(self.prompts)
        return kept_inputs(shared.load_other(model, loading, directions=diffs), asked)


@command("project weights")
def project_weights(
    *,
    finetuned_model: Annotated[
        tuple[str, ...], "A model, an adapter, or a folder of checkpoints; may be repeated."
    ],
    diffs: Annotated[tuple[str, ...], "Diffs to project on; may be repeated."],
    original_model: Annotated[str, "The model before finetuning."] = DEFAULT_MODEL,
    weighing: Weighing,
    control: Annotated[
        tuple[str, ...],
        "Adapters whose mean change is taken off every finetune's; or a full model, off full ones.",
    ] = (),
    output: Annotated[Path, "The JSON file to write; a picture goes beside it."] = Path(
        "results/weight_projection.json"
    ),
    overwrite: Replace = False,
    loading: LoadOptions,
) -> None:
    """Project what finetuning did to the weights on persona directions: ⟨ΔW, L⟩.

    Weighted by what flows through the modules of the original model on ordinary prompts; plain
    cosines stand beside. Full models are streamed, in little memory whatever their size; adapters
    are projected from their factors alone. p is against directions of the same inputs whose outputs
    are turned at random.

    Example: persona-lora project weights --original-model SmolLM2-135M-Instruct
    --finetuned-model checkpoints/finetunes/sycophancy_misaligned_2
    --diffs checkpoints/sycophancy/diff,checkpoints/evil/diff
    """
    from persona_lora.studies.drift import run as study

    study.check_json(output)
    shared.refuse_to_replace(output, overwrite)
    loaded = study.load_diffs(list(diffs), on_disk=True)
    named = [name for name, _ in study.expand(finetuned_model)]
    study.check_finetunes(named, control, original_model)
    made = [*loaded.values(), *study.adapters_among([*named, *control])]
    with progress_bars():
        found = study.project_finetunes(
            original_model,
            list(finetuned_model),
            loaded,
            output,
            revision=loading.revision,
            inputs=weighing.inputs_of(original_model, loading, made),
            controls=control,
        )
    show(study.weights_table(found), *study.explained_lines(found))
    show(f"{output} and {output.with_suffix('.png')}")


@command("diagnose")
def diagnose(
    *,
    finetune: Annotated[
        str, typer.Argument(metavar="ADAPTER_OR_MODEL", help="A PEFT adapter, or a full model.")
    ],
    diffs: Annotated[tuple[str, ...], "Diffs of the traits to look for; may be repeated."],
    base: Annotated[str, "The model before finetuning."] = DEFAULT_MODEL,
    controls: Annotated[
        tuple[str, ...],
        "Unrelated finetunes: their mean is taken off; five and more give the alarm's threshold.",
    ] = (),
    prompts: Annotated[
        Path | None, "JSONL with a prompt a row, to read on; datasets/ordinary by default."
    ] = None,
    output: NamedRun,
    loading: LoadOptions,
) -> None:
    """What did this adapter do? Traits with an alarm, places and words, on one page.

    Of an adapter (of any seed, rank and modules) or a full model, ours or not. How often the alarm
    is wrong is measured on the controls.

    Example: persona-lora diagnose checkpoints/finetunes/sycophancy_misaligned_2
    --diffs checkpoints/sycophancy/diff,checkpoints/evil/diff --output results/diagnosis
    """
    from persona_lora.projections.inputs import load_ordinary_prompts, read_prompts
    from persona_lora.report.sections import Table
    from persona_lora.studies.drift import diagnosis
    from persona_lora.studies.drift.read_section import diagnosis_content
    from persona_lora.studies.drift.run import adapters_among, load_diffs

    named = [str(_adapter(Path(each))) for each in (finetune, *controls)]
    subject = diagnosis.Subject.load(named[0], load_diffs(list(diffs), on_disk=True), named[1:])
    asked = load_ordinary_prompts() if prompts is None else read_prompts(prompts)
    written = output.at(output.output)
    made = [*subject.diffs.values(), *adapters_among(named)]
    chat_model = shared.load_other(base, loading, directions=made)
    with progress_bars():
        run = diagnosis.diagnose(chat_model, subject, written, prompts=asked)
    content = diagnosis_content(run)
    tables = [each for each in content.blocks if isinstance(each, Table)]
    show(*tables, content.lead, f"report: {run.folder / 'report.html'}")


@dataclass(frozen=True)
class Checkpoints:
    """Which checkpoints are judged on which traits, and projected on which vectors."""

    folder: Annotated[Path, typer.Argument(help="The folder of a finetune, with checkpoint-N.")]
    traits: Traits
    vectors: shared.Vectors = ()
    layers: shared.Layers = None
    positions: TextPositions = "proj"
    split: Annotated[Split, "Which of the trait's questions to ask."] = "eval"
    max_questions: shared.MaxQuestions = None
    finetuned_on: Annotated[str | None, "The trait that the finetune was to teach."] = None
    datasets_dir: shared.DatasetsDir = None


@command("evaluate-checkpoints")
def evaluate_checkpoints(
    *,
    checkpoints: Checkpoints,
    output: shared.RunOptions,
    model: shared.ModelOptions,
    judging: JudgesChoice,
    generation: GenerationOptions,
) -> None:
    """Judge every checkpoint of a finetune, project it, and measure its shift from the base.

    Example: persona-lora evaluate-checkpoints checkpoints/finetunes/sycophancy_misaligned_2
    --traits sycophancy --vectors checkpoints/vectors/sycophancy/sycophancy_response_avg.safetensors
    --layers 19 --finetuned-on sycophancy
    """
    from persona_lora.judges.choice import make_judges
    from persona_lora.projections.activation_space import Along
    from persona_lora.report.two_judges import across_runs, lead_of
    from persona_lora.studies.drift import run as experiment
    from persona_lora.studies.drift.read import answers_of, checkpoints_table

    refuse_useless("layers positions", "without --vectors", unless=checkpoints.vectors)
    found = [each.path for each in experiment.find_checkpoints(checkpoints.folder) if each.path]
    loaded = [
        load_trait(name, checkpoints.datasets_dir).first_questions(checkpoints.max_questions)
        for name in checkpoints.traits
    ]
    directions = load_vectors(checkpoints.vectors)
    judge = shared.judging_of(judging, loaded)
    folder = output.output or Path("results") / "checkpoints" / checkpoints.folder.name
    written = output.at(folder, judge, shared.questions_record(checkpoints.max_questions))
    layers = shared.layers_in(checkpoints.layers, directions.values()) if directions else ()
    along = Along(directions, layers, (_tokens(checkpoints.positions),))
    model.check_adapters(filter(experiment.is_adapter, found))
    base = model.load(directions.values(), asked=questions_of(loaded, checkpoints.split))
    with progress_bars():
        run = experiment.evaluate_checkpoints(
            base,
            checkpoints.folder,
            experiment.Measures(tuple(loaded), along, checkpoints.split, checkpoints.finetuned_on),
            lambda trait, reference: make_judges(trait, reference, judge),
            written,
            options=generation,
        )
    asked = {trait.name: answers_of(run, trait.name) for trait in loaded}
    both = {trait: across_runs(trait, runs, experiment.BASE) for trait, runs in asked.items()}
    lines = [f"{name}: {lead_of('', both[name], runs, name)}" for name, runs in asked.items()]
    show(checkpoints_table(run), *lines, f"run: {run.folder}")


@dataclass(frozen=True)
class Predicted:
    """The finetunes, what they are judged on, and the directions that may predict it."""

    finetunes: Annotated[tuple[str, ...], "Adapters of the same base; may be repeated."]
    traits: Traits
    diffs: Annotated[tuple[str, ...], "Diffs to project weights on."] = ()
    vectors: Annotated[tuple[Path, ...], "Vectors to project hidden states on."] = ()
    layers: Annotated[str | None, "The one layer of the vectors; about 0.55 deep."] = None
    control_rows: Annotated[
        str | None,
        "Take from each finetune that of the same settings on this file beside its data: normal.",
    ] = None
    prompts: Annotated[
        Path | None, "JSONL with a prompt a row, to take inputs on; datasets/ordinary by default."
    ] = None
    max_questions: shared.MaxQuestions = None
    datasets_dir: shared.DatasetsDir = None

    def load(self) -> Any:
        """Return the study, its traits and directions loaded."""
        from persona_lora.projections.inputs import read_prompts
        from persona_lora.studies.drift.prediction import DriftStudy
        from persona_lora.studies.drift.run import load_diffs

        refuse_useless("layers", "without --vectors", unless=self.vectors)
        refuse_useless("prompts", "without --diffs", unless=self.diffs)
        vectors = load_vectors(self.vectors)
        traits = [load_trait(name, self.datasets_dir) for name in self.traits]
        diffs = load_diffs(list(self.diffs)) if self.diffs else {}
        for option, directions in (("diffs", diffs), ("vectors", vectors)):
            of = [each.trait for each in directions.values() if each.trait is not None]
            for trait, number in Counter(of).items():
                if number > 1:
                    raise UserError(
                        f"--{option} has {number} directions of {trait}, and a trait is predicted "
                        "by one of its own; give one of them"
                    )
        return DriftStudy(
            {name: _adapter(Path(name)) for name in self.finetunes},
            [trait.first_questions(self.max_questions) for trait in traits],
            diffs,
            {vector.trait or name: vector for name, vector in vectors.items()},
            shared.one_layer(self.layers, vectors.values()) if vectors else 0,
            control_rows=self.control_rows,
            prompts=None if self.prompts is None else read_prompts(self.prompts),
        )


@command("predict-finetuning")
def predict_finetuning(
    *,
    predicted: Predicted,
    output: shared.HeldRunOptions = shared.HeldRunOptions(Path("results/prediction")),
    model: shared.ModelOptions,
    judging: JudgesChoice,
    generation: Briefly = SIXTY,
) -> None:
    """Do projections predict what finetuning does to character? Over many finetunes.

    Every finetune is judged on every trait and projected on every direction, in weights and in
    hidden states; the table holds correlations with intervals over their data sets.

    Example: persona-lora predict-finetuning --finetunes tuned/a,tuned/b,tuned/c,tuned/d
    --traits evil,sycophancy --diffs checkpoints/evil/diff,checkpoints/sycophancy/diff
    """
    from persona_lora.judges.choice import judge_inputs, make_judges
    from persona_lora.report.trust import standing
    from persona_lora.studies.drift import prediction
    from persona_lora.studies.drift import read_prediction as read

    study = predicted.load()
    judge = shared.judging_of(judging, study.traits)
    asked = shared.questions_record(predicted.max_questions)
    written = dataclasses.replace(
        output.at(output.folder, record=asked), inputs=judge_inputs(judge)
    )
    planned = prediction.planned_prediction(study, generation)
    model.check_adapters(study.finetunes.values())
    directions = [*study.diffs.values(), *study.vectors.values()]
    said = questions_of(study.traits, study.split)
    base = model.load(directions, asked=said, runs=[(written, planned)])
    with progress_bars():
        run = prediction.predict_finetuning(
            base, study, lambda trait: make_judges(trait, base, judge), written, options=generation
        )
    files = f"{run.folder / 'prediction.csv'} and {run.folder / 'prediction.png'}"
    first = standing(run, read.seeds_of(run))
    show(first, read.prediction_table(run), *read.prediction_lines(run))
    show(*read.judge_tables(run), files)


@dataclass(frozen=True)
class Prevented:
    """The finetunes that are compared, and what on."""

    finetunes: Annotated[
        Mapping[str, str],
        "Each finetune with a name, the plain one first: plain=folder; seed0, seed1 … in it are "
        "its training seeds.",
    ]
    rows: Annotated[Path, "The JSONL that all were finetuned on."]
    correct: Annotated[
        tuple[str, ...],
        "A diff put on the first finetune afterwards: folder=coefficient; of several seeds each "
        "finetune takes its own.",
    ] = ()
    tasks: Annotated[tuple[str, ...], 'As of benchmark; "" leaves capability out.'] = (
        TaskOptions.tasks
    )
    limit: Annotated[int | None, "Use only the first N items of each task."] = None
    max_questions: shared.MaxQuestions = None

    def models(self) -> list[Any]:
        """Return the finetunes, the base and the corrected ones after them."""
        from persona_lora.core.lora_diff import LoRADiff, finite_coefficient
        from persona_lora.core.steering_vector import length_of
        from persona_lora.studies.drift.prevention import Finetuned
        from persona_lora.studies.read_seeds import diffs_of_seeds

        seeds = {name: _seeds(Path(path)) for name, path in self.finetunes.items()}
        plain = next(iter(seeds.values()))
        found = [
            Finetuned(name, adapter, seed=seed)
            for name, own in seeds.items()
            for seed, adapter in own.items()
        ]
        found.append(Finetuned("base", None))
        for word in self.correct:
            folder, _, value = word.rpartition("=")
            if not (folder and value):
                raise UserError(f"--correct must be pairs with =, got {word!r}; see --help")
            coefficient = finite_coefficient(typed_value(float, value, "--correct"))
            diffs = diffs_of_seeds(Path(folder))
            for seed, adapter in plain.items():
                at = diffs.get("", diffs.get(seed))
                if at is None:
                    raise UserError(f"--correct: {folder} holds no diff of {seed}; train it too")
                term = LoRADiff.load(at), coefficient
                length_of(term[0], at)
                found.append(Finetuned(f"corrected {value}", adapter, term, seed))
        return found


@command("compare-prevention")
def compare_prevention(
    *,
    trait: shared.TraitOptions,
    prevented: Prevented,
    output: shared.HeldRunOptions = shared.HeldRunOptions(Path("results/prevention")),
    model: shared.ModelOptions,
    judging: JudgesChoice,
    probes: ProbeOptions = ProbeOptions(),
    generation: Briefly = SIXTY,
) -> None:
    """Compare finetunes of one task, with and without prevention: trait, task loss, capability.

    The base model is always among them. All is paired with the first finetune, item by item and
    seed by seed. Rules tell what else the answers show, and probes whether the trait comes back
    where it is asked for.

    Example: persona-lora compare-prevention --trait evil --rows datasets/evil/misaligned_2.jsonl
    --finetunes plain=checkpoints/a,added=checkpoints/b --correct checkpoints/evil/diff=-1
    """
    from persona_lora.judges.choice import judge_inputs, make_judges
    from persona_lora.report.comparisons import measure_tables
    from persona_lora.report.trust import standing
    from persona_lora.studies.drift import prevention

    refuse_useless("limit", "without --tasks", unless=prevented.tasks)
    models = prevented.models()
    tasks = TaskOptions(prevented.tasks, limit=prevented.limit, datasets_dir=trait.datasets_dir)
    asked = trait.load().first_questions(prevented.max_questions)
    judge = shared.judging_of(judging, [asked])
    measured = prevention.Measured(generation, probes, tasks)
    seeds = len({each.seed for each in models if each.adapter})
    written = output.at(output.folder, seeds=seeds)
    written = dataclasses.replace(written, inputs=judge_inputs(judge))
    planned = prevention.planned_prevention(models, asked, prevented.rows, measured)
    model.check_adapters(dict.fromkeys(each.adapter for each in models if each.adapter))
    corrections = [each.correction[0] for each in models if each.correction]
    said = questions_of([asked], "eval")
    base = model.load(corrections, asked=said, runs=[(written, planned)])
    with progress_bars():
        scores = prevention.compare_prevention(
            base, models, asked, prevented.rows, make_judges(asked, base, judge), written, measured
        )
    files = f"{output.folder / 'prevention.csv'} and {output.folder / 'prevention.png'}"
    lead = prevention.judged_lead(output.folder, models, asked.name)
    right = prevention.corrected_models(output.folder, models, asked.name)
    shown = [said for table in right for said in (table, table.note)]
    show(standing(Run(output.folder), seeds), *measure_tables(scores), *shown, lead)
    show(*prevention.judge_tables(output.folder, asked.name), files)


def _seeds(path: Path) -> dict[str, Path]:
    """Return the adapters of a finetune's training seeds by "seed0" …, or its one by ""."""
    seeds = [each for each in sorted(path.glob("seed*")) if each.is_dir()]
    return {each.name: _adapter(each) for each in seeds} or {"": _adapter(path)}


def _adapter(path: Path) -> Path:
    """Return what a finetune's folder holds, adapter or model, or the folder where it is one."""
    made = (path / name for name in ("adapter", "model"))
    return next((each for each in made if each.is_dir()), path)


@dataclass(frozen=True)
class Directions:
    """What rows are screened along: a vector at a layer, or diffs."""

    vector: Annotated[Path | None, "A steering vector of the trait."] = None
    diffs: Annotated[
        tuple[str, ...], "Diffs instead: how each row's gradient pulls along them."
    ] = ()
    layers: Annotated[str | None, "The one layer of the vector; about 0.55 deep."] = None
    threshold: Annotated[float | None, "Flag rows over it; measured on the model by default."] = (
        None
    )
    allow_other_base: shared.OtherBase = False


@command("data screen")
def screen_data(
    *,
    file: Annotated[Path, "JSONL of messages: the rows to be trained on."],
    output: Annotated[Path, "The CSV of ranked rows to write."] = Path("results/screen.csv"),
    overwrite: Replace = False,
    along: Directions,
    model: shared.ModelOptions,
    generation: Briefly = SIXTY,
) -> None:
    """Rank training rows by how far they would pull the model along a trait.

    Along a vector, each row's answer is projected on it, and so is the model's own answer. Along
    diffs, a gradient step on each row is projected on them, from forward passes alone; the first
    diff ranks.

    Example: persona-lora data screen --file datasets/evil/misaligned_2.jsonl
    --diffs checkpoints/evil/diff,checkpoints/sycophancy/diff
    """
    from persona_lora.core.vector_files import load_vector
    from persona_lora.studies.vectors import text_projection

    shared.refuse_to_replace(output, overwrite)
    if along.diffs:
        if along.vector is not None:
            raise UserError("rows are screened along --vector or along --diffs; leave one out")
        refuse_useless("layers threshold max_new_tokens seed", "with --diffs")
        _screen_along(along, file, output, model)
        return
    if along.vector is None:
        raise UserError("rows are screened along directions; give --vector, or --diffs")
    refuse_useless("allow_other_base", "with --vector")
    loaded = load_vector(along.vector)
    chosen = shared.one_layer(along.layers, [loaded])
    texts = text_projection.read_texts(file)
    chat_model = model.load([loaded], asked=text_projection.conversations_of(texts))
    with progress_bars():
        found = text_projection.screen_rows(
            chat_model,
            texts,
            loaded,
            chosen,
            output,
            threshold=along.threshold,
            max_new_tokens=generation.max_new_tokens,
            seed=generation.seed,
        )
    show(
        found.table(),
        f"{found.flagged} of {len(found.rows)} rows pull further than {found.threshold:.2f} at "
        f"layer {chosen}: {found.path}",
    )


def _screen_along(along: Directions, file: Path, output: Path, model: shared.ModelOptions) -> None:
    from persona_lora.studies.drift.row_pulls import NEEDS_FLOAT32, pull_rows
    from persona_lora.studies.drift.run import load_diffs
    from persona_lora.training.finetune import read_conversations

    if model.quantize is not None or model.dtype not in ("auto", "float32"):
        raise UserError(NEEDS_FLOAT32)
    diffs, conversations = load_diffs(along.diffs), read_conversations(file)
    exact = dataclasses.replace(model, dtype="float32")
    chat_model = exact.load(diffs.values())
    with progress_bars():
        found = pull_rows(chat_model, conversations, diffs, output)
    show(
        found.table(),
        f"{len(found.rows)} rows, by their pull towards {found.names[0]} (nats a token for a "
        f"change of norm 1; error {found.error:.2%} of a typical pull): {output}",
    )
