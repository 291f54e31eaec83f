"""Runs: resumed when they are the same, refused when they are not, and one process at a time."""

from __future__ import annotations

import json
import os
import pickle
import platform
import subprocess
import sys

import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.files import read_json, write_json
from persona_lora.core.runs import Output, Run, first_difference, refuse_taken

SAME = "; if it is the same, give its path as before"
OPEN = """
import sys
from pathlib import Path
from persona_lora.core.errors import UserError
from persona_lora.core.runs import Output, Run

sys.stdin.readline()
try:
    run = Run.open(Path(sys.argv[1]), command="x", config={}, seed=0)
except UserError as error:
    print(error, flush=True)
    sys.exit(2)
with run:
    run.append("rows", [{"row": 0}])
    print("works", flush=True)
    sys.stdin.readline()
"""


def opened(folder, *, config=None, inputs=None, overwrite=False, parts=()):
    return Run.open(
        Output(folder, overwrite),
        command="x",
        config=config or {},
        seed=0,
        inputs=inputs,
        parts=parts,
    )


def test_a_tuple_is_the_list_that_it_is_written_as(tmp_path):
    for _ in range(2):
        with opened(tmp_path, config={"batches": (1, 8)}):
            pass
    with pytest.raises(UserError, match="batches"):
        opened(tmp_path, config={"batches": (1, 9)})


def test_an_output_brings_what_its_run_records_beside(tmp_path):
    beside = Output(tmp_path, config={"judge": "j", "a": 2}, inputs={"the judge": "1"})
    asked = {"command": "x", "config": {"a": 1}, "seed": 0, "inputs": {"the model": "2"}}
    with Run.open(beside, **asked) as run:
        assert run.record["config"] == {"a": 2, "judge": "j"}
        assert run.record["inputs"] == {"the model": "2", "the judge": "1"}
    with pytest.raises(UserError, match="--overwrite"):
        Run.open(beside.at(tmp_path), **{**asked, "seed": 1})
    assert beside.at(tmp_path / "b") == Output(tmp_path / "b", False, beside.config, beside.inputs)


def test_a_run_resumes_with_the_same_configuration_only(tmp_path):
    folder = tmp_path / "run"
    with opened(folder, config={"a": 1}) as run:
        run.append("rows", [{"row": 0}, {"row": 1}])
    with opened(folder, config={"a": 1}) as again:
        assert again.read("rows") == [{"row": 0}, {"row": 1}]
    with pytest.raises(UserError, match=r"another configuration \(config.a: 1, now 2\)"):
        opened(folder, config={"a": 2})
    with opened(folder, config={"a": 2}, overwrite=True) as fresh:
        assert fresh.read("rows") == []


def test_a_run_goes_on_with_batches_of_another_size(tmp_path):
    config = {"generation": {"batch_size": "auto", "temperature": 0.0}}
    with opened(tmp_path, config=config) as run:
        run.append("rows", [{"row": 0}])
    smaller = {"generation": {"batch_size": 1, "temperature": 0.0}}
    with opened(tmp_path, config=smaller) as again:
        assert again.read("rows") == [{"row": 0}]
    hotter = {"generation": {"batch_size": 1, "temperature": 0.5}}
    with pytest.raises(UserError, match=r"config.generation.temperature: 0.0, now 0.5"):
        opened(tmp_path, config=hotter)


def test_a_changed_input_is_named_and_so_is_one_that_is_gone_or_new(tmp_path):
    with opened(tmp_path, inputs={"the trait": "1", "the diff": "2"}):
        pass
    with pytest.raises(UserError, match="the content of the diff has changed since; choose"):
        opened(tmp_path, inputs={"the trait": "1", "the diff": "9"})
    for more in ({"the trait": "1"}, {"the trait": "1", "the diff": "2", "the vector": "3"}):
        lone = "the vector" if len(more) == 3 else "the diff"
        with pytest.raises(UserError, match=f"only one of the two read {lone}; choose"):
            opened(tmp_path, inputs=more)
    refuse_taken(tmp_path, "x", {}, 0, inputs={"the diff": "2"})
    with pytest.raises(UserError, match="only one of the two read the vector"):
        refuse_taken(tmp_path, "x", {}, 0, inputs={"the diff": "2", "the vector": "3"})
    with opened(tmp_path, inputs={"the diff": "9"}, overwrite=True) as run:
        assert run.record["inputs"] == {"the diff": "9"}


def test_items_with_rows_of_their_own_come_and_go(tmp_path):
    first = {"the trait": "1", "checkpoint-2": "2", "the adapter of a": "3"}
    with opened(tmp_path, inputs=first):
        pass
    later = {"checkpoint-4": "4", "the second judge": "6"}
    with opened(tmp_path, inputs={"the trait": "1", **later}) as run:
        assert run.record["inputs"] == {**first, **later}
    with pytest.raises(UserError, match="the content of checkpoint-2 has changed since"):
        opened(tmp_path, inputs={"the trait": "1", "checkpoint-2": "5"})


def test_a_run_that_recorded_no_inputs_is_not_taken_for_one_that_did(tmp_path):
    with opened(tmp_path):
        pass
    record = read_json(tmp_path / "run.json")
    del record["inputs"]
    write_json(tmp_path / "run.json", record)
    with pytest.raises(UserError, match="did not record the contents"):
        opened(tmp_path, inputs={"the trait": "1"})


