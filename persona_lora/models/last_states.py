"""The hidden states at the ends of prompts and over a span in them, where prompts begin alike.

Many prompts that differ at their ends alone (one question, many answers to it) cost what their ends
cost: what a group of them begins with goes through the model once, and its keys and values are
shared. Knows prompts as tokens; refuses to know what they say.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from persona_lora.core import progress
from persona_lora.models.caches import KeptCache, kept_cache, plans_sharing, shares_prefix
from persona_lora.models.generation import common_prefix
from persona_lora.models.hidden_states import BlockOutputs
from persona_lora.models.likelihood import batches_by_length, right_padded
from persona_lora.models.loading import ChatModel
from persona_lora.models.structure import hidden_size, text_decoder
from persona_lora.models.turns import refuse_untold_rows

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
    refuse_untold_rows(chat_model.model)
    chat_model.check_length(max(map(len, prompts), default=0))
    states = torch.empty(len(prompts), 2 * len(layers), hidden_size(chat_model.model))
    done = 0

    def read(ends: Sequence[list[int]], kept: KeptCache | None, own: Sequence[range]) -> Tensor:
        keywords: dict[str, Any] = {"use_cache": False}
        if kept is not None:
            cache = copy.deepcopy(kept.cache)
            cache.batch_repeat_interleave(len(ends))
            keywords = {"use_cache": True, kept.name: cache}
        last = [range(len(end) - 1, len(end)) for end in ends]
        taken = _SpanMeans(chat_model, layers, [last, own])
        taken.read(right_padded(chat_model, ends), **keywords)
        by_layer = torch.stack([taken.states[index] for index in range(len(layers))])
        return by_layer.permute(2, 1, 0, 3).flatten(1, 2)  # from [layers, 2, batch, hidden]

    for group in dict.fromkeys(groups):
        rows = [row for row, each in enumerate(groups) if each == group]
        longest = min(spans[row].start for row in rows)  # no span is cut
        prefix, kept = _shared_prefix(chat_model, [prompts[row] for row in rows], longest)
        for batch in batches_by_length([len(prompts[row]) for row in rows]):  # the cache is whole
            some = [rows[at] for at in batch]
            ends = [prompts[row][len(prefix) :] for row in some]
            starts = [spans[row].start - len(prefix) for row in some]
            own = [range(at, at + len(spans[row])) for at, row in zip(starts, some, strict=True)]
            states[some] = read(ends, kept, own)
            done += len(some)
            progress.report(done, len(prompts))
    if not bool(states.isfinite().all()):
        raise chat_model.not_finite("the hidden states of what it reads")
    return states


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
    with chat_model.turn():
        kept = kept_cache(text_decoder(model).module(input_ids=ids, use_cache=True))
    if kept is None or not shares_prefix(kept.cache, padded=False):
        return [], None
    return prefix, kept


class _SpanMeans(BlockOutputs):
    """Keeps the means of blocks' outputs over spans; ``spans`` holds lists of one for each row."""

    def __init__(
        self, chat_model: ChatModel, layers: Sequence[int], spans: Sequence[Sequence[range]]
    ) -> None:
        super().__init__(chat_model, layers)
        self.spans = spans
        self.states: dict[int, Tensor] = {}  # by place: [lists of spans, batch, hidden]

    def take(self, index: int, hidden: Tensor) -> None:
        """Keep its means."""
        means = [
            torch.stack([row[span.start : span.stop].float().mean(dim=0) for row, span in pairs])
            for pairs in (zip(hidden, each, strict=True) for each in self.spans)
        ]
        self.states[index] = torch.stack(means).cpu()
