"""What something holds, as a digest: of a value, a file, a folder (tensors: ``tensor_files``).

What a run read is the same where its contents are, whatever it is called. A path that stands among
a run's settings is a setting all the same: one that is typed another way makes another run.
Refuses to know what the contents mean.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MODEL_FILES = (
    *("adapter_config.json", "adapter_model.*", "config.json", "generation_config.json"),
    *("model*.safetensors", "pytorch_model*.bin", "tokenizer*", "*.jinja", "*.gguf"),
)
ABSENT = "absent"


def digest_of(value: Any) -> str:
    """Return the digest of a JSON value; other values count by what they are as text."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_digest(path: Path) -> str:
    """Return the digest of a file's bytes; "absent" where there is none."""
    if not path.is_file():
        return ABSENT
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_digest(folder: Path, names: Iterable[str] = ("*",)) -> str:
    """Return the digest of the files of a folder that match ``names``, with their names."""
    files = {path for name in names for path in folder.glob(name) if path.is_file()}
    return digest_of({path.name: file_digest(path) for path in files})


def model_folder_digest(folder: Path) -> str:
    """Return the digest of the weights, settings and tokenizer in a folder of a model or adapter.

    What training keeps beside them (optimiser states, logs) is left out.
    """
    return folder_digest(folder, MODEL_FILES)


def path_digest(path: Path) -> str:
    """Return the digest of a file, or of a folder of a model or adapter."""
    return model_folder_digest(path) if path.is_dir() else file_digest(path)


def numbered(what: str, digests: Sequence[str]) -> dict[str, str]:
    """Return digests as inputs of a run: "the diff", or "diff 1", "diff 2" …"""
    if len(digests) == 1:
        return {f"the {what}": digests[0]}
    return {f"{what} {number}": each for number, each in enumerate(digests, start=1)}
