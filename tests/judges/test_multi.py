"""The mean of several judges."""

from __future__ import annotations

import pytest

from persona_lora.core.chat import Exchange, Verdict
from persona_lora.core.errors import UserError
from persona_lora.judges.judging import MultiJudge

ITEMS = [Exchange("q", str(number)) for number in range(4)]


class FixedJudge:
    """Gives the same scores each time."""

    def __init__(self, name: str, *scores: float | None) -> None:
        self.name = name
        self.scores = scores

    def judge(self, exchanges, criterion):
        return [
            Verdict(criterion, score, "" if score is not None else "tired", self.name)
            for _, score in zip(exchanges, self.scores, strict=True)
        ]


FIRST = FixedJudge("a", 10.0, 20.0, None, None)
SECOND = FixedJudge("b", 30.0, 40.0, 50.0, None)


def test_multi_judge_averages_what_all_scored_and_lists_them():
    verdicts = MultiJudge([FIRST, SECOND]).judge(ITEMS, "evil")
    assert [verdict.score for verdict in verdicts] == [20.0, 30.0, None, None]
    assert verdicts[0] == Verdict(
        "evil", 20.0, "a: 10.0; b: 30.0; range 20.0, sd 10.0", "multi:a+b"
    )
    assert verdicts[2].reason == "a: unscored (tired); b: 50.0"
    assert verdicts[3].reason == "a: unscored (tired); b: unscored (tired)"


def test_multi_judge_needs_judges_of_different_names():
    with pytest.raises(UserError, match="different names"):
        MultiJudge([FIRST, FIRST])
    with pytest.raises(UserError):
        MultiJudge([])
