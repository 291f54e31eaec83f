"""A mix of diffs for other tools: one adapter, merged weights, or GGUF.

Knows file formats of other programs; what is written is what ``mix`` and the merger say it is.
"""

from __future__ import annotations

import logging
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter, Keys, get_tensor_name_map
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from persona_lora.core import progress
from persona_lora.core.errors import UserError, checked_name
from persona_lora.core.files import atomic_folder, atomic_path, read_json, scratch_folder
from persona_lora.core.lora_diff import (
    Compressed,
    LoRADiff,
    LoRAFactors,
    finite_coefficient,
    load_named,
    mix,
)
from persona_lora.core.settings import path_beside_equals, split_list
from persona_lora.core.shared_basis import Roots, on_one_basis
from persona_lora.core.steering_vector import length_of
from persona_lora.core.strength import coefficient_of, read_strength
from persona_lora.models.load_options import LoadOptions
from persona_lora.models.weight_files import StoredWeights, model_on_disk
from persona_lora.report import wording
from persona_lora.report.sections import Table
from persona_lora.steering.placement import check_before_loading
from persona_lora.steering.weights import merged_weight

logger = logging.getLogger(__name__)

# Model types of transformers and llama.cpp's architectures; Llama's rotary layout is permuted.
GGUF_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "phi3": "phi3",
}
PERMUTED = "llama"
CONVERTER = "convert_hf_to_gguf.py"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")  # unmerged, all
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's max_lora_rank may be


@dataclass(frozen=True)
class Exported:
    """Where a mix was written; for adapters its largest rank and the share of ‖·‖² it keeps."""

    path: Path
    rank: int | None = None
    energy: float | None = None

    @property
    def vllm_rank(self) -> int | None:
        """The least ``max_lora_rank`` of vLLM that takes the adapter; None where none does."""
        return next((each for each in VLLM_RANKS if each >= (self.rank or 0)), None)


def read_mix(text: str, folder: Path) -> dict[LoRADiff, float]:
    """Read "evil=-1,sycophancy=0.05nat": traits below ``folder``, or paths (with spaces, too).

    A trait may be a part of one, as ``optimize --by`` names them: "evil@0-9", "evil@mlp".
    UserError for anything else, for nats that were not measured, and for what changes nothing.
    """
    terms = {}
    for part in split_list(text, path_beside_equals):
        name, found, value = part.rpartition("=")
        try:
            strength = read_strength(value)
        except ValueError:
            name = ""
        if not found or not name or ("=" in name and not Path(name).exists()):
            raise UserError(f'a mix is like "evil=-1,sycophancy=-0.5", with commas, got {part!r}')
        path = Path(name)
        at = path if path.exists() else folder / name.partition("@")[0] / "diff"
        diff = LoRADiff.load(path) if path.exists() else load_named(folder, name)
        length_of(diff, name)
        terms[diff] = finite_coefficient(coefficient_of(strength, at, diff.content()))
    if not terms:
        raise UserError("the mix is empty; name at least one trait")
    if not any(terms.values()):
        raise UserError(f"every coefficient of the mix {text!r} is 0: it changes nothing")
    return terms


def check_weights(diffs: Iterable[LoRADiff], model: str, revision: str | None = None) -> None:
    """UserError for a diff of other weights than a model's (packaged, folder, hub id) on disk.

    A warning where its files do not tell which weights it has.
    """
    diffs = list(diffs)
    known = any(each.base_model.fingerprint for each in diffs)
    if known and model_on_disk(model, revision) is None:
        logger.warning(
            "the files of %s do not tell whether its weights are those that the diffs were made "
            "on; check that they are the same",
            model,
        )
    check_before_loading(model, LoadOptions(revision=revision), diffs)


def export_peft(
    terms: Mapping[LoRADiff, float],
    folder: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    compress: Callable[..., Compressed] = LoRADiff.compress,
) -> Exported:
    """Write the mix as one PEFT adapter with the coefficients baked in.

    As ``core.lora_diff.mix`` sums it, exactly; or cut to ``rank`` or to the share ``energy`` of
    ‖·‖² by ``compress``: ``ModuleInputs.compress`` cuts where inputs notice it least.
    """
    mixed, share = _compressed(terms, rank, energy, compress)
    return Exported(mixed.save(folder), mixed.rank, share)


