"""Files that are whole or absent: written to a temporary name, then renamed.

Knows nothing of what the files mean.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from persona_lora.core.errors import UserError
from persona_lora.core.json_text import parse_json

# Temporary names hold machine and process, so that what a killed one left is told from work.
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_LEFTOVER = re.compile(
    r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})\.(?P<pid>\d+)\.[0-9a-f]{6}\.(?P<kind>tmp|old)"
)
_in_use: set[str] = set()


def ensure_writable_folder(folder: Path) -> Path:
    """Create ``folder`` where missing and return it; raises UserError where it cannot be written.

    What killed writers of this machine left in it is removed on the way.
    """
    _prepare(folder)
    return folder


def _prepare(folder: Path) -> int:
    """Make a folder ready to be written to, and return the permissions that new files get there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        with _temporary(folder / "probe") as probe:
            probe.touch()
            return stat.S_IMODE(probe.stat().st_mode)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror or error}; choose another output path"
        ) from error


def refuse_folder(path: Path) -> None:
    """UserError for a folder where a file is to be written."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")


def refuse_unwritable(folder: Path) -> None:
    """UserError where a folder could be neither made nor written to; nothing is made."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    why = "" if os.access(there, os.W_OK) else f"{there} must not be written to"
    why = why if there.is_dir() else f"{there} is a file"
    if why:
        raise UserError(f"cannot write to {folder}: {why}; choose another output path")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path``; on success it takes the name, on failure it goes."""
    path = Path(path)
    refuse_folder(path)
    mode = _prepare(path.parent)
    with _temporary(path) as temporary:
        yield temporary
        _finish(temporary, mode)
        os.replace(temporary, path)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces ``folder`` as a whole when the block succeeds.

    UserError, and the old folder as it was, where it holds what the new one does not.
    """
    folder = Path(folder)
    mode = _prepare(folder.parent)
    with _temporary(folder) as temporary, _temporary(folder, "old") as retired:
        temporary.mkdir()
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                _finish(path, mode)
        if folder.exists():
            _refuse_to_lose(folder, temporary)
            os.replace(folder, retired)
        os.replace(temporary, folder)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield a folder beside ``path`` that goes in the end; a killed call's goes with the next."""
    ensure_writable_folder(path.parent)
    with _temporary(path) as temporary:
        temporary.mkdir()
        yield temporary


def _refuse_to_lose(folder: Path, new: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, expected a folder; choose another output path")
    lost = sorted(set(os.listdir(folder)) - set(os.listdir(new)))
    if lost:
        raise UserError(
            f"{folder} holds {lost[0]}, which would be lost; choose another output path, or move "
            "it away"
        )


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders of writers that were killed on this machine.

    A folder that one had moved away, without putting the new one there, gets its name back.
    """
    for path in folder.glob(".*.*.*.*"):
        found = _LEFTOVER.fullmatch(path.name)
        if found is None or found["host"] != _HOST or path.name in _in_use:
            continue
        if int(found["pid"]) != os.getpid() and is_alive(int(found["pid"])):
            continue
        _settle(path, path.with_name(found["name"]), found["kind"])


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Say whether a process of this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, and is another user's
        return True
    return True


@contextmanager
def _temporary(path: Path, kind: str = "tmp") -> Iterator[Path]:
    """Yield a free name beside ``path`` that says whose it is; what bears it afterwards goes.

    UserError for the working folder and those above it: they hold the command.
    """
    if path.name in ("", "..") or Path.cwd().is_relative_to(path.resolve()):
        raise UserError(
            f"{path} is the folder that the command runs in or one above it, and cannot be "
            "replaced; choose another output path"
        )
    name = f".{path.name}.{_HOST}.{os.getpid()}.{secrets.token_hex(3)}.{kind}"
    _in_use.add(name)
    temporary = path.with_name(name)
    try:
        yield temporary
    finally:
        _settle(temporary, path, kind)
        _in_use.discard(name)


def _settle(temporary: Path, path: Path, kind: str) -> None:
    """Remove a temporary; an old folder that nothing has replaced gets its name back."""
    if kind == "old" and temporary.exists() and not path.exists():
        os.replace(temporary, path)
    else:
        remove(temporary)


def _finish(path: Path, mode: int) -> None:
    """Give a file a new file's permissions, and flush it: no name stands for bytes not there.

    Some libraries write files that only their owner may read.
    """
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def existing_file(path: str | Path) -> Path:
    """Return the path of a file that can be read without waiting.

    Raises UserError for anything else.

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
        utf16 = error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        what = "UTF-16" if utf16 else f"not UTF-8 text: {error.reason} at byte {error.start}"
        raise UserError(f"{path} is {what}; save it as UTF-8") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def read_json(path: Path) -> Any:
    """Read one JSON value; UserError names the file, and the line and column of a mistake."""
    return parse_json(read_text(path), str(path))


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) else error
    return UserError(f"{str(path)[:200]!r} cannot be read: {reason}; check the path")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows and flush them to the disk; a kill may keep the first few of them."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with Path(path).open("a", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def drop_cut_line(path: Path) -> None:
    """Drop the end of a file that a kill cut short, after its last line break."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with atomic_path(path) as temporary:
            temporary.write_bytes(whole)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSON objects, one a line; UserError names the file and the line of a mistake."""
    return [row for _, row in numbered_jsonl(path)]


def numbered_jsonl(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read as ``read_jsonl``; each row comes after its place, ``path:line`` (blank lines count)."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise UserError(f"{where} holds a {type(row).__name__}, expected a JSON object")
        rows.append((where, row))
    return rows


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read the rows of a CSV that has at least ``columns``, every cell as ``write_csv`` got it.

    Raises UserError for a file that is missing or no UTF-8 CSV, and names a column that is missing
    or there twice, or a row with more or fewer cells than the header.
    """
    try:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
        rows = [
            {_as_written(name): _as_written(cell) for name, cell in row.items()} for row in reader
        ]
        found = [_as_written(name) for name in reader.fieldnames or []]
    except csv.Error as error:
        raise UserError(f"{path} is not valid CSV: {error}; write it anew") from error
    twice = [name for name in found if name and found.count(name) > 1]
    if twice:
        raise UserError(f"{path} has the column {twice[0]!r} twice; keep one of them")
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
    """Write rows under ``columns``, atomically; a missing or None value is an empty cell.

    A text that a spreadsheet would run as a formula gets an apostrophe, which ``read_csv`` takes
    off again; numbers stay numbers.
    """
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as stream,
    ):
        writer = csv.writer(stream)
        writer.writerow([_harmless(column) for column in columns])
        writer.writerows([_harmless(row.get(column)) for column in columns] for row in rows)


# Apostrophes before are taken along, so that reading gives back what was written, whatever it was.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def _harmless(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def _as_written(cell: Any) -> Any:
    """Undo ``_harmless``; None stands for a cell that is not there, a list for those too many."""
    armed = isinstance(cell, str) and cell.startswith("'") and _FORMULA.match(cell)
    return cell[1:] if armed else cell
