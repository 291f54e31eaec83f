"""The weights of a model, row by row: from safetensors shards on disk, or from a loaded model.

Reads one block of rows at a time, so that two models of any size can be compared in little memory.
Weights are called what they are called in a loaded model, wherever they come from, and linear ones
are ``[out, in]``. Knows files and names; refuses to know what is computed from the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from persona_lora.core.adapter_files import without_wrappings
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_json
from persona_lora.models.loading import auto_model, model_source
from persona_lora.models.structure import (
    canonical_name,
    decoder_layers,
    names_in_memory,
    unwrapped,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TIED = "lm_head.weight"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies, its name there, shape and type, and whether it lies transposed."""

    file: Path
    stored_name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False


class StoredWeights:
    """A model folder with safetensors weights, in one file or in shards.

    Raises UserError for a folder without them, or a file that cannot be read (it is named).
    """

    def __init__(self, folder: Path, label: str | None = None) -> None:
        self.label = label or str(folder)
        self.tensors: dict[str, TensorPlace] = {}
        self.files = _files(folder)
        for file in self.files:
            self.tensors |= _places(file)
        self.skeleton = model = skeleton_of_folder(folder)
        config = folder / "config.json"
        if model is not None:  # places are known by the names of a loaded model
            places, self.tensors = self.tensors, {}
            for stored, name in names_in_memory(model, places).items():
                place = places[stored]
                if _lies_transposed(model, name):
                    place = replace(place, shape=place.shape[::-1], transposed=True)
                self.tensors[name] = place
        said = read_json(config) if config.is_file() else {}
        if isinstance(said, dict) and said.get("tie_word_embeddings") is True:
            self.tensors.pop(TIED, None)  # some savers write the tied tensor twice

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows ``start`` … ``stop − 1`` of a tensor, in its own type."""
        # A file is opened for each block: pages of a long-lived mapping would count as memory.
        place = self.tensors[name]
        try:
            with safe_open(place.file, framework="pt") as stream:
                if not place.shape:
                    block: Tensor = stream.get_tensor(place.stored_name)[None]
                elif place.transposed:
                    block = stream.get_slice(place.stored_name)[:, start:stop].T
                else:
                    block = stream.get_slice(place.stored_name)[start:stop]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{place.file} cannot be read ({error}); fetch it again") from error
        return block

    def as_model(self) -> nn.Module | None:
        """Return the model with its weights where they lie on disk: only what is used is read.

        None where they are not those of a loaded model, one by one.
        """
        model = self.skeleton
        if model is None:
            return None
        for name, _ in list(model.named_parameters(remove_duplicate=False)):
            place = self.tensors.get(name)
            if place is not None and place.shape:
                rows = self.rows(name, 0, place.shape[0])
                owner, _, leaf = name.rpartition(".")
                held = nn.Parameter(rows.T if place.transposed else rows, requires_grad=False)
                setattr(model.get_submodule(owner), leaf, held)
        inside = (each for block in decoder_layers(model) for each in block.parameters())
        return None if any(each.is_meta for each in inside) else model


class LoadedWeights:
    """The weights of a model in memory; a tensor with several names is there once.

    Those that transformers joins while it loads (the experts of a block) are there as it would save
    them. Raises UserError for a model with an unmerged adapter, whose change is not in the weights,
    and for weights that are offloaded.
    """

    def __init__(self, model: nn.Module, label: str) -> None:
        self.label = label
        inner = unwrapped(model)
        held: dict[str, Tensor] = {}
        state = inner.state_dict(keep_vars=True)
        once = {id(tensor): name for name, tensor in reversed(state.items())}  # tied ones come once
        for name in once.values():
            parameter = state[name]
            if ".lora_" in name:
                raise UserError(
                    f"{label} holds an unmerged adapter; give the adapter's folder, or merge it"
                )
            if parameter.device.type == "meta":
                raise UserError(
                    f"{name} of {label} is offloaded; give the model's folder, or load it onto one "
                    "device"
                )
            module, _, leaf = name.rpartition(".")
            held[f"{canonical_name(module)}.{leaf}"] = parameter.data
        if isinstance(inner, PreTrainedModel):
            stored = revert_weight_conversion(inner, held)
            held = {now: stored[then] for then, now in names_in_memory(inner, stored).items()}
            transposed = {name for name in held if _lies_transposed(inner, name)}
            held = {name: each.T if name in transposed else each for name, each in held.items()}
        self.tensors = held

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows ``start`` … ``stop − 1`` of a tensor, in its own type."""
        return self.tensors[name][start:stop].cpu()


WeightSource = StoredWeights | LoadedWeights
"""Weights by name; ``label`` says whose they are."""


def skeleton_of_folder(folder: Path) -> PreTrainedModel | None:
    """Return the model of a folder on the meta device.

    None for a folder without a configuration, and for code of its own, which is not run here and
    whose weights are named alike on disk and in memory.
    """
    path = folder / "config.json"
    if not path.is_file() or read_json(path).get("model_type") not in CONFIG_MAPPING:
        return None
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return auto_model(config).from_config(config)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} describes no language model: {str(error)[:200]}") from error


def _lies_transposed(model: PreTrainedModel, name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(dict(model.named_modules()).get(module), Conv1D)


def weights_of(model: str | Path | nn.Module, revision: str | None = None) -> WeightSource:
    """Return the weights of a model by name (packaged, folder, hub id), or of a loaded one."""
    if isinstance(model, str | Path):
        return StoredWeights(weights_folder(str(model), revision), str(model))
    return LoadedWeights(model, type(model).__name__)


def weights_folder(name: str, revision: str | None = None) -> Path:
    """Return the folder with the weights of a model by name (packaged, folder, hub id)."""
    source = Path(model_source(name, revision))
    if source.is_dir():
        return source
    try:
        ignored = ["*.bin", "*.pth", "*.gguf"]
        return Path(snapshot_download(name, revision=revision, ignore_patterns=ignored))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} is no folder, and the model hub could not deliver it; check the name"
        ) from error


def model_on_disk(name: str, revision: str | None = None) -> nn.Module | None:
    """Return a model with its weights where they lie on this machine (``as_model``).

    None for one that is not here yet, or that is read no other way than by loading it.
    """
    try:
        folder = Path(model_source(name, revision))
        if not folder.is_dir():
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        return StoredWeights(folder, name).as_model()
    except (OSError, ValueError):  # loading it says what is wrong
        return None


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        value = read_json(index)
        places = value.get("weight_map") if isinstance(value, dict) else None
        if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
            raise UserError(f"{index} holds no weight_map of names to files; fetch it again")
        names = sorted(set(places.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder} lacks the shard {missing[0]}, which {INDEX} names")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise UserError(
        f"{folder} holds no {SINGLE} and no {INDEX}; save the model with save_pretrained (other "
        "formats are not read)"
    )


def _places(file: Path) -> dict[str, TensorPlace]:
    try:
        with safe_open(file, framework="pt") as stream:
            found = {}
            for name in stream.keys():  # noqa: SIM118  (safe_open is no dict)
                view = stream.get_slice(name)
                kind = view.get_dtype()
                if kind not in _DTYPES:
                    raise UserError(
                        f"{file}: {name} is stored as {kind}; quantised weights have no exact "
                        "difference, compare the models before quantisation"
                    )
                shape, own_name = tuple(view.get_shape()), without_wrappings(name)
                found[own_name] = TensorPlace(file, name, shape, _DTYPES[kind])
            return found
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}); fetch it again") from error
