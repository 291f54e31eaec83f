"""Runs of several training seeds read as one: seeds are drawn, and nothing else may differ."""

from __future__ import annotations

import csv
import html

import numpy as np
import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.files import write_json
from persona_lora.core.runs import Output, Run
from persona_lora.report.summary import summarise_run
from persona_lora.studies.read_seeds import (
    SAME_CONTROLS,
    apart,
    corrected_tables,
    over_seeds,
    seeds_lines,
    write_seeds,
)
from persona_lora.studies.report_page import write_report


@pytest.fixture
def seeded(tmp_path, sweep_rows):
    """Sweeps of three coefficients whose effect at +1 is that of their seed."""

    def make(effects, *, config=None, inputs=None):
        runs = []
        for seed, effect in enumerate(effects):
            answers, verdicts = sweep_rows(coefficients=(-1.0, 0.0, 1.0), seed=seed, trait="evil")
            at = {row["row"]: row for row in answers}
            rng = np.random.default_rng(seed)
            for verdict in verdicts:
                row = at[verdict["row"]]
                if verdict["criterion"] == "evil" and row["coefficient"] is not None:
                    middle = 50 + effect * row["coefficient"] + row["question_id"] - 6
                    verdict["score"] = float(np.clip(middle + rng.normal(0, 4), 0, 100))
            read = {
                "the model": "m",
                "the diff": str(seed),
                "the training of the diff": "t",
                "the seed of the diff": str(42 + seed),
                **(inputs or {}).get(seed, {}),
            }
            settings = {"trait": "evil", "diff": f"seed{seed}/diff", "diff_norm": 1.0 + seed}
            with Run.open(
                Output(tmp_path / f"seed{seed}"),
                command="sweep",
                config={**settings, **(config or {}).get(seed, {})},
                seed=0,
                inputs=read,
            ) as run:
                run.append("answers", answers)
                run.append("verdicts", verdicts)
            runs.append(run)
        return runs

    return make


def change_at_one(runs):
    return next(each for each in over_seeds(runs) if each.condition == "+1")


def test_what_one_seed_shows_is_not_what_seeds_show(seeded):
    """On average the training does nothing; each seed alone is far from 0, this way or that."""
    runs = seeded([25, -22, 20, -24, 2])
    alone = [summarise_run(run) for run in runs]
    clear = [each.conditions[2].from_zero.p_holm < 0.05 for each in alone]
    assert clear == [True, True, True, True, False]
    found = change_at_one(runs)
    assert found.seeds == 5
    assert found.p > 0.5
    assert found.change.low < -20
    assert found.change.high > 20
    line = seeds_lines(runs, over_seeds(runs))[1]
    assert "(Holm): nothing; undecided: " in line
    assert line.endswith("+1. One judge: embedding.")


def test_what_no_seed_moves_is_equal_within_the_margin(seeded):
    runs = seeded([0.1, -0.1, 0.2])
    line = seeds_lines(runs, over_seeds(runs))[1]
    assert "(Holm): nothing; equal within 5 points: " in line


def test_what_all_seeds_do_is_found_with_its_size(seeded):
    runs = seeded([18, 22, 20, 21, 19])
    found = change_at_one(runs)
    assert found.p_holm < 0.001
    assert found.change.low < 20 < found.change.high
    assert found.change.high - found.change.low < 12
    assert 0 <= found.score.low < 70 < found.score.high <= 100
    assert found.coherence.mean == pytest.approx(90, abs=3)
    first, line = seeds_lines(runs, over_seeds(runs))
    assert first == "Exploratory, 5 seeds."
    assert line.startswith("Clear of 0 over 5 seeds (Holm): ")


def test_two_seeds_have_no_interval_and_it_is_said(seeded):
    runs = seeded([20, 21])
    found = change_at_one(runs)
    assert (found.change.low, found.p_holm) == (None, None)
    assert "2 draws" in seeds_lines(runs, over_seeds(runs))[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config": {1: {"trait": "kind"}}}, r"config\.trait"),
        ({"inputs": {1: {"the model": "other"}}}, "the model"),
        ({"inputs": {1: {"the training of the diff": "u"}}}, "the training of the diff"),
        ({"inputs": {1: {"the seed of the diff": "42"}}}, "seed of its own, got 42, 42"),
    ],
)
def test_runs_that_differ_in_anything_else_are_no_seeds(seeded, changes, said):
    runs = seeded([20, 21, 22], **changes)
    with pytest.raises(UserError, match=said):
        over_seeds(runs)


