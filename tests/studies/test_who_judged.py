"""Who judged stands last in every table and in the note of every picture, with its mark."""

from __future__ import annotations

import csv

import pytest
from matplotlib.text import Text

from persona_lora.core.runs import Run
from persona_lora.report import comparisons
from persona_lora.report.comparisons import RUN_COLUMNS, TASK_COLUMNS, compare_runs, write_found
from persona_lora.report.summary import summarise_run
from persona_lora.studies.asking.run import write_scores
from persona_lora.studies.drift import figure as drift
from persona_lora.studies.drift import read_prediction
from persona_lora.studies.drift.read import prevention_scores
from persona_lora.studies.read_seeds import SEED, effects_over, write_seeds
from persona_lora.studies.research_questions import write_research_questions
from persona_lora.studies.steering import figure as steering
from persona_lora.studies.steering.figure_grid import render_layers
from persona_lora.studies.steering.figure_side_effects import render_side_effects
from persona_lora.studies.steering.read_comparison import read_comparison, write_points
from persona_lora.studies.steering.read_grid import grid_of
from persona_lora.studies.steering.read_side_effects import (
    COLUMNS,
    read_side_effects,
    side_effects_table,
)
from persona_lora.studies.steering.run import write_results

MARKED = "reader (unfit for evil)"
OTHER = "sentences (unfit for evil)"
LEVELS = {"none": 50.0, "lora": 70.0, "activation": 60.0, "random_lora": 51.0, "random": 49.0}


def judged_by(run, **files):
    """Let the verdicts of a run be the reader's, and those of a second judge where it has any."""
    for file, judge in {"verdicts": MARKED, **files}.items():
        rows = [
            row for row in run.read("verdicts") if file == "verdicts" or row["criterion"] == "evil"
        ]
        run.write(
            file,
            [{**row, "judge": judge if row["criterion"] == "evil" else "reader"} for row in rows],
        )
    return run


@pytest.fixture
def made(tmp_path, make_sweep_run, no_drawing):
    """Make a run by what it is of, judged by the reader, and by a second judge beside it."""

    def sweep(**rows):
        run = make_sweep_run(trait="evil", questions=3, prompts=(), **rows)
        return judged_by(run, second_verdicts=OTHER)

    def compare(place="compare/evil", seed=0):
        at, config = tmp_path / place, {"trait": "evil", "statistic": "mean", "controls": []}
        with Run.open(
            at, command="compare", config=config, seed=0, inputs={SEED: str(seed)}
        ) as run:
            run.write("splits", [{"split": "eval"}])
            run.write(
                "levels",
                [
                    {"level": 0, "method": method, "coefficient": 1.0, "kl_mean": 0.1,
                     "kl_p95": 0.3, "matched": True}
                    for method in [*LEVELS][1:]
                ],
            )  # fmt: skip
        part = Run.open(at / "eval", command="evaluate", config={}, seed=0)
        answers = [
            {"row": len(LEVELS) * question + row, "method": method, "question_id": question,
             "question": str(question), "coefficient": None if method == "none" else 1.0}
            for question in range(4)
            for row, method in enumerate(LEVELS)
        ]  # fmt: skip
        part.write("answers", answers)
        part.write(
            "verdicts",
            [
                {"row": row["row"], "criterion": criterion,
                 "score": LEVELS[row["method"]] + row["question_id"] + seed}
                for row in answers
                for criterion in ("evil", "coherence")
            ],
        )  # fmt: skip
        judged_by(part, second_verdicts=OTHER)
        return run

    def asked(at):
        """The answers on evil of one model, below a study."""
        run = Run.open(at, command="evaluate", config={"trait": "evil"}, seed=0)
        answers = [
            {"row": row, "question_id": row, "question": str(row), "method": "none"}
            for row in range(3)
        ]
        run.write("answers", answers)
        run.write(
            "verdicts",
            [
                {"row": row, "criterion": criterion, "score": 10.0 * row}
                for row in range(3)
                for criterion in ("evil", "coherence")
            ],
        )
        return judged_by(run)

    def side_effects():
        run = Run.open(
            tmp_path / "beside",
            command="side-effects",
            config={"trait": "kind", "sign": 1.0},
            seed=0,
        )
        run.write(
            "scores",
            [
                {"kind": "other", "asked": "evil", "criterion": "evil", "judge": judge, "by": by,
                 "method": method, "unit": unit, "turn": 1, "score": level + unit}
                for judge, by in (("first", MARKED), ("second", OTHER))
                for method, level in LEVELS.items()
                for unit in range(4)
            ],
        )  # fmt: skip
        return run

    def checkpoints():
        run = Run.open(tmp_path / "tuned", command="evaluate-checkpoints", config={}, seed=0)
        run.write(
            "checkpoints",
            [
                {"checkpoint": f"c{step}", "step": step, "trait": "evil", "statistic": statistic,
                 "value": 50.0, "low": 40.0, "high": 60.0, "vector": None, "layer": None}
                for step in (0, 5)
                for statistic in ("trait", "coherence")
            ],
        )  # fmt: skip
        for step in (0, 5):
            asked(run.folder / "answers" / f"c{step}_evil")
        return run

    def prediction():
        run = Run.open(tmp_path / "prediction", command="predict-finetuning", config={}, seed=0)
        names = ["base", *(f"f{at}" for at in range(5))]
        run.write(
            "judged",
            [
                {"finetune": name, "trait": "evil", "score": 10.0 + at**2}
                for at, name in enumerate(names)
            ],
        )
        run.write(
            "predictors",
            [
                {"finetune": name, "direction": "evil", "kind": "weights", "value": float(at)}
                for at, name in enumerate(names[1:])
            ],
        )
        for name in names:
            asked(run.folder / read_prediction.answers_place(name) / "evil")
        return run

    def prevention():
        config = {"trait": "evil"}
        run = Run.open(tmp_path / "held", command="compare-prevention", config=config, seed=0)
        for model in ("plain", "added"):
            asked(run.folder / "answers" / model)
        rows = [
            {
                "condition": model,
                "task": task,
                "metric": "score",
                "item": item,
                "score": 50.0 + item,
            }
            for model in ("plain", "added")
            for task in ("trait", "trait, negated", "coherence", "three_items")
            for item in range(4)
        ]
        return prevention_scores(run, rows, "plain")

    def pair():
        return compare_runs([asked(tmp_path / "b")], asked(tmp_path / "a"))

    def scores():
        write_scores(tmp_path / "e.csv", "evil", {"": sweep()})
        return tmp_path / "e.csv"

    def grid():
        return sweep(layers=(4, 8), coefficients=(-1.0, 2.0))

    def seeds():
        write_seeds(tmp_path, [compare(f"seed{at}", at) for at in range(2)])
        return tmp_path / "seeds.csv"

    def results(run):
        write_results(run, "evil")
        return run.folder

    def points():
        run = compare()
        write_points(run, read_comparison(run))
        return run.folder / "comparison.csv"

    def found(columns, rows):
        write_found(tmp_path / "found.csv", columns, rows)
        return tmp_path / "found.csv"

    return {
        "sweep.csv": lambda: results(sweep()) / "sweep.csv",
        "summary.csv": lambda: results(sweep()) / "summary.csv",
        "grid.csv": lambda: results(grid()) / "grid.csv",
        "evaluate": scores,
        "paired": lambda: found(RUN_COLUMNS, pair()),
        "comparison.csv": points,
        "seeds.csv": seeds,
        "changes.csv": lambda: found(COLUMNS, read_side_effects(side_effects())),
        "prevention.csv": lambda: found(TASK_COLUMNS, prevention()),
        "sweep.png": lambda: steering.render_sweep(summarise_run(sweep())),
        "sweeps.png": lambda: steering.render_sweeps([summarise_run(sweep())]),
        "layers.png": lambda: render_layers(grid_of(grid())),
        "comparison.png": lambda: steering.render_comparison(read_comparison(compare())),
        "same_traits.png": lambda: steering.render_effects({"Evil": effects_over([compare()])}),
        "side_effects.png": lambda: render_side_effects("kind", read_side_effects(side_effects())),
        "checkpoints.png": lambda: drift.render_checkpoints(checkpoints()),
        "prediction.png": lambda: drift.render_prediction(*read_prediction.rows_of(prediction())),
        "prevention.png": lambda: drift.render_prevention(prevention(), "evil"),
        "compare": compare,
        "side effects": side_effects,
    }


