"""A trait without labelled answers is judged, with a warning; broken ones are refused at once."""

from __future__ import annotations

import logging

import pytest

from persona_lora.core.chat import Verdict
from persona_lora.core.errors import UserError
from persona_lora.core.traits import InstructionPair, Trait
from persona_lora.judges.choice import JudgeOptions, check_judge
from persona_lora.judges.fitness import validate_judge


class Even:
    name = "even"

    def judge(self, exchanges, criterion):
        return [Verdict(criterion, 50.0, "", self.name) for _ in exchanges]


@pytest.fixture
def trait(tmp_path):
    pair = (InstructionPair("a", "b"),)
    return Trait("calm", "", pair, {"eval": ("Why?",)}, "{question} {answer}", tmp_path)


def test_a_trait_without_labels_is_judged_with_a_warning(trait, caplog):
    with caplog.at_level(logging.WARNING):
        found = validate_judge(Even(), trait)
    assert "JUDGE NOT VALIDATED: the trait calm has no judge_eval.jsonl" in caplog.text
    assert (found.judge, found.auc, found.n) == ("even", None, 0)


def test_what_would_fail_after_generating_fails_before(trait, chat_model):
    local = JudgeOptions(judge="local")
    check_judge(trait, local)
    with pytest.raises(UserError, match=r"train\.jsonl does not exist"):
        check_judge(trait, JudgeOptions(judge="embedding"))
    (trait.folder / "judge_eval.jsonl").write_text('{"question": "x", "answer": "y", "label": 3}')
    with pytest.raises(UserError, match="label must be one of"):
        check_judge(trait, local)
