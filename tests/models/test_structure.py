from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from persona_lora.core.errors import UserError
from persona_lora.models.structure import (
    context_window,
    decoder_layers,
    decoder_linear_modules,
    features,
    input_groups,
    kind_of,
    linear_modules,
    longrope_crossing,
    stacked_weights,
    text_decoder,
    tied_names,
    weight_fingerprint,
    weight_of,
)
from persona_lora.models.weight_files import model_on_disk
from tests.models.architectures import FAMILIES, TEXT, tiny_model


def test_names_are_the_same_under_a_peft_wrapper(make_model):
    plain = make_model()
    names = set(linear_modules(plain))
    assert len(names) == 2 * 7 + 1
    wrapped = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear"))
    assert set(linear_modules(wrapped)) == names
    assert len(decoder_layers(wrapped)) == len(decoder_layers(plain)) == 2
    assert weight_fingerprint(wrapped) == weight_fingerprint(plain)


def test_the_fingerprint_ignores_dtype_and_sees_a_small_change(make_model):
    saved = make_model(dtype=torch.bfloat16)
    reference = weight_fingerprint(saved)
    for dtype in (torch.float32, torch.float16):
        assert weight_fingerprint(make_model(dtype=torch.bfloat16).to(dtype)) == reference
    assert weight_fingerprint(make_model(seed=1, dtype=torch.bfloat16)) != reference
    for parameter in saved.parameters():
        parameter.data *= 1.02
    assert weight_fingerprint(saved) != reference


def test_tied_weights_are_found(make_model):
    assert tied_names(make_model(tied=True)) == {"lm_head": ["model.embed_tokens"]}
    assert tied_names(make_model(tied=False)) == {}


def test_modules_that_share_an_input_are_grouped(model):
    names = [name for name in linear_modules(model) if name != "lm_head"]
    groups = input_groups(names)
    assert sorted(len(group) for group in groups) == [1, 1, 1, 1, 2, 2, 3, 3]
    assert sorted(name for group in groups for name in group) == sorted(names)
    seen = {}

    def remember(module, arguments, name):
        seen[name] = id(arguments[0])

    for name, module in linear_modules(model).items():
        module.register_forward_pre_hook(lambda m, a, name=name: remember(m, a, name))
    model(torch.arange(8)[None])
    for group in groups:
        assert len({seen[name] for name in group}) == 1


@pytest.mark.parametrize("family", ["Gemma 3", "Llama 4 text", "OPT", "GPT-2"])
def test_the_decoder_is_the_one_that_reads_text(family):
    """Not a vision tower's, and found where transformers' accessor gives the whole model."""
    model = tiny_model(family)
    decoder = text_decoder(model)
    order = []
    for block in decoder.blocks:
        block.register_forward_hook(lambda block, *_: order.append(block))
    decoder.module(torch.arange(3, 8)[None])
    assert order == decoder.blocks
    assert (
        len(order) == len(decoder_layers(model)) == model.config.get_text_config().num_hidden_layers
    )
    assert all(name.startswith(decoder.blocks_name) for name in decoder_linear_modules(model))


def test_a_model_without_one_stack_of_blocks_is_refused():
    model = tiny_model("Llama")
    model.config.num_hidden_layers = 3
    with pytest.raises(UserError, match=r"no stack of 3 decoder layers; .*docs/models\.md"):
        decoder_layers(model)
    with pytest.raises(UserError, match="no decoder layers found in a Linear"):
        decoder_layers(torch.nn.Linear(2, 2))


def test_a_transposed_weight_is_read_and_written_as_out_by_in():
    model = tiny_model("GPT-2")
    module = linear_modules(model)["transformer.h.0.mlp.c_fc"]
    out, width = features(module)
    assert weight_of(module).shape == (out, width) == (128, 32)
    inputs = torch.randn(3, width)
    expected = torch.nn.functional.linear(inputs, weight_of(module), module.bias)
    torch.testing.assert_close(module(inputs), expected)
    weight_of(module).zero_()
    assert not module.weight.any()


