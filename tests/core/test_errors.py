"""What is suggested for a name that there is not."""

from __future__ import annotations

import pytest

from persona_lora.core.errors import nearest_names

KNOWN = [
    *("evil", "sycophancy", "formality", "refusal", "hallucination", "emotional_tone"),
    *("max_questions", "positive", "negative", "lora", "svd", "episode-000101_A", "checkpoint-200"),
]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("evill", "evil"),
        ("eivl", "evil"),
        ("Evil", "evil"),
        ("sycofancy", "sycophancy"),
        ("sycophantic", "sycophancy"),
        ("formal", "formality"),
        ("refuse", "refusal"),
        ("halucinations", "hallucination"),
        ("max-question", "max_questions"),
        ("MAX_QUESTIONS", "max_questions"),
        ("lore", "lora"),
        ("svg", "svd"),
        ("evil_2", "evil"),
        ("episode-000101_a", "episode-000101_A"),
        ("episode-101_A", "episode-000101_A"),
        ("chekpoint-200", "checkpoint-200"),
    ],
)
def test_a_misspelt_name_is_told_which_was_meant(given, meant):
    assert nearest_names(given, KNOWN) == f"did you mean {meant!r}?"


@pytest.mark.parametrize(
    "given",
    [
        *("live", "devil-may-care", "normal", "confusion", "addictive"),
        *("pca", "roll", "mean", "episode-000999_A", "checkpoint-20", "x", "", "emotion", "\u200b"),
    ],
)
def test_another_name_is_told_all_that_there_are(given):
    assert nearest_names(given, KNOWN) == "known: " + ", ".join(sorted(KNOWN))


def test_names_alike_but_for_case_are_all_suggested_and_no_more_than_three_spellings():
    assert nearest_names("EVIL", ["Evil", "evil"]) == "did you mean 'Evil' or 'evil'?"
    spellings = nearest_names("seeds", ["seed", "seedy", "sedds", "seeda", "feeds"])
    assert spellings.count(" or ") == 2
    assert nearest_names("seed", []) == "known: none"
