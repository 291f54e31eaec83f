"""What a training run needs before its first step: its processes, and the model it trains."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from trl import SFTConfig

from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.models.hardware import Launch, resolve_dtype
from persona_lora.models.load_options import LoadOptions
from persona_lora.models.loading import ChatModel, load_chat_model


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
    return _launcher_says("ACCELERATE_USE_FSDP") or _launcher_says("ACCELERATE_USE_DEEPSPEED")


def launch_of_process() -> Launch:
    """Return what ``accelerate launch`` was told about hardware."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return Launch(_launcher_says("ACCELERATE_USE_CPU"), precision)


def _launcher_says(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


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
