"""What transformers is asked for a model with: from our options to its arguments.

Refuses what this machine cannot have, with the remedy, before anything is fetched or read.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from persona_lora.core.errors import UserError
from persona_lora.models.hardware import gpu_available, resolve_dtype
from persona_lora.models.load_options import LoadOptions

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
    return {
        "revision": options.revision or "main",
        "trust_remote_code": options.trust_remote_code,
    }


def _placement(options: LoadOptions) -> str | None:
    """Return transformers' device map; UserError for a device that is not there."""
    wanted = options.device_map
    if wanted is None:
        return "auto" if gpu_available() else None
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
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
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
