"""Threads take turns at a model: what one steers, another neither generates with nor reads with.

Knows who has a model; refuses to know what is done with it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import nn

from persona_lora.core.errors import UserError
from persona_lora.models.structure import decoder_layers

logger = logging.getLogger(__name__)

PAUSE = 0.005  # seconds between two looks whether the model is free
NOTICE = 30.0  # seconds of waiting that are worth a line


@dataclass(eq=False)
class _Holding:
    """Which thread has a model, and the turns that it has not left."""

    thread: int
    turns: list[Turn] = field(default_factory=list)


# By the first decoder block, which a model shares with its PEFT and compiled wrappers.
HOLDINGS: WeakKeyDictionary[nn.Module, _Holding] = WeakKeyDictionary()


class Turn:
    """A turn of whoever steers a model, generates with it or reads with it.

    No lock of ``threading``: an interrupt between getting one and noting that would leave it locked
    for ever. Every step here may be interrupted, and ``leave`` called again.
    """

    def __init__(self, model: nn.Module, steers: Callable[[], int] | None = None) -> None:
        self._block = decoder_layers(model)[0]
        self.steers = steers  # how many rows a steerer keeps apart; None of who only reads

    def take(self) -> None:
        """Wait until no other thread has the model, and take it."""
        mine = _Holding(threading.get_ident())
        waited = 0.0
        while (holding := HOLDINGS.setdefault(self._block, mine)).thread != mine.thread:
            time.sleep(PAUSE)
            waited += PAUSE
            if NOTICE <= waited < NOTICE + PAUSE:
                logger.warning("waiting for another thread to be done with this model")
        holding.turns.append(self)

    def leave(self) -> None:
        """Let the model go, once the last nested turn is left; safe to call at any time."""
        holding = HOLDINGS.get(self._block)
        if holding is None:
            return
        if self in holding.turns:
            holding.turns.remove(self)
        elif holding.thread != threading.get_ident():
            return
        if not holding.turns:
            HOLDINGS.pop(self._block, None)


def refuse_untold_rows(model: nn.Module) -> None:
    """Raise UserError where rows of batches in an order of their own would get others' steering."""
    if (apart := rows_kept_apart(model)) > 1:
        raise UserError(
            f"the model is steered by {apart} rows of coefficients, and batches are sorted by "
            "length; give prepare_batch=steerer.select_rows, so that each row gets its own (where "
            "there is no prepare_batch, steer by one row at a time)"
        )


def rows_kept_apart(model: nn.Module) -> int:
    """Return the most rows that a steerer of this thread keeps apart; 0 where it steers nothing.

    What another thread steers is left before this one reads.
    """
    holding = HOLDINGS.get(decoder_layers(model)[0])
    own = holding is not None and holding.thread == threading.get_ident()
    turns = holding.turns if holding is not None and own else []
    return max((each.steers() for each in turns if each.steers is not None), default=0)
