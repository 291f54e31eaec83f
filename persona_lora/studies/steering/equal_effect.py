"""The trait directions of a search, and the coefficients at which each does the same to the model.

A LoRA difference and a steering vector of the same trait have nothing in common but their name,
and two diffs differ in length. A search whose σ shall mean the same along each of them needs a
common scale: the coefficient at which the model's answers diverge by ``EQUAL_EFFECT`` nats a token
on ordinary prompts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from persona_lora.core import progress
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.loading import ChatModel
from persona_lora.steering.activations import ActivationSteerer, Positions
from persona_lora.steering.live import LiveLoRA
from persona_lora.steering.steerer import Steerer
from persona_lora.studies.steering.divergence import ordinary_texts, row_divergences

logger = logging.getLogger(__name__)

EQUAL_EFFECT = 0.03  # nats a token
ROUNDS = 4
CLOSE_ENOUGH = 0.05


class Directions(Protocol):
    """K directions by trait, and a steerer whose rows are mixes of them."""

    @property
    def traits(self) -> tuple[str, ...]:
        """The traits, sorted: the order of every row of coefficients."""
        ...

    def made(self) -> Sequence[LoRADiff | SteeringVector]:
        """Return the directions themselves."""
        ...

    def steerer(self, chat_model: ChatModel, rows: Sequence[Sequence[float]]) -> Steerer:
        """Return a steerer whose row i is the mix ``rows[i]``, ``[K]``."""
        ...

    def record(self) -> dict[str, Any]:
        """Return what a run's configuration keeps of the directions."""
        ...

    def inputs(self) -> dict[str, str]:
        """Return digests of the directions."""
        ...


@dataclass(frozen=True, eq=False)
class DiffDirections:
    """LoRA differences, held live; ``energy`` is the share of ‖·‖² that they were cut to."""

    diffs: Mapping[str, LoRADiff]
    energy: float | None = None

    def __post_init__(self) -> None:
        _check_any(self.diffs)

    @property
    def traits(self) -> tuple[str, ...]:
        return tuple(sorted(self.diffs))

    def made(self) -> Sequence[LoRADiff | SteeringVector]:
        return [*self.diffs.values()]

    def steerer(self, chat_model: ChatModel, rows: Sequence[Sequence[float]]) -> Steerer:
        diffs = [self.diffs[trait] for trait in self.traits]
        return LiveLoRA(chat_model.model, diffs, rows, allow_other_base=chat_model.allow_other_base)

    def record(self) -> dict[str, Any]:
        cut = {} if self.energy is None else {"energy": self.energy}
        return {"kind": "lora", "norms": dict(self._norms), **cut}

    def inputs(self) -> dict[str, str]:
        return {f"the diff of {trait}": self.diffs[trait].content() for trait in self.traits}

    @cached_property
    def _norms(self) -> dict[str, float]:
        return {trait: self.diffs[trait].norm() for trait in self.traits}


@dataclass(frozen=True, eq=False)
class VectorDirections:
    """Steering vectors, each added at all of ``layers``."""

    vectors: Mapping[str, SteeringVector]
    layers: tuple[int, ...]
    positions: Positions = "response"

    def __post_init__(self) -> None:
        _check_any(self.vectors)
        if not self.layers:
            raise UserError("activation steering needs at least one layer")
        for vector in self.vectors.values():
            vector.at(self.layers)  # raises where it lacks one

    @property
    def traits(self) -> tuple[str, ...]:
        return tuple(sorted(self.vectors))

    def made(self) -> Sequence[LoRADiff | SteeringVector]:
        return [*self.vectors.values()]

    def steerer(self, chat_model: ChatModel, rows: Sequence[Sequence[float]]) -> Steerer:
        return ActivationSteerer(
            chat_model.model,
            [self.vectors[trait].at(self.layers) for trait in self.traits],
            [list(row) for row in rows],
            positions=self.positions,
            allow_other_base=chat_model.allow_other_base,
        )

    def record(self) -> dict[str, Any]:
        methods = {trait: self.vectors[trait].method for trait in self.traits}
        return {
            "kind": "vectors",
            "methods": methods,
            "norms": {
                trait: list(self.vectors[trait].at(self.layers).norms().values())
                for trait in self.traits
            },
            "layers": list(self.layers),
            "positions": self.positions,
        }

    def inputs(self) -> dict[str, str]:
        return {f"the vector of {trait}": self.vectors[trait].content() for trait in self.traits}


def _check_any(directions: Mapping[str, object]) -> None:
    if not directions:
        raise UserError("a search needs at least one direction")


@dataclass(frozen=True)
class Scale:
    """The coefficient of one direction at which its effect is ``kl`` nats a token (mean of ±)."""

    trait: str
    coefficient: float
    kl: float


def equal_effect_scales(
    chat_model: ChatModel,
    directions: Directions,
    prompts: Sequence[str],
    *,
    effect: float = EQUAL_EFFECT,
) -> list[Scale]:
    """Return for every direction the coefficient at which its effect is ``effect`` nats a token.

    The effect is the mean over +c and −c of the mean KL(p₀ ‖ p_c) over the tokens of the model's
    own answers to ``prompts``. KL grows about as c², so that c ← c·√(effect / KL) converges in a
    few rounds; all directions run in the same batches. UserError for a direction without effect.
    """
    traits = directions.traits
    texts = ordinary_texts(chat_model, prompts)
    scales = [Scale(trait, 1.0, math.nan) for trait in traits]
    for done in range(ROUNDS):
        rows = [[0.0] * len(traits)]
        for index, scale in enumerate(scales):
            for sign in (1.0, -1.0):
                rows.append([0.0] * len(traits))
                rows[-1][index] = sign * scale.coefficient
        steerer = directions.steerer(chat_model, rows)
        means = row_divergences(chat_model, steerer, texts, num_rows=len(rows)).mean(dim=1)
        effects = means.view(len(traits), 2).mean(dim=1).tolist()
        scales = [
            Scale(scale.trait, scale.coefficient, kl)
            for scale, kl in zip(scales, effects, strict=True)
        ]
        progress.report(done + 1, ROUNDS)
        if done + 1 == ROUNDS or all(abs(each.kl / effect - 1) < CLOSE_ENOUGH for each in scales):
            break
        scales = [_nearer(scale, effect) for scale in scales]
    for scale in scales:
        logger.info("%s: %.4g nats at coefficient %.3g", scale.trait, scale.kl, scale.coefficient)
    return scales


def _nearer(scale: Scale, effect: float) -> Scale:
    if not (math.isfinite(scale.kl) and scale.kl > 0):
        raise UserError(
            f"the direction of {scale.trait} has an effect of {scale.kl} nats at coefficient "
            f"{scale.coefficient:g}: it does nothing to this model; leave it out"
        )
    factor = math.sqrt(effect / scale.kl)
    return Scale(scale.trait, scale.coefficient * min(max(factor, 0.05), 20.0), scale.kl)
