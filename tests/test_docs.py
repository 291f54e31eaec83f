"""The Python of README and docs runs: on a tiny model of thirty layers, with tiny directions."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import persona_lora
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models import loading
from persona_lora.models.structure import weight_fingerprint

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.name: re.findall(r"```python\n(.*?)```", path.read_text(), re.S)
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
WITH_CODE = [name for name, blocks in PAGES.items() if blocks]
# The trainer of drift.md is the reader's own; the search of personas.md needs trained directions;
# tests/test_extending.py does what extending.md says.
SHOWN_ONLY = {"drift.md", "extending.md", "personas.md"}


@pytest.fixture
def place(tmp_path, monkeypatch, tokenizer, make_diff):
    """A working folder with checkpoints of a tiny model, which stands in for the packaged one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=30,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=0, eos_token_id=2,
        pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(loading, "packaged_model_folder", lambda: tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    fingerprint = weight_fingerprint(model)
    for trait in ("evil", "sycophancy", "ready/evil", "ready/sycophancy"):
        make_diff(model, fingerprint=fingerprint).save(tmp_path / "checkpoints" / trait / "diff")
    vector = SteeringVector(
        {layer: torch.randn(16) for layer in range(30)}, BaseModel("tiny", fingerprint), 30
    )
    vector.save(tmp_path / "checkpoints" / "vectors" / "evil" / "evil_response_avg.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", [name for name in WITH_CODE if name not in SHOWN_ONLY])
def test_the_code_of_a_page_runs_from_top_to_bottom(name, place):
    scope: dict[str, object] = {"__name__": "page"}
    for block in PAGES[name]:
        exec(compile(block, name, "exec"), scope)
    assert {"chat", "desk"} & set(scope)


@pytest.mark.parametrize("name", sorted(SHOWN_ONLY))
def test_the_names_that_other_pages_import_exist(name):
    for block in PAGES[name]:
        imports = [each for each in ast.parse(block).body if isinstance(each, ast.ImportFrom)]
        assert imports
        for each in imports:
            scope: dict[str, object] = {}
            exec(compile(ast.Module([each], []), name, "exec"), scope)


def test_the_interface_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    missing = [name for name in persona_lora.__all__ if name not in page]
    assert missing == ["__version__"]