def test_controls_that_all_seeds_share_are_told(seeded):
    runs = seeded([20, 21, 22])
    for drawn, told in (([0, 1, 2], False), ([7, 7, 7], True)):
        for run, seed in zip(runs, drawn, strict=True):
            record = run.record
            record["config"]["controls"] = [{"seed": seed}]
            write_json(run.folder / "run.json", record)
        assert (SAME_CONTROLS in seeds_lines(runs, over_seeds(runs))[1]) == told


def test_seeds_that_are_not_all_finished_are_not_read(seeded, tmp_path, no_drawing):
    runs = seeded([20, 21, 22])
    kept = [row for row in runs[2].read("answers") if row["coefficient"] != 1.0]
    runs[2].write("answers", kept)
    own = {row["row"] for row in kept}
    runs[2].write("verdicts", [each for each in runs[2].read("verdicts") if each["row"] in own])
    write_json(runs[2].folder / "run.json", {**runs[2].record, "status": "running"})
    with pytest.raises(UserError, match="seed2 is running, and seeds are read once all are"):
        over_seeds(runs)
    page = write_report([run.folder for run in runs], tmp_path / "report.html").read_text()
    assert "training seeds" not in page
    assert "Incomplete." in page


def test_diffs_of_unknown_seeds_are_no_seeds(seeded):
    runs = seeded([20, 21, 22])
    record = runs[1].record
    del record["inputs"]["the seed of the diff"]
    write_json(runs[1].folder / "run.json", record)
    assert "got 42, none, 44" in apart(runs)
    assert apart(runs[:1]) is not None


def test_a_report_of_seeds_begins_with_them(seeded, tmp_path, no_drawing):
    runs = seeded([18, 22, 20])
    page = write_report([run.folder for run in runs], tmp_path / "report.html").read_text()
    assert "Over 3 training seeds" in page
    assert "Exploratory, 3 seeds." in page
    assert page.count("Exploratory, one seed.") == 6  # each in the list above, and in its section
    write_seeds(tmp_path, runs)
    assert (tmp_path / "seeds.csv").read_text().startswith("condition,seeds,questions")


KIND = {"unsteered": 0.0, "lora +": -15.0, "lora -": 5.0}


def misjudged(run, file="validation", factor=1.0):
    """Have rated answers say that a judge misses each kind of condition by so many points."""
    random = np.random.default_rng(0)
    compared = [
        {"model": "m", "condition": f"{kind}1", "question": f"q{at}", "rating": 50.0,
         "score": 50.0 + factor * miss + random.normal()}
        for kind, miss in KIND.items()
        for at in range(12)
    ]  # fmt: skip
    compared = [
        {**row, "condition": row["condition"].replace("unsteered1", "unsteered")}
        for row in compared
    ]
    own = {"within": 0.6, "calibration_error": 4.0, "compared": compared}
    agrees = {"auc": 0.9, "spearman": 0.7, "n": 36, "coverage": 1.0, "own": own, "fit": True}
    run.write(file, [{"criterion": "evil", "judge": "j", **agrees}])


def test_means_and_changes_over_seeds_are_corrected_beside_the_raw_ones(
    seeded, tmp_path, no_drawing
):
    """Weights upwards are judged 15 too low: of a rise of 20 the judge sees 5."""
    runs = seeded([5, 4, 6])
    for run in runs:
        misjudged(run)
        own = [row for row in run.read("verdicts") if row["criterion"] == "evil"]
        run.write("second_verdicts", [{**row, "judge": "other"} for row in own])
        misjudged(run, "second_validation", -1.0)
    write_seeds(tmp_path, runs)
    with (tmp_path / "seeds.csv").open(newline="") as stream:
        rows = {
            row["condition"].strip("'").replace("−", "-"): row for row in csv.DictReader(stream)
        }
    for condition, score, change in (("+1", 15, 15), ("-1", -5, -5), ("0", 0, None)):
        row = {name: float(cell) for name, cell in rows[condition].items() if _is_number(cell)}
        assert row["score_corrected"] - row["score"] == pytest.approx(score, abs=1)
        assert row["score_corrected_second"] - row["score"] == pytest.approx(-score, abs=1)
        width = row["score_corrected_high"] - row["score_corrected_low"]
        assert width > row["high"] - row["low"]
        if change is None:
            assert rows[condition]["change_corrected"] == ""
        else:
            assert row["change_corrected"] - row["change"] == pytest.approx(change, abs=1)
    prompted = rows["positive prompt"]  # whose kind was not rated
    assert prompted["score_corrected"] == prompted["change_corrected"] == ""
    (table,) = corrected_tables(runs, over_seeds(runs))
    assert [row[0].replace("−", "-") for row in table.rows] == ["-1", "0", "+1"]
    up = table.rows[-1]
    assert up[3].startswith("+5 [")
    assert up[4].startswith("+20 [")
    page = write_report([run.folder for run in runs], tmp_path / "report.html").read_text()
    assert page.count("Change, corrected") == 1
    for run in runs:
        run.write("validation", [])
    assert corrected_tables(runs, over_seeds(runs)) == ()


