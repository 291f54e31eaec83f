"""Tensors from files of others (safetensors, pickles of nothing but tensors), and their digest.

A pickle can claim anything: a tensor that repeats one number over terabytes, a dictionary that
holds itself, integers for weights. What comes out of here are dense floating-point tensors.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from persona_lora.core.errors import UserError
from persona_lora.core.files import atomic_path, existing_file
from persona_lora.core.json_text import parse_json

DEEPEST = 8  # levels of dictionaries
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an entry
# A stranger's pickle makes the unpickler fail in any of these ways.
_PICKLE_ERRORS = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError),
    *(LookupError, AttributeError, ArithmeticError, AssertionError, MemoryError, ImportError),
)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Yield an open safetensors file; raises UserError where it cannot be read."""
    existing_file(path)
    try:
        with safe_open(path, framework="pt") as stream:
            yield stream
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({error}); it may be truncated, fetch or "
            "train it again"
        ) from error


def load_safetensors(path: Path, also: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name; ``also`` is a type that it may hold."""
    with opened(path) as stream:
        tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    return {key: checked_tensor(tensor, key, path, also) for key, tensor in tensors.items()}


def load_with_record(
    path: Path, key: str, also: torch.dtype | None = None
) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of a safetensors file, and the JSON under ``key`` of its header.

    None where the header has no such key; UserError for what is no JSON.
    """
    with opened(path) as stream:
        text = (stream.metadata() or {}).get(key)
    record = None if text is None else parse_json(text, f"{path}: its header")
    return load_safetensors(path, also), record


def save_with_record(
    path: Path, tensors: Mapping[str, Tensor], key: str, record: Mapping[str, Any]
) -> None:
    """Write tensors as one safetensors file, atomically, with JSON under ``key`` of its header."""
    whole = {name: each.contiguous() for name, each in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(whole, temporary, metadata={key: json.dumps(record)})


def load_pickle(path: Path) -> Any:
    """Return what a file of ``torch.save`` holds, read with ``weights_only=True``."""
    existing_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _PICKLE_ERRORS as error:
        raise UserError(
            f"{path} is truncated or no file of tensors only ({type(error).__name__}); save it "
            "again as tensors, or as safetensors"
        ) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickled, perhaps nested, dictionary by dotted names."""
    value = load_pickle(path)
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path} holds no dict of tensors; expected lora_A and lora_B factors")
    found: dict[str, Tensor] = {}
    for key, each in _flattened(value, path):
        if key in found:
            raise UserError(f"{path} holds {key} twice (A and lora_A are one); keep one of them")
        found[key] = checked_tensor(each, key, path)
    return found


def checked_tensor(
    tensor: Tensor, name: str, path: Path, also: torch.dtype | None = None
) -> Tensor:
    """Return a dense tensor of floating-point numbers, all of them stored; UserError for others.

    Numbers of eight bits come with a scale that is not known here: only a reader that knows it
    takes them, and says so with ``also``.
    """
    stored = tensor.layout == torch.strided and not tensor.is_meta
    size = tensor.numel() * tensor.element_size() if stored else 0
    if not stored or size > tensor.untyped_storage().nbytes():
        raise UserError(f"{path}: {name} is not stored number by number; save it contiguous")
    if tensor.dtype not in FLOATS and tensor.dtype != also:
        raise UserError(
            f"{path}: {name} holds {tensor.dtype}; expected floating-point numbers of 16 bits or "
            "more (a file of the gallery becomes a diff by: persona-lora gallery get)"
        )
    if not tensor.numel():
        raise UserError(
            f"{path}: {name} is empty ({list(tensor.shape)}), as weights are that were sharded "
            "(ZeRO-3, FSDP) and not gathered before saving; gather them and save again"
        )
    return tensor


def _flattened(
    value: dict[Any, Any], path: Path, prefix: str = "", levels: int = DEEPEST
) -> Iterator[tuple[str, Tensor]]:
    """Flatten nested dicts of tensors: ``{module: {"lora_A": …}}``, "A" for "lora_A" too."""
    for key, each in value.items():
        name = {"A": "lora_A", "B": "lora_B"}.get(str(key), str(key))
        place = f"{prefix}.{name}" if prefix else name
        if isinstance(each, Tensor):
            yield place, each
        elif isinstance(each, dict) and levels:
            yield from _flattened(each, path, place, levels - 1)
        else:
            raise UserError(
                f"{path}: {place[:100]} is a {type(each).__name__}, expected a tensor; what it "
                "means for the weights is not known here, save the tensors alone"
            )


def tensor_digest(tensor: Tensor) -> str:
    """Return the digest of a tensor: another entry, shape or type is another digest.

    The bits are summed along the first and along the last dimension, as integers: as fast as
    reading them once, and the same on every device.
    """
    whole = hashlib.sha256(f"{list(tensor.shape)} {tensor.dtype}".encode())
    if tensor.numel():
        bits = tensor.detach().reshape(1, -1) if tensor.ndim < 2 else tensor.detach()
        bits = bits.view(WORDS[bits.element_size()])
        for dim in (0, -1):
            sums = bits.sum(dim=dim, dtype=torch.int64).cpu().contiguous()
            whole.update(sums.view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
