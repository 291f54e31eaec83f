"""The language-model persona judge: both orders, both readings, nothing in the middle."""

from __future__ import annotations

import pytest

from persona_lora.core.chat import Exchange
from persona_lora.core.errors import UserError
from persona_lora.judges.judge_prompts import Reading
from persona_lora.judges.persona_judges import ComparisonJudge
from persona_lora.profiles.judge_prompt import build_judge_prompt

TEMPLATE = build_judge_prompt("Short and dry.", ["No.", "Fine by me."])
EXCHANGES = [Exchange("How are you?", f"steered {number}") for number in range(40)]
BASELINES = {"How are you?": "plain {answer_b} {question}"}


def prefers(word):
    """A reader who likes the answer that holds ``word``: 5 where it is B, 1 where it is A."""
    seen = []

    def read(prompts):
        seen.extend(prompts)
        found = {}
        for prompt in prompts:
            first, second = prompt.split("Answer A:\n")[1].split("\n\nAnswer B:\n")
            found[prompt] = Reading(5.0 if word in second else 1.0, "")
            assert (word in first) != (word in second)
        return found

    return read, seen


@pytest.mark.parametrize(("word", "fit"), [("steered", 5.0), ("plain", 1.0)])
def test_the_fit_is_of_the_steered_answer_whichever_side_it_stands_on(word, fit):
    read, seen = prefers(word)
    verdicts = ComparisonJudge("llm", read, TEMPLATE, BASELINES).judge(EXCHANGES)
    assert {verdict.score for verdict in verdicts} == {fit}
    swapped = sum(prompt.index("steered") < prompt.index("plain") for prompt in seen)
    assert 8 < swapped < 32  # both orders occur


def test_the_order_is_drawn_by_the_seed_and_stays():
    def orders(seed):
        read, seen = prefers("steered")
        ComparisonJudge("llm", read, TEMPLATE, BASELINES, seed=seed).judge(EXCHANGES)
        return seen

    assert orders(1) == orders(1)
    assert orders(1) != orders(2)


def test_texts_go_into_the_prompt_literally():
    read, seen = prefers("steered")
    ComparisonJudge("llm", read, TEMPLATE, BASELINES).judge(EXCHANGES[:1])
    assert "plain {answer_b} {question}" in seen[0]


@pytest.mark.parametrize("reading", [Reading(None, "refusal"), Reading(7.0, ""), Reading(0.0, "")])
def test_what_is_no_fit_has_no_score(reading):
    judge = ComparisonJudge("llm", lambda p: dict.fromkeys(p, reading), TEMPLATE, BASELINES)
    (verdict,) = judge.judge(EXCHANGES[:1])
    assert verdict.score is None
    assert verdict.reason


def test_a_message_without_a_baseline_is_named():
    judge = ComparisonJudge("llm", lambda prompts: {}, TEMPLATE, BASELINES)
    with pytest.raises(UserError, match=r"'Who\?'"):
        judge.judge([Exchange("Who?", "Me.")])
    with pytest.raises(UserError, match="persona_fit"):
        judge.judge(EXCHANGES, "evil")
