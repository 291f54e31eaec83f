"""Runs of evaluate beside one of them."""

from __future__ import annotations

import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.files import write_json
from persona_lora.core.runs import Run
from persona_lora.report.comparisons import (
    compare_runs,
    fit_table,
    fits_over_prompts,
    measure_tables,
    run_table,
    score_items,
    task_table,
)


def run_of(folder, scores, *, trait="cheer", coherence=80.0, questions="abcdefgh", judge="one"):
    run = Run.open(folder, command="evaluate", config={"trait": trait}, seed=0)
    answers = [
        {"row": at, "question_id": at // 2, "question": questions[at // 2], "method": "none"}
        for at in range(len(scores))
    ]
    run.write("answers", answers)
    run.write(
        "verdicts",
        [
            {"row": at, "criterion": criterion, "score": value, "judge": judge}
            for at, score in enumerate(scores)
            for criterion, value in ((trait, score), ("coherence", coherence))
        ],
    )
    return run


def test_differences_are_of_question_means(tmp_path):
    plain = run_of(tmp_path / "plain", [10.0, 30.0, 50.0, 70.0, 0.0, None])
    other = run_of(tmp_path / "other", [40.0, 40.0, 60.0, 100.0, 30.0, 30.0], coherence=60.0)
    reference, found = compare_runs([other], plain)
    assert (reference.name, reference.difference, reference.p) == ("plain", None, None)
    assert found.difference.mean == pytest.approx((20 + 20 + 30) / 3)
    assert found.difference.n_questions == 3
    assert found.p == found.p_holm == 0.25  # three questions, all in one direction
    assert found.coherence.mean == 60.0
    assert reference.trait.coverage == pytest.approx(5 / 6)


def test_the_pairs_behind_a_difference_stand_in_every_table_that_has_one(tmp_path):
    """Of six questions either run has five scored, and both have four."""
    plain, other = [None, 10.0, 20.0, 35.0, 40.0, 50.0], [1.0, 12.0, 20.0, 33.0, 49.0, None]
    runs = [
        run_of(tmp_path / name, [score for score in scores for _ in range(2)])
        for name, scores in (("plain", plain), ("other", other))
    ]
    rows = [
        {
            "condition": name, "task": task, "metric": "score", "item": at, "score": score,
            "persona": "ann", "prompt_id": at, "coherence": 80.0, "relevance": 80.0,
        }
        for name, scores in (("plain", plain), ("other", other))
        for task in ("trait", "trait, negated", "coherence")
        for at, score in enumerate(scores)
    ]  # fmt: skip
    tasks = score_items(rows, "plain")
    probes, measures = measure_tables(tasks)
    fits = [row | {"score": row["score"] and 1 + row["score"] / 25} for row in rows]
    tables = [
        run_table(compare_runs(runs[1:], runs[0])),
        task_table(tasks),
        measures,
        fit_table(fits_over_prompts(fits, "plain"), "fits"),
    ]
    for table in tables:
        n, pairs = (table.columns.index(name) for name in ("n", "pairs"))
        shown = {row[pairs] for row in table.rows}
        assert shown == {"", "4"}, table
        assert all(int(row[n]) >= 5 for row in table.rows), table
    assert all(cell.endswith(" (4 of 5)") for cell in probes.rows[1][1:])


def test_one_pair_has_no_test(tmp_path):
    plain = run_of(tmp_path / "plain", [None, None, 50.0, 50.0])
    other = run_of(tmp_path / "other", [60.0, 60.0, 60.0, 60.0])
    found = compare_runs([other], plain)
    assert (found[1].difference.n_questions, found[1].p, found[1].p_holm) == (1, None, None)
    assert run_table(found).rows[1][5:8] == ("10.0", "1", "–")


def test_runs_are_corrected_by_the_errors_of_their_kinds(tmp_path):
    """The judge is 20 too strict with finetunes: what seems a fall of 5 is a rise of 15."""
    plain = run_of(tmp_path / "plain", [40.0, 44.0] * 6)
    tuned = run_of(tmp_path / "tuned", [35.0, 39.0, 36.0, 40.0, 34.0, 38.0] * 2)
    again = run_of(tmp_path / "again", [30.0, 34.0] * 6)
    for run in (plain, tuned, again):
        compared = [
            {"model": "m", "condition": kind, "question": f"q{at}", "rating": 50.0 + at % 2,
             "score": 50.0 - miss}
            for kind, miss in (("unsteered", 0.0), ("finetuned", 20.0))
            for at in range(8)
        ]  # fmt: skip
        run.write("validation", [{"criterion": "cheer", "own": {"compared": compared}}])
    for run in (tuned, again):
        write_json(
            run.folder / "run.json", {**run.record, "config": {"trait": "cheer", "adapter": "a"}}
        )
    reference, found, _ = compare_runs([tuned, again], plain)
    assert (reference.trait_corrected.mean, found.trait_corrected.mean) == (42.5, 57.5)
    assert (found.difference.mean, found.difference_corrected.mean) == (-5.0, 15.0)
    assert run_table([found]).rows[0][2].startswith("57.5 [")
    # Two finetunes are misjudged alike: nothing is left to correct of their difference.
    assert compare_runs([again], tuned)[1].difference_corrected is None
    again.write("validation", [])
    assert compare_runs([again], plain)[1].trait_corrected is None


def test_several_runs_are_corrected_for(tmp_path):
    plain = run_of(tmp_path / "plain", [0.0, 1.0] * 6)
    others = [run_of(tmp_path / str(at), [10.0 + at, 12.0] * 6) for at in range(3)]
    found = compare_runs(others, plain)[1:]
    assert all(each.p_holm == pytest.approx(3 * each.p) for each in found)


def test_runs_that_cannot_be_paired_are_named(tmp_path):
    plain = run_of(tmp_path / "plain", [1.0, 2.0])
    with pytest.raises(UserError, match="different traits"):
        compare_runs([run_of(tmp_path / "evil", [1.0], trait="evil")], plain)
    with pytest.raises(UserError, match="no scored question"):
        compare_runs([run_of(tmp_path / "blank", [None, None])], plain)
    empty = Run.open(tmp_path / "empty", command="evaluate", config={"trait": "cheer"}, seed=0)
    with pytest.raises(UserError, match="run of evaluate"):
        compare_runs([empty], plain)


def test_a_run_is_not_compared_with_itself(tmp_path):
    one, other = (run_of(tmp_path / name, [10.0] * 8) for name in "ab")
    with pytest.raises(UserError, match="would be compared with itself"):
        compare_runs([other, Run(tmp_path / "b" / ".." / "a")], one)


def test_questions_are_paired_by_what_they_ask_not_by_their_numbers(tmp_path):
    plain = run_of(tmp_path / "plain", [10.0, 10.0, 50.0, 50.0], questions="ab")
    turned = run_of(tmp_path / "turned", [60.0, 60.0, 11.0, 11.0], questions="ba")
    _, found = compare_runs([turned], plain)
    assert (found.difference.mean, found.difference.n_questions) == (5.5, 2)
    half = run_of(tmp_path / "half", [60.0, 60.0, 11.0, 11.0], questions="bc")
    _, found = compare_runs([half], plain)
    assert (found.difference.mean, found.difference.n_questions) == (10.0, 1)
    other = run_of(tmp_path / "other", [60.0, 60.0, 11.0, 11.0], questions="cd")
    with pytest.raises(UserError, match="no scored question in common"):
        compare_runs([other], plain)


def test_a_judge_that_is_unfit_on_one_of_the_models_is_still_one_judge(tmp_path):
    names = "reader", "reader (unfit for cheer)"
    plain, other = (run_of(tmp_path / each, [0.0, 1.0] * 4, judge=each) for each in names)
    assert compare_runs([other], plain)[1].difference.mean == 0.0


def test_runs_of_different_judges_are_refused(tmp_path):
    plain, other = (run_of(tmp_path / name, [0.0, 1.0], judge=name) for name in ("one", "two"))
    with pytest.raises(UserError, match="different judges: one and by two; evaluate all"):
        compare_runs([other], plain)
