"""Exports round-trip: PEFT's logits, the merger's bits, llama.cpp's layout."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from safetensors.torch import load_file, save_file

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff, LoRAFactors, mix
from persona_lora.core.strength import Moved, Strengths
from persona_lora.models.loading import load_chat_model
from persona_lora.models.structure import linear_modules
from persona_lora.projections.inputs import measure_inputs
from persona_lora.steering.export import (
    Exported,
    export_gguf,
    export_gguf_lora,
    export_merged,
    export_peft,
    read_mix,
)
from persona_lora.steering.weights import LoRAMerger
from tests.conftest import tiny_llama

IDS = torch.tensor([[5, 9, 40, 77, 12]])


@pytest.fixture
def terms(model, make_diff):
    return {make_diff(model, seed=1): -1.0, make_diff(model, seed=2): 0.5}


@pytest.fixture
def base(tmp_path):
    """A base in bf16 and in shards, as published models are."""
    tiny_llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    return tmp_path / "base"


def merged_logits(model, terms):
    merger = LoRAMerger(model, allow_other_base=True)
    for diff, coefficient in terms.items():
        merger.merge_lora_diff(diff, coefficient)
    with torch.no_grad():
        return model(IDS).logits


def test_an_adapter_reloads_in_peft_with_the_merged_logits(model, terms, tmp_path):
    done = export_peft(terms, tmp_path / "adapter")
    assert (done.rank, done.energy, done.vllm_rank) == (8, 1.0, 8)
    wrapped = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    with torch.no_grad():
        logits = wrapped(IDS).logits
    assert torch.allclose(logits, merged_logits(model, terms), atol=1e-4)


def test_an_adapter_of_any_rank_has_the_least_that_vllm_takes(tmp_path):
    ranks = {1: 8, 8: 8, 9: 16, 65: 128, 128: 128, 129: 256, 321: 512, 512: 512, 513: None}
    assert {rank: Exported(tmp_path, rank).vllm_rank for rank in ranks} == ranks


def test_a_cut_adapter_states_what_it_keeps(terms, tmp_path):
    whole = LoRADiff.load(export_peft(terms, tmp_path / "whole").path)
    cut = export_peft(terms, tmp_path / "cut", rank=3)
    kept = LoRADiff.load(cut.path)
    assert cut.rank == kept.rank == 3
    gap = (whole - kept).norm() ** 2 / whole.norm() ** 2
    assert cut.energy == pytest.approx(1 - gap, rel=1e-5)


def test_a_cut_by_prompts_is_nearer_to_the_mix_on_their_inputs(chat_model, terms, tmp_path):
    inputs, whole = measure_inputs(chat_model, ["Tell me about rain.", "Which tea?"]), mix(terms)
    errors = []
    for name, cut in (("plain", {}), ("weighted", {"compress": inputs.compress})):
        done = export_peft(terms, tmp_path / name, rank=2, **cut)
        errors.append(inputs.weigh(whole - LoRADiff.load(done.path), allow_other_base=True).norm())
    assert errors[1] < 0.95 * errors[0]


def test_merged_weights_are_the_merger_s_bit_for_bit(base, terms, tmp_path):
    stale = base / "pytorch_model.bin"  # the same weights once more, which nobody merges into
    stale.write_bytes(b"0")
    done = export_merged(terms, base, tmp_path / "merged")
    stale.unlink()
    model = tiny_llama(dtype=torch.bfloat16)
    merger = LoRAMerger(model, allow_other_base=True)
    for diff, coefficient in terms.items():
        merger.merge_lora_diff(diff, coefficient)
    written = {}
    for file in sorted(done.path.glob("*.safetensors")):
        written |= load_file(file)
    expected = model.state_dict()
    for name, tensor in written.items():
        assert torch.equal(tensor, expected[name]), name
    assert {p.name for p in done.path.iterdir()} == {p.name for p in base.iterdir()}
    reloaded = load_file(sorted(base.glob("*.safetensors"))[0])
    assert any(not torch.equal(reloaded[name], written[name]) for name in reloaded)


def test_the_merged_folder_loads_like_any_model(model_folder, terms, tmp_path):
    export_merged(terms, model_folder, tmp_path / "merged")
    chat = load_chat_model(str(tmp_path / "merged"), dtype="float32")
    with torch.no_grad():
        logits = chat.model(IDS.to(chat.model.device)).logits.cpu()
    assert torch.allclose(logits, merged_logits(tiny_llama(), terms), atol=1e-5)


def test_a_tied_tensor_in_a_shard_of_its_own_goes_along(model_folder, terms, tmp_path):
    base, tensors = tmp_path / "base", load_file(model_folder / "model.safetensors")
    shutil.copytree(model_folder, base)
    (base / "model.safetensors").unlink()
    shards = {"one.safetensors": tensors}
    shards["two.safetensors"] = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    for file, held in shards.items():
        save_file(held, base / file, metadata={"format": "pt"})
    places = {name: file for file, held in shards.items() for name in held}
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    export_merged(terms, base, tmp_path / "merged")
    (head,) = load_file(tmp_path / "merged" / "two.safetensors").values()
    embedding = load_file(tmp_path / "merged" / "one.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(head, embedding)
    chat = load_chat_model(str(tmp_path / "merged"), dtype="float32")
    with torch.no_grad():
        logits = chat.model(IDS.to(chat.model.device)).logits.cpu()
    assert torch.allclose(logits, merged_logits(tiny_llama(), terms), atol=1e-5)


def test_a_coefficient_that_overflows_is_refused_with_its_weight(base, terms, tmp_path):
    huge = dict.fromkeys(terms, 3e38)
    with pytest.raises(UserError, match=r"model\.layers.*weight would hold .*3e\+38, 3e\+38; take"):
        export_merged(huge, base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_nothing_is_left_of_a_failed_export(base, terms, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "persona_lora.steering.export.save_file",
        lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")),
    )
    with pytest.raises(OSError, match="disk full"):
        export_merged(terms, base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def unpermuted(rows, heads):
    """transformers' own inverse: what it does to q and k of a GGUF when it loads one."""
    dim = rows.shape[0] // heads // 2
    return rows.reshape(heads, dim, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def test_a_gguf_lora_holds_the_mix_in_llama_cpp_s_layout(base, terms, model, tmp_path):
    done = export_gguf_lora(terms, base, tmp_path / "mix.gguf")
    reader = GGUFReader(done.path)
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    assert reader.fields["adapter.lora.alpha"].contents() == done.rank == 8
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    mixed = LoRADiff.load(export_peft(terms, tmp_path / "adapter").path)
    names = {
        "self_attn.q_proj": ("attn_q", 4),
        "self_attn.k_proj": ("attn_k", 2),
        "self_attn.o_proj": ("attn_output", None),
        "mlp.down_proj": ("ffn_down", None),
    }
    for own, (theirs, heads) in names.items():
        A = torch.from_numpy(tensors[f"blk.1.{theirs}.weight.lora_a"])
        B = torch.from_numpy(tensors[f"blk.1.{theirs}.weight.lora_b"])
        delta = B @ A if heads is None else unpermuted(B, heads) @ A
        expected = mixed.factors[f"model.layers.1.{own}"].delta()
        assert torch.allclose(delta, expected, atol=1e-5), own
    assert len(tensors) == 2 * sum("layers" in name for name in linear_modules(model))


def test_a_module_of_a_lower_rank_is_padded_to_that_of_the_mix(base, model, make_diff, tmp_path):
    diff = make_diff(model, rank=4)
    low = "model.layers.1.mlp.down_proj"
    A, B = diff.factors[low].A, diff.factors[low].B
    factors = {**diff.factors, low: LoRAFactors(A[:1], B[:, :1])}
    done = export_gguf_lora({dataclasses.replace(diff, factors=factors): 1.0}, base, tmp_path / "x")
    found = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(done.path).tensors}
    A, B = (found[f"blk.1.ffn_down.weight.lora_{side}"] for side in "ab")
    assert (A.shape[0], B.shape[1], done.rank) == (4, 4, 4)
    assert np.allclose(B @ A, factors[low].delta(), atol=1e-6)


