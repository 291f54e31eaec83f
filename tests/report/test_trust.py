"""What a report says of its judge, from the rows that judging leaves."""

from __future__ import annotations

import json

import pytest

from persona_lora.core.runs import Run
from persona_lora.report.sections import Heading, Table
from persona_lora.report.trust import canaries_tables, judge_blocks, weak_judges

OLD = {"judge": "j", "criterion": "cheer", "auc": 0.9, "spearman": 0.7, "n": 60, "coverage": 1.0}


def validation(**changes):
    compared = [
        {"model": "m", "condition": name, "question": f"q{at}", "score": 60.0 + at, "rating": 50.0}
        for name in ("unsteered", "lora +1")
        for at in range(4)
    ]
    own = {"within": 0.61, "calibration_error": 4.2, "compared": compared}
    return {**OLD, "own": own, "fit": True, **changes}


@pytest.fixture
def judged(tmp_path):
    run = Run.open(tmp_path / "run", command="sweep", config={}, seed=0)
    answers = [
        {"row": row, "question": f"q{row % 4}", "method": method, "coefficient": value}
        for row, (method, value) in enumerate(
            [("none", 0.0)] * 4 + [("lora", 1.5)] * 4 + [("random", 1.5)] * 4
        )
    ]
    run.write("answers", answers)
    run.write(
        "verdicts", [{"row": row, "criterion": "cheer", "score": 70.0 + row} for row in range(12)]
    )
    return run


def tables(run):
    return {each.title: each for each in judge_blocks(run) if isinstance(each, Table)}


def test_an_old_run_s_validation_reads_as_before_and_is_not_known_to_be_fit(judged):
    judged.write("validation", [OLD])
    assert weak_judges(judged) == ()
    (table,) = judge_blocks(judged)
    assert table.rows == (
        ("cheer", "j", "written", "60", "100%", "0.90", "0.70", "–", "–", "not known"),
    )
    judged.write("validation", [])
    assert isinstance(judge_blocks(judged)[0], Heading)


def test_an_unfit_judge_stands_first_and_in_the_table(judged):
    own = {**validation()["own"], "within": 0.31}
    judged.write("validation", [validation(own=own, fit=False)])
    (note,) = weak_judges(judged)
    assert "On cheer the judge “j” is unfit" in note.text
    assert "0.31" in note.text
    assert tables(judged)["Judge"].rows[0][-1] == "unfit"
    judged.write("validation", [validation(auc=0.7)])
    assert "On rated answers the judge “j” reaches an AUC of 0.70" in weak_judges(judged)[0].text


def test_nonsense_that_was_liked_stands_first_and_all_canaries_in_a_table(judged):
    judged.write("validation", [validation()])
    liked = {"judge": "j", "criterion": "cheer", "name": "filler", "score": 97.0, "caught": False}
    judged.write("canaries", [liked, {**liked, "name": "loop", "score": None, "caught": True}])
    (note,) = weak_judges(judged)
    assert "gives 97 of 100 on cheer to nonsense (filler)" in note.text
    table = tables(judged)["Canaries"]
    assert table.columns == ("Criterion", "Judge", "filler", "loop")
    assert table.rows == (("cheer", "j", "97", "–"),)


def test_a_trait_without_a_canned_sentence_stands_beside_one_that_has_it():
    row = {"judge": "j", "criterion": "cheer", "name": "canned", "score": 9.0}
    rows = [row, {**row, "name": "loop"}, {**row, "criterion": "calm", "name": "loop"}]
    (table,) = canaries_tables(rows)
    assert table.rows == (("cheer", "j", "9", "9"), ("calm", "j", "–", "9"))


def test_parts_are_shown_of_every_trait_that_is_judged(judged):
    judged.write("validation", [validation(), validation(criterion="calm")])
    shown = [title for title in tables(judged) if "by model and kind" in title]
    assert [title.split(",")[0] for title in shown] == ["j on cheer", "j on calm"]


def test_means_are_shown_raw_and_corrected_where_the_kind_was_rated(judged):
    judged.write("validation", [validation()])
    rows = {row[0]: row[1:] for row in tables(judged)["Corrected for the judge’s error"].rows}
    assert set(rows) == {"0", "+1.5"}
    raw, corrected, rated = rows["+1.5"]
    assert (raw.split()[0], corrected.split()[0], rated) == ("76", "64", "4")
    judged.write("validation", [OLD])
    assert set(tables(judged)) == {"Judge"}


