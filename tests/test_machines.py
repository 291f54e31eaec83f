"""A CPU with bf16 units, from training to choice, with nothing said of hardware."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch

from persona_lora.core.chat import Exchange
from persona_lora.judges import choice
from tests.scenes import LengthJudge

TRAIN = (
    "--trait cheer --datasets_dir datasets --model_name_or_path model --lora_r 2 "
    "--per_device_train_batch_size 2 --max_steps 2 --disable_tqdm true --output_dir trained"
)
ASK = "--model model --datasets-dir datasets --trait cheer --max-new-tokens 3"
SWEEP = f"sweep {ASK} --diff trained/diff --coefficients 1 --output swept"
EXTRACT = "extract --model model --datasets-dir datasets --trait cheer --source answers --output v"


def test_training_sweeps_judges_and_vectors_run_on_a_cpu_with_bf16_units(
    run, make_world, tmp_path, monkeypatch, simulate_machine
):
    simulate_machine("cpu with avx512_bf16")
    make_world(tmp_path)
    loaded: list[torch.dtype] = []
    local = choice.JUDGES["local"]

    def judge(trait, reference, options):
        loaded.append(reference.model.dtype)
        (verdict,) = local(trait, reference, options).judge([Exchange("?", "Yes")], "cheer")
        assert "number mass" in verdict.reason
        return LengthJudge()

    monkeypatch.setitem(choice.JUDGES, "embedding", judge)
    for words in (f"train {TRAIN}", SWEEP, EXTRACT):
        status, _, error = run(*words.split())
        assert status == 0, error
    assert loaded == [torch.bfloat16]


def test_the_benchmark_of_a_gpu_is_ready_to_run(tmp_path):
    root = Path(__file__).parents[1]
    output = tmp_path / "gpu.json"
    found_first = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", root / "benchmarks/gpu.sh", "--dry-run", "--output", output],
        env=os.environ | {"PATH": found_first},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(output.read_text())["tiny"]
    assert all(math.isfinite(each) for each in found.values())
    for part in ("decoding", "projection", "training", "live", "set_scale loop"):
        assert any(name.startswith(part) for name in found)
