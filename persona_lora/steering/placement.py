"""Which modules of a model a diff belongs to: found, of the right shape, of the right model.

A diff that silently touches nothing is the commonest bug of weight steering, so every module of a
diff must find its weight, or nothing is touched.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import Tensor, nn

from persona_lora.core.errors import UserError, bare_name
from persona_lora.core.lora_diff import BaseModel, LoRADiff
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.load_options import LoadOptions
from persona_lora.models.loading import shape_of
from persona_lora.models.structure import (
    DENSE_DTYPES,
    decoder_layers,
    features,
    hidden_size,
    linear_modules,
    tied_names,
    weight_fingerprint,
    weight_of,
)
from persona_lora.models.weight_files import model_on_disk
from persona_lora.steering.ledger import LOCK, MERGED

logger = logging.getLogger(__name__)


def base_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of a model's weights as they are without any merged diff.

    A diff that goes on top of another belongs to the model as it was before both.
    """
    with LOCK:
        if len(MERGED):
            for module in linear_modules(model).values():
                merged = MERGED.get(module.weight)
                if merged is not None:
                    return str(merged.fingerprint)
        return weight_fingerprint(model)


def check_base_model(
    model: nn.Module, directions: Iterable[LoRADiff | SteeringVector], *, allow_other_base: bool
) -> None:
    """Raise UserError when a diff or a steering vector was made for a model of other weights."""
    if not allow_other_base:
        check_fingerprint(base_fingerprint(model), directions)


def check_fingerprint(fingerprint: str, directions: Iterable[LoRADiff | SteeringVector]) -> None:
    """Raise UserError for a diff or a steering vector of weights with another fingerprint."""
    for each in directions:
        expected = each.base_model.fingerprint
        if expected is not None and expected != fingerprint:
            kind = "diff" if isinstance(each, LoRADiff) else "steering vector"
            raise UserError(
                f"the {kind} belongs to {each.base_model.name!r} (weights {expected[:8]}…), but "
                f"this model's weights are {fingerprint[:8]}…; load that model, or pass "
                "allow_other_base=True (--allow-other-base) if you mean it"
            )


def check_before_loading(
    name: str,
    options: LoadOptions,
    directions: Iterable[LoRADiff | SteeringVector],
    *,
    allow_other_base: bool = False,
) -> None:
    """Raise UserError for a direction that does not fit a model, before its weights are loaded.

    Its shape is known from its configuration, and which weights it has from those on disk. Where
    these do not tell (quantised ones, a model yet to be fetched) the loaded model does.
    """
    directions = list(directions)
    for each in directions:
        if isinstance(each, SteeringVector):
            check_shape(each, *shape_of(name, options))
    if not allow_other_base:
        warn_of_other_names(name, [each.base_model for each in directions])
    model = model_on_disk(name, options.revision) if directions else None
    if model is None:
        return
    for each in directions:
        if isinstance(each, LoRADiff):
            find_modules(model, each)
    # float16 rounds what is stored in another type before it is known
    if not (allow_other_base or options.quantize or options.dtype == "float16"):
        check_fingerprint(weight_fingerprint(model), directions)


def warn_of_other_names(model: str, bases: Iterable[BaseModel]) -> None:
    """Warn of what knows its base by name alone, as others' adapters do, where that is another."""
    for name in dict.fromkeys(each.name for each in bases if each.fingerprint is None):
        if name and bare_name(name) != bare_name(model):
            logger.warning(
                "an adapter or vector says that it was made on %s, and the model here is %s; with "
                "other weights it means nothing, and only the name can tell: check that they are "
                "the same",
                *(name, model),
            )


def check_shape(vector: SteeringVector, depth: int, width: int) -> None:
    """Raise UserError where a vector is not of a model of so many layers and this width."""
    if (depth, width) != (vector.num_layers, vector.hidden_size):
        raise UserError(
            f"the steering vector is of a model with {vector.num_layers} layers of width "
            f"{vector.hidden_size}; this one has {depth} layers of width {width}"
        )


def find_layers(model: nn.Module, vector: SteeringVector) -> dict[int, nn.Module]:
    """Return the decoder block of the model for every layer of the vector.

    Raises UserError when the model has another number of layers or another width.
    """
    blocks = decoder_layers(model)
    check_shape(vector, len(blocks), hidden_size(model))
    return {layer: blocks[layer] for layer in vector.layers}


def find_modules(model: nn.Module, diff: LoRADiff) -> dict[str, nn.Module]:
    """Return the linear module of the model for every module of the diff.

    Raises UserError when one is missing or has another shape.
    """
    linear = linear_modules(model)
    missing = [name for name in diff.factors if name not in linear]
    if missing:
        shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        raise UserError(
            f"{len(missing)} of the {len(diff.factors)} modules of the diff find no weight in this "
            f"{type(model).__name__} ({shown}); the diff was made for another architecture"
        )
    for name, factors in diff.factors.items():
        shape = features(linear[name])
        if factors.shape != shape:
            raise UserError(
                f"{name} is {list(shape)} in the model and {list(factors.shape)} in the diff; "
                "the diff was made for a model of another size"
            )
    return {name: linear[name] for name in diff.factors}


def check_writable(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Raise UserError for a weight that cannot be rewritten in place and restored exactly."""
    tied = tied_names(model)
    for name, module in modules.items():
        problem = _why_not_writable(module)
        if name in tied:
            problem = (
                f"shares its memory with {', '.join(tied[name])}, which a merge would change too; "
                "train the diff without this module"
            )
        if problem is not None:
            raise UserError(f"{name}.weight {problem}")


def _why_not_writable(module: nn.Module) -> str | None:
    live = "hold the diff live instead (LiveLoRA, --mode live)"
    weight, shape = module.weight, features(module)
    if not isinstance(weight, Tensor):
        return f"is a {type(weight).__name__}, not a tensor; {live}"
    if weight.device.type == "meta":
        return (
            "is offloaded or on the meta device and cannot be written in place; load the model "
            f"onto one device, or {live}"
        )
    if type(weight.data) is not Tensor:
        return f"is a sharded or quantised {type(weight.data).__name__}; {live}"
    if weight.dtype not in DENSE_DTYPES:
        return f"is quantised ({weight.dtype}), and merging would quantise it again; {live}"
    if tuple(weight_of(module).shape) != shape:
        return f"holds {list(weight.shape)} of its {list(shape)} (packed or sharded); {live}"
    return None