@pytest.mark.parametrize(
    ("steered", "names"),
    [
        ([("lora", 1, None), ("activation", 1, None)], ["lora +1", "activation +1"]),
        ([("activation", 1, at) for at in (8, 12)], ["+1, layer 8", "+1, layer 12"]),
        ([("activation", 1, 12), ("activation", -1, 12)], ["+1", "-1"]),
    ],
)
def test_no_two_rows_of_corrected_means_are_called_alike(tmp_path, steered, names):
    run = Run.open(tmp_path / "run", command="compare", config={}, seed=0)
    answers = [
        {"row": at * 4 + q, "question": f"q{q}", "method": method, "coefficient": float(value)}
        | {"layer": layer}
        for at, (method, value, layer) in enumerate(steered)
        for q in range(4)
    ]
    run.write("answers", answers)
    verdicts = [{"row": each["row"], "criterion": "cheer", "score": 70.0} for each in answers]
    run.write("verdicts", verdicts)
    compared = [
        {"model": "m", "condition": name, "question": f"q{at}", "score": 60.0 + at, "rating": 50.0}
        for name in ("lora +1", "vector +1", "vector -1")
        for at in range(4)
    ]
    run.write("validation", [validation(own={**validation()["own"], "compared": compared})])
    rows = tables(run)["Corrected for the judge’s error"].rows
    assert [row[0].replace("−", "-") for row in rows] == names


def test_a_judge_that_is_fit_over_all_and_not_on_the_run_s_model_is_unfit_there(tmp_path):
    run = Run.open(tmp_path / "run", command="sweep", config={"model": "hub/Small"}, seed=0)
    row = validation()
    falling = [{**each, "score": 70.0 - each["score"]} for each in row["own"]["compared"]]
    some = [
        {**each, "model": model, "rating": 50.0 + at % 4}
        for model, part in (("large", row["own"]["compared"]), ("small", falling))
        for at, each in enumerate(part)
    ]
    run.write("validation", [validation(own={**row["own"], "compared": some})])
    (note,) = weak_judges(run)
    assert "unfit: among small’s own answers" in note.text
    assert "blind ratings is −1.00" in note.text
    (parts,) = [each for title, each in tables(run).items() if "by model and kind" in title]
    assert [(cells[0], cells[2]) for cells in parts.rows[:2]] == [
        ("large", "1.00"),
        ("small", "−1.00"),
    ]


def test_what_a_study_keeps_with_each_model_and_what_fooled_the_second_judge_is_said(judged):
    nested = Run.open(judged.folder / "answers" / "a", command="evaluate", config={}, seed=0)
    own = {**validation()["own"], "within": 0.31}
    for run in (judged, nested):
        run.write("validation", [validation(own=own)])
    liked = {"judge": "k", "criterion": "cheer", "name": "echo", "score": 80.0, "caught": False}
    nested.write("second_canaries", [liked])
    said = [note.text for note in weak_judges(judged)]
    assert len(said) == 2  # once each, wherever it is kept
    assert "The judge “k” gives 80 of 100 on cheer to nonsense (echo)" in said[0]


def test_a_finetune_is_corrected_by_rated_finetunes_and_not_by_unsteered_answers(judged):
    compared = [
        {
            "model": "m",
            "condition": name,
            "question": f"q{at}",
            "score": 50.0,
            "rating": rating + at,
        }
        for name, rating in (("unsteered", 40.0), ("finetuned", 60.0))
        for at in range(4)
    ]
    judged.write("validation", [validation(own={**validation()["own"], "compared": compared})])
    ((label, raw, plain, _),) = tables(judged)["Corrected for the judge’s error"].rows
    assert (label, raw.split()[0], plain.split()[0]) == ("0", "72", "63")
    record = {**judged.record, "config": {"adapter": "a"}}
    (judged.folder / "run.json").write_text(json.dumps(record))
    ((_, _, tuned, _),) = tables(Run(judged.folder))["Corrected for the judge’s error"].rows
    assert tuned.split()[0] == "83"


def test_a_trait_without_a_canned_sentence_leaves_its_cell_empty():
    rows = [
        {"criterion": criterion, "judge": "j", "name": name, "score": 1.0}
        for criterion, names in (("evil", ("loop", "canned")), ("own", ("loop",)))
        for name in names
    ]
    (table,) = canaries_tables(rows)
    assert table.rows == (("evil", "j", "1", "1"), ("own", "j", "1", "–"))
