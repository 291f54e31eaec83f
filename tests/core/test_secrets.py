"""Nothing secret is written down."""

from __future__ import annotations

import sys

import pytest

from persona_lora.core.errors import HIDDEN, arguments_without_secrets, without_secrets
from persona_lora.core.runs import Run

TOKEN = "hf_" + "s3cret" * 5
SECRETS = (
    ["--hub_token", "s3cret"],
    ["--hub-token=s3cret"],
    ["--push_to_hub_token", "s3cret"],
    ["--api-key", "s3cret"],
    ["--judge-url", "http://user:s3cret@host:1/v1"],
    ["--endpoint=https://host/v1?api_key=s3cret&x=1"],
    ["--base-url", "http://s3cret@host/v1#s3cret"],
    ["--note", f"with {TOKEN} inside"],
    ["--key", "sk-proj-s3cret-s3cret-s3cret"],
)


@pytest.mark.parametrize("words", SECRETS, ids=lambda words: words[0])
def test_a_run_records_its_arguments_without_secrets(words, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["persona-lora", "evaluate", *words, "--trait", "evil"])
    with pytest.raises(RuntimeError), Run.open(tmp_path, command="evaluate", config={}, seed=0):
        raise RuntimeError(f"no reply from http://user:s3cret@host/v1?key=s3cret with {TOKEN}")
    text = (tmp_path / "run.json").read_text()
    assert "s3cret" not in text
    assert HIDDEN in text
    assert '"evil"' in text


def test_what_is_no_secret_stays():
    words = ["--max-new-tokens", "80", "--eos_token", "<s>", "a@b.c", "http://host:1/v1", "a?b"]
    assert arguments_without_secrets(words) == words
    assert without_secrets("why? x@y: http://a/b, sk-1") == "why? x@y: http://a/b, sk-1"
