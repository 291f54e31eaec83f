"""Inputs of modules against a plain pass, their file, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import OPTConfig, OPTForCausalLM

from persona_lora.core.chat import user_question
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.tensor_files import save_with_record
from persona_lora.models.loading import ChatModel, load_chat_model
from persona_lora.models.structure import linear_modules
from persona_lora.projections import inputs as projected
from persona_lora.projections.inputs import (
    ModuleInputs,
    kept_inputs,
    measure_inputs,
    shared_beginning,
    tokenized_prompts,
)
from persona_lora.steering.activations import ActivationSteerer
from persona_lora.steering.live import LiveLoRA
from persona_lora.steering.weights import LoRASteerer

PROMPTS = ["What is a good name for a boat?", "Tell me about rain.", "Which tea do you drink?"]


@pytest.fixture
def inputs(chat_model):
    return measure_inputs(chat_model, PROMPTS)


def same(one, other):
    return all(torch.equal(one.roots[name], root) for name, root in other.roots.items())


def plain_inputs(chat_model, name):
    """The inputs of one module over the prompts, from after what all prompts begin with."""
    module, seen = linear_modules(chat_model.model)[name], []
    ids = [
        chat_model.tokenizer(chat_model.render(user_question(prompt)), add_special_tokens=False)
        for prompt in PROMPTS
    ]
    ids = [each["input_ids"] for each in ids]
    shared = next(at for at in range(min(map(len, ids))) if len({each[at] for each in ids}) > 1)
    handle = module.register_forward_hook(lambda _, given, out: seen.append(given[0][0, shared:]))
    with torch.no_grad():
        for each in ids:
            chat_model.model(torch.tensor([each]))
    handle.remove()
    return torch.cat(seen).double()


@pytest.mark.parametrize("what", ["FORMAT", "KEPT"])
def test_what_was_kept_in_another_form_is_measured_anew(chat_model, tmp_path, monkeypatch, what):
    monkeypatch.setattr(projected, "user_cache_path", lambda _: tmp_path / "new" / "cache")
    first = kept_inputs(chat_model, PROMPTS)
    assert len(list((tmp_path / "new" / "cache" / "inputs").iterdir())) == 1
    monkeypatch.setattr(projected, "measure_inputs", lambda *_: pytest.fail("measured again"))
    assert kept_inputs(chat_model, PROMPTS).prompts == first.prompts
    monkeypatch.setattr(projected, what, 0.9)
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        kept_inputs(chat_model, PROMPTS)


def test_each_type_of_the_same_weights_has_inputs_of_its_own(model_folder):
    """Fingerprints of the two agree, by design; what flows through them does not."""
    for dtype in ("bfloat16", "float32", "bfloat16"):
        chat_model = load_chat_model(str(model_folder), dtype=dtype)
        kept, measured = (each(chat_model, PROMPTS).roots for each in (kept_inputs, measure_inputs))
        assert all(torch.equal(kept[name], measured[name]) for name in measured)


def test_inputs_are_kept_of_the_model_itself(chat_model, make_diff, tmp_path, monkeypatch):
    monkeypatch.setattr(projected, "user_cache_path", lambda name: tmp_path)
    bare = measure_inputs(chat_model, PROMPTS)
    diff = make_diff(chat_model.model, seed=1)
    layers = chat_model.model.config.num_hidden_layers
    ones = {0: torch.ones(chat_model.model.config.hidden_size)}
    vector = SteeringVector(ones, BaseModel("", None), layers)
    for steerer in (
        LiveLoRA(chat_model.model, [diff], [[2.0]]),
        LoRASteerer(chat_model.model, diff, 2.0),
        ActivationSteerer(chat_model.model, vector, 2.0),
    ):
        with steerer, pytest.raises(UserError, match="it is steered now"):
            kept_inputs(chat_model, PROMPTS)
    assert same(kept_inputs(chat_model, PROMPTS), bare)


def test_inputs_of_a_model_with_its_adapter_on_are_others(chat_model, tmp_path, monkeypatch):
    monkeypatch.setattr(projected, "user_cache_path", lambda name: tmp_path)
    bare = measure_inputs(chat_model, PROMPTS)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    wearing = dataclasses.replace(chat_model, model=get_peft_model(chat_model.model, config))
    worn = kept_inputs(wearing, PROMPTS)
    assert not same(worn, bare)
    with wearing.base() as base:
        assert same(kept_inputs(base, PROMPTS), bare)
    assert same(kept_inputs(wearing, PROMPTS), worn)


@pytest.mark.parametrize("kind", ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
def test_roots_give_the_mean_outer_product_of_the_inputs(chat_model, inputs, kind):
    name = next(each for each in inputs.roots if each.endswith(kind))
    x = plain_inputs(chat_model, name)
    root = inputs.roots[name].double()
    sigma = x.T @ x / len(x)
    assert float((root @ root.T - sigma).norm() / sigma.norm()) < 5e-3
    assert float(root.square().sum()) == pytest.approx(float(sigma.trace()), rel=2e-3)


def test_the_inner_product_is_the_mean_product_of_what_the_changes_do(
    chat_model, inputs, make_diff
):
    one, other = (make_diff(chat_model.model, seed=seed) for seed in (1, 2))
    direct = 0.0
    for name in one.factors:
        x = plain_inputs(chat_model, name)
        done = [x @ (each.factors[name].delta().double().T) for each in (one, other)]
        direct += float((done[0] * done[1]).sum()) / len(x)
    weighed = inputs.weigh(one).inner(inputs.weigh(other))
    norms = inputs.weigh(one).norm() * inputs.weigh(other).norm()
    assert weighed / norms == pytest.approx(direct / norms, abs=5e-3)


def test_a_weighted_cut_of_the_rank_is_the_best_on_these_inputs(chat_model, inputs, make_diff):
    diff = make_diff(chat_model.model, seed=1, rank=6)
    weighted, kept = inputs.compress(diff, rank=2)
    plain = diff.compress(rank=2).diff
    assert weighted.rank == 2
    errors = {}
    for label, cut in (("weighted", weighted), ("plain", plain)):
        left, whole = 0.0, 0.0
        for name, factors in diff.factors.items():
            x = plain_inputs(chat_model, name)
            lost = factors.delta().double() - cut.factors[name].delta().double()
            left += float((x @ lost.T).square().sum()) / len(x)
            whole += float((x @ factors.delta().double().T).square().sum()) / len(x)
        errors[label] = left / whole
    assert errors["weighted"] < 0.99 * errors["plain"]
    assert errors["weighted"] == pytest.approx(1 - kept, abs=5e-3)
    whole = inputs.compress(diff, rank=6).diff
    assert (whole - diff).norm() == pytest.approx(0, abs=1e-4 * diff.norm())


def test_modules_that_read_one_input_share_it_and_keep_doing_so_in_the_file(inputs, tmp_path):
    inputs.save(tmp_path / "inputs.safetensors")
    loaded = ModuleInputs.load(tmp_path / "inputs.safetensors")
    q, k, o = (
        next(name for name in inputs.roots if name.endswith(kind))
        for kind in ("q_proj", "k_proj", "o_proj")
    )
    for each in (inputs, loaded):
        assert each.roots[q] is each.roots[k]
        assert each.roots[q] is not each.roots[o]
    assert loaded.roots.keys() == inputs.roots.keys()
    assert all(torch.equal(loaded.roots[name], inputs.roots[name]) for name in inputs.roots)
    assert (loaded.fingerprint, loaded.tokens) == (inputs.fingerprint, inputs.tokens)


def test_what_does_not_belong_together_is_refused(chat_model, inputs, make_diff, tmp_path):
    diff = make_diff(chat_model.model, seed=1)
    lacking = ModuleInputs({}, inputs.fingerprint, inputs.prompts, 1)
    with pytest.raises(UserError, match="was measured"):
        lacking.weigh(diff)
    narrow = {name: root[1:] for name, root in inputs.roots.items()}
    with pytest.raises(UserError, match="in the statistics of inputs"):
        ModuleInputs(narrow, inputs.fingerprint, "", 1).weigh(diff)
    with pytest.raises(UserError, match="at least one"):
        measure_inputs(chat_model, [])
    diff.save(tmp_path / "diff")
    with pytest.raises(UserError, match="no statistics of inputs"):
        ModuleInputs.load(tmp_path / "diff" / "adapter_model.safetensors")
    save_with_record(tmp_path / "cut", {}, "inputs", {"roots": {"a": "a"}})
    with pytest.raises(UserError, match="no statistics of inputs"):
        ModuleInputs.load(tmp_path / "cut")


def test_tokens_that_a_module_reads_flat_are_those_after_the_shared_beginning(tokenizer):
    """OPT's feed-forward modules read [tokens, hidden], without a dimension of the batch."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=32, ffn_dim=64,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512, init_std=0.4,
    )  # fmt: skip
    chat_model = ChatModel(OPTForCausalLM(config).eval(), tokenizer, "opt")
    name, seen = "model.decoder.layers.1.fc2", []
    begins = shared_beginning(tokenized_prompts(chat_model, PROMPTS))
    assert begins > 0
    module = linear_modules(chat_model.model)[name]
    handle = module.register_forward_hook(lambda _, given, out: seen.append(given[0][begins:]))
    root = measure_inputs(chat_model, PROMPTS).roots[name].double()
    handle.remove()
    x = torch.cat(seen).double()
    assert x.ndim == 2
    expected = x.T @ x / len(x)
    assert (root @ root.T - expected).norm() < 0.01 * expected.norm()
