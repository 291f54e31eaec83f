"""One bank of directions: named diffs and vectors, and rows of coefficients that become a steerer.

Knows how directions share batches; refuses to know what a study asks of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from persona_lora.core.errors import UserError, nearest_names
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.loading import ChatModel
from persona_lora.steering.activations import (
    ActivationSteerer,
    BoundedSteerer,
    ConditionalSteerer,
    DirectionAblation,
    Positions,
    check_threshold,
    limits_of,
)
from persona_lora.steering.live import LiveLoRA
from persona_lora.steering.steerer import Parted, Steerer, Together
from persona_lora.steering.weights import LoRASteerer

logger = logging.getLogger(__name__)

ENGINE = "engine"  # what runs record of who answers, where it is not the model in their process
RENDERING = ("chat_template_args", "system_messages")  # what runs record of their template
NO_ENGINE = (
    "an engine holds diffs live and adds no vectors; leave --engine out, or steer with diffs in "
    "--mode live, by the method lora, or with prompts"
)
Coefficients = Mapping[str, float]  # by the names of directions; one that is missing is 0


class Elsewhere(Protocol):
    """What answers rows in place of the model in this process, steered by diffs."""

    def steerer(self, rows: Sequence[Mapping[LoRADiff, float]]) -> Steerer:
        """Return what answers rows of these mixes; one serves all of them."""
        ...


@dataclass(frozen=True, eq=False)
class Bank:
    """Directions by name: diffs are held live, vectors are added at their layers.

    ``record`` is what a run's configuration keeps of them, ``inputs`` are digests of what they
    were made from. ``elsewhere`` is who answers, where it is not the model in this process, which
    still answers the rows of what is named in ``here``.
    """

    diffs: Mapping[str, LoRADiff] = field(default_factory=dict)
    vectors: Mapping[str, SteeringVector] = field(default_factory=dict)
    positions: Positions = "response"
    record: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Elsewhere | None = None
    here: Collection[str] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all directions."""
        return (*self.diffs, *self.vectors)

    @property
    def directions(self) -> Sequence[LoRADiff | SteeringVector]:
        """The directions themselves."""
        return [*self.diffs.values(), *self.vectors.values()]

    def answering(self, chat_model: ChatModel, rows: Sequence[Coefficients]) -> Steerer:
        """Return a steerer to answer rows inside of: ``steerer``, or that of who answers instead.

        UserError for a row with a direction that is not here, and for vectors elsewhere.
        """
        if self.elsewhere is None:
            return self.steerer(chat_model, rows)
        self._check_names(rows)
        if not set(self.vectors) <= set(self.here):
            raise UserError(NO_ENGINE)
        own = {at for at, row in enumerate(rows) if any(map(row.get, self.here))}
        far = self.elsewhere.steerer(
            [
                {self.diffs[name]: value for name, value in row.items() if name not in self.here}
                for row in rows
            ]
        )
        return Parted(self.steerer(chat_model, rows), far, own) if own else far

    def steerer(self, chat_model: ChatModel, rows: Sequence[Coefficients]) -> Steerer:
        """Return a steerer whose row i is Σ ``rows[i][name]`` · direction; {} is unsteered.

        UserError for a row with a direction that is not here.
        """
        self._check_names(rows)
        model, anyway = chat_model.model, chat_model.allow_other_base
        parts: list[Steerer] = []
        if self.diffs:
            diffs, coefficients = [*self.diffs.values()], _matrix(rows, self.diffs)
            parts.append(LiveLoRA(model, diffs, coefficients, allow_other_base=anyway))
        if self.vectors:
            parts.append(
                ActivationSteerer(
                    model,
                    [*self.vectors.values()],
                    _matrix(rows, self.vectors),
                    positions=self.positions,
                    allow_other_base=anyway,
                )
            )
        return parts[0] if len(parts) == 1 else Together(parts)

    def _check_names(self, rows: Sequence[Coefficients]) -> None:
        unknown = sorted({name for row in rows for name in row} - set(self.names))
        if unknown:
            nearest = nearest_names(unknown[0], self.names)
            raise UserError(f"no direction {unknown[0]!r} to steer with; {nearest}")


