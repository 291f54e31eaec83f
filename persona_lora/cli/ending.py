"""How a program ends: whatever ends it early is one line and an exit status.

Knows exceptions and signals; refuses to know commands. ``train_lora.py`` ends by it too.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

from rich.console import Console

from persona_lora.core.errors import UserError, without_secrets

FAULT, MISTAKE, INTERRUPTED, TERMINATED = 1, 2, 130, 143
GO_ON = "run the same command again to go on"
FULL = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing")


class Ending(NamedTuple):
    """What is said of an early end, and its exit status."""

    message: str
    status: int


def call_to_end(action: Callable[[], int | None], verbose: bool) -> None:
    """Call ``action`` and leave the program with the status it returns, or with how it failed.

    A mistake that the user can mend, and what the machine refuses (a full disk), ends with 2, a
    fault of ours with 1, Ctrl-C with 130 and a request to terminate with 143. Each says one line;
    if ``verbose``, the traceback of what is no mistake of the user stands before it.
    """
    with _terminated():
        try:
            status = action()
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            if isinstance(error, SystemExit) and error.code != TERMINATED:
                raise
            if not isinstance(error, UserError) and verbose:
                traceback.print_exception(error)
            _say(ending_of(error), mistake=isinstance(error, UserError))
        else:
            if status == INTERRUPTED:  # how typer returns from Ctrl-C
                _say(ending_of(KeyboardInterrupt()))
            sys.exit(status or 0)


def ending_of(error: BaseException) -> Ending:
    """Return the line and the status for what ended a program."""
    if isinstance(error, UserError):
        return Ending(str(error), MISTAKE)
    if isinstance(error, KeyboardInterrupt):
        return Ending(f"interrupted; {GO_ON}", INTERRUPTED)
    if isinstance(error, SystemExit):
        return Ending(f"terminated; {GO_ON}", TERMINATED)
    if _is_full(error):
        return Ending(f"the disk is full; free some space, then {GO_ON}", MISTAKE)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return Ending(f"{where}{error.strerror}; mend that, then {GO_ON}", MISTAKE)
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return Ending(f"unexpected {without_secrets(said)[:400]} (its traceback: --verbose)", FAULT)


def _is_full(error: BaseException) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        full = isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or any(text in str(seen) for text in FULL):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _say(ending: Ending, *, mistake: bool = False) -> None:
    """Say it and leave; a mistake that all of several launched processes make is said once."""
    if not (mistake and os.environ.get("RANK", "0") != "0"):
        Console(stderr=True, highlight=False).print(
            "error: " + " ".join(ending.message.split()),
            style="red",
            markup=False,
            soft_wrap=True,
        )
    sys.exit(ending.status)


@contextmanager
def _terminated() -> Iterator[None]:
    """Let SIGTERM end the program as Ctrl-C does, through every ``finally``."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
