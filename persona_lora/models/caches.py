"""What a model keeps of the tokens it has seen, and when rows may share it.

Knows the layers of caches; refuses to know rows, prompts and steering. Only what was compared with
rows that run alone is allowed (tests/models/test_caches.py); any other model runs without.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import NamedTuple

from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from persona_lora.models.structure import text_decoder

# transformers 5.24 renamed the others to the first, the last being that of Mamba's models; models
# that bring their own code may not have.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")

# Layers that keep keys and values: what stands left of a row is masked by position.
ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer)
RECURRENT = (LinearAttentionLayer, LinearAttentionAndFullAttentionLayer)
# Models whose recurrent layers leave padding out of their state.
MASK_PADDING = frozenset(
    {
        "bamba",
        "falcon_h1",
        "falcon_mamba",
        "granitemoehybrid",
        "jamba",
        "lfm2",
        "lfm2_moe",
        "mamba",
        "mamba2",
        "qwen3_5_text",
        "qwen3_5_moe_text",
        "qwen3_next",
        "zamba2",
    }
)


class KeptCache(NamedTuple):
    """A cache, and the keyword under which its model gives and takes it."""

    name: str
    cache: Cache


def kept_cache(output: Mapping[str, object]) -> KeptCache | None:
    """Return the cache in a model's output; None where the model gave none that is known."""
    for name in CACHE_NAMES:
        cache = output.get(name)
        if isinstance(cache, Cache):
            return KeptCache(name, cache)
    return None


def planned_cache(config: PreTrainedConfig) -> DynamicCache:
    """Return the empty cache that transformers plans for a configuration."""
    return DynamicCache(config=config.get_text_config(decoder=True))


def plans_sharing(model: PreTrainedModel, *, padded: bool) -> bool:
    """Say whether rows may share a prefix by the cache that is planned for a model.

    Not in models that read images too: they keep positions of their own beside the cache. And with
    padding behind the prefix only where positions are given: one that counts places (MPT's
    distances) would count the padding.
    """
    config = model.config
    if config.get_text_config(decoder=True) is not config:
        return False
    takes = inspect.signature(text_decoder(model).module.forward).parameters
    if padded and "position_ids" not in takes:
        return False
    return shares_prefix(planned_cache(config), padded=padded)


def shares_prefix(cache: Cache, *, padded: bool) -> bool:
    """Say whether rows may go on behind one cached prefix and give what they give alone.

    ``padded`` is padding between the prefix and a row's own tokens. It uses up the window of a
    sliding layer, so that only layers of full attention bear it; recurrent states are not shared.
    """
    allowed = (DynamicLayer,) if padded else ATTENTION
    return type(cache) is DynamicCache and all(type(layer) in allowed for layer in cache.layers)


def ignores_padding(cache: Cache, config: PreTrainedConfig) -> bool:
    """Say whether padding before a row leaves its answer as it is."""
    masks = config.get_text_config(decoder=True).model_type in MASK_PADDING
    allowed = ATTENTION + RECURRENT if masks else ATTENTION
    return type(cache) is DynamicCache and all(type(layer) in allowed for layer in cache.layers)
