"""What can be known from files and options is refused before any weights are loaded."""

from __future__ import annotations

import dataclasses
import json

import pytest

from persona_lora.models import loading
from tests.conftest import random_diff, tiny_llama

ASKED = ("--model", "model", "--datasets-dir", "datasets")
CHEER = ("--trait", "cheer", *ASKED)
PERSON = ("--persona-id", "episode-000101_B", "--model", "model")


@pytest.fixture
def world(run, make_world, tmp_path, monkeypatch):
    """The command line in a folder of all that commands read, where nothing may be loaded."""
    make_world(tmp_path)
    for step in (2, 4):
        diff = dataclasses.replace(random_diff(tiny_llama(), seed=step), trait="cheer")
        diff.save(tmp_path / f"checkpoints/{step}/diff")

    def fail(*_):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(loading, "_load_weights", fail)
    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("extract", *CHEER, "--layers", "7"), "--layers '7' is out of range; the model has"),
        (("extract", *CHEER, "--positions", "middle"), "position must be of"),
        (("extract", *CHEER, "--methods", "median"), "method must be of"),
        (("optimize", *PERSON, "--method", "svd", "--layers", "7"), "--layers '7' is out of range"),
        (("compare-methods", *PERSON, "--layers", "7"), "--layers '7' is out of range"),
        (("optimize", *PERSON, "--max-new-tokens", "2048"), "in the 2048 positions of model"),
        (("evaluate", *CHEER, "--output", "a.csv", "--max-new-tokens", "4000"), "ask for fewer"),
        (("optimize", *PERSON, "--judge", "reader"), "no persona judge 'reader'; known: embed"),
        (("compare-methods", *PERSON, "--judge", "rules"), "no persona judge 'rules'"),
        (("optimize", "--targets", "evil=0", "--judge", "letters"), "no judge 'letters'"),
        (("optimize", *PERSON, "--method", "lore"), "no method 'lore'; did you mean 'lora'"),
        (("compare-methods", *PERSON, "--methods", "lore"), "no method 'lore'"),
        (("optimize", "--persona-id", "nobody"), "nobody"),
        (("compare-methods", "--persona-id", "nobody"), "nobody"),
        (
            ("predict-finetuning", "--finetunes", "tuned/checkpoint-2,tuned/checkpoint-4")
            + ("--traits", "cheer", "--diffs", "diff", *ASKED),
            "2 finetunes are too few to correlate; give at least 4",
        ),
        (
            ("predict-finetuning", "--finetunes")
            + (",".join(f"tuned/checkpoint-{step}" for step in (2, 4, 6, 8)),)
            + ("--traits", "evil", "--diffs", "diff", "--model", "model"),
            "none of cheer is a direction of evil",
        ),
    ],
)
def test_bad_values_cost_no_weights(world, words, message):
    status, _, error = world(*words)
    assert status == 2, error
    assert message in error


def folder_of(tmp_path, name: str, command: str, **options) -> None:
    """Write a run as one of an earlier call would lie there."""
    folder = tmp_path / name
    folder.mkdir(parents=True)
    record = {"command": command, "config": {}, "seed": 0, "status": "finished"}
    (folder / "run.json").write_text(json.dumps(record))
    lines = "".join(f"{each}: {value}\n" for each, value in options.items())
    (folder / "config.yaml").write_text(f"# persona-lora {command} --config config.yaml\n{lines}")


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (("evaluate", *CHEER, "--output", "out/a.csv"), "out/a"),
        (("sweep", *CHEER, "--diff", "diff", "--output", "out/a"), "out/a"),
        (("extract", *CHEER, "--output", "out/a"), "out/a"),
        (("tune-prompt", *CHEER, "--output", "out/a"), "out/a"),
        (
            ("compare", *CHEER, "--diff", "diff", "--activation-vector", "vector.safetensors")
            + ("--output", "out/a"),
            "out/a",
        ),
        (("benchmark", "--model", "model", "--diff", "diff", "--output", "out/a"), "out/a"),
        (("evaluate-checkpoints", "tuned", "--traits", "cheer", *ASKED, "--output", "out/a"),)
        + ("out/a",),
        (("diagnose", "tuned/checkpoint-2", "--base", "model", "--diffs", "diff"),) + ("out/a",),
        (("optimize", *PERSON, "--save-dir", "out"), "out/episode-000101_B_lora"),
        (
            ("compare-prevention", *CHEER, "--finetunes", "plain=tuned/checkpoint-2")
            + ("--rows", "datasets/cheer/normal.jsonl", "--output", "out/a"),
            "out/a",
        ),
    ],
)
def test_a_folder_of_another_run_costs_no_weights(world, tmp_path, words, folder):
    own = ("--output", "out/a") if words[0] == "diagnose" else ()
    folder_of(tmp_path, folder, "selfcheck", model="model")
    status, _, error = world(*words, *own)
    assert status == 2, error
    assert f"{folder} holds a run of another configuration (command: 'selfcheck', now" in error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"trait": "evil"}, "trait: 'evil', now 'cheer'"),
        ({"model": "other"}, "model: 'other', now 'model'"),
        ({"max_new_tokens": 7}, "max_new_tokens: 7, now 80"),
        ({"seed": 7}, "seed: 7, now 0"),
        ({"max_questions": 7}, "max_questions: 7, now 2"),
        ({"trait": "datasets/cheer", "batch_size": "7", "model": "model"}, None),
    ],
)
def test_what_decides_of_a_run_is_read_from_its_options(world, tmp_path, options, said):
    folder_of(tmp_path, "out/a", "evaluate", **options)
    words = ("evaluate", *CHEER, "--max-questions", "2", "--output", "out/a.csv")
    status, _, error = world(*words)
    if said is None:  # it may go on: what else differs is said when the run is opened
        assert "the weights were loaded" in error
        return
    assert status == 2
    assert f"out/a holds a run of another configuration ({said})" in error
    assert "the weights were loaded" in world(*words, "--overwrite")[2]