def export_basis(
    diffs: Mapping[str, LoRADiff],
    folder: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    roots: Roots | None = None,
) -> Table:
    """Bring diffs onto one right basis and write each to ``folder/<name>/diff``; say what it cost.

    ``core.shared_basis.on_one_basis`` says how, and what ``rank``, ``energy`` and ``roots`` are.
    """
    names = {label: _folder_of(label) for label in diffs}
    for label, name in names.items():
        if list(names.values()).count(name) > 1:
            raise UserError(f"{label} and another diff would both be {name!r}; rename its folder")
    found = on_one_basis(diffs, rank=rank, energy=energy, roots=roots)
    for label, diff in found.diffs.items():
        diff.save(folder / names[label] / "diff")
    rows = (
        [names[label], f"{diffs[label].rank}", f"{diff.rank}"]
        + [wording.number(statistics.fmean(each.rank for each in diff.factors.values()), 1)]
        + [wording.significant(found.errors[label])]
        for label, diff in found.diffs.items()
    )
    return Table.of("diff | rank before | largest rank | mean rank | relative error", rows)


def _folder_of(label: str) -> str:
    """Return the name of a diff whose label is a trait, its path, or both ("evil (seed0)")."""
    if label.endswith(")") and " (" in label:
        return re.sub(r"[^\w.-]+", "_", label[:-1])
    path = Path(label)
    name = path.parent.name if path.name in ("diff", "adapter") else path.name
    return checked_name(name, f"the folder of {label}")


def export_merged(terms: Mapping[LoRADiff, float], base: Path, folder: Path) -> Exported:
    """Write the base model with the mix merged, shard by shard, in the base's own types.

    Every weight is what ``LoRAMerger`` would write, bit for bit; one shard is in memory at a time.
    The folder appears whole or not at all. Raises UserError for a diff of other modules or shapes.
    """
    weights = StoredWeights(base)
    changed = {
        weights.tensors[name].stored_name: (weights.tensors[name].transposed, change)
        for name, change in _changed(terms, weights).items()
    }
    with atomic_folder(folder) as temporary:
        for path in base.iterdir():
            if path.is_file() and path.suffix not in WEIGHTS:
                shutil.copy2(path, temporary / path.name)
        for done, file in enumerate(weights.files):
            shard, metadata = _merged_shard(file, changed)
            save_file(shard, temporary / file.name, metadata=metadata)
            progress.report(done + 1, len(weights.files))
    return Exported(folder)


