"""A run is a folder: ``run.json`` (what, when, with which versions) and long-format JSONL rows.

Knows how a run is kept and resumed; refuses to know what its rows mean.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from persona_lora.core.errors import UserError
from persona_lora.core.files import (
    append_jsonl,
    ensure_writable_folder,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)
from persona_lora.core.resources import checkout
from persona_lora.core.secrets import arguments_without_secrets, without_secrets

VERSIONED_PACKAGES = ("torch", "transformers", "peft", "trl", "persona-lora")
ROUNDING = 1e-9
SHOWN = 60


@dataclass(frozen=True)
class Run:
    """A run folder. As a context manager it records how the run ended in ``run.json``.

    ``status`` is "running", "finished" or "failed"; a run whose process was killed stays
    "running", and opening it again with the same configuration resumes it.
    """

    folder: Path

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        command: str,
        config: Mapping[str, Any],
        seed: int,
        overwrite: bool = False,
    ) -> Run:
        """Start a run, or resume the one in ``folder`` when its configuration is the same.

        Raises UserError when the folder holds a run of another configuration and ``overwrite``
        is False.
        """
        folder = ensure_writable_folder(Path(folder))
        run = cls(folder)
        record = folder / "run.json"
        if record.is_file() and overwrite:
            for path in [record, *folder.glob("*.jsonl")]:
                path.unlink()
        if record.is_file():
            old = read_json(record)
            asked = {"command": command, "config": dict(config), "seed": seed}
            if (found := first_difference({key: old[key] for key in asked}, asked)) is not None:
                raise UserError(
                    f"{folder} holds a run of another configuration ({found}); "
                    "choose another output or pass --overwrite"
                )
            return run
        write_json(record, _fresh_record(command, config, seed))
        return run

    @property
    def record(self) -> dict[str, Any]:
        """The contents of ``run.json``."""
        return dict(read_json(self.folder / "run.json"))

    @property
    def finished(self) -> bool:
        """Whether the run ended well."""
        return bool(self.record["status"] == "finished")

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to ``{name}.jsonl`` and flush them to the disk."""
        append_jsonl(self.folder / f"{name}.jsonl", rows)

    def write(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace ``{name}.jsonl`` atomically."""
        write_jsonl(self.folder / f"{name}.jsonl", rows)

    def read(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of ``{name}.jsonl``; an absent file has none."""
        path = self.folder / f"{name}.jsonl"
        return read_jsonl(path) if path.is_file() else []

    def resume_rows(self, name: str) -> list[dict[str, Any]]:
        """Return the rows written so far, dropping a last line that a kill cut short."""
        path = self.folder / f"{name}.jsonl"
        if not path.is_file():
            return []
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        return read_jsonl(path)

    def __enter__(self) -> Self:
        self._update(status="running")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        status = "finished" if error is None else "failed"
        told = None if error is None else without_secrets(repr(error))
        self._update(status=status, ended=_now(), error=told)

    def _update(self, **changes: Any) -> None:
        write_json(self.folder / "run.json", {**self.record, **changes})


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide numbers."""
    versions = {"python": platform.python_version()}
    for name in VERSIONED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def git_commit() -> str | None:
    """Return the commit of the checkout that holds this package, or None outside one."""
    folder = checkout()
    if folder is None:  # a repository around an installed wheel is another project's
        return None
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def first_difference(old: Any, new: Any, name: str = "") -> str | None:
    """Say where two JSON values first differ ("search.sigma0: 0.5, now 1.0"); None where nowhere.

    Numbers within ``ROUNDING`` of each other are the same: a sum depends on the number of threads.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping) and old.keys() == new.keys():
        pairs = [(f"{name}.{key}" if name else str(key), old[key], new[key]) for key in old]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{name}[{at}]", *pair) for at, pair in enumerate(zip(old, new, strict=True))]
    elif old == new or _both_close(old, new):
        return None
    elif isinstance(old, Mapping) and isinstance(new, Mapping):
        lone = ", ".join(sorted(map(str, old.keys() ^ new.keys())))
        return f"{name}: only one of the two has {lone}"
    else:
        return f"{name}: {repr(old)[:SHOWN]}, now {repr(new)[:SHOWN]}"
    found = (first_difference(before, after, where) for where, before, after in pairs)
    return next((each for each in found if each is not None), None)


def _both_close(old: Any, new: Any) -> bool:
    floats = isinstance(old, float) and isinstance(new, float)
    return floats and math.isclose(old, new, rel_tol=ROUNDING, abs_tol=0.0)


def _fresh_record(command: str, config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    return {
        "command": command,
        "config": dict(config),
        "seed": seed,
        "status": "running",
        "started": _now(),
        "ended": None,
        "error": None,
        "git_commit": git_commit(),
        "versions": package_versions(),
        "arguments": arguments_without_secrets(sys.argv[1:]),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
