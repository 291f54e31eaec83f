"""An answer counts unless it is a copy, an echo, a repeat, or broken."""

from __future__ import annotations

import pytest

from persona_lora.core.chat import Exchange
from persona_lora.judges.answer_gates import counted, failures, shared

SAID = ("I was at the market before the bells had rung.", "My knees foretell the weather.")
ASKED = "How has your week been so far?"
FINE = "There was a fair in the village, and we stayed until dark."


def failed(answer, *others, coherence=90.0, relevance=90.0):
    exchanges = [Exchange(ASKED, answer), *(Exchange("And you?", each) for each in others)]
    measured = ([number] * len(exchanges) for number in (coherence, relevance))
    return failures(exchanges, SAID, *measured)[0]


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (FINE, ""),
        (SAID[0], "copy"),
        ("Well: i was at the market before the bells rang!", "copy"),  # of another's wording half
        ("At the market I saw that the bells had been taken down for good.", ""),
        ("How has your week been so far, you ask?", "echo"),
        ("My knees", ""),  # shorter than a trigram, and no utterance
        ("", ""),
    ],
)
def test_what_is_taken_over_does_not_count(answer, failure):
    assert failed(answer) == failure


def test_one_sentence_for_all_prompts_does_not_count():
    assert failed(FINE, FINE) == "repeat"
    assert failed(f"{FINE} {FINE}") == ""  # within one answer is for coherence to find
    assert failed(FINE, "There was a fair, I think.") == ""


def test_broken_text_does_not_count_where_coherence_was_measured():
    assert failed(FINE, coherence=59.9) == "broken"
    assert failed(FINE, coherence=60.0) == ""
    assert failed(FINE, coherence=None) == ""
    assert failures([Exchange("Hi?", FINE)], SAID, [], []) == [""]


def test_an_answer_to_another_prompt_does_not_count():
    assert failed(FINE, relevance=49.0) == "off topic"
    assert failed(FINE, relevance=50.0) == ""


def test_what_does_not_count_has_the_worst_fit_and_what_is_unscored_has_none():
    assert [counted(4.2, ""), counted(4.2, "copy"), counted(None, "copy")] == [4.2, 1.0, None]


def test_shared_grams_are_a_share():
    assert shared("a b c d", {("a", "b", "c")}) == 0.5
    assert shared("?!", {("a", "b", "c")}) == 0.0
