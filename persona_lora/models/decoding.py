"""A batch of rows answered token by token: memory for keys and values taken once, rows that leave.

Knows passes, caches and positions; refuses to know texts, how a token is chosen, and what steers.
Only models are decoded here that keep nothing of a row but the keys and values of full attention
(``decodes``). A row that has ended leaves the batch, rows of another batch may join it, and each
gives what it would have given alone, but for last bits: a batch of another shape may sum in another
order.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from persona_lora.models.caches import CACHE_NAMES, KeptCache, planned_cache, plans_sharing
from persona_lora.models.likelihood import contiguous_input
from persona_lora.models.structure import unwrapped


class RoomyLayer(DynamicLayer):
    """A layer's keys and values in memory taken for ``room`` tokens; ``keys``, ``values`` view it.

    transformers' own layer copies all that it holds at every step.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._memory: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory for rows like these."""
        super().lazy_initialization(key_states, value_states)
        for states in (key_states, value_states):
            rows, heads, _, size = states.shape
            self._memory.append(states.new_empty(rows, heads, self._room, size))
        self._show(len(key_states), 0)

    def _show(self, rows: int, length: int) -> None:
        self.keys, self.values = (memory[:rows, :, :length] for memory in self._memory)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the states of new tokens behind the others; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, _, length, _ = self.keys.shape
        end = length + key_states.shape[2]
        for memory, states in zip(self._memory, (key_states, value_states), strict=True):
            memory[:rows, :, length:end] = states
        self._show(rows, end)
        return self.keys, self.values

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order."""
        length = self.keys.shape[2]
        for memory in self._memory:
            memory[: len(rows), :, :length] = memory[list(rows), :, :length]
        self._show(len(rows), length)

    def join(self, others: Sequence[RoomyLayer], length: int, room: int) -> None:
        """Take the rows of others behind those here: the last ``length`` tokens of each."""
        for at, name in enumerate(("keys", "values")):
            held = [getattr(layer, name) for layer in (self, *others)]
            ends = [pad(states, (0, 0, length - states.shape[2], 0)) for states in held]
            self._memory[at] = pad(torch.cat(ends), (0, 0, 0, room - length))
        self._show(len(self._memory[0]), length)


def decodes(model: PreTrainedModel) -> bool:
    """Say whether a model can be decoded here, by what it takes and the cache planned for it."""
    takes = inspect.signature(unwrapped(model).forward).parameters
    return (
        {"logits_to_keep", "position_ids", "attention_mask"} <= set(takes)
        and any(name in takes for name in CACHE_NAMES)
        and plans_sharing(model, padded=True)
    )


def cache_name(model: PreTrainedModel) -> str:
    """Return the keyword under which a model that is decoded here takes its cache."""
    takes = inspect.signature(unwrapped(model).forward).parameters
    return next(name for name in CACHE_NAMES if name in takes)


class Decoding:
    """Rows on their way; every pass returns the logits of each row's next token, in fp32.

    Args:
        tokens: The prompts, padded on the left: ``[rows, length]``.
        mask: 1 where a token is no padding, ``[rows, length]``.
        prefix: The cache of the tokens that all prompts begin with, a row each.
        steps: How many tokens will follow at most.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        mask: Tensor,
        prefix: KeptCache | None,
        steps: int,
    ) -> None:
        self.model = model
        self._tokens = tokens
        self._mask = torch.cat([mask, mask.new_ones(len(mask), steps)], dim=1)
        self._length = mask.shape[1]
        self._places = mask.sum(dim=1, keepdim=True) - 1  # [rows, 1], of the newest tokens
        cache = planned_cache(model.config)
        self._layers = [RoomyLayer(self._mask.shape[1]) for _ in cache.layers]
        cache.layers = list(self._layers)
        if prefix is not None:
            for layer, begun in zip(self._layers, prefix.cache.layers, strict=True):
                layer.update(begun.keys, begun.values)
        self._kept = KeptCache(cache_name(model), cache)

    def begin(self) -> Tensor:
        """Run the prompts; return logits ``[rows, vocabulary]``."""
        places = (self._mask.cumsum(dim=1) - 1).clamp(min=0)
        start = self._kept.cache.get_seq_length()
        with contiguous_input(self.model):
            return self._run(self._tokens[:, start:], places[:, start : self._length])

    def step(self, tokens: Tensor) -> Tensor:
        """Run a token of every row, ``[rows]``; return logits ``[rows, vocabulary]``."""
        self._length += 1
        self._places = self._places + 1
        return self._run(tokens[:, None], self._places)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; what is kept of them is copied."""
        self._mask, self._places = self._mask[list(rows)], self._places[list(rows)]
        for layer in self._layers:
            layer.keep(rows)

    @property
    def room(self) -> int:
        """How many tokens more the rows have room for."""
        return self._mask.shape[1] - self._length

    def join(self, *others: Decoding, steps: int) -> None:
        """Go on with the rows of others behind these, and with room for ``steps`` tokens more.

        All have begun, and wait for a step. Columns that nobody needs, before the longest row's
        first token, are dropped; a shorter row gets padding in front.
        """
        parts = (self, *others)
        self._places = torch.cat([part._places for part in parts])
        length = int(self._places.max()) + 1
        seen = [part._mask[:, : part._length] for part in parts]
        ends = [pad(mask, (length - mask.shape[1], 0)) for mask in seen]
        self._mask = pad(torch.cat(ends), (0, steps), value=1)
        self._length = length
        for layer, *joining in zip(*(part._layers for part in parts), strict=True):
            layer.join(joining, length, length + steps)

    def _run(self, tokens: Tensor, places: Tensor) -> Tensor:
        output = self.model(
            input_ids=tokens,
            attention_mask=self._mask[:, : self._length],
            position_ids=places,
            use_cache=True,
            logits_to_keep=1,
            **{self._kept.name: self._kept.cache},
        )
        return output.logits[:, -1].float()
