"""A profile by a language model: what it is asked, and what it may not return."""

from __future__ import annotations

import pytest

from persona_lora.core.errors import UserError
from persona_lora.data.profile_writing import profile_writer
from persona_lora.profiles.features import extract_features

SAID = [f"hm, i fixed the {thing} again. twice." for thing in ("tap", "lamp", "boiler", "roof")]


class Scribe:
    name = "scribe"

    def __init__(self, text):
        self.text = text
        self.asked = []

    def write(self, conversations, **options):
        self.asked += conversations
        return [self.text]


def test_the_writer_sees_features_and_samples_and_its_text_is_the_profile():
    scribe = Scribe("  Terse, and tired of taps.\n")
    assert profile_writer(scribe)(extract_features(SAID), SAID[:2]) == "Terse, and tired of taps."
    asked = scribe.asked[0][-1]["content"]
    assert "- hm, i fixed the lamp again. twice." in asked
    assert "boiler" not in asked
    assert "{features}" not in asked


@pytest.mark.parametrize("text", [None, "  "])
def test_an_empty_profile_is_an_error(text):
    with pytest.raises(UserError, match="scribe wrote no profile"):
        profile_writer(Scribe(text))(extract_features(SAID), SAID)


def test_a_prompt_without_its_placeholders_is_refused():
    with pytest.raises(UserError, match="for a profile must contain"):
        profile_writer(Scribe("x"), "Describe {features}")
