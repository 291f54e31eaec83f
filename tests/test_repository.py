"""What a stranger relies on: commands that exist, configurations that parse, a lean tree."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
DATA_FOLDERS = ("datasets", "personas", "train_configs", "checkpoints", "gallery")
CONFIGS = sorted((ROOT / "train_configs").glob("*.yaml"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def command_lines(text: str) -> list[str]:
    """Lines of shell blocks and of tables, continued lines joined, comments left out."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, flags=re.DOTALL)
    blocks += re.findall(r"^\|.*?\| `(persona-lora .*?)` \|", text, flags=re.MULTILINE)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and line[0] != "#"]


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def help_texts() -> dict[str, str]:
    """``--help`` of every command that the console script has, by its words."""

    def ask(*words: str) -> str:
        answer = subprocess.run(
            [sys.executable, "-m", "persona_lora", *words, "--help"],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={"PATH": "/usr/bin:/bin", "COLUMNS": "200", "TERM": "dumb", "HF_HUB_OFFLINE": "1"},
        )
        return answer.stdout

    commands = (
        *(
            "train",
            "finetune",
            "evaluate",
            "evaluate-checkpoints",
            "diagnose",
            "calibrate",
            "sweep",
            "tune-prompt",
            "paired",
            "report",
            "research-questions",
            *(
                "plan",
                "preregister",
                "benchmark",
                "predict-finetuning",
                "compare-prevention",
                "export",
                "basis",
                "push",
                "gallery",
                "gallery get",
                "gallery make",
                "demo",
                "engine",
                "engine command",
            ),
        ),
        *(
            "traits",
            "traits generate",
            "data",
            "data generate",
            "data check",
            "judge score",
            "judge rate",
            "judge fit",
            "data screen",
        ),
        *("persona", "persona build", "persona validate", "persona sheets", "persona ratings"),
        *("persona lamp",),
        *(
            "compare",
            "playground",
            "serve",
            "optimize",
            "compare-methods",
            "project",
            "project activations",
            "project weights",
        ),
        *("extract", "vectors", "vectors convert", "schema"),
        *("pack", "verify", "reproduce", "selfcheck"),
    )
    return {command: ask(*command.split()) for command in commands}


def test_there_is_no_python_in_data_folders():
    for folder in DATA_FOLDERS:
        assert list((ROOT / folder).rglob("*.py")) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_parses_and_begins_with_its_command(path):
    text = path.read_text()
    first = text.splitlines()[0]
    assert first.startswith("# ")
    commands = {"finetune": "persona-lora finetune", "optimize": "persona-lora optimize"}
    assert commands.get(path.name.split("_")[0], "train_lora.py") in first
    assert f"train_configs/{path.name}" in first
    assert isinstance(yaml.safe_load(text), dict)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documented_commands_exist(path, help_texts):
    for line in command_lines(path.read_text()):
        words = shlex.split(line, comments=True)
        words = words[next((i for i, word in enumerate(words) if "=" not in word), 0) :]
        for word in words:
            if re.fullmatch(r"(scripts|train_configs|benchmarks|tests)/[\w./-]+", word):
                assert (ROOT / word).exists(), f"{path.name}: {line}"
        if words and words[0] == "persona-lora":
            pair = " ".join(words[1:3])
            command = pair if pair in help_texts else words[1]
            assert command in help_texts, f"{path.name}: {line}"
            for flag in (word for word in words if word.startswith("--")):
                assert flag in help_texts[command], f"{path.name}: {flag} in {line}"


def benchmark_lines() -> list[list[str]]:
    """Words of what the pages and the benchmarks themselves say to run, from the script on."""
    said = []
    for path in DOCUMENTS:
        text = path.read_text()
        said += command_lines(text)
        said += re.findall(r"`(python benchmarks/[^\s`]+\s[^`]*)`", text)  # not its name alone
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        said += path.read_text().replace("\\\n", " ").splitlines()
    found = {line.partition("python ")[2] for line in said if "python benchmarks/" in line}
    return [shlex.split(line, comments=True) for line in sorted(found)]


