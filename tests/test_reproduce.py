"""``scripts/reproduce.sh`` runs what ``docs/results.md`` says; commands are only noted here."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from persona_lora import cli
from persona_lora.training import contrastive, finetune
from persona_lora.training.arguments import parse_groups
from tests.scenes import commands

ROOT = Path(__file__).resolve().parents[1]
SECOND = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
PARTS = ["1", "1b", "2", "2b", "3", "3b", "4", "4b", "5", "5b"]
NOTED = """#!/bin/bash
[ "$1" != - ] || exec {python} "$@"
line=$(printf '%q ' {name} "$@")
echo "$line" >>"$NOTED"
"""
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "results.md").read_text(), re.S)


@pytest.fixture
def call(tmp_path):
    """Run a shell text in a checkout; return the commands, which are only noted, and the end."""
    (tmp_path / "scripts").mkdir()
    for script in (ROOT / "scripts").glob("*.sh"):
        (tmp_path / "scripts" / script.name).write_text(script.read_text())
    (tmp_path / "scripts" / "setup.sh").write_text("")
    for name in ("datasets", "docs", "train_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    bin = tmp_path / ".venv" / "bin"
    bin.mkdir(parents=True)
    for name in ("persona-lora", "python"):
        (bin / name).write_text(NOTED.format(python=sys.executable, name=name))
        (bin / name).chmod(0o755)
    (tmp_path / SECOND).touch()

    def run(text, **given):
        noted = tmp_path / "noted"
        noted.write_text("")
        path = f"{bin}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=tmp_path,
            env={"PATH": path, "NOTED": str(noted), **given},
            capture_output=True,
            text=True,
        )
        return [shlex.split(line) for line in noted.read_text().splitlines()], done

    return run


def alike(words):
    """What a command does, whatever the order of its options."""
    return tuple(sorted(words))


def test_every_command_of_the_page_has_its_part(call):
    noted, done = call("bash scripts/reproduce.sh", SECOND_MODEL=SECOND)
    assert done.returncode == 0, done.stderr
    made = set(map(alike, noted))
    asked = 0
    for block in BLOCKS:
        lines = [line for line in block.splitlines() if "reproduce.sh" not in line]
        said, done = call("\n".join(line for line in lines if "python benchmarks/" not in line))
        assert done.returncode == 0, (block, done.stderr)
        missing = [words for words in said if alike(words) not in made]
        assert not missing, shlex.join(missing[0])
        asked += sum(SECOND in words for words in said)
    assert asked > 50  # trainings, finetunes and questions of the second model


def test_the_page_names_the_part_of_each_command_of_the_second_model():
    for block in BLOCKS:
        if SECOND in block:
            assert re.search(r"reproduce\.sh \db$|part \db:$", block, re.M), block


def test_without_its_file_the_parts_of_the_second_model_say_how_they_are_made(call):
    noted, done = call("bash scripts/reproduce.sh")
    assert done.returncode == 0, done.stderr
    assert not [words for words in noted if SECOND in words or "0.5b" in shlex.join(words)]
    left = [line for line in done.stdout.splitlines() if "left out" in line]
    assert [line.split()[1].rstrip(":") for line in left] == ["1b", "2b", "3b", "4b", "5b"]
    assert all("SECOND_MODEL=FILE.gguf" in line for line in left)


@pytest.mark.parametrize(
    ("text", "given", "words"),
    [
        ("6", {}, "no part 6"),
        ("1 6b", {}, "no part 6b"),
        ("1b", {"SECOND_MODEL": "nowhere.gguf"}, "nowhere.gguf"),
        ("1b 4b", {}, "nothing is left to do without SECOND_MODEL"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_done(call, text, given, words):
    noted, done = call(f"bash scripts/reproduce.sh {text}", **given)
    assert (noted, done.returncode) == ([], 2)
    assert done.stderr.startswith("error: ")
    assert words in done.stderr


@pytest.mark.parametrize("part", PARTS)
def test_a_part_alone_is_in_the_plan_and_does_something(call, part):
    noted, done = call(f"bash scripts/reproduce.sh {part}", SECOND_MODEL=SECOND)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [f"part {part}"]
    of_second = [words for words in noted if SECOND in words]
    assert bool(of_second) == part.endswith("b")
    assert noted


@pytest.mark.parametrize("quick", [True, False])
def test_what_is_run_parses(call, quick, monkeypatch):
    """Every command, by its own parser; nothing is run."""
    text = "bash scripts/reproduce.sh" + " --quick" * quick
    noted, done = call(text, SECOND_MODEL=SECOND)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(ROOT)
    known = dict(commands(typer.main.get_command(cli.app)))
    for program, *words in {tuple(each) for each in noted}:
        name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in known), "")
        if name == "train" or words[0] == "train_lora.py":
            parse_groups(words[1:], contrastive.GROUPS, contrastive.PAGE)
        elif name == "finetune":
            parse_groups(words[1:], finetune.GROUPS, finetune.PAGE)
        elif program == "persona-lora":
            assert name, words
            known[name].make_context(name, words[len(name.split()) :])


def test_quick_goes_through_the_commands_of_both_models(call):
    """All that is run in full, but for other traits, and what the ready diffs stand for."""
    full, _ = call("bash scripts/reproduce.sh", SECOND_MODEL=SECOND)
    quick, done = call("bash scripts/reproduce.sh --quick")
    assert done.returncode == 0, done.stderr
    named = [{words[1] for words in noted} for noted in (full, quick)]
    assert named[0] <= named[1]
    assert not [words for words in quick if SECOND in words or "--protocol" in words]
    outputs = {words[words.index("--output") + 1] for words in quick if "compare" in words[1]}
    assert {f"results_quick_second/{name}" for name in ("latency", "personas", "spaces")} <= outputs
    assert not [each for each in outputs if not each.startswith("results_quick")]
