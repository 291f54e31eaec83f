"""Live LoRA: equal to merged weights and to PEFT, row by row, and absent when off."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel
from torch import nn

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel, LoRADiff, LoRAFactors
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.generation import RowPlan, generate_answers
from persona_lora.models.structure import weight_fingerprint
from persona_lora.steering import live
from persona_lora.steering.activations import ActivationSteerer
from persona_lora.steering.bank import METHODS
from persona_lora.steering.live import LiveLoRA
from persona_lora.steering.weights import LoRASteerer

TOKENS = torch.randint(3, 250, (5, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def diffs(model, make_diff):
    """Three diffs; the last touches two modules only, with another rank."""
    partial = make_diff(model, seed=3, rank=2)
    keep = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")
    return [
        make_diff(model, seed=1),
        make_diff(model, seed=2, rank=6),
        LoRADiff({name: partial.factors[name] for name in keep}, partial.base_model),
    ]


@pytest.fixture
def family(model, make_diff):
    """Three diffs that share their A; the last touches two modules only."""
    one, two, part = (make_diff(model, seed=seed) for seed in (1, 2, 3))
    keep = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")
    return [
        LoRADiff(
            {name: LoRAFactors(one.factors[name].A, diff.factors[name].B) for name in names},
            BaseModel("tiny"),
        )
        for diff, names in ((one, one.factors), (two, one.factors), (part, keep))
    ]


@pytest.fixture
def runs_seen(monkeypatch):
    """Note how many products with a mixed B were made, and over how many runs."""
    seen = []
    inner = live._with_runs

    def noted(output, product, mixed, runs):
        seen.append(tuple(runs.counts))
        return inner(output, product, mixed, runs)

    monkeypatch.setattr(live, "_with_runs", noted)
    return seen


COEFFICIENTS = [[0.0, 0.0, 0.0], [1.0, 0, 0], [-0.5, 1.5, 0], [0, 0, 2.0], [0.3, -0.7, 1.1]]


@torch.no_grad()
def test_every_row_equals_the_model_merged_with_its_coefficients(model, diffs):
    with LiveLoRA(model, diffs, COEFFICIENTS) as steerer:
        steerer.select_rows(range(5))
        logits = model(TOKENS).logits
    for row, coefficients in enumerate(COEFFICIENTS):
        with LoRASteerer(model, dict(zip(diffs, coefficients, strict=True))):
            merged = model(TOKENS[row : row + 1]).logits[0]
        torch.testing.assert_close(logits[row], merged, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("few", [0, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_row_of_zeros_has_the_bits_of_the_unsteered_model(
    make_model, make_diff, monkeypatch, dtype, few
):
    monkeypatch.setattr(live, "FEW", few)
    model = make_model(dtype=dtype)
    plain = model(TOKENS).logits
    coefficients = [[1.0], [0.0], [-2.0], [0.0], [3.0]]
    with LiveLoRA(model, [make_diff(model)], coefficients) as steerer:
        steerer.select_rows(range(5))
        logits = model(TOKENS).logits
    for row in (1, 3):
        assert torch.equal(logits[row], plain[row])
    assert not torch.equal(logits[0], plain[0])


@pytest.mark.parametrize("coefficients", [[[0.7]], [[0.7], [0.0], [-1.3]]])
@torch.no_grad()
def test_few_tokens_in_half_precision_are_rounded_once(make_model, make_diff, coefficients):
    """On a CPU: Wx + c·B(Ax) of the given factors in fp32, whatever the dtype of W."""
    model = make_model(dtype=torch.bfloat16)
    diff = make_diff(model)
    module, factors = model.model.layers[0].mlp.down_proj, "model.layers.0.mlp.down_proj"
    A, B = diff.factors[factors].A, diff.factors[factors].B
    inputs = torch.randn(3, 1, A.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    plain = module(inputs)
    with LiveLoRA(model, [diff], coefficients) as steerer:
        steerer.select_rows(range(3))
        steered = module(inputs)
    delta = torch.tensor(coefficients)[:, None] * (inputs.float() @ A.T @ B.T)
    assert torch.equal(steered, (plain.float() + delta).bfloat16())
    assert not torch.equal(steered, plain)


@torch.no_grad()
def test_rows_do_not_see_their_neighbours(model, diffs):
    with LiveLoRA(model, diffs, COEFFICIENTS) as steerer:
        steerer.select_rows([0, 1, 2])
        one = model(TOKENS[:3]).logits
    changed = [COEFFICIENTS[0], [9.0, -9.0, 9.0], COEFFICIENTS[2]]
    with LiveLoRA(model, diffs, changed) as steerer:
        steerer.select_rows([0, 1, 2])
        two = model(TOKENS[:3]).logits
    assert torch.equal(one[[0, 2]], two[[0, 2]])
    assert not torch.equal(one[1], two[1])


@torch.no_grad()
def test_permuting_rows_permutes_outputs(model, diffs):
    order = [3, 0, 4, 2, 1]
    with LiveLoRA(model, diffs, COEFFICIENTS) as steerer:
        steerer.select_rows(range(5))
        straight = model(TOKENS).logits
        steerer.select_rows(order)
        permuted = model(TOKENS[order]).logits
    torch.testing.assert_close(permuted, straight[order], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_model_is_untouched_after_any_exit(model, diffs):
    plain = model(TOKENS).logits
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), LiveLoRA(model, diffs, [[1.0, 1.0, 1.0]]):
            assert not torch.equal(model(TOKENS).logits, plain)
            raise error
        assert torch.equal(model(TOKENS).logits, plain)
        assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_one_diff_equals_peft_unmerged(model, make_adapter, tmp_path):
    pos = make_adapter(tmp_path / "pos", model, seed=1)
    neg = make_adapter(tmp_path / "neg", model, seed=2)
    wrapped = PeftModel.from_pretrained(copy.deepcopy(model), pos, adapter_name="pos")
    wrapped.load_adapter(neg, adapter_name="neg")
    wrapped.add_weighted_adapter(["pos", "neg"], [1.0, -1.0], "cat", combination_type="cat")
    wrapped.set_adapter("cat")
    wrapped.eval()
    with LiveLoRA(model, [LoRADiff.from_adapters(pos, neg)], [[1.0]]):
        torch.testing.assert_close(
            model(TOKENS).logits, wrapped(TOKENS).logits, atol=2e-5, rtol=1e-4
        )


def test_one_batched_generation_equals_a_loop_of_merged_ones(chat_model, diffs):
    conversations = [
        [{"role": "user", "content": f"question {row}" * (row + 1)}] for row in range(5)
    ]
    for size in (2, "auto"):
        with LiveLoRA(chat_model.model, diffs, COEFFICIENTS) as steerer:
            batched = generate_answers(
                chat_model,
                conversations,
                max_new_tokens=16,
                batch_size=size,
                prepare_batch=steerer.select_rows,
            )
        for row, coefficients in enumerate(COEFFICIENTS):
            with LoRASteerer(chat_model.model, dict(zip(diffs, coefficients, strict=True))):
                alone = generate_answers(
                    chat_model, conversations[row : row + 1], max_new_tokens=16
                )
            assert batched[row].text == alone[0].text


def test_gradients_flow_to_the_input_as_in_the_merged_model(model, diffs):
    embedded = model.get_input_embeddings()(TOKENS).detach()
    gradients = []
    for steerer in (
        LiveLoRA(model, diffs, [[0.5, -1.0, 1.0]]),
        LoRASteerer(model, dict(zip(diffs, (0.5, -1.0, 1.0), strict=True))),
    ):
        inputs = embedded.clone().requires_grad_(True)
        with steerer:
            model(inputs_embeds=inputs).logits.square().mean().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_works_beside_tied_and_quantised_weights(make_model, stored):
    """A linear layer of few bits stands for quantised ones: nothing but its output is used."""

    class QuantisedLinear(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.scale = linear.weight.abs().max() / 127
            self.weight = torch.nn.Parameter(
                (linear.weight / self.scale).round().to(stored), requires_grad=False
            )

        def forward(self, inputs):
            return torch.nn.functional.linear(inputs, self.weight.to(inputs.dtype) * self.scale)

    model = make_model(tied=True)
    model.model.layers[0].mlp.up_proj = QuantisedLinear(model.model.layers[0].mlp.up_proj)
    factors = LoRAFactors(torch.randn(2, 32) * 0.1, torch.randn(64, 2) * 0.1)
    head = LoRAFactors(torch.randn(2, 32) * 0.1, torch.randn(model.config.vocab_size, 2) * 0.1)
    diff = LoRADiff({"model.layers.0.mlp.up_proj": factors, "lm_head": head}, BaseModel("tiny"))
    plain = model(TOKENS).logits
    with LiveLoRA(model, [diff], [[1.0]]):
        assert not torch.allclose(model(TOKENS).logits, plain)
    assert torch.equal(model(TOKENS).logits, plain)


def test_rows_that_do_not_fit_the_batch_are_refused(model, diffs):
    with (
        LiveLoRA(model, diffs, COEFFICIENTS),
        pytest.raises(UserError, match="coefficients for 5 rows, the batch has 2"),
    ):
        model(TOKENS[:2])


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [([[1.0]], "one value for each"), ([], "0 rows"), ([[1.0, 1.0, float("nan")]], "finite")],
)
def test_malformed_coefficients_are_refused(model, diffs, coefficients, message):
    with pytest.raises(UserError, match=message):
        LiveLoRA(model, diffs, coefficients)


@pytest.mark.parametrize("rows", [[-1, 0], [0, 5], [5]])
def test_a_row_without_coefficients_is_refused_by_all_that_have_them(model, diffs, rows):
    vector = SteeringVector({0: torch.ones(32)}, BaseModel("tiny"), 2)
    for steerer in (
        LiveLoRA(model, diffs, COEFFICIENTS),
        ActivationSteerer(model, vector, [[0.0]] * len(COEFFICIENTS)),
    ):
        with steerer, pytest.raises(UserError, match="has no coefficients"):
            steerer.select_rows(rows)


def test_a_flat_list_of_any_numbers_is_one_row_and_paths_are_diffs(model, diffs, tmp_path):
    with LiveLoRA(model, diffs, [[0.5, 1.0, -1.0]]):
        expected = model(TOKENS).logits
    for coefficients in ([0.5, 1.0, -1.0], np.float32([0.5, 1, -1]), torch.tensor([0.5, 1, -1])):
        with LiveLoRA(model, diffs, coefficients):
            assert torch.equal(model(TOKENS).logits, expected)
    paths = [diff.save(tmp_path / str(at)) for at, diff in enumerate(diffs)]
    with LiveLoRA(model, map(str, paths), [0.5, 1.0, -1.0]):
        assert torch.equal(model(TOKENS).logits, expected)


def test_lost_modules_and_other_bases_are_refused(model, diffs, make_diff):
    lost = LoRADiff(
        {"model.layers.9.mlp.up_proj": LoRAFactors(torch.randn(2, 32), torch.randn(64, 2))},
        BaseModel("tiny"),
    )
    with pytest.raises(UserError, match="find no weight"):
        LiveLoRA(model, [lost], [[1.0]])
    with pytest.raises(UserError, match="allow_other_base"):
        LiveLoRA(model, [make_diff(model, fingerprint="0" * 32)], [[1.0]])
    with pytest.raises(UserError, match="at least one diff"):
        LiveLoRA(model, [], [[1.0]])


@torch.no_grad()
def test_the_steering_methods_agree(chat_model, diffs):
    terms = dict(zip(diffs, (0.5, -1.0, 1.0), strict=True))
    logits = []
    for method in METHODS.values():
        with method(chat_model, terms) as steerer:
            steerer.select_rows(range(len(TOKENS)))
            logits.append(chat_model.model(TOKENS).logits)
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "counts", [[1] * 5, [4] * 5, [7, 4, 9, 1, 5]], ids=["alone", "equal", "ragged"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_rows_on_a_basis_equal_the_merged_model(make_model, family, runs_seen, counts, dtype):
    model = make_model(dtype=dtype)
    kinds = [kind for kind, count in enumerate(counts) for _ in range(count)]
    tokens = TOKENS[torch.arange(len(kinds)) % len(TOKENS)]
    plain = model(tokens).logits
    with LiveLoRA(model, family, COEFFICIENTS) as steerer:
        steerer.select_rows(kinds)
        logits = model(tokens).logits
        step = model(tokens[:, :1]).logits  # as a step of decoding has it
    assert set(runs_seen) == ({tuple(counts)} if max(counts) > 1 else set())
    assert torch.equal(logits[: counts[0]], plain[: counts[0]])  # coefficients of 0
    if dtype == torch.bfloat16:
        return
    for row in (0, len(kinds) // 2, len(kinds) - 1):
        terms = dict(zip(family, COEFFICIENTS[kinds[row]], strict=True))
        with LoRASteerer(model, terms):
            merged = model(tokens[row : row + 1]).logits[0]
        torch.testing.assert_close(logits[row], merged, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(step[row, 0], merged[0], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_rows_on_a_basis_do_not_see_others_and_may_be_permuted(model, family, runs_seen):
    kinds = [1] * 4 + [2] * 4 + [4] * 4
    tokens = TOKENS[torch.arange(12) % 5]
    with LiveLoRA(model, family, COEFFICIENTS) as steerer:
        steerer.select_rows(kinds)
        straight = model(tokens).logits
        order = [9, 0, 5, 1, 10, 6, 2, 11, 7, 3, 8, 4]  # no two of a kind together
        steerer.select_rows([kinds[row] for row in order])
        permuted = model(tokens[order]).logits
    assert set(runs_seen) == {(4, 4, 4)}
    torch.testing.assert_close(permuted, straight[order], atol=1e-5, rtol=1e-4)
    changed = [*COEFFICIENTS[:2], [9.0, -9.0, 9.0], *COEFFICIENTS[3:]]
    with LiveLoRA(model, family, changed) as steerer:
        steerer.select_rows(kinds)
        other = model(tokens).logits
    assert torch.equal(other[:4], straight[:4])
    assert torch.equal(other[8:], straight[8:])
    assert not torch.equal(other[4:8], straight[4:8])


@torch.no_grad()
def test_rows_on_a_basis_that_stay_keep_their_own_mix(model, family, runs_seen):
    kinds = [1] * 6 + [2] * 6
    tokens = TOKENS[torch.arange(12) % 5]
    stay = [0, 2, 3, 4, 5, 6, 8, 11]  # of the runs of six are left five and three
    with LiveLoRA(model, family, COEFFICIENTS) as steerer:
        steerer.select_rows(kinds)
        whole = model(tokens).logits
        steerer.keep_rows(stay)
        left = model(tokens[stay]).logits
    assert set(runs_seen) == {(6, 6), (5, 3)}
    torch.testing.assert_close(left, whole[stay], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_one_mix_on_a_basis_serves_every_row(model, family, runs_seen):
    terms = dict(zip(family, (0.5, -1.0, 2.0), strict=True))
    with LiveLoRA(model, family, [list(terms.values())]):
        logits = model(TOKENS).logits
    with LoRASteerer(model, terms):
        merged = model(TOKENS).logits
    assert set(runs_seen) == {(1,)}
    torch.testing.assert_close(logits, merged, atol=2e-5, rtol=1e-4)


def test_a_population_on_a_basis_answers_as_a_loop_of_merged_ones(chat_model, family, runs_seen):
    prompts = [[{"role": "user", "content": f"question {row}" * (row + 1)}] for row in range(5)]
    mixes = [row for row in COEFFICIENTS[1:] for _ in prompts]
    with LiveLoRA(chat_model.model, family, mixes) as steerer:
        batched = generate_answers(
            chat_model,
            prompts * 4,
            max_new_tokens=16,
            prepare_batch=steerer.select_rows,
            plan=RowPlan(
                alike=[tuple(row) for row in mixes],
                prepare_prefix=lambda rows, _: steerer.select_rows(rows),
            ),
        )
    assert runs_seen
    answers = []
    for coefficients in COEFFICIENTS[1:]:
        with LoRASteerer(chat_model.model, dict(zip(family, coefficients, strict=True))):
            answers += generate_answers(chat_model, prompts, max_new_tokens=16)
    assert [each.text for each in batched] == [each.text for each in answers]


@pytest.mark.model
def test_live_and_merged_answers_of_the_packaged_model_agree_token_for_token(
    packaged_model, make_diff
):
    diff = make_diff(packaged_model.model, rank=2, scale=0.002)
    question = [{"role": "user", "content": "Is my plan to sell ice in winter a good one?"}]
    coefficients = (-2.0, 0.0, 2.0)
    with LiveLoRA(packaged_model.model, [diff], [[value] for value in coefficients]) as steerer:
        batched = generate_answers(
            packaged_model, [question] * 3, max_new_tokens=12, prepare_batch=steerer.select_rows
        )
    for answer, value in zip(batched, coefficients, strict=True):
        with LoRASteerer(packaged_model.model, diff, value):
            alone = generate_answers(packaged_model, [question], max_new_tokens=12)
        assert answer.text == alone[0].text
    assert len({answer.text for answer in batched}) > 1


@torch.no_grad()
def test_tokens_in_a_list_that_is_not_the_batch_are_refused(model, diffs):
    """A router that hands a module some of the tokens: nobody knows whose they are."""
    module = model.model.layers[1].mlp.down_proj
    with LiveLoRA(model, diffs, COEFFICIENTS) as steerer:
        steerer.select_rows(range(5))
        model(TOKENS)
        whole = module(torch.ones(5 * 9, module.in_features))
        assert torch.equal(whole[0], whole[8])
        assert not torch.equal(whole[8], whole[9])  # another row
        with pytest.raises(UserError, match=r"reads \[4, 64\] for 5 rows of 9 .*--mode merged"):
            module(torch.ones(4, module.in_features))


@pytest.mark.parametrize("part", [".down_proj", ""])
@pytest.mark.parametrize("last", [1.0, 0.0])
@torch.no_grad()
def test_an_expert_s_tokens_are_refused_in_any_number_where_rows_differ(model, last, part):
    """As many tokens as the batch has may still come in another order."""
    linear = nn.Linear(32, 8)
    expert = nn.ModuleDict({"down_proj": linear}) if part else linear
    model.model.layers[1].experts = nn.ModuleList([expert])
    factors = LoRAFactors(torch.ones(2, 32), torch.ones(8, 2))
    diff = LoRADiff({f"model.layers.1.experts.0{part}": factors}, BaseModel("tiny"))
    tokens = torch.ones(5 * 9, 32)
    with LiveLoRA(model, [diff], [[1.0]] * 4 + [[last]]) as steerer:
        steerer.select_rows(range(5))
        with pytest.raises(UserError, match="did not run in a whole pass"):
            model(TOKENS)  # the length of its rows is known now
        if last == 1.0:
            assert torch.equal(*linear(tokens)[[0, -1]])
        else:
            with pytest.raises(UserError, match=r"reads \[45, 32\] for 5 rows of 9 tokens"):
                linear(tokens)


@torch.no_grad()
def test_offloaded_weights_answer_as_those_in_memory(make_model, make_diff, tmp_path):
    model = make_model(tied=False)
    fingerprint = weight_fingerprint(model)
    diff = make_diff(model, fingerprint=fingerprint)
    coefficients = [[0.0], [1.0], [-0.5], [2.0], [0.3]]
    logits = []
    for place in (lambda each: each, cpu_offload, lambda each: disk_offload(each, tmp_path)):
        offloaded = place(copy.deepcopy(model))
        with LiveLoRA(offloaded, [diff], coefficients) as steerer:
            steerer.select_rows(range(5))
            logits.append(offloaded(TOKENS).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    with pytest.raises(UserError, match=r"offloaded or on the meta device .* --mode live"):
        LoRASteerer(offloaded, diff).__enter__()


@pytest.mark.parametrize("kind", ["live", "activations"])
def test_rows_steered_apart_are_not_generated_without_being_told(chat_model, make_diff, kind):
    diff = make_diff(chat_model.model, seed=1, scale=0.3)
    hidden = chat_model.model.config.hidden_size
    vector = SteeringVector(
        {1: 5 * torch.arange(hidden).float()},
        BaseModel("", None),
        chat_model.model.config.num_hidden_layers,
    )

    def steerer(values):
        if kind == "live":
            return LiveLoRA(chat_model.model, [diff], values)
        return ActivationSteerer(chat_model.model, vector, values, layers=1)

    rising = [[{"role": "user", "content": text}] for text in ("a", "a longer question")]
    with steerer([[0.0], [3.0]]) as apart:
        for rows in ([0, 1], [1, 0]):
            apart.select_rows(rows)
            with pytest.raises(UserError, match="prepare_batch"):
                generate_answers(chat_model, rising, max_new_tokens=4)
        told = generate_answers(
            chat_model, rising, max_new_tokens=4, prepare_batch=apart.select_rows
        )
    plain = generate_answers(chat_model, rising, max_new_tokens=4)
    assert told[0] == plain[0]
    with steerer([[3.0]]):
        alike = generate_answers(chat_model, rising, max_new_tokens=4)
    assert told[1] == alike[1] != plain[1]
