"""A gallery: diffs of one family in a few megabytes, ready to be used.

All diffs of a family share their A. ``basis.safetensors`` holds it once, in bf16; a file per trait
holds B in eight bits (e4m3, a power of two per module as its scale), what the diff is of, and what
``calibrate`` measured of it: then its B is scaled by a power of two, so that a coefficient of 1 is
about 0.05 nats for all of them. Packing what was unpacked gives the same numbers. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from persona_lora.core.errors import UserError, checked_name, nearest_names
from persona_lora.core.files import atomic_folder
from persona_lora.core.lora_diff import BaseModel, LoRADiff, LoRAFactors, shared_base_model
from persona_lora.core.resources import search_folders
from persona_lora.core.steering_vector import length_of
from persona_lora.core.strength import Strengths, read_strengths
from persona_lora.core.tensor_files import load_with_record, save_with_record

BASIS = "basis.safetensors"
EIGHT_BITS = torch.float8_e4m3fn
RECORD, SCALE = "persona_lora", ".scale"
UNIT = 0.05  # nats a token


@dataclass(frozen=True)
class Exhibit:
    """A diff of a gallery, and what ``calibrate`` measured of it, if it did."""

    diff: LoRADiff
    strengths: Strengths | None

    def coefficient(self, nats: float) -> float:
        """Return the coefficient of so many nats a token; UserError where none were measured."""
        if self.strengths is None:
            raise UserError(f"nats of {self.diff.trait} were not measured; give a coefficient")
        return self.strengths.coefficient(nats, f"{self.diff.trait}")

    def save(self, folder: Path) -> None:
        """Write the diff as any other, its strengths first: a diff that is there has them."""
        if self.strengths is not None:
            self.strengths.save(folder)
        self.diff.save(folder)


class Gallery:
    """The diffs in a folder, by trait; by default those that come along.

    Raises:
        UserError: A folder that is no gallery, a trait that it has not, a damaged file.
    """

    def __init__(self, folder: Path | None = None) -> None:
        places = search_folders("gallery", folder)
        self.folder = next((each for each in places if (each / BASIS).is_file()), places[-1])
        if not (self.folder / BASIS).is_file():
            raise UserError(f"{self.folder} is no gallery: it has no {BASIS}; check the path")

    @property
    def traits(self) -> list[str]:
        """The names of its diffs."""
        return sorted(each.stem for each in self.folder.glob("*.safetensors") if each.name != BASIS)

    def exhibit(self, trait: str) -> Exhibit:
        """Return the diff of a trait."""
        path = self.folder / f"{trait}.safetensors"
        if trait not in self.traits:
            nearest = nearest_names(trait, self.traits)
            raise UserError(f"{self.folder} has no diff of {trait!r}; {nearest}")
        held, record = _read(path)
        basis, _ = _read(self.folder / BASIS)
        try:
            factors = {
                module: LoRAFactors(basis[module].float(), B.float() * held[module + SCALE])
                for module, B in held.items()
                if not module.endswith(SCALE)
            }
            base = BaseModel(**record["base_model"])
            diff = LoRADiff(factors, base, record["trait"], record["sources"])
        except (KeyError, TypeError, RuntimeError, UserError) as error:
            raise UserError(f"{path} does not belong to {BASIS} beside it ({error})") from error
        measured = record.get("strengths")
        return Exhibit(diff, None if measured is None else Strengths.of_json(measured, path))


def write_gallery(paths: Sequence[Path], folder: Path) -> dict[str, float]:
    """Write the diffs at some paths as one gallery; return ‖packed − diff‖ / ‖diff‖ by trait.

    What ``calibrate`` measured goes along where it is of the packed diff: pack, unpack, calibrate,
    and pack again.

    Raises:
        UserError: Diffs that do not share their A, of one trait, or of no known trait.
    """
    loaded: dict[str, LoRADiff] = {}
    places: dict[str, Path] = {}
    for path in paths:
        diff = LoRADiff.load(path)
        length_of(diff, path)
        trait = checked_name(diff.trait or "", f"the trait of {path}")
        if trait == Path(BASIS).stem:
            raise UserError(f"{path} is of a trait called {trait}, as the file of A is; rename it")
        if trait in loaded:
            raise UserError(f"{path} is of {trait}, as one before it is; give one diff per trait")
        loaded[trait], places[trait] = diff, path
    shared_base_model(list(loaded.values()))
    basis: dict[str, Tensor] = {}
    for trait, diff in loaded.items():
        for module, each in diff.factors.items():
            if not torch.equal(basis.setdefault(module, each.A), each.A):
                raise UserError(
                    f"{trait} has another A than the diffs before it, in {module}; train them as a "
                    "family (train --family), or bring them onto one with persona-lora basis"
                )
    errors = {}
    with atomic_folder(folder) as temporary:
        halved = {name: A.bfloat16() for name, A in basis.items()}
        save_with_record(temporary / BASIS, halved, RECORD, {})
        for trait, diff in loaded.items():
            packed = _pack(temporary, trait, diff)
            errors[trait] = (packed - diff).norm() / diff.norm()
            try:
                measured = read_strengths(places[trait], packed.content())
            except UserError:
                continue
            size = _size(measured)
            scaled = _pack(temporary, trait, packed * size)
            points = tuple(
                each._replace(coefficient=each.coefficient / size) for each in measured.points
            )
            norm = None if measured.weighted_norm is None else measured.weighted_norm * size
            kept = replace(measured, content=scaled.content(), points=points, weighted_norm=norm)
            _pack(temporary, trait, scaled, {"strengths": kept.to_json()})
    return errors


def _pack(folder: Path, trait: str, diff: LoRADiff, more: Mapping[str, Any] = {}) -> LoRADiff:
    """Write the file of a trait beside its basis; return the diff that it holds."""
    tensors: dict[str, Tensor] = {}
    for module, each in diff.factors.items():
        scale = _scale(each.B)
        tensors[module] = (each.B / scale).to(EIGHT_BITS)
        tensors[module + SCALE] = torch.tensor(scale)
    known = {key: diff.sources[key] for key in ("training", "seed") if key in diff.sources}
    record = {"trait": trait, "base_model": vars(diff.base_model), "sources": known, **more}
    save_with_record(folder / f"{trait}.safetensors", tensors, RECORD, record)
    return Gallery(folder).exhibit(trait).diff


def _size(measured: Strengths) -> float:
    """Return the power of two that is nearest to the coefficient of UNIT nats, both ways."""
    both = [abs(measured.coefficient(sign * UNIT, measured.content)) for sign in (-1.0, 1.0)]
    return 2.0 ** round(math.log2(math.sqrt(both[0] * both[1])))


def _scale(B: Tensor) -> float:
    """Return the least power of two by which B fits into eight bits."""
    largest = float(B.abs().max()) / torch.finfo(EIGHT_BITS).max
    return 2.0 ** math.ceil(math.log2(largest)) if largest else 1.0


def _read(path: Path) -> tuple[dict[str, Tensor], Any]:
    tensors, record = load_with_record(path, RECORD, also=EIGHT_BITS)
    if not isinstance(record, dict):
        raise UserError(f"{path} is no file of a gallery; get it again")
    return tensors, record
