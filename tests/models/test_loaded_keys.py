"""A checkpoint that is not whole is refused: no weight is random, none is dropped in silence."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from persona_lora.core.errors import UserError
from persona_lora.models.loading import load_chat_model

QUERY = "model.layers.0.self_attn.q_proj"


def renamed(change):
    return lambda weights: {change(name): tensor for name, tensor in weights.items()}


def without(*names):
    return lambda weights: {n: tensor for n, tensor in weights.items() if n not in names}


def with_(name, *shape):
    return lambda weights: {**weights, name: torch.zeros(*shape)}


REFUSED = {
    "missing": (without(f"{QUERY}.weight"), f"lacks {QUERY}.weight"),
    "no embeddings": (without("model.embed_tokens.weight"), "lacks lm_head.weight"),
    "compiled": (renamed(lambda name: f"_orig_mod.{name}"), "holds _orig_mod.model"),
    "renamed": (renamed(lambda name: name.replace("q_proj", "query")), "self_attn.query"),
    "a bias": (with_(f"{QUERY}.bias", 32), f"holds {QUERY}.bias"),
    "an unmerged LoRA": (with_(f"{QUERY}.lora_A.weight", 4, 32), "lora_A"),
    "a further layer": (with_("model.layers.2.mlp.up_proj.weight", 64, 32), r"layers\.2"),
    "a bias of the head": (with_("lm_head.bias", 259), r"lm_head\.bias"),
    "padded": (with_("model.embed_tokens.weight", 264, 32), r"\[264, 32\], and \[259, 32\]"),
}
TAKEN = {
    "as it is": (without(), ""),
    "buffers": (with_("model.layers.0.self_attn.rotary_emb.inv_freq", 4), ""),
    "a value head": (with_("v_head.summary.weight", 1, 32), "v_head.summary.weight left out"),
}


@pytest.fixture
def changed(model_folder, tmp_path):
    def change(what):
        folder = tmp_path / "changed"
        shutil.copytree(model_folder, folder)
        file = folder / "model.safetensors"
        save_file(what(load_file(file)), file, metadata={"format": "pt"})
        return str(folder)

    return change


@pytest.mark.parametrize("what", REFUSED)
def test_a_checkpoint_with_a_gap_or_a_stray_weight_is_refused(changed, what):
    change, message = REFUSED[what]
    with pytest.raises(UserError, match=message):
        load_chat_model(changed(change), dtype="float32")


@pytest.mark.parametrize("what", TAKEN)
def test_what_is_apart_from_the_model_is_left_out_and_named(changed, caplog, what):
    change, warned = TAKEN[what]
    model = load_chat_model(changed(change), dtype="float32").model
    assert torch.isfinite(model(torch.arange(9, device=model.device)[None]).logits).all()
    assert warned in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed(lambda name: f"base_model.model.{name}"), r"does not put model\.layers"),
        (renamed(lambda name: name.replace("q_proj", "query")), r"layers\.0\.self_attn\.query"),
        (
            lambda weights: {n: t for n, t in weights.items() if "q_proj" not in n},
            r"does not put model\.layers",
        ),
    ],
)
def test_an_adapter_that_peft_would_apply_in_part_is_refused(
    model_folder, model, make_adapter, tmp_path, change, message
):
    adapter = make_adapter(tmp_path / "adapter", model, seed=1)
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        load_chat_model(str(model_folder), adapter=adapter, dtype="float32")


def test_an_adapter_of_a_larger_model_is_refused(model_folder, model, make_adapter, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", model, seed=1, target_modules=["q_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", "k_proj"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"does not put model\.layers"):
        load_chat_model(str(model_folder), adapter=adapter, dtype="float32")
