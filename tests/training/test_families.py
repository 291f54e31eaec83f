"""A whole run on models of another build than Llama's: trained, written, opened, put to use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from persona_lora.core.lora_diff import LoRADiff
from persona_lora.models.loading import load_chat_model
from persona_lora.steering.weights import LoRASteerer
from persona_lora.training.contrastive import train_contrastive
from tests.conftest import byte_tokenizer
from tests.models.architectures import tiny_model
from tests.training.conftest import parse_arguments


@pytest.mark.parametrize("family", ["Gemma 3", "Qwen2.5-VL", "GPT-2", "Qwen3-MoE"])
def test_a_trained_difference_fits_the_model_that_it_was_trained_on(
    run_arguments: Callable[..., list[str]], tmp_path: Path, family: str
):
    base = tmp_path / "base"
    tiny_model(family).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    arguments = run_arguments(tmp_path / "run", "--model_name_or_path", str(base))
    arguments += ["--max_steps", "2", "--save_strategy", "no"]
    result = train_contrastive(*parse_arguments(arguments))
    model = load_chat_model(str(base), dtype="float32").model
    tokens = torch.arange(40, 50, device=model.device)[None]
    plain = model(tokens).logits
    diff = LoRADiff.load(result.diff_path)
    assert all(factors.B.any() for factors in diff.factors.values())  # each of them was trained
    with LoRASteerer(model, diff, 3.0):  # of this fingerprint
        assert not torch.equal(model(tokens).logits, plain)
    assert torch.equal(model(tokens).logits, plain)
