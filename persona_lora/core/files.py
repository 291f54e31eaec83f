"""Files that are whole or absent: written to a temporary name, then renamed.

Knows nothing of what the files mean.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from persona_lora.core.errors import UserError
from persona_lora.core.json_text import parse_json


def ensure_writable_folder(folder: Path) -> Path:
    """Create ``folder`` where missing and return it; UserError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror or error}; choose another output path"
        ) from error
    return folder


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path``; on success it takes the name, on failure it goes."""
    path = Path(path)
    ensure_writable_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces ``folder`` as a whole when the block succeeds."""
    folder = Path(folder)
    ensure_writable_folder(folder.parent)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    temporary.chmod(0o755)
    retired = temporary.with_name(temporary.name + ".old")
    try:
        yield temporary
        if folder.exists():
            os.replace(folder, retired)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def existing_file(path: str | Path) -> Path:
    """Return the path of a file that can be read without waiting; UserError for anything else.

    A folder, a pipe and a device are no files here: opening a pipe waits for ever.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path") from error
    except (OSError, ValueError) as error:  # a ring of links, a name too long, no permission
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise UserError(f"{path} is {what}, expected a file; check the path")
    return path


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file, without the mark that some editors put first."""
    path = existing_file(path)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def read_json(path: Path) -> Any:
    """Read one JSON value; UserError names the file, and the line and column of a mistake."""
    return parse_json(read_text(path), str(path))


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) else error
    return UserError(f"{str(path)[:200]!r} cannot be read: {reason}; check the path")


def _not_utf8(path: Path, error: UnicodeDecodeError) -> UserError:
    utf16 = error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    what = "UTF-16" if utf16 else f"not UTF-8 text: {error.reason} at byte {error.start}"
    return UserError(f"{path} is {what}; save it as UTF-8")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows and flush them to the disk."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with Path(path).open("a", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSON objects, one a line; UserError names the file and the line of a mistake."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}:{number}")
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number} holds a {type(row).__name__}, expected a JSON object")
        rows.append(row)
    return rows


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read the rows of a CSV that has at least ``columns``, every cell as text.

    Raises UserError for a file that is missing or no UTF-8 CSV, and names a missing column or a
    row with more or fewer cells than the header.
    """
    try:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
        rows = list(reader)
        found = list(reader.fieldnames or [])
    except csv.Error as error:
        raise UserError(f"{path} is not valid CSV: {error}; write it anew") from error
    missing = [column for column in columns if column not in found]
    if missing:
        has = ", ".join(found) or "no columns"
        raise UserError(f"{path} has no column {missing[0]!r}; it has {has}")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise UserError(
                f"{path}: row {number} has more or fewer cells than the header; quote cells that "
                "hold commas or line breaks"
            )
    return rows


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows under ``columns``, atomically; a missing or None value is an empty cell."""
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as stream,
    ):
        writer = csv.DictWriter(stream, fieldnames=list(columns), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
