"""A small trait folder, and a judge that needs no model."""

from __future__ import annotations

import json

import pytest

from persona_lora.core.chat import Verdict
from persona_lora.core.traits import load_trait

QUESTIONS = {
    "extract": ["Is tea good?", "What is a hill?"],
    "eval": ["Why do birds sing?", "Is my plan good?", "How tall is a house?"],
}


@pytest.fixture
def datasets(tmp_path):
    root = tmp_path / "datasets"
    (root / "cheer").mkdir(parents=True)
    (root / "ordinary").mkdir()
    trait = {
        "name": "cheer",
        "instruction": [{"pos": "Be cheerful.", "neg": "Be gloomy."}] * 2,
        "questions": QUESTIONS,
        "eval_prompt": "Rate {question} {answer}",
    }
    (root / "cheer" / "trait.json").write_text(json.dumps(trait))
    labelled = [
        {"question": f"q{i}", "answer": "z" * (i + 1), "label": (i % 5) * 25} for i in range(10)
    ]
    (root / "cheer" / "judge_eval.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in labelled)
    )
    (root / "ordinary" / "prompts.jsonl").write_text('{"prompt": "Hello?"}\n{"prompt": "Why?"}\n')
    return root


@pytest.fixture
def trait(datasets):
    return load_trait("cheer", datasets)


class ParityJudge:
    """Scores the share of characters with an even code point, and notes what it was asked."""

    name = "parity"

    def __init__(self):
        self.asked = []

    def judge(self, exchanges, criterion):
        self.asked.append((criterion, len(exchanges)))
        return [self._verdict(exchange.answer, criterion) for exchange in exchanges]

    def _verdict(self, answer, criterion):
        if not answer:
            return Verdict(criterion, None, "empty answer", self.name)
        share = sum(ord(letter) % 2 == 0 for letter in answer) / len(answer)
        return Verdict(criterion, 100 * share, "", self.name)


@pytest.fixture
def judge():
    return ParityJudge()
