"""Archives of folders: a zip whose manifest has the digest of every file.

The same files give the same bytes: names are sorted, and there is no time in it. Archives of others
are read by an allow-list of what may be in them. Refuses to know what the files mean.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from persona_lora.core.errors import UserError
from persona_lora.core.files import atomic_path, existing_file, read_json

MANIFEST = "MANIFEST.json"
LARGEST = 2**30  # bytes of all files together: rows and pages are far smaller
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first that a zip can say
_UNIX, _PLAIN_FILE = 3, (stat.S_IFREG | 0o644) << 16
_UNREADABLE = 0x61  # flags: encrypted, patched, encrypted in another way
_LONGEST = 255  # bytes of a name that a file system takes
_PART = re.compile(r"[^.\\/:\x00-\x1f][^\\/:\x00-\x1f]*")  # never "..", hidden, or of a drive


def files_below(folder: Path) -> dict[str, Path]:
    """Return all files of a folder by name, sorted, but hidden ones; UserError for a link."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))}
    seen = {name: path for name, path in found.items() if all(map(_PART.fullmatch, name.parts))}
    for path in seen.values():
        if path.is_symlink():
            raise UserError(f"{path} is a link, and may lead anywhere; put the file in its place")
    return {name.as_posix(): path for name, path in seen.items() if path.is_file()}


def write_archive(target: Path, files: Mapping[str, Path], texts: Mapping[str, str]) -> str:
    """Write files and texts with their manifest; return the manifest's digest."""
    if sum(path.stat().st_size for path in files.values()) > LARGEST:
        raise UserError(f"the files have more than the {LARGEST:,} bytes that an archive holds")
    held: dict[str, Any] = {}
    with atomic_path(target) as temporary, ZipFile(temporary, "w") as archive:

        def add(name: str, data: bytes) -> str:
            entry = ZipInfo(name, EPOCH)
            entry.create_system, entry.external_attr = _UNIX, _PLAIN_FILE
            archive.writestr(entry, data, ZIP_DEFLATED)
            held[name] = _entry(data)
            return str(held[name]["sha256"])

        for name in sorted({*files, *texts}):
            add(name, texts[name].encode() if name in texts else files[name].read_bytes())
        manifest = json.dumps({"format": 1, "files": held}, indent=2, ensure_ascii=False)
        return add(MANIFEST, f"{manifest}\n".encode())


def _entry(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


@contextmanager
def opened(path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield the folder, or a temporary one of an archive's files, and what of these is damaged.

    Raises UserError for what is no archive, and before anything is written for names that leave
    the folder or are there twice, and for links and other things that are no plain files.
    """
    if path.is_dir():
        yield path, {}
        return
    try:
        archive = ZipFile(existing_file(path))
    except (BadZipFile, OSError, NotImplementedError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no whole archive ({error}); fetch or pack it again") from error
    with archive, TemporaryDirectory() as folder:
        _refuse_strange(path, archive.infolist())
        damaged = {}
        for entry in archive.infolist():
            target = Path(folder, entry.filename)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                target.write_bytes(archive.read(entry))
            except (BadZipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
                damaged[entry.filename] = str(error)
        yield Path(folder), damaged


def _refuse_strange(path: Path, entries: list[ZipInfo]) -> None:
    seen: set[str] = set()
    for entry in entries:
        name, kind = entry.orig_filename, stat.S_IFMT(entry.external_attr >> 16)
        parts = name.split("/")
        above = {"/".join(parts[:end]).casefold() for end in range(1, len(parts))}
        wrong = {
            "is no name inside the folder": not all(map(_PART.fullmatch, parts))
            or max(len(each.encode()) for each in parts) > _LONGEST,
            "is no plain file": kind not in (0, stat.S_IFREG),
            "is there twice": name.casefold() in seen or bool(above & seen),
            "is encrypted, or packed in an unknown way": bool(entry.flag_bits & _UNREADABLE)
            or entry.compress_type not in (ZIP_STORED, ZIP_DEFLATED),
        }
        for reason in (each for each, holds in wrong.items() if holds):
            raise UserError(f"{path}: {ascii(name)[:100]} {reason}; nothing was unpacked")
        seen.add(name.casefold())
    if sum(entry.file_size for entry in entries) > LARGEST:
        raise UserError(f"{path} unpacks to more than {LARGEST:,} bytes; nothing was unpacked")


def faults_of(folder: Path, damaged: Mapping[str, str], what: Path) -> list[str]:
    """Return what is wrong with files, by name; UserError without a manifest to say so."""
    if MANIFEST in damaged or not (folder / MANIFEST).is_file():
        raise UserError(f"{what} has no whole {MANIFEST}, so that nothing in it can be checked")
    manifest = read_json(folder / MANIFEST)
    named = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(named, dict) or manifest.get("format") != 1:
        raise UserError(f"{what}: {MANIFEST} is not one that pack writes")
    found = files_below(folder)
    faults = [f"{name}: damaged ({reason})" for name, reason in damaged.items()]
    faults += [f"{name}: missing" for name in named if name not in {*found, *damaged}]
    for name in found.keys() - {MANIFEST}:
        if name not in named:
            faults.append(f"{name}: not in {MANIFEST}")
        elif _entry(found[name].read_bytes()) != named[name]:
            faults.append(f"{name}: changed")
    return sorted(faults)
