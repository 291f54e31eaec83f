"""What a run records of itself."""

from __future__ import annotations

import dataclasses
import json

import pytest
from accelerate import cpu_offload
from trl import SFTConfig

from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.models.load_options import LoadOptions
from persona_lora.training import runner
from persona_lora.training.runner import load_model, run_record
from tests.test_kills import COMMANDS
from tests.training.conftest import parse_arguments

LEFT = {  # by the commands that leave more than rows
    "train": ("pos/loss.jsonl", "neg/loss.jsonl", "diff/diff.json"),
    "finetune": ("adapter/adapter_config.json", "checkpoint-2/adapter_config.json"),
    "finetune in full": ("model/config.json",),
}
OTHERS = sorted({words.split()[0] for words in COMMANDS.values()}.union(LEFT))


def _record(*flags: str):
    return run_record(*parse_arguments(["--trait", "evil", *flags]), {"trait": "evil"})


def test_record_is_plain_json_and_holds_no_placeholder():
    record = _record("--lr_scheduler_type", "cosine")
    assert json.loads(json.dumps(record)) == record
    assert record["training"]["lr_scheduler_type"] == "cosine"
    assert record["training"]["learning_rate"] == 2e-4
    assert record["lora"]["lora_r"] == 16


def test_record_changes_with_what_changes_numbers_and_with_nothing_else():
    same = _record()
    for flags in (
        *(["--output_dir", "x"], ["--save_steps", "3"], ["--disable_tqdm", "true"]),
        *(["--activation_checkpointing", "true"], ["--torch_empty_cache_steps", "3"]),
    ):
        assert _record(*flags) == same
    for flags in (["--seed", "1"], ["--lora_r", "4"], ["--eos_token", "x"], ["--dtype", "float32"]):
        assert _record(*flags) != same


def test_weights_that_found_no_room_are_refused_before_a_step(model_folder, tmp_path, monkeypatch):
    config = SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    loaded = load_model(str(model_folder), LoadOptions(), config)
    offloaded = dataclasses.replace(loaded, model=cpu_offload(loaded.model))
    monkeypatch.setattr(runner, "load_chat_model", lambda *_, **__: offloaded)
    with pytest.raises(
        UserError,
        match=r"weights of .* found no room on the accelerator and were offloaded .*embed",
    ):
        load_model(str(model_folder), LoadOptions(), config)


@pytest.mark.parametrize("below", ["", "seed0"])
@pytest.mark.parametrize("asked", ["train", "finetune"])
def test_a_run_of_another_kind_is_never_trained_over(run, make_world, tmp_path, asked, below):
    make_world(tmp_path)
    words = [*COMMANDS[asked].split(), *(["--seeds", 2] if below else [])]
    for other in OTHERS:
        if other == asked:
            continue
        folder = tmp_path / other.replace(" ", "_")
        with Run.open(folder / below, command=other.split()[0], config={}, seed=0) as made:
            made.write("answers", [{"answer": "Yes."}])
        for name in LEFT.get(other, ()):
            (made.folder / name).parent.mkdir()
            (made.folder / name).write_text("{}")
        before = {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}
        status, _, said = run(*words, "--output_dir", folder)
        assert (status, "holds a run of another configuration" in said) == (2, True), (other, said)
        found = {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}
        assert found == before, other
