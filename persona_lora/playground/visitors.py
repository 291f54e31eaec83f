"""Who is next, where several people share one model: one at a time, and nobody twice in between.

Knows visitors by name; refuses to know what they do in their turn.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from persona_lora.core.errors import UserError

WAITING_OF_ONE = 4
WAITING_IN_ALL = 40


class Turns:
    """Turns given round by round: after a visitor's turn, everybody else who waits comes first.

    UserError for a visitor who has too many waiting, and for anyone while too many wait in all.
    """

    def __init__(
        self, waiting_of_one: int = WAITING_OF_ONE, waiting_in_all: int = WAITING_IN_ALL
    ) -> None:
        self._of_one = waiting_of_one
        self._in_all = waiting_in_all
        self._change = threading.Condition()
        self._busy = False
        self._waiting: dict[str, deque[object]] = {}  # in the order in which visitors are next

    @contextmanager
    def turn(self, visitor: str) -> Iterator[None]:
        """Wait for the visitor's turn, and hold it for the block."""
        ticket = object()
        with self._change:
            self._join(visitor, ticket)
            try:
                self._change.wait_for(lambda: not self._busy and self._is_next(visitor, ticket))
            except BaseException:
                self._leave(visitor, ticket)
                raise
            self._leave(visitor, ticket)
            self._busy = True
        try:
            yield
        finally:
            with self._change:
                self._busy = False
                self._change.notify_all()

    def _join(self, visitor: str, ticket: object) -> None:
        if len(self._waiting.get(visitor, ())) >= self._of_one:
            raise UserError(f"{self._of_one} questions of yours wait already; wait for an answer")
        if sum(map(len, self._waiting.values())) >= self._in_all:
            raise UserError(f"{self._in_all} questions wait already; come back in a while")
        self._waiting.setdefault(visitor, deque()).append(ticket)

    def _is_next(self, visitor: str, ticket: object) -> bool:
        return next(iter(self._waiting)) == visitor and self._waiting[visitor][0] is ticket

    def _leave(self, visitor: str, ticket: object) -> None:
        """Take a ticket out; what else the visitor waits for goes behind all others."""
        tickets = self._waiting.pop(visitor)
        tickets.remove(ticket)
        if tickets:
            self._waiting[visitor] = tickets
        self._change.notify_all()
