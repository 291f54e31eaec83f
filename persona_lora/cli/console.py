"""What the commands show: progress bars and tables."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
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
from persona_lora.core.errors import UserError

if TYPE_CHECKING:
    from persona_lora.report import sections

# In a file or a pipe there is no window to fit: rows are kept whole.
WINDOW = sys.stdout is not None and sys.stdout.isatty()  # None: it was closed
PIPED_WIDTH = None if WINDOW or "COLUMNS" in os.environ else 120
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


def show(*said: sections.Table | str) -> None:
    """Print tables and lines."""
    for each in said:
        console.print(each if isinstance(each, str) else to_rich(each), markup=False)


def show_exactly(text: str) -> None:
    """Print what a program reads; UserError where the encoding has not all of it."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError as error:
        raise UserError(
            f"standard output is in {encoding}, which has no {text[error.start]!r}, and what is "
            "printed is for a program; set PYTHONIOENCODING=utf-8"
        ) from error
    sys.stdout.write(text + "\n")


def to_rich(table: sections.Table) -> Table:
    """Return a table of a report as the terminal shows it: headings on one line, no colours.

    Cells are folded where they do not fit: names may differ at their ends only.
    """
    shown = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=table.title or None,
        title_justify="left",
    )
    for heading in table.headings:
        shown.add_column(heading, overflow="fold")
    for row in table.rows:
        shown.add_row(*(cell or "" for cell in row))
    return shown
