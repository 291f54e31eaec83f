"""Real vLLM servers on the CPU, with the plugin: bash scripts/test_engine.sh starts this."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from persona_lora.core.chat import user_question
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.options import GenerationOptions
from persona_lora.core.shared_basis import on_one_basis
from persona_lora.engines import remote
from persona_lora.engines.remote import open_engine
from persona_lora.engines.vllm_server import BasisFolder, Machine, server_command
from persona_lora.models.generation import RowPlan
from persona_lora.models.loading import ChatModel, load_chat_model
from persona_lora.models.structure import weight_fingerprint
from persona_lora.steering.live import LiveLoRA
from tests.conftest import byte_tokenizer, random_diff

VENV = os.environ.get("ENGINE_VENV")
pytestmark = pytest.mark.skipif(VENV is None, reason="needs vLLM: bash scripts/test_engine.sh")
STARTING = 900  # seconds; a few on a quiet machine
OPTIONS = GenerationOptions(max_new_tokens=12)
QUESTIONS = ("Who are you?", "Is it far?", "Why?", "What shall I say to him tomorrow?")


@dataclass
class Scene:
    """A tiny model, the diffs of a basis, their folder, and running servers of both."""

    chat_model: ChatModel
    folder: Path
    model: Path
    diffs: list[LoRADiff]
    running: dict[str, subprocess.Popen[bytes]]

    def start(self, name: str, *more: str) -> str:
        """Start a server by the line that the command prints, with less for a tiny model."""
        port = free_port()
        basis = BasisFolder.read(self.folder)
        machine = Machine(cpu=True, port=port)
        line = shlex.split(server_command(str(self.model), None, basis, machine))
        at = line.index("python")
        line[line.index("--max-loras") + 1] = "3"  # fewer slots than there will be mixes
        line[line.index("--max-cpu-loras") + 1] = "5"
        settings = dict(each.split("=", 1) for each in line[:at])
        small = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        quiet = {"VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": ""}
        words = [f"{VENV}/bin/python", *line[at + 1 :], "--enforce-eager", "--max-num-seqs", "16"]
        words += more
        environment = {**os.environ, **settings, **small, **quiet}
        with (self.model.parent / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                words, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        url = f"http://127.0.0.1:{port}"
        self.running[url] = process
        return url

    def wait(self, url: str, name: str) -> None:
        """Wait until a server answers."""
        began = time.monotonic()
        while time.monotonic() - began < STARTING:
            if self.running[url].poll() is not None:
                break
            try:
                if httpx.get(f"{url}/health", timeout=5, trust_env=False).is_success:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(1)
        pytest.fail((self.model.parent / f"{name}.log").read_text()[-4000:])

    def end(self, url: str) -> None:
        process = self.running.pop(url)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def vllm_llama() -> LlamaForCausalLM:
    """A random Llama of two layers whose heads are of a size that vLLM has on a CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer()),
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("engine")
    model = vllm_llama()
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    print_of = weight_fingerprint(model)
    made = {
        name: random_diff(model, seed=seed, rank=3, scale=0.1, fingerprint=print_of)
        for seed, name in enumerate(("calm", "evil", "warm"))
    }
    held = on_one_basis(made).diffs
    for name, diff in held.items():
        diff.save(folder / "basis" / name / "diff")
    diffs = [LoRADiff.load(folder / "basis" / name / "diff") for name in sorted(held)]
    chat_model = load_chat_model(str(folder / "model"), dtype="float32")
    found = Scene(chat_model, folder / "basis", folder / "model", diffs, {})
    try:
        yield found
    finally:
        for url in [*found.running]:
            found.end(url)


@pytest.fixture(scope="module")
def urls(scene) -> list[str]:
    """Two servers, started side by side."""
    names = {scene.start(name): name for name in ("first", "second")}
    for url, name in names.items():
        scene.wait(url, name)
    return list(names)


def local_answers(scene: Scene, rows: list[dict[LoRADiff, float]], options=OPTIONS):
    """What live LoRA here answers to one question after the other, a row each."""
    matrix = [[row.get(diff, 0.0) for diff in scene.diffs] for row in rows]
    steerer = LiveLoRA(scene.chat_model.model, scene.diffs, matrix)
    conversations = asked(len(rows))
    with steerer:
        plan = RowPlan(streams=list(range(len(rows))))
        return steerer.answers(scene.chat_model, conversations, range(len(rows)), options, plan)


