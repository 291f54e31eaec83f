"""Reading low-rank factors from files, and writing them as a PEFT adapter folder.

Forms read: a PEFT LoRA adapter folder (with ``diff.json`` beside it when it is a diff), one
``.safetensors`` file, and a ``.pt`` file of tensors. Refuses what is not a plain low-rank change
of linear weights. Knows the file formats; refuses to know what is done with the factors.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from persona_lora.core.adapter_config import check_module, checked_config, scaling_of
from persona_lora.core.errors import UserError
from persona_lora.core.files import atomic_folder, read_json, write_json
from persona_lora.core.resources import ready_diff
from persona_lora.core.runs import package_versions
from persona_lora.core.tensor_files import checked_tensor, load_safetensors, load_tensors, opened

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
OLD_WEIGHTS = "adapter_model.bin"
PROVENANCE = "diff.json"
PEFT_PREFIX = "base_model.model."
FORMAT_VERSION = 1

_FACTOR_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?(?:\.weight)?$")
# What wrappers put into the names of modules: PEFT, torch.compile, FSDP and checkpointing.
WRAPPINGS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class AdapterFile:
    """What a file held: scaled factors ``(A [rank, in], B [out, rank])`` by module; its origin."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    base_model_name: str
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FactorsOnDisk(Mapping[str, Any]):
    """The scaled factors of a PEFT adapter, read from its file each time a module is asked for."""

    file: Path
    keys_of: Mapping[str, tuple[str, str]]  # of A and B, by module
    config: Mapping[str, Any]

    def __getitem__(self, module: str) -> Any:
        with opened(self.file) as stream:  # a mapping that stays open would count as memory
            pair = {key: stream.get_tensor(key) for key in self.keys_of[module]}
        A, B = (checked_tensor(tensor, key, self.file) for key, tensor in pair.items())
        return _scaled(self.config, module, A, B, self.file)

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
    if not path.exists():
        raise UserError(
            f"{path} does not exist; expected a PEFT adapter folder or a diff file"
            f"{ready_diff(path)}"
        )
    if path.suffix not in {".safetensors", ".pt", ".pth", ".bin"}:
        raise UserError(f"{path}: unknown file type; expected a folder, .safetensors or .pt")
    tensors = _load(path)
    if (path.parent / ADAPTER_CONFIG).is_file() and any(map(_FACTOR_KEY.match, tensors)):
        return _read_folder(path.parent, path)
    return _read_bare(tensors, path)


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
    """Return the checked ``adapter_config.json`` of a PEFT LoRA adapter; UserError otherwise."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        inside = sorted(folder.glob(f"*/{ADAPTER_CONFIG}"))
        hint = f"; name one in it, as {inside[0].parent}" if inside else ""
        raise UserError(f"{folder} has no {ADAPTER_CONFIG}; it is not a PEFT adapter folder{hint}")
    return checked_config(read_json(path), folder)


def without_wrappings(name: str) -> str:
    """Return a name without what ``torch.compile``, FSDP and checkpointing put into it."""
    for wrapping in WRAPPINGS:
        name = name.replace(wrapping, "")
    return name


def module_name(name: str) -> str:
    """Return a module's own name: without what PEFT (once or twice) and other wrappers put in."""
    name = without_wrappings(name)
    while name.startswith(PEFT_PREFIX):
        name = name.removeprefix(PEFT_PREFIX)
    return name


def _read_folder(
    folder: Path, weights: Path | None = None, *, on_disk: bool = False
) -> AdapterFile:
    config = adapter_config(folder)
    weights = weights or _weights_of(folder)
    factors: Mapping[str, tuple[Tensor, Tensor]]
    if on_disk and weights.suffix == ".safetensors":
        with opened(weights) as stream:
            keys = _paired_keys(stream.keys(), weights)
        factors = FactorsOnDisk(weights, keys, config)
    else:
        tensors = _load(weights)
        factors = {
            module: _scaled(config, module, tensors[a], tensors[b], weights)
            for module, (a, b) in _paired_keys(tensors, weights).items()
        }
    return AdapterFile(factors, str(config["base_model_name_or_path"]), _provenance(folder))


