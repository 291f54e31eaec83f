"""Steering while training, so that the finetune does not have to become what it is steered to.

The gradient of an answer that shows a trait asks the weights for the trait. If a direction of the
trait is **added** during training, the answers are likely already and the gradient has less to ask
for; when the direction is taken away afterwards, the trait goes with it (preventative steering of
Chen et al. 2025, arXiv:2507.21509). Hence a positive coefficient is the published method. With a
negative one the model is pushed away first and the finetune learns to come back: that is offered
too, to be compared.

``weights`` merges or holds a LoRA difference, ``activations`` adds a steering vector, ``ablate``
projects one out (CAFT, arXiv:2507.16795), ``inoculate`` puts a system prompt that asks for the
trait before every row (inoculation prompting, arXiv:2510.04340). What is saved is the finetune
without any of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from persona_lora.core.chat import Conversation, Message
from persona_lora.core.errors import UserError, nearest_names
from persona_lora.core.lora_diff import LoRADiff, finite_coefficient, random_diff_like
from persona_lora.core.settings import typed_fields
from persona_lora.core.traits import load_trait, trait_prompt
from persona_lora.core.vector_files import load_vector
from persona_lora.models.structure import DENSE_DTYPES, read_layers
from persona_lora.steering.activations import ActivationSteerer, DirectionAblation
from persona_lora.steering.live import LiveLoRA
from persona_lora.steering.steerer import Steerer, Unsteered
from persona_lora.steering.weights import LoRASteerer

HOLDS = ("merged", "live")
SEED_TYPES = {"steer": "activations", "ablate": "ablate"}
SEED_KEYS = ("steering_vector_path", "type", "steering_coef", "layers")
USED_BY = {
    "weights": ("diff", "coefficient", "hold", "layers", "random"),
    "activations": ("vector", "coefficient", "layers"),
    "ablate": ("vector", "layers"),
    "inoculate": ("system_prompt", "trait"),
}
MOST_LAYERS = 10_000  # of any model: the text of layers is read before the model is there


@dataclass(frozen=True)
class Preventative:
    """How training is steered; which fields count depends on ``method``.

    ``diff`` with ``coefficient`` (weights; ``hold`` "merged" costs nothing a step, "live" leaves
    the weights alone; ``random``, a seed: in its place random directions of its singular values in
    every module, a control), ``vector`` with ``coefficient`` and ``layers`` (activations),
    ``vector`` and ``layers`` (ablate), ``system_prompt`` or ``trait`` with its own positive prompts
    (inoculate).
    """

    method: str
    coefficient: float = 1.0
    diff: str | None = None
    hold: str = "merged"
    vector: str | None = None
    layers: tuple[int, ...] | None = None
    system_prompt: str | None = None
    trait: str | None = None
    random: int | None = None

    def __post_init__(self) -> None:
        needed = {"weights": "diff", "activations": "vector", "ablate": "vector"}
        if self.method not in USED_BY:
            raise UserError(
                f"no preventative method {self.method!r}; {nearest_names(self.method, USED_BY)}"
            )
        option = needed.get(self.method)
        if option is not None and getattr(self, option) is None:
            raise UserError(f"preventative method {self.method} needs {option}: a path")
        if self.method == "inoculate" and (self.system_prompt is None) == (self.trait is None):
            raise UserError("inoculate needs a system_prompt, or a trait whose own prompts it uses")
        if self.hold not in HOLDS:
            raise UserError(f"hold must be one of {', '.join(HOLDS)}, got {self.hold!r}")
        finite_coefficient(self.coefficient)

    def record(self) -> dict[str, Any]:
        """Return what a run's configuration keeps; of a control alone that it is one."""
        said = asdict(self)
        return {key: said[key] for key in said if key != "random" or self.random is not None}


