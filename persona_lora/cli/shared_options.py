"""The groups of options that several commands share, and what the library takes of them.

One meaning, one help text each; a mistake is a UserError.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from persona_lora.cli.console import console, show
from persona_lora.cli.option_groups import BY_PLACE, RUNNING, does_nothing, refuse_useless
from persona_lora.cli.program import environment
from persona_lora.core.chat import Conversation
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_text, refuse_folder, refuse_unwritable
from persona_lora.core.options import (
    NOBODY,
    PERSONA_JUDGES,
    JudgeChoice,
    JudgesChoice,
    Overwrite,
    Positions,
)
from persona_lora.core.protocol import FrozenProtocol
from persona_lora.core.runs import RECORD, Output, Planned, Run
from persona_lora.core.settings import refuse_other_run
from persona_lora.core.strength import Nats, Strength, acting_at, coefficient_of
from persona_lora.core.traits import Trait, load_trait
from persona_lora.models.load_options import DEFAULT_MODEL, LoadOptions

if TYPE_CHECKING:
    from persona_lora.core.lora_diff import LoRADiff
    from persona_lora.core.steering_vector import SteeringVector
    from persona_lora.judges.choice import JudgeOptions
    from persona_lora.models.loading import ChatModel
    from persona_lora.steering.bank import Elsewhere
    from persona_lora.studies.asking.run import Steering

Model = Annotated[str, "The packaged model, a folder, a .gguf file, or a hub id."]
DatasetsDir = Annotated[Path | None, "Where trait folders are."]
OtherBase = Annotated[bool, "Use a direction on a model that it was not made on."]
DirectionsDir = Annotated[Path, "Where directions are: {trait}/diff, and vectors/{trait}/."]
PersonaDir = Annotated[Path | None, "Where persona folders are."]
Acting = Annotated[Positions, "Where vectors act: on which tokens."]
Layers = Annotated[
    str | None, 'Decoder layers from 0, as in "16", "10,20" or "0-29"; about 0.55 deep by default.'
]
MaxQuestions = Annotated[int | None, "Use only the first N questions."]
Vectors = Annotated[tuple[Path, ...], "Steering vectors (.safetensors or published .pt)."]
Diffs = Annotated[tuple[Path, ...], "Diffs: folders, PEFT adapters, or files of them."]
RandomControls = Annotated[
    int, "Random controls of each direction; 1, or 3 and more for an interval over them."
]
TOLD_BY_MODEL = ("dtype", "system_messages")  # in a run's configuration, once it is loaded
OTHER_MODEL = "nats are measured on the direction's own model, and --allow-other-base takes another"
ONE_DIFF = "A diff folder, a PEFT adapter or a file of one; or a folder of train --seeds."


@dataclass(frozen=True)
class StoredModelOptions:
    """A model whose files are read as they lie: there is no type and no place to choose."""

    model: Model = DEFAULT_MODEL
    revision: Annotated[str | None, "A branch, tag or commit of a model on the hub."] = None


@dataclass(frozen=True)
class ModelOptions(LoadOptions):
    """The model that a command loads, and how."""

    model: Model = DEFAULT_MODEL
    adapter: Path | None = None

    def load(
        self,
        directions: Iterable[LoRADiff | SteeringVector] = (),
        *,
        asked: Iterable[Conversation] = (),
        runs: Iterable[tuple[Output, Planned]] = (),
    ) -> ChatModel:
        """Load the model, with its adapter where it has one.

        A direction that was made with the chat template rendered otherwise is named in a warning.
        UserError, before weights are read, for a run that is not what its protocol says or what its
        folder holds, for a direction of another model (without the command's --allow-other-base),
        and where one of the conversations that are ``asked`` and --max-new-tokens pass the model's
        window.
        """
        from persona_lora.models.loading import check_window
        from persona_lora.steering.bank import warn_of_other_template

        for output, planned in runs:
            told = {"model": self.model, **self.alone().record(), **planned.config}
            later = (*planned.later, *TOLD_BY_MODEL)
            dataclasses.replace(planned, config=told, later=later).check(output)
        directions, conversations, given = list(directions), list(asked), RUNNING.get().params
        if conversations:
            check_window(self.model, self.alone(), conversations, int(given["max_new_tokens"]))
        anyway = bool(given.get("allow_other_base"))
        loaded = load_other(
            self.model, self.alone(), self.adapter, directions, allow_other_base=anyway
        )
        warn_of_other_template(loaded, directions)
        return loaded

    def check_adapters(self, paths: Iterable[Path]) -> None:
        """UserError, before weights are loaded, for an adapter that this model cannot wear."""
        from persona_lora.core.lora_diff import LoRADiff
        from persona_lora.steering.placement import check_before_loading, warn_of_other_names

        adapters = []
        for path in paths:
            try:
                adapters.append(LoRADiff.load(path, on_disk=True))
                check_before_loading(self.model, self.alone(), adapters[-1:], allow_other_base=True)
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
        warn_of_other_names(self.model, [each.base_model for each in adapters])


@dataclass(frozen=True)
class AdaptedModelOptions(ModelOptions):
    """The same of a command that can put a finetune on the model first."""

    adapter: Annotated[Path | None, "A PEFT adapter put on the model before anything else."] = None

    def worn(self) -> dict[str, Any]:
        """Return what a run's configuration keeps of the adapter."""
        return {"adapter": None if self.adapter is None else str(self.adapter)}

    def refuse_nats_beside_adapter(self, strengths: Sequence[Strength]) -> None:
        """UserError for nats where there is an adapter."""
        if self.adapter is not None:
            refuse_nats(strengths, "nats are measured without the finetune that --adapter puts on")


@dataclass(frozen=True)
class TraitOptions:
    """The trait that a command is about."""

    trait: Annotated[str, "A trait's name in datasets/, or its folder."]
    datasets_dir: DatasetsDir = None

    def load(self) -> Trait:
        """Return the trait; UserError where there is none."""
        return load_trait(self.trait, self.datasets_dir)


@dataclass(frozen=True)
class PromptedTraitOptions(TraitOptions):
    """The trait that a command is about, and the system prompts that it is asked under."""

    positive_prompt: Annotated[
        Path | None, "Ask under the system prompt in this file, as of tune-prompt, not the trait's."
    ] = None
    negative_prompt: Annotated[Path | None, "The same, against the trait."] = None

    def load(self) -> Trait:
        """Return the trait with its prompts; UserError for an empty file."""
        prompts = map(_prompt_in, (self.positive_prompt, self.negative_prompt))
        return super().load().prompted(*prompts)


def _prompt_in(path: Path | None) -> str | None:
    if path is None:
        return None
    text = read_text(path).strip()
    if not text:
        raise UserError(f"{path} is empty; a system prompt has words")
    return text


def run_folder(path: Path) -> Path:
    """Return the folder of a run that may be named by the CSV beside it ("evil_1.0.csv")."""
    return path.with_suffix("") if path.suffix == ".csv" else path


def refuse_to_replace(path: Path, overwrite: bool, *, folder: bool = False) -> None:
    """UserError where something is at the path of a file and is not to be replaced, or cannot be.

    The same of a ``folder``.
    """
    refuse_unwritable(path.parent)
    if not folder:
        refuse_folder(path)
    there = any(path.iterdir()) if path.is_dir() else path.exists()
    if there and not overwrite:
        raise UserError(f"{path} exists; choose another output or pass --overwrite")
    if folder:
        refuse_unwritable(path)


Protocol = Annotated[
    Path | None, "A file of preregister: the run must do what it says, and carries its hash."
]


@dataclass(frozen=True, kw_only=True)
class Written:
    """What becomes of a run that is there, and what the new one is held to where it can be."""

    overwrite: Overwrite = False
    protocol: Path | None = None

    def at(
        self,
        path: Path,
        judging: JudgeOptions | None = None,
        record: Mapping[str, Any] | None = None,
        seeds: int = 1,
    ) -> Output:
        """Return where a run is written, which records who judges it.

        UserError for no protocol, for a folder that is seen to hold another run, and for one that
        cannot be written to.
        """
        from persona_lora.judges.choice import judge_inputs

        folder = run_folder(path)
        refuse_unwritable(folder)
        if not self.overwrite:
            refuse_other_run(folder)
        if folder != path and not (folder / RECORD).is_file():  # a CSV that no run wrote
            refuse_to_replace(path, self.overwrite)
        held = None if self.protocol is None else FrozenProtocol.read(self.protocol)
        config, inputs = {**(record or {})}, {}
        if judging is not None:
            config["judge"], inputs = judge_settings(judging), judge_inputs(judging)
        return Output(path, self.overwrite, config, inputs, held, seeds)

    def at_seeds(
        self, judging: JudgeOptions, records: Mapping[Path, Mapping[str, Any]]
    ) -> list[Output]:
        """Return where the runs of all training seeds are written, by what each records."""
        return [self.at(path, judging, each, len(records)) for path, each in records.items()]


@dataclass(frozen=True)
class RunOptions(Written):
    """The folder of a run, and what becomes of another run in it."""

    output: Annotated[
        Path | None,
        "The folder of the run; by default in results/, of extract in checkpoints/vectors/.",
        *("--output", "--output-dir"),
    ] = None

    @property
    def folder(self) -> Path:
        """The folder, of a command that has a default for it."""
        if self.output is None:
            raise UserError("--output is missing; name the folder of the run")
        return self.output


@dataclass(frozen=True, kw_only=True)
class HeldRunOptions(RunOptions):
    """The same of a run that can be held to a protocol, where it was pre-registered."""

    protocol: Protocol = None


Method = Annotated[
    Literal["lora", "activation", "prompt", "none"] | None,
    "The way of steering; told from the other options by default.",
]


@dataclass(frozen=True)
class MixOptions:
    """Directions that act at once, each with its coefficient, and where they act."""

    diff: Diffs = ()
    vector: Vectors = ()
    coefficient: Annotated[
        tuple[Annotated[Strength, BY_PLACE], ...],
        "A coefficient for each diff or vector, or nats as in 0.05nat (calibrate); 1 by default.",
    ] = ()
    layers: Layers = None
    positions: Acting = "response"
    allow_other_base: OtherBase = False

    def load(
        self, mode: str = "merged", *, ablate: bool = False, prompt: str | None = None
    ) -> Steering:
        """Load diffs or vectors with their coefficients; UserError for both, too few, or a zero."""
        from persona_lora.core.lora_diff import LoRADiff
        from persona_lora.core.steering_vector import length_of
        from persona_lora.core.vector_files import load_vector
        from persona_lora.steering.bank import ActivationSetting
        from persona_lora.studies.asking.run import Steering

        if self.diff and self.vector:
            raise UserError("a diff and a steering vector do not steer at once; choose one of them")
        flag, paths = ("--diff", self.diff) if self.diff else ("--vector", self.vector)
        values = self.coefficient or (1.0,) * len(paths)
        if len(values) != len(paths):
            given = f"{len(paths)} {flag} and {len(values)} --coefficient"
            raise UserError(f"{given}; give one for each")
        if self.allow_other_base:
            refuse_nats(values, OTHER_MODEL)
        loaded: list[Any] = [(load_vector if self.vector else LoRADiff.load)(at) for at in paths]
        layers = layers_together(self.layers, loaded[0].num_layers) if self.vector else ()
        for each, path in zip(loaded, paths, strict=True):
            length_of(each.at(layers) if layers else each, path)
        acting = acting_at(layers, self.positions) if self.vector else ""
        terms = {
            each: coefficient_of(value, path, each.content(), acting)
            for each, path, value in zip(loaded, paths, values, strict=True)
        }
        if not self.vector:
            return Steering(terms, mode, system_prompt=prompt)
        setting = ActivationSetting(terms, layers, self.positions, ablate)
        return Steering(activation=setting, system_prompt=prompt)


Engines = Annotated[
    tuple[str, ...],
    "Servers that answer: URL,URL. vLLM with a basis (engine command), or any other as URL#MODEL.",
]

EngineTolerance = Annotated[
    float | None,
    "Nats by which its log-probabilities may differ from the model here, on average; by default "
    "0.001 in float32, else 0.15. A quantised server needs more.",
]


@dataclass(frozen=True)
class EngineOptions:
    """Who answers in place of the model in this process."""

    engine: Engines = ()
    engine_tolerance: EngineTolerance = None

    def record(self) -> dict[str, str]:
        """Return what a run's configuration keeps; it may go on with other servers of that kind.

        UserError for a server that is not there.
        """
        from persona_lora.engines.remote import engine_kind
        from persona_lora.steering.bank import ENGINE

        if not self.engine:
            return {}
        within = self.engine_tolerance
        allowed = "" if within is None else f", within {within:g} nats"
        return {ENGINE: f"{engine_kind(self.engine)}{allowed}"}

    def check(self, *, diffs_alone: bool, shared: bool = False) -> None:
        """UserError for what an engine cannot do, before a model is loaded.

        ``shared``: the model in this process answers what it cannot.
        """
        from persona_lora.engines.connection import engine_url
        from persona_lora.steering.bank import NO_ENGINE

        if not self.engine:
            refuse_useless("engine_tolerance", "without --engine")
            return
        if self.engine_tolerance is not None and not self.engine_tolerance > 0:
            raise UserError(f"--engine-tolerance must be above 0, got {self.engine_tolerance}")
        for url in self.engine:
            engine_url(url)
        if not (diffs_alone or shared):
            raise UserError(NO_ENGINE)
        reason = "with --engine, whose servers batch for themselves"
        refuse_useless("batch_size", reason, unless=shared)
        refuse_useless("energy", "with --engine: cut its basis (persona-lora basis --energy)")

    def reach(self, directions: Iterable[LoRADiff | SteeringVector]) -> None:
        """UserError, before a model is loaded, for a server that is not there or lacks a diff."""
        from persona_lora.engines.remote import check_servers

        with console.status("reaching the engine"):
            check_servers(self.engine, _diffs_of(directions))

    def open(
        self, chat_model: ChatModel, directions: Iterable[LoRADiff | SteeringVector]
    ) -> Elsewhere | None:
        """Return the engine, once its servers answer as the model does; None without one."""
        from persona_lora.engines.remote import open_engine

        if not self.engine:
            return None
        with console.status("shaking hands with the engine"):
            diffs = _diffs_of(directions)
            return open_engine(self.engine, chat_model, diffs, self.engine_tolerance)


def _diffs_of(directions: Iterable[LoRADiff | SteeringVector]) -> list[LoRADiff]:
    from persona_lora.core.lora_diff import LoRADiff

    return [each for each in directions if isinstance(each, LoRADiff)]


# -- what the library takes ---------------------------------------------------------------


def depth_of(options: ModelOptions) -> int:
    """Return the number of a model's layers from its configuration alone."""
    from persona_lora.models.loading import shape_of

    return shape_of(options.model, options.alone()).depth


def load_other(
    name: str,
    options: LoadOptions,
    adapter: Path | None = None,
    directions: Iterable[LoRADiff | SteeringVector] = (),
    *,
    allow_other_base: bool = False,
) -> ChatModel:
    """Load a model by name; UserError, before that, for one of the directions of another model."""
    from persona_lora.core.adapter_files import adapter_config
    from persona_lora.core.lora_diff import BaseModel
    from persona_lora.models.loading import load_chat_model
    from persona_lora.steering.placement import check_before_loading, warn_of_other_names

    check_before_loading(name, options, directions, allow_other_base=allow_other_base)
    if adapter is not None:
        made_on = BaseModel(adapter_config(adapter)["base_model_name_or_path"])
        warn_of_other_names(name, [made_on])
    with console.status(f"loading {name}"):
        return load_chat_model(
            name, adapter=adapter, options=options, allow_other_base=allow_other_base
        )


def steering_method(method: str | None, given: Mapping[str, Any]) -> str:
    """Return the steering method: the one asked for, or the one that the other options imply.

    ``given`` holds, by method, the option that it needs; a method without it, or an option of
    another method, is a UserError.
    """
    implied = [name for name, value in given.items() if value]
    if method is None:
        method = implied[0] if implied else "none"
    needed = {"lora": "--diff", "activation": "--vector"}
    if method in needed and not given[method]:
        raise UserError(f"--method {method} needs {needed[method]}")
    for other, option in needed.items():
        if other != method and given[other]:
            raise UserError(f"{option} has no part in --method {method}; leave one of them out")
    return method


def control_seeds(seed: int, number: int) -> range:
    """Return the seeds of random controls; UserError for a number without an interval."""
    if number < 1 or number == 2:
        raise UserError(f"--random-controls must be 1, or 3 and more, got {number}")
    return range(seed, seed + number)


USUAL_DEPTH = 0.55  # of the layers: where published persona vectors steer best


def refuse_nats(strengths: Sequence[Strength], reason: str) -> None:
    """UserError for the first of the strengths that is in nats."""
    asked = next((each for each in strengths if isinstance(each, Nats)), None)
    if asked is not None:
        raise UserError(f"{asked.value:g}nat: {reason}; give a coefficient")


def layer_numbers(text: str | None, num_layers: int) -> tuple[int, ...]:
    """Return decoder layers from text such as "16", "10,20", "0-29" or "0-29:3"."""
    from persona_lora.models.structure import read_layers

    if text is None:
        return (int(USUAL_DEPTH * num_layers),)
    return read_layers(text, num_layers, "--layers")


def layers_together(text: str | None, num_layers: int) -> tuple[int, ...]:
    """Return the layers that a vector acts at at once: commas and plus signs are the same here.

    UserError where they are mixed, which a sweep, that takes "10,20" one by one, could not tell.
    """
    parts = [] if text is None else text.split("+")
    if len(parts) > 1 and any(len(part.replace(",", " ").split()) != 1 for part in parts):
        raise UserError(
            f"--layers {text} must name layers that act at once as in 10+14+18, or 10+12-14; what "
            "is swept one by one (10,14) goes into another run"
        )
    return layer_numbers(",".join(parts) if parts else None, num_layers)


def layers_in(text: str | None, vectors: Collection[SteeringVector]) -> tuple[int, ...]:
    """Return decoder layers from text; UserError for one that a vector has not."""
    layers = layer_numbers(text, next(iter(vectors)).num_layers)
    for each in vectors:
        each.at(layers)
    return layers


def one_layer(text: str | None, vectors: Collection[SteeringVector]) -> int:
    """Return the one decoder layer that ``text`` names; UserError where a vector has it not."""
    layers = layers_in(text, vectors)
    if len(layers) > 1:
        raise UserError(f"--layers {text} names several layers; only one can be used here")
    return layers[0]


def judging_of(
    choice: JudgeChoice, traits: Iterable[Trait] = (), beside: str | None = None
) -> JudgeOptions:
    """Return what the judge needs beside the user's choice: the cache of verdicts, and the keys.

    ``beside`` is another judge that the same options are for. UserError where the judges could not
    judge the traits, and for an endpoint without its key.
    """
    from platformdirs import user_cache_path

    from persona_lora.judges.choice import PROMPTED, JudgeOptions, check_judge
    from persona_lora.judges.endpoint import NoKeyError

    traits, judge = list(traits), choice.judge if beside is None else f"{choice.judge},{beside}"
    second = choice.second_judge if isinstance(choice, JudgesChoice) else NOBODY
    asked = {second, *(name.strip() for name in judge.split(","))}
    idle = [] if "openai" in asked else ["judge_url", "judge_mode", "max_judge_cost"]
    idle += [] if asked.intersection(PROMPTED) or judge.strip() == "reader" else ["judge_model"]
    for name in idle:
        if getattr(choice, name) != getattr(JudgeChoice, name):
            raise does_nothing(name, f"with --judge {judge}")
    cache = user_cache_path("persona_lora") / "verdicts.sqlite"
    options = JudgeOptions(**dataclasses.asdict(choice), cache=cache, environ=environment())
    try:
        for trait in traits:
            check_judge(trait, options)
        if "openai" in asked:
            options.reader()
    except NoKeyError as error:
        usual = JudgeChoice.judge if traits else next(iter(PERSONA_JUDGES))
        raise UserError(f"{error}, or leave it to {usual}, the default, which needs none") from None
    return options


def judge_settings(options: JudgeOptions) -> dict[str, Any]:
    """What a run records of its judge: everything but the key."""
    return {
        "judge": options.judge,
        "model": options.named_model(f"{options.judge},{options.second_judge}"),
        "mode": options.judge_mode,
    }


def questions_record(number: int | None) -> dict[str, int]:
    """Return what a run's configuration keeps of it: with another number it is another run."""
    return {} if number is None else {"max_questions": number}


# -- several training seeds ---------------------------------------------------------------


def diffs_by_seed(path: Path, strengths: Sequence[Strength]) -> dict[str, Path]:
    """Return the diff of every training seed in a folder by its name, or the one that it is.

    UserError for nats of several.
    """
    from persona_lora.studies.read_seeds import diffs_of_seeds

    found = diffs_of_seeds(path)
    if len(found) > 1:
        reason = "nats are another coefficient for every training seed, and seeds share theirs"
        refuse_nats(strengths, reason)
    return found


def show_seeds(folder: Path, written: Iterable[Output]) -> None:
    """Read runs of several training seeds together; write their table and their page."""
    from persona_lora.studies.read_seeds import (
        corrected_tables,
        seeds_lines,
        seeds_table,
        write_seeds,
    )
    from persona_lora.studies.report_page import write_report

    runs = [Run(each.path) for each in written]
    found = write_seeds(folder, runs)
    first, line = seeds_lines(runs, found)
    page = write_report([run.folder for run in runs], folder / "report.html")
    show(first, seeds_table(found), *corrected_tables(runs, found), line, f"report: {page}")
