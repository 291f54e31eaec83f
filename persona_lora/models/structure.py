"""The one place for module names and layer numbers.

A canonical module name is that of the unwrapped model (``model.layers.0.self_attn.q_proj``), and
``layer`` always means the block 0 … num_layers−1 of the text decoder; what else a model holds (a
vision tower with ``layers`` of its own) has no layers here. Weights are ``[out, in]`` whatever way
round a module keeps them, and read where they lie, offloaded ones included.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import align_module_device
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from persona_lora.core.errors import UserError

PEFT_WRAPPING = ("base_model.model.", ".base_layer")
FINGERPRINT_SAMPLES = 256
DENSE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # fp8 is quantised


def canonical_name(name: str) -> str:
    """Return a module name without the parts that PEFT and ``torch.compile`` put into it."""
    name = name.removeprefix("_orig_mod.").removeprefix(PEFT_WRAPPING[0])
    return name.removesuffix(PEFT_WRAPPING[1])


def kind_of(module: str) -> str:
    """Return the last part of a module's name: q_proj, down_proj, …"""
    return module.rpartition(".")[2]


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
        last = int(found[2] or first)
        if not first <= last < num_layers:
            layers = []
            break
        layers += range(first, last + 1, int(found[3] or 1))
    if not layers:
        raise UserError(f"{name} {text!r} is out of range; the model has layers 0–{num_layers - 1}")
    return tuple(dict.fromkeys(layers))


