from __future__ import annotations

import json

import pytest
import torch

from persona_lora.core.errors import UserError
from persona_lora.experiments.divergence import measure_costs, relative_weight_norm
from persona_lora.experiments.evaluation import GenerationOptions
from persona_lora.experiments.sweep import sweep
from persona_lora.models.generation import generate_answers
from persona_lora.models.structure import linear_modules
from persona_lora.steering.weights import LoRASteerer

OPTIONS = GenerationOptions(max_new_tokens=8)


@pytest.fixture
def run_sweep(chat_model, trait, datasets, judge, make_diff, tmp_path):
    diff = make_diff(chat_model.model, scale=0.3)

    def run(coefficients=(-1, 1), **options):
        return sweep(
            chat_model,
            trait,
            diff,
            coefficients,
            lambda: judge,
            tmp_path / "sweep",
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


def test_costs_are_zero_at_zero_and_grow_with_the_coefficient(chat_model, make_diff):
    diff = make_diff(chat_model.model)
    costs = measure_costs(chat_model, diff, [0.0, 0.5, 2.0, -2.0], ["Hello?", "Why?"])
    assert costs[0].kl_mean == costs[0].kl_p95 == costs[0].relative_weight_norm == 0
    assert 0 < costs[1].kl_mean < costs[2].kl_mean
    assert costs[2].relative_weight_norm == costs[3].relative_weight_norm
    assert costs[2].relative_weight_norm == pytest.approx(4 * costs[1].relative_weight_norm)


def test_the_relative_weight_norm_is_that_of_dense_matrices(chat_model, make_diff):
    diff = make_diff(chat_model.model)
    modules = linear_modules(chat_model.model)
    deltas = torch.cat([each.delta().flatten() for each in diff.factors.values()])
    weights = torch.cat([modules[name].weight.flatten() for name in diff.factors])
    expected = float(deltas.norm() / weights.norm())
    assert relative_weight_norm(chat_model, diff) == pytest.approx(expected, rel=1e-5)
