"""A command's options as a file: written beside every run, read back, and described by a schema."""

from __future__ import annotations

import json

import pytest
import typer
import yaml
from trl import TrlParser

from persona_lora import cli
from persona_lora.cli.program import OPTIONS
from persona_lora.judges import choice
from persona_lora.training import contrastive, finetune
from tests.scenes import LetterJudge, commands


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").open()]


def test_a_sweep_is_given_again_by_its_config(run, make_world, no_drawing, tmp_path, monkeypatch):
    make_world(tmp_path)
    monkeypatch.setitem(choice.JUDGES, "embedding", lambda *_: LetterJudge())
    status, _, error = run(
        "sweep", "--trait", "cheer", "--diff", "diff", "--coefficients", "-1,1", "--model", "model",
        "--dtype", "float32", "--datasets-dir", "datasets", "--max-new-tokens", 3, "--seed", 7,
        "--temperature", 1, "--no-references", "--output", "out/first", "--overwrite",
    )  # fmt: skip
    assert status == 0, error
    first = tmp_path / "out" / "first"
    written = yaml.safe_load((first / "config.yaml").read_text())
    assert "overwrite" not in written
    assert (written["coefficients"], written["temperature"]) == (["-1,1"], 1.0)
    status, _, error = run("sweep", "--config", "out/first/config.yaml", "--output", "out/again")
    assert status == 0, error
    again = tmp_path / "out" / "again"
    for name in ("answers", "verdicts", "divergence"):
        assert rows(again, name) == rows(first, name)
    configs = [json.loads((each / "run.json").read_text())["config"] for each in (first, again)]
    assert configs[0] == configs[1]
    status, _, error = run("sweep", "--config", "out/first/config.yaml")  # nothing is left to do
    assert status == 0, error
    assert rows(first, "answers") == rows(again, "answers")


def test_a_config_hides_secrets_and_a_misspelt_key_is_named(run, make_world, tmp_path, monkeypatch):
    make_world(tmp_path)
    url = "http://me:secret@localhost:9/v1?key=hidden-too"
    monkeypatch.setitem(choice.JUDGES, "embedding", lambda *_: LetterJudge())
    status, _, error = run(
        "evaluate", "--trait", "cheer", "--datasets-dir", "datasets", "--model", "model",
        "--dtype", "float32", "--system-prompt", f"Read {url}", "--max-new-tokens", 3,
        "--output", "out/a.csv",
    )  # fmt: skip
    assert status == 0, error
    (tmp_path / "bad.yaml").write_text("trait: cheer\ncoefficient: 1\n")
    status, _, error = run("sweep", "--config", "bad.yaml")
    assert status == 2
    assert "no option 'coefficient'; did you mean 'coefficients'" in error
    texts = [path.read_text() for path in tmp_path.rglob("config.yaml")]
    assert texts
    assert not any("secret" in text or "hidden-too" in text for text in texts)


PROGRAM = dict(commands(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_a_schema_describes_every_option(name, run):
    status, out, error = run("schema", *name.split())
    assert status == 0, error
    properties = json.loads(out)["properties"]
    options = {each.name for each in PROGRAM[name].params} - {"config"}
    assert set(properties) == options
    assert all(each["description"] for key, each in properties.items() if key != "words")


@pytest.mark.parametrize(("name", "module"), [("train", contrastive), ("finetune", finetune)])
def test_the_schema_of_training_describes_what_its_parser_takes(name, module, run):
    status, out, error = run("schema", name)
    assert status == 0, error
    properties = json.loads(out)["properties"]
    parser = TrlParser(dataclass_types=module.GROUPS)
    assert set(properties) == {each.dest for each in parser._actions} - {"help"}
    assert properties["lora_r"] == {**properties["lora_r"], "type": "integer", "default": 16}
    assert all(each["description"] for each in properties.values())


def test_an_unknown_command_has_no_schema(run):
    status, _, error = run("schema", "sweeep")
    assert status == 2
    assert "did you mean 'sweep'" in error
