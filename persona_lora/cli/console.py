"""What the commands show: progress bars, and the cells of their tables."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from persona_lora.judges.choice import Report
    from persona_lora.report.resampling import Interval

# In a file or a pipe there is no window to fit: rows are kept whole.
PIPED_WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
console = Console(width=PIPED_WIDTH)


@contextmanager
def progress() -> Iterator[Report]:
    """Yield a callback that shows one bar for every stage of the work."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def interval_cells(interval: Interval) -> list[str]:
    from persona_lora.report import wording

    return [
        wording.number(interval.mean, 1),
        f"{wording.number(interval.low, 1)} … {wording.number(interval.high, 1)}",
        str(interval.n_questions),
        f"{interval.n}/{round(interval.n / interval.coverage)}" if interval.coverage else "0",
    ]
