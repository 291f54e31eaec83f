"""Steering in activation space: add vectors to hidden states, or project directions out.

At the output h of a chosen decoder block, and at the chosen positions,

    h ← h + Σₖ cₖ[row]·vₖ            (activation addition, arXiv:2308.10248; arXiv:2507.21509)
    h ← h + [cos(h, u) > θ]·Σₖ cₖ·vₖ  (conditional; u a condition vector, arXiv:2409.05907)
    h ← h + (clip(h·v̂, a, b) − h·v̂)v̂  (bounded along v̂ = v/‖v‖, arXiv:2601.10387)
    h ← h − Q Qᵀ h                   (ablation; Q an orthonormal basis of the directions)

Positions are "response", "prompt" or "all". In generation, "response" is the last prompt position
(whose state makes the first token of the answer) and every token generated after it, "prompt" is
every position of the prompt's pass. ``models.caches`` tells the two apart, or refuses. For whole
texts ``select_positions`` says what the response is. Weights are never touched, and hooks come off
on any exit.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from persona_lora.core.errors import UserError
from persona_lora.core.given import several, whole_numbers
from persona_lora.core.options import Positions
from persona_lora.core.steering_vector import SteeringVector, check_vectors
from persona_lora.models.caches import PassCounter, Stage
from persona_lora.models.hooks import Hook
from persona_lora.models.structure import decoder_layers
from persona_lora.steering.placement import check_base_model, find_layers
from persona_lora.steering.rows import Coefficients, RowCoefficients
from persona_lora.steering.steerer import Steerer

POSITIONS: tuple[Positions, ...] = ("response", "prompt", "all")


class _BlockSteerer(Steerer):
    """Context manager: adds a change to the output of decoder blocks at the chosen positions."""

    def __init__(
        self,
        model: nn.Module,
        vector: SteeringVector | Sequence[SteeringVector],
        layers: int | Iterable[int] | None,
        positions: Positions,
        allow_other_base: bool,
    ) -> None:
        if positions not in POSITIONS:
            raise UserError(f"positions must be one of {', '.join(POSITIONS)}, got {positions!r}")
        vectors = several(vector)
        check_vectors(vectors)
        if not vectors:
            raise UserError("activation steering needs at least one steering vector")
        super().__init__(model, every=True)
        self.model = model
        if layers is not None:
            at = whole_numbers(layers, "layers")
            vectors = [each.at(at) for each in vectors]
        self.vectors = vectors
        self.positions = positions
        self._blocks = {
            layer: block
            for vector in self.vectors
            for layer, block in find_layers(model, vector).items()
        }
        check_base_model(model, self.vectors, allow_other_base=allow_other_base)
        self._response: Tensor | None = None  # [batch or 1, seq], for whole texts
        self._passes = PassCounter()
        self._stage: Stage | None = None  # of the pass that runs; None until somebody asks

    def hooks(self) -> list[Hook]:
        """Return a hook on every steered block, and one that counts passes."""
        count = Hook(decoder_layers(self.model)[0], self._begin, "block 0", before=True)
        # First in line: transformers leaves hooks of its own on blocks to capture their outputs,
        # and they are to see the steered ones.
        return [count] + [
            Hook(block, partial(self._steered, layer), f"block {layer}", first=True)
            for layer, block in self._blocks.items()
        ]

    def select_positions(self, response: Tensor | None) -> None:
        """Take a mask ``[batch or 1, seq]`` of the response in whole texts; None: generation.

        None also says that the next pass is over a prompt, or over the rest of one.
        """
        self._response = response
        if response is None:
            self._passes.expect_prompt()

    def select_rows(self, rows: Sequence[int]) -> None:
        """Say which rows the next batch consists of, and that it begins with its prompts."""
        self._passes.expect_prompt()

    @abstractmethod
    def change(self, layer: int, hidden: Tensor) -> Tensor:
        """Return what to add to hidden states ``[batch, positions, hidden]``, in fp32."""

    def chosen(self, hidden: Tensor) -> int | Tensor | None:
        """Return which positions to steer: from one on, by a mask ``[·, seq, 1]``, or none."""
        length = hidden.shape[1]
        if self._response is not None:
            if self._response.shape[-1] != length:
                raise UserError(
                    f"the response mask covers {self._response.shape[-1]} positions, the batch has "
                    f"{length}; call select_positions for each batch, or with None"
                )
            mask = self._response.to(hidden.device, torch.bool)[..., None]
            return {"response": mask, "prompt": ~mask, "all": torch.ones_like(mask)}[self.positions]
        if self.positions == "all":
            return 0
        if self._stage is None:
            self._stage = self._passes.end(length)
        if self.positions == "response":  # a single token is the last of its prompt, or a step
            return length - 1 if self._stage == "prompt" else 0
        if self._stage == "either":
            raise UserError(
                "the text in the cache was begun before this block, and whether its next token is "
                'prompt or answer cannot be told; run the prompt inside the block, or steer "all"'
            )
        return 0 if self._stage == "prompt" else None

    def _begin(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        """Note, before the first block runs, what the pass builds on."""
        self._stage = None
        self._passes.begin(arguments, keywords)

    def _steered(self, layer: int, module: nn.Module, arguments: object, output: Any) -> Any:
        """Return the output of a block with the change added: what its hook does."""
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        where = self.chosen(hidden)
        if where is None:
            return output
        chosen = hidden if isinstance(where, Tensor) else hidden[:, where:]
        delta = self.change(layer, chosen).to(hidden.dtype)
        if isinstance(where, Tensor):
            hidden = hidden + delta * where
        elif torch.is_grad_enabled():
            hidden = torch.cat([hidden[:, :where], chosen + delta], dim=1)
        else:  # in place: the output is fresh from the block and belongs to nobody else yet
            chosen += delta
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class ActivationSteerer(_BlockSteerer):
    """Context manager: adds steering vectors to hidden states, with coefficients per row.

    ``coefficient`` is one number for all vectors, one for each vector, or ``[rows, K]``: a vector
    of coefficients over the K vectors for every row that will be generated, and ``select_rows``
    then names the rows of each batch (pass it as ``prepare_batch`` to ``generate_answers``). Each
    vector acts at its own layers, or at ``layers``. A row of zeros gives the bits of the
    unsteered model.

    Raises:
        UserError: A vector of a model of another shape or (unless ``allow_other_base``) of other
            weights, or layers that a vector has not.
    """

    def __init__(
        self,
        model: nn.Module,
        vector: SteeringVector | Sequence[SteeringVector],
        coefficient: Coefficients = 1.0,
        layers: int | Iterable[int] | None = None,
        positions: Positions = "response",
        *,
        allow_other_base: bool = False,
    ) -> None:
        super().__init__(model, vector, layers, positions, allow_other_base)
        number = len(self.vectors)
        self._rows = RowCoefficients(coefficient, number)
        self._terms: dict[int, list[int]] = defaultdict(list)
        for index, each in enumerate(self.vectors):
            for layer in each.layers:
                self._terms[layer].append(index)
        self._deltas: dict[int, Tensor] = {}

    def rows_apart(self) -> int:
        """Return how many rows of coefficients there are."""
        return len(self._rows.all)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Say which rows of the coefficients the next batch consists of, in its order."""
        super().select_rows(rows)
        self._rows.choose(rows)
        self._deltas.clear()

    def keep_rows(self, places: Sequence[int]) -> None:
        """Go on with some rows of the batch, by their places in it."""
        self._rows.keep(places)
        self._deltas.clear()

    def change(self, layer: int, hidden: Tensor) -> Tensor:
        """Return Σₖ cₖ·vₖ at a layer, ``[batch or 1, 1, hidden]`` in fp32."""
        coefficients = self._rows.of_batch(hidden.shape[0])
        if layer not in self._deltas:
            terms = self._terms[layer]
            directions = torch.stack([self.vectors[k].directions[layer].float() for k in terms])
            delta = coefficients[:, terms] @ directions  # [batch or 1, hidden]
            self._deltas[layer] = delta[:, None].to(hidden.device)
        return self._deltas[layer]


