"""Weights and activations at equal divergence, on the tiny model."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel, random_diff_like
from persona_lora.core.options import ComparisonOptions
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.steering.bank import Bank
from persona_lora.steering.directions import random_like
from persona_lora.steering.weights import LoRASteerer
from persona_lora.studies.asking.run import GenerationOptions
from persona_lora.studies.steering.calibration import (
    METHODS,
    bank_of_methods,
    match_divergence,
)
from persona_lora.studies.steering.comparison import compare
from persona_lora.studies.steering.divergence import ordinary_texts, row_divergences

OPTIONS = GenerationOptions(max_new_tokens=4)


@pytest.fixture
def methods(chat_model, make_diff):
    diff = make_diff(chat_model.model, scale=0.05)
    generator = torch.Generator().manual_seed(0)
    vector = SteeringVector({1: torch.randn(32, generator=generator)}, BaseModel("tiny", None), 2)
    return bank_of_methods(diff, vector, random_diff_like(diff, 0), random_like(vector, 1))


@pytest.fixture
def texts(chat_model):
    return ordinary_texts(chat_model, ["Hello.", "What is the time?"])


def test_every_method_is_brought_to_the_divergence_of_the_diff(chat_model, methods, texts):
    levels = match_divergence(chat_model, methods, [0.0, 0.5, -1.0], texts)
    assert [(each.level, each.method) for each in levels] == [
        (level, method) for level in (0, 1) for method in METHODS
    ]
    assert all(each.matched for each in levels)
    by_level = {level: [each for each in levels if each.level == level] for level in (0, 1)}
    for level, sign in ((0, 1), (1, -1)):
        diff = by_level[level][0]
        assert all(each.coefficient * sign > 0 for each in by_level[level])
        assert all(
            each.kl_mean == pytest.approx(diff.kl_mean, rel=0.03) for each in by_level[level]
        )
    # The divergences are those of steerers that know nothing of each other.
    lora, activation = by_level[0][:2]
    alone = Bank(vectors={"activation": methods.vectors["activation"]})
    kl = row_divergences(chat_model, alone, [activation.condition.coefficients], texts).mean()
    assert float(kl) == pytest.approx(activation.kl_mean, rel=1e-4)
    together = methods.steerer(chat_model, [{}, lora.condition.coefficients])
    tokens = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(1))
    with together, torch.no_grad():
        together.select_rows([0, 1])
        steered = chat_model.model(tokens).logits[1]
    with LoRASteerer(chat_model.model, methods.diffs["lora"], lora.coefficient), torch.no_grad():
        torch.testing.assert_close(
            chat_model.model(tokens).logits[1], steered, atol=1e-4, rtol=1e-3
        )


def test_p95_can_be_what_is_equal(chat_model, methods, texts):
    levels = match_divergence(chat_model, methods, [1.0], texts, statistic="p95")
    assert all(each.kl_p95 == pytest.approx(levels[0].kl_p95, rel=0.03) for each in levels)


def test_a_method_that_does_nothing_is_named(chat_model, methods, texts):
    still = dataclasses.replace(methods.vectors["activation"], directions={1: torch.zeros(32)})
    vectors = {**methods.vectors, "activation": still}
    with pytest.raises(UserError, match="activation has a divergence of 0"):
        match_divergence(chat_model, dataclasses.replace(methods, vectors=vectors), [1.0], texts)
    with pytest.raises(UserError, match="other than 0"):
        match_divergence(chat_model, methods, [0.0], texts)


def test_a_random_diff_has_the_spectrum_and_no_direction(make_diff, model):
    diff = make_diff(model)
    random = random_diff_like(diff, 1)
    for name, factors in diff.factors.items():
        expected = torch.linalg.svdvals(factors.delta().double())[: factors.rank]
        found = torch.linalg.svdvals(random.factors[name].delta().double())[: factors.rank]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert abs(diff.cosine(random)) < 0.1
    again = random_diff_like(diff, 1)
    assert all(
        torch.equal(random.factors[name].A, again.factors[name].A) for name in random.factors
    )
    assert random_diff_like(diff, 2).cosine(random) < 0.1


def test_a_comparison_asks_all_methods_the_same_and_resumes(
    chat_model, methods, trait, judge, tmp_path
):
    trait = dataclasses.replace(
        trait, questions={**trait.questions, "ood": ("Rank these: a, b.", "Write a toast.")}
    )

    def go():
        return compare(
            chat_model, trait, methods, lambda: judge, tmp_path / "out",
            comparing=ComparisonOptions((0.5, -0.5), max_questions=2), options=OPTIONS,
        )  # fmt: skip

    found = go()
    assert {each.split for each in found.points} == {"eval", "ood"}
    for split in ("eval", "ood"):
        own = [each for each in found.points if each.split == split]
        assert [each.method for each in own if each.level is None] == [
            "none", "prompt_neg", "prompt_pos",
        ]  # fmt: skip
        assert len([each for each in own if each.level is not None]) == 2 * len(METHODS)
        assert all(each.difference is None for each in own if each.method == "lora")
        assert all(each.trait.n == 2 for each in own)
    folder = tmp_path / "out"
    levels = [json.loads(line) for line in (folder / "levels.jsonl").open()]
    asked = {(row["method"], row["coefficient"]) for row in levels}
    answers = [json.loads(line) for line in (folder / "ood" / "answers.jsonl").open()]
    assert {
        (row["method"], row["coefficient"]) for row in answers if row["coefficient"] is not None
    } == asked
    for name in ("comparison.csv", "comparison.png", "report.html"):
        assert (folder / name).is_file()
    page = (folder / "report.html").read_text()
    assert "at equal divergence" in page
    assert "random vector of the same norm" in page
    count = len(judge.asked)
    assert go() == found
    assert len(judge.asked) == count


def test_a_trait_without_such_questions_is_named(chat_model, methods, trait, judge, tmp_path):
    ood = ComparisonOptions((1.0,), split=("ood",))
    with pytest.raises(UserError, match="no ood questions"):
        compare(chat_model, trait, methods, lambda: judge, tmp_path / "out", comparing=ood)


def test_several_steerers_leave_nothing_behind(chat_model, methods):
    tokens = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = chat_model.model(tokens).logits
    rows = [{"lora": 1.0}, {"activation": 1.0}]
    with pytest.raises(KeyError), methods.steerer(chat_model, rows):
        raise KeyError
    with torch.no_grad():
        assert torch.equal(chat_model.model(tokens).logits, plain)
