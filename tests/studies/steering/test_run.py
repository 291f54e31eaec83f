from __future__ import annotations

import json

import pytest
import torch

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.runs import Output
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.generation import generate_answers
from persona_lora.steering.activations import ActivationSteerer
from persona_lora.steering.directions import random_like
from persona_lora.steering.weights import LoRASteerer
from persona_lora.studies.asking.run import GenerationOptions
from persona_lora.studies.steering.run import (
    SweepOptions,
    diff_population,
    prompt_population,
    sweep,
    vector_population,
)

OPTIONS = GenerationOptions(max_new_tokens=8)


@pytest.fixture
def run_sweep(chat_model, trait, datasets, judge, make_diff, tmp_path):
    diff = make_diff(chat_model.model, scale=0.3)

    def run(coefficients=(-1, 1), *, overwrite=False, **options):
        return sweep(
            chat_model,
            trait,
            diff_population(diff, tuple(coefficients)),
            lambda: judge,
            Output(tmp_path / "sweep", overwrite),
            options=OPTIONS,
            datasets=datasets,
            **options,
        )

    run.diff = diff
    return run


def test_a_sweep_is_one_generation_and_equals_merged_answers(
    run_sweep, chat_model, trait, tmp_path
):
    """Token for token, in fp32: the rows of one batch against merged weights, one at a time."""
    result = run_sweep()
    answers = [json.loads(line) for line in (result.run / "answers.jsonl").open()]
    assert len(answers) == (3 + 2) * 3  # −1, 0, 1 and two prompts, three questions
    for coefficient in (-1.0, 0.0, 1.0):
        with LoRASteerer(chat_model.model, run_sweep.diff, coefficient):
            alone = generate_answers(
                chat_model,
                [[{"role": "user", "content": text}] for text in trait.questions["eval"]],
                max_new_tokens=8,
            )
        steered = [row["answer"] for row in answers if row["coefficient"] == coefficient]
        assert steered == [each.text for each in alone]


def test_a_sweep_writes_rows_tables_plot_and_report(run_sweep):
    result = run_sweep()
    names = {path.name for path in result.run.iterdir()}
    assert names == {
        "run.json",
        "answers.jsonl",
        "verdicts.jsonl",
        "validation.jsonl",
        "costs.jsonl",
        "sweep.csv",
        "sweep.png",
        "summary.json",
        "summary.csv",
        "report.html",
    }
    assert [each.coefficient for each in result.summary.steered] == [-1.0, 0.0, 1.0]
    assert json.loads((result.run / "summary.json").read_text())["trait"] == "cheer"


def test_a_second_run_reuses_the_first(run_sweep, judge):
    first = run_sweep()
    before = (first.run / "answers.jsonl").stat().st_mtime_ns
    asked = [count for _, count in judge.asked if count == 15]
    second = run_sweep()
    assert second.summary == first.summary
    assert [count for _, count in judge.asked if count == 15] == asked
    assert (second.run / "answers.jsonl").stat().st_mtime_ns >= before
    with pytest.raises(UserError, match="another configuration"):
        run_sweep((-2, 2))
    assert [each.coefficient for each in run_sweep((-2, 2), overwrite=True).summary.steered] == [
        -2.0,
        0.0,
        2.0,
    ]


@pytest.mark.parametrize("coefficients", [(), (0,), (float("nan"),)])
def test_senseless_coefficients_are_refused(run_sweep, coefficients, tmp_path):
    with pytest.raises(UserError):
        run_sweep(coefficients)
    assert not (tmp_path / "sweep").exists()


@pytest.fixture
def vector():
    generator = torch.Generator().manual_seed(3)
    directions = {layer: 3 * torch.randn(32, generator=generator) for layer in (0, 1)}
    return SteeringVector(directions, BaseModel("tiny"), num_layers=2)


@pytest.fixture
def run_population(chat_model, trait, datasets, judge, tmp_path):
    def run(population, **options):
        return sweep(
            chat_model,
            trait,
            population,
            lambda: judge,
            tmp_path / "sweep",
            options=OPTIONS,
            datasets=datasets,
            **options,
        )

    return run


def rows_of(run, name):
    return [json.loads(line) for line in (run / f"{name}.jsonl").open()]


def test_a_grid_of_layers_and_coefficients_equals_answers_steered_one_by_one(
    run_population, chat_model, trait, vector
):
    population = vector_population(vector, (0, 1), (-1.0, 2.0))
    result = run_population(population, sweeping=SweepOptions(costs=False))
    answers = rows_of(result.run, "answers")
    assert len(answers) == (1 + 2 * 2 + 2) * 3  # unsteered, the grid, two prompts; 3 questions
    for layer in (0, 1):
        for coefficient in (-1.0, 2.0):
            with ActivationSteerer(chat_model.model, vector, coefficient, layer):
                alone = generate_answers(
                    chat_model,
                    [[{"role": "user", "content": text}] for text in trait.questions["eval"]],
                    max_new_tokens=8,
                )
            cell = ("activation", layer, coefficient)
            steered = [
                row["answer"]
                for row in answers
                if (row["method"], row["layer"], row["coefficient"]) == cell
            ]
            assert steered == [each.text for each in alone]
    names = {path.name for path in result.run.iterdir()}
    assert {"grid.json", "grid.csv", "layers.png", "report.html", "sweep.csv"} <= names
    assert "costs.jsonl" not in names


def test_one_layer_with_its_random_control_is_a_curve_with_costs(run_population, vector):
    control = random_like(vector, seed=0)
    result = run_population(vector_population(vector, (1,), (-1.0, 1.0), control=control))
    assert [each.coefficient for each in result.summary.steered] == [-1.0, 0.0, 1.0]
    costs = rows_of(result.run, "costs")
    assert {(row["method"], row["layer"], row["coefficient"]) for row in costs} == {
        (method, 1, value) for method in ("activation", "random") for value in (-1.0, 1.0)
    }
    assert {"sweep.png", "summary.json"} <= {path.name for path in result.run.iterdir()}


def test_a_prompt_sweep_is_the_references_alone(run_population):
    result = run_population(prompt_population(), sweeping=SweepOptions(costs=False))
    methods = {row["method"] for row in rows_of(result.run, "answers")}
    assert methods == {"none", "prompt_pos", "prompt_neg"}


def test_max_questions_takes_the_first(run_population, vector, trait):
    options = SweepOptions(split="extract", references=False, costs=False, max_questions=1)
    result = run_population(vector_population(vector, (0, 1), (1.0,)), sweeping=options)
    asked = {row["question"] for row in rows_of(result.run, "answers")}
    assert asked == {trait.questions["extract"][0]}


def test_a_population_that_cannot_be_is_refused(vector):
    with pytest.raises(UserError, match="at least one layer"):
        vector_population(vector, (), (1.0,))
    with pytest.raises(UserError, match="no layer 7"):
        vector_population(vector, (7,), (1.0,))
    with pytest.raises(UserError, match="other than 0"):
        vector_population(vector, (1,), (0.0,))
