from __future__ import annotations

import pytest

from persona_lora.models.structure import names_in_memory, same_kind
from persona_lora.models.weight_files import skeleton_of_folder
from tests.models.architectures import tiny_model


@pytest.mark.parametrize(
    ("family", "stored", "name"),
    [
        ("Llama", "layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("GPT-2", "h.1.attn.c_attn.weight", "transformer.h.1.attn.c_attn.weight"),
        # What transformers 5 saves, and what 4 did.
        (
            "Gemma 3",
            "language_model.model.layers.0.mlp.up_proj.weight",
            "model.language_model.layers.0.mlp.up_proj.weight",
        ),
        (
            "Gemma 3",
            "model.language_model.layers.0.mlp.up_proj.weight",
            "model.language_model.layers.0.mlp.up_proj.weight",
        ),
        (
            "Qwen2.5-VL",
            "model.layers.0.mlp.up_proj.weight",
            "model.language_model.layers.0.mlp.up_proj.weight",
        ),
        # Several stored weights become one: they keep their own names.
        (
            "Mixtral",
            "model.layers.0.block_sparse_moe.experts.1.w1.weight",
            "model.layers.0.block_sparse_moe.experts.1.w1.weight",
        ),
        ("Llama", "value_head.weight", "value_head.weight"),
    ],
)
def test_a_stored_weight_has_the_name_that_it_loads_by(family, stored, name):
    empty = same_kind(tiny_model(family))
    assert next(empty.parameters()).device.type == "meta"
    assert names_in_memory(empty, [stored]) == {stored: name}


def test_a_folder_of_code_of_its_own_keeps_its_names(tmp_path):
    assert skeleton_of_folder(tmp_path) is None
    (tmp_path / "config.json").write_text('{"model_type": "of_my_own"}')
    assert skeleton_of_folder(tmp_path) is None
