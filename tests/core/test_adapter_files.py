"""An adapter is read as PEFT applies it, or refused: no field, name or tensor is passed over."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from persona_lora.core import adapter_config
from persona_lora.core.adapter_config import FREE, REFUSED
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.models.loaded_model import peft_config

QUERY = "model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(model, make_adapter, tmp_path):
    return make_adapter(tmp_path / "adapter", model, seed=3, target_modules=["q_proj", "up_proj"])


def configure(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite(folder, change):
    tensors = change(load_file(folder / WEIGHTS))
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / WEIGHTS)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.up_proj": 32}},
        {"alpha_pattern": {r"layers\.1\..*": 2, "up_proj": 16}},
        {"rank_pattern": {"^model.*q_proj": 8, "q_proj": 2}},
        {"target_modules": r".*\.(q|k)_proj", "layers_to_transform": None},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"exclude_modules": ["model.layers.0.mlp.up_proj"], "bias": "none"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False},
    ],
    ids=str,
)
def test_deltas_are_those_of_peft(model, make_adapter, tmp_path, settings):
    folder = make_adapter(tmp_path / "a", model, seed=1, **settings)
    ours = LoRADiff.load(folder).factors
    wrapped = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    layers = {n: m for n, m in wrapped.named_modules() if isinstance(m, LoraLayer)}
    assert len(ours) == len(layers)
    for name, layer in layers.items():
        delta = ours[name.removeprefix("base_model.model.")].delta()
        assert torch.allclose(delta, layer.get_delta_weight("default"), atol=1e-6), name


CHECKED = {"peft_type", "bias", "init_lora_weights", "r", "lora_alpha", "use_rslora"} | {
    *("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"),
    *("layers_to_transform", "base_model_name_or_path"),
}
FIELDS = {field.name for field in dataclasses.fields(LoraConfig)}


@pytest.mark.parametrize("field", [*sorted(FIELDS - FREE | CHECKED & FIELDS), "later_field"])
def test_every_field_that_changes_what_an_adapter_does_is_refused_by_name(adapter, field):
    """Also those that a later PEFT brings; {"odd": {}} is a value that no field is neutral at."""
    configure(adapter, **{field: {"odd": {}}})
    with pytest.raises(UserError) as caught:
        LoRADiff.load(adapter)
    named = REFUSED.get(field, ({"peft_type": "adapter", "bias": "bias"}.get(field, field), ""))
    assert named[0] in str(caught.value)


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "new", 2, {}]
)
def test_a_start_that_moves_the_base_asks_for_a_conversion(adapter, start):
    configure(adapter, init_lora_weights=start)
    with pytest.raises(UserError, match=r"path_initial_model_for_weight_conversion"):
        LoRADiff.load(adapter)


def renamed(change):
    return lambda tensors: {change(name): each for name, each in tensors.items()}


def prefixed(wrapping):
    return renamed(lambda name: wrapping + name)


def inside(wrapping):
    return renamed(lambda name: name.replace("base_model.model.", f"base_model.model.{wrapping}"))


@pytest.mark.parametrize(
    "change",
    [
        prefixed("base_model.model."),
        prefixed("_orig_mod."),
        inside("_orig_mod."),
        inside("base_model.model._fsdp_wrapped_module."),
        renamed(lambda name: name.removeprefix("base_model.model.")),
        renamed(lambda name: name.replace(".weight", ".default.weight")),
    ],
)
def test_names_that_wrappers_left_behind_are_read(adapter, change):
    plain = LoRADiff.load(adapter)
    rewrite(adapter, change)
    for on_disk in (False, True):
        found = LoRADiff.load(adapter, on_disk=on_disk)
        assert found.factors.keys() == plain.factors.keys()
        assert torch.equal(found.factors[QUERY].B, plain.factors[QUERY].B)


def test_a_bin_file_is_read_with_its_configuration(adapter):
    plain = LoRADiff.load(adapter)
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    for path in (adapter, adapter / "adapter_model.bin"):
        assert torch.equal(LoRADiff.load(path).factors[QUERY].B, plain.factors[QUERY].B)


A_KEY, B_KEY = (f"base_model.model.{QUERY}.lora_{side}.weight" for side in "AB")
BROKEN = {
    "A alone": (lambda t: {k: v for k, v in t.items() if k != B_KEY}, "only one of lora_A"),
    "not gathered": (lambda t: {**t, A_KEY: torch.zeros(0)}, "not gathered"),
    "whole numbers": (lambda t: {**t, A_KEY: t[A_KEY].char()}, r"torch\.int8"),
    "eight bits, without their scale": (
        lambda t: {**t, A_KEY: t[A_KEY].to(torch.float8_e4m3fn)},
        r"torch\.float8_e4m3fn",
    ),
    "another rank": (lambda t: {**t, A_KEY: t[A_KEY][:2]}, "rank 2, and 4"),
    "shapes": (lambda t: {**t, B_KEY: t[B_KEY][:, :2]}, "do not multiply"),
    "a vector": (lambda t: {**t, A_KEY: t[A_KEY][0]}, "rank"),
    "NaN": (lambda t: {**t, B_KEY: t[B_KEY] * float("nan")}, "NaN or infinity"),
    "two adapters": (
        lambda t: {**t, A_KEY.replace("lora_A", "lora_A.other"): t[A_KEY]},
        "two adapters of one module",
    ),
    "one module twice": (
        lambda t: {**t, f"_orig_mod.{A_KEY}": t[A_KEY]},
        "two adapters of one module",
    ),
    "not a target": (
        renamed(lambda name: name.replace("up_proj", "gate_proj")),
        "its configuration leaves out",
    ),
    "a magnitude": (
        lambda t: {**t, A_KEY.replace("lora_A.weight", "lora_magnitude_vector"): t[A_KEY]},
        "not a plain LoRA factor",
    ),
    "a base weight": (
        lambda t: {**t, f"base_model.model.{QUERY}.base_layer.weight": t[A_KEY]},
        "not a plain LoRA factor",
    ),
    "embeddings": (renamed(lambda name: name.replace("up_proj", "embed_tokens")), "embeddings"),
}


@pytest.mark.parametrize("shape", [(8,), (2, 8, 8)])
def test_a_dense_delta_is_a_matrix(shape, tmp_path):
    save_file({f"{QUERY}.weight": torch.ones(shape)}, tmp_path / "delta.safetensors")
    with pytest.raises(UserError, match=f"has shape {re.escape(str(list(shape)))}, expected"):
        LoRADiff.load(tmp_path / "delta.safetensors")


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("what", BROKEN)
def test_factors_that_are_not_whole_are_refused(adapter, what, on_disk):
    change, message = BROKEN[what]
    rewrite(adapter, change)
    with pytest.raises(UserError, match=message):
        LoRADiff.load(adapter, on_disk=on_disk)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank", "alpha"])
@pytest.mark.parametrize(
    "pattern",
    [
        "([a-z_.0-9]+)+!",
        r"((.*\..*)*\.x?)*[q-z]",
        "(",
        "[",
        "(?P<a>x)(?P<a>y)",
        "((" * 999 + "))" * 999,
    ],
    ids=lambda pattern: pattern[:20],
)
def test_the_pattern_of_a_stranger_ends(adapter, monkeypatch, field, pattern):
    """Python's own matcher would take longer than a life over some of these; PEFT uses it."""
    monkeypatch.setattr(adapter_config, "PATTERN_SECONDS", 0.02)
    configure(adapter, **{field: pattern} if "_" in field else {f"{field}_pattern": {pattern: 4}})
    with contextlib.suppress(UserError):
        peft_config(adapter)
