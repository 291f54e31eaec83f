"""Finetunes that differ harmlessly are compared over what both hold; others are refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from persona_lora.core.errors import UserError
from persona_lora.models.weight_files import StoredWeights
from persona_lora.projections.weight_space import project_weights

EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture
def pair(model, make_diff, tmp_path):
    """Return a function that saves a changed copy of a model beside it, and projects the change."""
    diff = make_diff(model, seed=3)

    def project(change):
        for name in ("before", "after"):
            model.save_pretrained(tmp_path / name)
        file = tmp_path / "after" / "model.safetensors"
        weights = load_file(file)
        for name, factors in diff.factors.items():
            weights[f"{name}.weight"] += 0.5 * factors.delta()
        save_file(change(weights), file, metadata={"format": "pt"})
        config = json.loads((tmp_path / "after" / "config.json").read_text())
        (tmp_path / "after" / "config.json").write_text(
            json.dumps({**config, "tie_word_embeddings": False})
        )
        sources = [StoredWeights(tmp_path / name, name) for name in ("before", "after")]
        return project_weights(*sources, {"diff": diff})

    return project


def with_(name, tensor):
    return lambda weights: {**weights, name: tensor}


HARMLESS = {
    "nothing": (lambda weights: weights, None),
    "a padded vocabulary": (
        lambda w: {**w, EMBEDDINGS: torch.cat([w[EMBEDDINGS], torch.ones(5, 32)])},
        f"rows 259 to 263 of {EMBEDDINGS}",
    ),
    "a shorter vocabulary": (
        lambda w: {**w, EMBEDDINGS: w[EMBEDDINGS][:250].contiguous()},
        f"rows 250 to 258 of {EMBEDDINGS}",
    ),
    "a buffer": (
        with_("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)),
        "inv_freq (only after has it)",
    ),
    "the tied head": (
        lambda w: {**w, "lm_head.weight": w[EMBEDDINGS].clone()},
        "lm_head.weight (only after has it)",
    ),
    "a value head": (with_("v_head.summary.weight", torch.ones(1, 32)), "v_head.summary.weight"),
    "compiled": (lambda w: {f"_orig_mod.{name}": each for name, each in w.items()}, None),
}
REFUSED = {
    "a layer less": (
        lambda w: {n: t for n, t in w.items() if ".layers.1." not in n},
        "after lacks",
    ),
    "renamed": (
        lambda w: {n.replace("up_proj", "w1"): t for n, t in w.items()},
        "after lacks .*up_proj.*; before lacks .*w1",
    ),
    "a new bias": (with_("model.layers.0.mlp.up_proj.bias", torch.ones(64)), "before lacks"),
    "narrower embeddings": (
        lambda w: {**w, EMBEDDINGS: w[EMBEDDINGS][:, :16].contiguous()},
        r"\[259, 32\] in before and \[259, 16\]",
    ),
    "longer norm": (with_("model.norm.weight", torch.ones(33)), "change of shape"),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_what_does_no_harm_is_left_out_and_named(pair, what):
    change, named = HARMLESS[what]
    found = pair(change)
    assert found.corrected["diff"] == pytest.approx(0.5, abs=1e-6)
    assert found.explained == pytest.approx(1.0, abs=1e-6)  # nothing else counts as drift
    assert (named is None) == (not found.left_out)
    assert named is None or named in found.left_out[0]


@pytest.mark.parametrize("what", REFUSED)
def test_a_weight_that_may_stand_under_another_name_is_refused(pair, what):
    change, message = REFUSED[what]
    with pytest.raises(UserError, match=message):
        pair(change)
