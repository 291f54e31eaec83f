"""Whether what was loaded is whole: transformers and PEFT fill gaps with random numbers and go on.

Knows what names a checkpoint may hold beside a model's own; refuses to know where it came from.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from persona_lora.core.adapter_config import alpha_of, lists
from persona_lora.core.adapter_files import adapter_config, read_factors
from persona_lora.core.errors import UserError, few_names
from persona_lora.models.structure import canonical_name, linear_modules

logger = logging.getLogger(__name__)

# Computed from the configuration; older releases saved them beside the weights.
BUFFERS = re.compile(r"\.(inv_freq|attn\.bias|attention\.bias|masked_bias)$")


def check_whole(model: nn.Module, info: Mapping[str, Any], name: str) -> None:
    """Raise UserError where a loaded model is not what its checkpoint holds.

    ``info`` is the loading info of transformers. A weight that the checkpoint lacks would be
    random; one for which the model's modules have no place (a bias, an unmerged LoRA, a further
    layer) would be dropped. A part that the model has not (a value head) is named in a warning.
    """
    mismatched = {key: shapes for key, *shapes in info["mismatched_keys"]}
    if mismatched:
        key, (stored, expected) = min(mismatched.items())
        raise UserError(
            f"{name}: {key} is {list(stored)}, and {list(expected)} by its config.json "
            f"({len(mismatched)} such weights); mend the configuration or save the model again"
        )
    missing = sorted(info["missing_keys"])
    unused = sorted(key for key in info["unexpected_keys"] if not BUFFERS.search(key))
    if missing:
        holds = f"; it holds {few_names(unused)} instead" if unused else ""
        raise UserError(
            f"{name} lacks {few_names(missing)}, which would be random numbers{holds}; save the "
            "whole model again with save_pretrained, under the names that it loads by"
        )
    modules = dict(model.named_modules())
    inside = [key for key in unused if _has_owner(key, modules)]
    if inside:
        raise UserError(
            f"{name} holds {few_names(inside)}, for which the model of its config.json has no "
            "place; mend the configuration, or merge what was added before saving"
        )
    if unused:
        logger.warning("%s: %s left out, the model has no such part", name, few_names(unused))


def peft_config(adapter: Path) -> LoraConfig:
    """Return a configuration that puts on the modules of an adapter's file, each by its name.

    Its own may hold patterns that PEFT would match without end, or that leave modules out.
    """
    config = adapter_config(adapter)
    factors = read_factors(adapter, on_disk=True).factors
    ranks = {name: A.shape[0] for name, (A, _) in factors.items()}
    alphas = {name: alpha_of(config, name) for name in ranks}
    rank, alpha = max(ranks.values()), max(alphas.values())
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=config["base_model_name_or_path"],
        inference_mode=True,
        r=rank,
        lora_alpha=alpha,
        use_rslora=bool(config.get("use_rslora")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        target_modules=list(ranks),
        rank_pattern={re.escape(name): each for name, each in ranks.items() if each != rank},
        alpha_pattern={re.escape(name): each for name, each in alphas.items() if each != alpha},
    )


def check_adapter_whole(model: nn.Module, adapter: Path) -> None:
    """Raise UserError where PEFT did not put exactly the factors of an adapter's file on a model.

    A module whose names it does not recognise keeps a random A and a B of zeros.
    """
    factors = read_factors(adapter, on_disk=True).factors
    wrapped = {
        canonical_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    config = adapter_config(adapter)
    lacking = {name for name in linear_modules(model) if lists(config, name) is True}
    strange = sorted(factors.keys() ^ wrapped.keys() | lacking - factors.keys())
    differing = [
        name
        for name in sorted(factors.keys() & wrapped.keys())
        if not _holds(wrapped[name], factors[name][0])
    ]
    if strange or differing:
        raise UserError(
            f"{adapter}: PEFT does not put {few_names(strange or differing)} on this model as the "
            "file holds it; the adapter belongs to another model, or was saved under other names"
        )


def _holds(module: Any, A: Tensor) -> bool:
    """Tell whether a PEFT layer has this A; one that lies elsewhere (offloaded) is not asked."""
    weight = module.lora_A["default"].weight
    return weight.is_meta or torch.equal(weight.detach().cpu(), A.to(weight.dtype))


def _has_owner(key: str, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a weight lies below a module of the model, other than in its outermost ones."""
    owner = key
    while owner and owner not in modules:
        owner = owner.rpartition(".")[0]
    return "." in owner or (bool(owner) and not any(True for _ in modules[owner].children()))
