"""Settings as people write them: YAML, lists in one string, values of a type."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import yaml

from persona_lora.core.errors import UserError
from persona_lora.core.settings import (
    path_beside_equals,
    read_yaml,
    split_list,
    split_lists,
    typed_fields,
    typed_value,
    yaml_text,
)


def test_numbers_are_read_as_people_write_them(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: 5e-1\nb: 1e5\nc: -.5E+1\nd: 2E0\ne: 15\nf: '5e-1'\ng: 5e\nh: {i: [1e-3]}\n")
    assert read_yaml(path) == {
        "a": 0.5, "b": 1e5, "c": -5.0, "d": 2.0, "e": 15, "f": "5e-1", "g": "5e", "h": {"i": [1e-3]}
    }  # fmt: skip


@pytest.mark.parametrize(
    "written",
    [
        *("0", "7", "-7", "+7", "010", "-010", "08", "1_000", "1:01", "1:30.5", "190:20:30"),
        *(
            "0x1F",
            "0o17",
            "0b11",
            "0X1F",
            "1.",
            ".5",
            "-.5",
            "010.5",
            "1_0.5",
            "1.5e3",
            "1e3",
            "1E-3",
        ),
        *("+1e+3", ".inf", "-.INF", ".nan", "inf", "nan", "1e", "1.5.2", "--1", "1 000", "٣"),
    ],
)
@pytest.mark.parametrize("kind", [int, float])
def test_a_number_in_a_file_is_the_one_on_the_command_line(tmp_path, kind, written):
    path = tmp_path / "a.yaml"
    path.write_text(f"a: {written}\n")
    value = read_yaml(path)["a"]
    if re.fullmatch("0[xo].*", written):  # a flag takes neither, but they are the same everywhere
        assert value == {"0x1F": 31, "0o17": 15}[written]
        return
    try:
        found = typed_value(kind, value, "a")
    except UserError:
        return
    # a flag has no other word for an infinite number
    flag = written.replace(".inf", "inf").replace(".INF", "inf").replace(".nan", "nan")
    assert repr(float(found)) == repr(float(flag))


TEXTS = (
    "010",
    "1:01",
    "1_000",
    "1e5",
    "12e4567",
    "0o17",
    "0x1F",
    ".5",
    "5.",
    "no",
    "~",
    "a: b",
    "",
)


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_written_as_text_is_read_as_text(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(yaml_text({"revision": text, "seed": 5, "rate": 1e-7}))
    assert read_yaml(path) == {"revision": text, "seed": 5, "rate": 1e-7}
    assert yaml.safe_load(path.read_text())["revision"] == text  # for readers of YAML 1.1, too


def test_a_mapping_may_take_in_two_others(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: &a {x: 1}\nb: &b {y: 2}\nc:\n  <<: *a\n  <<: *b\n  z: 3\n")
    assert read_yaml(path)["c"] == {"x": 1, "y": 2, "z": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "'a' is given twice.*line 3"),
        ("a: {b: 1, b: 2}", "'b' is given twice"),
        ("1: a\n1: b", "'1' is given twice"),
        ("a: [", "not valid YAML"),
        ("- a", "one YAML mapping"),
        ("a: 2026-13-45", "not valid YAML"),
        ("a: " + "[" * 5000, "not valid YAML"),
        ("a: !!python/object:os.system x", "not valid YAML"),
        ("a: &x [*x]\n? [1]\n: 2", "not valid YAML"),
    ],
)
def test_mistakes_are_one_line(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("My Drive/evil", "My Drive/a,b", "plain", "one,two", "two , three"):
        (tmp_path / name).mkdir(parents=True)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        (" , ", []),
        ("a b", ["a b"]),
        ("a,b , c d", ["a", "b", "c d"]),
        ("My Drive/evil", ["My Drive/evil"]),
        ("plain, My Drive/evil ,plain", ["plain", "My Drive/evil", "plain"]),
        ("My Drive/a,b,My Drive/evil", ["My Drive/a,b", "My Drive/evil"]),
        ("x,y,My Drive/a,b", ["x", "y", "My Drive/a,b"]),
        ("My Drive/a,none", ["My Drive/a", "none"]),
        ("one,two", ["one,two"]),
        ("two , three", ["two , three"]),
        ("x" * 5000, ["x" * 5000]),
    ],
)
@pytest.mark.usefixtures("folders")
def test_a_path_that_exists_is_taken_whole(text, parts):
    assert split_list(text) == parts
    assert split_lists([text, "plain"]) == [*parts, "plain"]


@pytest.mark.usefixtures("folders")
def test_paths_with_a_name_or_a_number():
    pairs = "plain=1,My Drive/a,b=-0.5,none=2"
    assert split_list(pairs, path_beside_equals) == ["plain=1", "My Drive/a,b=-0.5", "none=2"]
    pairs = "first=My Drive/a,b,second=plain"
    assert split_list(pairs, path_beside_equals) == ["first=My Drive/a,b", "second=plain"]


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int, 5, 5),
        (int, "5", 5),
        (int, 5.0, 5),
        (float, "2e-4", 2e-4),
        (float | None, None, None),
        (bool, True, True),
        (bool | str, False, False),
        (str, "word", "word"),
        (list[str], "word", ["word"]),
        (list[bool], True, [True]),
        (list[float], ["0.5", 1], [0.5, 1.0]),
        (list[int] | None, 3, [3]),
        (dict[str, Any], {"a": 1}, {"a": 1}),
        (Literal["a", "b"], "b", "b"),
        (Any, True, True),
    ],
)
def test_a_value_of_the_type_is_taken(hint, value, expected):
    found = typed_value(hint, value, "x")
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("hint", "value", "words"),
    [
        (int, "word", "x must be a whole number, got 'word'"),
        (int, True, "x must be a whole number, got True"),
        (float, False, "x must be a number, got False"),
        (float | None, "word", "x must be a number, got 'word'"),
        (bool, "word", "x must be true or false, got 'word'"),
        (str, 5, "x must be text, got 5; put text that looks like a number into quotes"),
        (list[float], "word", "x must be a list of a number, got 'word'"),
        (list[float], True, "x must be a list of a number, got True"),
        (tuple[int, ...] | None, [1, True], "x must be a list of a whole number, got [1, True]"),
        (dict[str, float], {"a": False}, "x must be a mapping, got {'a': False}"),
        (dict[str, Any] | str, [1], "x must be a mapping or text, got [1]; put text that looks"),
        (Literal["a", "b"], "c", "x must be a or b, got 'c'"),
        (int, "w" * 78, f"x must be a whole number, got '{'w' * 78}'"),
        (int, "w" * 79, f"x must be a whole number, got '{'w' * 76}…"),
    ],
)
def test_a_value_of_another_type_is_refused_in_words(hint, value, words):
    with pytest.raises(UserError) as caught:
        typed_value(hint, value, "x")
    assert str(caught.value).startswith(words)
    assert ("quotes" in str(caught.value)) == ("put text" in words)


def test_fields_are_held_to_their_types_and_others_stay():
    @dataclass
    class Group:
        number: int = 0
        named: str | None = None
        parts: list[str] = field(default_factory=list)
        never: int = None  # type: ignore[assignment]  # the default says that None may stand

    given = {"number": "3", "named": None, "parts": "a", "never": None, "unknown": "5"}
    scope = {"number": 3, "named": None, "parts": ["a"], "never": None, "unknown": "5"}
    assert typed_fields(Group, given, "f: ") == scope
    with pytest.raises(UserError, match=r"^f: number must be a whole number, got None$"):
        typed_fields(Group, {"number": None}, "f: ")
