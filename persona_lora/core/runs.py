"""A run is a folder: ``run.json`` (what, when, with which versions) and long-format JSONL rows.

One process at a time works on it: the operating system keeps the lock and lets go of it when its
process ends, however it ends, so that none is ever stale; the file beside it only says whose it is,
and goes with it. Knows how a run is kept and resumed; refuses to know what its rows mean."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from filelock import lock_descriptor

from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError, arguments_without_secrets, without_secrets
from persona_lora.core.files import (
    append_jsonl,
    drop_cut_line,
    ensure_writable_folder,
    is_alive,
    read_json,
    read_jsonl,
    remove,
    write_json,
    write_jsonl,
    write_text,
)
from persona_lora.core.resources import checkout

if TYPE_CHECKING:
    from persona_lora.core.protocol import Design, FrozenProtocol

LOCK = ".lock"
NAMING_TRIES, NAMING_PAUSE = 50, 0.02  # a holder writes its name right after it took the lock


class FolderLock:
    """A lock on ``folder``: held from ``acquire`` to ``release``, or to the end of the process.

    Every other holder is refused, in this process too. Not held by a process that is forked.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._let_go: weakref.finalize | None = None

    @property
    def held(self) -> bool:
        """Whether this very lock is held."""
        return self._let_go is not None and self._let_go.alive

    def acquire(self) -> None:
        """Take the lock; UserError names the process that has it."""
        path = self.folder / LOCK
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        while True:
            if not lock_descriptor(descriptor, blocking=False):
                os.close(descriptor)
                raise UserError(
                    f"{self.folder} is in use by {_holder(path)}; wait until it ends, or choose "
                    "another output"
                )
            if _is_file(descriptor, path):
                break
            os.close(descriptor)  # its holder has just removed it
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} {platform.node()}\n".encode())
        self._let_go = weakref.finalize(self, _let_go, descriptor, path, os.getpid())

    def release(self) -> None:
        """Let go of the lock; nothing where it is not held."""
        if self._let_go is not None:
            self._let_go()


def _let_go(descriptor: int, path: Path, pid: int) -> None:
    if os.getpid() == pid:  # not in a process that was forked meanwhile
        path.unlink(missing_ok=True)
    os.close(descriptor)


def _is_file(descriptor: int, path: Path) -> bool:
    """Say whether a path is still that of an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    for _ in range(NAMING_TRIES):
        try:
            pid, _, host = path.read_text(encoding="utf-8").strip().partition(" ")
        except FileNotFoundError:
            break
        if pid.isdigit() and (host != platform.node() or is_alive(int(pid))):
            return f"process {pid} on {host}"
        time.sleep(NAMING_PAUSE)
    return "another process"


RECORD = "run.json"
CONFIG = "config.yaml"
COMMAND_CONFIG: ContextVar[str | None] = ContextVar("the options of the command", default=None)
"""The command's options as YAML, which every run that it opens keeps beside its record."""
RECORDED = ("command", "config", "seed", "status")
EMPTYING = "emptying"  # the status while rows of an overwritten run may still be there
VERSIONED_PACKAGES = ("torch", "transformers", "peft", "trl", "persona-lora")
FREE = ("batch_size",)  # keys of a configuration that decide memory, time and rounding alone
# How inputs begin that have rows of their own: a run may go on with more of them, or with fewer.
OF_ITEMS = (
    *("checkpoint-", "the finetune ", "the adapter of ", "the correction of "),
    *("the second judge", "the sentence embedder", "the judge's model"),  # who judges beside
)
NOTHING = digest_of([])  # of what an earlier version recorded as read, and did not read
ROUNDING = 1e-9
LISTS = (list, tuple)  # a tuple comes back from JSON as a list
SHOWN = 60


@dataclass(frozen=True)
class Output:
    """Where a run is written, and whether a run that is there gives way.

    ``config`` is what it records beyond the settings of what is run, and ``inputs`` are digests of
    what it reads beyond that: who judges, for one. A run with a ``protocol`` is held to it;
    ``seeds``: it is one of so many, of other training seeds, that are read together.
    """

    path: Path
    overwrite: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    protocol: FrozenProtocol | None = None
    seeds: int = 1

    @classmethod
    def of(cls, given: Output | Path) -> Output:
        """Return the output itself, or one that overwrites nothing."""
        return given if isinstance(given, Output) else cls(Path(given))

    def at(self, path: Path) -> Output:
        """Return the same for another place."""
        return replace(self, path=path)


@dataclass(frozen=True)
class Planned:
    """What is known of a run before its model is loaded, as ``Run.open`` takes it.

    ``later`` names settings of its configuration that are known only then.
    """

    command: str
    config: Mapping[str, Any]
    seed: int
    inputs: Mapping[str, str] = field(default_factory=dict)
    design: Design | None = None
    later: tuple[str, ...] = ()

    def check(self, output: Output) -> None:
        """UserError for a run that is not what its protocol says, and for another in its folder.

        ``Run.open`` refuses both, and what only the model tells beyond that.
        """
        config = {**self.config, **output.config}
        if output.protocol is not None:
            output.protocol.hold(self.design, config, self.later)
        if not output.overwrite:
            refuse_taken(output.path, self.command, config, self.seed, inputs=self.inputs)