@pytest.mark.parametrize("text", ['{"row": 2', '{"row": 2, "answer": "gr\u00fc'])
def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path, text):
    with opened(tmp_path) as run:
        run.append("rows", [{"row": 0}, {"row": 1}])
        whole = (tmp_path / "rows.jsonl").read_bytes()
        cut = text.encode()[:-1] if text.endswith("\u00fc") else text.encode()
        (tmp_path / "rows.jsonl").write_bytes(whole + cut)
        assert run.resume_rows("rows") == [{"row": 0}, {"row": 1}]
        assert (tmp_path / "rows.jsonl").read_bytes() == whole
        run.extend("rows", [{"row": 2}, {"row": 3}])
        assert [row["row"] for row in run.read("rows")] == [0, 1, 2, 3]


def test_an_overwritten_run_that_was_killed_while_emptied_is_emptied_again(tmp_path):
    with opened(tmp_path, config={"a": 1}) as run:
        run.append("rows", [{"row": 0}])
        (tmp_path / "parts").mkdir()
        (tmp_path / "parts" / "old.csv").write_text("old")
    record = read_json(tmp_path / "run.json")
    write_json(tmp_path / "run.json", {**record, "config": {"a": 2}, "status": "emptying"})
    with opened(tmp_path, config={"a": 2}, parts=("parts",)) as run:
        assert run.read("rows") == []
        assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_rows_and_parts_without_a_record_are_never_adopted(tmp_path, overwrite):
    (tmp_path / "answers.jsonl").write_text('{"row": 0}\n')
    with pytest.raises(UserError, match=r"answers\.jsonl and no run\.json"):
        opened(tmp_path, overwrite=overwrite)
    (tmp_path / "answers.jsonl").unlink()
    (tmp_path / "pos").mkdir()
    with pytest.raises(UserError, match=r"pos and no run\.json"):
        opened(tmp_path, overwrite=overwrite, parts=("pos",))
    assert (tmp_path / "pos").is_dir()


def test_a_file_that_is_no_record_is_named(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"command": "x"}))
    with pytest.raises(UserError, match="is no record of a run: it has no config"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({"a": [1.0, 2.0]}, {"a": [1.0, 2.0 + 1e-15]}, None),
        ({"a": [1.0, 2.0]}, {"a": [1.0, 2.1]}, "a[1]: 2.0, now 2.1"),
        ({"a": [1]}, {"a": [1, 2]}, "a: [1], now [1, 2]"),
        ({"a": {"b": None}}, {"a": {"b": 0}}, "a.b: None, now 0"),
        ({"a": {"b": 2}}, {"a": {"c": 2}}, "a.b: 2, now not set"),
        ({"m": "model"}, {"m": "./model/"}, "m: 'model', now './model/'" + SAME),
        ({"d": ["a/diff"]}, {"d": ["/b/diff"]}, "d[0]: 'a/diff', now '/b/diff'" + SAME),
        ({"d": "a/diff"}, {"d": "a/pos"}, "d: 'a/diff', now 'a/pos'"),
        ({"a": 1, "b": "x" * 99}, {"a": 1, "b": "y"}, f"b: '{'x' * 59}, now 'y'"),
    ],
)
def test_the_first_difference_of_two_records_is_named(old, new, found):
    assert first_difference(old, new) == found


def test_runs_are_the_same_where_their_folders_are(tmp_path):
    """Whoever holds the lock: it is no part of what a run is."""
    with opened(tmp_path / "one") as held:
        same, other = Run(tmp_path / "one"), Run(tmp_path / "two")
        assert held == same == pickle.loads(pickle.dumps(held))
        assert same != other
        assert len({held, same, other}) == 2
        assert repr(held) == repr(same)


def test_a_run_records_how_it_ended(tmp_path):
    run = opened(tmp_path / "run")
    with pytest.raises(KeyError), run:
        raise KeyError("lost")
    assert run.record["status"] == "failed"
    assert "lost" in run.record["error"]
    with run:
        assert not run.finished
    assert run.finished


def test_an_open_run_is_refused_to_others_and_names_its_process(tmp_path):
    with opened(tmp_path) as run:
        here = rf"in use by process {os.getpid()} on {platform.node()}"
        for overwrite in (False, True):
            with pytest.raises(UserError, match=here):
                opened(tmp_path, overwrite=overwrite)
        copy = pickle.loads(pickle.dumps(run))  # as it travels to the processes beside this one
        copy.append("rows", [{"row": 0}])
    assert not (tmp_path / ".lock").exists()
    kept = opened(tmp_path)
    with pytest.raises(UserError, match=here):
        opened(tmp_path)
    del kept  # one that was never entered is let go with the object
    opened(tmp_path)


def test_of_two_identical_runs_one_works_and_one_is_refused(tmp_path):
    """And what a killed one held is free: the kernel lets go of its lock."""
    words = [sys.executable, "-c", OPEN, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    pair = [subprocess.Popen(words, **pipes) for _ in range(2)]
    for process in pair:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.stdout.readline() for process in pair]
    assert sorted(line == "works\n" for line in said) == [False, True], said
    winner = pair[said.index("works\n")]
    assert f"in use by process {winner.pid} on" in next(line for line in said if line != "works\n")
    winner.kill()
    for process in pair:
        process.communicate()
    with opened(tmp_path / "run") as run:
        assert run.read("rows") == [{"row": 0}]
    assert sorted(path.name for path in run.folder.iterdir()) == ["rows.jsonl", "run.json"]
