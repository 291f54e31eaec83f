"""What a sweep varies: the conditions of one steering method, and the bank that holds them all.

So that a sweep (and every later search) answers under all of them in the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from persona_lora.core.chat import UNSTEERED, Condition
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff, finite_coefficient
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.steering.activations import Positions
from persona_lora.steering.bank import Bank, check_layers


@dataclass(frozen=True, eq=False)
class Population:
    """Conditions, the unsteered one (or coefficient 0) among them, and the directions they name.

    ``made`` are the directions that were made beforehand, whole.
    """

    conditions: tuple[Condition, ...]
    bank: Bank = field(default_factory=Bank)
    made: tuple[LoRADiff | SteeringVector, ...] = ()


def diff_population(diff: LoRADiff, coefficients: Sequence[float]) -> Population:
    """Return one diff, held live, at many coefficients; 0 is always among them."""
    values = _values(coefficients)
    bank = Bank(
        diffs={"lora": diff},
        record={"diff_norm": diff.norm(), "coefficients": values},
        inputs={"the diff": diff.content()},
    )
    return Population(tuple(Condition("lora", value) for value in values), bank, (diff,))


def vector_population(
    vector: SteeringVector,
    layers: Sequence[int],
    coefficients: Sequence[float],
    positions: Positions = "response",
    control: SteeringVector | None = None,
) -> Population:
    """Return a steering vector at many coefficients at each of several layers, one layer a row.

    ``control`` is a second vector (a random one of the same norm) that gets the same layers and
    coefficients under the method "random".
    """
    check_layers(layers)
    values = _values(coefficients)
    vectors = {"activation": vector, **({} if control is None else {"random": control})}
    places = [(method, layer) for method in vectors for layer in layers]
    bank = Bank(
        vectors={
            Condition(method, layer=layer).direction: vectors[method].at([layer])
            for method, layer in places
        },
        positions=positions,
        record={
            "method": "activation",
            "vector": {
                "trait": vector.trait,
                "method": vector.method,
                "position": vector.position,
                "norms": {str(at): vector.at([at]).norms()[at] for at in layers},
            },
            "layers": list(layers),
            "coefficients": values,
            "positions": positions,
            "control": None if control is None else dict(control.sources),
        },
        inputs={
            "the vector": vector.content(),
            **({} if control is None else {"the control": control.content()}),
        },
    )
    steered = [
        Condition(method, value, layer) for method, layer in places for value in values if value
    ]
    return Population((UNSTEERED, *steered), bank, (vector,))


def prompt_population() -> Population:
    """Return only the model as it is, to stand beside the prompting references."""
    return Population((UNSTEERED,), Bank(record={"method": "prompt"}))


def _values(coefficients: Sequence[float]) -> list[float]:
    values = sorted({finite_coefficient(value) + 0.0 for value in coefficients} | {0.0})
    if len(values) < 2:
        raise UserError("a sweep needs at least one coefficient other than 0")
    return values
