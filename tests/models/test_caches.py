"""Answers and numbers of a row do not depend on its batch, whatever the model keeps of it.

Windows are shorter than the prompts and than the padding between them: where padding used up a
window, or entered a recurrent state, answers would change.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from persona_lora.core.chat import Exchange
from persona_lora.models.caches import MASK_PADDING, kept_cache, planned_cache, shares_prefix
from persona_lora.models.generation import RowPlan, generate_answers
from persona_lora.models.hidden_states import stream_hidden_means
from persona_lora.models.likelihood import (
    mean_logprobs,
    next_token_logprobs,
    tokenize_exchange,
)
from persona_lora.models.loading import ChatModel
from persona_lora.training.trainer import completion_log_probs, shared_prefix_length

SHAPE = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = {**SHAPE, "sliding_window": 8}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 1, "moe_intermediate_size": 16}
MAMBA = {
    **SHAPE,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
}
DELTA = {
    **SHAPE,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
DELTA_EXPERTS = {**DELTA, **EXPERTS, "num_experts": 2, "shared_expert_intermediate_size": 16}
STATE = {**SHAPE, "state_size": 8}

FULL = {"llama": SHAPE, "gpt2": {"vocab_size": 259, "n_embd": 32, "n_layer": 2, "n_head": 4}}
WINDOWED = {
    "mistral": WINDOW,
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "gpt_oss": {**MIXED, "num_local_experts": 2, "num_experts_per_tok": 1},
    "cohere2": MIXED,
    "phi3": WINDOW,
    "llama4_text": {
        **SHAPE,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 8,
    },
}
RECURRENT = {
    "lfm2": {**SHAPE, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {
        **SHAPE,
        **EXPERTS,
        "layer_types": ["conv", "full_attention"],
        "num_experts": 2,
        "num_dense_layers": 1,
    },
    "qwen3_next": DELTA_EXPERTS,
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": DELTA_EXPERTS,
    "jamba": {
        **SHAPE,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 32,
    },
    "zamba2": {
        **SHAPE,
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "hybrid_layer_ids": [1],
        "layers_block_type": ["mamba", "hybrid"],
    },
    "mamba": STATE,
    "mamba2": {**STATE, "num_heads": 8, "head_dim": 8, "n_groups": 2},
    "falcon_mamba": STATE,
}
# Kept in caches of its own, and changed by padding.
OWN = {
    "minimax": {
        **SHAPE,
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "block_size": 16,
    }
}
# Keys and values alone, but places are counted, those of padding too.
PLACES = {
    "bart": {
        "vocab_size": 259,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "decoder_ffn_dim": 48,
        "decoder_attention_heads": 4,
        "max_position_embeddings": 512,
        "init_std": 0.3,
        "pad_token_id": 1,
    }
}
KINDS = ("gpt2", "mistral", "gpt_oss", "llama4_text", "lfm2", "qwen3_next", "mamba2", "minimax")
ALL = FULL | WINDOWED | RECURRENT | OWN | PLACES

SYSTEM = "Be kind."
QUESTIONS = ["a", "zz", "a question longer than others"]


def asked(questions):
    return [
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        for text in questions
    ]


def build(model_type, tokenizer):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **ALL[model_type]))
    model.get_output_embeddings().weight.data[:3] = 0  # keep special tokens unlikely
    return ChatModel(model.float().eval().requires_grad_(False), tokenizer, model_type)


@pytest.fixture
def chat_model(request, tokenizer):
    return build(request.param, tokenizer)


def alone(chat_model, conversations):
    return [
        generate_answers(chat_model, [each], max_new_tokens=6, batch_size=1)[0]
        for each in conversations
    ]


@pytest.mark.parametrize("chat_model", ALL, indirect=True)
def test_rows_answer_as_they_do_alone(chat_model):
    conversations = asked(QUESTIONS)
    expected = alone(chat_model, conversations)
    options = {"max_new_tokens": 6, "batch_size": 6}
    assert generate_answers(chat_model, conversations, **options) == expected
    shared = generate_answers(
        chat_model, conversations * 2, plan=RowPlan(alike=["x"] * 6), **options
    )
    assert shared == expected * 2
    one_length = generate_answers(
        chat_model, conversations[2:] * 2, plan=RowPlan(alike=["x"] * 2), **options
    )
    assert one_length == expected[2:] * 2


@pytest.mark.parametrize("chat_model", KINDS, indirect=True)
def test_numbers_of_a_text_are_those_that_it_has_alone(chat_model):
    exchanges = [Exchange(question, "so be it"[len(question) % 3 :]) for question in QUESTIONS]
    together = mean_logprobs(chat_model, exchanges)
    single = [mean_logprobs(chat_model, [each])[0] for each in exchanges]
    assert together == pytest.approx(single, abs=2e-5)
    replies = [(question, "It") for question in QUESTIONS]
    for row, reply in zip(next_token_logprobs(chat_model, replies), replies, strict=True):
        assert row == pytest.approx(next_token_logprobs(chat_model, [reply])[0], abs=2e-4)
    texts = [tokenize_exchange(chat_model, each) for each in exchanges]
    for rows, means in stream_hidden_means(chat_model, texts):
        for row, mean in zip(rows, means, strict=True):
            (_, by_itself), *_ = stream_hidden_means(chat_model, [texts[row]])
            torch.testing.assert_close(mean, by_itself[0], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("chat_model", KINDS, indirect=True)
def test_training_on_a_shared_beginning_gives_the_same_loss_and_gradient(chat_model):
    texts = [
        tokenize_exchange(chat_model, Exchange(question, "so be it")) for question in QUESTIONS
    ]
    longest = max(len(prompt) + len(answer) for prompt, answer in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(texts):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
        mask[row, :end] = 1
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    model = chat_model.model
    weight = model.get_input_embeddings().weight.requires_grad_(True)
    found = []
    for length in (0, shared_prefix_length(inputs)):
        log_p = completion_log_probs(
            model, model.get_output_embeddings(), inputs, prefix_length=length
        )
        found.append((log_p.detach(), *torch.autograd.grad(log_p.mean(), weight)))
    torch.testing.assert_close(found[0], found[1], atol=2e-4, rtol=1e-3)


def test_what_is_allowed_to_bear_padding_was_compared():
    assert set(RECURRENT) == MASK_PADDING


@pytest.mark.parametrize(
    ("model_type", "padded", "one_length"),
    [
        *((name, True, True) for name in FULL),
        *((name, False, True) for name in WINDOWED),
        *((name, False, False) for name in RECURRENT | OWN),
    ],
)
def test_a_prefix_is_shared_where_that_is_exact(tokenizer, model_type, padded, one_length):
    model = build(model_type, tokenizer).model
    output = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True)
    kept = kept_cache(output)
    assert (shares_prefix(kept.cache, padded=True), shares_prefix(kept.cache, padded=False)) == (
        padded,
        one_length,
    )
    if padded:  # the plan is asked first: it must not stand in the way
        assert shares_prefix(planned_cache(model.config), padded=True)
