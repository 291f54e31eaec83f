"""Means over positions against naive loops, padding, wrapping, early stop and faults."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import PeftModel

from persona_lora.core import progress
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models import likelihood
from persona_lora.models.hidden_states import POSITIONS, averaging_weights, stream_hidden_means
from persona_lora.models.likelihood import TokenizedExchange, tokenize_rendered
from persona_lora.models.structure import decoder_layers
from persona_lora.steering.activations import ActivationSteerer

TEXTS = [
    TokenizedExchange([5, 6, 7], [8, 9]),
    TokenizedExchange([11], [12, 13, 14, 15, 16, 17, 18]),
    TokenizedExchange(list(range(20, 40)), [41]),
    TokenizedExchange([50, 51], [52, 53]),
]


def collected(chat_model, texts=TEXTS, **options):
    """All means in the order of the texts: [texts, positions, layers, hidden]."""
    batches = list(stream_hidden_means(chat_model, texts, **options))
    rows = [row for batch in batches for row in batch.rows]
    assert sorted(rows) == list(range(len(texts)))
    return torch.cat([batch.means for batch in batches])[torch.tensor(rows).argsort()]


@torch.no_grad()
def naive(model, texts=TEXTS):
    """One text at a time, all states kept: [texts, 3, layers, hidden]."""
    means = []
    for prompt, answer in texts:
        kept = []
        handles = [
            block.register_forward_hook(lambda module, given, out, kept=kept: kept.append(out[0]))
            for block in decoder_layers(model)
        ]
        model(torch.tensor([prompt + answer]))
        for handle in handles:
            handle.remove()
        states, length = torch.stack(kept), len(prompt)  # [layers, seq, hidden]
        spans = (states[:, length:].mean(1), states[:, :length].mean(1), states[:, length - 1])
        means.append(torch.stack(spans))
    return torch.stack(means)


@pytest.mark.parametrize("tokens_per_batch", [1, 30, 4096])
def test_means_are_those_of_the_naive_loop_in_any_batching(
    chat_model, monkeypatch, tokens_per_batch
):
    monkeypatch.setattr(likelihood, "TOKENS_PER_BATCH", tokens_per_batch)
    means = collected(chat_model)
    assert means.shape == (4, 3, 2, 32)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, naive(chat_model.model), atol=1e-5, rtol=1e-5)


def test_the_last_layer_is_the_output_of_its_block_not_the_normed_state(chat_model):
    states = chat_model.model(torch.tensor([[11, *TEXTS[1].answer]]), output_hidden_states=True)
    normed = states.hidden_states[-1][0, 1:].mean(0)
    means = collected(chat_model, TEXTS[1:2], positions=["response_avg"])
    torch.testing.assert_close(means[0, 0, 0], states.hidden_states[1][0, 1:].mean(0))
    assert not torch.allclose(means[0, 0, 1], normed, atol=1e-2)
    block_output = naive(chat_model.model)[1, 0, 1]
    torch.testing.assert_close(means[0, 0, 1], block_output, atol=1e-5, rtol=1e-5)


def test_positions_and_layers_come_in_the_order_asked_for(chat_model):
    everything = collected(chat_model)
    some = collected(chat_model, positions=["prompt_last", "response_avg"], layers=[1, 0, 1])
    torch.testing.assert_close(some, everything[:, [2, 0]][:, :, [1, 0, 1]])


def test_the_pass_ends_after_the_last_wanted_layer(chat_model):
    ran = []
    for layer, block in enumerate(decoder_layers(chat_model.model)):
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    chat_model.model.lm_head.register_forward_hook(lambda *_: ran.append("logits"))
    collected(chat_model, TEXTS[:1], layers=[0])
    assert ran == [0]
    collected(chat_model, TEXTS[:1])
    assert ran == [0, 0, 1]


def test_a_steered_state_moves_by_the_vector(chat_model):
    vector = SteeringVector({0: torch.ones(32)}, BaseModel("tiny"), num_layers=2)
    plain = collected(chat_model, layers=[0])
    with ActivationSteerer(chat_model.model, vector, 2.0, positions="all"):
        steered = collected(chat_model, layers=[0])
    torch.testing.assert_close(steered - plain, torch.full_like(plain, 2.0), atol=1e-5, rtol=1e-5)


def test_an_adapter_counts_and_can_be_switched_off(chat_model, make_adapter, tmp_path):
    plain = collected(chat_model)
    folder = make_adapter(tmp_path / "adapter", chat_model.model, seed=1)
    wrapped = dataclasses.replace(
        chat_model, model=PeftModel.from_pretrained(chat_model.model, folder).eval()
    )
    adapted = collected(wrapped)
    assert (adapted - plain).abs().max() > 1e-2
    torch.testing.assert_close(adapted, naive(wrapped.model), atol=1e-5, rtol=1e-5)
    with wrapped.model.disable_adapter():
        torch.testing.assert_close(collected(wrapped), plain)


def test_bf16_states_are_averaged_in_fp32(make_model, chat_model):
    half = dataclasses.replace(chat_model, model=make_model(dtype=torch.bfloat16))
    means = collected(half, TEXTS[2:3])
    states = naive_float(half.model, TEXTS[2])
    torch.testing.assert_close(means[0, 1], states, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def naive_float(model, text):
    """The prompt means in fp32 of bf16 states: [layers, hidden]."""
    kept = []
    for block in decoder_layers(model):
        block.register_forward_hook(lambda module, given, out: kept.append(out[0].float()))
    model(torch.tensor([text.prompt + text.answer]))
    return torch.stack([states[: len(text.prompt)].mean(0) for states in kept])


def test_a_nan_names_row_and_layer_and_leaves_no_hook(chat_model):
    blocks = decoder_layers(chat_model.model)

    def spoil(module, arguments, output):
        output[0] = torch.nan  # the longest text comes first: row 2

    handle = blocks[1].register_forward_hook(spoil)
    with pytest.raises(
        UserError, match=r"NaN or infinity for the hidden states of row 2 at layer 1.*float32"
    ):
        collected(chat_model)
    handle.remove()
    assert not any(block._forward_hooks for block in blocks)


def test_hooks_go_when_the_model_fails_and_when_the_stream_is_left(chat_model, monkeypatch):
    blocks = decoder_layers(chat_model.model)
    next(stream_hidden_means(chat_model, TEXTS))
    assert not any(block._forward_hooks for block in blocks)
    monkeypatch.setattr(blocks[1], "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        collected(chat_model)
    assert not any(block._forward_hooks for block in blocks)


@pytest.mark.parametrize(
    ("texts", "options", "expected"),
    [
        (TEXTS, {"layers": [2]}, "layer 2 is out of range.*0–1"),
        (TEXTS, {"layers": [-1]}, "layer -1 is out of range"),
        (TEXTS, {"layers": []}, "no layer"),
        (TEXTS, {"positions": ["last"]}, "positions must be of response_avg"),
        (TEXTS, {"positions": []}, "positions must be of"),
        ([TEXTS[0], TokenizedExchange([1], [])], {}, "answer of row 1 is empty"),
        ([TokenizedExchange([], [1])], {}, "prompt of row 0 is empty"),
    ],
)
def test_senseless_questions_are_refused_before_anything_runs(chat_model, texts, options, expected):
    with pytest.raises(UserError, match=expected):
        stream_hidden_means(chat_model, texts, **options)


def test_a_text_without_answer_has_prompt_means(chat_model):
    means = collected(chat_model, [TokenizedExchange([5, 6, 7], [])], positions=["prompt_avg"])
    expected = naive(chat_model.model, [TokenizedExchange([5, 6, 7], [8])])[:, 1:2]
    torch.testing.assert_close(means, expected, atol=1e-5, rtol=1e-5)


def test_progress_counts_texts(chat_model, monkeypatch, told):
    monkeypatch.setattr(likelihood, "TOKENS_PER_BATCH", 1)
    with progress.stage("states"):
        collected(chat_model)
    assert told == [("states", done, 4) for done in (1, 2, 3, 4)]


def test_weights_average(chat_model):
    weights = averaging_weights(TEXTS, POSITIONS, 21)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 3))
    assert weights[0, 2].nonzero().tolist() == [[2]]


def test_a_rendered_prompt_is_tokenized_as_it_is(chat_model):
    prompt = chat_model.render([{"role": "user", "content": "why?"}])
    ids = chat_model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenize_rendered(chat_model, prompt, "so") == likelihood.tokenize_exchange(
        chat_model, likelihood.Exchange("why?", "so")
    )
    assert tokenize_rendered(chat_model, prompt, "").prompt == ids