def names_in_memory(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Return what weights are called in a model, by their names on disk.

    transformers renames some while it loads (the text part of an image model, a base model without
    its head). A name stays where several stored weights become one (the experts of a block).
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    held = model.state_dict()
    found = {}
    for name in names:
        renamed, converter = rename_source_key(
            name, renamings, converters, model.base_model_prefix, held
        )
        found[name] = renamed if converter is None and renamed in held else name
    return found


# What happens at the window of a longrope model, for messages.
LONGROPE = "where longrope changes the rotations of all rows of a batch"
SCALES = ("factor", "mscale")  # of a longrope table, for short texts and for long ones


def context_window(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a model may read; None where its configuration is silent.

    As many as it has positions for, or as ``longrope_crossing`` says.
    """
    return longrope_crossing(config) or _positions(config)


def _positions(config: PreTrainedConfig) -> int | None:
    text = config.get_text_config(decoder=True)
    window = getattr(text, "max_position_embeddings", None)
    if not isinstance(window, int):
        return None
    given = getattr(text, "rope_parameters", None) or {}
    if given.get("rope_type") == "yarn":  # the window may be that before scaling
        before = given.get("original_max_position_embeddings") or window
        return max(window, int(before * (given.get("factor") or 1)))
    return window


def longrope_crossing(config: PreTrainedConfig) -> int | None:
    """Return up to how many tokens a longrope model turns by one table; None for other models.

    transformers takes the short factors or the long ones for a whole pass, by its largest position:
    one text beyond would change those beside it, and what is cached was turned by the other table.
    None, too, where that never happens within the model's positions.

    Source:
        LongRoPE (Ding et al. 2024, arXiv:2402.13753).
    """
    text, last = config.get_text_config(decoder=True), _positions(config)
    given = getattr(text, "rope_parameters", None) or {}
    tables = [given, *(each for each in given.values() if isinstance(each, dict))]  # by layer type
    key = "original_max_position_embeddings"
    own = getattr(text, key, None)  # stands over that of a table, as it does in transformers
    crossings = [
        own or table[key]
        for table in tables
        if table.get("rope_type", table.get("type")) in ("longrope", "su")
        and any(table.get(f"short_{name}") != table.get(f"long_{name}") for name in SCALES)
    ]
    return min((each for each in crossings if last is None or each < last), default=None)


def embedding_rows(model: PreTrainedModel) -> int:
    """Return how many tokens a model has embeddings of."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.num_embeddings)  # of a distributed model the weight holds a part


def same_kind(model: nn.Module) -> PreTrainedModel:
    """Return the skeleton of a loaded model; UserError for what is no model of transformers."""
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"a {type(model).__name__} is no language model of transformers")
    with torch.device("meta"):
        return type(model)(model.config)


class TextDecoder(NamedTuple):
    """The part of a model that reads tokens and makes hidden states.

    ``module`` is called with ``input_ids``; ``blocks`` are its layers in order, and their names are
    ``blocks_name`` with the number behind it.
    """

    module: nn.Module
    blocks: list[nn.Module]
    blocks_name: str


def check_model(model: Any) -> None:
    """Raise UserError for what is no module of torch, as a ``ChatModel`` is none."""
    if not isinstance(model, nn.Module):
        raise UserError(
            f"a model of torch is expected, got a {type(model).__name__}; of a ChatModel pass its "
            "model (chat.model)"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model below ``torch.compile`` and PEFT."""
    check_model(model)
    inner = dict(model.named_children()).get("_orig_mod", model)
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner


def text_decoder(model: nn.Module) -> TextDecoder:
    """Return the text decoder: the one list of ``num_hidden_layers`` blocks, and what holds it.

    It is looked for where transformers says that the decoder is, so that the layers of a vision or
    audio tower are never taken for it. Raises UserError for a model without one, or with several.
    """
    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        raise UserError(
            f"no decoder layers found in a {type(inner).__name__}; expected a language model of "
            "transformers"
        )
    number = getattr(inner.config.get_text_config(decoder=True), "num_hidden_layers", None)
    names = {id(module): name for name, module in inner.named_modules()}
    found = _stacks(inner.get_decoder(), number)
    if len(found) != 1:
        held = "several stacks" if found else "no stack"
        raise UserError(
            f"a {type(inner).__name__} holds {held} of {number} decoder layers; its structure is "
            "not known here, see docs/models.md"
        )
    holder, blocks = found[0]
    return TextDecoder(holder, list(blocks), names[id(blocks)])


def _stacks(module: nn.Module, number: int | None) -> list[tuple[nn.Module, nn.ModuleList]]:
    """Return the outermost lists of ``number`` modules, each with the module that holds it."""
    here = [
        (module, child)
        for child in module.children()
        if isinstance(child, nn.ModuleList) and len(child) == number
    ]
    return here or [each for child in module.children() for each in _stacks(child, number)]


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear modules of a model by canonical name, LoRA factors left out.

    Linear means: a module with a ``weight`` and ``in_features``, quantised ones included, and the
    transposed ``Conv1D`` of GPT-2.
    """
    return {
        canonical_name(name): module
        for name, module in unwrapped(model).named_modules()
        if (isinstance(getattr(module, "in_features", None), int) or isinstance(module, Conv1D))
        and isinstance(getattr(module, "weight", None), Tensor)
        and not isinstance(getattr(module, "base_layer", None), nn.Module)  # a wrapper
        and ".lora_" not in name
    }


def decoder_linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear modules inside the decoder's blocks, by canonical name."""
    inside = f"{text_decoder(model).blocks_name}."
    return {
        name: module for name, module in linear_modules(model).items() if name.startswith(inside)
    }


@torch.no_grad()
def plain_linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear modules of the decoder that give W·x and no more: no routers that choose.

    A class with a forward of its own is asked by a call; what a router consists of is left out.
    """
    routers = _routers(model)
    return {
        name: module
        for name, module in decoder_linear_modules(model).items()
        if not any(name.startswith(f"{router}.") for router in routers)
        and (
            type(module).forward in (nn.Linear.forward, Conv1D.forward) or _gives_one_tensor(module)
        )
    }


def _routers(model: nn.Module) -> list[str]:
    """Return the names of the modules that transformers takes the logits of routers from."""
    parts = [each for each in unwrapped(model).modules() if isinstance(each, PreTrainedModel)]
    said = [
        getattr(each.can_record_outputs.get("router_logits"), "target_class", None)
        for each in parts
    ]
    kinds = tuple(each for each in said if each is not None)
    return [
        canonical_name(name)
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, kinds)
    ]


def _gives_one_tensor(module: nn.Module) -> bool:
    out, width = features(module)
    weight = weight_of(module)
    device = "cpu" if weight.device.type == "meta" else weight.device
    answer = module(torch.zeros(1, width, device=device, dtype=computed_in(weight)))
    return isinstance(answer, Tensor) and tuple(answer.shape) == (1, out)


def computed_in(weight: Tensor) -> torch.dtype:
    """Return the type that a module computes in: that of its weight, bf16 for a quantised one."""
    return weight.dtype if weight.dtype in DENSE_DTYPES else torch.bfloat16


def stacked_weights(model: nn.Module) -> list[str]:
    """Return the names of weights that hold several matrices each: the experts of a block.

    They have three dimensions, or stand beside a router (DBRX's, one below the other).
    """
    routers = _routers(model)
    beside = tuple(f"{router.rpartition('.')[0]}." for router in routers)
    return [
        name
        for name, module, leaf in _other_weights(model, decoder_linear_modules(model))
        if not isinstance(module, nn.Conv1d)
        and (
            module.get_parameter(leaf).ndim == 3
            or (
                name.startswith(beside)
                and name.rpartition(".")[0] not in routers
                and not leaf.endswith("bias")
            )
        )
    ]


def features(module: nn.Module) -> tuple[int, int]:
    """Return the shape ``(out, in)`` of the weight of a linear module."""
    if isinstance(module, Conv1D):
        return int(module.nf), int(module.nx)
    out: Any = module.out_features
    width: Any = module.in_features
    return int(out), int(width)


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of a linear module, ``[out, in]``, as it is stored.

    The transposed weight of a ``Conv1D`` comes as a view: writing into it writes the weight. Raises
    UserError where it is no tensor.
    """
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise UserError(f"a {type(module).__name__} holds no weight tensor")
    return oriented(module, weight.data)


def oriented(module: nn.Module, stored: Tensor) -> Tensor:
    """Return a matrix that lies as the weight of a linear module does, as ``[out, in]``: a view."""
    return stored.T if isinstance(module, Conv1D) else stored


@contextmanager
def in_memory(module: nn.Module, name: str) -> Iterator[None]:
    """Bring a module's own weights in for a while, if offloaded; UserError if there are none."""
    with align_module_device(module):
        if any(each.device.type == "meta" for each in module.parameters(recurse=False)):
            raise UserError(
                f"{name} is on the meta device and holds no numbers; load the model onto a real "
                "device"
            )
        yield


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder blocks in order; block k gives ``hidden_states[k + 1]``."""
    return text_decoder(model).blocks


def hidden_size(model: nn.Module) -> int:
    """Return the width of the hidden states between the decoder blocks."""
    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        raise UserError(f"no decoder layers found in a {type(inner).__name__}")
    return int(inner.config.get_text_config(decoder=True).hidden_size)


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Return, for each linear module with a shared weight, the names of the other holders.

    Shared means: the same memory, whether by one tensor or by several that look into one storage.
    """
    linear = linear_modules(model)
    tied: dict[str, list[str]] = defaultdict(list)
    open_spans: list[_Span] = []
    for span in sorted(_spans(model)):
        open_spans = [o for o in open_spans if o.device == span.device and span.first < o.end]
        for other in open_spans:
            tied[other.name].append(span.name)
            tied[span.name].append(other.name)
        open_spans.append(span)
    return {name: others for name, others in tied.items() if name in linear}


class _Span(NamedTuple):
    """The bytes of a parameter, and the canonical name of its module, or its own."""

    device: str
    first: int
    end: int
    name: str


def _spans(model: nn.Module) -> Iterator[_Span]:
    for name, parameter in unwrapped(model).named_parameters(remove_duplicate=False):
        data = parameter.data
        if type(data) is Tensor and data.device.type != "meta" and data.numel():
            reach = 1 + sum(
                (size - 1) * step for size, step in zip(data.shape, data.stride(), strict=True)
            )
            first = data.data_ptr()
            end = first + reach * data.itemsize
            yield _Span(str(data.device), first, end, canonical_name(name.removesuffix(".weight")))


@torch.no_grad()
def weight_fingerprint(model: nn.Module) -> str:
    """Return a digest that tells models of different weights apart, in milliseconds.

    It covers the name, the shape and evenly spaced entries of every weight of two dimensions or
    more inside the decoder layers (linear ones, routers, stacked experts, convolutions), rounded to
    bf16: the same weights held in fp32, fp16 or bf16 agree when they were saved in bf16, as
    published models are, wherever they lie. A finetune changes it. Raises UserError for weights on
    the meta device that nothing brings in.
    """
    digest = hashlib.sha256()
    samples = []
    linear = decoder_linear_modules(model)
    for name, module in sorted(linear.items()):
        out, width = features(module)
        digest.update(f"{name}:{width}:{out};".encode())
        with in_memory(module, name):
            samples.append(_sample(weight_of(module)))
    for name, module, leaf in _other_weights(model, linear):
        digest.update(f"{name}:{list(module.get_parameter(leaf).shape)};".encode())
        with in_memory(module, name):
            samples.append(_sample(module.get_parameter(leaf).data))
    values = torch.cat([each.cpu() for each in samples])
    digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _other_weights(
    model: nn.Module, linear: dict[str, nn.Module]
) -> list[tuple[str, nn.Module, str]]:
    """Return the parameters of two dimensions or more in the blocks that are no linear weights.

    By canonical name, each with its module and its name there, in order.
    """
    decoder = text_decoder(model)
    found = [
        (canonical_name(f"{decoder.blocks_name}.{number}.{name}") + f".{leaf}", module, leaf)
        for number, block in enumerate(decoder.blocks)
        for name, module in block.named_modules()
        if ".lora_" not in name
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2
    ]
    return sorted(each for each in found if each[0].removesuffix(".weight") not in linear)


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
