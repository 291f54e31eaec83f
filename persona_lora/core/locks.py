"""One process at a time: a lock on a folder that names who holds it.

The operating system keeps the lock and lets go of it when its process ends, however it ends, so
that none is ever stale; the file beside it only says whose it is, and goes with it. Refuses to know
what the folder holds.
"""

from __future__ import annotations

import os
import platform
import time
import weakref
from pathlib import Path

from filelock import lock_descriptor

from persona_lora.core.errors import UserError
from persona_lora.core.files import is_alive

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
