"""A basis as a folder ``{name}/diff`` of PEFT adapters, and the model names that mean its mixes."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

MIX = "mix:"
FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Basis:
    """The diffs of a basis in the order of coefficients, and a digest of their files."""

    diffs: tuple[Path, ...]
    sha: str

    @classmethod
    def read(cls, folder: str | Path) -> Basis:
        """Return the basis in a folder, in the order of names; ValueError where there is none.

        The digest is that of ``persona-lora engine command``.
        """
        diffs = sorted(path.parent for path in Path(folder).glob(f"*/diff/{FILES[0]}"))
        if not diffs:
            raise ValueError(f"{folder} holds no {{name}}/diff; make one with: persona-lora basis")
        whole = hashlib.sha256()
        for path in (diff / name for diff in diffs for name in FILES):
            with path.open("rb") as stream:
                whole.update(hashlib.file_digest(stream, "sha256").digest())
        return cls(tuple(diffs), whole.hexdigest()[:16])

    def coefficients(self, name: str) -> list[float]:
        """Return the numbers of a model name; ValueError for one that names no mix of this."""
        expected = f"expected {MIX}{self.sha}: and {len(self.diffs)} finite numbers with commas"
        sha, _, text = name.removeprefix(MIX).partition(":")
        try:
            values = [float(each) for each in text.split(",")]
        except ValueError as error:
            raise ValueError(f"{name!r} names no mix; {expected}") from error
        if not name.startswith(MIX) or sha != self.sha:
            raise ValueError(f"{name!r} is a mix of another basis; {expected}")
        if len(values) != len(self.diffs) or not all(map(math.isfinite, values)):
            raise ValueError(f"{name!r} names no mix; {expected}")
        return values