def asked(number: int):
    return [user_question(QUESTIONS[at % len(QUESTIONS)]) for at in range(number)]


def remote_answers(scene: Scene, urls, rows, options=OPTIONS, on_batch=None):
    engine = open_engine(urls, scene.chat_model, scene.diffs)
    plan = RowPlan(streams=list(range(len(rows))), on_batch=on_batch)
    numbers = range(len(rows))
    return engine.steerer(rows).answers(scene.chat_model, asked(len(rows)), numbers, options, plan)


def mixes(scene: Scene, number: int) -> list[dict[LoRADiff, float]]:
    """Different mixes, every third row without any."""
    values = list(itertools.product((-1.5, 0.5, 1.0, 2.0), repeat=3))[:number]
    return [
        dict(zip(scene.diffs, each, strict=True)) if at % 3 else {}
        for at, each in enumerate(values)
    ]


def test_mixes_and_base_rows_are_answered_as_live_lora_answers_them(scene, urls):
    """More mixes than slots, base rows among them, and a diff alone."""
    rows = [*mixes(scene, 30), {scene.diffs[1]: 1.0}]
    found = remote_answers(scene, urls[:1], rows)
    assert found == local_answers(scene, rows)
    assert len({each.text for each in found}) > len(QUESTIONS)  # mixes do steer


def test_sampled_rows_do_not_depend_on_their_neighbours(scene, urls):
    options = GenerationOptions(max_new_tokens=12, temperature=1.0, seed=3)
    rows = mixes(scene, 12)
    together = remote_answers(scene, urls, rows, options)
    assert remote_answers(scene, urls[:1], rows[:4], options) == together[:4]


def test_a_bad_mix_is_refused_and_a_good_one_is_answered_after_it(scene, urls):
    url = urls[0]
    sha = BasisFolder.read(scene.folder).served.sha

    def status(model: str) -> int:
        body = {"model": model, "prompt": [40, 41], "max_tokens": 1}
        path = f"{url}/v1/completions"
        return httpx.post(path, json=body, timeout=60, trust_env=False).status_code

    bad = ["1,2", "1,2,3,4", "1,nan,2", "a,b,c", "1,inf,2", ""]
    assert [status(f"mix:{sha}:{each}") for each in bad] == [400] * len(bad)
    assert status(f"mix:{sha[::-1]}:1,2,3") == 400
    rows = mixes(scene, 6)
    assert remote_answers(scene, [url], rows) == local_answers(scene, rows)


def test_a_server_without_the_basis_or_of_another_model_is_refused(scene, urls):
    other = ChatModel(vllm_llama(), scene.chat_model.tokenizer, "another")
    other.model.model.layers[0].mlp.up_proj.weight.data *= 1.3
    with pytest.raises(UserError, match="serves another model"):
        open_engine(urls[:1], other, [])
    with pytest.raises(UserError, match="does not hold the diffs"):
        open_engine(urls[:1], scene.chat_model, [scene.diffs[0] * 2.0])


def test_rows_of_a_killed_server_are_answered_by_the_other(scene, urls, monkeypatch):
    monkeypatch.setattr(remote, "IN_FLIGHT", 4)
    left, doomed = urls
    rows = mixes(scene, 60)
    seen: list[int] = []

    def kill(numbers, answers) -> None:
        seen.extend(numbers)
        if doomed in scene.running and len(seen) > 6:
            scene.end(doomed)

    found = remote_answers(scene, [doomed, left], rows, on_batch=kill)
    assert doomed not in scene.running
    assert sorted(seen) == list(range(len(rows)))
    assert found == local_answers(scene, rows)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("tensor", ("--tensor-parallel-size", "2")),
        ("data", ("--data-parallel-size", "2", "--api-server-count", "1")),
    ],
)
def test_several_processes_of_one_server_answer_alike(scene, name, more):
    """A bad mix first: under tensor parallelism vLLM's own adapters fail after a failed one."""
    url = scene.start(name, *more)
    try:
        scene.wait(url, name)
        sha = BasisFolder.read(scene.folder).served.sha
        body = {"model": f"mix:{sha}:1,2", "prompt": [40, 41], "max_tokens": 1}
        path = f"{url}/v1/completions"
        assert httpx.post(path, json=body, timeout=60, trust_env=False).status_code == 400
        rows = mixes(scene, 12)
        assert remote_answers(scene, [url], rows) == local_answers(scene, rows)
    finally:
        scene.end(url)
