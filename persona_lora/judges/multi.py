"""Several judges at once: their mean, and how far they disagree.

Knows verdicts; refuses to know how each judge comes to its own.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from persona_lora.core.chat import Exchange, Verdict
from persona_lora.core.errors import UserError
from persona_lora.judges.judging import Judge, rank_correlation


class Disagreement(NamedTuple):
    """How two judges differ over the ``n`` items that both scored.

    ``mean_absolute_difference`` is in points of 100. It and Spearman's ρ are None where they are
    undefined.
    """

    first: str
    second: str
    mean_absolute_difference: float | None
    spearman: float | None
    n: int


class MultiJudge:
    """The mean of several judges' scores, over those that scored.

    A verdict's reason lists each judge's score, then their range and standard deviation (of the
    judges at hand, not of a population); for a judge that did not score it says why.
    """

    def __init__(self, judges: Sequence[Judge]) -> None:
        names = [judge.name for judge in judges]
        if not names or len(set(names)) < len(names):
            raise UserError(f"a multi-judge needs judges of different names, got {names}")
        self.judges = tuple(judges)

    @property
    def name(self) -> str:
        """The judges' names, joined by a plus sign."""
        return "multi:" + "+".join(judge.name for judge in self.judges)

    def judge(self, exchanges: Sequence[Exchange], criterion: str) -> list[Verdict]:
        """Return one mean verdict an exchange, in order."""
        by_judge = self.judge_each(exchanges, criterion)
        return [_mean_verdict(item, criterion, self.name) for item in zip(*by_judge, strict=True)]

    def judge_each(self, exchanges: Sequence[Exchange], criterion: str) -> list[list[Verdict]]:
        """Return each judge's own verdicts, one list a judge, for ``disagreements``."""
        return [judge.judge(exchanges, criterion) for judge in self.judges]


def disagreements(by_judge: Sequence[Sequence[Verdict]]) -> list[Disagreement]:
    """Compare every pair of judges, given each one's verdicts on the same items and criterion."""
    return [_disagreement(first, second) for first, second in itertools.combinations(by_judge, 2)]


def _disagreement(first: Sequence[Verdict], second: Sequence[Verdict]) -> Disagreement:
    both = [
        (one.score, other.score)
        for one, other in zip(first, second, strict=True)
        if one.score is not None and other.score is not None
    ]
    return Disagreement(
        first=first[0].judge if first else "",
        second=second[0].judge if second else "",
        mean_absolute_difference=(
            statistics.fmean(abs(one - other) for one, other in both) if both else None
        ),
        spearman=rank_correlation([one for one, _ in both], [other for _, other in both]),
        n=len(both),
    )


def _mean_verdict(verdicts: Sequence[Verdict], criterion: str, name: str) -> Verdict:
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    parts = [
        f"{verdict.judge}: "
        + (f"unscored ({verdict.reason})" if verdict.score is None else f"{verdict.score:.1f}")
        for verdict in verdicts
    ]
    if not scores:
        return Verdict(criterion, None, "; ".join(parts), name)
    spread = f"range {max(scores) - min(scores):.1f}, sd {statistics.pstdev(scores):.1f}"
    return Verdict(criterion, statistics.fmean(scores), "; ".join([*parts, spread]), name)