def _is_number(cell):
    return cell.strip("'").replace(".", "").replace("-", "").replace("e", "").isdigit()


def test_a_second_judge_is_read_over_the_seeds_as_well(seeded, tmp_path, no_drawing):
    runs = seeded([18, 22, 20])
    for run in runs:
        at = {row["row"]: row["coefficient"] for row in run.read("answers")}
        own = [row for row in run.read("verdicts") if row["criterion"] == "evil"]
        rows = [
            {**row, "judge": "other", "score": 100 - row["score"] if at[row["row"]] == 1 else 50.0}
            for row in own
        ]
        run.write("second_verdicts", rows)
    page = write_report([run.folder for run in runs], tmp_path / "report.html").read_text()
    line = seeds_lines(runs, over_seeds(runs))[1]
    assert line.startswith("The two judges disagree on the sign of a change of evil (+1: +20")
    assert "Clear of 0 over 3 seeds" in line
    assert line in html.unescape(page)
    write_seeds(tmp_path, runs)
    rows = {row["condition"]: row for row in csv.DictReader((tmp_path / "seeds.csv").open())}
    row = rows["'+1"]
    assert float(row["change_second"]) == pytest.approx(-float(row["score"]) + 50)
    assert float(row["change_high_second"]) < 0 < float(row["change_low"])


@pytest.mark.parametrize(
    ("effects", "said"),
    [
        ({"lora": 30, "activation": 25, "random_lora": 2, "random": 2}, "Clear of 0 over 4 seeds"),
        (
            {"lora": 30, "activation": 25, "random_lora": 30, "random": 2},
            "Not clearly further than random controls: eval: weights (",
        ),
        (
            {"lora": 30, "activation": 25, "random_lora": 2, "random": 25},
            "Not clearly further than random controls: eval: activations (",
        ),
    ],
)
def test_directions_that_do_no_more_than_random_ones_stand_first(tmp_path, effects, said):
    """Comparisons of four seeds; every effect is planted, with noise of seeds and questions."""
    rng, runs = np.random.default_rng(3), []
    for seed in range(4):
        folder = tmp_path / f"seed{seed}"
        run = Run.open(
            folder, command="compare", config={"trait": "evil"}, seed=0,
            inputs={"the seed of the diff": str(seed)},
        )  # fmt: skip
        run.write("splits", [{"split": "eval"}])
        run.write("levels", [{"level": 0, "method": name, "coefficient": 1.0} for name in effects])
        of_seed = {name: effect + rng.normal() for name, effect in effects.items()}
        asked = [(name, at) for name in ("none", *effects) for at in range(8)]
        part = Run.open(folder / "eval", command="evaluate", config={}, seed=0)
        part.write(
            "answers",
            [
                {"row": row, "method": name, "question_id": at,
                 "coefficient": None if name == "none" else 1.0}
                for row, (name, at) in enumerate(asked)
            ],
        )  # fmt: skip
        part.write(
            "verdicts",
            [
                {"row": row, "criterion": "evil", "judge": "embedding",
                 "score": 40 + at + of_seed.get(name, 0) + rng.normal()}
                for row, (name, at) in enumerate(asked)
            ],
        )  # fmt: skip
        with run:  # which ends it
            runs.append(run)
    found = over_seeds(runs)
    assert seeds_lines(runs, found)[1].startswith(said)
    assert "Clear of 0 over 4 seeds (Holm): eval: " in seeds_lines(runs, found)[1]
    beside = next(each for each in found if each.condition == "eval: activation beside random")
    assert beside.change.mean == pytest.approx(effects["activation"] - effects["random"], abs=3)
    assert beside.score.mean == pytest.approx(effects["activation"], abs=3)
