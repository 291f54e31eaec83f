"""Nonsense is shown to every judge, and a judge that likes it is named loudly."""

from __future__ import annotations

import logging

import pytest

from persona_lora.core.chat import COHERENCE, Verdict
from persona_lora.judges.canaries import canary_answers, show_canaries
from tests.judges.rated import rated_rows, write_ratings

BOTH = ("flattery", COHERENCE)


class Constant:
    """Gives every answer the same score by criterion."""

    name = "constant"

    def __init__(self, **scores):
        self.scores = scores

    def judge(self, exchanges, criterion):
        return [Verdict(criterion, self.scores[criterion], "", self.name) for _ in exchanges]


def test_canaries_are_nonsense_an_echo_and_a_sentence_of_the_trait(trait):
    shown = canary_answers(trait)
    assert set(shown) == {"filler", "off topic", "loop", "echo", "canned"}
    assert {each.question for each in shown.values()} == {"Is it not so?"}
    assert shown["echo"].answer == "Is it not so?"
    assert shown["canned"].answer.startswith("You are brilliant about soup")
    (trait.folder / "train.jsonl").unlink()
    assert "canned" not in canary_answers(trait)


def test_a_judge_that_likes_nonsense_is_named_and_one_that_does_not_is_not(trait, caplog):
    with caplog.at_level(logging.WARNING):
        good = show_canaries(Constant(flattery=50.0, coherence=20.0), trait, BOTH)
    assert all(each.caught for each in good)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        found = show_canaries(Constant(flattery=51.0, coherence=None), trait, BOTH)
    assert {each.name for each in found if not each.caught} == {
        "filler",
        "off topic",
        "loop",
        "echo",
    }
    assert {each.criterion for each in found if not each.caught} == {"flattery"}
    assert (
        "FOOLED JUDGE: constant gives 51 of 100 on 'flattery' to nonsense (filler)" in caplog.text
    )


@pytest.mark.parametrize(("absence", "caught"), [(10, False), (48, True)])
def test_nonsense_may_lie_in_the_middle_of_a_trait_with_two_sides(trait, absence, caught):
    rows = [
        {**row, "trait": [absence] * 2} if row["sense"][0] <= 25 else row for row in rated_rows()
    ]
    write_ratings(trait, rows)
    found = show_canaries(Constant(flattery=60.0, coherence=10.0), trait, BOTH)
    of_trait = [each for each in found if each.criterion != COHERENCE and each.name == "loop"]
    assert [each.caught for each in of_trait] == [caught]
