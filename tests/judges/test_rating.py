"""Files of answers: scored, rated by two people, and joined into labels."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.files import read_csv, read_jsonl, write_csv, write_jsonl
from persona_lora.judges.labels import AnswerFile, RatingSheet, load_ratings, rated_rows, score_file

ROWS = [
    {"question": f"Question {at // 2}?", "answer": f"Answer {at}.", "model": "m", "condition": "c"}
    for at in range(12)
]


@pytest.fixture
def answers(tmp_path):
    write_jsonl(tmp_path / "answers.jsonl", ROWS)
    return AnswerFile.read(tmp_path / "answers.jsonl")


def rated(answers, name, ratings):
    sheet = RatingSheet(answers, answers.path.with_suffix(f".{name}.jsonl"))
    for row, (trait, sense) in ratings.items():
        sheet.add(row, trait, sense)
    return sheet


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_scores_stand_beside_the_rows_they_belong_to(answers, judge, tmp_path, suffix):
    output = tmp_path / f"scored.{suffix}"
    scores = score_file(judge, "cheer", answers, output)
    found = read_jsonl(output) if suffix == "jsonl" else read_csv(output, ("cheer", "coherence"))
    assert [row["answer"] for row in found] == [row["answer"] for row in ROWS]
    wanted = [each.score for each in judge.judge(answers.exchanges, "cheer")]
    assert scores["cheer"] == wanted
    assert [float(row["cheer"]) for row in found] == wanted
    assert {row["judge"] for row in found} == {judge.name}


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_the_last_column_of_scored_answers_says_who_judged_with_its_mark(tmp_path, judge, suffix):
    write_jsonl(tmp_path / "a.jsonl", [ROWS[0], {**ROWS[1], "note": "kept"}])
    output, answers = tmp_path / f"out.{suffix}", AnswerFile.read(tmp_path / "a.jsonl")
    score_file(judge, "cheer", answers, output, unfit={"cheer", "coherence", "evil"})
    found = read_jsonl(output) if suffix == "jsonl" else read_csv(output, ("cheer", "judge"))
    assert all([*row][-3:] == ["cheer", "coherence", "judge"] for row in found)
    assert {row["judge"] for row in found} == {f"{judge.name} (unfit for cheer, coherence)"}


def test_no_column_of_any_row_is_lost(tmp_path, judge):
    rows = [ROWS[0], {**ROWS[1], "note": "kept"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    score_file(judge, "cheer", AnswerFile.read(tmp_path / "a.jsonl"), tmp_path / "out.csv")
    found = read_csv(tmp_path / "out.csv", [*rows[1], "cheer", "coherence"])
    assert [row["note"] for row in found] == ["", "kept"]
    write_jsonl(tmp_path / "b.jsonl", [ROWS[0], {**ROWS[1], "coherence": 3}])
    with pytest.raises(UserError, match="column 'coherence' already"):
        score_file(judge, "cheer", AnswerFile.read(tmp_path / "b.jsonl"), tmp_path / "b.csv")


@pytest.mark.parametrize("name", ["cheer", "coherence", "judge"])
def test_a_column_that_is_there_already_is_not_overwritten(tmp_path, judge, name):
    write_csv(tmp_path / "a.csv", ["question", "answer", name],
              [{"question": "q", "answer": "a", name: 3}])  # fmt: skip
    with pytest.raises(UserError, match=f"column '{name}' already; rename or drop it"):
        score_file(judge, "cheer", AnswerFile.read(tmp_path / "a.csv"), tmp_path / "out.csv")


def test_a_rater_goes_on_where_the_session_ended_and_the_last_rating_counts(answers):
    sheet = RatingSheet(answers, answers.path.with_suffix(".ada.jsonl"))
    order = sheet.remaining()
    assert sorted(order) == list(range(12))
    assert order != sorted(order)
    sheet.add(order[0], 80, 100)
    assert sheet.remaining() == order[1:]
    sheet.add(order[0], 20, 90)
    assert sheet.ratings() == {order[0]: (20.0, 90.0)}
    other = RatingSheet(answers, answers.path.with_suffix(".ben.jsonl"))
    assert other.remaining() != order


def test_two_sheets_make_labels_and_a_question_is_in_one_part_only(answers):
    ada = rated(answers, "ada", {row: (row, 100 - row) for row in range(12)})
    ben = rated(answers, "ben", {row: (row + 1, 50) for row in range(11)})
    rows = rated_rows([ada, ben])
    assert len(rows) == 11
    assert rows[3].trait == (3.0, 4.0)
    assert rows[3].sense == (97.0, 50.0)
    parts = {row.question: set() for row in rows}
    for row in rows:
        parts[row.question].add(row.part)
    assert all(len(each) == 1 for each in parts.values())
    assert [each == {"tuning"} for each in parts.values()].count(True) == 2
    with pytest.raises(UserError, match="two passes"):
        rated_rows([ada])


def test_an_answer_that_was_rated_as_two_rows_is_refused_before_anything_is_written(tmp_path):
    write_jsonl(tmp_path / "answers.jsonl", [*ROWS, ROWS[4]])
    answers = AnswerFile.read(tmp_path / "answers.jsonl")
    sheets = [rated(answers, name, {row: (row, 50) for row in range(13)}) for name in ("a", "b")]
    with pytest.raises(UserError, match="row 13 is the answer of row 5 again; take its line out"):
        rated_rows(sheets)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize("value", ["", "  ", None, 0, 1.5, True, ["c"], {"c": 1}], ids=str)
@pytest.mark.parametrize("key", ["question", "answer", "model", "condition", "part", "note"])
def test_what_two_sheets_make_can_be_read_again_or_is_refused_with_its_row(
    trait, tmp_path, key, value, suffix
):
    path = tmp_path / f"answers.{suffix}"
    rows = [*ROWS[:4], {**ROWS[4], key: value}, *ROWS[5:]]
    write_jsonl(path, rows) if suffix == "jsonl" else write_csv(path, [*ROWS[0], "part"], rows)
    held = value if suffix == "jsonl" else ("" if value is None else str(value))
    blank = held is None or not str(held).strip()
    told = not isinstance(held, list | dict)
    taken = {"question": isinstance(held, str) and not blank, "answer": isinstance(held, str)}

    def made():
        answers = AnswerFile.read(path)
        sheets = [rated(answers, name, {row: (row, 9) for row in range(12)}) for name in "ab"]
        return rated_rows(sheets)

    if not taken.get(key, told or key in ("part", "note")):
        with pytest.raises(UserError, match=rf"{path}: row 5\b"):
            made()
        return
    rows = made()
    write_jsonl(trait.folder / "onpolicy.jsonl", map(asdict, rows))
    assert load_ratings(trait) == rows
    assert len(rows) == 12 - (key == "answer" and blank)
    if key in ("model", "condition"):
        assert getattr(rows[4], key) == ("unknown" if blank else str(held))


def test_an_empty_answer_is_neither_asked_for_nor_kept(tmp_path):
    write_jsonl(tmp_path / "answers.jsonl", [{**ROWS[0], "answer": " "}, *ROWS[1:]])
    answers = AnswerFile.read(tmp_path / "answers.jsonl")
    sheets = [rated(answers, name, {row: (row, 50) for row in range(12)}) for name in ("a", "b")]
    assert [row.answer for row in rated_rows(sheets)] == [each["answer"] for each in ROWS[1:]]
    assert 0 not in RatingSheet(answers, tmp_path / "answers.c.jsonl").remaining()


def test_what_is_no_rating_of_these_answers_is_named(answers, tmp_path):
    sheet = rated(answers, "ada", {0: (1, 2)})
    changed = [{**ROWS[0], "answer": "Another."}, *ROWS[1:]]
    write_jsonl(tmp_path / "answers.jsonl", changed)
    again = RatingSheet(AnswerFile.read(tmp_path / "answers.jsonl"), sheet.path)
    with pytest.raises(UserError, match="rates no answer of"):
        again.ratings()
    for value in (101, "much", True, None):
        sheet.path.write_text(
            json.dumps({"row": 1, "text": answers.text(0), "trait": value, "sense": 5}) + "\n"
        )
        with pytest.raises(UserError, match=r"ada\.jsonl:1: trait: a rating is a number from 0"):
            sheet.ratings()
    sheet = rated(answers, "ben", {0: (1, 2)})
    for path, said in ((tmp_path, "is a folder"), (tmp_path / "none.jsonl", "does not exist")):
        with pytest.raises(UserError, match=said):
            rated_rows([sheet, RatingSheet(answers, path)])


def test_a_rating_that_a_kill_cut_short_is_asked_for_again(answers):
    sheet = rated(answers, "ada", {0: (1, 2), 1: (3, 4)})
    sheet.path.write_bytes(sheet.path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"ada\.jsonl:2"):
        sheet.ratings()
    assert sorted(sheet.remaining()) == list(range(1, 12))
    sheet.add(1, 5, 6)
    assert sheet.ratings() == {0: (1.0, 2.0), 1: (5.0, 6.0)}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "neither .jsonl nor .csv"),
        ("a.jsonl", '{"question": "q"}\n', "row 1 has no text 'answer'"),
        ("a.jsonl", '{"question": "q", "answer": 3}\n', "row 1 has no text 'answer'"),
        ("a.csv", "question,answer\n", "holds no rows"),
    ],
)
def test_files_that_hold_no_answers_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        AnswerFile.read(tmp_path / name)
