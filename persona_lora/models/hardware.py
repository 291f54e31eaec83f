"""What this machine computes with, and what transformers is asked for a model with.

The one place that asks about graphics cards, bf16 units and free memory: it decides the type of
loaded weights, and where and in which precision a training run computes. Refuses what this machine
cannot have, with the remedy, before anything is fetched or read. Knows CPUs and the GPUs of CUDA
and ROCm; any other accelerator is used only where it is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import PartialState
from transformers import BitsAndBytesConfig

from persona_lora.core.errors import UserError
from persona_lora.models.load_options import LoadOptions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BF16_UNITS = ("avx512_bf16", "amx_bf16")


def gpu_available() -> bool:
    """Say whether torch finds a GPU; without one everything runs on the CPU."""
    return torch.cuda.is_available()


def own_device() -> str | None:
    """Return the device of this process beside others launched with it; None where it is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    device = PartialState(cpu=not gpu_available()).device  # on the CPU each would be alone else
    return "cpu" if device.type == "cpu" else str(device)  # which accelerate calls cpu:0


def computes_in_bfloat16(*, on_cpu: bool = False) -> bool:
    """Say whether the GPU, or the CPU where there is none or ``on_cpu``, has units for bf16.

    What is only emulated does not count: it is several times slower than fp32.
    """
    if gpu_available() and not on_cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(unit, False) for unit in BF16_UNITS)


def resolve_dtype(dtype: str, *, on_cpu: bool = False) -> torch.dtype:
    """Return the torch dtype for an option value; "auto" asks the hardware."""
    if dtype == "auto":
        return torch.bfloat16 if computes_in_bfloat16(on_cpu=on_cpu) else torch.float32
    return DTYPES[dtype]


def free_memory(device: torch.device) -> int:
    """Return how many bytes may still be taken on a device.

    In main memory what is only cached of files counts as free, and a container's limit holds.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([int(psutil.virtual_memory().available), *_left_by_limits()])


CGROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
LIMITS = {  # of versions 2 and 1: what is used, and the part of it that is only cached
    "memory.max": ("memory.current", "inactive_file"),
    "memory.limit_in_bytes": ("memory.usage_in_bytes", "total_inactive_file"),
}


def _left_by_limits() -> Iterator[int]:
    """Yield how many bytes each limit of the control groups around this process leaves."""
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.is_file() else []
    for _, kinds, place in (line.split(":", 2) for line in lines):
        if kinds and "memory" not in kinds.split(","):
            continue
        group = CGROUPS / ("memory" if kinds else "") / place.lstrip("/")
        for folder in (group, *group.parents):  # inside a container its own path may be unknown
            for limit, (used, cached) in LIMITS.items():
                said, taken, stat = (_told(folder / name) for name in (limit, used, "memory.stat"))
                if said.isdigit() and taken.isdigit():
                    parts = dict(line.split() for line in stat.splitlines())
                    yield int(said) - int(taken) + int(parts.get(cached, 0))


def _told(path: Path) -> str:
    """Return what a file of the system says; nothing where this process may not read it."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


class TrainingHardware(NamedTuple):
    """Where a training run computes and in which precision, as transformers' arguments say it."""

    use_cpu: bool
    bf16: bool
    fp16: bool


class Launch(NamedTuple):
    """What the launcher of this process was told; "no" also where it was told nothing."""

    use_cpu: bool = False
    mixed_precision: str = "no"


