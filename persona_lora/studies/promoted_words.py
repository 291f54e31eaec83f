"""The words that a change of a model promotes, from its next tokens with and without the change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from persona_lora.models.likelihood import NextTokens
from persona_lora.models.loading import ChatModel
from persona_lora.report.resampling import bootstrap_mean
from persona_lora.studies.drift.read_diagnosis import PLACES

TOP = 15  # words of each kind
EVER = 1e-4  # the mean probability from which a token counts as one that the model ever says
BothPlaces = tuple[NextTokens, NextTokens]


def changed_words(
    chat_model: ChatModel, without: BothPlaces, after: BothPlaces
) -> Iterator[dict[str, Any]]:
    """Yield the tokens whose log-probability changed most, up and down, at either place.

    Rows of place, token, text, and the mean change over prompts with its interval. Only tokens that
    the model gives ``EVER`` on the mean, with or without, and that are text by themselves.
    """
    for place, one, other in zip(PLACES, without, after, strict=True):
        width = min(one.logprobs.shape[-1], other.logprobs.shape[-1])  # it may have been padded
        texts = chat_model.tokenizer.batch_decode([[token] for token in range(width)])
        whole = torch.tensor(["\ufffd" not in text for text in texts])
        likely = [each.probabilities[:, :width].mean(dim=0) for each in (one, other)]
        kept = ((torch.maximum(*likely) >= EVER) & whole).nonzero()[:, 0]
        changes = other.logprobs[:, kept] - one.logprobs[:, kept]  # [prompts, tokens]
        order = changes.mean(dim=0).argsort(descending=True).tolist()
        ends = [at for at in order[:TOP] if changes[:, at].mean() > 0]
        ends += [at for at in order[: -TOP - 1 : -1] if changes[:, at].mean() < 0]
        for at in ends:
            change = bootstrap_mean(dict(enumerate([[each] for each in changes[:, at].tolist()])))
            token = int(kept[at])
            told = {"place": place, "token": token, "text": texts[token]}
            yield {**told, "change": change.mean, "low": change.low, "high": change.high}
