"""Streamed sums give the vectors that dense matrices give, whatever the batches were."""

from __future__ import annotations

import pytest
import torch
from sklearn.decomposition import PCA

from persona_lora.core import progress
from persona_lora.core.chat import Exchange
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel
from persona_lora.models.likelihood import tokenize_exchange
from persona_lora.models.structure import decoder_layers
from persona_lora.steering import directions
from persona_lora.steering.directions import PairSums, random_like, sum_pairs, vector_of

FIELDS = {"base_model": BaseModel("tiny"), "num_layers": 2, "trait": "cheer"}


@pytest.fixture
def states():
    """Differences with a common part and one strong direction of variation."""
    generator = torch.Generator().manual_seed(0)
    common, varied = torch.randn(2, 1, 2, 32, generator=generator)
    noise = torch.randn(40, 2, 32, generator=generator)
    strength = torch.randn(40, 1, 1, generator=generator)
    negative = torch.randn(40, 2, 32, generator=generator)
    return negative + common + 3 * strength * varied + 0.3 * noise, negative


def sums_of(positive, negative, *sizes):
    sums = PairSums.empty((0, 1), 32, moments=True)
    for a, b in zip(positive.split(sizes), negative.split(sizes), strict=True):
        sums.add(a, b)
    return sums


@pytest.mark.parametrize("sizes", [(40,), (1, 7, 32)])
def test_streamed_sums_equal_dense_matrices(states, sizes):
    positive, negative = states
    sums = sums_of(positive, negative, *sizes)
    for layer in (0, 1):
        d = (positive - negative)[:, layer].double()
        mean = d.mean(0)
        _, values, right = torch.linalg.svd(d, full_matrices=False)
        found = {method: vector_of(sums, method, FIELDS) for method in directions.EXTRACTORS}
        torch.testing.assert_close(found["mean_diff"].directions[layer].double(), mean)

        def check(method, expected, share, layer=layer, mean=mean, found=found):
            v = found[method].directions[layer].double()
            assert float(v @ mean) > 0
            assert float(v.norm()) == pytest.approx(float(mean.norm()), rel=1e-5)
            cosine = torch.cosine_similarity(v, torch.as_tensor(expected).double(), dim=0)
            assert abs(float(cosine)) == pytest.approx(1, abs=1e-8)
            explained = found[method].sources["explained"][str(layer)]
            assert explained == pytest.approx(share, rel=1e-6)

        check("svd", right[0], float(values[0] ** 2 / values.square().sum()))
        fitted = PCA(n_components=1, svd_solver="full").fit(d.numpy())
        check("pca", fitted.components_[0], float(fitted.explained_variance_ratio_[0]))


def test_svd_is_the_pca_of_pairs_centred_at_their_midpoints(states):
    positive, negative = states
    sums = sums_of(positive, negative, 40)
    middle = (positive + negative) / 2
    centred = torch.cat([positive - middle, negative - middle])[:, 1].double()
    fitted = PCA(n_components=1, svd_solver="full").fit(centred.numpy())
    v = vector_of(sums, "svd", FIELDS).directions[1].double()
    cosine = torch.cosine_similarity(v, torch.as_tensor(fitted.components_[0]), dim=0)
    assert abs(float(cosine)) == pytest.approx(1, abs=1e-8)


def test_differences_along_one_axis_are_explained_whatever_their_lengths():
    lengths = torch.tensor([3.0, -1.0, 0.5, 7.0])
    d = lengths[:, None, None] * torch.tensor([0.6, 0.8])
    sums = PairSums.empty((0,), 2, moments=True)
    sums.add(d, torch.zeros_like(d))
    for method in ("mean_diff", "svd"):
        vector = vector_of(sums, method, {**FIELDS, "num_layers": 1})
        assert vector.sources["explained"]["0"] == pytest.approx(1.0)


@pytest.mark.parametrize("moments", [True, False])
def test_the_mean_difference_explains_its_share(moments):
    d = torch.tensor([[[3.0, 1.0]], [[1.0, -1.0]]])
    sums = PairSums.empty((0,), 2, moments=moments)
    sums.add(d, torch.zeros_like(d))
    vector = vector_of(sums, "mean_diff", {**FIELDS, "num_layers": 1})
    assert vector.directions[0].tolist() == [2.0, 0.0]
    share = pytest.approx(10 / 12) if moments else None  # that of the mean itself is 8 / 12
    assert vector.sources["explained"]["0"] == share
    assert vector.sources["pairs"] == 2


