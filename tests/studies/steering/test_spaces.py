"""Both spaces on the tiny model: identities that hold whatever the directions are."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel, LoRADiff, LoRAFactors
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.projections.inputs import measure_inputs
from persona_lora.studies.steering.divergence import ordinary_texts
from persona_lora.studies.steering.spaces import (
    Spaces,
    agreement,
    interference,
    linearity,
    shift_cosines,
    spectra,
    trait_cosines,
)

TRAITS = ("calm", "loud", "wry")


@pytest.fixture
def texts(chat_model):
    return ordinary_texts(chat_model, ["Hello.", "What is the time?", "Why?"])


@pytest.fixture
def spaces(chat_model, texts, make_diff):
    diffs = {
        trait: make_diff(chat_model.model, seed=at, scale=0.05) for at, trait in enumerate(TRAITS)
    }
    vectors = {
        trait: SteeringVector(
            {layer: torch.randn(32, generator=torch.Generator().manual_seed(9 * at + layer))
             for layer in range(2)},
            BaseModel("tiny", None), 2, trait=trait,
        )
        for at, trait in enumerate(TRAITS)
    }  # fmt: skip
    ones = dict.fromkeys(TRAITS, 1.0)
    return Spaces(chat_model, texts, diffs, vectors, 1, ones, ones)


def test_activation_steering_at_the_last_layer_is_exactly_linear(spaces):
    rows = linearity(spaces)
    assert len(rows) == 2 * 6
    for row in rows:
        if row["method"] == "activations":
            assert row["residual"] == pytest.approx(0, abs=1e-4)
        else:
            assert row["residual"] > 1e-4  # weights pass through nonlinear layers


def test_weights_are_nearly_linear_where_they_are_small(spaces):
    small = replace(spaces, diff_scales=dict.fromkeys(TRAITS, 1e-2))
    rows = {
        name: {
            (row["trait"], row["other"]): row["residual"]
            for row in linearity(each)
            if row["method"] == "weights"
        }
        for name, each in (("small", small), ("whole", spaces))
    }
    assert all(rows["small"][pair] < 0.3 * rows["whole"][pair] for pair in rows["small"])


def test_interference_is_one_with_itself_and_the_gram_matrix_for_vectors(spaces):
    rows = interference(spaces)
    assert all(row["value"] == pytest.approx(1.0) for row in rows if row["steered"] == row["read"])
    one, other = (spaces.vectors[trait].directions[1].double() for trait in ("calm", "loud"))
    found = next(
        row["value"] for row in rows
        if (row["method"], row["steered"], row["read"]) == ("activations", "calm", "loud")
    )  # fmt: skip
    assert found == pytest.approx(float(one @ other / other.square().sum()), rel=1e-3)


def test_a_shift_is_along_the_vector_that_it_was_made_of(spaces):
    rows = shift_cosines(spaces)
    assert len(rows) == 3 * 3 * 2
    assert all(-1 <= row["cosine"] <= 1 for row in rows)
    # A diff that writes one direction into the residual stream moves the last layer along it.
    direction = spaces.vectors["calm"].directions[1]
    written = LoRADiff(
        {"model.layers.1.mlp.down_proj": LoRAFactors(A=torch.ones(1, 64), B=direction[:, None])},
        BaseModel("tiny", None),
    )
    made = replace(spaces, diffs={**spaces.diffs, "calm": written})
    own = next(
        row["cosine"] for row in shift_cosines(made)
        if (row["trait"], row["other"], row["layer"]) == ("calm", "calm", 1)
    )  # fmt: skip
    assert abs(own) == pytest.approx(1.0, abs=1e-4)


def test_spectra_say_rank_and_norm(spaces):
    rows = spectra(spaces.diffs["calm"], "calm")
    diff = spaces.diffs["calm"]
    assert sum(row["norm"] ** 2 for row in rows) == pytest.approx(diff.norm() ** 2)
    values = torch.linalg.svdvals(diff.factors[rows[0]["module"]].delta().double())
    shares = (values.square() / values.square().sum())[: rows[0]["rank"]]
    assert rows[0]["top_share"] == pytest.approx(float(shares[0]), rel=1e-4)
    assert rows[0]["effective_rank"] == pytest.approx(
        math.exp(-float((shares * shares.log()).sum())), rel=1e-3
    )
    one = LoRADiff(
        {"model.layers.0.self_attn.q_proj": LoRAFactors(torch.ones(1, 32), torch.ones(32, 1))},
        BaseModel("tiny", None),
    )
    assert spectra(one, "one")[0]["effective_rank"] == pytest.approx(1.0)


def test_pairs_of_traits_in_both_spaces(chat_model, spaces):
    inputs = measure_inputs(chat_model, ["Hello.", "What is the time?", "Why?"])
    rows = trait_cosines(spaces, inputs)
    assert [(row["trait"], row["other"]) for row in rows] == [
        ("calm", "loud"), ("calm", "wry"), ("loud", "wry"),
    ]  # fmt: skip
    calm, loud = spaces.diffs["calm"], spaces.diffs["loud"]
    assert rows[0]["weights"] == inputs.weigh(calm).cosine(inputs.weigh(loud))
    assert rows[0]["weights_plain"] == calm.cosine(loud)
    same = [{**row, "activations": 2 * row["weights"]} for row in rows]
    rho, p = agreement(same)
    assert rho == pytest.approx(1.0)
    orders = list(permutations(("calm", "loud", "wry")))
    as_far = [order for order in orders if abs(_reordered(same, order)) > 1 - 1e-9]
    assert p == pytest.approx(len(as_far) / len(orders))
    assert agreement(rows[:1]) == (None, None)  # one pair says nothing
    assert agreement([{**row, "weights": 0.5} for row in rows]) == (None, None)  # nor do equal ones


def _reordered(rows, order):
    """Spearman's ρ when the second space's traits are called by other names."""
    names = dict(zip(("calm", "loud", "wry"), order, strict=True))
    second = {frozenset((row["trait"], row["other"])): row["activations"] for row in rows}
    moved = [second[frozenset((names[row["trait"]], names[row["other"]]))] for row in rows]
    return spearmanr([row["weights"] for row in rows], moved).statistic


def test_agreement_of_many_traits_samples_the_orders():
    def rows(noise):
        generator = np.random.default_rng(0)
        points = generator.normal(size=(9, 4))
        other = points + noise * generator.normal(size=points.shape)
        return [
            {
                "trait": f"t{one}",
                "other": f"t{two}",
                "weights": points[one] @ points[two],
                "activations": other[one] @ other[two],
            }
            for one, two in combinations(range(9), 2)
        ]

    rho, p = agreement(rows(noise=0.1))
    assert rho > 0.9
    assert p < 0.001
    rho, p = agreement(rows(noise=30.0))
    assert p > 0.05
    assert agreement(rows(noise=30.0)) == (rho, p)  # the same orders are drawn


def test_traits_without_a_partner_are_refused(spaces):
    with pytest.raises(UserError, match="same traits"):
        replace(spaces, diffs={"calm": spaces.diffs["calm"]})
