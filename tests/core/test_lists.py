from __future__ import annotations

import pytest

from persona_lora.core.settings import (
    path_after_equals,
    path_before_equals,
    split_list,
    split_lists,
)


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("My Drive/evil", "My Drive/a b", "plain", "one,two", "two  spaces"):
        (tmp_path / name).mkdir(parents=True)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        (" , ", []),
        ("a b", ["a", "b"]),
        ("a,b , c", ["a", "b", "c"]),
        ("My Drive/evil", ["My Drive/evil"]),
        ("plain My Drive/evil plain", ["plain", "My Drive/evil", "plain"]),
        ("My Drive/a b My Drive/evil", ["My Drive/a b", "My Drive/evil"]),
        ("My Drive/none", ["My", "Drive/none"]),
        ("one,two", ["one,two"]),
        ("two  spaces", ["two  spaces"]),
        ("x" * 5000, ["x" * 5000]),
    ],
)
def test_a_path_that_exists_is_taken_whole(text, parts):
    assert split_list(text) == parts
    assert split_lists([text, "plain"]) == [*parts, "plain"]


def test_paths_with_a_name_or_a_number():
    pairs = "plain=1,My Drive/evil=-0.5 none=2"
    assert split_list(pairs, path_before_equals) == ["plain=1", "My Drive/evil=-0.5", "none=2"]
    pairs = "first=My Drive/a b second=plain"
    assert split_list(pairs, path_after_equals) == ["first=My Drive/a b", "second=plain"]
