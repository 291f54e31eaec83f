"""Reading low-rank factors from files, and writing them as a PEFT adapter folder.

Forms read: a PEFT LoRA adapter folder (with ``diff.json`` beside it when it is a diff), one
``.safetensors`` file, and a ``.pt`` file of tensors. Refuses what is not a plain low-rank change
of linear weights. Knows the file formats; refuses to know what is done with the factors.
"""

from __future__ import annotations

import logging
import math
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from persona_lora.core.errors import UserError
from persona_lora.core.files import atomic_folder, read_json, write_json
from persona_lora.core.runs import package_versions

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PROVENANCE = "diff.json"
PEFT_PREFIX = "base_model.model."
FORMAT_VERSION = 1

_FACTOR_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?(?:\.weight)?$")
_REFUSED = {
    "use_dora": ("DoRA", "train with use_dora: false"),
    "modules_to_save": ("modules_to_save", "train without modules_to_save"),
    "trainable_token_indices": ("trainable tokens", "train without trainable_token_indices"),
    "target_parameters": ("LoRA on bare parameters", "target linear modules instead"),
    "lora_bias": ("LoRA bias", "train with lora_bias: false"),
}


@dataclass(frozen=True)
class AdapterFile:
    """What a file held: scaled factors ``(A [rank, in], B [out, rank])`` by module; its origin."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    base_model_name: str
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FactorsOnDisk(Mapping[str, tuple[Tensor, Tensor]]):
    """The scaled factors of a PEFT adapter, read from its file each time a module is asked for."""

    file: Path
    keys_of: Mapping[str, tuple[str, str]]  # of A and B, by module
    config: Mapping[str, Any]

    def __getitem__(self, module: str) -> tuple[Tensor, Tensor]:
        with _opened(self.file) as stream:  # a mapping that stays open would count as memory
            A, B = (stream.get_tensor(key) for key in self.keys_of[module])
        return _scaled(self.config, module, A, B)

    def __contains__(self, module: object) -> bool:  # without reading it
        return module in self.keys_of

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)


def read_factors(path: Path, *, on_disk: bool = False) -> AdapterFile:
    """Read the low-rank factors at ``path``, with the LoRA scaling folded into B, in fp32.

    With ``on_disk`` those of a PEFT folder stay there until a module is asked for.
    """
    if path.is_dir():
        return _read_folder(path, on_disk=on_disk)
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected a PEFT adapter folder or a diff file")
    if path.suffix == ".safetensors":
        if (path.parent / ADAPTER_CONFIG).is_file():
            return _read_folder(path.parent, path)
        return _read_bare(_load_safetensors(path), path)
    if path.suffix in {".pt", ".pth", ".bin"}:
        return _read_bare(_load_torch(path), path)
    raise UserError(f"{path}: unknown file type; expected a folder, .safetensors or .pt")


def write_adapter(
    folder: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    base_model_name: str,
    provenance: Mapping[str, Any],
) -> Path:
    """Write a PEFT adapter of scaling 1 and its provenance; the folder appears whole or not."""
    ranks = {module: A.shape[0] for module, (A, _) in factors.items()}
    rank = max(ranks.values())
    unequal = {module: each for module, each in ranks.items() if each != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": unequal,
        "alpha_pattern": unequal,
        "target_modules": sorted(factors),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = {}
    for module, (A, B) in factors.items():
        tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = A.float().contiguous().clone()
        tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = B.float().contiguous().clone()
    with atomic_folder(folder) as temporary:
        write_json(temporary / ADAPTER_CONFIG, config)
        save_file(tensors, temporary / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        record = {"format_version": FORMAT_VERSION, **provenance, "versions": package_versions()}
        write_json(temporary / PROVENANCE, record)
    return folder


def adapter_config(folder: Path) -> dict[str, Any]:
    """Return the parsed ``adapter_config.json`` of a PEFT LoRA adapter; UserError otherwise."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise UserError(f"{folder} has no {ADAPTER_CONFIG}; it is not a PEFT adapter folder")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder} is a {config.get('peft_type')} adapter; only LoRA has a diff")
    for key, (what, remedy) in _REFUSED.items():
        if config.get(key):
            raise UserError(f"{folder} uses {what}, which is not a plain low-rank change; {remedy}")
    if config.get("bias", "none") != "none":
        raise UserError(f"{folder} trains biases (bias={config['bias']!r}); train with bias: none")
    return dict(config)


