"""How commands end: one line, and 0, 1, 2, 130 or 143."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import typer

from persona_lora import cli
from persona_lora.cli.program import ending_of
from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.models.loading import packaged_model_folder

WAITING = """
import shutil
import signal
import time
from pathlib import Path
from persona_lora import cli
from persona_lora.core.runs import Run
from persona_lora.models.loading import packaged_model_folder

@cli.app.command()
def wait(folder: Path) -> None:
    with Run.open(folder, command="wait", config={}, seed=0):
        print("up", flush=True)
        time.sleep(600)

# A shell starts what it puts into the background deaf to Ctrl-C, and all below it are so too.
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.main()
"""


def raising(error):
    def fail(**_):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("a mistake\nover two lines"), 2, ["a mistake over two lines"]),
        (OSError(errno.ENOSPC, "No space left on device"), 2, ["disk is full", "go on"]),
        (
            RuntimeError("[x.cc] PytorchStreamWriter failed writing file data/0"),
            2,
            ["disk is full"],
        ),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, ["a/b: Permission denied"]),
        (ValueError("of two\nlines"), 1, ["unexpected ValueError: of two lines", "--verbose"]),
        (AssertionError(), 1, ["unexpected AssertionError", "--verbose"]),
        (RecursionError("too deep"), 1, ["RecursionError"]),
        (MemoryError(), 2, ["memory ran out (MemoryError)"]),
        (KeyboardInterrupt(), 130, ["interrupted", "the same command again to go on"]),
        (typer.Abort(), 130, ["interrupted"]),
        (SystemExit(143), 143, ["terminated", "the same command again to go on"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_whatever_ends_a_command_is_one_line(run, monkeypatch, error, status, words):
    alone = BaseExceptionGroup("tasks", [error])
    grouped = [] if isinstance(error, typer.Abort) else [alone, BaseExceptionGroup("all", [alone])]
    for each in (error, *grouped):
        monkeypatch.setattr("persona_lora.cli.program.app", raising(each))
        found, _, said = run("sweep")
        assert found == status
        assert len(said.splitlines()) == 1, said
        assert said.startswith("error: ")
        assert all(word in said for word in words), said


def test_a_mistake_hides_no_fault_beside_it(run, monkeypatch):
    both = ExceptionGroup("tasks", [UserError("no such trait"), ValueError("of ours")])
    monkeypatch.setattr("persona_lora.cli.program.app", raising(both))
    status, _, said = run("sweep")
    assert (status, "unexpected ValueError: of ours" in said) == (1, True), said


@pytest.mark.parametrize(
    ("around", "shown"), [("{} >&-", False), ("{} 2>&-", True), ("PYTHONIOENCODING=ascii {}", True)]
)
def test_a_page_is_shown_whatever_the_streams_are(around, shown):
    page = f"{sys.executable} -c 'from persona_lora.cli import main; main()' sweep --help"
    ended = subprocess.run(around.format(page), shell=True, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ("--coefficients" in ended.stdout) == shown


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", r"-1 to 2-3 ... \xe9-"), ("cp1252", "é-")]
)
def test_a_sign_that_an_encoding_has_not_stays_a_sign(encoding, shown):
    said = (
        "from persona_lora.cli.program import call_to_end; call_to_end(lambda: print({!r}), False)"
    )
    told = said.format("\N{MINUS SIGN}1 to 2\N{EN DASH}3 \N{HORIZONTAL ELLIPSIS} é\N{MINUS SIGN}")
    environ = {**os.environ, "PYTHONIOENCODING": encoding}
    ended = subprocess.run([sys.executable, "-c", told], env=environ, capture_output=True)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert shown in ended.stdout.decode(encoding)


@pytest.mark.parametrize("page", ["schema sweep", "engine command --model modèle"])
def test_what_a_program_reads_is_whole_or_refused(page, tmp_path):
    shutil.copytree(packaged_model_folder(), tmp_path / "modèle")
    words = [sys.executable, "-c", "from persona_lora.cli import main; main()", *page.split()]
    for encoding, status in (("ascii", 2), ("utf-8", 0)):
        environ = {**os.environ, "PYTHONIOENCODING": encoding}
        ended = subprocess.run(words, env=environ, cwd=tmp_path, capture_output=True)
        assert (ended.returncode, bool(ended.stdout)) == (status, status == 0), ended.stderr
        assert (b"set PYTHONIOENCODING=utf-8" in ended.stderr) == (status == 2)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (("--seed", "1:01"), "'1:01'"),
        (("--max-questions", "1.5"), "'1.5'"),
        (("--judge-mode", "guess"), "'guess'"),
    ],
)
def test_a_mistyped_value_is_named(capfd, monkeypatch, words, value):
    monkeypatch.setattr("sys.argv", ["persona-lora", "sweep", "--trait", "evil", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert (caught.value.code, f"got {value}" in capfd.readouterr().err) == (2, True)


def test_a_full_disk_behind_another_error_is_named():
    error = ValueError("cannot save")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert ending_of(error).status == 2


@pytest.mark.parametrize("status", [0, 3])
def test_a_status_that_a_command_sets_passes_through(run, monkeypatch, status):
    monkeypatch.setattr("persona_lora.cli.program.app", lambda **_: status)
    assert run("sweep")[0] == status


@pytest.mark.parametrize(
    ("ending", "status", "said"),
    [
        (typer.Exit(7), 7, ""),
        (typer.Exit(0), 0, ""),
        (typer.Abort(), 130, "error: interrupted; run the same command again to go on"),
        (130, 130, "error: interrupted; run the same command again to go on"),
        (129, 129, ""),
        (131, 131, ""),
        (True, 1, ""),
        ("what a command returned", 0, ""),
    ],
)
def test_how_a_command_ends_is_the_status_of_the_program(run, monkeypatch, ending, status, said):
    def app(**_):
        if isinstance(ending, BaseException):
            raise ending
        return ending

    monkeypatch.setattr("persona_lora.cli.program.app", app)
    found, _, told = run("sweep")
    assert (found, told.strip()) == (status, said)


def test_a_mistake_of_several_processes_is_said_once(run, monkeypatch):
    monkeypatch.setattr("persona_lora.cli.program.app", raising(UserError("no such trait")))
    monkeypatch.setenv("RANK", "1")
    assert run("sweep")[::2] == (2, "")
    monkeypatch.setattr("persona_lora.cli.program.app", raising(ValueError("only here")))
    assert "only here" in run("sweep")[2]


def test_verbose_shows_the_traceback(run, monkeypatch):
    def fail(_name):
        raise ValueError("deep down")

    def mistaken(_name):
        raise UserError("none there")

    monkeypatch.setattr("persona_lora.core.traits.load_trait", fail)
    monkeypatch.setattr("persona_lora.cli.data_commands.list_traits", fail)
    plain = run("data", "check")
    assert plain[0] == 1
    assert "Traceback" not in plain[2]
    status, _, said = run("--verbose", "data", "check")
    assert status == 1
    assert "Traceback" in said
    assert "deep down" in said.splitlines()[-1]
    monkeypatch.setattr("persona_lora.cli.data_commands.list_traits", mistaken)
    status, _, said = run("--verbose", "data", "check")
    assert status == 2
    assert "Traceback" not in said


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_with_its_status_and_how_to_go_on(tmp_path, sent, status):
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    process = subprocess.Popen(
        [sys.executable, str(script), "wait", str(tmp_path / "run")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "up\n"
    process.send_signal(sent)
    _, said = process.communicate()
    assert process.returncode == status, said
    assert said.splitlines()[-1].endswith("run the same command again to go on")
    assert "Traceback" not in said
    assert Run(tmp_path / "run").record["status"] == "failed"
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
)
def test_memory_that_ran_out_is_said_with_what_takes_less(error):
    found = ending_of(error)
    assert found.status == 2
    assert "memory ran out" in found.message
    assert "per_device_train_batch_size" in found.message
    assert "GPU 0" not in found.message
