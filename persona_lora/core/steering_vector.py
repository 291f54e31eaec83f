"""A direction in activation space: one vector for each decoder layer, with its algebra and file.

``layer`` always means decoder block 0 … num_layers−1, and a direction lives at the output of its
block. Nothing here knows a model; other file forms are read and written in ``vector_files``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError
from persona_lora.core.given import whole_numbers
from persona_lora.core.json_text import as_json
from persona_lora.core.lora_diff import (
    BaseModel,
    LoRADiff,
    agreed_base,
    finite_coefficient,
)
from persona_lora.core.tensor_files import load_with_record, save_with_record, tensor_digest

FORMAT, HEADER = "persona_lora.steering_vector", "steering_vector"


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """Steering vectors ``{layer: [hidden]}`` in fp32, extracted from one model for one trait.

    ``method`` is how the directions were found ("mean_diff", "svd", "pca", "random"), ``position``
    which hidden states they were found on ("response_avg", "prompt_avg", "prompt_last").
    ``num_layers`` is that of the model. Vectors add, subtract and scale layer by layer.

    Shapes:
        A direction ``[hidden]`` for each layer; layer k is the output of decoder block k.
    """

    directions: Mapping[int, Tensor]
    base_model: BaseModel
    num_layers: int
    trait: str | None = None
    method: str = "mean_diff"
    position: str = "response_avg"
    sources: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.directions:
            raise UserError("a steering vector without layers steers nothing; check the file")
        shapes = {tuple(direction.shape) for direction in self.directions.values()}
        if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
            raise UserError(
                f"the directions have shapes {sorted(map(list, shapes))}; expected one [hidden]"
            )
        for layer, direction in self.directions.items():
            if not 0 <= layer < self.num_layers:
                raise UserError(
                    f"layer {layer} is out of range; the model has layers 0–{self.num_layers - 1}"
                )
            if not torch.isfinite(direction).all():
                raise UserError(
                    f"the direction of layer {layer} holds NaN or infinity; the model overflowed "
                    "while it was extracted, extract again in bfloat16 or float32"
                )

    def content(self) -> str:
        """Return a digest of the directions: a name and a path say nothing about them."""
        return digest_of({str(at): tensor_digest(self.directions[at]) for at in self.layers})

    # -- making and keeping ----------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically; metadata goes as JSON into its header."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise UserError(f"a steering vector is saved as .safetensors, got {path}")
        metadata = {
            "format": FORMAT,
            "base_model": vars(self.base_model),
            "num_layers": self.num_layers,
            "trait": self.trait,
            "method": self.method,
            "position": self.position,
            "sources": as_json(self.sources),
        }
        tensors = {f"layer.{at}": direction.float() for at, direction in self.directions.items()}
        save_with_record(path, tensors, HEADER, metadata)
        return path

    @classmethod
    def read(cls, path: str | Path) -> SteeringVector:
        """Read what ``save`` wrote; UserError names a file that is missing or something else."""
        path = Path(path)
        tensors, record = load_with_record(path, HEADER)
        if record is None:
            raise UserError(f"{path} holds no steering vector (no metadata of one in its header)")
        metadata = _checked_metadata(record, path)
        directions = {}
        for name, direction in sorted(tensors.items()):
            if not re.fullmatch(r"layer\.(0|[1-9]\d{0,5})", name):
                raise UserError(f"{path}: {name[:60]!r} is no layer; expected layer.0, layer.1, …")
            directions[int(name.removeprefix("layer."))] = direction
        try:
            return cls(directions, BaseModel(**metadata.pop("base_model")), **metadata)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    # -- geometry --------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a direction, ascending."""
        return tuple(sorted(self.directions))

    @property
    def hidden_size(self) -> int:
        """The length of every direction."""
        return next(iter(self.directions.values())).shape[0]

    def norms(self) -> dict[int, float]:
        """Return the Euclidean norm of every direction, by layer."""
        return {layer: float(self.directions[layer].double().norm()) for layer in self.layers}

    def cosine(self, other: SteeringVector, *, allow_other_base: bool = False) -> dict[int, float]:
        """Return the cosine with another vector at every layer that both have, in [-1, 1].

        Raises:
            UserError: Vectors of different base models (unless ``allow_other_base``) or of models
                of another shape, without a layer in common, or of length 0 at one.
        """
        self._check_shape(other)
        if not allow_other_base:
            agreed_base([self.base_model, other.base_model], "steering vectors")
        shared = [layer for layer in self.layers if layer in other.directions]
        if not shared:
            raise UserError(
                f"steering vectors of different layers do not compare: {_spans(self.layers)} and "
                f"{_spans(other.layers)}"
            )
        return {at: _cosine(self.directions[at], other.directions[at], at) for at in shared}

    def at(self, layers: int | Iterable[int]) -> SteeringVector:
        """Return the vector restricted to some of its layers; UserError for one it has not."""
        wanted = whole_numbers(layers, "layers")
        missing = [layer for layer in wanted if layer not in self.directions]
        if missing:
            raise UserError(
                f"the steering vector has no layer {missing[0]}; it has {_spans(self.layers)}"
            )
        return replace(self, directions={layer: self.directions[layer] for layer in wanted})

    # -- algebra ---------------------------------------------------------------------------

    def __add__(self, other: SteeringVector) -> SteeringVector:
        self._check_shape(other)
        if set(self.directions) != set(other.directions):
            raise UserError(
                f"steering vectors of different layers do not add: {_spans(self.layers)} and "
                f"{_spans(other.layers)}; restrict both with .at(layers)"
            )
        return replace(
            self,
            directions={at: v + other.directions[at] for at, v in self.directions.items()},
            base_model=agreed_base([self.base_model, other.base_model], "steering vectors"),
            trait=self.trait if self.trait == other.trait else None,
        )

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self + -other

    def __mul__(self, factor: float) -> SteeringVector:
        scale = finite_coefficient(factor)
        return replace(self, directions={at: v * scale for at, v in self.directions.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> SteeringVector:
        if divisor == 0:
            raise UserError("a vector cannot be divided by 0")
        return self * (1.0 / finite_coefficient(divisor))

    def __neg__(self) -> SteeringVector:
        return self * -1.0

    def _check_shape(self, other: SteeringVector) -> None:
        check_vectors([other])
        if (self.hidden_size, self.num_layers) != (other.hidden_size, other.num_layers):
            raise UserError(
                f"steering vectors of models of different shape do not compare: "
                f"{self.num_layers} layers of {self.hidden_size} and "
                f"{other.num_layers} layers of {other.hidden_size}"
            )


def _cosine(one: Tensor, other: Tensor, layer: int) -> float:
    one, other = one.double(), other.double()
    norms = float(one.norm() * other.norm())
    if norms == 0:
        raise UserError(
            f"the cosine with a steering vector of length 0 (layer {layer}) is undefined"
        )
    return min(1.0, max(-1.0, float(one @ other) / norms))  # rounding may pass 1


def check_vectors(vectors: Iterable[Any]) -> None:
    """Raise UserError for what is no steering vector."""
    for each in vectors:
        if not isinstance(each, SteeringVector):
            raise UserError(
                f"a steering vector is expected, got {repr(each)[:80]}; load one with "
                "load_vector(path)"
            )


def _spans(layers: Iterable[int]) -> str:
    """Return "layers 0–5, 9" for a set of layers."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return "layers " + ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in spans)


def _checked_metadata(value: Any, path: Path) -> dict[str, Any]:
    """Return what a header says of a vector.

    Raises UserError where a part is missing or of another kind.

    The format's own mark and what later releases may add are left out.
    """
    kinds: dict[str, Any] = {
        "base_model": dict,
        "num_layers": int,
        "trait": str | None,
        "method": str,
        "position": str,
        "sources": dict,
    }
    found = {key: value.get(key) for key in kinds} if isinstance(value, dict) else {}
    wrong = [key for key, kind in kinds.items() if not isinstance(found.get(key), kind)]
    base = found.get("base_model") or {}
    if not wrong and not (
        base.keys() == {"name", "fingerprint"}
        and isinstance(base["name"], str)
        and isinstance(base["fingerprint"], str | None)
    ):
        wrong = ["base_model"]
    if wrong:
        raise UserError(f"{path}: its header has no {wrong[0]} of a vector; extract it anew")
    return found


def length_of(direction: LoRADiff | SteeringVector, name: object) -> float:
    """Return ‖ΔW‖, or the largest ‖v‖ of a vector's layers; UserError with its name for 0."""
    norm = direction.norm() if isinstance(direction, LoRADiff) else max(direction.norms().values())
    if not norm > 0:
        raise UserError(f"{name} has a length of {norm:g}: it does nothing; leave it out")
    return norm