class ConditionalSteerer(ActivationSteerer):
    """Context manager: adds steering vectors to those states alone that are like a condition.

    Like ``ActivationSteerer``, where the cosine of a state with ``condition`` at its layer is over
    ``threshold``. Every position decides for itself, before anything is added at its layer.

    Source:
        Conditional activation steering (CAST; Lee et al. 2025, arXiv:2409.05907), which decides
        once, on the prompt.

    Raises:
        UserError: Also for a condition without one of the layers, or of length 0, and a threshold
            that is no cosine.
    """

    def __init__(
        self,
        model: nn.Module,
        vector: SteeringVector | Sequence[SteeringVector],
        coefficient: Coefficients,
        condition: SteeringVector,
        *,
        threshold: float = 0.0,
        layers: int | Iterable[int] | None = None,
        positions: Positions = "response",
        allow_other_base: bool = False,
    ) -> None:
        super().__init__(
            model, vector, coefficient, layers, positions, allow_other_base=allow_other_base
        )
        check_threshold(threshold)
        check_base_model(model, [condition], allow_other_base=allow_other_base)
        own = condition.at(sorted(self._blocks))
        find_layers(model, own)
        self._units = {layer: _unit(each, layer) for layer, each in own.directions.items()}
        self.threshold = threshold

    def change(self, layer: int, hidden: Tensor) -> Tensor:
        """Return Σₖ cₖ·vₖ where the state is like the condition, 0 elsewhere, in fp32."""
        states = hidden.float()
        alike = states @ self._units[layer].to(states.device) > self.threshold * states.norm(dim=-1)
        return super().change(layer, hidden) * alike[..., None]


