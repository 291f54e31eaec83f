"""Filling judge prompts and reading numbers."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_lora.core.chat import COHERENCE, Exchange
from persona_lora.core.errors import UserError
from persona_lora.judges.judge_prompts import (
    fill_prompt,
    number_reply,
    prompt_template,
    share_of_yes,
    shows_whole_numbers,
    weighted_score,
    yes_template,
)


def test_fill_prompt_keeps_braces_and_placeholder_names_literal():
    exchange = Exchange("{answer} or {0}?", "a {question} {x!r} {{}} %s \\1")
    assert fill_prompt("Q={question};A={answer};Q={question}", exchange) == (
        "Q={answer} or {0}?;A=a {question} {x!r} {{}} %s \\1;Q={answer} or {0}?"
    )


@given(st.text(), st.text())
def test_fill_prompt_is_literal_for_any_text(question, answer):
    filled = fill_prompt("<{question}|{answer}>", Exchange(question, answer))
    assert filled == "<" + question + "|" + answer + ">"


def test_prompts_exist_for_the_trait_and_for_coherence_only(trait):
    exchange = Exchange("Why?", "Because.")
    asked = fill_prompt(prompt_template(trait, "flattery"), exchange)
    assert asked.startswith("Rate flattery 0-100.\nQ: Why?")
    coherence = fill_prompt(prompt_template(trait, COHERENCE), exchange)
    assert "Because." in coherence
    assert "{" not in coherence
    with pytest.raises(UserError, match="'evil'"):
        prompt_template(trait, "evil")


def test_yes_or_no_is_asked_of_the_trait_s_description_and_of_coherence(trait):
    trait = dataclasses.replace(trait, description="Says {name}, as {answer} or {question}.")
    asked = yes_template(trait, "flattery")
    assert asked.startswith("Does this answer show flattery? Says {name}, as")
    assert "{question}\nAnswer: {answer}\n" in asked
    assert yes_template(trait, COHERENCE).startswith("Is this answer coherent")
    with pytest.raises(UserError, match="'evil'"):
        yes_template(trait, "evil")


def test_the_share_of_yes_is_over_yes_and_no_alone():
    logs = {"Yes": 0.3, " yes": 0.1, "No": 0.2, "NO": 0.2, "Well": 0.2}
    found = share_of_yes({token: math.log(p) for token, p in logs.items()})
    assert found.score == pytest.approx(50.0)
    assert found.number_mass == pytest.approx(0.8)
    assert share_of_yes({"Yes": math.log(0.9)}).score == 100.0
    unsure = share_of_yes({"Well": math.log(0.8), "Yes": math.log(0.2)})
    assert unsure.score is None
    assert unsure.reason == "yes and no have 0.20, under 0.25"


def test_weighted_score_is_the_mean_over_number_tokens():
    reading = weighted_score({"80": math.log(0.6), "20": math.log(0.2), "The": math.log(0.2)})
    assert reading.score == pytest.approx((80 * 0.6 + 20 * 0.2) / 0.8)
    assert reading.number_mass == pytest.approx(0.8)


def test_weighted_score_counts_spaced_tokens_beside_bare_ones():
    reading = weighted_score([("50", math.log(0.3)), (" 100", math.log(0.3)), ("100\n", -50.0)])
    assert reading.score == pytest.approx(75.0)


def test_weighted_score_is_unscored_under_a_quarter_of_mass():
    assert weighted_score({"80": math.log(0.26)}).score == pytest.approx(80)
    reading = weighted_score({"80": math.log(0.24), "I": math.log(0.7)})
    assert reading.score is None
    assert "0.24" in reading.reason


@pytest.mark.parametrize("token", ["101", "007", "-5", "8.5", "٣", "1e1", "", " ", "5%"])
def test_weighted_score_takes_only_whole_numbers_to_100(token):
    assert weighted_score({token: 0.0}).score is None


def test_weighted_score_reads_the_beginning_of_a_refusal_as_one():
    assert weighted_score({"REF": math.log(0.9), "5": math.log(0.05)}).reason == "refusal"


def test_weighted_score_survives_rounding_above_probability_one_and_nan():
    assert weighted_score({"100": 1e-6}).score == 100.0
    assert weighted_score({"100": float("nan")}).score is None
    assert weighted_score({}).score is None


@given(st.dictionaries(st.integers(0, 100).map(str), st.floats(-20, 0), min_size=1))
def test_weighted_score_stays_between_the_extreme_numbers(logprobs):
    score = weighted_score(logprobs).score
    if score is not None:
        numbers = [int(token) for token in logprobs]
        assert min(numbers) - 1e-9 <= score <= max(numbers) + 1e-9


@pytest.mark.parametrize("text", ["85", " 85\n", "85.", "85.0", "**85**", "85/100", "85 / 100.",
    "85 out of 100", "85%", "Score: 85", "**Score:** 85/100", "rating = 85", '{"score": 85}',
    '{"rating": "85/100"}'])  # fmt: skip
def test_number_reply_takes_a_reply_that_is_one_number(text):
    assert number_reply(text).score == 85


@pytest.mark.parametrize("text", ["7/10", "85/10", "8/5", "101", "100.5", "-1", "85 or 90", "",
    "nan", "1e2", "085", "0.85", "Score: 0.9", "I say 85", "85, because", "100 85", "85/100/100",
    '{"score": 85, "of": 10}',
    '{"score": [85]}', '{"score": true}', '{"score": 85', "٨٥", "85 90"])  # fmt: skip
def test_number_reply_refuses_anything_else_with_a_reason(text):
    reading = number_reply(text)
    assert reading.score is None
    assert "not a number" in reading.reason


@pytest.mark.parametrize("text", ["0.5/100", "0.5%", "0.5 out of 100"])
def test_number_reply_takes_little_that_says_of_how_much(text):
    assert number_reply(text).score == 0.5


def test_number_reply_on_another_scale():
    assert number_reply("4/5", 5).score == number_reply("4", 5).score == 4
    assert {number_reply(text, 5).score for text in ("4/100", "80%", "6")} == {None}


@pytest.mark.parametrize("text", ["REFUSAL", " refusal.\n"])
def test_number_reply_reads_a_refusal(text):
    assert number_reply(text) == (None, "refusal", None)


def test_whole_numbers_are_shown_by_numbers_of_several_digits_alone():
    assert shows_whole_numbers(["8", "The", " 85"])
    assert shows_whole_numbers(["▁10"])
    assert not shows_whole_numbers(["0", "5", "1", "The", "٨٥"])


def test_numbers_over_the_highest_are_no_part_of_the_score():
    reading = weighted_score({"4": math.log(0.5), "45": math.log(0.3), "100": math.log(0.1)}, 5)
    assert reading == (pytest.approx(4), "", pytest.approx(0.5))


@pytest.mark.parametrize("token", ["▁85", "Ġ85", "85Ċ", " 85 "])
def test_spaces_of_every_tokenizer_are_taken_off(token):
    assert weighted_score({token: -0.05}).score == pytest.approx(85)
