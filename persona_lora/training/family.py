"""A family: LoRAs that share one frozen A per module, of which training learns B alone.

Then pos − neg is (B₊ − B₋)·A, and a mix of any number of traits (Σ cₖ ΔBₖ)·A, of the rank of one
LoRA. Knows the file that keeps the A of every module, and how a first one is drawn; refuses to know
what is trained on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError
from persona_lora.core.files import ensure_writable_folder
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.tensor_files import load_with_record, save_with_record, tensor_digest
from persona_lora.models.loading import ChatModel
from persona_lora.models.structure import (
    canonical_name,
    features,
    linear_modules,
    weight_fingerprint,
)
from persona_lora.projections.inputs import kept_inputs, load_ordinary_prompts
from persona_lora.training.lora import LoRAArguments, lora_targets

FORM = "persona_lora family 1"


@dataclass(frozen=True, eq=False)
class Family:
    """The frozen A ``[rank, in]`` of every module, in fp32, and the model that it belongs to.

    ``origin`` says where A is from: a seed, or the prompts whose inputs it leads with.
    """

    factors: Mapping[str, Tensor]
    base_model: BaseModel
    origin: str

    @property
    def rank(self) -> int:
        """The rank of every LoRA of the family."""
        return len(next(iter(self.factors.values())))

    def content(self) -> str:
        """Return a digest of all A."""
        return digest_of({name: tensor_digest(A) for name, A in self.factors.items()})

    def put_on(self, model: PeftModel) -> None:
        """Give a fresh LoRA the A of the family, which no optimiser will move."""
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                A = module.lora_A["default"].weight
                A.data.copy_(self.factors[canonical_name(name)])
                A.requires_grad_(False)

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically."""
        record = {
            "form": FORM,
            "base_model": self.base_model.name,
            "fingerprint": self.base_model.fingerprint,
            "rank": self.rank,
            "target_modules": sorted(self.factors),
            "origin": self.origin,
        }
        save_with_record(path, self.factors, "family", record)

    @classmethod
    def load(cls, path: Path) -> Family:
        """Read what ``save`` wrote; raises UserError for any other file."""
        tensors, record = load_with_record(path, "family")
        if not isinstance(record, dict) or record.get("form") != FORM:
            raise UserError(f"{path} holds no family; name a file that is not there yet")
        ranks = {A.shape[0] for A in tensors.values() if A.ndim == 2 and A.dtype == torch.float32}
        if ranks != {record.get("rank")} or sorted(tensors) != record.get("target_modules"):
            raise UserError(f"{path} does not hold what its header says; fetch it again")
        return cls(
            tensors, BaseModel(record["base_model"], record["fingerprint"]), record["origin"]
        )


def open_family(
    path: Path, chat_model: ChatModel, lora: LoRAArguments, *, seed: int, by_inputs: bool
) -> Family:
    """Return the family in a file, which is drawn and written first where it is not there yet.

    ``by_inputs`` draws the leading directions of the model's inputs, over ordinary prompts.

    Raises:
        UserError: The file is of another base model, rank or target modules, or was drawn from a
            seed where inputs are asked for.
    """
    targets = lora_targets(chat_model, lora.lora_target_modules or [])
    modules = linear_modules(chat_model.model)
    widths = {name: features(modules[name])[1] for name in targets}
    ensure_writable_folder(path.parent)
    with FileLock(path.with_name(f".{path.name}.lock")):  # two runs at once have one family
        if not path.exists():
            _draw(chat_model, widths, lora.lora_r, seed, by_inputs).save(path)
    family = Family.load(path)
    _check(family, path, chat_model, widths, lora.lora_r)
    if by_inputs and family.origin.startswith("seed"):
        raise UserError(
            f"{path} was drawn from {family.origin}, not from inputs; leave family_inputs out, or "
            "name a file that is not there yet"
        )
    return family


def _draw(
    chat_model: ChatModel, widths: Mapping[str, int], rank: int, seed: int, by_inputs: bool
) -> Family:
    base = BaseModel(chat_model.name, weight_fingerprint(chat_model.model))
    if not by_inputs:
        return Family(_drawn(widths, rank, seed), base, f"seed {seed}")
    inputs = kept_inputs(chat_model, load_ordinary_prompts())
    led = {name: _leading(inputs.root(name, width), rank, name) for name, width in widths.items()}
    return Family(led, base, f"inputs of prompts {inputs.prompts[:16]}")


def _check(
    family: Family, path: Path, chat_model: ChatModel, widths: Mapping[str, int], rank: int
) -> None:
    another = "or name a file that is not there yet, and a family is drawn for this run"
    if family.base_model.fingerprint != weight_fingerprint(chat_model.model):
        raise UserError(
            f"{path} is a family of {family.base_model.name!r} of other weights than "
            f"{chat_model.name!r}; train that model, {another}"
        )
    if family.rank != rank:
        raise UserError(
            f"{path} is a family of rank {family.rank}, the run has lora_r {rank}; pass --lora_r "
            f"{family.rank}, {another}"
        )
    held = {name: A.shape[1] for name, A in family.factors.items()}
    if held != dict(widths):
        odd = sorted(set(held.items()) ^ set(widths.items()))[0][0]
        raise UserError(
            f"{path} is a family of other target modules than this run's (as {odd}); pass the "
            f"lora_target_modules that it was drawn with, {another}"
        )


def _drawn(widths: Mapping[str, int], rank: int, seed: int) -> dict[str, Tensor]:
    """Return A as PEFT draws it: uniform within ±1/√in, so that E‖A·x‖² = rank·‖x‖²/(3·in)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.init.kaiming_uniform_(torch.empty(rank, width), math.sqrt(5), generator=generator)
        for name, width in sorted(widths.items())
    }


def _leading(root: Tensor, rank: int, name: str) -> Tensor:
    """Return the ``rank`` leading directions of inputs with E[x xᵀ] = R Rᵀ, as rows.

    Each is scaled so that (A·x)² has the mean that a drawn A gives it, E‖x‖²/(3·in): B then learns
    at one pace along all of them, and at that of other LoRAs.
    """
    directions, lengths, _ = torch.linalg.svd(root.double(), full_matrices=False)
    if rank > len(lengths):
        raise UserError(
            f"the inputs of {name} have {len(lengths)} directions of note, fewer than lora_r "
            f"{rank}; use a lower lora_r, or leave family_inputs out"
        )
    usual = lengths.square().sum() / (3 * len(root))
    scale = (usual / lengths[:rank].square()).sqrt()
    return (directions[:, :rank] * scale).T.float().contiguous()