@pytest.mark.parametrize("words", benchmark_lines(), ids=" ".join)
def test_a_benchmark_takes_what_it_is_said_to_take(words, monkeypatch):
    """Its own parser reads the line, and stops there."""
    read = argparse.ArgumentParser.parse_args

    def only_parsed(parser):
        read(parser)
        sys.exit(0)

    script, *given = words
    if "argparse" not in (ROOT / script).read_text():
        assert [each for each in given if each.startswith("-")] == []
        return
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parsed)
    monkeypatch.setattr(sys, "argv", [script, *given])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stopped.value.code == 0, " ".join(words)


def test_a_benchmark_beside_a_library_that_is_not_there_says_how_to_install_it(monkeypatch):
    script = "benchmarks/steering_library.py"
    monkeypatch.setitem(sys.modules, "steering_vectors", None)
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit, match="pip install --no-deps steering-vectors=="):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def test_every_command_shows_an_example(help_texts):
    page = (ROOT / "docs" / "commands.md").read_text()
    for command, text in help_texts.items():
        if command not in (
            "data",
            "engine",
            "gallery",
            "persona",
            "project",
            "traits",
            "vectors",
        ):  # groups of commands
            assert "Example" in text or "example" in text, command
            assert f"persona-lora {command} " in page or f"persona-lora {command}\n" in page, (
                command
            )


def test_help_answers_without_torch():
    code = (
        "import sys; sys.argv = ['persona-lora', '--help']\n"
        "from persona_lora.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


def test_no_paths_of_a_machine_and_no_secrets():
    forbidden = re.compile(
        r"/(?:root|home|work)/[\w.]+|sk-[A-Za-z0-9]{20}|hf_[A-Za-z0-9]{20}|https?://[\w.]*pypi"
    )
    for path in tracked():
        if path.suffix in {".png", ".safetensors"} or path == Path(__file__):
            continue
        found = forbidden.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path}: {found and found.group()}"


def test_the_gate_is_the_test_command():
    assert "bash scripts/test.sh" in (ROOT / ".ci" / "run").read_text()
    assert "bash scripts/test.sh" in (ROOT / "README.md").read_text()


def test_the_lock_holds_every_requirement_in_its_range_and_by_hash():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = (ROOT / "requirements.lock").read_text().replace(" \\\n", " ").splitlines()
    locked: dict[str, list[str]] = {}
    for row in (row for row in rows if not row.startswith("#")):
        name, version = re.match(r"([\w.-]+)==(\S+)", row).groups()
        locked.setdefault(canonicalize_name(name), []).append(version)
        assert "--hash=sha256:" in row, row
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, wanted):
        versions = locked.get(canonicalize_name(requirement.name), [])
        if requirement.name == "torch":
            versions = re.findall(r"torch==([\d.]+)", (ROOT / "scripts" / "setup.sh").read_text())
        assert versions, f"{requirement} is not locked: bash scripts/lock.sh"
        assert all(version in requirement.specifier for version in versions), requirement
    assert not {name for name in locked if name.startswith(("torch", "nvidia-", "triton"))}


def test_no_script_launches_through_what_adds_a_traceback_to_a_mistake():
    for script in (ROOT / "scripts").glob("*.sh"):
        assert "accelerate launch" not in script.read_text(), script.name


def test_nothing_is_written_over_a_page_of_the_documentation_unasked():
    """Not by a script, nor by the default of an option: pages are written on by hand."""
    scripts = [*(ROOT / "scripts").glob("*.sh"), ROOT / "tests/pinned/defaults.json"]
    for script in scripts:
        assert not re.search(r'(page=|-output"?:? "?)docs/', script.read_text()), script.name


def test_public_names_resolve():
    import persona_lora

    for name in persona_lora.__all__:
        assert getattr(persona_lora, name) is not None
    with pytest.raises(AttributeError):
        _ = persona_lora.no_such_name
