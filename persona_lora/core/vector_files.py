"""Steering vectors in the file forms of others: published ``.pt``, llama.cpp, lm-eval.

Layer k of ours is the output of decoder block k. Each form counts in its own way:

    published .pt      one tensor [num_layers + 1, hidden]; row 0 = embeddings, row k + 1 = layer k
    GGUF (llama.cpp)   tensors direction.N, added to the output of block N; N begins at 1
    lm-eval            {"layers.k": {"steering_vector": …, …}}, a hook on block k

Knows these forms; refuses to know how a vector was found or what it does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import gguf
import torch
from torch import Tensor

from persona_lora.core.errors import UserError
from persona_lora.core.files import atomic_path
from persona_lora.core.lora_diff import BaseModel, finite_coefficient
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.tensor_files import checked_tensor, load_pickle

# As published files are named: evil_response_avg_diff.pt
PUBLISHED_NAME = re.compile(r"(?P<trait>.+)_(?P<position>response_avg|prompt_avg|prompt_last)_diff")
GGUF_ARCHITECTURE = "controlvector"


def load_vector(path: str | Path) -> SteeringVector:
    """Read a steering vector from ``.safetensors`` (ours) or ``.pt`` (published).

    Raises:
        UserError: Names the file that is missing, truncated, not finite or something else.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return SteeringVector.read(path)
    if path.suffix == ".pt":
        return read_published(path)
    raise UserError(f"{path} is no vector file; expected .safetensors, or a published .pt")


def read_published(path: str | Path) -> SteeringVector:
    """Read a published persona vector: a tensor ``[num_layers + 1, hidden]`` in a ``.pt`` file.

    Row 0 belongs to the embeddings, which are no layer, and is dropped; a row of zeros is a layer
    without a direction. The base model is unknown; trait and position are told from a name like
    ``evil_response_avg_diff.pt``. Only tensors are unpickled (``weights_only=True``).
    """
    path = Path(path)
    rows = _published_tensor(path)  # [num_layers + 1, hidden]
    named = PUBLISHED_NAME.fullmatch(path.stem)
    try:
        return SteeringVector(
            {k: row.clone() for k, row in enumerate(rows[1:]) if bool(row.any())},
            BaseModel("", None),
            num_layers=len(rows) - 1,
            trait=named["trait"] if named else None,
            position=named["position"] if named else "response_avg",
            sources={"path": str(path)},
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def write_published(vector: SteeringVector, path: str | Path) -> Path:
    """Write the published form, ``[num_layers + 1, hidden]`` in fp32, atomically.

    The embeddings' row, and those of layers that the vector has not, are zeros.
    """
    path = _checked(path, ".pt")
    rows = torch.zeros(vector.num_layers + 1, vector.hidden_size)
    for layer, direction in vector.directions.items():
        rows[layer + 1] = direction.float()
    with atomic_path(path) as temporary:
        torch.save(rows, temporary)
    return path


def write_gguf(vector: SteeringVector, path: str | Path, *, model_hint: str) -> tuple[int, ...]:
    """Write a control vector for llama.cpp, atomically; return the layers that it holds.

    llama.cpp adds ``direction.N`` to the output of block N and has no place for block 0: layer 0 of
    the vector is left out, which the returned layers show; raises UserError where it is the only
    one. ``model_hint`` is the architecture's name ("llama", "qwen2").
    """
    path = _checked(path, ".gguf")
    layers = tuple(layer for layer in vector.layers if layer > 0)
    if not layers:
        raise UserError(
            "llama.cpp has no control vector for layer 0, and this vector has no other layer; "
            "extract a later layer, or export another form"
        )
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, GGUF_ARCHITECTURE)
        writer.add_string(f"{GGUF_ARCHITECTURE}.model_hint", model_hint)
        writer.add_uint32(f"{GGUF_ARCHITECTURE}.layer_count", len(layers))
        for layer in layers:
            direction = vector.directions[layer].float().contiguous()
            writer.add_tensor(f"direction.{layer}", direction.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return layers


def write_lm_eval(
    vector: SteeringVector,
    path: str | Path,
    *,
    layers: Iterable[int],
    coefficient: float,
    blocks: str = "layers",
) -> Path:
    """Write the form of lm-evaluation-harness (``--model steered``, ``steer_path``), atomically.

    It adds coefficient × vector at every position of the given layers. ``blocks`` is what the
    list of decoder blocks is called inside the model without its head ("layers"; "h" in GPT-2).
    """
    path = _checked(path, ".pt")
    value = finite_coefficient(coefficient)
    entries = {
        f"{blocks}.{layer}": {
            "steering_vector": direction.float().contiguous(),
            "steering_coefficient": value,
            "action": "add",
            "bias": None,
            "head_index": None,
        }
        for layer, direction in vector.at(layers).directions.items()
    }
    with atomic_path(path) as temporary:
        torch.save(entries, temporary)
    return path


def _published_tensor(path: Path) -> Tensor:
    value = load_pickle(path)
    if not isinstance(value, Tensor) or value.ndim != 2 or len(value) < 2:
        found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"{path} holds {found}; expected one tensor [num_layers + 1, hidden]")
    return checked_tensor(value, "its tensor", path).float()


def _checked(path: str | Path, suffix: str) -> Path:
    path = Path(path)
    if path.suffix != suffix:
        raise UserError(f"this form of a steering vector is saved as {suffix}, got {path}")
    return path
