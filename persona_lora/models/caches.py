"""What a model keeps of the tokens it has seen: when rows share it, and what it tells of a pass.

Only what was compared with rows that run alone is allowed (tests/models/test_caches.py); any other
model runs without. A pass is over a prompt or a step of the answer after it: it counts passes, and
knows a cache by its type. Refuses to know rows and steering, what a model calls the argument that
carries the cache, and to guess: a pass that may be either is an error that says how to tell.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple
from weakref import ReferenceType, ref

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from persona_lora.core.errors import UserError
from persona_lora.models.structure import text_decoder, unwrapped

Stage = Literal["prompt", "step", "either"]


def states_read(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Tensor:
    """Return the hidden states ``[batch, seq, hidden]`` among a block's arguments."""
    for each in (*arguments, *keywords.values()):
        if isinstance(each, Tensor) and each.ndim == 3 and each.is_floating_point():
            return each
    raise UserError("a decoder block was called without hidden states [batch, seq, hidden]")


class PassCounter:
    """Tells the passes over prompts from the steps of generation.

    Whoever drives the model says ``expect_prompt`` before each prompt. Where nobody does, a prompt
    begins with the first pass on an empty cache, or with a pass that has none.
    """

    def __init__(self) -> None:
        self._told = False  # the next pass is over a prompt
        self._counts = False  # somebody tells: without a visible cache, single tokens are steps
        self._cache: ReferenceType[Cache] | None = None
        self._empty: bool | None = None  # the cache before the pass; None: there is no cache
        self._continued = False
        self._silent = False  # the cache was empty before the last pass, and is so again
        self._length: int | None = None  # of the last pass

    def expect_prompt(self) -> None:
        """Say that the next pass is over a prompt, or over the rest of one."""
        self._told = self._counts = True

    def begin(self, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        """Note, before the first block runs, the cache among its arguments, whatever its name."""
        given = (*arguments, *keywords.values())
        cache = next((each for each in given if isinstance(each, Cache)), None)
        self._continued = cache is not None and self._cache is not None and self._cache() is cache
        self._cache = None if cache is None else ref(cache)
        was_empty, self._empty = self._empty, None if cache is None else _is_empty(cache)
        self._silent = self._continued and bool(was_empty and self._empty)

    def end(self, length: int) -> Stage:
        """Return the stage of this pass over ``length`` positions; "either" where both look alike.

        Raises UserError where prompt and answer cannot be told apart.
        """
        told, self._told = self._told, False
        last, self._length = self._length, length
        if self._silent and not told:
            return self._without_length(length)
        if told or self._empty or (self._empty is None and last is None):
            return "prompt"
        if self._empty is None:
            return self._without_cache(length, int(last or 0))
        if length == 1:
            return "step" if self._continued else "either"
        if self._continued:
            raise UserError(
                f"a pass over {length} tokens goes on from a text in the cache, and whether they "
                "are prompt or answer cannot be told (a prompt in chunks, assisted generation, "
                f"another turn); {_REMEDY}"
            )
        return "prompt"

    def _without_length(self, length: int) -> Stage:
        if length == 1 and self._counts:
            return "step"
        raise UserError(
            "the cache of this model does not say what it holds, and whether a pass over "
            f"{length} tokens is prompt or answer cannot be told; {_REMEDY}"
        )

    def _without_cache(self, length: int, last: int) -> Stage:
        if length == 1 and self._counts:
            return "step"
        if length in (1, last + 1):
            raise UserError(
                f"a pass over {length} tokens without a cache may be a text of its own or the "
                f"answer going on; generate with use_cache=True, or {_REMEDY}"
            )
        return "prompt"


def _is_empty(cache: Cache) -> bool:
    """Say whether no layer of a cache holds anything; states (Mamba's) count no positions."""
    return not any(
        (isinstance(layer, CacheLayerMixin) and int(layer.get_seq_length()) > 0)
        or (isinstance(layer, LinearAttentionCacheLayerMixin) and cache.has_previous_state(number))
        for number, layer in enumerate(cache.layers)
    )


_REMEDY = 'call select_positions(None) on the steerer before each prompt, or steer positions="all"'


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
# Models without positions: distances between tokens are the same behind padding.
BY_DISTANCE = frozenset({"bloom", "mpt"})


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
    distances) would count the padding. GPT-Neo has windows that its cache does not know of.
    """
    config = model.config
    if config.get_text_config(decoder=True) is not config or config.model_type == "gpt_neo":
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
    return _holds_only(cache, (DynamicLayer,) if padded else ATTENTION)


def ignores_padding(cache: Cache, model: PreTrainedModel) -> bool:
    """Say whether padding before a row leaves its answer as it is.

    Not where a model counts places itself: BART's decoder would count the padding.
    """
    kind = model.config.get_text_config(decoder=True).model_type
    if kind in MASK_PADDING:
        return _holds_only(cache, ATTENTION + RECURRENT)
    takes = inspect.signature(unwrapped(model).forward).parameters
    return ("position_ids" in takes or kind in BY_DISTANCE) and _holds_only(cache, ATTENTION)


def _holds_only(cache: Cache, layers: Collection[type]) -> bool:
    return type(cache) is DynamicCache and all(type(each) in layers for each in cache.layers)