def test_a_whole_gguf_needs_llama_cpp_s_converter(base, terms, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"convert_hf_to_gguf\.py"):
        export_gguf(terms, base, tmp_path / "x.gguf")
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(
        "import pathlib, sys\nfolder = pathlib.Path(sys.argv[1])\n"
        "count = len(list(folder.glob('*.safetensors')))\n"
        "pathlib.Path(sys.argv[3]).write_text(str(count))\n"
    )
    done = export_gguf(terms, base, tmp_path / "x.gguf", converter=script)
    assert int(done.path.read_text()) == len(list(base.glob("*.safetensors")))
    before = sorted(os.listdir(tmp_path))
    half = "import pathlib, sys\npathlib.Path(sys.argv[3]).write_text('half')\n"
    script.write_text(f"{half}sys.exit('no such layout')")
    with pytest.raises(UserError, match="no such layout"):
        export_gguf(terms, base, tmp_path / "x.gguf", converter=script)
    assert sorted(os.listdir(tmp_path)) == before
    assert done.path.read_text() != "half"


def test_an_export_takes_no_folder_of_something_else(base, terms, tmp_path):
    kept = tmp_path / "out" / "thesis.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    for export in (export_peft, partial(export_merged, base=base)):
        with pytest.raises(UserError, match=r"out holds thesis\.txt, which would be lost; choose"):
            export(terms, folder=kept.parent)
        with pytest.raises(UserError, match=r"thesis\.txt is a file, expected a folder"):
            export(terms, folder=kept)
    assert os.listdir(kept.parent) == ["thesis.txt"]
    assert kept.read_text() == "mine"
    export_peft(terms, tmp_path / "adapter")
    export_peft(terms, tmp_path / "adapter")  # its own is replaced


