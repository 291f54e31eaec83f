"""The classifier of answers: passages, features, the choice of a penalty."""

from __future__ import annotations

import numpy as np
import pytest

from persona_lora.core.chat import Exchange
from persona_lora.core.errors import UserError
from persona_lora.core.traits import load_pairs
from persona_lora.judges.embedding import (
    AnswerClassifier,
    clauses,
    exchange_features,
    word_windows,
)


def exchanges_of(trait) -> tuple[list[Exchange], list[Exchange]]:
    pairs = load_pairs(trait)
    questions = [pair.prompt[-1]["content"] for pair in pairs]
    return (
        [Exchange(q, p.positive[-1]["content"]) for q, p in zip(questions, pairs, strict=True)],
        [Exchange(q, p.negative[-1]["content"]) for q, p in zip(questions, pairs, strict=True)],
    )


def test_clauses_cut_after_marks_and_keep_every_word():
    text = "No, really: it is 3.5 km; go on! Or not?  Fine."
    assert clauses(text) == ["No,", "really:", "it is 3.5 km;", "go on!", "Or not?", "Fine."]
    assert clauses("one") == ["one"]


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 9, 10, 31])
def test_word_windows_cover_every_word_in_order(count):
    words = [str(number) for number in range(count)]
    windows = [window.split() for window in word_windows(" ".join(words))]
    assert sorted({int(word) for window in windows for word in window}) == list(range(count))
    assert all(len(window) == 6 for window in windows[:-1])
    assert len(windows) <= max(1, count // 3)


def test_exchange_features_have_nothing_left_of_the_question(embedder):
    items = [Exchange("Is the moon made of cheese?", "No, it is rock. Cheese would melt, surely.")]
    features = exchange_features(items, embedder)
    question = embedder.embed([items[0].question])[0]
    assert features.shape == (1, 2 * embedder.dimension)
    for part in np.split(features[0], 2):
        assert abs(part @ question) < 1e-6
        assert np.linalg.norm(part) > 0.1


def test_exchange_features_refuse_an_empty_answer_and_take_no_exchanges(embedder):
    with pytest.raises(UserError, match="empty"):
        exchange_features([Exchange("q", "a"), Exchange("why?", " ")], embedder)
    assert exchange_features([], embedder).shape == (0, 2 * embedder.dimension)


def test_classifier_separates_and_is_deterministic_under_its_seed(trait, embedder):
    positives, negatives = exchanges_of(trait)
    first = AnswerClassifier.fit(positives, negatives, embedder=embedder, seed=3)
    second = AnswerClassifier.fit(positives, negatives, embedder=embedder, seed=3)
    np.testing.assert_array_equal(first.weights, second.weights)
    assert first.bias == second.bias
    assert first.probabilities(positives).min() > 0.5 > first.probabilities(negatives).max()


def test_classifier_swapped_signs_give_the_complement(trait, embedder):
    positives, negatives = exchanges_of(trait)
    one = AnswerClassifier.fit(positives, negatives, embedder=embedder, seed=0)
    other = AnswerClassifier.fit(negatives, positives, embedder=embedder, seed=0)
    np.testing.assert_allclose(
        one.probabilities(positives), 1 - other.probabilities(positives), atol=1e-3
    )


def test_classifier_needs_five_pairs(embedder):
    few = [Exchange("q", "a")] * 4
    with pytest.raises(UserError, match="too few"):
        AnswerClassifier.fit(few, few, embedder=embedder, seed=0)
