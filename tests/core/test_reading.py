"""Text and JSON from strangers: read, or refused in one line that names the file and the place."""

from __future__ import annotations

import codecs
import json
import os

import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.files import read_csv, read_json, read_jsonl, read_text

READERS = {
    "text": read_text,
    "json": read_json,
    "jsonl": read_jsonl,
    "csv": lambda path: read_csv(path, ["a"]),
}


def _folder(path):
    path.mkdir()


def _ring(path):
    path.symlink_to(path)


PLACES = {
    "nothing": (lambda path: None, "does not exist"),
    "a folder": (_folder, "is a folder"),
    "a pipe": (os.mkfifo, "is a pipe or a device"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a pipe or a device"),
    "a ring of links": (_ring, "cannot be read"),
    "bytes": (lambda path: path.write_bytes(b"\xff\x00\x80"), "not UTF-8 text: .* at byte 0"),
    "UTF-16": (lambda path: path.write_bytes("é".encode("utf-16")), "is UTF-16; save it as UTF-8"),
    "a cut character": (lambda path: path.write_bytes("é".encode()[:1]), "not UTF-8 text"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_text_file_is_refused_without_waiting(tmp_path, reader, place):
    make, message = PLACES[place]
    make(tmp_path / "x")
    with pytest.raises(UserError, match=message):
        READERS[reader](tmp_path / "x")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "a/" * 3000])
def test_a_path_that_no_file_can_have_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="cannot be read"):
        read_text(tmp_path / name)


VALUES = {
    "NaN": ("[NaN]", "NaN is no JSON number"),
    "infinity": ('{"a": -Infinity}', "-Infinity is no JSON number"),
    "1e999": ("[1e999]", "1e999 is too large"),
    "long": ("1" * 100_000, "100000 digits"),
    "twice": ('{"a": 1, "a": 2}', "'a' stands twice"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "deeper than used": ("[" * 70 + "]" * 70, "nested too deeply"),
    "deep objects": ('{"a":' * 70 + "1" + "}" * 70, "nested too deeply"),
    "deep in turns": ('[{"a":' * 35 + "1" + "}]" * 35, "nested too deeply"),
    "half a pair": ('{"a": "\\ud83d"}', "lone surrogate"),
    "the other half": ('["\\uDE00 x"]', "lone surrogate"),
    "a surrogate key": ('{"\\ud83d": 1}', "lone surrogate"),
    "empty": ("", "not valid JSON"),
    "cut": ('{"a": ', "not valid JSON"),
}


@pytest.mark.parametrize("value", VALUES)
def test_absurd_json_is_refused_with_file_and_row(tmp_path, value):
    text, message = VALUES[value]
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_json(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    if text:
        path.write_text(f'{{"b": "fine"}}\n\n{text}\n')
        with pytest.raises(UserError, match=rf"x\.json:3.*{message}"):
            read_jsonl(path)


def test_whole_emoji_marks_and_depths_in_use_are_read(tmp_path):
    path = tmp_path / "x.json"
    value = {"a": ["\U0001f600", {"b": [[["\ue000"]]]}]}
    path.write_bytes(codecs.BOM_UTF8 + json.dumps(value).encode())
    assert read_json(path) == value
    path.write_bytes(codecs.BOM_UTF8 + b"a,b\r\n1,2\r\n")
    assert read_csv(path, ["a"]) == [{"a": "1", "b": "2"}]
