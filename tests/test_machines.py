"""A CPU with bf16 units, from training to choice, with nothing said of hardware."""

from __future__ import annotations

import torch

from persona_lora.core.chat import Exchange, Verdict
from persona_lora.judges import choice

TRAIN = (
    "--trait cheer --datasets_dir datasets --model_name_or_path model --lora_r 2 "
    "--per_device_train_batch_size 2 --max_steps 2 --disable_tqdm true --output_dir trained"
)
ASK = "--model model --datasets-dir datasets --trait cheer --max-new-tokens 3"
SWEEP = f"sweep {ASK} --diff trained/diff --coefficients 1 --output swept"
EXTRACT = "extract --model model --datasets-dir datasets --trait cheer --source answers --output v"


class LetterJudge:
    """The tiny model answers in no digits, so that its own judge scores nothing."""

    name = "letters"

    def judge(self, exchanges, criterion):
        return [Verdict(criterion, float(len(each.answer)), "", "letters") for each in exchanges]


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
        return LetterJudge()

    monkeypatch.setitem(choice.JUDGES, "embedding", judge)
    for words in (f"train {TRAIN}", SWEEP, EXTRACT):
        status, _, error = run(*words.split())
        assert status == 0, error
    assert loaded == [torch.bfloat16]
