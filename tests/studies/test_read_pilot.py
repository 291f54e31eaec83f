from __future__ import annotations

import re

import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.runs import Output, Run
from persona_lora.report.power import Planned
from persona_lora.studies.read_pilot import (
    finetunes_line,
    power_line,
    power_table,
    read_finetunes,
    read_pilot,
    wider_line,
)
from tests.studies.drift.test_read_prediction import of_data_sets, without_data


@pytest.fixture
def pilot(tmp_path, sweep_rows):
    def make(seed=0, command="sweep", trait="sycophancy", **options):
        answers, verdicts = sweep_rows(seed=seed, trait=trait, **options)
        with Run.open(
            Output(tmp_path / f"{command}{seed}"),
            command=command,
            config={"trait": trait},
            seed=0,
            inputs={"the seed of the diff": str(seed)},
        ) as run:
            run.append("answers", answers)
            run.append("verdicts", verdicts)
        return run

    return make


def test_a_sweep_is_a_pilot_and_its_family_is_counted(pilot):
    found, comparisons = read_pilot([pilot()])
    assert comparisons == 8
    assert found.seed_spread is None
    assert found.questions.std() == pytest.approx(5 * 2**0.5, rel=0.6)


def test_several_sweeps_are_seeds(pilot):
    found, _ = read_pilot([pilot(seed) for seed in range(4)])
    assert found.seed_spread is not None


def test_what_is_no_pilot_is_refused(pilot):
    with pytest.raises(UserError, match="run of 'evaluate'; a pilot is"):
        read_pilot([pilot(command="evaluate")])
    with pytest.raises(UserError, match="compares other things"):
        read_pilot([pilot(), pilot(1, coefficients=(-1.0, 0.0, 1.0))])
    with pytest.raises(UserError, match=r"differs in more than the seed .*config\.trait"):
        read_pilot([pilot(), pilot(3, trait="evil")])
    with pytest.raises(UserError, match="seed of its own, got 0, 0"):
        read_pilot([pilot()] * 2)
    with pytest.raises(UserError, match="did not ask the unsteered"):
        read_pilot([pilot(2, coefficients=(1.0, 2.0))])


def test_the_plan_in_words():
    found = [Planned(n, s, p) for n, s, p in ((8, 3, 0.5), (12, 3, 0.81), (8, 5, 0.9), (12, 5, 1))]
    assert power_table(found).columns == ("questions", "3 seeds", "5 seeds")
    assert power_line(found, 10, 0.8) == (
        "A difference of 10.0 points needs 12 questions with 3 seeds: it is then found in 81 of "
        "100 experiments."
    )
    assert "None of these sizes" in power_line(found[:1], 10, 0.8)
    assert "nothing is known of others" in power_line([Planned(8, 1, 0.9)], 10, 0.8)


def test_a_small_pilot_says_what_it_leaves_open(pilot):
    small, _ = read_pilot([pilot()])
    least, more = [Planned(8, 1, 0.9)], [Planned(20, 1, 0.8)]
    said = wider_line(small, least, more, 0.8)
    assert said.startswith(f"{small.size[1]} questions tell how they vary only roughly: ")
    assert said.endswith("(80%), it needs 20 questions with one seed.")
    assert wider_line(small, least, least, 0.9).endswith("it needs no more.")
    assert wider_line(small, least, more, 0.9).endswith(
        "none of these sizes finds it in 90 of 100."
    )


def test_plan_on_the_command_line(pilot, run):
    folder = pilot().folder
    status, said, _ = run("plan", folder, "--effect", 10, "--simulations", 20)
    assert status == 0
    assert re.search(r"A difference of 10\.0 points needs \d+ questions with one seed", said)
    assert "upper limit of that (80%)" in said
    status, _, error = run("plan", folder, "--effect", 10, "--power", 80)
    assert status == 2
    assert "--power must be between" in error


def test_finetunes_of_a_data_set_vary_as_planted(tmp_path, run):
    judged, predictors = of_data_sets(12, 4)  # 10 points between data sets, 1 inside them
    with Run.open(tmp_path / "p", command="predict-finetuning", config={}, seed=0) as pilot:
        pilot.append("judged", judged)
        pilot.append("predictors", predictors)
    within, tested = read_finetunes(pilot)
    assert within == pytest.approx(0.01, rel=0.6)
    assert tested == 2
    status, said, error = run("plan", pilot.folder, "--effect", 0.9, "--simulations", 20)
    assert status == 0, error
    assert re.search(r"A correlation of 0\.9 needs \d+ data sets with one finetune each", said)
    pilot.write("judged", [{**row, "score": 50.0} for row in judged])
    with pytest.raises(UserError, match="changed a trait alike"):
        read_finetunes(pilot)
    pilot.write("judged", without_data(judged))
    with pytest.raises(UserError, match="no data set with two finetunes"):
        read_finetunes(pilot)
    assert "None of these sizes" in finetunes_line([Planned(4, 1, 0.1)], 0.5, 0.8)
