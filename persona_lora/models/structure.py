"""The one place for module names and layer numbers.

A canonical module name is that of the unwrapped model (``model.layers.0.self_attn.q_proj``), and
``layer`` always means the decoder block 0 … num_layers−1.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import layer_number

PEFT_WRAPPING = ("base_model.model.", ".base_layer")
FINGERPRINT_SAMPLES = 256


def canonical_name(name: str) -> str:
    """Return a module name without the parts that PEFT and ``torch.compile`` put into it."""
    name = name.removeprefix("_orig_mod.").removeprefix(PEFT_WRAPPING[0])
    return name.removesuffix(PEFT_WRAPPING[1])


def read_layers(text: str, num_layers: int, name: str) -> tuple[int, ...]:
    """Read decoder layers such as "16", "10 20", "0-29" or "0-29:3", each once, in this order.

    UserError, naming ``name``, for any other text and for layers that the model has not.
    """
    layers: list[int] = []
    for word in text.replace(",", " ").split():
        found = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", word)
        if found is None or found[3] == "0":
            raise UserError(f'{name} must be like "16", "10 20", "0-29" or "0-29:3", got {text!r}')
        first = int(found[1])
        layers += range(first, int(found[2] or first) + 1, int(found[3] or 1))
    outside = [layer for layer in layers if layer >= num_layers]
    if outside or not layers:
        raise UserError(f"{name} {text!r} is out of range; the model has layers 0–{num_layers - 1}")
    return tuple(dict.fromkeys(layers))


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear modules of a model by canonical name, LoRA factors left out.

    Linear means: a module with a ``weight`` and ``in_features``, quantised ones included.
    """
    return {
        canonical_name(name): module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "in_features", None), int)
        and isinstance(getattr(module, "weight", None), Tensor)
        and not _is_wrapper(module)
        and ".lora_" not in name
    }


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of a linear module, as it is stored; UserError where it is no tensor."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise UserError(f"a {type(module).__name__} holds no weight tensor")
    return weight.data


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base_layer", None), nn.Module)


def num_layers(model: nn.Module) -> int:
    """Return the number of decoder layers, counted from the names of the linear modules."""
    numbers = {layer_number(name) for name in linear_modules(model)} - {None}
    if not numbers:
        raise UserError(f"no decoder layers found in a {type(model).__name__}")
    return len(numbers)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder blocks in order; block k gives ``hidden_states[k + 1]``."""
    blocks: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        number = layer_number(f"{name}.")
        if number is not None and name.endswith(f".{number}"):
            blocks.setdefault(number, module)
    if not blocks:
        raise UserError(f"no decoder layers found in a {type(model).__name__}")
    return [blocks[number] for number in sorted(blocks)]


def hidden_states_index(layer: int) -> int:
    """Return where the output of a decoder block stands in ``hidden_states``: 0 is embeddings."""
    return layer + 1


def hidden_size(model: nn.Module) -> int:
    """Return the width of the hidden states: what the first linear module of a block reads."""
    for name, module in linear_modules(model).items():
        if layer_number(name) is not None:
            width: Any = module.in_features
            return int(width)
    raise UserError(f"no decoder layers found in a {type(model).__name__}")


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Return, for each linear module with a shared weight, the names of the other holders."""
    holders: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and not _is_wrapper(module):
            holders[id(weight)].append(canonical_name(name))
    linear = linear_modules(model)
    return {
        name: [other for other in names if other != name]
        for names in holders.values()
        if len(names) > 1
        for name in names
        if name in linear
    }


@torch.no_grad()
def weight_fingerprint(model: nn.Module) -> str:
    """Return a digest that tells models of different weights apart, in milliseconds.

    It covers the name, the shape and evenly spaced entries of every linear weight inside the
    decoder layers, rounded to bf16: the same weights held in fp32, fp16 or bf16 agree when they
    were saved in bf16, as published models are. A finetune changes it.
    """
    digest = hashlib.sha256()
    samples = []
    for name, module in sorted(linear_modules(model).items()):
        if layer_number(name) is None:
            continue
        weight = weight_of(module)
        digest.update(f"{name}:{module.in_features}:{module.out_features};".encode())
        if weight.device.type != "meta":
            samples.append(_sample(weight))
    if samples:
        values = torch.cat(samples).cpu()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _sample(weight: Tensor) -> Tensor:
    flat = weight.reshape(-1)
    step = max(1, flat.numel() // FINGERPRINT_SAMPLES)
    return flat[::step].to(torch.bfloat16)


# Modules of one block that read the same input, by the last part of their names.
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def input_groups(modules: Iterable[str]) -> list[tuple[str, ...]]:
    """Group canonical module names by shared input: q, k, v and gate, up; others stand alone."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module in modules:
        parent, _, last = module.rpartition(".")
        kind = next((group[0] for group in SHARED_INPUTS if last in group), last)
        groups[parent, kind].append(module)
    return [tuple(members) for members in groups.values()]
