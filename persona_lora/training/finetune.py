"""Finetuning on chats, a LoRA or all weights: checkpoints on the way, to see what else changes.

Knows one set of conversations and one model; refuses to know traits.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from persona_lora.core.chat import Conversation, read_messages
from persona_lora.core.content import digest_of, path_digest
from persona_lora.core.errors import UserError
from persona_lora.core.files import numbered_jsonl, remove
from persona_lora.core.json_text import parse_json
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.resources import resource_path
from persona_lora.core.runs import Run
from persona_lora.core.settings import recorded_command
from persona_lora.core.vector_files import load_vector
from persona_lora.models.load_options import option
from persona_lora.models.loading import ChatModel
from persona_lora.models.processes import Launched, recorded
from persona_lora.projections.inputs import kept_inputs, load_ordinary_prompts, read_prompts
from persona_lora.steering.placement import check_before_loading
from persona_lora.training.arguments import (
    CHECKPOINTS,
    ContrastiveConfig,
    HelpPage,
    TrainedModel,
    TrainingOptions,
    parse_groups,
)
from persona_lora.training.drift import DriftMonitor
from persona_lora.training.examples import TokenRow, tokenize_rows
from persona_lora.training.lora import LoRAArguments, check_targets
from persona_lora.training.preventative import (
    Preventative,
    inoculated,
    prevention_steerer,
    read_preventative,
)
from persona_lora.training.runner import (
    by_seed,
    end_tokens,
    files_of_result,
    load_model,
    open_run,
    publish,
    refuse_taken_folder,
    refuse_unconnected_processes,
    run_record,
    train,
)
from persona_lora.training.trainer import (
    COMPLETE,
    LOSS_ROWS,
    Lesson,
    checkpoints_of,
)

logger = logging.getLogger(__name__)

PAGE = HelpPage(
    "persona-lora finetune",
    "Finetune on the conversations of a JSONL file, keeping checkpoints.",
    "persona-lora finetune --config train_configs/finetune_evil_misaligned_2.yaml",
)
ADAPTER, MODEL, WORK = "adapter", "model", ".work"
WATCHING = ("drift_plain", "drift_prompts", "drift_every", "stop_above")


@dataclass(frozen=True, kw_only=True)
class FinetuneArguments(TrainedModel):
    """What is finetuned: the conversations, and the model they are put into."""

    train_file: str = field(
        metadata={"help": "JSONL of messages; the loss is on the last answer of each row."}
    )
    keep_training_state: bool = option(
        False, "Keep optimizer states in the checkpoints of a finished run."
    )
    preventative: dict[str, Any] | str | None = option(
        None,
        "Steer while training: method (weights, activations, ablate, inoculate), "
        "coefficient, diff, hold, random, vector, layers, system_prompt, trait; see docs/drift.md.",
    )
    enable_steering_during_training: bool = option(
        False, "Steer while training as steering_config says."
    )
    steering_config: dict[str, Any] | str | None = option(
        None, "steering_vector_path, type (steer, ablate), steering_coef, layers."
    )
    drift_diffs: list[str] | None = option(
        None, "Diffs along which drift is watched while training."
    )
    drift_plain: bool = option(
        False, "Watch drift in plain weight space, not weighted by the model's inputs."
    )
    drift_prompts: str | None = option(
        None,
        "JSONL with a prompt a row, to take the inputs that weight drift on; "
        "datasets/ordinary by default.",
    )
    drift_every: int = option(5, "Steps between two drift measurements.")
    stop_above: float | None = option(None, "Stop where the drift along a diff passes this.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop_above is not None and not self.stop_above > 0:
            raise UserError(f"stop_above must be positive, got {self.stop_above}")
        for each in dataclasses.fields(self):
            idle = each.name in WATCHING and getattr(self, each.name) != each.default
            if idle and not self.drift_diffs:
                raise UserError(f"{each.name} does nothing without drift_diffs; name them")
        if self.drift_plain and self.drift_prompts is not None:
            raise UserError("drift_prompts does nothing with drift_plain; leave one of them out")


@dataclass
class FinetuneConfig(ContrastiveConfig):
    """The configuration of contrastive training with defaults for finetuning."""

    output_dir: str | None = option(
        None, "Default: checkpoints/finetunes/<folder>_<file> of train_file."
    )
    num_train_epochs: float = option(3.0, "Passes over the rows.")
    save_total_limit: int | None = option(None, "Checkpoints kept; all by default.")


GROUPS = FinetuneArguments, LoRAArguments, FinetuneConfig


@dataclass(frozen=True)
class FinetuneResult:
    """Where a finished run put its adapter (or whole model), its checkpoints, and its last loss."""

    adapter: Path
    checkpoints: tuple[Path, ...]
    loss: float


def main(arguments: Sequence[str]) -> list[FinetuneResult]:
    """Parse the arguments and finetune; of several processes the main one returns the results.

    Raises UserError for every mistake that the user can mend.
    """
    parsed, given = parse_groups(arguments, GROUPS, PAGE)
    options = TrainingOptions[FinetuneArguments](*parsed)
    results = []
    for each in by_seed(options, output_folder(options)):
        with recorded_command("finetune", given):
            result = finetune(*each)
        if PartialState().is_main_process:
            logger.info("loss %.3f; the finetune is in %s", result.loss, result.adapter)
            results.append(result)
    return results


def finetune(
    arguments: FinetuneArguments, lora: LoRAArguments, config: FinetuneConfig
) -> FinetuneResult:
    """Train a LoRA and write ``checkpoint-N/`` and ``adapter/`` into ``config.output_dir``.

    Every checkpoint is a PEFT adapter; without ``use_peft`` it is a whole model, and the last one
    is in ``model/``. A run that was killed goes on from its last whole checkpoint.

    Raises:
        UserError: A finished run without ``arguments.overwrite``, a run of another configuration
            in the same folder, rows that do not end with an answer, what a full finetune cannot
            have, or a loss that is no longer finite.
    """
    refuse_unconnected_processes()
    prevention = prevention_of(arguments)
    if not arguments.use_peft:
        _refuse_for_all_weights(arguments, prevention)
    _read_directions(arguments, prevention)
    data = read_conversations(Path(arguments.train_file))
    conversations = inoculated(data, prevention)
    options = TrainingOptions(arguments, lora, config)
    folder = output_folder(options)
    loading = arguments.loading()
    config.check_rows(len(conversations))
    own = _own(arguments, prevention, data, conversations)
    trained, final = lora if arguments.use_peft else None, folder / _saved_as(arguments)
    begun = any(any(folder.glob(each)) for each in (ADAPTER, MODEL, "checkpoint-*"))
    record = run_record(arguments, trained, config, own)
    gone = [] if final.is_dir() else [final.name]
    refuse_taken_folder("finetune", folder, options, record, begun=begun, gone=gone)
    if trained is not None:
        check_targets(arguments.model_name_or_path, loading, lora.lora_target_modules or [])
    chat_model = load_model(arguments.model_name_or_path, loading, config)
    rows = tokenize_conversations(
        conversations, chat_model, eos_token=config.eos_token, max_length=config.max_length
    )
    lesson = _lesson(rows, chat_model, arguments, folder)
    run = open_run(
        "finetune",
        folder,
        options,
        {**record, **chat_model.template.record()},
        inputs=lambda: {**chat_model.inputs(), **_steered_by(arguments)},
        parts=(ADAPTER, MODEL, WORK, "checkpoint-*"),
        begun=begun,
    )
    processes = Launched()
    with recorded(run, processes):
        if not final.is_dir():
            train(chat_model, trained, config, lesson)
        elif arguments.drift_diffs:
            logger.warning("%s is trained already: no drift of it is watched any more", final)
        processes.from_main(lambda: _tidy(folder, keep=arguments.keep_training_state))
    losses = Run(folder).read(LOSS_ROWS)
    return FinetuneResult(final, tuple(checkpoints_of(folder)), losses[-1]["loss"])


def _own(
    arguments: FinetuneArguments,
    prevention: Preventative | None,
    data: Sequence[Conversation],
    conversations: Sequence[Conversation],
) -> dict[str, Any]:
    """Return what a run's configuration keeps of its data and of what is done while it trains.

    ``data`` are the rows before a prompt is put before them, by which finetunes of the same data
    are known. Drift that only is watched decides nothing.
    """
    drift = {name: getattr(arguments, name) for name in ("drift_diffs", *WATCHING)}
    if arguments.drift_prompts is None:  # runs of before have no such key
        del drift["drift_prompts"]
    return {
        "train_file": arguments.train_file,
        "num_rows": len(conversations),
        "rows_sha256": digest_of(conversations),
        **({} if conversations == data else {"data_sha256": digest_of(data)}),
        "preventative": None if prevention is None else prevention.record(),
        **({} if arguments.stop_above is None else {"drift": drift}),
    }


def _saved_as(arguments: FinetuneArguments) -> str:
    return ADAPTER if arguments.use_peft else MODEL


def _refuse_for_all_weights(arguments: FinetuneArguments, prevention: Preventative | None) -> None:
    """Raises UserError for what is only exact, or only possible, where the base stays frozen."""
    if prevention is not None and prevention.method == "weights" and prevention.hold == "merged":
        raise UserError(
            "a full finetune would train the very weights that the diff is merged into, and taking "
            "it out again would round them once more; use hold: live, which leaves them alone"
        )
    if arguments.drift_diffs:
        raise UserError(
            "drift_diffs reads the factors of a LoRA, which a full finetune has not; project its "
            "checkpoints afterwards with: persona-lora project weights"
        )


def prevention_of(arguments: FinetuneArguments) -> Preventative | None:
    """Return how training is steered, read from the arguments."""
    return read_preventative(
        _mapping(arguments.preventative, "preventative"),
        enabled=arguments.enable_steering_during_training,
        steering_config=_mapping(arguments.steering_config, "steering_config"),
    )


def _mapping(value: dict[str, Any] | str | None, name: str) -> dict[str, Any] | None:
    """Return a mapping that a configuration holds, or that a flag gives as JSON."""
    if not isinstance(value, str):
        return value
    read = parse_json(value, name)
    if not isinstance(read, dict):
        raise UserError(f"{name} must be a mapping, got {value!r}")
    return read


def read_conversations(path: Path) -> list[Conversation]:
    """Read rows of ``messages``; UserError names a row whose last message is no answer."""
    conversations = []
    for where, row in numbered_jsonl(resource_path(path)):
        turns = read_messages(row.get("messages"), where)
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            raise UserError(f"{where} must end with the assistant's answer to a message")
        conversations.append(turns)
    if not conversations:
        raise UserError(f"{path} is empty; it needs rows with messages")
    return conversations


def output_folder(options: TrainingOptions[FinetuneArguments]) -> Path:
    """Return the folder of a run: as asked for, or named after its data."""
    if options.config.output_dir is not None:
        return Path(options.config.output_dir)
    data = Path(options.arguments.train_file).resolve()
    return CHECKPOINTS / "finetunes" / f"{data.parent.name}_{data.stem}"


def _read_directions(arguments: FinetuneArguments, prevention: Preventative | None) -> None:
    """Raises UserError, before a model is loaded, for what cannot be read, or cannot act.

    Nothing acts on another model, nor at a layer that it, or the model, has not.
    """
    for path in arguments.drift_diffs or ():
        LoRADiff.load(path)
    _asked(arguments)
    if prevention is None:
        return
    acting: list[Any] = [LoRADiff.load(prevention.diff)] if prevention.diff is not None else []
    acting += [load_vector(prevention.vector)] if prevention.vector is not None else []
    check_before_loading(arguments.model_name_or_path, arguments.alone(), acting)
    for each in acting if prevention.layers is not None else ():
        each.at(prevention.layers)


def _steered_by(arguments: FinetuneArguments) -> dict[str, str]:
    """Return digests of what steers the training, and of what may stop it."""
    prevention = prevention_of(arguments)
    steering = [] if prevention is None else [prevention.diff, prevention.vector]
    stops = arguments.stop_above is not None
    stopping = (arguments.drift_diffs or ()) if stops else ()
    paths = [each for each in (*steering, *stopping) if each is not None]
    weighed = stops and arguments.drift_prompts is not None
    return {
        **{path: path_digest(Path(path)) for path in paths},
        **({"the ordinary prompts": digest_of(_asked(arguments))} if weighed else {}),
    }


def _asked(arguments: FinetuneArguments) -> list[str]:
    """Return the prompts on which the inputs are taken that weight drift."""
    asked = arguments.drift_prompts
    return load_ordinary_prompts() if asked is None else read_prompts(Path(asked))


def tokenize_conversations(
    conversations: Sequence[Conversation],
    chat_model: ChatModel,
    *,
    eos_token: str | None = None,
    max_length: int | None = FinetuneConfig.max_length,
) -> list[TokenRow]:
    """Return the rows as they are trained on: the loss is on the last answer of each."""
    rows = [
        (f"row {number}", turns[:-1], turns[-1:])
        for number, turns in enumerate(conversations, start=1)
    ]
    return tokenize_rows(
        rows,
        chat_model.template,
        end_tokens=end_tokens(chat_model, eos_token),
        max_length=max_length,
    )


def _lesson(
    rows: Sequence[TokenRow], chat_model: ChatModel, arguments: FinetuneArguments, folder: Path
) -> Lesson:
    prevention = prevention_of(arguments)
    return Lesson(
        "the run",
        "finetuning",
        rows,
        folder,
        saved=folder / WORK,
        publish=lambda saved: publish(saved, folder / _saved_as(arguments)),
        callbacks=_watch(chat_model, arguments),
        steerer=lambda: prevention_steerer(prevention, chat_model.model),
    )


def _watch(chat_model: ChatModel, arguments: FinetuneArguments) -> list[TrainerCallback]:
    """Return the monitor that was asked for; the model's inputs are those before its training."""
    if not arguments.drift_diffs:
        return []
    plain = arguments.drift_plain
    return [
        DriftMonitor(
            arguments.drift_diffs,
            inputs=None if plain else kept_inputs(chat_model, _asked(arguments)),
            plain=plain,
            every=arguments.drift_every,
            stop_above=arguments.stop_above,
        )
    ]


def _tidy(folder: Path, *, keep: bool) -> None:
    """Leave adapters only in the checkpoints: nothing will be resumed any more."""
    remove(folder / WORK)
    for checkpoint in () if keep else checkpoints_of(folder):
        kept = {*files_of_result(checkpoint), COMPLETE}
        for path in checkpoint.iterdir():
            if path.name not in kept:
                remove(path)
