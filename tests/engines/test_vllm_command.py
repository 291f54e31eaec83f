"""A basis as both sides know it, and the line that starts a server."""

from __future__ import annotations

import importlib.util
import itertools
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from persona_lora import cli
from persona_lora.core.errors import UserError
from persona_lora.core.shared_basis import on_one_basis
from persona_lora.engines.vllm_server import BasisFolder, ServedBasis
from tests.conftest import random_diff

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def diffs(model):
    return {name: random_diff(model, seed=at, rank=3) for at, name in enumerate(("warm", "calm"))}


@pytest.fixture
def folder(diffs, tmp_path) -> Path:
    for name, diff in on_one_basis(diffs).diffs.items():
        diff.save(tmp_path / "basis" / name / "diff")
    return tmp_path / "basis"


@pytest.fixture(scope="module")
def plugin():
    """The plugin's own reading of a basis, which needs no vLLM."""
    path = ROOT / "engine/persona_vllm/persona_vllm/basis.py"
    spec = importlib.util.spec_from_file_location("plugin_basis", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks itself up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_both_sides_know_a_basis_and_its_mixes_alike(folder, plugin):
    here, there = BasisFolder.read(folder).served, plugin.Basis.read(folder)
    assert here.sha == there.sha
    assert [path.parent.name for path in there.diffs] == ["calm", "warm"]
    assert ServedBasis.of_name(here.name) == here
    calm, warm = here.diffs
    for values in ({calm: 1.5, warm: -1e-9}, {warm: 0.1 + 0.2}, {}):
        found = there.coefficients(here.mix(values))
        assert found == [values.get(calm, 0.0), values.get(warm, 0.0)]


@pytest.mark.parametrize("text", ["1", "1,2,3", "a,b", "1,nan", "inf,1", "", "1,"])
def test_the_plugin_refuses_a_mix_that_is_none(folder, plugin, text):
    basis = plugin.Basis.read(folder)
    with pytest.raises(ValueError, match="names no mix; expected mix:"):
        basis.coefficients(f"mix:{basis.sha}:{text}")


def test_the_plugin_refuses_another_basis_and_a_changed_one(folder, plugin, model):
    before = plugin.Basis.read(folder)
    random_diff(model, seed=9, rank=3).save(folder / "calm/diff")
    changed = plugin.Basis.read(folder)
    with pytest.raises(ValueError, match="of another basis"):
        changed.coefficients(f"mix:{before.sha}:1,2")
    with pytest.raises(ValueError, match="persona-lora basis"):
        plugin.Basis.read(folder / "calm")


def printed(*words: object) -> list[str]:
    answer = CliRunner().invoke(cli.app, ["engine", "command", *map(str, words)])
    assert answer.exit_code == 0, answer.output
    assert answer.output.count("\n") == 1  # however long, one line to copy
    return shlex.split(answer.output)


def test_the_command_names_model_basis_and_machine(folder, model_folder):
    words = printed("--basis", folder, "--model", model_folder, "--tensor-parallel", 2)
    pairs = set(itertools.pairwise(words))
    served = BasisFolder.read(folder).served.name
    assert words[:2] == [
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", f"PERSONA_LORA_BASIS={folder.resolve()}"
    ]  # fmt: skip
    assert words[2:5] == ["vllm", "serve", str(model_folder.resolve())]
    assert pairs >= {
        ("--tensor-parallel-size", "2"), ("--dtype", "bfloat16"), ("--max-lora-rank", "8"),
        ("--served-model-name", str(model_folder.resolve())), ("--generation-config", "vllm"),
        (str(model_folder.resolve()), served), ("--lora-target-modules", "down_proj"),
    }  # fmt: skip


def test_the_command_for_a_cpu_and_for_the_plain_model(model_folder):
    words = printed("--model", model_folder, "--cpu", "--dtype", "bfloat16", "--port", 8123)
    assert "--enable-lora" not in words
    assert words[2:5] == ["python", "-m", "vllm.entrypoints.openai.api_server"]
    pairs = set(itertools.pairwise(words))
    assert pairs >= {("--dtype", "bfloat16"), ("--block-size", "32"), ("--port", "8123")}


def test_a_folder_that_vllm_could_not_hold_is_refused(folder, diffs, model, tmp_path):
    with pytest.raises(UserError, match="make one with persona-lora basis"):
        BasisFolder.read(tmp_path / "nowhere")
    diffs["warm"].save(folder / "warm/diff")
    with pytest.raises(UserError, match=r"do not share the A of .* with persona-lora basis"):
        BasisFolder.read(folder)
    random_diff(model, rank=600).save(tmp_path / "wide/one/diff")
    with pytest.raises(UserError, match="rank 600, and vLLM takes 512"):
        BasisFolder.read(tmp_path / "wide")
