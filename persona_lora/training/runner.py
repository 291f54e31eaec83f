"""One runner for all training: its processes, its model, its record, and a model from start to end.

The record is what decides the numbers of a run, as JSON: compared on resume, kept as provenance."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTConfig

from persona_lora.core.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from persona_lora.core.errors import UserError
from persona_lora.core.files import atomic_folder
from persona_lora.core.runs import Output, Run, of_other_command, refuse_taken
from persona_lora.models.generation import ending_tokens
from persona_lora.models.hardware import launcher_says, resolve_dtype
from persona_lora.models.load_options import LoadOptions
from persona_lora.models.loading import ChatModel, load_chat_model
from persona_lora.models.processes import Launched, wait_for_all
from persona_lora.training.arguments import SEEDS, ContrastiveConfig, TrainedModel, TrainingOptions
from persona_lora.training.lora import LoRAArguments, attach_lora, detach_lora
from persona_lora.training.trainer import (
    Lesson,
    has_ended,
    last_whole_checkpoint,
    make_trainer,
    remove_broken_checkpoints,
)

logger = logging.getLogger(__name__)

OF_MODEL = ("*.safetensors", "*.json", "*.jinja", "*.txt")


def train(
    chat_model: ChatModel, lora: LoRAArguments | None, config: ContrastiveConfig, lesson: Lesson
) -> None:
    """Train a LoRA, or weights without one, from the last whole checkpoint if there is one."""
    checkpoint = last_whole_checkpoint(lesson.folder)
    together = Launched()
    together.from_main(lambda: remove_broken_checkpoints(lesson.folder))
    if checkpoint is not None and has_ended(checkpoint):
        together.from_main(lambda: lesson.publish(checkpoint))
        return
    if lora is None:
        set_seed(config.seed)
        model: Any = chat_model.model.requires_grad_(lesson.modules is None)
        for name in lesson.modules or ():
            model.get_submodule(name).weight.requires_grad_(True)
    else:
        model = attach_lora(chat_model, lora, config.seed)
        if lesson.family is not None:
            lesson.family.put_on(model)
    trainer = make_trainer(chat_model, model, config, lesson)
    with lesson.steerer():
        if checkpoint is not None:
            logger.info("%s goes on from %s", lesson.name, checkpoint.name)
        wait_for_all()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    trainer.save_model(str(lesson.saved))
    together.from_main(lambda: lesson.publish(lesson.saved))
    if isinstance(model, PeftModel) and not is_sharded():
        detach_lora(model)


def publish(saved: Path, final: Path, *beside: Path) -> None:
    """Give a finished adapter or model its name, with files ``beside`` it, in one step."""
    with atomic_folder(final) as temporary:
        for path in (*(saved / name for name in files_of_result(saved)), *beside):
            shutil.copy(path, temporary)


def files_of_result(folder: Path) -> set[str]:
    """Return the names of the files of an adapter or model, without those of its training."""
    if (folder / ADAPTER_CONFIG).is_file():
        return {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    return {path.name for form in OF_MODEL for path in folder.glob(form)} - {TRAINER_STATE_NAME}


def by_seed(options: TrainingOptions[Any], folder: Path) -> list[TrainingOptions[Any]]:
    """Return the options of every training seed, each with a folder of its own in ``folder``.

    Of a run without ``seeds`` they are its own options.
    """
    found: list[TrainingOptions[Any]] = []
    last = options.config.seed + (options.arguments.seeds or 1) - 1
    if last >= SEEDS:
        raise UserError(f"the last of the seeds is {last}, it must be below {SEEDS}; lower seed")
    for number in range(options.arguments.seeds or 0):
        config = copy.copy(options.config)
        config.output_dir, config.seed = str(folder / f"seed{number}"), config.seed + number
        found.append(options._replace(config=config))
    return found or [options]


def open_run(
    command: str,
    folder: Path,
    options: TrainingOptions[Any],
    record: Mapping[str, Any],
    *,
    inputs: Callable[[], dict[str, str]],
    parts: Sequence[str],
    begun: bool,
    remade: bool = False,
) -> Run:
    """Start or resume the run in ``folder``, in the main process for all of them.

    ``remade``: what is gone of a finished one is made again without training.
    Raises UserError where it holds another one; one of this command that left no result, of a
    mistyped option perhaps, is not worth keeping.
    """
    return Launched().from_main(
        lambda: Run.open(
            Output(folder, _gives_way(command, folder, options, begun)),
            command=command,
            config=record,
            seed=options.config.seed,
            inputs=inputs(),
            parts=parts,
            once=once(options) and not remade,
        )
    )


def refuse_taken_folder(
    command: str,
    folder: Path,
    options: TrainingOptions[Any],
    record: Mapping[str, Any],
    *,
    begun: bool,
    gone: Sequence[str],
    remade: bool = False,
) -> None:
    """Raise UserError, before a model is loaded, for what ``open_run`` would refuse by options.

    ``gone`` are the parts that a finished run has and this one has not.
    """
    if not _gives_way(command, folder, options, begun):
        again = once(options) and not remade
        refuse_taken(folder, command, record, options.config.seed, once=again, gone=gone)


def _gives_way(command: str, folder: Path, options: TrainingOptions[Any], begun: bool) -> bool:
    """Say whether what is in the folder may be overwritten: it is asked for, or nothing is lost."""
    return options.arguments.overwrite or not (begun or of_other_command(folder, command))


def once(options: TrainingOptions[Any]) -> bool:
    """Say whether a finished run is refused: of several seeds those that are done are kept."""
    return options.arguments.seeds is None


def refuse_unconnected_processes() -> None:
    """Refuse processes that were launched together but each take themselves for the only one."""
    launched, connected = int(os.environ.get("WORLD_SIZE", "1")), PartialState().num_processes
    if launched != connected:
        raise UserError(
            f"{launched} processes were launched but {connected} found each other; without "
            "graphics cards pass --use_cpu true to the training command"
        )


def free_memory_of_models() -> None:
    """Give back what models and optimizers held that nothing names any more."""
    gc.collect()  # a trainer and its model hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_model(name: str, options: LoadOptions, config: SFTConfig) -> ChatModel:
    """Load the base model where this process trains it; UserError where it does not fit there."""
    device_map = _device_map(options, config)
    # Sharded weights pass through the CPU only: their type is that of where they are trained.
    dtype = resolve_dtype(options.dtype, on_cpu=bool(config.use_cpu))
    chat_model = load_chat_model(
        name,
        dtype=str(dtype).removeprefix("torch."),
        device_map=device_map,
        options=options,
        probe=not is_sharded(),
    )
    away = [key for key, each in chat_model.model.named_parameters() if each.is_meta]
    if away and not is_sharded():
        raise UserError(
            f"{len(away)} weights of {name} found no room on the accelerator and were offloaded "
            f"({away[0]} …), where no gradient reaches them: free memory, pass --quantize 4bit, "
            "share the model out (FSDP), or pass --use_cpu true"
        )
    return chat_model


def _device_map(options: LoadOptions, config: SFTConfig) -> str | None:
    """Return where this process holds the model; UserError where an option says otherwise."""
    wanted = options.device_map
    if config.use_cpu or is_sharded():
        if wanted not in (None, "cpu"):
            raise UserError(
                f"device_map {wanted!r} does not fit this run, which loads on the CPU; leave it out"
            )
        return "cpu"
    if wanted == "cpu" and PartialState().device.type != "cpu":
        raise UserError("device_map 'cpu' leaves training on the accelerator; pass --use_cpu true")
    return None  # the accelerator, or all of them, or that of this process


def is_sharded() -> bool:
    """Say whether accelerate will take the weights apart (FSDP, DeepSpeed)."""
    return launcher_says("ACCELERATE_USE_FSDP") or launcher_says("ACCELERATE_USE_DEEPSPEED")


def end_tokens(chat_model: ChatModel, named: str | None) -> set[int]:
    """Return the tokens that end a turn: the named one, or the model's and the tokenizer's."""
    if named is not None:
        vocabulary = chat_model.tokenizer.get_vocab()
        if named not in vocabulary:
            raise UserError(f"eos_token {named!r} is no token of {chat_model.name}")
        return {vocabulary[named]}
    return ending_tokens(chat_model)


# Options that change where a run writes and what it shows, but no number of its adapters.
FREE_OPTIONS = {
    *("output_dir", "run_name", "project", "save_strategy", "save_steps", "save_total_limit"),
    *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter"),
    *("log_level", "log_level_replica", "report_to", "disable_tqdm", "hub_token"),
    *("dataloader_pin_memory", "dataloader_num_workers", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "torch_empty_cache_steps"),
    *("ddp_backend", "ddp_timeout", "ddp_find_unused_parameters"),
    *("gradient_checkpointing", "activation_checkpointing", "gradient_checkpointing_kwargs"),
}


def run_record(
    arguments: TrainedModel,
    lora: LoRAArguments | None,
    config: ContrastiveConfig,
    own: Mapping[str, Any],
) -> dict[str, Any]:
    """Return all that decides the numbers of a run, as JSON values; ``own`` is what it adds."""
    record = {
        **own,
        **arguments.model_record(),
        "num_processes": PartialState().num_processes,
        "lora": None if lora is None else _deciding_of(lora, arguments),
        "training": changed_options(config),
    }
    return json.loads(json.dumps(record, default=str))


def _deciding_of(lora: LoRAArguments, arguments: TrainedModel) -> dict[str, Any]:
    """Return the LoRA options; without those that do nothing where weights are trained in full."""
    idle = () if arguments.use_peft else arguments.idle_in_full
    return {name: each for name, each in dataclasses.asdict(lora).items() if name not in idle}


def changed_options(config: SFTConfig) -> dict[str, Any]:
    """Return the options that differ from TRL's defaults and change numbers."""
    defaults = {
        each.name: each.default_factory()
        if each.default_factory is not dataclasses.MISSING
        else each.default
        for each in dataclasses.fields(SFTConfig)
        if each.init
    }
    values = {name: _plain(getattr(config, name)) for name in defaults}
    return {
        name: value
        for name, value in values.items()
        if name not in FREE_OPTIONS and value != defaults[name]
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value