@dataclass(frozen=True)
class Run:
    """A run folder. As a context manager it records how the run ended in ``run.json``.

    ``status`` is "running", "finished" or "failed"; a run whose process was killed stays
    "running", and opening it again with the same configuration resumes it. From ``open`` to the
    end of the ``with`` no other process can open it; one that works on a run of another (of
    several launched as one) may hold a plain ``Run(folder)``.
    """

    folder: Path
    _lock: FolderLock = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_lock", FolderLock(self.folder))

    def __reduce__(self) -> tuple[type[Run], tuple[Path]]:
        return Run, (self.folder,)  # a lock does not travel to another process

    @classmethod
    def open(
        cls,
        output: Output | Path,
        *,
        command: str,
        config: Mapping[str, Any],
        seed: int,
        inputs: Mapping[str, str] | None = None,
        parts: Sequence[str] = (),
        once: bool = False,
        design: Design | None = None,
    ) -> Run:
        """Start a run, or resume the one that is there when it is the same.

        ``inputs`` are digests of the contents of all that the run reads, by what it is. One that
        has changed, is gone or is new makes another run, but for those of ``OF_ITEMS``, which come
        and go: what is new of them is added to the record.
        ``parts`` are the names (or patterns) of what the run makes below its folder beside rows:
        they are overwritten with the rows, and no killed call leaves some of both.
        ``once``: a run that has ended well is not opened again. ``design`` is what the output's
        protocol is to freeze.

        Raises:
            UserError: The run is not what its protocol says; another process works on the run;
                the folder holds a run of another configuration or of other inputs (or, with
                ``once``, a finished one) that is not to be overwritten; or it holds rows or parts
                that no run has recorded.
        """
        output = Output.of(output)
        config = {**config, **output.config}
        held = None if output.protocol is None else output.protocol.hold(design, config)
        run = cls(ensure_writable_folder(output.path))
        read = {**(inputs or {}), **output.inputs}
        fresh = {**_fresh_record(command, config, seed, read), "protocol": held}
        run._lock.acquire()
        try:
            run._prepare(fresh, ("*.jsonl", *parts), overwrite=output.overwrite, once=once)
            given = COMMAND_CONFIG.get()
            if given is not None:
                write_text(run.folder / CONFIG, given)
        except BaseException:
            run._lock.release()
            raise
        return run

    def _prepare(
        self, fresh: dict[str, Any], rows: Sequence[str], *, overwrite: bool, once: bool
    ) -> None:
        path = self.folder / RECORD
        made = [each for pattern in rows for each in sorted(self.folder.glob(pattern))]
        if not path.is_file():
            if made:
                raise UserError(
                    f"{self.folder} holds {made[0].name} and no {RECORD} that says what made it; "
                    "choose another output, or move it away"
                )
            write_json(path, fresh)
            return
        old = self.record
        if not overwrite and old["status"] != EMPTYING:
            known = _continued(self.folder, old, fresh)
            if once:
                _refuse_finished(self)
            write_json(path, {**old, **known})
            return
        write_json(path, {**fresh, "status": EMPTYING})
        for each in made:
            remove(each)
        write_json(path, fresh)

    @property
    def record(self) -> dict[str, Any]:
        """The contents of ``run.json``; raises UserError where it is no record of a run."""
        if self.folder.is_dir() and not (self.folder / RECORD).is_file():
            inside = sorted(self.folder.glob(f"*/{RECORD}"))
            which = f"one of its runs, as {inside[0].parent}" if inside else "the folder of a run"
            raise UserError(f"{self.folder} has no {RECORD}, so it is no run; name {which}")
        value = read_json(self.folder / RECORD)
        lacking = [key for key in RECORDED if not isinstance(value, dict) or key not in value]
        if lacking:
            raise UserError(f"{self.folder / RECORD} is no record of a run: it has no {lacking[0]}")
        return dict(value)

    @property
    def finished(self) -> bool:
        """Whether the run ended well."""
        return bool(self.record["status"] == "finished")

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to ``{name}.jsonl`` and flush them; a kill may keep the first few of them."""
        append_jsonl(self.folder / f"{name}.jsonl", rows)

    def extend(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows that belong together: after a kill all of them are there, or none."""
        self.write(name, [*self.resume_rows(name), *rows])

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
        drop_cut_line(path)
        return read_jsonl(path)

    def __enter__(self) -> Self:
        if not self._lock.held:
            self._lock.acquire()
        self._update(status="running")
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        status = "finished" if error is None else "failed"
        told = None if error is None else without_secrets(repr(error))
        try:
            self._update(status=status, ended=_now(), error=told)
        finally:
            self._lock.release()

    def _update(self, **changes: Any) -> None:
        write_json(self.folder / RECORD, {**self.record, **changes})


