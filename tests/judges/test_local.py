"""A local model, given as functions, as a judge."""

from __future__ import annotations

import math

import pytest

from persona_lora.core.chat import COHERENCE, Exchange
from persona_lora.core.errors import UserError
from persona_lora.judges.judge_prompts import PromptJudge, yes_template
from persona_lora.judges.local import LocalReader, YesReader


def logs(probabilities: dict[str, float]) -> dict[str, float]:
    return {token: math.log(p) for token, p in probabilities.items()}


def test_local_judge_scores_filled_prompts_in_order_and_equal_ones_once(trait):
    asked = []

    def first(prompts):
        asked.extend(prompts)
        return [logs({"90" if "good" in each else "10": 0.5, " 20": 0.5}) for each in prompts]

    judge = PromptJudge(trait, LocalReader("local:tiny", first))
    items = [Exchange("q", "good"), Exchange("q", "bad"), Exchange("q", "good")]
    verdicts = judge.judge(items, "flattery")
    assert [verdict.score for verdict in verdicts] == pytest.approx([55, 15, 55])
    assert verdicts[0].judge == "local:tiny"
    assert asked == [
        "Rate flattery 0-100.\nQ: q\nA: good\nOnly the number.",
        "Rate flattery 0-100.\nQ: q\nA: bad\nOnly the number.",
    ]
    judge.judge(items[:1], COHERENCE)
    assert "coherent" in asked[-1]
    assert judge.judge([], COHERENCE) == []


def test_local_judge_leaves_low_mass_unscored_and_refuses_another_trait(trait):
    first = [logs({"Sure": 0.9, "5": 0.1})]
    judge = PromptJudge(trait, LocalReader("j", lambda prompts: first * len(prompts)))
    (verdict,) = judge.judge([Exchange("q", "a")], "flattery")
    assert verdict.score is None
    assert "0.10" in verdict.reason
    with pytest.raises(UserError, match="evil"):
        judge.judge([Exchange("q", "a")], "evil")


STEPS = {
    "": {"0": 0.1, "1": 0.3, "8": 0.5, "No": 0.1},
    "1": {"0": 0.6, "<end>": 0.4},
    "8": {"5": 0.7, "<end>": 0.2, "x": 0.1},
    "10": {"0": 0.5, "<end>": 0.5},
}


def test_local_judge_multiplies_digit_steps_into_whole_numbers(trait):
    reader = LocalReader(
        "digits",
        lambda prompts: [logs(STEPS[""]) for _ in prompts],
        lambda pairs: [logs(STEPS[start]) for _, start in pairs],
    )
    judge = PromptJudge(trait, reader)
    numbers = {
        0: 0.1,
        1: 0.3 * 0.4,
        10: 0.3 * 0.6 * 0.5,
        100: 0.3 * 0.6 * 0.5,
        8: 0.5 * 0.3,
        85: 0.5 * 0.7,
    }
    assert sum(numbers.values()) == pytest.approx(0.9)
    expected = sum(number * p for number, p in numbers.items()) / 0.9
    verdicts = judge.judge([Exchange("q", "a"), Exchange("q", "b")], "flattery")
    assert [verdict.score for verdict in verdicts] == pytest.approx([expected, expected])


def test_numbers_that_tokens_write_whole_keep_their_probability_beside_digit_steps(trait):
    """A tokenizer with a token for "75" may write "7", "5" too: both are the number 75."""
    first = {"75": 0.5, " 75": 0.1, "7": 0.2, "100": 0.1, "No": 0.1}
    steps = {"7": {"5": 0.1, "<end>": 0.9}}
    reader = LocalReader(
        "whole",
        lambda prompts: [logs(first)],
        lambda pairs: [logs(steps[start]) for _, start in pairs],
    )
    ((reading,)) = reader.read(["how good?"]).values()
    expected = 75 * (0.6 + 0.2 * 0.1) + 7 * 0.2 * 0.9 + 100 * 0.1
    assert reading.score == pytest.approx(expected / 0.9)
    assert reading.number_mass == pytest.approx(0.9)


@pytest.mark.parametrize("tokens", [{"1": 0.99, "9": 0.005, "The": 0.005}, {"8": 0.5, "7": 0.4}])
def test_local_judge_refuses_digits_without_a_continuation(trait, tokens):
    reader = LocalReader("j", lambda _: [logs(tokens)])
    with pytest.raises(UserError, match="continuation_logprobs"):
        reader.read(["how good?"])


def test_a_local_reader_of_one_digit_takes_the_first_one():
    """Of 1 to 5 there is nothing that could follow: no second pass, and no number is refused."""
    tokens = {"4": 0.5, " 5": 0.25, "9": 0.2}
    reader = LocalReader("j", lambda asked: [logs(tokens) for _ in asked], highest=5)
    (reading,) = reader.read(["how alike?", "how alike?"]).values()
    assert reading.score == pytest.approx((4 * 0.5 + 5 * 0.25) / 0.75)
    never = LocalReader("j", reader.next_token_logprobs, lambda _: pytest.fail("asked"), highest=5)
    assert never.read(["how alike?"]) == {"how alike?": reading}


def test_a_yes_judge_asks_once_and_scores_what_it_is_about_to_say(trait):
    asked = []

    def first(prompts):
        asked.extend(prompts)
        return [logs({"Yes": 0.6 if "good" in each else 0.1, "No": 0.2}) for each in prompts]

    judge = PromptJudge(trait, YesReader("local-yes:tiny", first), yes_template)
    items = [Exchange("q", "good"), Exchange("q", "bad"), Exchange("q", "good")]
    verdicts = judge.judge(items, "flattery")
    assert [verdict.score for verdict in verdicts] == pytest.approx([75, 100 / 3, 75])
    assert len(asked) == 2
    assert judge.judge([], "flattery") == []