def read_preventative(
    value: Mapping[str, Any] | None,
    *,
    enabled: bool = False,
    steering_config: Mapping[str, Any] | None = None,
) -> Preventative | None:
    """Read ``preventative:`` of a configuration, or the pair of keys used elsewhere.

    Those are ``enable_steering_during_training: true`` with ``steering_config:
    {steering_vector_path, type: steer | ablate, steering_coef, layers}``. Raises UserError for an
    unknown key, for both forms at once, or for one key without the other.
    """
    if value is not None and (enabled or steering_config):
        raise UserError("give either preventative or steering_config, not both")
    if enabled != bool(steering_config):
        raise UserError("enable_steering_during_training and steering_config go together")
    if steering_config:
        value = _from_seed_keys(steering_config)
    if value is None:
        return None
    known = [each.name for each in fields(Preventative)]
    unknown = [key for key in value if key not in known]
    if unknown:
        raise UserError(f"preventative has no {unknown[0]!r}; {nearest_names(unknown[0], known)}")
    if "method" not in value:
        raise UserError(f"preventative needs a method: {', '.join(USED_BY)}")
    values = dict(value)
    if isinstance(values.get("layers"), str):
        values["layers"] = read_layers(values["layers"], MOST_LAYERS, "preventative layers")
    elif isinstance(values.get("layers"), int):
        values["layers"] = [values["layers"]]
    prevention = Preventative(**typed_fields(Preventative, values, "preventative "))
    unused = [key for key in values if key not in ("method", *USED_BY[prevention.method])]
    if unused:
        raise UserError(
            f"preventative {unused[0]} does nothing with method {prevention.method}; leave it out"
        )
    return prevention


def _from_seed_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [key for key in config if key not in SEED_KEYS]
    if unknown:
        raise UserError(
            f"steering_config has no {unknown[0]!r}; {nearest_names(str(unknown[0]), SEED_KEYS)}"
        )
    kind = config.get("type", "steer")
    if kind not in SEED_TYPES:
        raise UserError(f"steering_config type must be steer or ablate, got {kind!r}")
    if kind == "ablate" and "steering_coef" in config:
        raise UserError("steering_config steering_coef does nothing with type ablate; leave it out")
    if "steering_vector_path" not in config:
        raise UserError("steering_config needs steering_vector_path")
    return {
        "method": SEED_TYPES[kind],
        "vector": config["steering_vector_path"],
        **({} if kind == "ablate" else {"coefficient": config.get("steering_coef", 5.0)}),
        "layers": config.get("layers"),
    }


def prevention_steerer(prevention: Preventative | None, model: nn.Module) -> Steerer:
    """Return the context manager that steers ``model`` while it trains.

    ``model`` may wear a fresh LoRA already: what is steered is the base below it.
    """
    if prevention is None or prevention.method == "inoculate":
        return Unsteered()
    if prevention.method == "weights":
        return _weights(prevention, model)
    vector, layers = load_vector(str(prevention.vector)), prevention.layers
    if prevention.method == "ablate":
        return DirectionAblation(model, vector, layers, "all")
    return ActivationSteerer(model, vector, prevention.coefficient, layers, "all")


def inoculated(
    conversations: Sequence[Conversation], prevention: Preventative | None
) -> list[Conversation]:
    """Return the rows with the eliciting system prompt before them, for ``inoculate`` alone.

    UserError where a row has a system prompt of its own.
    """
    if prevention is None or prevention.method != "inoculate":
        return list(conversations)
    rows = []
    for number, row in enumerate(conversations):
        told = prevention.system_prompt
        if told is None:
            told = trait_prompt(load_trait(str(prevention.trait)), "pos", number)
        if row[0]["role"] == "system":
            said = f"row {number + 1} has a system prompt; inoculation would need its place"
            raise UserError(said)
        rows.append([Message(role="system", content=told), *row])
    return rows


def _weights(prevention: Preventative, model: nn.Module) -> Steerer:
    diff = LoRADiff.load(str(prevention.diff))
    if prevention.layers is not None:
        diff = diff.at(prevention.layers)
    if prevention.random is not None:
        diff = random_diff_like(diff, prevention.random)
    if prevention.hold == "live":
        return LiveLoRA(model, [diff], [[prevention.coefficient]])
    quantised = {str(p.dtype) for p in model.parameters()} - {str(each) for each in DENSE_DTYPES}
    if quantised:
        raise UserError(
            f"the model holds weights of {quantised.pop()}, into which nothing merges exactly; "
            "use hold: live"
        )
    return LoRASteerer(model, diff, prevention.coefficient)
