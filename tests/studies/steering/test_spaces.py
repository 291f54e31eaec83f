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
from persona_lora.models.likelihood import next_tokens
from persona_lora.projections.inputs import measure_inputs, shared_beginning, tokenized_prompts
from persona_lora.steering.bank import steer_live
from persona_lora.studies.promoted_words import changed_words
from persona_lora.studies.steering.divergence import ordinary_texts
from persona_lora.studies.steering.spaces import (
    METHODS,
    Spaces,
    agreement,
    interference,
    linearity,
    promoted,
    recognition,
    seed_cosines,
    shift_cosines,
    spectra,
    trait_cosines,
    trait_spectra,
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
    rows = {method: list(linearity(spaces, method)) for method in METHODS}
    assert [len(own) for own in rows.values()] == [6, 6]
    assert all(row["residual"] == pytest.approx(0, abs=1e-4) for row in rows["activations"])
    assert all(row["residual"] > 1e-4 for row in rows["weights"])  # through nonlinear layers


def test_weights_are_nearly_linear_where_they_are_small(spaces):
    small = replace(spaces, diff_scales=dict.fromkeys(TRAITS, 1e-2))
    rows = {
        name: {(row["trait"], row["other"]): row["residual"] for row in linearity(each, "weights")}
        for name, each in (("small", small), ("whole", spaces))
    }
    assert all(rows["small"][pair] < 0.3 * rows["whole"][pair] for pair in rows["small"])


def test_interference_is_one_with_itself_and_the_gram_matrix_for_vectors(spaces):
    rows = list(interference(spaces, "activations"))
    both = (*rows, *interference(spaces, "weights"))
    assert all(row["value"] == pytest.approx(1.0) for row in both if row["steered"] == row["read"])
    one, other = (spaces.vectors[trait].directions[1].double() for trait in ("calm", "loud"))
    found = next(
        row["value"] for row in rows if (row["steered"], row["read"]) == ("calm", "loud")
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


def test_spectra_say_rank_and_norm_weighted_and_plain(chat_model, spaces):
    inputs = measure_inputs(chat_model, ["Hello.", "What is the time?", "Why?"])
    rows = [row for row in trait_spectra(spaces, inputs) if row["trait"] == "calm"]
    diff = spaces.diffs["calm"]
    for of, geometry in ((inputs.weigh(diff), ""), (diff, "_plain")):
        squares = sum(row[f"norm{geometry}"] ** 2 for row in rows)
        assert squares == pytest.approx(of.norm() ** 2)
        values = torch.linalg.svdvals(of.factors[rows[0]["module"]].delta().double())
        shares = (values.square() / values.square().sum())[: rows[0]["rank"]]
        assert rows[0][f"top_share{geometry}"] == pytest.approx(float(shares[0]), rel=1e-4)
        assert rows[0][f"effective_rank{geometry}"] == pytest.approx(
            math.exp(-float((shares * shares.log()).sum())), rel=1e-3
        )
    assert rows[0]["norm"] != pytest.approx(rows[0]["norm_plain"], rel=1e-2)
    one = LoRADiff(
        {"model.layers.0.self_attn.q_proj": LoRAFactors(torch.ones(1, 32), torch.ones(32, 1))},
        BaseModel("tiny", None),
    )
    assert spectra(one, one, "one")[0]["effective_rank"] == pytest.approx(1.0)


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
    rho, p, n = agreement(same).values()
    assert (rho, n) == (pytest.approx(1.0), 3)
    orders = list(permutations(("calm", "loud", "wry")))
    as_far = [order for order in orders if abs(_reordered(same, order)) > 1 - 1e-9]
    assert p == pytest.approx(len(as_far) / len(orders))
    assert agreement(rows[:1]) == {"rho": None, "p": None, "n": 1}  # one pair says nothing
    equal = agreement([{**row, "weights": 0.5} for row in rows])  # nor do equal ones
    assert equal == {"rho": None, "p": None, "n": 3}
    # Of several seeds the means count: two that differ by as much to either side are as none.
    noisy = [{**row, "weights": row["weights"] + off} for off in (-9.0, 9.0) for row in same]
    assert agreement(noisy)["rho"] == pytest.approx(1.0)


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

    found = agreement(rows(noise=0.1))
    assert found["rho"] > 0.9
    assert found["p"] < 0.001
    found = agreement(rows(noise=30.0))
    assert found["p"] > 0.05
    assert agreement(rows(noise=30.0)) == found  # the same orders are drawn


def test_a_diff_is_recognised_by_the_vector_of_its_trait():
    def rows(cosine):
        return [
            {"seed": seed, "trait": one, "other": other, "layer": layer,
             "cosine": cosine(seed, one, other) if layer == 1 else float(one != other)}
            for seed in ("seed0", "seed1") for one in TRAITS for other in TRAITS
            for layer in (0, 1)
        ]  # fmt: skip

    own = recognition(rows(lambda seed, one, other: 0.3 + 0.2 * (one == other)), layer=1)
    assert own == {
        "recognised": 6,
        "n": 6,
        "chance": 2.0,
        "mean": pytest.approx(0.5),
        "p": pytest.approx(1 / 6),  # the true order alone, of six
    }
    next_to = dict(zip(TRAITS, ("loud", "wry", "calm"), strict=True))
    other = recognition(rows(lambda seed, one, name: float(name == next_to[one])), layer=1)
    assert (other["recognised"], other["mean"], other["p"]) == (0, 0.0, 1.0)
    # One seed alone is off: its diff is not recognised, and the mean says so.
    one_off = recognition(
        rows(lambda seed, one, name: float((name == one) == (seed == "seed0"))), layer=1
    )
    assert (one_off["recognised"], one_off["mean"]) == (3, 0.5)


def test_diffs_of_seeds_are_laid_beside_one_another(chat_model, spaces):
    inputs = measure_inputs(chat_model, ["Hello.", "What is the time?", "Why?"])
    second = {**spaces.diffs, "calm": spaces.diffs["loud"]}
    rows = list(seed_cosines({"seed0": spaces.diffs, "seed1": second}, inputs))
    assert len(rows) == 3 * 3
    found = {(row["trait"], row["other"]): (row["weights"], row["weights_plain"]) for row in rows}
    assert found["wry", "wry"] == pytest.approx((1.0, 1.0))
    assert found["loud", "calm"] == pytest.approx((1.0, 1.0))  # the second seed's calm is loud
    calm, loud = spaces.diffs["calm"], spaces.diffs["loud"]
    assert found["calm", "calm"] == (
        inputs.weigh(calm).cosine(inputs.weigh(loud)),
        calm.cosine(loud),
    )


def test_words_are_promoted_by_the_direction_that_is_on(chat_model, spaces):
    prompts = ["Hello.", "What is the time?", "Why?"]
    ids = tokenized_prompts(chat_model, prompts)
    begins = shared_beginning(ids)
    without = next_tokens(chat_model, ids, begins)
    with steer_live(chat_model, {spaces.diffs["loud"]: 1.0}):
        loud = list(changed_words(chat_model, without, next_tokens(chat_model, ids, begins)))
    found = [row for row in promoted(spaces, "weights", prompts) if row["trait"] == "loud"]
    assert found == [{"trait": "loud", **row} for row in loud]
    for method in METHODS:
        rows = list(promoted(spaces, method, prompts))
        assert {row["trait"] for row in rows} == set(TRAITS)
        still = replace(spaces, diff_scales=dict.fromkeys(TRAITS, 0.0))
        still = replace(still, vector_scales=dict.fromkeys(TRAITS, 0.0))
        assert not list(promoted(still, method, prompts))  # nothing changes, and no word with it


def test_traits_without_a_partner_are_refused(spaces):
    with pytest.raises(UserError, match="same traits"):
        replace(spaces, diffs={"calm": spaces.diffs["calm"]})
