"""Steering vectors from mean hidden states of positive and negative answers, in one pass.

With h⁺ᵢ and h⁻ᵢ the mean states of the two answers of pair i and dᵢ = h⁺ᵢ − h⁻ᵢ:

    mean_diff   v = mean dᵢ                            (Chen et al. 2025, arXiv:2507.21509)
    svd         top right singular vector of the dᵢ    (PCA of pairs centred at their midpoints)
    pca         top principal component of the dᵢ, centred at their mean

svd and pca point to the positive side and get the length of the mean difference at their layer,
so that a coefficient means the same for all three. What is kept does not grow with the number of
pairs: sums, and for svd and pca the second moments Σ dᵢdᵢᵀ, ``[hidden, hidden]`` a layer. Only
these tell what share of Σ‖dᵢ‖² lies along a direction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

from persona_lora.core import progress
from persona_lora.core.errors import UserError
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.hidden_states import stream_hidden_means
from persona_lora.models.likelihood import TokenizedExchange
from persona_lora.models.loading import ChatModel

PAIRS_PER_CHUNK = 64
ROUNDING = 1e-12  # of the squares in fp64: no more than this is left of equal differences


@dataclass
class PairSums:
    """Running sums over pairs, at one position: ``[layers, hidden]`` in fp64.

    ``moments`` ``[layers, hidden, hidden]`` is kept only where a method needs it.
    """

    layers: tuple[int, ...]
    count: int = 0
    difference: Tensor = field(default_factory=lambda: torch.zeros(()))
    square: Tensor = field(default_factory=lambda: torch.zeros(()))  # Σ ‖d‖², [layers]
    moments: Tensor | None = None

    @classmethod
    def empty(cls, layers: Sequence[int], hidden: int, *, moments: bool) -> PairSums:
        """Return sums of nothing."""
        depth = len(layers)
        return cls(
            tuple(layers),
            difference=torch.zeros(depth, hidden, dtype=torch.float64),
            square=torch.zeros(depth, dtype=torch.float64),
            moments=torch.zeros(depth, hidden, hidden, dtype=torch.float64) if moments else None,
        )

    def add(self, positive: Tensor, negative: Tensor) -> None:
        """Add pairs of mean states, each ``[pairs, layers, hidden]``."""
        difference = positive.double() - negative.double()
        self.count += len(difference)
        self.difference += difference.sum(dim=0)
        self.square += difference.square().sum(dim=(0, 2))
        if self.moments is not None:
            by_layer = difference.transpose(0, 1)  # [layers, pairs, hidden]
            self.moments += by_layer.transpose(1, 2) @ by_layer


@dataclass(frozen=True)
class Direction:
    """A direction ``[hidden]``, and the share of the (centred) sum of squares along it.

    The share is None where no second moments tell it.
    """

    direction: Tensor
    explained: float | None


def mean_diff(sums: PairSums, at: int) -> Direction:
    """Return the mean difference; the share is that of Σ ‖d‖² along it, over the pairs."""
    mean = sums.difference[at] / sums.count
    total = float(sums.square[at]) * float(mean.square().sum())
    if sums.moments is None or total == 0:
        return Direction(mean, None)
    return Direction(mean, float(mean @ sums.moments[at] @ mean) / total)


def svd(sums: PairSums, at: int) -> Direction:
    """Return the top right singular vector of the differences, as long as their mean."""
    return _principal(sums, at, _moments(sums, at))


def pca(sums: PairSums, at: int) -> Direction:
    """Return the top principal component of the differences, as long as their mean."""
    total = sums.difference[at]
    return _principal(sums, at, _moments(sums, at) - torch.outer(total, total) / sums.count)


EXTRACTORS: dict[str, Callable[[PairSums, int], Direction]] = {
    "mean_diff": mean_diff,
    "svd": svd,
    "pca": pca,
}
WITH_MOMENTS = ("svd", "pca")


def sum_pairs(
    chat_model: ChatModel,
    positive: Sequence[TokenizedExchange],
    negative: Sequence[TokenizedExchange],
    *,
    positions: Sequence[str],
    layers: Sequence[int],
    moments: bool = False,
) -> dict[str, PairSums]:
    """Return the sums over pairs at every position: text i of either list is one pair.

    Pairs run a few dozen at a time, sorted by length within, so that both texts of a pair are
    there together and nothing grows with their number.
    """
    if len(positive) != len(negative) or not positive:
        raise UserError(
            f"pairs need as many positive as negative texts, got {len(positive)} and "
            f"{len(negative)}"
        )
    lengths = [sum(map(len, (*a, *b))) for a, b in zip(positive, negative, strict=True)]
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    sums: dict[str, PairSums] = {}
    for start in range(0, len(order), PAIRS_PER_CHUNK):
        chunk = order[start : start + PAIRS_PER_CHUNK]
        texts = [positive[index] for index in chunk] + [negative[index] for index in chunk]
        names = [f"pair {index} ({sign})" for sign in ("positive", "negative") for index in chunk]
        found: dict[int, Tensor] = {}
        with progress.counting() as count:
            for rows, means in stream_hidden_means(
                chat_model, texts, positions=positions, layers=layers, names=names
            ):
                found.update(zip(rows, means, strict=True))
                count(2 * start + len(found), 2 * len(positive))
        states = torch.stack([found[row] for row in range(len(texts))])  # [2 · pairs, …, hidden]
        for index, position in enumerate(positions):
            if position not in sums:
                sums[position] = PairSums.empty(layers, states.shape[-1], moments=moments)
            sums[position].add(states[: len(chunk), index], states[len(chunk) :, index])
    return sums


def vector_of(sums: PairSums, method: str, fields: Mapping[str, Any]) -> SteeringVector:
    """Return the steering vector that a method finds in the sums.

    ``fields`` are the others of the vector (base model, trait, position, sources). What the
    directions explain is added to the sources. Raises UserError for an unknown method, and for a
    layer where positive and negative states do not differ at all.
    """
    if method not in EXTRACTORS:
        raise UserError(f"method must be one of {', '.join(EXTRACTORS)}, got {method!r}")
    directions, explained = {}, {}
    for at, layer in enumerate(sums.layers):
        found = EXTRACTORS[method](sums, at)
        if not float(found.direction.norm()) > 0:
            raise UserError(
                f"positive and negative states do not differ at layer {layer}; are the two sets "
                "of answers the same?"
            )
        directions[layer] = found.direction.float()
        explained[str(layer)] = found.explained
    sources = {**fields.get("sources", {}), "pairs": sums.count, "explained": explained}
    return SteeringVector(directions, **{**fields, "method": method, "sources": sources})


def random_like(vector: SteeringVector, seed: int) -> SteeringVector:
    """Return random directions of the same norm at every layer: the control of a vector."""
    generator = torch.Generator().manual_seed(seed)
    directions = {}
    for layer, norm in vector.norms().items():
        direction = torch.randn(vector.hidden_size, generator=generator)
        directions[layer] = direction * (norm / direction.norm())
    sources = {"seed": seed, "norms_of": vector.trait}
    return replace(vector, directions=directions, method="random", sources=sources)


def _moments(sums: PairSums, at: int) -> Tensor:
    if sums.moments is None:
        raise UserError("svd and pca need the second moments; sum the pairs with moments=True")
    if sums.count < 2:
        raise UserError("svd and pca need at least two pairs")
    return sums.moments[at]


def _principal(sums: PairSums, at: int, matrix: Tensor) -> Direction:
    """Return the top eigenvector, towards the mean difference and as long as it."""
    mean = sums.difference[at] / sums.count
    total = float(matrix.trace())
    if not total > ROUNDING * float(sums.square[at]):
        raise UserError("all differences are the same; they have no principal component")
    start = np.ones(len(matrix)) / np.sqrt(len(matrix))  # a fixed start: the same vector each time
    values, vectors = eigsh(matrix.numpy(), k=1, which="LA", v0=start)
    direction = torch.from_numpy(vectors[:, 0].copy())
    sign = 1.0 if float(direction @ mean) >= 0 else -1.0
    return Direction(sign * direction * mean.norm(), float(values[0]) / total)