@pytest.fixture
def texts(chat_model):
    sides = []
    for word in ("yes", "no"):
        pairs = [(f"Question {i}{'?' * (3 * i % 7)}", f"{word} " * (1 + i % 5)) for i in range(9)]
        sides.append([tokenize_exchange(chat_model, Exchange(*pair)) for pair in pairs])
    return sides


def test_a_pass_over_texts_equals_a_loop_over_them(chat_model, texts, monkeypatch, told):
    monkeypatch.setattr(directions, "PAIRS_PER_CHUNK", 4)
    positions = ("response_avg", "prompt_last")
    with progress.stage("pairs"):
        sums = sum_pairs(chat_model, *texts, positions=positions, layers=[0, 1], moments=True)
    assert told == sorted(told)
    assert told[-1] == ("pairs", 18, 18)
    outputs: list[torch.Tensor] = []
    hook = decoder_layers(chat_model.model)[1].register_forward_hook(
        lambda module, arguments, output: outputs.append(output[0])
    )
    total = torch.zeros(32)
    with torch.no_grad():
        for sign, side in ((1, texts[0]), (-1, texts[1])):
            for prompt, answer in side:
                chat_model.model(torch.tensor([prompt + answer]))
                total += sign * outputs[-1][len(prompt) :].mean(0)
    hook.remove()
    vector = vector_of(sums["response_avg"], "mean_diff", FIELDS)
    torch.testing.assert_close(vector.directions[1], total / 9, atol=1e-5, rtol=1e-4)
    # Both answers follow the same prompt, so its last state does not differ.
    assert sums["prompt_last"].difference.abs().max() < 1e-4


def test_a_nan_names_the_pair_and_the_side(chat_model, texts, monkeypatch, told):
    monkeypatch.setattr(directions, "PAIRS_PER_CHUNK", 4)
    spoilt = [*texts[1]]
    (unused,) = chat_model.tokenizer("~")["input_ids"]
    spoilt[3] = spoilt[3]._replace(answer=[unused])
    chat_model.model.model.embed_tokens.weight.data[unused] = torch.nan
    with pytest.raises(UserError, match=r"NaN .* of pair 3 \(negative\) at layer 0"):
        sum_pairs(chat_model, texts[0], spoilt, positions=["response_avg"], layers=[0, 1])
    with pytest.raises(UserError, match=r"answer of pair 0 \(negative\) is empty"):
        sum_pairs(
            chat_model,
            texts[0],
            [texts[1][0]._replace(answer=[]), *texts[1][1:]],
            positions=["response_avg"],
            layers=[0],
        )


def test_a_random_control_has_the_norms_and_repeats_for_a_seed(states):
    vector = vector_of(sums_of(*states, 40), "mean_diff", FIELDS)
    control = random_like(vector, seed=1)
    assert control.norms() == pytest.approx(vector.norms(), rel=1e-5)
    assert control.method == "random"
    assert all(abs(cosine) < 0.7 for cosine in control.cosine(vector).values())
    assert torch.equal(control.directions[0], random_like(vector, 1).directions[0])
    assert not torch.equal(control.directions[0], random_like(vector, 2).directions[0])


def test_what_cannot_be_extracted_is_named(chat_model, texts, states):
    with pytest.raises(UserError, match="got 9 and 3"):
        sum_pairs(chat_model, texts[0], texts[1][:3], positions=["response_avg"], layers=[0])
    sums = sums_of(*states, 40)
    with pytest.raises(UserError, match="'median'"):
        vector_of(sums, "median", FIELDS)
    with pytest.raises(UserError, match="do not differ at layer 0"):
        vector_of(sums_of(states[0], states[0], 40), "mean_diff", FIELDS)
    alike = PairSums.empty((0,), 32, moments=True)
    alike.add(*(each[:1, :1].expand(7, 1, -1) for each in states))
    assert vector_of(alike, "svd", FIELDS).sources["explained"]["0"] == pytest.approx(1)
    with pytest.raises(UserError, match="differences are the same"):
        vector_of(alike, "pca", FIELDS)
    plain = PairSums.empty((0, 1), 32, moments=False)
    plain.add(*states)
    with pytest.raises(UserError, match="second moments"):
        vector_of(plain, "svd", FIELDS)
