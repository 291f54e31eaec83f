"""Last tokens' states: what each prompt gives alone, whether or not a beginning is shared."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from persona_lora.core.errors import UserError
from persona_lora.models import last_states as module
from persona_lora.models import likelihood
from persona_lora.models.hidden_states import stream_hidden_means
from persona_lora.models.last_states import last_states
from persona_lora.models.likelihood import TokenizedExchange

BEGINNINGS = {"a": list(range(10, 40)), "b": list(range(60, 90)), "short": [5]}
PROMPTS = [
    (name, [*begin, *range(100, 100 + length)])
    for length in (3, 9, 1)
    for name, begin in BEGINNINGS.items()
] + [("alone", list(range(30, 50)))]
GROUPS, TOKENS = ([each[at] for each in PROMPTS] for at in (0, 1))
# Some begin inside what a group shares.
SPANS = [
    range(max(0, len(each) - 4 - at % 2), len(each) - at % 2) for at, each in enumerate(TOKENS)
]


def alone(chat_model, layers):
    states = torch.empty(len(TOKENS), 2, len(layers), 32)
    for row, (tokens, span) in enumerate(zip(TOKENS, SPANS, strict=True)):
        (only,) = stream_hidden_means(
            chat_model,
            [TokenizedExchange(tokens, [])],
            positions=("prompt_last",),
            layers=list(layers),
        )
        states[row, 0] = only.means[0, 0]
        texts = [TokenizedExchange(tokens[: span.start], tokens[span.start : span.stop])]
        (over,) = stream_hidden_means(
            chat_model, texts, positions=("response_avg",), layers=list(layers)
        )
        states[row, 1] = over.means[0, 0]
    return states.flatten(1, 2)


@pytest.mark.parametrize("layers", [(0, 1), (1,), (0,)])
def test_states_are_those_of_every_prompt_alone(chat_model, layers, told):
    found = last_states(chat_model, TOKENS, GROUPS, layers, SPANS)
    torch.testing.assert_close(found, alone(chat_model, layers), atol=1e-4, rtol=1e-4)


def test_a_shared_beginning_is_read_once(chat_model, monkeypatch):
    lengths = []
    decoder = chat_model.model.model
    forward = decoder.forward
    monkeypatch.setattr(
        decoder,
        "forward",
        lambda input_ids, **others: (
            lengths.append(tuple(input_ids.shape)) or forward(input_ids=input_ids, **others)
        ),
    )
    ends = [range(len(each) - 1, len(each)) for each in TOKENS]
    last_states(chat_model, TOKENS, GROUPS, (1,), ends)
    # of "a" and "b" the beginning, then three ends of at most nine; the rest as they are
    assert sorted(lengths) == sorted([(1, 30), (3, 9), (1, 30), (3, 9), (3, 10), (1, 20)])


def test_the_beginning_counts_towards_the_tokens_of_a_batch(chat_model, monkeypatch):
    """Its cache is there once for each row."""
    rows = []
    monkeypatch.setattr(likelihood, "TOKENS_PER_BATCH", 2 * max(map(len, TOKENS)))
    monkeypatch.setattr(
        module,
        "right_padded",
        lambda *ends: rows.append(len(ends[1])) or likelihood.right_padded(*ends),
    )
    last_states(chat_model, TOKENS, GROUPS, (1,), SPANS)
    assert rows[:4] == [2, 1, 2, 1]  # two groups of three long ones


def test_without_sharing_the_states_are_the_same(chat_model, monkeypatch):
    shared = last_states(chat_model, TOKENS, GROUPS, (0, 1), SPANS)
    monkeypatch.setattr(module, "plans_sharing", lambda *_, **__: False)
    plain = last_states(chat_model, TOKENS, GROUPS, (0, 1), SPANS)
    torch.testing.assert_close(plain, shared, atol=1e-4, rtol=1e-4)


def test_progress_counts_prompts_and_nan_is_refused(chat_model, make_model):
    broken = make_model()
    broken.model.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="gives NaN or infinity for the hidden states"):
        last_states(dataclasses.replace(chat_model, model=broken), TOKENS, GROUPS, (1,), SPANS)
