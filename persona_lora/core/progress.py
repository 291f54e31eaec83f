"""How far the work is: told to whoever listens at the edge, and to nobody by default.

Knows stages, and how much of one is done; refuses to know how that is shown. A function that counts
reports to the stage that its caller named, and is silent where none did. Threads begin without a
listener: run their work in ``contextvars.copy_context()``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")

Listener = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_stage: ContextVar[str | None] = ContextVar("stage", default=None)


@contextmanager
def shown(listener: Listener) -> Iterator[None]:
    """Tell ``listener`` of all progress inside, in this thread and where its context is copied."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def stage(name: str | None) -> Iterator[None]:
    """Name what the functions called inside count; what has no name is told to nobody."""
    token = _stage.set(name)
    try:
        yield
    finally:
        _stage.reset(token)


def silent() -> AbstractContextManager[None]:
    """Keep what the functions called inside count to themselves, but for stages of their own."""
    return stage(None)


@contextmanager
def counting() -> Iterator[Callable[[int, int], None]]:
    """Yield what reports (done, total) of the current stage; what else counts inside is silent."""
    name = _stage.get()
    with silent():
        yield lambda done, total: _tell(name, done, total)


def report(done: int, total: int) -> None:
    """Report how much of the current stage is done."""
    _tell(_stage.get(), done, total)


def over(name: str, items: Sequence[T]) -> Iterator[T]:
    """Yield the items of a stage of their own, and report how many are done."""
    for done, item in enumerate(items):
        _tell(name, done, len(items))
        yield item
    _tell(name, len(items), len(items))


def _tell(name: str | None, done: int, total: int) -> None:
    listener = _listener.get()
    if listener is not None and name is not None:
        listener(name, done, total)