def refuse_taken(
    folder: Path,
    command: str,
    config: Mapping[str, Any],
    seed: int,
    *,
    inputs: Mapping[str, str] | None = None,
    once: bool = False,
    gone: Sequence[str] = (),
) -> None:
    """UserError where a folder is seen to hold another run, by what of it is known already.

    With ``once`` also for a finished one, of whose parts those named ``gone`` are.
    Opening the run says the rest.
    """
    run = Run(folder)
    if not (folder / RECORD).is_file() or run.record["status"] == EMPTYING:
        return
    old = run.record
    known = [name for name in config if name in old["config"]]
    held, asked = ({name: each[name] for name in known} for each in (old["config"], config))
    read = inputs or {}
    fresh = {"command": command, "config": asked, "seed": seed, "inputs": read}
    if "inputs" in old:
        old["inputs"] = {key: each for key, each in old["inputs"].items() if key in read}
    _continued(folder, {**old, "config": held, "protocol": None}, fresh)
    if once:
        _refuse_finished(run, gone)


def of_other_command(folder: Path, command: str) -> bool:
    """Say whether a folder holds a run of another command."""
    return (folder / RECORD).is_file() and Run(folder).record["command"] != command


def _refuse_finished(run: Run, gone: Sequence[str] = ()) -> None:
    if run.finished:
        without = f" without its {' and '.join(gone)}" if gone else ""
        raise UserError(
            f"{run.folder} holds a finished run of the same{without}; pass --overwrite to train it "
            "again"
        )


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
    words, silent = ("git", "rev-parse", "HEAD"), subprocess.DEVNULL
    try:
        said = subprocess.check_output(words, cwd=folder, stderr=silent, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.strip()


def first_difference(old: Any, new: Any, name: str = "") -> str | None:
    """Say where two JSON values first differ ("search.sigma0: 0.5, now 1.0"); None where nowhere.

    Numbers within ``ROUNDING`` of each other are the same: a sum depends on the number of threads.
    Of two paths that end alike it says how they can be the same.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping) and old.keys() == new.keys():
        pairs = [(f"{name}.{key}" if name else str(key), old[key], new[key]) for key in old]
    elif isinstance(old, LISTS) and isinstance(new, LISTS) and len(old) == len(new):
        pairs = [(f"{name}[{at}]", *pair) for at, pair in enumerate(zip(old, new, strict=True))]
    elif old == new or (
        isinstance(old, float)
        and isinstance(new, float)
        and math.isclose(old, new, rel_tol=ROUNDING)
    ):
        return None
    elif isinstance(old, Mapping) and isinstance(new, Mapping):
        lone = min(old.keys() ^ new.keys(), key=str)
        told = (repr(each[lone])[:SHOWN] if lone in each else "not set" for each in (old, new))
        return f"{name}.{lone}".lstrip(".") + ": {}, now {}".format(*told)
    else:
        alike = isinstance(old, str) and isinstance(new, str) and Path(old).name == Path(new).name
        remedy = "; if it is the same, give its path as before" if alike else ""
        return f"{name}: {repr(old)[:SHOWN]}, now {repr(new)[:SHOWN]}{remedy}"
    found = (first_difference(before, after, where) for where, before, after in pairs)
    return next((each for each in found if each is not None), None)


def _continued(folder: Path, old: Mapping[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
    """Return what changes in the record of a run that goes on; UserError where it is another."""
    asked = ("command", "config", "seed", "protocol")  # nothing is pre-registered afterwards
    before, now = (deciding({key: each.get(key) for key in asked}) for each in (old, fresh))
    found = first_difference(before, now)
    if found is not None:
        raise UserError(
            f"{folder} holds a run of another configuration ({found}); "
            "choose another output or pass --overwrite"
        )
    if fresh["inputs"] and "inputs" not in old:
        raise UserError(
            f"{folder} holds a run that did not record the contents of what it read; choose "
            "another output or pass --overwrite"
        )
    known, read = old.get("inputs", {}), fresh["inputs"]
    known = {name: each for name, each in known.items() if name in read or each != NOTHING}
    changed = [name for name, digest in read.items() if known.get(name, digest) != digest]
    lone = sorted(each for each in known.keys() ^ read.keys() if not each.startswith(OF_ITEMS))
    if changed or lone:
        said = f"the content of {', '.join(changed)} has changed since"
        alone = f"only one of the two read {', '.join(lone)}"
        raise UserError(
            f"{folder} holds a run of other inputs: {said if changed else alone}; "
            "choose another output or pass --overwrite"
        )
    return {"inputs": {**known, **read}}


def deciding(value: Any) -> Any:
    """Return a configuration without what decides memory and time alone."""
    if not isinstance(value, Mapping):
        return value
    return {key: deciding(each) for key, each in value.items() if key not in FREE}


def _fresh_record(
    command: str, config: Mapping[str, Any], seed: int, inputs: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "command": command,
        "config": dict(config),
        "seed": seed,
        "inputs": dict(inputs),
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
