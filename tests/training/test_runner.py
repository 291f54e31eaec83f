"""What a run records of itself."""

from __future__ import annotations

import dataclasses
import json

import pytest
from accelerate import cpu_offload
from trl import SFTConfig

from persona_lora.core.errors import UserError
from persona_lora.models.load_options import LoadOptions
from persona_lora.training import runner
from persona_lora.training.runner import load_model, run_record
from tests.training.conftest import parse_arguments


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
