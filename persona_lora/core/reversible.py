"""A change that is undone however its block is left, at whatever instruction it is interrupted.

A ``with`` statement calls ``__exit__`` only when ``__enter__`` has returned, and both are functions
with a first and a last instruction at which an interrupt leaves the change behind. So the change
is made by a generator that stands inside its own ``try`` while the block runs, and it is started
and closed from outside Python code of ours: by the interpreter and by ``contextlib.closing``.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import closing
from operator import methodcaller
from typing import TYPE_CHECKING, Any, Self

from persona_lora.core.errors import UserError


class _Enter:
    """The ``__enter__`` that is the first step of the generator itself."""

    def __get__(self, instance: Reversible | None, owner: type[Reversible]) -> Callable[..., Any]:
        return methodcaller("__enter__") if instance is None else instance._begun().__next__


class Reversible(closing[Any], ABC):
    """Context manager: ``apply`` on entry, ``undo`` on any exit, also from a failing ``apply``.

    One that is dropped inside its block undoes itself when it is collected. Raises UserError where
    it is entered inside itself.
    """

    thing: Generator[Self] | None

    if TYPE_CHECKING:

        def __enter__(self) -> Self: ...
    else:
        __enter__ = _Enter()

    def __init__(self) -> None:
        super().__init__(None)  # the generator of the block that runs, or of the last one

    @abstractmethod
    def apply(self) -> None:
        """Make the change."""

    @abstractmethod
    def undo(self) -> None:
        """Take back what was changed: all, a part or nothing of it; safe to call again."""

    def _begun(self) -> Generator[Self]:
        if self.thing and inspect.getgeneratorstate(self.thing) == inspect.GEN_SUSPENDED:
            raise UserError(
                f"this {type(self).__name__} is in use already; make another one to nest them"
            )
        self.thing = self._changed()
        return self.thing

    def _changed(self) -> Generator[Self]:
        try:
            try:
                self.apply()
                yield self
            except BaseException:
                self.undo()
                raise
        except BaseException:
            self.undo()  # the first may have been interrupted
            raise
