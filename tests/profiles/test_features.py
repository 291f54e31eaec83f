"""Features follow what was said: each rate against a count by hand, each scale in its direction."""

from __future__ import annotations

import math

import pytest

from persona_lora.core.errors import UserError
from persona_lora.profiles.features import extract_features, words_of
from persona_lora.profiles.folders import describe

CASUAL = [
    "haha yeah i dunno, gonna ask my mum lol",
    "nah it's cool, u coming?",
    "ok so i kinda broke the lamp, dude",
]
FORMAL = [
    "I should be most grateful if you would permit me to consider the matter further.",
    "However, I regret that my husband was unable to attend the committee.",
    "We shall therefore require additional documentation regarding the arrangement.",
]


def test_rates_equal_counts_by_hand():
    features = extract_features(["I like my tea! Do you?", "We walked home."])
    # i like my tea do you | we walked home: nine words
    assert features.num_utterances == 2
    assert features.avg_words == 4.5
    assert features.avg_utterance_length == (22 + 15) / 2
    assert features.exclamation_rate == features.question_rate == 0.5
    assert features.first_person_singular_rate == pytest.approx(2 / 9)
    assert features.first_person_plural_rate == pytest.approx(1 / 9)
    assert features.second_person_rate == pytest.approx(1 / 9)
    assert features.past_rate == pytest.approx(1 / 9)
    assert features.vocabulary == 1.0


def test_scales_point_the_right_way():
    casual, formal = extract_features(CASUAL), extract_features(FORMAL)
    assert casual.formality < 0.2 < 0.7 < formal.formality
    assert casual.humor_rate > formal.humor_rate == 0
    assert casual.lower_case_rate == 1
    assert formal.avg_word_length > casual.avg_word_length
    happy = extract_features(["I love this wonderful day, thank you so much!"])
    sad = extract_features(["Everything is terrible and I hate this horrible day."])
    assert sad.sentiment < -0.3 < 0.3 < happy.sentiment
    assert happy.behavioral_tendencies["empathy"] > sad.behavioral_tendencies["empathy"]


def test_relations_are_counted_and_tendencies_stay_in_range():
    features = extract_features(["My mum and my husband", "my mum again"])
    assert features.relationship_contexts == {"family": 2, "partner": 1}
    for value in features.behavioral_tendencies.values():
        assert 0 <= value <= 1
    assert not any(
        math.isnan(value) for value in vars(features).values() if isinstance(value, float)
    )


def test_vocabulary_does_not_fall_with_length():
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    short = extract_features([" ".join(words * 6)])
    long = extract_features([" ".join(words * 60)])
    assert short.vocabulary == pytest.approx(long.vocabulary) == pytest.approx(10 / 50)


def test_words_keep_apostrophes_and_drop_marks():
    assert words_of("I’m sure: don't, 12 o'clock!!") == ["i'm", "sure", "don't", "o'clock"]


def test_nothing_said_has_no_features():
    with pytest.raises(UserError, match="no words"):
        extract_features(["?!", "..."])


def test_the_profile_names_what_stands_out():
    casual, formal = describe(extract_features(CASUAL)), describe(extract_features(FORMAL))
    assert "very casually" in casual
    assert "Types in lower case." in casual
    assert "formally" in formal
    assert "lower case" not in formal
    assert "family" in casual
    assert "partner" in formal
