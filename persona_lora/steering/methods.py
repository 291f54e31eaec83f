"""The ways of putting diffs and steering vectors into a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.loading import ChatModel
from persona_lora.steering.activations import ActivationSteerer, DirectionAblation, Positions
from persona_lora.steering.live import LiveLoRA
from persona_lora.steering.steerer import Steerer
from persona_lora.steering.weights import LoRASteerer

SteeringMethod = Callable[[ChatModel, Mapping[LoRADiff, float]], Steerer]


def steer_live(chat_model: ChatModel, terms: Mapping[LoRADiff, float]) -> Steerer:
    """Hold Σ cᵢ·diffᵢ beside the weights, the same for every row."""
    return LiveLoRA(
        chat_model.model,
        list(terms),
        [list(terms.values())],
        allow_other_base=chat_model.allow_other_base,
    )


def steer_merged(chat_model: ChatModel, terms: Mapping[LoRADiff, float]) -> Steerer:
    """Merge Σ cᵢ·diffᵢ into the weights, and restore them bit for bit."""
    return LoRASteerer(chat_model.model, terms, allow_other_base=chat_model.allow_other_base)


METHODS: dict[str, SteeringMethod] = {"live": steer_live, "merged": steer_merged}


@dataclass(frozen=True, eq=False)
class ActivationSetting:
    """Steering vectors with their coefficients, and where they act.

    ``layers`` None means every layer that a vector has. With ``ablate`` the directions are
    projected out instead, and the coefficients play no part.
    """

    vectors: Mapping[SteeringVector, float]
    layers: tuple[int, ...] | None = None
    positions: Positions = "response"
    ablate: bool = False

    def steerer(self, chat_model: ChatModel) -> Steerer:
        """Return the context manager that steers the model so."""
        if not self.vectors:
            raise UserError("activation steering needs at least one steering vector")
        vectors, coefficients = list(self.vectors), list(self.vectors.values())
        model, allowed = chat_model.model, chat_model.allow_other_base
        if self.ablate:
            return DirectionAblation(
                model, vectors, self.layers, self.positions, allow_other_base=allowed
            )
        return ActivationSteerer(
            model,
            vectors,
            coefficients,
            self.layers,
            self.positions,
            allow_other_base=allowed,
        )
