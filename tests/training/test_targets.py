from __future__ import annotations

import functools
import logging

import pytest
from peft.tuners.lora import LoraLayer

from persona_lora.core.errors import UserError
from persona_lora.models.loading import ChatModel
from persona_lora.models.structure import text_decoder
from persona_lora.training.lora import LoRAArguments, attach_lora, lora_targets
from tests.conftest import byte_tokenizer
from tests.models.architectures import FAMILIES, tiny_model


def chat_model(family: str) -> ChatModel:
    return ChatModel(tiny_model(family), byte_tokenizer(), family)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_goes_on_linear_modules_of_the_text_decoder_alone(family):
    chat = chat_model(family)
    inside = text_decoder(chat.model).blocks_name
    wrapped = attach_lora(chat, LoRAArguments(lora_r=2), seed=0)
    modules = dict(wrapped.named_modules())
    layers = {name: each for name, each in modules.items() if isinstance(each, LoraLayer)}
    routers = [name for name, each in modules.items() if "Router" in type(each).__name__]
    assert layers
    for name, layer in layers.items():
        assert name.startswith(f"base_model.model.{inside}.")
        assert layer.lora_A["default"].weight.shape[1] == layer.in_features
        assert not any(f"{name}.".startswith(f"{router}.") for router in routers)
        assert "Router" not in type(layer.get_base_layer()).__name__
    assert not wrapped.peft_config["default"].target_parameters


def test_stacked_experts_are_left_out_and_named(caplog):
    with caplog.at_level(logging.WARNING):
        targets = lora_targets(chat_model("Mixtral"), ["all-linear"])
    assert {name.rpartition(".")[2] for name in targets} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "stacked experts (down_proj, gate_up_proj) have no plain difference" in caplog.text


def test_what_peft_refuses_is_left_out_and_named(caplog):
    with caplog.at_level(logging.WARNING):
        targets = lora_targets(chat_model("Mamba"), ["all-linear"])
    assert {name.rpartition(".")[2] for name in targets} == {"in_proj", "x_proj"}
    assert "PEFT puts none on out_proj of this model" in caplog.text


def test_what_a_training_pass_reads_without_a_call_is_no_target():
    """As fused kernels do, in training alone."""
    chat = chat_model("Llama")

    def fused(module, hidden):
        weight = module.down_proj.weight
        inner = module.act_fn(module.gate_proj(hidden)) * module.up_proj(hidden)
        return inner @ weight.T if module.training else module.down_proj(inner)

    for block in text_decoder(chat.model).module.layers:
        block.mlp.forward = functools.partial(fused, block.mlp)
    assert "down_proj" not in {
        name.rpartition(".")[2] for name in lora_targets(chat, ["all-linear"])
    }
    assert not any(each.training for each in chat.model.modules())


@pytest.mark.parametrize(
    ("family", "asked", "message"),
    [
        # Names of experts in older releases, which PEFT understands and puts on stacked weights.
        ("DeepSeek-V3", ["gate_proj", "up_proj", "down_proj"], "stacked experts of DeepSeek-V3"),
        ("DeepSeek-V3", ["o_proj", "down_proj"], r"use all-linear, or of kv_a_proj_with_mqa, "),
        ("Mixtral", ["w1", "w2", "w3"], "w1, w2, w3 fit no linear module .* k_proj, o_proj"),
        ("Gemma 3", ["q_proj", "fc1"], "lora_target_modules fc1 fit no linear module in the"),
        (
            "Mamba",
            ["in_proj", "out_proj"],
            "refuses them; use all-linear, or of in_proj, x_",
        ),
        ("Llama", ["c_attn"], "c_attn fit no linear module .* it has down_proj, gate_proj, k_proj"),
    ],
)
def test_what_has_no_plain_difference_is_refused_at_once(family, asked, message):
    with pytest.raises(UserError, match=message):
        lora_targets(chat_model(family), asked)


def test_names_and_endings_choose_modules_of_the_decoder():
    targets = lora_targets(chat_model("Gemma 3"), ["q_proj", "layers.1.mlp.up_proj"])
    assert targets == [
        "model.language_model.layers.0.self_attn.q_proj",
        "model.language_model.layers.1.self_attn.q_proj",
        "model.language_model.layers.1.mlp.up_proj",
    ]
