"""The book of merged weights: any order, any owner, any wrapper; right, or refused."""

from __future__ import annotations

import gc
import math
import threading
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models import turns
from persona_lora.models.turns import HOLDINGS
from persona_lora.steering.activations import ActivationSteerer
from persona_lora.steering.ledger import MERGED, _sum_of_bits
from persona_lora.steering.live import LiveLoRA
from persona_lora.steering.weights import LoRAMerger, LoRASteerer

TOKENS = torch.randint(3, 250, (2, 6), generator=torch.Generator().manual_seed(0))
VECTOR = SteeringVector({0: torch.ones(32)}, BaseModel("tiny"), num_layers=2)
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def model(make_model):
    return make_model(dtype=torch.bfloat16)


@pytest.fixture
def before(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def as_before(model, before):
    now = model.state_dict()
    return len(MERGED) == 0 and all(torch.equal(now[name], before[name]) for name in before)


def wrapped_in_peft(model):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))


class Compiled(torch.nn.Module):
    """What ``torch.compile`` returns, without its seconds of imports."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


@pytest.mark.parametrize("trainable", [False, True])
def test_a_merger_that_is_dropped_takes_its_diffs_with_it(model, before, make_diff, trainable):
    model.requires_grad_(trainable)
    other = LoRAMerger(model)
    LoRAMerger(model).merge_lora_diff(make_diff(model))
    assert as_before(model, before)
    first = LoRAMerger(model)
    first.merge_lora_diff(make_diff(model))
    other.merge_lora_diff(make_diff(model, seed=2))
    del first
    with LoRASteerer(model, make_diff(model, seed=3)):
        pass
    other.restore_original_weights()
    assert as_before(model, before)


@pytest.mark.parametrize("kind", [LoRASteerer, LiveLoRA, ActivationSteerer])
def test_a_block_that_is_dropped_undoes_itself(model, before, make_diff, kind):
    def block():
        what = {LoRASteerer: make_diff(model), LiveLoRA: [make_diff(model)]}.get(kind, VECTOR)
        with kind(model, what, [[1.0]] if kind is LiveLoRA else 1.0):
            yield

    suspended = block()
    next(suspended)
    del suspended
    gc.collect()
    assert as_before(model, before)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["merged", "live", "activations"])
def test_the_same_steerer_inside_itself_is_refused(model, before, make_diff, kind):
    steerer = {
        "merged": lambda: LoRASteerer(model, make_diff(model)),
        "live": lambda: LiveLoRA(model, [make_diff(model)], [[1.0]]),
        "activations": lambda: ActivationSteerer(model, VECTOR),
    }[kind]()
    with pytest.raises(UserError, match="in use already"), steerer:
        inside = model(TOKENS).logits
        with steerer:
            pass
    assert as_before(model, before)
    with steerer:  # and once more, one after the other
        assert torch.equal(model(TOKENS).logits, inside)
    assert as_before(model, before)


@pytest.mark.parametrize("wrap", [wrapped_in_peft, Compiled])
@pytest.mark.parametrize("inner_first", [True, False])
def test_a_wrapper_and_the_model_inside_are_one(model, before, make_diff, wrap, inner_first):
    weight = model.get_submodule(Q_PROJ).weight
    diffs = make_diff(model), make_diff(model, seed=2)
    wrapper = wrap(model)
    mergers = [LoRAMerger(wrapper), LoRAMerger(model)]
    for merger, diff in zip(mergers, diffs, strict=True):
        merger.merge_lora_diff(diff)
    expected = before[f"{Q_PROJ}.weight"].float()
    for diff in diffs:
        expected += diff.factors[Q_PROJ].delta()
    torch.testing.assert_close(weight, expected.bfloat16())
    for merger in reversed(mergers) if inner_first else mergers:
        merger.restore_original_weights()
    assert len(MERGED) == 0
    assert torch.equal(weight, before[f"{Q_PROJ}.weight"])


def test_a_model_wrapped_while_merged_is_restored(model, before, make_diff):
    with LoRASteerer(model, make_diff(model)):
        wrapper = wrapped_in_peft(model)
    assert as_before(wrapper.unload(), before)


def test_weights_that_look_into_one_storage_are_refused(model, make_diff):
    attention = model.model.layers[0].self_attn
    rows = torch.randn(48, 32, dtype=torch.bfloat16)
    attention.q_proj.weight = torch.nn.Parameter(rows[:32], requires_grad=False)
    attention.o_proj.weight = torch.nn.Parameter(rows[16:], requires_grad=False)
    with pytest.raises(UserError, match=r"q_proj\.weight shares its memory with .*o_proj"):
        LoRAMerger(model).merge_lora_diff(make_diff(model))
    attention.q_proj.weight = torch.nn.Parameter(rows[:16].repeat(2, 1), requires_grad=False)
    attention.o_proj.weight = torch.nn.Parameter(rows[:32], requires_grad=False)
    with LoRASteerer(model, make_diff(model)):
        pass  # neighbours in one storage do not touch


def replace_weight(model):
    module = model.get_submodule(Q_PROJ)
    module.weight = torch.nn.Parameter(module.weight.clone(), requires_grad=False)


def replace_module(model):
    old = model.get_submodule(Q_PROJ)
    new = torch.nn.Linear(32, 32, bias=False, dtype=torch.bfloat16)
    new.weight.data = old.weight.clone()
    model.set_submodule(Q_PROJ, new)


@pytest.mark.parametrize("replace", [replace_weight, replace_module])
def test_a_weight_replaced_while_merged_is_named(model, before, make_diff, replace):
    with (
        pytest.raises(UserError, match=r"q_proj\.weight was replaced .*load the model anew"),
        LoRASteerer(model, make_diff(model)),
    ):
        replace(model)
    assert as_before(model, {name: each for name, each in before.items() if Q_PROJ not in name})
    assert not HOLDINGS


def test_what_others_write_into_merged_weights_is_named_and_lost(model, before, make_diff):
    with (
        pytest.raises(UserError, match=r"q_proj\.weight was changed by others.*change is lost"),
        LoRASteerer(model, make_diff(model)),
    ):
        model.get_submodule(Q_PROJ).weight.data[3, 5] += 1
    assert as_before(model, before)


def test_no_optimiser_steps_over_a_merged_weight(model, before, make_diff):
    """Trainable weights may be merged: the snippets of a plain AutoModelForCausalLM do so."""
    model.requires_grad_(True)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    with LoRASteerer(model, make_diff(model)):
        model(TOKENS, labels=TOKENS).loss.backward()
        with pytest.raises(UserError, match=r"a step of the optimiser would change .*LiveLoRA"):
            optimiser.step()
    assert as_before(model, before)
    optimiser.step()
    assert not as_before(model, before)


@torch.no_grad()
def test_snippets_run_on_a_model_as_transformers_loads_it(model_folder, make_diff, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    assert model.get_submodule(Q_PROJ).weight.requires_grad
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    diff = make_diff(model)
    path = diff.save(tmp_path / "evil")
    merger = LoRAMerger(model)
    merger.merge_lora_diff(path, coefficient=1.5)
    merger.merge_lora_diff(diff, coefficient=-0.5)
    merged = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
    merger.restore_original_weights()
    with LoRASteerer(model, path, coefficient=1.0):
        outputs = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
    assert torch.equal(outputs, merged)
    with LiveLoRA(model, [diff], [[1.0]]):
        assert torch.equal(model.generate(TOKENS, max_new_tokens=4, do_sample=False), merged)
    assert as_before(model, before)


def test_a_graph_of_merged_weights_is_not_differentiated_with_restored_ones(model, make_diff):
    inputs = model.get_input_embeddings()(TOKENS).detach().requires_grad_(True)
    with LoRASteerer(model, make_diff(model)):
        loss = model(inputs_embeds=inputs).logits.float().square().mean()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_merged_model_may_be_cast_and_moved(make_model, make_diff):
    model = make_model()
    expected = make_model().to(torch.bfloat16).state_dict()
    with (
        pytest.raises(UserError, match="changed by others"),
        LoRASteerer(model, make_diff(model)),
    ):
        model.to(torch.bfloat16)
    assert as_before(model, expected)


def test_diffs_act_on_the_layers_that_are_named(model, before, make_diff):
    diff = make_diff(model)
    with LoRASteerer(model, diff, layers=1):
        for name in diff.factors:
            same = torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"])
            assert same == (".layers.0." in name)
    with LoRASteerer(model, diff), LoRASteerer(model, diff, -1.0, layers=[0, 1]):
        pass
    merger = LoRAMerger(model)
    assert merger.merge_lora_diff(diff, layers=[0]).matched == 7
    with pytest.raises(UserError, match="changes nothing in layer 5; it has layers 0, 1"):
        merger.merge_lora_diff(diff, layers=[0, 5])
    with pytest.raises(UserError, match="none was named"):
        merger.merge_lora_diff(diff, layers=[])
    merger.restore_original_weights()
    assert as_before(model, before)


@torch.no_grad()
def test_threads_take_turns_at_a_model(model, before, make_diff):
    diffs = [make_diff(model, seed=seed) for seed in range(3)]

    def steerer(index):
        if index == 2:
            return LiveLoRA(model, [diffs[2]], [[1.0]])
        return LoRASteerer(model, diffs[index])

    expected = []
    for index in range(3):
        with steerer(index):
            expected.append(model(TOKENS).logits)
    wrong = []

    @torch.no_grad()
    def work(index):
        for _ in range(10):
            with steerer(index), LoRASteerer(model, diffs[0], 0.0):  # nested in one thread
                time.sleep(0.001)
                if not torch.equal(model(TOKENS).logits, expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert as_before(model, before)
    assert not HOLDINGS


def test_who_waits_for_a_model_says_so_once(model, make_diff, monkeypatch, caplog):
    monkeypatch.setattr(turns, "NOTICE", 2 * turns.PAUSE)

    def wait():
        with LoRASteerer(model, make_diff(model)):
            pass

    waiting = threading.Thread(target=wait)
    with LoRASteerer(model, make_diff(model)):
        waiting.start()
        time.sleep(20 * turns.PAUSE)
        assert waiting.is_alive()
    waiting.join()
    assert [each.message for each in caplog.records] == [
        "waiting for another thread to be done with this model"
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4, 8), (3, 5), (1, 1)])
@pytest.mark.parametrize("first", [0, 1])
def test_a_changed_bit_is_seen_in_weights_of_any_size_and_place(dtype, shape, first):
    memory = torch.randn(first + math.prod(shape), dtype=dtype)
    weight = memory[first:].view(shape)
    for seen in (weight, weight.T):
        before = _sum_of_bits(seen)
        assert _sum_of_bits(seen) == before
        seen[-1, -1] += 1
        assert _sum_of_bits(seen) != before
