"""CSV files for people: no cell is run by a spreadsheet, and reading gives back every text."""

from __future__ import annotations

import csv

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_lora.core.errors import UserError
from persona_lora.core.files import read_csv, write_csv

RUN = ("=", "+", "-", "@", "\t", "\r")
CELLS = [
    *(f"{start}cmd|' /C calc'!A0" for start in RUN),
    *('=HYPERLINK("http://x","y")', "- a list\n- of two", "'=x", "''-x", "'tis", "a=b", "", "-5"),
]


def cells_of(path):
    with path.open(encoding="utf-8", newline="") as stream:
        return [cell for row in csv.reader(stream) for cell in row]


def test_no_cell_is_run_and_every_text_comes_back(tmp_path):
    path = tmp_path / "sheet.csv"
    rows = [{"answer": text, "=head": -1.5, "score": None} for text in CELLS]
    write_csv(path, ("answer", "=head", "score"), rows)
    texts = [cell for cell in cells_of(path) if cell != "-1.5"]  # a number of ours
    assert not [cell for cell in texts if cell.startswith(RUN)]
    assert [row["answer"] for row in read_csv(path, ("answer", "=head"))] == CELLS
    assert {row["=head"] for row in read_csv(path, ())} == {"-1.5"}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(alphabet="'=+-@\t\r\n ,;\"ab", max_size=6), min_size=1, max_size=4))
def test_any_text_comes_back(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    write_csv(path, ("a", "b"), [{"a": text, "b": 1} for text in texts])
    assert [row["a"] for row in read_csv(path, ("a",))] == texts
    assert not [cell for cell in cells_of(path) if cell.startswith(RUN)]


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "twice.csv"
    path.write_text("prompt,answer,answer\nHi,one,two\n")
    with pytest.raises(UserError, match="has the column 'answer' twice"):
        read_csv(path, ["prompt"])
    path.write_text("prompt,,\nHi,,\n")  # as spreadsheets leave them
    assert read_csv(path, ["prompt"])[0]["prompt"] == "Hi"
