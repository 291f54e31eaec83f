"""What a run records of itself."""

from __future__ import annotations

import json

from persona_lora.training.runner import run_record
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
