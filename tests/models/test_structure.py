from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model

from persona_lora.models.structure import (
    input_groups,
    linear_modules,
    num_layers,
    tied_names,
    weight_fingerprint,
)


def test_names_are_the_same_under_a_peft_wrapper(make_model):
    plain = make_model()
    names = set(linear_modules(plain))
    assert len(names) == 2 * 7 + 1
    wrapped = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear"))
    assert set(linear_modules(wrapped)) == names
    assert num_layers(wrapped) == num_layers(plain) == 2
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
