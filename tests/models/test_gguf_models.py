"""GGUF files: the same numbers and tokens as the model they were written from, or a refusal.

Files are written here by llama.cpp's conventions with its own writer, from tiny random models.
"""

from __future__ import annotations

import dataclasses

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from persona_lora.core.errors import UserError
from persona_lora.models import gguf_models
from persona_lora.models.gguf_models import gguf_folder
from persona_lora.models.loading import load_chat_model, model_source
from tests.conftest import CHAT_TEMPLATE, SPECIAL_TOKENS

TOKENS = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
SIZES = {
    "vocab_size": len(TOKENS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.4,
    "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": False}),
    # The width of its heads is in no file that has the usual one.
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": True, "head_dim": 128}),
}


@dataclasses.dataclass
class Changes:
    """What a file says or holds otherwise than the model it is written from."""

    fields: dict = dataclasses.field(default_factory=dict)
    tensors: dict = dataclasses.field(default_factory=dict)
    pre: str = "gpt-2"
    template: str | None = CHAT_TEMPLATE


def tiny(kind):
    model_class, config_class, more = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **more})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def reference_tokenizer():
    vocabulary = {token: at for at, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def write_gguf(path, model, changes=None):
    """Write a model as llama.cpp's converter does: rows of q and k interleaved for llama."""
    changes = changes or Changes()
    config = model.config
    name = config.model_type
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if name == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL_TOKENS) + [1] * (len(TOKENS) - len(SPECIAL_TOKENS)))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    if changes.template is not None:
        writer.add_chat_template(changes.template)
    for key, value in changes.fields.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], config.num_hidden_layers)
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for part, heads in (("q_proj", SIZES["num_attention_heads"]), ("k_proj", 2)):
            if name == "llama" and part in key:
                weight = weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2)
                weight = weight.reshape(-1, SIZES["hidden_size"])
        stem, _, leaf = key.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{leaf}", weight.contiguous().numpy())
    for key, values in changes.tensors.items():
        writer.add_tensor(key, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_factors(model):
    """The divisors that llama.cpp's converter writes, from transformers' own frequencies."""
    scaled = model.model.rotary_emb.inv_freq
    number = SIZES["head_dim"] // 2
    plain = LLAMA3["rope_theta"] ** (-torch.arange(number) / number)
    return (plain / scaled).float()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_models, "models_cache", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_the_model_it_was_written_from(kind, cache, tmp_path):
    model = tiny(kind)
    more = {"rope_freqs.weight": llama3_factors(model)} if kind == "llama3" else {}
    path = write_gguf(tmp_path / "my model.gguf", model, Changes(tensors=more))
    chat_model = load_chat_model(str(path), dtype="float32", device_map="cpu")
    assert chat_model.name == str(path)
    tokens = torch.arange(3, 130)[None]
    with torch.no_grad():
        assert torch.allclose(chat_model.model(tokens).logits, model(tokens).logits, atol=1e-4)
    text = "cab 12, naïve\n  ab<|im_end|>"
    expected = reference_tokenizer()(text)["input_ids"]
    assert chat_model.tokenizer(text, add_special_tokens=False)["input_ids"] == expected
    assert chat_model.render([{"role": "user", "content": "hi"}]).endswith("assistant\n")


def test_a_file_is_converted_once_and_known_by_its_content(cache, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", tiny("llama"))
    folder = model_source(str(path))
    convert = gguf_models.convert_gguf
    monkeypatch.setattr(gguf_models, "convert_gguf", None)
    moved = path.rename(tmp_path / "moved.GGUF")
    assert model_source(str(moved)) == folder
    monkeypatch.setattr(gguf_models, "convert_gguf", convert)
    other = tiny("llama")
    other.model.norm.weight.data += 1
    assert model_source(str(write_gguf(tmp_path / "tiny.gguf", other))) != folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (Changes(fields={"general.type": "adapter"}), "is a LoRA"),
        (Changes(fields={"general.type": "mmproj"}), "no language model"),
        (Changes(fields={"split.count": 2}), "one part of several"),
        (Changes(template=None), "no chat template"),
        (Changes(pre="starcoder"), "cuts text as 'starcoder'"),
        (Changes(pre="qwen35"), "cuts text as 'qwen35'"),
        (Changes(fields={"llama.rope.scaling.type": "yarn"}), "rope.scaling.type = yarn"),
        (Changes(fields={"llama.expert_count": 8}), "expert_count = 8"),
        (Changes(fields={"llama.something.new": 3}), "something.new = 3"),
        (Changes(tensors={"blk.0.attn_q.bias": torch.ones(32)}), "a part would be lost"),
        (Changes(tensors={"rope_freqs.weight": torch.full((4,), 7.0)}), "scales its positions"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_would_not_be_the_same_model_is_refused(changes, message, cache, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny("llama"), changes)
    with pytest.raises(UserError, match=message):
        gguf_folder(path, cache)
    assert not [each for each in cache.glob("*") if each.suffix != ".lock"]


def test_what_is_no_whole_file_is_refused(cache, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny("llama"))
    whole = path.read_bytes()
    for number, length in enumerate((0, 3, 20, 500, len(whole) // 2, len(whole) - 100)):
        cut = tmp_path / f"cut{number}.gguf"
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"cut{number}.*(truncated|no GGUF)"):
            gguf_folder(cut, cache)
    with pytest.raises(UserError, match="does not exist"):
        gguf_folder(tmp_path / "none.gguf", cache)
    part = path.rename(tmp_path / "big-00001-of-00003.gguf")
    with pytest.raises(UserError, match="one part of several"):
        gguf_folder(part, cache)


def test_an_architecture_that_transformers_does_not_read_is_refused(cache, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "oddball")
    writer.add_chat_template(CHAT_TEMPLATE)
    writer.add_tensor("token_embd.weight", torch.ones(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"transformers cannot read .*oddball"):
        gguf_folder(tmp_path / "odd.gguf", cache)


def test_a_folder_of_gguf_files_names_them(tmp_path):
    (tmp_path / "a.gguf").touch()
    with pytest.raises(UserError, match=r"name a file in it: a\.gguf"):
        model_source(str(tmp_path))
