"""What a sweep varies: the conditions of one steering method, held together in one steerer.

A population lists its conditions and gives a steerer whose rows are any of them, so that a sweep
(and every later search) answers under all of them in the same batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff, finite_coefficient
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.loading import ChatModel
from persona_lora.steering.activations import ActivationSteerer, Positions
from persona_lora.steering.live import LiveLoRA
from persona_lora.steering.steerer import Steerer, Unsteered
from persona_lora.studies.asking.run import Condition

UNSTEERED = Condition("none")


class Population(Protocol):
    """The conditions of a sweep, and the steerer that holds them row by row."""

    def conditions(self) -> list[Condition]:
        """Return every condition, the unsteered one (or coefficient 0) among them."""
        ...

    def steerer(self, chat_model: ChatModel, rows: Sequence[Condition]) -> Steerer:
        """Return a steerer whose row i is steered as ``rows[i]`` says; others are unsteered."""
        ...

    def record(self) -> dict[str, Any]:
        """Return what a run's configuration keeps of the population."""
        ...

    def inputs(self) -> dict[str, str]:
        """Return digests of what steers."""
        ...

    def directions(self) -> Sequence[LoRADiff | SteeringVector]:
        """Return the directions that were made beforehand."""
        ...


@dataclass(frozen=True, eq=False)
class DiffPopulation:
    """One diff, held live, at many coefficients; 0 is always among them."""

    diff: LoRADiff
    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "coefficients", _values(self.coefficients))

    def conditions(self) -> list[Condition]:
        return [Condition("lora", value) for value in self.coefficients]

    def steerer(self, chat_model: ChatModel, rows: Sequence[Condition]) -> Steerer:
        coefficients = [[row.coefficient or 0.0] for row in rows]
        return LiveLoRA(
            chat_model.model,
            [self.diff],
            coefficients,
            allow_other_base=chat_model.allow_other_base,
        )

    def record(self) -> dict[str, Any]:
        return {"diff_norm": self.diff.norm(), "coefficients": list(self.coefficients)}

    def inputs(self) -> dict[str, str]:
        return {"the diff": self.diff.content()}

    def directions(self) -> Sequence[LoRADiff | SteeringVector]:
        return [self.diff]


@dataclass(frozen=True, eq=False)
class VectorPopulation:
    """A steering vector at many coefficients at each of several layers, one layer a row.

    ``control`` is a second vector (a random one of the same norm) that gets the same layers and
    coefficients under the method "random".
    """

    vector: SteeringVector
    layers: tuple[int, ...]
    coefficients: tuple[float, ...]
    positions: Positions = "response"
    control: SteeringVector | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise UserError("activation steering needs at least one layer")
        object.__setattr__(self, "coefficients", _values(self.coefficients))
        self.vector.at(self.layers)  # raises where it lacks one

    def conditions(self) -> list[Condition]:
        return [
            UNSTEERED,
            *(
                Condition(method, value, layer=layer)
                for method in self.vectors()
                for layer in self.layers
                for value in self.coefficients
                if value
            ),
        ]

    def steerer(self, chat_model: ChatModel, rows: Sequence[Condition]) -> Steerer:
        vectors = self.vectors()
        terms = [(method, layer) for method in vectors for layer in self.layers]
        coefficients = [
            [(row.coefficient or 0.0) if (row.method, row.layer) == term else 0.0 for term in terms]
            for row in rows
        ]
        return ActivationSteerer(
            chat_model.model,
            [vectors[method].at([layer]) for method, layer in terms],
            coefficients,
            positions=self.positions,
            allow_other_base=chat_model.allow_other_base,
        )

    def record(self) -> dict[str, Any]:
        return {
            "method": "activation",
            "vector": {
                "trait": self.vector.trait,
                "method": self.vector.method,
                "position": self.vector.position,
                "norms": {str(at): self.vector.at([at]).norms()[at] for at in self.layers},
            },
            "layers": list(self.layers),
            "coefficients": list(self.coefficients),
            "positions": self.positions,
            "control": None if self.control is None else dict(self.control.sources),
        }

    def inputs(self) -> dict[str, str]:
        control = {} if self.control is None else {"the control": self.control.content()}
        return {"the vector": self.vector.content(), **control}

    def directions(self) -> Sequence[LoRADiff | SteeringVector]:
        return [self.vector]

    def vectors(self) -> Mapping[str, SteeringVector]:
        """Return the vector and its control by the method that their rows carry."""
        vectors = {"activation": self.vector}
        return vectors if self.control is None else {**vectors, "random": self.control}


@dataclass(frozen=True)
class PromptPopulation:
    """Nothing is steered: only the model as it is, to stand beside the prompting references."""

    def conditions(self) -> list[Condition]:
        return [UNSTEERED]

    def steerer(self, chat_model: ChatModel, rows: Sequence[Condition]) -> Steerer:
        return Unsteered()

    def record(self) -> dict[str, Any]:
        return {"method": "prompt"}

    def inputs(self) -> dict[str, str]:
        return {}

    def directions(self) -> Sequence[LoRADiff | SteeringVector]:
        return []


def _values(coefficients: Sequence[float]) -> tuple[float, ...]:
    values = sorted({finite_coefficient(value) + 0.0 for value in coefficients} | {0.0})
    if len(values) < 2:
        raise UserError("a sweep needs at least one coefficient other than 0")
    return tuple(values)
