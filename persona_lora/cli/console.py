"""What the commands show: progress bars and tables."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from persona_lora.core import progress

if TYPE_CHECKING:
    from persona_lora.report.resampling import Interval

# In a file or a pipe there is no window to fit: rows are kept whole.
PIPED_WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
console = Console(width=PIPED_WIDTH)


@contextmanager
def progress_bars() -> Iterator[None]:
    """Show one bar for every stage of the work inside."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}
        adding = threading.Lock()

        def show(stage: str, done: int, total: int) -> None:
            with adding:  # judges report from threads of their own
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        with progress.shown(show):
            yield


def show_table(
    headings: str, rows: Iterable[Sequence[str]], *, title: str | None = None, fold: bool = False
) -> None:
    """Print a table; headings stand in one text with " | " between them.

    Cells are never cut, but folded where ``fold`` says so: names that differ at their ends.
    """
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left"
    )
    for heading in headings.split(" | "):
        table.add_column(heading, no_wrap=not fold, overflow="fold" if fold else "ellipsis")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def difference_cells(difference: Interval | None, p: float | None, digits: int) -> list[str]:
    """Return the cells of a paired difference and its p, empty for the reference."""
    from persona_lora.report import wording

    return [
        "" if difference is None else wording.interval(difference, digits),
        "" if p is None else wording.p_value(p),
    ]


def interval_cells(interval: Interval) -> list[str]:
    """Return mean, interval, number of questions and scored share."""
    from persona_lora.report import wording

    return [
        wording.number(interval.mean, 1),
        f"{wording.number(interval.low, 1)} … {wording.number(interval.high, 1)}",
        str(interval.n_questions),
        f"{interval.n}/{round(interval.n / interval.coverage)}" if interval.coverage else "0",
    ]
