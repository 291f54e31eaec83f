"""Progress: told to whoever listens, under the stage of the caller, and to nobody by default."""

from __future__ import annotations

import threading
from contextvars import copy_context

from persona_lora.core import progress


def count_to(total):
    for done in range(1, total + 1):
        progress.report(done, total)


def test_what_counts_reports_to_the_stage_of_its_caller(told):
    with progress.stage("outer"):
        count_to(1)
        with progress.stage("inner"):
            count_to(2)
        count_to(1)
    assert told == [("outer", 1, 1), ("inner", 1, 2), ("inner", 2, 2), ("outer", 1, 1)]


def test_without_a_stage_or_a_listener_nothing_is_told(told):
    count_to(2)
    with progress.stage("silenced"), progress.silent():
        count_to(2)
    assert told == []


def test_one_counter_for_many_calls_that_count_themselves(told):
    with progress.stage("all"), progress.counting() as count:
        for part in (1, 2):
            count_to(5)
            count(part, 2)
    assert told == [("all", 1, 2), ("all", 2, 2)]


def test_items_are_told_before_each_and_after_the_last(told):
    assert list(progress.over("items", "ab")) == ["a", "b"]
    assert told == [("items", 0, 2), ("items", 1, 2), ("items", 2, 2)]


def test_a_listener_hears_of_what_is_inside_alone():
    seen = []
    with progress.stage("work"):
        count_to(1)
        with progress.shown(lambda *at: seen.append(at)):
            count_to(1)
        count_to(1)
    assert seen == [("work", 1, 1)]


def test_a_thread_reports_where_its_context_is_copied(told):
    with progress.stage("thread"):
        for work in (count_to, copy_context().run):
            arguments = (1,) if work is count_to else (count_to, 1)
            thread = threading.Thread(target=work, args=arguments)
            thread.start()
            thread.join()
    assert told == [("thread", 1, 1)]
