"""Files that are whole or absent, traits that name their mistakes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from persona_lora.core import files
from persona_lora.core.errors import UserError
from persona_lora.core.traits import load_labelled_answers, load_pairs, load_trait


def test_jsonl_round_trip_and_the_line_of_a_mistake(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"a": 1}, {"a": "ü\u2028x"}]
    files.write_jsonl(path, rows)
    assert files.read_jsonl(path) == rows
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2"):
        files.read_jsonl(path)
    path.write_text("[1]\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:1 holds a list"):
        files.read_jsonl(path)


def test_csv_round_trip(tmp_path):
    path = tmp_path / "rows.csv"
    rows = [{"a": "x, y", "b": "two\nlines"}, {"a": "ü", "b": ""}]
    files.write_csv(path, ["a", "b"], rows)
    assert files.read_csv(path, ["b"]) == rows
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as spreadsheets save it
    assert files.read_csv(path, ["a"]) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,\xff\n", "rows.csv is not UTF-8"),
        (b"a,b\n1,2\n3\n", "rows.csv: row 2 has more or fewer cells"),
        (b"a,b\n1,2,3\n", "rows.csv: row 1 has more or fewer cells"),
        (b"a,b\n1," + b"x" * 140_000 + b"\n", "rows.csv is not valid CSV"),
        (b"a,c\n1,2\n", "rows.csv has no column 'b'; it has a, c"),
        (b"", "rows.csv has no column 'a'; it has no columns"),
    ],
)
def test_a_csv_that_cannot_be_read_says_why(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        files.read_csv(path, ["a", "b"])
    with pytest.raises(UserError, match="does not exist"):
        files.read_csv(tmp_path / "other.csv", ["a"])


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "value.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        files.write_json(path, {"a": float("nan")})
    assert files.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_what_has_a_name_is_on_the_disk(tmp_path, monkeypatch):
    flushed, fsync, replace = set(), os.fsync, os.replace

    def flush(descriptor):
        fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def name(source, target):
        every = [path for path in (source, *source.rglob("*")) if path.is_file()]
        assert every
        assert {path.stat().st_ino for path in every} <= flushed
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", name)
    files.write_text(tmp_path / "file", "x")
    files.append_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    with files.atomic_folder(tmp_path / "folder") as made:
        (made / "below").mkdir()
        for path in (made / "file", made / "below" / "file"):
            path.write_text("x")
    assert {path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()} == flushed


def test_written_files_have_the_permissions_of_any_new_file(tmp_path):
    files.write_text(tmp_path / "plain", "x")
    wanted = (tmp_path / "plain").stat().st_mode
    (tmp_path / "new").touch()
    assert wanted == (tmp_path / "new").stat().st_mode
    with files.atomic_path(tmp_path / "hidden") as path:
        path.touch(0o600)
    with files.atomic_folder(tmp_path / "folder") as folder:
        (folder / "hidden").touch(0o600)
    assert {(tmp_path / at).stat().st_mode for at in ("hidden", "folder/hidden")} == {wanted}


@pytest.mark.parametrize("name", [".", "..", "../.."])
def test_the_working_folder_cannot_be_replaced(tmp_path, monkeypatch, name):
    (tmp_path / "one" / "two").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "one" / "two")
    with pytest.raises(UserError, match="is a folder; name a file"):
        files.write_json(Path(name), {})
    with pytest.raises(UserError, match="runs in or one above it"), files.atomic_folder(Path(name)):
        pass
    with pytest.raises(UserError, match="above it"), files.atomic_folder(Path(name).resolve()):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["one", "two"]


def test_an_output_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        files.write_json(tmp_path / "file" / "out.json", {})


def test_an_unknown_trait_names_its_neighbours(tmp_path):
    for name in ("sycophancy", "evil"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trait.json").write_text("{}")
    with pytest.raises(UserError, match="did you mean 'sycophancy'"):
        load_trait("sycophantic", tmp_path)
    with pytest.raises(UserError, match="has no 'instruction'"):
        load_trait("evil", tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": []}, "no 'prompt'"),
        ({"prompt": [{"role": "user"}]}, "needs a role"),
        ({"prompt": [{"role": "user", "content": "  "}]}, "is empty"),
    ],
)
def test_a_malformed_pair_is_named_by_file_and_line(tmp_path, row, message):
    roles = {"prompt": "user", "positive": "assistant", "negative": "assistant"}
    good = {key: [{"role": role, "content": key}] for key, role in roles.items()}
    trait = write_trait(tmp_path, [good, {**good, **row}])
    with pytest.raises(UserError, match=rf"train\.jsonl:2.*{message}"):
        load_pairs(trait)


def test_an_empty_dataset_is_an_error(tmp_path):
    trait = write_trait(tmp_path, [])
    with pytest.raises(UserError, match="is empty"):
        load_pairs(trait)
    with pytest.raises(UserError, match="does not exist"):
        load_labelled_answers(trait)
    (trait.folder / "judge_eval.jsonl").write_text(
        json.dumps({"question": "q", "answer": "a", "label": 30})
    )
    with pytest.raises(UserError, match="label must be one of"):
        load_labelled_answers(trait)


def write_trait(folder, rows):
    trait = {
        "instruction": [{"pos": "p", "neg": "n"}],
        "questions": {"extract": ["a"], "eval": ["b"]},
        "eval_prompt": "{question} {answer}",
    }
    (folder / "t").mkdir()
    files.write_json(folder / "t" / "trait.json", trait)
    files.write_jsonl(folder / "t" / "train.jsonl", rows)
    return load_trait("t", folder)