def launch_of_process() -> Launch:
    """Return what ``accelerate launch`` was told about hardware."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return Launch(launcher_says("ACCELERATE_USE_CPU"), precision)


def launcher_says(name: str) -> bool:
    """Say whether ``accelerate launch`` has set a switch for its processes."""
    return os.environ.get(name, "false").lower() in ("true", "1")


def training_hardware(
    *, use_cpu: bool | None, bf16: bool | None, fp16: bool, launch: Launch
) -> TrainingHardware:
    """Decide what was left open (None); UserError for what this machine or launch cannot do."""
    if use_cpu is False and launch.use_cpu:
        raise UserError("use_cpu is false, but the run was launched on the CPU; drop one of them")
    if use_cpu is False and not torch.accelerator.is_available():
        raise UserError("use_cpu is false, but there is no GPU here; leave it out to use the CPU")
    if use_cpu is None:
        use_cpu = launch.use_cpu or not gpu_available()
    bf16, fp16 = _with_launcher(bf16, fp16, launch.mixed_precision)
    if bf16 is None:
        bf16 = not fp16 and computes_in_bfloat16(on_cpu=use_cpu)
    if bf16 and fp16:
        raise UserError("bf16 and fp16 exclude each other; leave one of them out")
    if fp16 and use_cpu:
        raise UserError("fp16 mixed precision needs a GPU; use bf16, or leave both out")
    if bf16 and not use_cpu and gpu_available() and not torch.cuda.is_bf16_supported():
        raise UserError("this GPU does not know bf16; use fp16, or leave both out")
    return TrainingHardware(use_cpu, bf16, fp16)


def _with_launcher(bf16: bool | None, fp16: bool, launched: str) -> tuple[bool | None, bool]:
    """Return the flags with what the launcher asked for; transformers would let it win unseen."""
    asked = {"no": (bf16, fp16), "bf16": (True, fp16), "fp16": (bool(bf16), True)}
    if launched not in asked:
        raise UserError(f"launched with mixed precision {launched}; training knows bf16 and fp16")
    if launched != "no" and (bf16 is not None or fp16) and asked[launched] != (bf16, fp16):
        raise UserError(
            f"launched with mixed precision {launched}, but bf16 is {bf16} and fp16 {fp16}; "
            "leave one of the two out"
        )
    return asked[launched]


PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")


def weight_arguments(options: LoadOptions) -> dict[str, Any]:
    """Return the arguments that the weights are loaded with."""
    placement = _placement(options)
    dtype = resolve_dtype(options.dtype, on_cpu=placement in (None, "cpu"))
    return {
        "dtype": dtype,
        "device_map": placement,
        "quantization_config": _quantisation(options, dtype),
        "attn_implementation": _attention(options),
        **shared_arguments(options),
    }


def shared_arguments(options: LoadOptions) -> dict[str, Any]:
    """Return what the tokenizer and the weights are both asked for with."""
    # False, not None: transformers would ask at the terminal whether to run the code.
    return {"revision": options.revision or "main", "trust_remote_code": options.trust_remote_code}


def _placement(options: LoadOptions) -> str | None:
    """Return transformers' device map; raises UserError for a device that is not there.

    Of several processes that were launched together each has a device of its own, and no other.
    """
    wanted, own = options.device_map, own_device()
    if own is not None and wanted not in (None, "cpu", own):
        raise UserError(
            f"device_map {wanted!r} does not fit several processes, of which each has a device of "
            f"its own ({own} here); leave it out"
        )
    if wanted is None:
        return own or ("auto" if gpu_available() else None)
    if wanted in PLACEMENTS:
        return wanted
    problem: Exception | None = None
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        problem = error
    if problem is not None or wanted == "meta":
        raise UserError(
            f"device_map {wanted!r} is no device of this machine; it must be one of "
            f"{', '.join(PLACEMENTS)}, cpu, or a device such as cuda:0"
        ) from problem
    return wanted


def _quantisation(options: LoadOptions, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return how weights are quantised on loading; UserError where that cannot be done here."""
    if options.quantize is None:
        return None
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"--quantize {options.quantize} needs bitsandbytes; pip install bitsandbytes, or leave "
            "--quantize out"
        )
    if not gpu_available() or options.device_map == "cpu":
        raise UserError(
            f"--quantize {options.quantize} needs a graphics card; leave it out on a CPU, or take "
            "a smaller model"
        )
    if options.quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def _attention(options: LoadOptions) -> str | None:
    """Return the implementation of attention; a kernel from the hub is code from the hub."""
    wanted = options.attn_implementation
    if wanted is None or wanted in ATTENTIONS:
        return wanted
    if "/" not in wanted:
        raise UserError(f"attn_implementation must be one of {', '.join(ATTENTIONS)}, got {wanted}")
    if not options.trust_remote_code:
        raise UserError(
            f"attn_implementation {wanted!r} is code from the hub; pass --trust-remote-code to run "
            "it, or use sdpa"
        )
    return wanted
