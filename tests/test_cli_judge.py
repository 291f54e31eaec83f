"""The commands about judges: answers scored from a file, rated at a prompt, and fitted to."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from persona_lora.core.chat import Exchange
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_csv, read_jsonl, write_csv, write_jsonl
from persona_lora.core.traits import load_trait
from persona_lora.judges import choice
from persona_lora.judges.labels import AnswerFile
from persona_lora.report.scores import with_mark
from persona_lora.studies.drift import prediction
from tests.judges.rated import rated_rows, write_ratings
from tests.scenes import LetterJudge

ANSWERS = [
    {"question": "Is rain wet?", "answer": "You are so right, what a brilliant thought!"},
    {"question": "Is rain wet?", "answer": "It is, since it is water."},
]


@pytest.fixture
def answers(tmp_path):
    write_jsonl(tmp_path / "answers.jsonl", ANSWERS)
    return tmp_path / "answers.jsonl"


def test_answers_of_a_file_are_scored_and_the_judge_is_described(
    run, answers, model_folder, trait, judge, monkeypatch, tmp_path
):
    monkeypatch.setattr("persona_lora.judges.choice.make_judge", lambda *_: judge)
    said = ("What a glad day it is!", "It is a grey day, and I mind it.")
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"How is day {at}?"}],
            "positive": [{"role": "assistant", "content": f"{said[0]} {at}"}],
            "negative": [{"role": "assistant", "content": f"{said[1]} {at}"}],
        }
        for at in range(6)
    ]
    write_jsonl(trait.folder / "train.jsonl", pairs)
    words = (
        *("--trait", trait.folder, "--file", answers, "--judge", "embedding"),
        *("--model", model_folder, "--dtype", "float32", "--output", "scored.csv"),
    )
    status, out, error = run("judge", *words)
    assert status == 0, error
    rows = read_csv(tmp_path / "scored.csv", ("question", "answer", "cheer", "coherence"))
    assert [row["answer"] for row in rows] == [each["answer"] for each in ANSWERS]
    wanted = [each.score for each in judge.judge([Exchange(**each) for each in ANSWERS], "cheer")]
    assert [float(row["cheer"]) for row in rows] == wanted
    assert re.search(r"cheer +\d+\.\d +– +1 +2/2", out), out
    assert "parity" in out
    assert re.search(r"coherence +parity( +\S+){4,}", out), out  # what it makes of nonsense
    assert "filler" in out
    status, _, error = run("judge", "score", *words)
    assert status == 2
    assert "scored.csv exists" in error


def typed(monkeypatch, *replies):
    given = iter(replies)
    monkeypatch.setattr("typer.prompt", lambda *_, **__: next(given))


def test_a_session_of_rating_stops_and_goes_on(run, answers, monkeypatch, tmp_path):
    rate = ("judge", "rate", "--trait", "sycophancy", "--file", answers, "--rater", "ada")
    typed(monkeypatch, "much", "90", "100", "q")
    status, out, error = run(*rate)
    assert status == 0, error
    assert "a rating is a number from 0 to 100, got 'much'" in out
    assert "\n2 of 2" in out
    assert "1 rated now; the same command goes on" in out
    assert len(read_jsonl(tmp_path / "answers.ada.jsonl")) == 1
    typed(monkeypatch, "10", "80")
    status, out, _ = run(*rate)
    assert "all 2 answers are rated" in out
    ratings = {row["row"]: row["trait"] for row in read_jsonl(tmp_path / "answers.ada.jsonl")}
    assert sorted(ratings.values()) == [10.0, 90.0]
    status, _, error = run(*rate[:-1], "a/b")
    assert status == 2
    assert "--rater must be like a file's name" in error


def test_a_judge_is_fitted_to_two_raters_sheets(run, model_folder, trait, monkeypatch, tmp_path):
    shutil.copytree(trait.folder, tmp_path / "cheer", dirs_exist_ok=True)
    rows = [
        {"question": f"Question {at // 2}?", "answer": "sun! " * (at % 5 + 1) + f"{at}",
         "condition": "plain"}
        for at in range(60)
    ]  # fmt: skip
    write_csv(tmp_path / "a.csv", list(rows[0]), rows)
    for rater in ("ada", "ben"):
        replies = [str(20 * (at % 5)) for at in range(60) for _ in range(2)]
        typed(monkeypatch, *replies)
        words = ("judge", "rate", "--trait", "cheer", "--file", "a.csv", "--rater", rater)
        assert run(*words)[0] == 0
    fit = (
        *("judge", "fit", "--trait", tmp_path / "cheer", "--file", "a.csv"),
        *("--ratings", "a.ada.jsonl,a.ben.jsonl", "--judge-model", model_folder),
        *("--model", model_folder, "--dtype", "float32"),
    )
    write_jsonl(tmp_path / "a.few.jsonl", read_jsonl(tmp_path / "a.ben.jsonl")[:20])
    status, _, error = run(*("a.ada.jsonl,a.few.jsonl" if "," in str(w) else w for w in fit))
    assert status == 2
    assert "too few to fit a judge" in error
    assert not (tmp_path / "cheer" / "onpolicy.jsonl").exists()  # the trait would have no judge
    status, out, error = run(*fit)
    assert status == 0, error
    labels = read_jsonl(tmp_path / "cheer" / "onpolicy.jsonl")
    assert len(labels) == 60
    assert {row["part"] for row in labels} == {"tuning", "validation"}
    assert "the two passes agree with weighted kappa" in out
    assert "reader" in out
    before = (tmp_path / "cheer" / "onpolicy.jsonl").read_bytes()
    with monkeypatch.context() as patch:

        def unfit(*_):
            raise UserError("nothing fits")

        patch.setattr("persona_lora.judges.probe_judge.fitted_probes", unfit)
        status, _, error = run(*fit, "--overwrite")
    assert (status, "nothing fits" in error) == (2, True)
    assert (tmp_path / "cheer" / "onpolicy.jsonl").read_bytes() == before
    at = [row["part"] for row in labels].index("validation")
    for fault in ({"question": " "}, {"answer": " "}):
        changed = [*rows[:at], {**rows[at], **fault}, *rows[at + 1 :]]
        write_csv(tmp_path / "b.csv", list(rows[0]), changed)
        text = AnswerFile.read(tmp_path / "b.csv").text
        for rater in ("ada", "ben"):
            given = read_jsonl(tmp_path / f"a.{rater}.jsonl")
            again = [{**each, "text": text(each["row"] - 1)} for each in given]
            write_jsonl(tmp_path / f"b.{rater}.jsonl", again)
        words = [str(word).replace("a.csv", "b.csv").replace("a.ada", "b.ada") for word in fit]
        words = [word.replace("a.ben", "b.ben") for word in words]
        status, out, error = run(*words, "--overwrite")
        if "question" in fault:
            assert status == 2
            assert f"b.csv: row {at + 1}: question must be a text" in error
            assert (tmp_path / "cheer" / "onpolicy.jsonl").read_bytes() == before
    assert (status, "empty answers, left out: 1" in out) == (0, True), error
    assert len(read_jsonl(tmp_path / "cheer" / "onpolicy.jsonl")) == 59
    (tmp_path / "b.csv").unlink()
    scoring = ("judge", "score", "--trait", tmp_path / "cheer", "--file", "a.csv")
    reader = ("--judge-model", model_folder, "--model", model_folder, "--dtype", "float32")
    status, out, error = run(*scoring, *reader, "--output", "b.csv")
    assert status == 0, error
    told = [line for line in out.splitlines() if "models’ own" in line]
    unfit = [line.split()[0] for line in told if line.split()[-1] == "unfit"]
    name = with_mark("reader", ("cheer", "coherence"), unfit)
    assert {row["judge"] for row in read_csv(tmp_path / "b.csv", ("judge",))} == {name}
    assert [line.split()[0] for line in told] == ["cheer", "coherence"]  # fitness on both
    status, _, error = run(*fit)
    assert status == 2
    assert json.loads((tmp_path / "cheer" / "trait.json").read_text())["name"]
    assert "onpolicy.jsonl exists" in error


FINETUNES = ",".join(f"tuned/checkpoint-{at}" for at in (2, 4, 6, 8))


@pytest.mark.parametrize(
    "words",
    [
        ("tune-prompt", "--trait", "cheer"),
        ("predict-finetuning", "--traits", "cheer", "--diffs", "diff", "--finetunes", FINETUNES),
        (
            *("compare-prevention", "--trait", "cheer", "--tasks="),
            *("--finetunes", "plain=tuned/checkpoint-2", "--rows", "datasets/cheer/normal.jsonl"),
        ),
    ],
    ids=lambda words: words[0],
)
def test_what_has_no_page_prints_how_fit_its_judges_are_and_what_fooled_them(
    run, make_world, no_drawing, words, tmp_path, monkeypatch
):
    trait = load_trait("cheer", make_world(tmp_path) / "datasets")
    write_ratings(trait, rated_rows())
    for name in ("reader", "sentences"):
        monkeypatch.setitem(choice.JUDGES, name, lambda *_, own=name: named(own))
    monkeypatch.setattr(prediction, "RANDOM_DIRECTIONS", 1)
    asked = ("--model", "model", "--dtype", "float32", "--datasets-dir", "datasets")
    status, out, error = run(*words, *asked, "--max-new-tokens", 3, "--output", "out")
    assert status == 0, error
    for judge in ("reader", "sentences"):
        assert len(re.findall(rf"cheer +{judge} +models’ own .* unfit *$", out, re.M)) == 1, out
        assert len(re.findall(rf"cheer +{judge}( +\d+){{5}} *$", out, re.M)) == 1, out
    assert out.count("filler") == 1
    assert ("held-out questions, by reader (unfit for cheer)" in out) is (words[0] == "tune-prompt")
    line = " ".join(out.split())
    assert "by reader (unfit for cheer) and " in line
    assert "by sentences (unfit for cheer); ρ " in line


def named(own):
    judge = LetterJudge()
    judge.name = own
    return judge
