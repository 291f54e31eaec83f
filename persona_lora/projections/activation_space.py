"""Projections of mean hidden states on steering vectors: all vectors and layers in one pass.

    projection = ⟨h̄, v⟩ / ‖v‖

with h̄ the mean state of a text at a position ("response_avg", "prompt_avg", "prompt_last"), in
units of the length of hidden states (Chen et al. 2025, arXiv:2507.21509). Refuses to know where
texts come from and what the projections are compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from persona_lora.core import progress
from persona_lora.core.errors import UserError
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.hidden_states import stream_hidden_means
from persona_lora.models.likelihood import TokenizedExchange
from persona_lora.models.loading import ChatModel
from persona_lora.models.structure import decoder_layers, hidden_size


def project_hidden_states(
    chat_model: ChatModel,
    texts: Sequence[TokenizedExchange],
    vectors: Mapping[str, SteeringVector],
    layers: Sequence[int],
    *,
    positions: Sequence[str] = ("response_avg",),
) -> Tensor:
    """Return the projection of every text, ``[texts, vectors, layers, positions]`` in fp32.

    Raises UserError for a vector of a model of another width or depth, for a layer that a vector
    has not, and for a vector of length 0.
    """
    if not texts or not vectors or not layers:
        raise UserError("a projection needs at least one text, one vector and one layer")
    for name, vector in vectors.items():
        check_fits(chat_model, vector, name)
    units = torch.stack(
        [
            torch.stack([_unit(vector, layer, name) for layer in layers])
            for name, vector in vectors.items()
        ]
    )  # [vectors, layers, hidden]
    projections = torch.empty(len(texts), len(vectors), len(layers), len(positions))
    for rows, means in stream_hidden_means(chat_model, texts, positions=positions, layers=layers):
        projections[rows] = torch.einsum("bplh,vlh->bvlp", means, units)
    return projections


@dataclass(frozen=True)
class Along:
    """What texts are projected on: vectors by name, at layers, and from which of their tokens."""

    vectors: Mapping[str, SteeringVector]
    layers: Sequence[int]
    positions: Sequence[str] = ("response_avg",)

    def check(self, chat_model: ChatModel) -> None:
        """Raise UserError for a vector of a model of another shape, or without a layer."""
        for name, vector in self.vectors.items():
            check_fits(chat_model, vector, name)
            vector.at(self.layers)

    def project(
        self, chat_model: ChatModel, texts: Sequence[TokenizedExchange], stage: str = "projecting"
    ) -> Tensor:
        """Return the projections as ``project_hidden_states`` does, and report on them."""
        with progress.stage(stage):
            return project_hidden_states(
                chat_model, texts, self.vectors, self.layers, positions=self.positions
            )

    def places(self) -> Iterator[tuple[tuple[int, int, int], dict[str, Any]]]:
        """Yield where a projection of a text stands among its own, and what it is of."""
        for (v, name), (at, layer), (p, position) in product(
            enumerate(self.vectors), enumerate(self.layers), enumerate(self.positions)
        ):
            trait = self.vectors[name].trait
            yield (v, at, p), {"vector": name, "trait": trait, "layer": layer, "type": position}


def check_fits(chat_model: ChatModel, vector: SteeringVector, name: str) -> None:
    """Raise UserError, naming the vector, when it is of a model of another shape."""
    shape = len(decoder_layers(chat_model.model)), hidden_size(chat_model.model)
    if shape != (vector.num_layers, vector.hidden_size):
        raise UserError(
            f"the vector {name} is of a model with {vector.num_layers} layers of width "
            f"{vector.hidden_size}; {chat_model.name} has {shape[0]} layers of width {shape[1]}"
        )


def _unit(vector: SteeringVector, layer: int, name: str) -> Tensor:
    direction = vector.at([layer]).directions[layer].double()
    length = direction.norm()
    if not float(length) > 0:
        raise UserError(f"the vector {name} has length 0 at layer {layer}; it has no direction")
    return (direction / length).float()
