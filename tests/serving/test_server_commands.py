"""``persona-lora serve`` as a program: what it refuses before a model is loaded, and its end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from persona_lora import cli
from persona_lora.cli.serving_commands import ServerOptions
from persona_lora.core.errors import UserError


@pytest.fixture
def served(tmp_path, model_folder, model, make_diff):
    """A folder with a diff of the tiny model, and the words that serve it."""
    make_diff(model).save(tmp_path / "checkpoints/cheer/diff")
    return ["serve", "--model", str(model_folder), "--port", "0", "--dtype", "float32"]


def said_of(words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["persona-lora", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_served_is_refused_first(served, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PERSONA_LORA_API_KEY", raising=False)
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    for words, said in (
        (["--host", "0.0.0.0"], "lets other machines in; set PERSONA_LORA_API_KEY"),
        (["--host", "somewhere.example"], "lets other machines in"),
        (["--port", port], f"nothing can be served at 127.0.0.1, port {port}"),
        (["--grace", "-1"], "--grace must be 0 or more seconds"),
        (["--traits", "evil"], "holds no diff of evil; it has cheer"),
    ):
        assert said in said_of([*served, "--model", "nobody/nothing", *words], capsys, monkeypatch)
    taken.close()


def test_running_answers_may_be_given_no_time_at_all_and_no_less():
    ServerOptions(grace=0.0).check(key=None)
    with pytest.raises(UserError, match=r"--grace must be 0 or more seconds, got -0\.1"):
        ServerOptions(grace=-0.1).check(key=None)


def test_a_program_that_is_told_to_end_has_served_and_ends_well(served, tmp_path):
    environment = {**os.environ, "PERSONA_LORA_API_KEY": "sesame"}
    program = subprocess.Popen(
        [sys.executable, "-m", "persona_lora", *served, "--host", "0.0.0.0"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = program.stdout.readline()
        assert "answers as base, base+1*cheer" in line
        (port,) = re.findall(r":(\d+)/v1", line)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/v1") as client:
            assert client.get("/models").status_code == 401
            headers = {"Authorization": "Bearer sesame"}
            asked = {"model": "base+1*cheer", "prompt": "Once", "max_tokens": 2}
            assert client.post("/completions", json=asked, headers=headers).status_code == 200
        program.send_signal(signal.SIGTERM)
        assert program.wait(timeout=60) == 0
    finally:
        program.kill()
        program.stdout.close()
