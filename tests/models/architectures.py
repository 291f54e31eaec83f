"""Tiny random models of every family, built by transformers from configurations alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

VOCABULARY = 259  # that of the byte tokenizer
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # large enough that layers matter and answers are not copies
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
SMALL_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {**SHAPE, "head_dim": 8}
WINDOWED = {**TEXT, "sliding_window": 16}
STATE_SPACE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 8,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ALTERNATING = ["sliding_attention", "full_attention"]
GEMMA_4: dict[str, Any] = {
    **WINDOWED,
    "layer_types": ALTERNATING,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "global_head_dim": 8,
}

# By the name in the documentation: transformers' model type, and what its configuration takes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {**SHAPE, "tie_word_embeddings": True}),
    "Qwen2": ("qwen2", SHAPE),
    "Qwen3": ("qwen3", TEXT),
    "Qwen3-MoE": ("qwen3_moe", {**TEXT, **EXPERTS, "num_experts": 4}),
    "Qwen2-MoE": (
        "qwen2_moe",
        {**SHAPE, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "Qwen3-Next": (
        "qwen3_next",
        {
            **TEXT,
            **EXPERTS,
            "num_experts": 4,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "Qwen3.5 text": (
        "qwen3_5_text",
        {
            **TEXT,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [1, 1, 0],
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "Gemma 2": ("gemma2", {**WINDOWED, "query_pre_attn_scalar": 8}),
    "Gemma 3 text": ("gemma3_text", {**WINDOWED, "query_pre_attn_scalar": 8}),
    "Gemma 3": (
        "gemma3",
        {
            "text_config": {**WINDOWED, "query_pre_attn_scalar": 8},
            "vision_config": SMALL_VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 5,
            "boi_token_index": 6,
            "eoi_token_index": 7,
        },
    ),
    "Gemma": ("gemma", TEXT),
    "Gemma 4 text": (
        "gemma4_text",
        {
            **GEMMA_4,
            "num_hidden_layers": 4,
            "layer_types": ALTERNATING * 2,
            "num_kv_shared_layers": 2,
        },
    ),
    "Gemma 4 MoE": (
        "gemma4_text",
        {
            **GEMMA_4,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
        },
    ),
    "Gemma 4": (
        "gemma4",
        {
            "text_config": GEMMA_4,
            "vision_config": {**SMALL_VISION, "num_key_value_heads": 2, "head_dim": 8},
            "audio_config": None,
            "image_token_id": 240,  # no text of the tests holds them
            "video_token_id": 241,
            "audio_token_id": 242,
            "boi_token_id": 243,
            "eoi_token_id": 244,
            "boa_token_id": 245,
        },
    ),
    "Qwen2.5-VL": (
        "qwen2_5_vl",
        {
            "text_config": {
                **SHAPE,
                "rope_parameters": {
                    "rope_type": "default",
                    "mrope_section": [2, 1, 1],
                    "rope_theta": 1e4,
                },
            },
            "vision_config": {
                "depth": 3,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [2],
            },
            "image_token_id": 5,
            "video_token_id": 6,
            "vision_start_token_id": 7,
            "vision_end_token_id": 8,
        },
    ),
    "Mistral": ("mistral", WINDOWED),
    "Mistral 3": (
        "mistral3",
        {
            "text_config": {**TEXT, "model_type": "mistral"},
            "vision_config": {**SMALL_VISION, "model_type": "pixtral", "head_dim": 8},
            "image_token_index": 5,
        },
    ),
    "Mixtral": ("mixtral", {**SHAPE, "num_experts_per_tok": 2, "num_local_experts": 4}),
    "gpt-oss": (
        "gpt_oss",
        {
            **WINDOWED,
            "num_experts_per_tok": 2,
            "num_local_experts": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "Cohere 2": (
        "cohere2",
        {**WINDOWED, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Phi-3": ("phi3", SHAPE),
    "Phi-3 longrope": (
        "phi3",
        {
            **SHAPE,
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.0, 1.0, 1.0],
                "long_factor": [1.0, 2.0, 4.0, 8.0],
            },
        },
    ),
    "OLMo 2": ("olmo2", SHAPE),
    "Granite": ("granite", SHAPE),
    "SmolLM3": ("smollm3", SHAPE),
    "GPT-NeoX": ("gpt_neox", SHAPE),
    "GPT-Neo": (
        "gpt_neo",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["local", "global"], 1]],
            "window_size": 32,
            "max_position_embeddings": 512,
            "initializer_range": 0.3,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
    ),
    "GPT-2": (
        "gpt2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 512,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "initializer_range": 0.3,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
    ),
    "OPT": (
        "opt",
        {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3, "dropout": 0.0},
    ),
    "Falcon": ("falcon", {**SHAPE, "new_decoder_architecture": False, "alibi": False}),
    "BLOOM": (
        "bloom",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 0.3,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
    ),
    "MPT": (
        "mpt",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 512,
            "initializer_range": 0.3,
        },
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        {
            **SHAPE,
            **EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "Llama 4 text": (
        "llama4_text",
        {
            **TEXT,
            "intermediate_size": 16,
            "intermediate_size_mlp": 48,
            "num_experts_per_tok": 1,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 64,
        },
    ),
    "Jamba": (
        "jamba",
        {
            **SHAPE,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "Mamba": ("mamba", STATE_SPACE),
    "Mamba 2": ("mamba2", {**STATE_SPACE, "num_heads": 8, "head_dim": 8, "n_groups": 2}),
    "Falcon Mamba": ("falcon_mamba", STATE_SPACE),
    "MiniMax": (
        "minimax",
        {
            **TEXT,
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts_per_tok": 2,
            "num_local_experts": 4,
            "block_size": 16,
        },
    ),
    "LFM2": (
        "lfm2",
        {
            **SHAPE,
            "layer_types": ["conv", "full_attention"],
            "block_multiple_of": 16,
        },
    ),
}


# Not among the language models of transformers: their text part is reached through another class.
IMAGE_MODELS = ("Qwen2.5-VL", "Mistral 3")


def tiny_model(family: str, *, seed: int = 0) -> PreTrainedModel:
    """Return a random model of a family in fp32, frozen and in evaluation mode."""
    model_type, settings = FAMILIES[family]
    torch.manual_seed(seed)
    auto = AutoModelForImageTextToText if family in IMAGE_MODELS else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(model_type, **settings))
    model.get_output_embeddings().weight.data[:3] = 0  # keep special tokens unlikely
    return model.eval().requires_grad_(False)
