from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from persona_lora.core.errors import UserError
from persona_lora.models.loading import ChatModel
from persona_lora.training.lora import LoRAArguments, attach_lora, detach_lora, write_lora


@pytest.fixture
def chat_model(model, tokenizer) -> ChatModel:
    return ChatModel(model, tokenizer, "a-canonical-name")


def _factors(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in model.named_parameters() if "lora_" in name}


def test_same_seed_draws_the_same_a_and_b_starts_at_zero(chat_model):
    first = attach_lora(chat_model, LoRAArguments(), seed=3)
    drawn = _factors(first)
    detach_lora(first)
    again = _factors(attach_lora(chat_model, LoRAArguments(), seed=3))
    assert drawn.keys() == again.keys()
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    assert all(bool(each.any()) == ("lora_A" in name) for name, each in drawn.items())


def test_another_seed_draws_another_a(chat_model):
    first = attach_lora(chat_model, LoRAArguments(), seed=3)
    drawn = _factors(first)
    detach_lora(first)
    other = _factors(attach_lora(chat_model, LoRAArguments(), seed=4))
    assert any(not torch.equal(drawn[name], other[name]) for name in drawn)


def test_all_linear_leaves_head_and_embeddings_alone(chat_model):
    model = attach_lora(chat_model, LoRAArguments(), seed=0)
    touched = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in _factors(model)}
    assert touched == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    trainable = [name for name, each in model.named_parameters() if each.requires_grad]
    assert all(".lora_" in name for name in trainable)


def test_detached_model_has_its_old_weights_and_forward(chat_model):
    before = {name: each.clone() for name, each in chat_model.model.state_dict().items()}
    model = attach_lora(chat_model, LoRAArguments(), seed=0)
    model.get_base_model().forward = lambda: None
    base = detach_lora(model)
    assert base is chat_model.model
    assert "forward" not in vars(base)
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(each.requires_grad for each in base.parameters())


def test_written_adapter_opens_in_peft_with_the_same_logits(chat_model, tmp_path: Path):
    model = attach_lora(chat_model, LoRAArguments(lora_r=4, lora_alpha=12), seed=0)
    for name, each in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(each, std=0.1)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    write_lora(model, tmp_path / "adapter")
    names = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "a-canonical-name"
    assert config["inference_mode"] is True
    opened = PeftModel.from_pretrained(detach_lora(model), str(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(opened(input_ids=ids).logits, expected)


@pytest.mark.parametrize("given", ["q_proj, v_proj", ["q_proj,v_proj"], ["q_proj", "v_proj"]])
def test_targets_are_named_apart_or_with_commas(given):
    assert LoRAArguments(lora_target_modules=given).lora_target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lora_r": 0}, "lora_r"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"lora_target_modules": []}, "lora_target_modules"),
        ({"lora_target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"lora_target_modules": ["model.embed_tokens"]}, "embed_tokens"),
    ],
)
def test_unusable_lora_options_are_named(options, named):
    with pytest.raises(UserError, match=named):
        LoRAArguments(**options)


def test_target_modules_that_no_module_has_are_refused(chat_model):
    with pytest.raises(UserError, match=r"no_such.*a-canonical-name"):
        attach_lora(chat_model, LoRAArguments(lora_target_modules=["no_such"]), seed=0)


def test_a_rank_beyond_that_of_every_matrix_is_refused(chat_model):
    attach_lora(chat_model, LoRAArguments(lora_r=32), seed=0).unload()
    with pytest.raises(UserError, match=r"lora_r 33 is more than the rank 32 of .* lower lora_r"):
        attach_lora(chat_model, LoRAArguments(lora_r=33), seed=0)