@pytest.mark.parametrize("family", ["GPT-2", "Qwen3-MoE", "LFM2"])
def test_the_fingerprint_sees_every_weight_of_a_block(family):
    """Transposed ones, routers, stacked experts and convolutions too."""
    for block in decoder_layers(tiny_model(family)):
        for name, parameter in block.named_parameters():
            if parameter.ndim < 2:
                continue
            model = tiny_model(family)
            before = weight_fingerprint(model)
            decoder_layers(model)[0].get_parameter(name).mul_(1.1)
            assert weight_fingerprint(model) != before, name
        break


JOINED = {"Qwen2-MoE", "Qwen3-MoE", "Qwen3-Next", "MiniMax", "Mixtral", "DeepSeek-V3", "Jamba"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fingerprint_is_read_off_weights_on_disk_or_not_at_all(family, tmp_path):
    """Experts that lie one by one on disk are joined in a model that is loaded."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    found = model_on_disk(str(tmp_path))
    assert (found is None) == (family in JOINED)
    if found is not None:
        assert linear_modules(found).keys() == linear_modules(model).keys()
        assert weight_fingerprint(found) == weight_fingerprint(model)
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    assert model_on_disk(str(tmp_path)) is None


def test_the_fingerprint_does_not_depend_on_where_weights_lie(tmp_path):
    model = tiny_model("Qwen3-MoE")
    expected = weight_fingerprint(model)
    assert weight_fingerprint(cpu_offload(tiny_model("Qwen3-MoE"))) == expected
    assert weight_fingerprint(disk_offload(tiny_model("Qwen3-MoE"), tmp_path)) == expected
    with pytest.raises(UserError, match=r"layers\.0.* is on the meta device and holds no numbers"):
        weight_fingerprint(model.to("meta"))


def test_experts_one_below_the_other_are_stacked_as_those_of_three_dimensions_are():
    settings = {
        "vocab_size": 9,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 1,
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "hidden_size": 32},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("dbrx", **settings))
    found = {name.removeprefix("transformer.blocks.0.ffn.") for name in stacked_weights(model)}
    assert found == {"experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2"}
    assert {kind_of(name) for name in stacked_weights(tiny_model("gpt-oss"))} == {
        "gate_up_proj",
        "down_proj",
    }
    assert not stacked_weights(tiny_model("LFM2"))


LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.0, 1.0, 1.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 128,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LAYERS = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("model_type", "settings", "crossing"),
    [
        ("llama", {"rope_parameters": LONG}, 128),
        ("llama", {"rope_scaling": {**LONG, "type": "longrope"}}, 128),
        ("gemma3_text", {"rope_parameters": dict(zip(LAYERS, (PLAIN, LONG), strict=True))}, 128),
        ("llava", {"text_config": {**TEXT, "model_type": "llama", "rope_parameters": LONG}}, 128),
        ("phi3", {"rope_parameters": LONG}, None),  # its own original length, 4096, stands above
        ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 100}, 100),
        ("llama", {"rope_parameters": {**LONG, "long_factor": LONG["short_factor"]}}, None),
        (
            "llama",
            {
                "rope_parameters": {
                    **LONG,
                    "long_factor": LONG["short_factor"],
                    "short_mscale": 1.2,
                    "long_mscale": 1.3,
                }
            },
            128,
        ),
        ("llama", {"rope_parameters": {**LONG, "original_max_position_embeddings": 512}}, None),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, None),
        ("llama", {}, None),
    ],
)
def test_the_window_of_a_longrope_model_ends_where_its_table_changes(
    model_type, settings, crossing
):
    own = settings if "text_config" in settings else {**TEXT, **settings}
    config = AutoConfig.for_model(model_type, **copy.deepcopy(own))
    assert longrope_crossing(config) == crossing
    assert context_window(config) == (crossing or 512)


@pytest.mark.parametrize(
    ("rope", "window"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 4.0}, 2048),
        ({"rope_type": "dynamic", "factor": 4.0}, 512),  # turns all rows otherwise beyond it
        ({"rope_type": "linear", "factor": 4.0}, 512),  # may be scaled already
    ],
)
def test_yarn_reads_as_far_as_its_factor(rope, window):
    given = {**TEXT, "rope_parameters": {"rope_theta": 1e4, **rope}}
    assert context_window(AutoConfig.for_model("llama", **given)) == window
