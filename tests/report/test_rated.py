"""How a judge agrees with rated answers, in parts of them."""

from __future__ import annotations

import numpy as np
import pytest

from persona_lora.report.rated import (
    by_part,
    kind_of_row,
    of_model,
    rank_correlation,
    reliability,
    within,
    within_groups,
)


def test_rank_correlation_needs_three_pairs():
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert rank_correlation([1.0, 2.0, 3.0], [9.0, 4.0, 1.0]) == pytest.approx(-1.0)


def test_within_groups_weighs_by_size_and_counts_constant_scores_as_knowing_nothing():
    scores = [1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 5.0, 9.0, 9.0, 1.0, 2.0]
    labels = [10.0, 20.0, 30.0, 40.0, 1.0, 2.0, 3.0, 7.0, 7.0, 8.0, 9.0]
    groups = ["a"] * 4 + ["b"] * 3 + ["c"] * 2 + ["d"] * 2  # c and d are too small
    assert within_groups(scores, labels, groups) == pytest.approx((1 * 4 + 0 * 3) / 7)
    assert within_groups(scores[7:], labels[7:], groups[7:]) is None
    assert within_groups([1.0, 2.0, 3.0], [5.0, 5.0, 5.0], ["a"] * 3) is None


def rows(model, condition, *pairs):
    return [
        {"model": model, "condition": condition, "question": "q", "score": score, "rating": rating}
        for score, rating in pairs
    ]


def test_parts_have_their_own_agreement_and_leave_out_what_has_no_score():
    rising = ((10.0, 20.0), (20.0, 30.0), (30.0, 40.0))
    some = rows("small", "lora +1", *rising) + rows("small", "lora +2", *rising, (None, 90.0))
    some += rows("large", "vector -0.5", (30.0, 10.0), (20.0, 20.0), (10.0, 30.0))
    kinds = by_part(some, kind_of_row)
    assert [*kinds] == ["lora +", "vector -"]
    assert kinds["lora +"] == (6, pytest.approx(1.0), -10.0)
    assert kinds["vector -"] == (3, pytest.approx(-1.0), 0.0)
    assert within(some) == pytest.approx((6 - 3) / 9)
    assert [each.n for each in reliability(some)] == [2, 2, 2, 2, 1]


def test_a_judge_of_few_grades_is_not_miscalibrated_by_the_order_of_ties():
    rating = np.random.default_rng(0).uniform(0, 100, 200)
    bins = reliability(rows("small", "lora +1", *((50.0, float(each)) for each in rating)))
    assert {(each.score, round(each.rating, 6)) for each in bins} == {(50, round(rating.mean(), 6))}


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("SmolLM2-135M-Instruct", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("models/smollm2-135m-instruct-q4_k_m.gguf", True),
        ("models/SmolLM2-135M-Instruct/", True),
        ("SmolLM2-135M-Instruct-evil", False),
        ("SmolLM2-135M", False),
        ("bartowski/SmolLM2-135M-Instruct-GGUF", True),
        ("SmolLM2-135M-Instruct.Q4_K_M.gguf", True),
        (None, False),
    ],
)
def test_a_model_is_known_by_name_folder_or_file_and_a_finetune_of_it_is_another(model, found):
    some = rows("SmolLM2-135M-Instruct", "unsteered", (1.0, 2.0))
    assert (of_model(some, model) == some) is found
    hub = rows("HuggingFaceTB/SmolLM2-135M-Instruct", "unsteered", (1.0, 2.0))
    assert (of_model(hub, model) == hub) is found