TABLES = ("sweep.csv", "summary.csv", "grid.csv", "evaluate", "paired", "comparison.csv")
TABLES += ("seeds.csv", "changes.csv", "prevention.csv")
TWO_JUDGES = {"sweep.csv", "evaluate", "comparison.csv", "seeds.csv"}
PICTURES = ("sweep.png", "sweeps.png", "layers.png", "comparison.png", "same_traits.png")
PICTURES += ("side_effects.png", "checkpoints.png", "prediction.png", "prevention.png")


@pytest.mark.parametrize("name", TABLES)
def test_the_last_column_of_a_table_says_who_judged(made, name):
    with made[name]().open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    second = ["judge_second"] if name in TWO_JUDGES else []
    names = list(rows[0])
    assert names[len(names) - 1 - len(second) :] == ["judge", *second]
    assert MARKED in {row["judge"] for row in rows}
    assert {row["judge"] for row in rows} <= {MARKED, "reader", ""} | {OTHER} - set(second)
    assert not second or {row["judge_second"] for row in rows} == {OTHER}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_says_who_judged(made, name, monkeypatch):
    for each in ("RESAMPLES", "PERMUTATIONS"):
        monkeypatch.setattr(read_prediction, each, 20)
    figure = made[name]().figure
    said = " ".join(" ".join(text.get_text().split()) for text in figure.findobj(Text))
    assert MARKED in said


def test_what_no_judge_gave_names_none(made):
    with made["prevention.csv"]().open(newline="") as stream:
        by = {row["task"]: row["judge"] for row in csv.DictReader(stream)}
    assert by == {
        "trait": MARKED,
        "trait, negated": MARKED,
        "coherence": "reader",
        "three_items": "",
    }


def test_an_unfit_judge_is_marked_behind_the_trait(made, tmp_path):
    made["compare"]()
    write_research_questions(tmp_path, tmp_path / "page.md")
    assert "| Evil (judge unfit) | held-out questions |" in (tmp_path / "page.md").read_text()
    run = made["side effects"]()
    for judge in ("first", "second"):
        (row,) = side_effects_table(read_side_effects(run, judge)).rows
        assert row[0] == "evil (judge unfit)"


def test_older_runs_that_do_not_say_who_judged_still_open(made):
    run = made["side effects"]()
    run.write("scores", [{k: v for k, v in row.items() if k != "by"} for row in run.read("scores")])
    assert {each.judge for each in read_side_effects(run)} == {""}
    assert comparisons.cells_of(read_side_effects(run)[0], COLUMNS)["judge"] == ""