def _read_folder(
    folder: Path, weights: Path | None = None, *, on_disk: bool = False
) -> AdapterFile:
    config = adapter_config(folder)
    weights = weights or folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise UserError(f"{folder} has no {ADAPTER_WEIGHTS}; the training run did not finish")
    with _opened(weights) as stream:
        keys = _paired_keys(stream.keys(), weights)
    factors: Mapping[str, tuple[Tensor, Tensor]]
    if on_disk:
        factors = FactorsOnDisk(weights, keys, config)
    else:
        tensors = _load_safetensors(weights)
        factors = {
            module: _scaled(config, module, tensors[a], tensors[b])
            for module, (a, b) in keys.items()
        }
    provenance = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
    if provenance.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
        raise UserError(f"{folder / PROVENANCE} is of a newer format; upgrade persona_lora")
    return AdapterFile(factors, str(config.get("base_model_name_or_path") or ""), provenance)


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return PEFT's scaling of one module: lora_alpha / r, or lora_alpha / √r with rsLoRA.

    ``alpha_pattern`` is matched as PEFT does: a whole module name or a dotted ending of it.
    """
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _scaled(config: Mapping[str, Any], module: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return A.float(), B.float() * scaling_of(config, module, A.shape[0])


def _read_bare(tensors: Mapping[str, Tensor], path: Path) -> AdapterFile:
    """Read factors, or dense deltas, from a file without an adapter configuration."""
    if any(_FACTOR_KEY.match(key) for key in tensors):
        logger.warning("%s has no adapter_config.json: its scaling is taken as folded in", path)
        keys = _paired_keys(tensors, path)
        pairs = {
            module: (tensors[a].float(), tensors[b].float()) for module, (a, b) in keys.items()
        }
        return AdapterFile(pairs, "")
    factors = {}
    for key, delta in tensors.items():
        if delta.ndim != 2:
            raise UserError(f"{path}: {key} has shape {list(delta.shape)}, expected a matrix")
        factors[_canonical(key)] = _factorised(delta)
    if not factors:
        raise UserError(f"{path} holds no tensors")
    return AdapterFile(factors, "")


def _factorised(delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return exact factors of a dense delta ``[out, in]``, of its numerical rank."""
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    rank = max(1, int((values > values[0] * max(delta.shape) * 1e-7).sum()))
    return right[:rank].float(), (left[:, :rank] * values[:rank]).float()


def _paired_keys(keys: Iterable[str], path: Path) -> dict[str, tuple[str, str]]:
    """Return the keys of A and B by canonical module name; UserError for any other key."""
    sides: dict[str, dict[str, str]] = {}
    for key in keys:
        if "lora_embedding_" in key or "embed_tokens" in key:
            raise UserError(f"{path}: {key} is a LoRA on embeddings; train linear modules only")
        found = _FACTOR_KEY.match(key)
        if found is None:
            raise UserError(f"{path}: {key} is not a plain LoRA factor; expected lora_A and lora_B")
        sides.setdefault(_canonical(found["module"]), {})[found["side"]] = key
    for module, pair in sides.items():
        if pair.keys() != {"A", "B"}:
            raise UserError(f"{path}: {module} has only one of lora_A and lora_B; it is incomplete")
    if not sides:
        raise UserError(f"{path} holds no LoRA factors")
    return {module: (pair["A"], pair["B"]) for module, pair in sorted(sides.items())}


def _canonical(name: str) -> str:
    """Return a module name without PEFT's prefix and without ``.weight``."""
    return name.removeprefix(PEFT_PREFIX).removesuffix(".weight")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as stream:
            yield stream
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({error}); it may be truncated, fetch or "
            "train it again"
        ) from error


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    with _opened(path) as stream:
        return {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118


def _load_torch(path: Path) -> dict[str, Tensor]:
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be read as tensors only ({first_line}); save it again as a dict of "
            "tensors, or as safetensors"
        ) from error
    flat = _flattened(value)
    if not flat:
        raise UserError(f"{path} holds no dict of tensors; expected lora_A and lora_B factors")
    return flat


def _flattened(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """Flatten nested dicts of tensors to dotted names: ``{module: {"lora_A": …}}`` and the like."""
    flat: dict[str, Tensor] = {}
    if isinstance(value, dict):
        for key, each in value.items():
            name = {"A": "lora_A", "B": "lora_B"}.get(str(key), str(key))
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(each, Tensor):
                flat[path] = each
            else:
                flat.update(_flattened(each, path))
    return flat
