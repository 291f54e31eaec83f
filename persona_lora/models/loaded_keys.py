"""Whether what was loaded is whole: transformers and PEFT fill gaps with random numbers and go on.

Knows what names a checkpoint may hold beside a model's own; refuses to know where it came from.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from persona_lora.core.adapter_files import read_factors
from persona_lora.core.errors import UserError, few_names
from persona_lora.models.structure import canonical_name

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


def check_adapter_whole(model: nn.Module, adapter: Path) -> None:
    """Raise UserError where PEFT wrapped other modules than the adapter's file has factors for."""
    held = set(read_factors(adapter, on_disk=True).factors)
    wrapped = {
        canonical_name(name)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    for names, what in (
        (held - wrapped, "which its configuration does not put on this model"),
        (wrapped - held, "for which its weights hold no factors"),
    ):
        if names:
            raise UserError(
                f"{adapter}: {few_names(sorted(names))}, {what}; it belongs to another model, "
                "or was saved under other names"
            )


def _has_owner(key: str, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a weight lies below a module of the model, other than in its outermost ones."""
    owner = key
    while owner and owner not in modules:
        owner = owner.rpartition(".")[0]
    return "." in owner or (bool(owner) and not any(True for _ in modules[owner].children()))