def _weights_of(folder: Path) -> Path:
    """Return the file with an adapter's factors: safetensors, or what PEFT wrote before it."""
    for name in (ADAPTER_WEIGHTS, OLD_WEIGHTS):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} has no {ADAPTER_WEIGHTS}; the training run did not finish")


def _provenance(folder: Path) -> dict[str, Any]:
    """Return what ``diff.json`` says of a diff; an adapter without one says nothing."""
    path = folder / PROVENANCE
    if not path.is_file():
        return {}
    value = read_json(path)
    version = value.get("format_version", FORMAT_VERSION) if isinstance(value, dict) else None
    base = value.get("base_model", {}) if isinstance(value, dict) else None
    if not isinstance(version, int) or not isinstance(base, dict):
        raise UserError(f"{path} is no record of a diff; remove it, or save the diff again")
    texts = (value.get("trait"), base.get("name", ""), base.get("fingerprint"))
    if not all(isinstance(each, str | None) for each in texts) or base.get("name", "") is None:
        raise UserError(f"{path}: trait, name and fingerprint must be text")
    if not isinstance(value.get("sources", {}), dict):
        raise UserError(f"{path}: sources must be an object")
    if version > FORMAT_VERSION:
        raise UserError(f"{path} is of a newer format; upgrade persona_lora")
    return value


def _scaled(
    config: Mapping[str, Any], module: str, A: Tensor, B: Tensor, file: Path
) -> tuple[Tensor, Tensor]:
    rank = A.shape[0]
    check_module(config, module, rank, file)
    return A.float(), B.float() * scaling_of(config, module, rank)


def _load(path: Path) -> dict[str, Tensor]:
    return load_safetensors(path) if path.suffix == ".safetensors" else load_tensors(path)


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
        module = module_name(key).removesuffix(".weight")
        if module in factors:
            raise UserError(f"{path} holds {module} twice; keep one of them")
        factors[module] = _factorised(delta, f"{path}: {key}")
    if not factors:
        raise UserError(f"{path} holds no tensors")
    return AdapterFile(factors, "")


def _factorised(delta: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Return exact factors of a dense delta ``[out, in]``, of its numerical rank."""
    if not torch.isfinite(delta).all():
        raise UserError(f"{where} holds NaN or infinity; the run that it is from diverged")
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    rank = max(1, int((values > values[0] * max(delta.shape) * 1e-7).sum()))
    return right[:rank].float(), (left[:, :rank] * values[:rank]).float()


def _paired_keys(keys: Iterable[str], path: Path) -> dict[str, tuple[str, str]]:
    """Return the keys of A and B by canonical module name; raises UserError for any other key."""
    sides: dict[str, dict[str, str]] = {}
    for key in keys:
        if "lora_embedding_" in key or "embed_tokens" in key:
            raise UserError(f"{path}: {key} is a LoRA on embeddings; train linear modules only")
        found = _FACTOR_KEY.match(key)
        if found is None:
            raise UserError(f"{path}: {key} is not a plain LoRA factor; expected lora_A and lora_B")
        pair = sides.setdefault(module_name(found["module"]), {})
        if found["side"] in pair:
            raise UserError(
                f"{path} holds {pair[found['side']]} and {key}, two adapters of one module; save "
                "one adapter alone"
            )
        pair[found["side"]] = key
    for module, pair in sides.items():
        if pair.keys() != {"A", "B"}:
            raise UserError(f"{path}: {module} has only one of lora_A and lora_B; it is incomplete")
    if not sides:
        raise UserError(f"{path} holds no LoRA factors")
    return {module: (pair["A"], pair["B"]) for module, pair in sorted(sides.items())}
