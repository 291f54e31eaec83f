"""What a training run needs before its first step: its processes, the model, and its record.

The record is what decides the numbers of a run, as JSON: compared on resume, kept as provenance."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from trl import SFTConfig

from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.core.traits import ContrastivePair
from persona_lora.models.hardware import launcher_says, resolve_dtype
from persona_lora.models.load_options import LoadOptions
from persona_lora.models.loading import ChatModel, load_chat_model
from persona_lora.training.arguments import ContrastiveOptions


def on_main_process(action: Callable[[], object]) -> None:
    """Do ``action`` in the main process while the others wait; what it raises is raised in all."""
    failed: list[Exception | None] = [None]
    if PartialState().is_main_process:
        try:
            action()
        except Exception as error:  # noqa: BLE001  (it is raised below: the others must not wait)
            failed[0] = error
    broadcast_object_list(failed)
    if failed[0] is not None:
        raise failed[0]


def wait_for_all() -> None:
    """Let the processes of a run meet here, wherever they train.

    accelerate's own waits on the GPU of a process's number, also where all train on the CPU.
    """
    state = PartialState()
    if state.num_processes > 1:
        on_gpu = state.device.type != "cpu"
        torch.distributed.barrier(device_ids=[state.local_process_index] if on_gpu else None)


def refuse_unconnected_processes() -> None:
    """Refuse processes that were launched together but each take themselves for the only one."""
    launched, connected = int(os.environ.get("WORLD_SIZE", "1")), PartialState().num_processes
    if launched != connected:
        raise UserError(
            f"{launched} processes were launched but {connected} found each other; without "
            "graphics cards pass --use_cpu true to the training command"
        )


def open_run(folder: Path, open_it: Callable[[], Run]) -> Run:
    """Open the run of several processes, which the main one holds for all of them."""
    opened: list[Run] = []
    on_main_process(lambda: opened.append(open_it()))
    return opened[0] if opened else Run(folder)


@contextmanager
def recorded(run: Run) -> Iterator[None]:
    """Let the main process note in ``run.json`` how the run ended."""
    if PartialState().is_main_process:
        with run:
            yield
    else:
        yield


def load_model(name: str, options: LoadOptions, config: SFTConfig) -> ChatModel:
    """Load the base model where this process trains it."""
    device_map = _device_map(options, config)
    # Sharded weights pass through the CPU only: their type is that of where they are trained.
    dtype = resolve_dtype(options.dtype, on_cpu=bool(config.use_cpu))
    return load_chat_model(
        name,
        dtype=str(dtype).removeprefix("torch."),
        device_map=device_map,
        options=options,
        probe=not is_sharded(),
    )


def _device_map(options: LoadOptions, config: SFTConfig) -> str | None:
    """Return where this process holds the model.

    Raises UserError where an option says otherwise.
    """
    state = PartialState()
    needed = None  # the accelerator, or all of them, or the CPU
    if config.use_cpu or is_sharded():
        needed = "cpu"
    elif state.num_processes > 1 and state.device.type != "cpu":
        needed = str(state.device)
    wanted = options.device_map
    if wanted is not None and needed is not None and wanted != needed:
        raise UserError(
            f"device_map {wanted!r} does not fit this run, which trains on {needed}; leave it out"
        )
    if wanted == "cpu" and state.device.type != "cpu":
        raise UserError("device_map 'cpu' leaves training on the accelerator; pass --use_cpu true")
    return needed


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
    configured = chat_model.model.generation_config.eos_token_id
    ends = set(configured) if isinstance(configured, list) else {configured}
    return {end for end in ends | {chat_model.tokenizer.eos_token_id} if end is not None}


# Options that change where a run writes and what it shows, but no number of its adapters.
FREE_OPTIONS = {
    "output_dir",
    "run_name",
    "project",
    "logging_strategy",
    "logging_steps",
    "logging_first_step",
    "logging_nan_inf_filter",
    "log_level",
    "log_level_replica",
    "report_to",
    "disable_tqdm",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "dataloader_pin_memory",
    "dataloader_num_workers",
    "ddp_backend",
    "ddp_timeout",
    "ddp_find_unused_parameters",
    "hub_token",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
}


def run_record(
    options: ContrastiveOptions, trait: str, pairs: Sequence[ContrastivePair]
) -> dict[str, Any]:
    """Return all that decides the numbers of a run, as JSON values."""
    content = json.dumps([dataclasses.asdict(pair) for pair in pairs], sort_keys=True)
    record = {
        "trait": trait,
        "num_pairs": len(pairs),
        "pairs_sha256": hashlib.sha256(content.encode()).hexdigest(),
        **options.arguments.model_record(),
        "system_prompt": options.arguments.system_prompt,
        "num_processes": PartialState().num_processes,
        "lora": dataclasses.asdict(options.lora),
        "training": changed_options(options.config),
    }
    value: dict[str, Any] = json.loads(json.dumps(record, default=str))
    return value


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
