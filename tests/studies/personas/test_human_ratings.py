"""Blind sheets and the ratings that come back."""

from __future__ import annotations

import csv
import json
import re

import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.files import write_json, write_jsonl, write_text
from persona_lora.core.runs import Output, Run
from persona_lora.studies.personas import human_ratings
from persona_lora.studies.personas.human_ratings import read_ratings, write_sheets

CONDITIONS = ("none", "lora", "prompt")


@pytest.fixture
def run(tmp_path):
    run = Run.open(tmp_path / "run", command="optimize", config={}, seed=0)
    run.write(
        "held_out",
        [
            {
                "persona": "ann",
                "condition": name,
                "prompt_id": at,
                "prompt": f"Prompt {at}?",
                "answer": f"<b>{place}{at}</b>",
                "score": 1.0 + place + at / 10,
                "coherence": 80.0,
                "relevance": 90.0,
            }
            for place, name in enumerate(CONDITIONS)
            for at in range(5)
        ],
    )
    return run


@pytest.fixture
def personas(tmp_path):
    folder = tmp_path / "personas" / "ann"
    turns = [{"role": "user", "content": "Hi."}]
    write_jsonl(folder / "conversations.jsonl", [{"id": "1", "split": "train", "messages": turns}])
    write_text(folder / "persona_profile.txt", "Speaks <softly>.")
    write_json(folder / "persona_samples.json", ["Hush & hush."])
    return folder.parent


@pytest.fixture
def sheets(run, personas, tmp_path):
    return write_sheets(run, tmp_path / "sheets", persona="ann", prompts=4, personas=personas)


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def rate(sheets, path, rating_of):
    """A rater who sees the key and follows a rule."""
    key = json.loads(sheets.key.read_text())["items"]
    rows = read(sheets.csv)
    lines = [f"{row['item']},{rating_of(key[row['item']])}" for row in rows]
    path.write_text("item,rating\n" + "\n".join(lines) + "\n")
    return path


def test_a_sheet_is_blind_and_shuffled(sheets):
    rows = read(sheets.csv)
    assert sheets.items == len(rows) == 3 * 4
    assert set(rows[0]) == {"item", "persona", "prompt", "answer", "rating"}
    page = sheets.page.read_text()
    for text in (sheets.csv.read_text(), page):
        assert not re.search(r"\b(lora|none|condition)\b", text.split("<style>")[0])
    key = json.loads(sheets.key.read_text())["items"]
    order = [key[row["item"]]["condition"] for row in rows]
    assert order != sorted(order)
    assert page.count("<section ") == 12
    assert "&lt;b&gt;" in page
    assert "Speaks &lt;softly&gt;." in page


def test_ratings_come_back_by_condition(sheets, tmp_path):
    by_place = {"none": 1, "lora": 4, "prompt": 5}
    one = rate(sheets, tmp_path / "one.csv", lambda item: by_place[item["condition"]])

    def a_little_stricter(item):
        rating = by_place[item["condition"]]
        return rating - 1 if (item["condition"], item["prompt_id"]) == ("prompt", 0) else rating

    two = rate(sheets, tmp_path / "two.csv", a_little_stricter)
    found = read_ratings(tmp_path / "sheets", [one, two])
    assert {name: fit.mean for name, fit in found.fits.items()} == {
        "none": 1.0,
        "lora": 4.0,
        "prompt": 4.875,
    }
    assert found.fits["none"].n == 8
    raters, judge = found.agreements
    assert (raters.first, raters.second, raters.n) == ("one", "two", 12)
    assert 0.9 < raters.kappa < 1
    assert judge.kappa is None
    assert judge.spearman > 0.8


def test_unrated_items_are_left_out(sheets, tmp_path):
    file = rate(sheets, tmp_path / "one.csv", lambda item: 3 if item["prompt_id"] else "")
    found = read_ratings(tmp_path / "sheets", [file])
    assert {fit.n for fit in found.fits.values()} == {3}
    assert found.agreements[0].spearman is None  # a rater who says 3 to all agrees with nobody


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item,rating\n99,3\n", "99"),
        ("item,rating\nFIRST,7\n", "'7'"),
        ("item,rating\nFIRST,\n", "no ratings"),
        ("item,rating\nFIRST,2\nFIRST,\nFIRST,5\n", ": row 3: .*-1 is rated a second time"),
        ("item,mark\nFIRST,3\n", "rating"),
    ],
)
def test_malformed_ratings_are_named(sheets, tmp_path, text, message):
    file = tmp_path / "bad.csv"
    file.write_text(text.replace("FIRST", read(sheets.csv)[0]["item"]))
    with pytest.raises(UserError, match=message):
        read_ratings(tmp_path / "sheets", [file])


def test_sheets_that_people_may_have_filled_in_stay(run, personas, sheets, tmp_path):
    rated = rate(sheets, tmp_path / "one.csv", lambda _: 3)
    before = sheets.csv.read_bytes()
    asked = {"persona": "ann", "personas": personas}
    with pytest.raises(UserError, match=r"holds sheets, with ratings perhaps; .* --overwrite"):
        write_sheets(run, tmp_path / "sheets", prompts=3, **asked)
    assert sheets.csv.read_bytes() == before
    write_sheets(run, Output(tmp_path / "sheets", overwrite=True), prompts=4, seed=1, **asked)
    with pytest.raises(UserError, match=r"no item .* in the key; is it another sheet's"):
        read_ratings(tmp_path / "sheets", [rated])


def test_sheets_cut_short_are_written_anew(run, personas, tmp_path, monkeypatch):
    asked = {"persona": "ann", "personas": personas}
    output = Output(tmp_path / "sheets", overwrite=True)
    write_sheets(run, output, **asked)
    monkeypatch.setattr(human_ratings, "write_text", None)  # a kill between sheet and page
    with pytest.raises(TypeError):
        write_sheets(run, output, seed=1, **asked)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"key\.json does not exist"):
        read_ratings(tmp_path / "sheets", [])
    write_sheets(run, tmp_path / "sheets", seed=1, **asked)


def test_unknown_personas_conditions_and_folders_are_named(run, personas, sheets, tmp_path):
    with pytest.raises(UserError, match="'bob'"):
        write_sheets(run, tmp_path / "x", persona="bob", personas=personas)
    with pytest.raises(UserError, match="'svd'"):
        write_sheets(run, tmp_path / "x", persona="ann", conditions=["svd"], personas=personas)
    with pytest.raises(UserError, match=r"key\.json"):
        read_ratings(tmp_path / "nowhere", [])
