"""The hidden states at the ends of prompts and over a span in them, where prompts begin alike.

Many prompts that differ at their ends alone (one question, many answers to it) cost what their ends
cost: what a group of them begins with goes through the model once, and its keys and values are
shared. Knows prompts as tokens; refuses to know what they say.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from persona_lora.core import progress
from persona_lora.core.errors import UserError
from persona_lora.models.caches import KeptCache, kept_cache, plans_sharing, shares_prefix
from persona_lora.models.generation import common_prefix
from persona_lora.models.hooks import Hook, Hooked
from persona_lora.models.likelihood import batches_by_length
from persona_lora.models.loading import ChatModel
from persona_lora.models.structure import decoder_layers, hidden_size, text_decoder

SHORTEST_PREFIX = 16  # tokens; below, a pass of its own costs more than it saves


@torch.no_grad()
def last_states(
    chat_model: ChatModel,
    prompts: Sequence[list[int]],
    groups: Sequence[str],
    layers: Sequence[int],
    spans: Sequence[range],
) -> Tensor:
    """Return the outputs of decoder layers at the last tokens, then their means over the spans.

    ``[prompts, 2 · layers, hidden]``, fp32. A span is a range of places in its prompt. Prompts of
    one group begin alike. A row's numbers are those it gives alone, up to rounding. Progress counts
    prompts. Raises UserError for a state that is NaN or infinite, and for a prompt over the window.
    """
    chat_model.check_length(max(map(len, prompts), default=0))
    states = torch.empty(len(prompts), 2 * len(layers), hidden_size(chat_model.model))
    done = 0
    for group in dict.fromkeys(groups):
        rows = [row for row, each in enumerate(groups) if each == group]
        longest = min(spans[row].start for row in rows)  # no span is cut
        prefix, kept = _shared_prefix(chat_model, [prompts[row] for row in rows], longest)
        for batch in batches_by_length([len(prompts[row]) - len(prefix) for row in rows]):
            some = [rows[at] for at in batch]
            ends = [prompts[row][len(prefix) :] for row in some]
            own = [_moved(spans[row], -len(prefix)) for row in some]
            states[some] = _states_of(chat_model, ends, kept, layers, own)
            done += len(some)
            progress.report(done, len(prompts))
    if not bool(states.isfinite().all()):
        raise chat_model.not_finite("the hidden states of what it reads")
    return states


def _moved(span: range, by: int) -> range:
    return range(span.start + by, span.stop + by)


def _shared_prefix(
    chat_model: ChatModel, prompts: Sequence[list[int]], longest: int
) -> tuple[list[int], KeptCache | None]:
    """Return what all prompts begin with and its cache, of one row; nothing if not worth it."""
    model, prefix = chat_model.model, common_prefix(prompts)[:longest]
    if (
        len(prompts) < 2
        or len(prefix) < SHORTEST_PREFIX
        or not plans_sharing(model, padded=False)  # padding stands behind, where nobody looks
    ):
        return [], None
    ids = torch.tensor([prefix], device=model.device)
    kept = kept_cache(text_decoder(model).module(input_ids=ids, use_cache=True))
    if kept is None or not shares_prefix(kept.cache, padded=False):
        return [], None
    return prefix, kept


def _states_of(
    chat_model: ChatModel,
    ends: Sequence[list[int]],
    kept: KeptCache | None,
    layers: Sequence[int],
    spans: Sequence[range],
) -> Tensor:
    model = chat_model.model
    longest = max(map(len, ends))
    ids = torch.full((len(ends), longest), chat_model.tokenizer.pad_token_id)
    for row, end in enumerate(ends):
        ids[row, : len(end)] = torch.tensor(end)
    keywords: dict[str, Any] = {"use_cache": False}
    if kept is not None:
        cache = copy.deepcopy(kept.cache)
        cache.batch_repeat_interleave(len(ends))
        keywords = {"use_cache": True, kept.name: cache}
    last = [range(len(end) - 1, len(end)) for end in ends]
    with _SpanMeans(model, layers, [last, spans]) as taken, suppress(_Done):
        text_decoder(model).module(input_ids=ids.to(model.device), **keywords)
    silent = sorted(set(layers) - set(taken.states))
    if silent:
        raise UserError(
            f"decoder layer {silent[0]} of {chat_model.name} did not run; its structure is not "
            "known here, see docs/models.md"
        )
    by_layer = torch.stack([taken.states[layer] for layer in layers])  # [layers, 2, batch, hidden]
    return by_layer.permute(2, 1, 0, 3).flatten(1, 2)


class _Done(Exception):
    """Raised behind the last wanted layer: what comes after it is not needed."""


class _SpanMeans(Hooked):
    """Context manager: hooks on blocks that keep the means of their outputs over spans of each row.

    ``spans`` holds lists of a span for each row.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[int], spans: Sequence[Sequence[range]]
    ) -> None:
        super().__init__()
        self.blocks = {layer: decoder_layers(model)[layer] for layer in layers}
        self.spans = spans
        self.states: dict[int, Tensor] = {}  # by layer: [lists of spans, batch, hidden]

    def hooks(self) -> list[Hook]:
        """Return a hook on every block of the layers."""
        return [
            Hook(block, partial(self._take, layer), f"block {layer}")
            for layer, block in self.blocks.items()
        ]

    def _take(self, layer: int, module: nn.Module, arguments: object, output: Any) -> None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        means = [
            torch.stack([row[span.start : span.stop].float().mean(dim=0) for row, span in pairs])
            for pairs in (zip(hidden, each, strict=True) for each in self.spans)
        ]
        self.states[layer] = torch.stack(means).cpu()
        if layer == max(self.blocks):
            raise _Done