def export_gguf_lora(
    terms: Mapping[LoRADiff, float],
    base: Path,
    path: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    compress: Callable[..., Compressed] = LoRADiff.compress,
) -> Exported:
    """Write the mix as a LoRA that llama.cpp loads (``--lora``), beside a GGUF of the base.

    The adapter's alpha is its rank, so that the scale is 1; smaller modules are padded with zeros.
    Raises UserError for an architecture whose layout is not known here.
    """
    mixed, share = _compressed(terms, rank, energy, compress)
    config = read_json(base / "config.json")
    kind = config.get("model_type")
    if kind not in GGUF_ARCHITECTURES:
        raise UserError(
            f"the GGUF layout of {kind!r} models is not known; known are "
            f"{', '.join(GGUF_ARCHITECTURES)}. Export with --format peft and convert that"
        )
    name = GGUF_ARCHITECTURES[kind]
    architecture = next(each for each in MODEL_ARCH if MODEL_ARCH_NAMES[each] == name)
    names = get_tensor_name_map(architecture, int(config["num_hidden_layers"]))
    with atomic_path(path) as temporary:
        writer = GGUFWriter(temporary, name)
        writer.add_type("adapter")
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, float(mixed.rank))
        for module, factors in mixed.factors.items():
            target = names.get_name(module)
            if target is None:
                raise UserError(f"{module} has no name in llama.cpp's {name} architecture")
            A, B = _padded(factors, mixed.rank)
            if name == PERMUTED:
                B = _permuted(module, B, config)
            writer.add_tensor(f"{target}.weight.lora_a", A.numpy())
            writer.add_tensor(f"{target}.weight.lora_b", B.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Exported(path, mixed.rank, share)


def export_gguf(
    terms: Mapping[LoRADiff, float], base: Path, path: Path, *, converter: Path | None = None
) -> Exported:
    """Write the merged model as GGUF with llama.cpp's own converter, where that is present.

    The file appears whole or not at all, and the merged model beside it goes.
    ``converter`` is its ``convert_hf_to_gguf.py``; by default the one on PATH.
    """
    found = converter or (Path(which) if (which := shutil.which(CONVERTER)) else None)
    if found is None or not found.is_file():
        raise UserError(
            f"{CONVERTER} of llama.cpp was not found; give its path with --converter, or export "
            "with --format gguf-lora and load it beside a GGUF of the base model"
        )
    with scratch_folder(path) as scratch, atomic_path(path) as temporary:
        merged = export_merged(terms, base, scratch / "merged").path
        written = scratch / path.name
        answer = subprocess.run(
            [sys.executable, str(found), str(merged), "--outfile", str(written)],
            capture_output=True,
            text=True,
            check=False,
        )
        if answer.returncode or not written.is_file():
            raise UserError(f"{found} failed: {answer.stderr.strip().splitlines()[-1:]}")
        written.replace(temporary)
    return Exported(path)


def _compressed(
    terms: Mapping[LoRADiff, float],
    rank: int | None,
    energy: float | None,
    compress: Callable[..., Compressed],
) -> tuple[LoRADiff, float]:
    mixed = mix(terms)
    if rank is None and energy is None:
        return mixed, 1.0
    cut = compress(mixed, rank=rank, energy=energy)
    return cut.diff, cut.energy_kept


def _changed(
    terms: Mapping[LoRADiff, float], weights: StoredWeights
) -> dict[str, list[tuple[LoRAFactors, float]]]:
    changed: dict[str, list[tuple[LoRAFactors, float]]] = {}
    for diff, coefficient in terms.items():
        for module, factors in diff.factors.items():
            place = weights.tensors.get(f"{module}.weight")
            if place is None or place.shape != factors.shape:
                has = "no such weight" if place is None else f"one of shape {list(place.shape)}"
                raise UserError(
                    f"a diff changes {module} {list(factors.shape)}, and {weights.label} has "
                    f"{has}; it belongs to another model"
                )
            changed.setdefault(f"{module}.weight", []).append((factors, coefficient))
    return changed


def _merged_shard(
    file: Path, changed: Mapping[str, tuple[bool, list[tuple[LoRAFactors, float]]]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a shard, and its metadata; ``changed`` by names there, transposed ones marked."""
    shard = {}
    with safe_open(file, framework="pt") as stream:
        for name in stream.keys():  # noqa: SIM118  (safe_open is no dict)
            tensor = stream.get_tensor(name)
            transposed, change = changed.get(name, (False, []))
            if change and transposed:
                tensor = _merged(name, tensor.T, change).T.contiguous()
            elif change:
                tensor = _merged(name, tensor, change)
            shard[name] = tensor
        return shard, dict(stream.metadata() or {"format": "pt"})


def _merged(name: str, weight: Tensor, change: Sequence[tuple[LoRAFactors, float]]) -> Tensor:
    merged = merged_weight(weight, change)
    if not torch.isfinite(merged).all():
        held = ", ".join(f"{coefficient:g}" for _, coefficient in change)
        raise UserError(
            f"{name} would hold NaN or infinity in {merged.dtype} with the coefficients {held}; "
            "take smaller ones"
        )
    return merged


def _padded(factors: LoRAFactors, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - factors.rank
    A = torch.nn.functional.pad(factors.A.float(), (0, 0, 0, missing))
    B = torch.nn.functional.pad(factors.B.float(), (0, missing))
    return A.contiguous(), B.contiguous()


def _permuted(module: str, B: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Reorder the rows of q and k as llama.cpp stores them: rotary halves side by side."""
    heads = int(config["num_attention_heads"])
    if module.endswith("k_proj"):
        heads = int(config.get("num_key_value_heads", heads))
    elif not module.endswith("q_proj"):
        return B
    halves = B.reshape(heads, 2, B.shape[0] // heads // 2, B.shape[1])
    return halves.swapaxes(1, 2).reshape(B.shape).contiguous()
