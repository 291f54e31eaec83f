"""Items scored under several conditions, paired item by item with one of them.

A row is one item of one task: ``condition``, ``task``, ``metric``, ``item`` and ``score``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from persona_lora.report.resampling import Interval, bootstrap_mean, holm, sign_flip_p

COLUMNS = ("condition", "task", "metric", "score", "low", "high", "n", "difference",
           "difference_low", "difference_high", "p", "p_holm")  # fmt: skip
TOLD_BY_TASK = ("score", "nats")  # metrics that a task's name says


@dataclass(frozen=True)
class TaskScore:
    """One task under one condition, with the paired difference from the unsteered model.

    Scores are means over items: accuracies, or for "perplexity" the mean log-probability of a
    token (nats; larger is better, and e^−score is the perplexity).
    """

    condition: str
    task: str
    metric: str
    score: Interval
    difference: Interval | None
    p: float | None
    p_holm: float | None = None

    @property
    def measure(self) -> str:
        """The task, and its metric where the task's name does not say it."""
        return self.task if self.metric in TOLD_BY_TASK else f"{self.task}: {self.metric}"


def score_items(rows: Sequence[Mapping[str, Any]], reference: str) -> list[TaskScore]:
    """Return every task's score under every condition, paired by item with the reference."""
    by_place: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in rows:
        place = (row["condition"], row["task"], row["metric"])
        by_place.setdefault(place, {})[row["item"]] = float(row["score"])
    found = []
    for (condition, task, metric), items in by_place.items():
        difference, p = None, None
        theirs = by_place.get((reference, task, metric))
        if condition != reference and theirs is not None:
            gaps = {item: items[item] - theirs[item] for item in items if item in theirs}
            difference = bootstrap_mean({item: [gap] for item, gap in gaps.items()})
            p = sign_flip_p(np.array(list(gaps.values())))
        score = bootstrap_mean({item: [value] for item, value in items.items()})
        found.append(TaskScore(condition, task, metric, score, difference, p))
    corrected = holm([each.p for each in found])
    return [
        TaskScore(e.condition, e.task, e.metric, e.score, e.difference, e.p, adjusted)
        for e, adjusted in zip(found, corrected, strict=True)
    ]


def cells_of(each: TaskScore) -> dict[str, Any]:
    """Return a score as a row of a table of ``COLUMNS``."""
    gap = each.difference
    return {
        "condition": each.condition,
        "task": each.task,
        "metric": each.metric,
        "score": each.score.mean,
        "low": each.score.low,
        "high": each.score.high,
        "n": each.score.n,
        "difference": None if gap is None else gap.mean,
        "difference_low": None if gap is None else gap.low,
        "difference_high": None if gap is None else gap.high,
        "p": each.p,
        "p_holm": each.p_holm,
    }
