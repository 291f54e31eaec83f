"""Turns: one at a time, round by round, with a limit on what waits."""

from __future__ import annotations

import threading

import pytest

from persona_lora.core.errors import UserError
from persona_lora.playground.visitors import Turns


def queued(turns, visitors):
    """Let visitors join one after another behind a held turn; return who came in which order."""
    order, threads = [], []

    def take(visitor):
        with turns.turn(visitor):
            order.append(visitor)

    with turns.turn("holder"):
        for number, visitor in enumerate(visitors, start=1):
            threads.append(threading.Thread(target=take, args=(visitor,), daemon=True))
            threads[-1].start()
            while sum(map(len, turns._waiting.values())) < number:
                threading.Event().wait(0.001)
    for thread in threads:
        thread.join(30)
    return order


def test_a_visitor_with_many_questions_does_not_keep_the_others_waiting():
    assert queued(Turns(), "aaaabbc") == ["a", "b", "c", "a", "b", "a", "a"]


def test_nobody_queues_without_end():
    turns = Turns(waiting_of_one=2, waiting_in_all=3)
    refused = []

    def take(visitor):
        try:
            with turns.turn(visitor):
                pass
        except UserError as error:
            refused.append(str(error))

    with turns.turn("holder"):
        threads = []
        for number, visitor in enumerate("aab", start=1):
            threads.append(threading.Thread(target=take, args=(visitor,), daemon=True))
            threads[-1].start()
            while sum(map(len, turns._waiting.values())) < number:
                threading.Event().wait(0.001)
        take("a")
        take("c")
    for thread in threads:
        thread.join(30)
    assert ["2 questions of yours" in refused[0], "3 questions wait" in refused[1]] == [True, True]
    with turns.turn("a"):
        pass


def test_a_turn_that_fails_is_over():
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns.turn("a"):
        raise ZeroDivisionError
    with turns.turn("b"):
        pass