class BoundedSteerer(_BlockSteerer):
    """Context manager: holds the coordinate of states along a vector's direction within bounds.

    ``floor`` and ``ceiling`` are coordinates h·v̂, in units of hidden states, as projections are;
    None is no bound. States within them keep their bits.

    Source:
        Activation capping along the assistant axis (Lu et al. 2026, arXiv:2601.10387).

    Raises:
        UserError: Several vectors, no bound, a floor above the ceiling, or a vector of length 0.
    """

    def __init__(
        self,
        model: nn.Module,
        vector: SteeringVector | Sequence[SteeringVector],
        floor: float | None,
        ceiling: float | None,
        *,
        layers: int | Iterable[int] | None = None,
        positions: Positions = "response",
        allow_other_base: bool = False,
    ) -> None:
        super().__init__(model, vector, layers, positions, allow_other_base)
        self.low, self.high = limits_of(self.vectors, floor, ceiling)
        directions = self.vectors[0].directions
        self._units = {layer: _unit(each, layer) for layer, each in directions.items()}

    def change(self, layer: int, hidden: Tensor) -> Tensor:
        """Return what moves states into the bounds along the direction, in fp32."""
        unit = self._units[layer].to(hidden.device)
        along = hidden.float() @ unit
        return (along.clamp(self.low, self.high) - along)[..., None] * unit


class DirectionAblation(_BlockSteerer):
    """Context manager: projects directions out of hidden states at their layers.

    With several vectors at a layer their whole span goes. Applied at all positions unless told
    otherwise.

    Source:
        The operation of concept-ablation finetuning (CAFT), arXiv:2507.16795.
    """

    def __init__(
        self,
        model: nn.Module,
        vector: SteeringVector | Sequence[SteeringVector],
        layers: int | Iterable[int] | None = None,
        positions: Positions = "all",
        *,
        allow_other_base: bool = False,
    ) -> None:
        super().__init__(model, vector, layers, positions, allow_other_base)
        self._bases = {
            layer: _orthonormal(
                [each.directions[layer] for each in self.vectors if layer in each.layers]
            )
            for layer in self._blocks
        }

    def change(self, layer: int, hidden: Tensor) -> Tensor:
        """Return −Q Qᵀ h at a layer, in fp32; Q is ``[hidden, rank]``."""
        basis = self._bases[layer].to(hidden.device)
        return -(hidden.float() @ basis) @ basis.T


def check_threshold(threshold: float) -> None:
    """UserError for what is no cosine that a state could be over."""
    if not -1 <= threshold < 1:
        raise UserError(f"--threshold is a cosine from -1 to under 1, got {threshold:g}")


def limits_of(
    vectors: Collection[SteeringVector], floor: float | None, ceiling: float | None
) -> tuple[float, float]:
    """Return between what states are held; UserError for several vectors, and for no range."""
    if len(vectors) > 1:
        raise UserError("states are held along one vector; give a single --vector")
    low, high = (-math.inf if floor is None else floor, math.inf if ceiling is None else ceiling)
    if not low <= high or (floor is None and ceiling is None):
        raise UserError(
            f"--floor {floor} and --ceiling {ceiling} hold nothing; give one of them, or a "
            "floor under the ceiling"
        )
    return low, high


def _unit(direction: Tensor, layer: int) -> Tensor:
    """Return a direction of length 1 in fp32; UserError where it has none."""
    length = float(direction.norm())
    if not length > 0:
        raise UserError(f"the vector has length 0 at layer {layer}; it has no direction")
    return direction.float() / length


def _orthonormal(directions: Sequence[Tensor]) -> Tensor:
    """Return an orthonormal basis ``[hidden, rank]`` of the span of the directions."""
    stacked = torch.stack([each.double() for each in directions], dim=1)
    left, values, _ = torch.linalg.svd(stacked, full_matrices=False)
    rank = int((values > values.max() * 1e-9).sum()) if float(values.max()) > 0 else 0
    if rank == 0:
        raise UserError("a steering vector of length 0 has no direction to project out")
    return left[:, :rank].float()
