from __future__ import annotations

import csv
import json

import pytest
import torch

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.runs import Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.traits import NEUTRAL_PROMPTS
from persona_lora.models import generation
from persona_lora.steering.activations import ActivationSteerer, DirectionAblation
from persona_lora.steering.bank import ActivationSetting
from persona_lora.steering.weights import LoRASteerer
from persona_lora.studies.asking.run import (
    Condition,
    GenerationOptions,
    Steering,
    evaluate,
    plan_rows,
)

OPTIONS = GenerationOptions(max_new_tokens=8)


def rows_of(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_plan_crosses_conditions_questions_and_samples(trait):
    conditions = [
        Condition("lora", 1.0),
        Condition("prompt_pos"),
        Condition("prompt", system_prompt="X"),
    ]
    plan = plan_rows(trait, "eval", conditions, samples=2)
    assert [row.stream for row in plan] == 3 * [0, 1, 1000, 1001, 2000, 2001]
    assert {row.system_prompt for row in plan if row.condition.method == "lora"} == {None}
    assert {row.system_prompt for row in plan if row.condition.method == "prompt_pos"} == {
        "Be cheerful."
    }
    assert {row.system_prompt for row in plan if row.condition.method == "prompt"} == {"X"}


def test_neutral_prompts_are_taken_in_turn_and_stand_beside_a_diff_too(trait):
    conditions = [Condition("prompt_neutral"), Condition("lora", 1.0, system_prompt="neutral")]
    plan = plan_rows(trait, "eval", conditions, samples=1)
    assert [row.system_prompt for row in plan] == 2 * list(NEUTRAL_PROMPTS[:3])
    assert Steering(system_prompt="neutral").condition() == Condition("prompt_neutral")


def test_evaluate_writes_the_csv_and_the_rows(chat_model, trait, judge, tmp_path):
    result = evaluate(chat_model, trait, lambda: judge, tmp_path / "base.csv", options=OPTIONS)
    table = rows_of(tmp_path / "base.csv")
    assert list(table[0]) == ["question", "prompt", "answer", "cheer", "coherence", "judge"]
    assert [row["question"] for row in table] == list(trait.questions["eval"])
    assert result.trait.n_questions == 3
    assert result.trait.low <= result.trait.mean <= result.trait.high
    record = json.loads((tmp_path / "base" / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["config"]["trait"] == "cheer"
    verdicts = (tmp_path / "base" / "verdicts.jsonl").read_text().splitlines()
    assert len(verdicts) == 2 * 3
    validation = json.loads((tmp_path / "base" / "validation.jsonl").read_text())
    assert validation["n"] == 10


@pytest.mark.parametrize("mode", ["live", "merged"])
def test_a_diff_steers_as_merged_weights_do(chat_model, trait, judge, make_diff, tmp_path, mode):
    diff = make_diff(chat_model.model, scale=0.3)
    options = {"options": OPTIONS, "steering": Steering({diff: 1.0}, mode)}
    evaluate(chat_model, trait, lambda: judge, tmp_path / "steered.csv", **options)
    with LoRASteerer(chat_model.model, diff, 1.0):
        evaluate(chat_model, trait, lambda: judge, tmp_path / "merged.csv", options=OPTIONS)
    evaluate(chat_model, trait, lambda: judge, tmp_path / "base.csv", options=OPTIONS)
    answers = {
        name: [row["answer"] for row in rows_of(tmp_path / f"{name}.csv")]
        for name in ("steered", "merged", "base")
    }
    assert answers["steered"] == answers["merged"] != answers["base"]


@pytest.fixture
def vector():
    generator = torch.Generator().manual_seed(3)
    directions = {layer: 3 * torch.randn(32, generator=generator) for layer in (0, 1)}
    return SteeringVector(directions, BaseModel("tiny"), num_layers=2)


@pytest.mark.parametrize("ablate", [False, True])
def test_a_vector_steers_as_its_context_manager_does(
    chat_model, trait, judge, vector, tmp_path, ablate
):
    setting = ActivationSetting({vector: -1.5}, (1,), ablate=ablate, positions="all")
    steering = Steering(activation=setting)
    evaluate(
        chat_model, trait, lambda: judge, tmp_path / "a.csv", options=OPTIONS, steering=steering
    )
    if ablate:
        steerer = DirectionAblation(chat_model.model, vector, 1)
    else:
        steerer = ActivationSteerer(chat_model.model, vector, -1.5, 1, "all")
    with steerer:
        evaluate(chat_model, trait, lambda: judge, tmp_path / "b.csv", options=OPTIONS)
    evaluate(chat_model, trait, lambda: judge, tmp_path / "c.csv", options=OPTIONS)
    answers = [[row["answer"] for row in rows_of(tmp_path / f"{name}.csv")] for name in "abc"]
    assert answers[0] == answers[1] != answers[2]
    row = json.loads((tmp_path / "a" / "answers.jsonl").open().readline())
    expected = ("ablation", 1, None) if ablate else ("activation", 1, -1.5)
    assert (row["method"], row["layer"], row["coefficient"]) == expected


def test_a_diff_and_a_vector_at_once_are_refused(
    chat_model, trait, judge, make_diff, vector, tmp_path
):
    both = Steering({make_diff(chat_model.model): 1.0}, activation=ActivationSetting({}))
    with pytest.raises(UserError, match="choose one"):
        evaluate(chat_model, trait, lambda: judge, tmp_path / "x.csv", steering=both)
    none = Steering(activation=ActivationSetting({}))
    with pytest.raises(UserError, match="at least one steering vector"):
        evaluate(chat_model, trait, lambda: judge, tmp_path / "x.csv", steering=none)


def test_a_killed_evaluation_goes_on_where_it_stopped(
    chat_model, trait, judge, tmp_path, monkeypatch
):
    options = GenerationOptions(max_new_tokens=8, batch_size=1, temperature=1.0)
    evaluate(chat_model, trait, lambda: judge, tmp_path / "whole.csv", options=options)
    plain, calls = generation._Job.run, []

    def killed(self, rows, *, done_rows):
        calls.append(rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, rows, done_rows=done_rows)

    monkeypatch.setattr(generation._Job, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(chat_model, trait, lambda: judge, tmp_path / "cut.csv", options=options)
    assert not (tmp_path / "cut.csv").exists()
    evaluate(chat_model, trait, lambda: judge, tmp_path / "cut.csv", options=options)
    assert len(calls) == 4  # two kept, one lost, one done again
    assert (tmp_path / "cut.csv").read_text() == (tmp_path / "whole.csv").read_text()


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.5])
def test_answers_are_drawn_at_the_temperature_that_is_asked_for(
    chat_model, trait, judge, tmp_path, temperature
):
    told = {"max_new_tokens": 12, "temperature": temperature, "seed": 4}
    options = GenerationOptions(**told, samples=2 if temperature else 1)
    evaluate(chat_model, trait, lambda: judge, tmp_path / "x.csv", options=options)
    plan = plan_rows(trait, "eval", [Condition("none")], samples=options.samples)
    wanted = generation.generate_answers(
        chat_model,
        [[{"role": "user", "content": row.question}] for row in plan],
        plan=generation.RowPlan(streams=[row.stream for row in plan]),
        **told,
    )
    rows = Run(tmp_path / "x").read("answers")
    assert [row["answer"] for row in rows] == [each.text for each in wanted]
    assert len({each.text for each in wanted}) > len(trait.questions["eval"]) - 1


def test_a_finished_evaluation_is_not_judged_again(chat_model, trait, judge, tmp_path):
    for _ in range(2):
        evaluate(chat_model, trait, lambda: judge, tmp_path / "a.csv", options=OPTIONS)
    answered = [each for each in judge.asked if each[1] == 3]
    assert len(answered) == 2  # trait and coherence, once each
    told = Steering(system_prompt="pos")
    with pytest.raises(UserError, match="another configuration"):
        evaluate(chat_model, trait, lambda: judge, tmp_path / "a.csv", steering=told)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steering": Steering(mode="fused")}, "live, merged"),
        ({"output": "x.json"}, r"\.csv"),
    ],
)
def test_senseless_settings_are_refused(chat_model, trait, judge, tmp_path, arguments, message):
    output = tmp_path / arguments.pop("output", "x.csv")
    with pytest.raises(UserError, match=message):
        evaluate(chat_model, trait, lambda: judge, output, **arguments)
    assert not output.exists()


def test_samples_of_a_greedy_answer_are_refused():
    with pytest.raises(UserError, match="temperature above 0"):
        GenerationOptions(samples=3)
    with pytest.raises(UserError, match="samples must be"):
        GenerationOptions(samples=0)