def _matrix(rows: Sequence[Coefficients], names: Collection[str]) -> list[list[float]]:
    return [[row.get(name, 0.0) for name in names] for row in rows]


def bank_of_diffs(
    diffs: Mapping[str, LoRADiff], *, cut: Mapping[str, Any] = MappingProxyType({})
) -> Bank:
    """Return a bank of one diff per trait; ``cut`` is what runs record of how ranks were cut."""
    _check_any(diffs)
    diffs = dict(sorted(diffs.items()))
    norms = {trait: diff.norm() for trait, diff in diffs.items()}
    return Bank(
        diffs=diffs,
        record={"kind": "lora", "norms": norms, **cut},
        inputs={f"the diff of {trait}": diff.content() for trait, diff in diffs.items()},
    )


def bank_of_vectors(vectors: Mapping[str, SteeringVector], layers: Sequence[int]) -> Bank:
    """Return a bank of one vector per trait, added to the response at all of ``layers``."""
    _check_any(vectors)
    check_layers(layers)
    vectors = dict(sorted(vectors.items()))
    used = {trait: vector.at(layers) for trait, vector in vectors.items()}
    return Bank(
        vectors=used,
        record={
            "kind": "vectors",
            "methods": {trait: vector.method for trait, vector in vectors.items()},
            "norms": {trait: list(each.norms().values()) for trait, each in used.items()},
            "layers": list(layers),
            "positions": "response",
        },
        inputs={f"the vector of {trait}": vector.content() for trait, vector in vectors.items()},
    )


def check_layers(layers: Collection[int]) -> None:
    """Raise UserError where vectors would be added at no layer."""
    if not layers:
        raise UserError("activation steering needs at least one layer")


def _check_any(directions: Collection[str]) -> None:
    if not directions:
        raise UserError("a search needs at least one direction")


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
    projected out instead, and with ``floor`` or ``ceiling`` states are held there along the
    vector: the coefficients play no part. With ``condition`` vectors are added to states whose
    cosine with it is over ``threshold``.
    """

    vectors: Mapping[SteeringVector, float]
    layers: tuple[int, ...] | None = None
    positions: Positions = "response"
    ablate: bool = False
    floor: float | None = None
    ceiling: float | None = None
    condition: SteeringVector | None = None
    threshold: float = 0.0

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if self.bounded:
            limits_of(self.vectors, self.floor, self.ceiling)

    @property
    def bounded(self) -> bool:
        """Whether states are held along the vector."""
        return self.floor is not None or self.ceiling is not None

    def steerer(self, chat_model: ChatModel) -> Steerer:
        """Return the context manager that steers the model so."""
        vectors, coefficients = list(self.vectors), list(self.vectors.values())
        model, allowed = chat_model.model, chat_model.allow_other_base
        where: Any = {"layers": self.layers, "positions": self.positions}
        where["allow_other_base"] = allowed
        if self.ablate:
            return DirectionAblation(model, vectors, **where)
        if self.bounded:
            return BoundedSteerer(model, vectors, self.floor, self.ceiling, **where)
        if self.condition is not None:
            return ConditionalSteerer(
                *(model, vectors, coefficients, self.condition), threshold=self.threshold, **where
            )
        return ActivationSteerer(model, vectors, coefficients, **where)


def warn_of_other_template(
    chat_model: ChatModel, directions: Iterable[LoRADiff | SteeringVector]
) -> None:
    """Log a warning for each direction that was made with other arguments of the chat template.

    A direction of elsewhere, which says nothing of its template, passes.
    """
    now = _rendering(chat_model.record())
    for each in directions:
        made = each.sources.get("training", each.sources.get("model"))
        if isinstance(made, Mapping) and _rendering(made) != now:
            logger.warning(
                "the direction of %s was made with %s, and the model is asked with %s: see "
                "--chat-template-args",
                each.trait or "a trait",
                _rendering(made) or "the chat template as it is",
                now or "the chat template as it is",
            )


def _rendering(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in RENDERING if name in record}
