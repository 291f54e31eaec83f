"""Which modules a LoRA goes on: decided and refused before a step is taken.

A LoRA has a plain difference where one matrix maps each token: linear modules of the text decoder.
Routers and the stacked experts of a block have none, and PEFT puts names of older releases on them
by rules of its own; so it is tried on a model without weights first.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Sequence

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from persona_lora.core.errors import UserError
from persona_lora.models.loading import ChatModel
from persona_lora.models.skeleton import same_kind
from persona_lora.models.structure import (
    canonical_name,
    linear_modules,
    plain_linear_modules,
    stacked_weights,
    text_decoder,
    unwrapped,
)

logger = logging.getLogger(__name__)

ALL_LINEAR = ["all-linear"]


def lora_targets(chat_model: ChatModel, asked: Sequence[str]) -> list[str]:
    """Return the names of the modules that a LoRA goes on.

    ``asked`` is ``["all-linear"]``, or module names or dotted endings of them. UserError for a name
    that is no plain linear module of the decoder, or that PEFT would put on stacked experts;
    all-linear leaves those out.
    """
    model = chat_model.model
    known = _called(model, list(plain_linear_modules(model)))
    if list(asked) == ALL_LINEAR:
        taken = _all_taken(model, known)
        if not taken:
            raise UserError(
                f"PEFT puts a LoRA on no linear module of {chat_model.name}; train another model"
            )
        _say_what_stays(model, known, taken)
        return taken
    chosen = _named(chat_model.name, known, asked)
    taken = _taken_by_peft(model, chosen)
    if len(taken) < len(chosen):
        possible = _kinds(_all_taken(model, known))
        raise UserError(
            f"lora_target_modules {', '.join(asked)}: PEFT puts them on the stacked experts of "
            f"{chat_model.name}, whose LoRA has no plain difference, or refuses them; use "
            f"all-linear, or of {', '.join(possible) or 'another model: it takes none of this one'}"
        )
    return taken


def _all_taken(model: nn.Module, known: Sequence[str]) -> list[str]:
    """Return the modules that PEFT takes, without the kinds that it refuses by themselves.

    One that it refuses (the output of Mamba's mixers) makes it refuse all that stand beside it.
    """
    whole = _taken_by_peft(model, known)
    if whole:
        return whole
    fit = [kind for kind in _kinds(known) if _taken_by_peft(model, _of_kind(known, kind))]
    return _taken_by_peft(model, [name for name in known if _kind(name) in fit])


def _say_what_stays(model: nn.Module, known: Sequence[str], taken: Sequence[str]) -> None:
    stacked = stacked_weights(model)
    if stacked:
        logger.warning(
            "the LoRA goes on %s; stacked experts (%s) have no plain difference and stay as they "
            "are",
            ", ".join(_kinds(taken)),
            ", ".join(_kinds(stacked)),
        )
    elif len(taken) < len(known):
        logger.warning(
            "the LoRA goes on %s; PEFT puts none on %s of this model, which stay as they are",
            ", ".join(_kinds(taken)),
            ", ".join(sorted(set(_kinds(known)) - set(_kinds(taken)))),
        )


@torch.no_grad()
def _called(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Return the names without the kinds of modules that a pass reads the weight of, uncalled.

    What is not called (a projection of Jamba's) passes any LoRA by. An expert that a pass leaves
    out is known by another one of its kind. The pass is one of training, where fused kernels read
    more weights than in evaluation.
    """
    if any(not parameter.numel() for parameter in model.parameters()):
        return list(names)  # taken apart already, and not to be run yet
    modules = linear_modules(model)
    called: set[str] = set()
    handles = [
        modules[name].register_forward_hook(
            lambda module, arguments, output, kind=_kind(name): called.add(kind)
        )
        for name in names
    ]
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(3, device="cpu" if device.type == "meta" else device)[None]
    try:
        model.train()
        text_decoder(model).module(input_ids=ids, use_cache=False)
    finally:
        model.eval()
        for handle in handles:
            handle.remove()
    return [name for name in names if _kind(name) in called]


def _named(model_name: str, known: Sequence[str], asked: Sequence[str]) -> list[str]:
    unknown = [each for each in asked if not any(_means(each, name) for name in known)]
    if unknown:
        raise UserError(
            f"lora_target_modules {', '.join(unknown)} fit no linear module in the decoder of "
            f"{model_name}; it has {', '.join(_kinds(known))}, or use all-linear"
        )
    return [name for name in known if any(_means(each, name) for each in asked)]


def _means(asked: str, name: str) -> bool:
    """Say whether a target names a module, as PEFT takes it: its name, or a dotted ending."""
    return name == asked or name.endswith(f".{asked}")


def _taken_by_peft(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return those of the names on which PEFT puts a LoRA of a linear module of their own."""
    empty = same_kind(unwrapped(model))
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=list(names))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nobody will use this one
            get_peft_model(empty, config, low_cpu_mem_usage=True)
    except ValueError:  # nothing is left on linear modules, or only half of what it joins
        return []
    wrapped = {
        canonical_name(name)
        for name, module in empty.named_modules()
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear | Conv1D)
    }
    return [name for name in names if name in wrapped]


def _of_kind(names: Iterable[str], kind: str) -> list[str]:
    return [name for name in names if _kind(name) == kind]


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _kinds(names: Iterable[str]) -> list[str]:
    return sorted({_kind(name) for name in names})
