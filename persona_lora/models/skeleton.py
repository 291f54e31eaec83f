"""A model without its weights, from the configuration alone: which modules it has, named how.

Knows the classes that transformers loads a configuration with; refuses to know any numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from persona_lora.core.errors import UserError
from persona_lora.core.files import read_json

AutoModel = type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]


def auto_model(config: PreTrainedConfig) -> AutoModel:
    """Return the class of transformers that loads a configuration: language models come first.

    Models that read images too are taken where there is no language model of that kind; their text
    part is what is used.
    """
    kind = type(config)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model of a configuration on the meta device."""
    with torch.device("meta"):
        return auto_model(config).from_config(config)


def skeleton_of_folder(folder: Path) -> PreTrainedModel | None:
    """Return the model of a folder on the meta device.

    None for a folder without a configuration, and for code of its own, which is not run here and
    whose weights are named alike on disk and in memory.
    """
    path = folder / "config.json"
    if not path.is_file() or read_json(path).get("model_type") not in CONFIG_MAPPING:
        return None
    try:
        return skeleton(AutoConfig.from_pretrained(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} describes no language model: {str(error)[:200]}") from error


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


def same_kind(model: nn.Module) -> PreTrainedModel:
    """Return the skeleton of a loaded model.

    Raises UserError for what is no model of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"a {type(model).__name__} is no language model of transformers")
    with torch.device("meta"):
        return type(model)(model.config)
