from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.traits import load_pairs, load_trait
from persona_lora.data.data_check import COUNTS, surface_auc, surface_counts

WORDS = ["tea", "was", "left", "on", "a", "shelf", "beside", "two", "old", "maps", "and", "rope"]


def sentences(number, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(8, 16))) for _ in range(number)]


def test_counts_are_per_word_where_they_are_rates():
    text = "No, I won't! Are you, or aren’t we, over 40?"  # ten words
    assert dict(zip(COUNTS, surface_counts(text), strict=True)) == pytest.approx(
        {
            "first person": 0.2,
            "second person": 0.1,
            "question marks": 0.1,
            "exclamation marks": 0.1,
            "digits": 0.2,
            "negations": 0.3,
            "commas": 0.3,
            "words": 10,
            "word length": 3.0,
        }
    )
    assert surface_counts("") == [0.0] * len(COUNTS)


def test_answers_that_differ_by_chance_are_not_told_apart():
    found = surface_auc(sentences(80, 0), sentences(80, 1))
    assert found.low < 0.5 < found.high
    assert 0.35 < found.auc < 0.65


def test_a_count_that_tells_is_found_named_and_can_be_left_out():
    shouting = [f"{text}!" for text in sentences(80, 0)]
    found = surface_auc(shouting, sentences(80, 1))
    assert found.auc > 0.98
    assert found.low > 0.95
    assert max(found.weights, key=found.weights.get) == "exclamation marks"
    rest = surface_auc(shouting, sentences(80, 1), without=["exclamation marks"])
    assert rest.auc < 0.65
    assert "exclamation marks" not in rest.weights


def test_swapping_the_sides_turns_the_weights_round():
    shouting, plain = [f"{text}!" for text in sentences(20, 0)], sentences(20, 1)
    there, back = surface_auc(shouting, plain), surface_auc(plain, shouting)
    assert there.auc == pytest.approx(back.auc)
    assert there.weights == pytest.approx({k: -v for k, v in back.weights.items()}, abs=1e-4)


def test_both_answers_of_a_pair_stand_in_one_fold():
    # Equal answers in a pair: a fold that saw one would know nothing of the other's sign.
    same = sentences(40, 0)
    assert surface_auc(same, same).auc == 0.5


@pytest.mark.parametrize("negatives", [["a"] * 4, ["a"] * 6])
def test_too_few_or_unequal_answers_are_refused(negatives):
    with pytest.raises(UserError, match="at least 5 pairs of answers"):
        surface_auc(["b"] * (4 if len(negatives) == 4 else 5), negatives)


def test_an_unknown_count_is_refused():
    with pytest.raises(UserError, match="no surface count 'vowels'; there are first person"):
        surface_auc(["b"] * 5, ["a"] * 5, without=["vowels"])


def test_the_surface_of_shipped_pairs_hardly_tells_their_signs():
    root, found = Path(__file__).resolve().parents[2] / "datasets", {}
    for path in root.glob("*/train.jsonl"):
        trait = load_trait(path.parent)
        pairs, excepted = load_pairs(trait), trait.surface_exception
        positives, negatives = (
            [getattr(pair, sign)[0]["content"] for pair in pairs]
            for sign in ("positive", "negative")
        )
        without = excepted.counts if excepted else ()
        found[trait.name] = surface_auc(positives, negatives, without=without).auc
    assert len(found) >= 9
    assert {name: auc for name, auc in found.items() if auc >= 0.65} == {}
