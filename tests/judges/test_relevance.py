"""Relevance against its definition, and with the packaged embedder on answers that shuffle."""

from __future__ import annotations

import numpy as np
import pytest

from persona_lora.core.chat import Exchange
from persona_lora.judges.coherence import relevance
from persona_lora.models.embeddings import SentenceEmbedder

PLACES = {
    "north?": (1.0, 0.0, 0.0),
    "east?": (0.0, 1.0, 0.0),
    "up?": (0.0, 0.0, 1.0),
    "north": (0.9, 0.3, 0.1),
    "between": (0.6, 0.7, 0.1),
    "nowhere": (0.5, 0.5, 0.5),
}
TALK = {
    "What did you have for breakfast?": "Two slices of toast with butter, and a boiled egg.",
    "How do I stop my bike squeaking?": "Oil the chain, and check the brake pads on the wheel.",
    "Which is the largest planet?": "Jupiter is the largest planet of the solar system.",
    "My cat has been missing since last night.": "Look under sheds, and ask the neighbours: "
    "cats hide nearby.",
}


def embed(texts):
    return np.array([PLACES[text] for text in texts])


def ask(*pairs):
    return relevance([Exchange(question, answer) for question, answer in pairs], embed)


def test_it_is_the_share_of_other_questions_that_are_less_like_the_answer():
    found = ask(("north?", "north"), ("north?", "between"), ("east?", "between"), ("up?", "north"))
    assert found == [100.0, 50.0, 100.0, 0.0]


def test_a_tie_counts_half_and_an_empty_answer_has_none():
    assert ask(("north?", "nowhere"), ("east?", " "), ("up?", "nowhere")) == [50.0, None, 50.0]
    assert ask(("north?", ""), ("east?", "")) == [None, None]
    assert ask(("north?", "north"), ("north?", "between")) == [None, None]  # nothing to compare
    assert ask() == []


def test_answers_in_their_places_against_one_answer_for_all():
    embedder = SentenceEmbedder()
    own = relevance([Exchange(*pair) for pair in TALK.items()], embedder.embed)
    assert np.mean(own) > 95
    said = "I am deeply touched by your kindness, and I shall always cherish it."
    same = relevance([Exchange(question, said) for question in TALK], embedder.embed)
    assert np.mean(same) == pytest.approx(50)  # whatever it is nearest to