def test_mixes_are_read_by_trait_or_path(model, make_diff, tmp_path):
    make_diff(model, seed=1).save(tmp_path / "evil" / "diff")
    make_diff(model, seed=2).save(tmp_path / "else")
    make_diff(model, seed=3).save(tmp_path / "My Drive" / "third")
    third = tmp_path / "My Drive" / "third"
    terms = read_mix(f"evil=-1, {tmp_path / 'else'}=0.5, {third}=2", tmp_path)
    assert {diff.trait: value for diff, value in terms.items()} == {
        "trait1": -1.0,
        "trait2": 0.5,
        "trait3": 2.0,
    }
    content = LoRADiff.load(third).content()
    Strengths(content, "", "", (Moved(2.0, 0.04, 1.0),)).save(third)
    ((_, value),) = read_mix(f"{third}=0.01nat", tmp_path).items()
    assert value == pytest.approx(1.0)
    with pytest.raises(UserError, match=r"nats of .*evil/diff were not measured"):
        read_mix("evil=0.01nat", tmp_path)
    for text in ("evil", "evil=much", "evil=0.01nut", "=1", "evil=1 evil=-0.5"):
        with pytest.raises(UserError, match=r"a mix is like .*, with commas, got"):
            read_mix(text, tmp_path)
    for text in ("", "evil=0"):
        with pytest.raises(UserError, match="mix"):
            read_mix(text, tmp_path)


def test_a_mix_of_parts_is_read_as_a_search_names_them(model, make_diff, tmp_path):
    """Both layers, and both kinds of block, of one diff are that diff."""
    whole = make_diff(model, seed=1)
    whole.save(tmp_path / "evil" / "diff")
    for parts in ("evil@0-0=2,evil@1-1=2", "evil@mlp=2,evil@self_attn=2"):
        held = LoRADiff.load(export_peft(read_mix(parts, tmp_path), tmp_path / "out").path)
        assert held.factors.keys() == whole.factors.keys()
        for module, each in held.factors.items():
            assert torch.allclose(each.delta(), 2 * whole.factors[module].delta(), atol=1e-5)
    ((first, _),) = read_mix("evil@0-0=1", tmp_path).items()
    assert all(".0." in module for module in first.factors)
    with pytest.raises(UserError, match="changes nothing in 'attn'; known: mlp, self_attn"):
        read_mix("evil@attn=1", tmp_path)
    with pytest.raises(UserError, match="were not measured"):
        read_mix("evil@mlp=0.01nat", tmp_path)


def test_other_models_and_layouts_are_named(base, terms, make_diff, tmp_path):
    wide = tiny_llama()
    strange = LoRADiff(
        {"model.layers.9.self_attn.q_proj": next(iter(make_diff(wide).factors.values()))},
        next(iter(terms)).base_model,
    )
    with pytest.raises(UserError, match=r"model\.layers\.9.*no such weight"):
        export_merged({strange: 1.0}, base, tmp_path / "x")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(UserError, match="'mamba'"):
        export_gguf_lora(terms, base, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
