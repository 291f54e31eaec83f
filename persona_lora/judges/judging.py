"""What a judge is, and several judges as one. Refuses to know how a judge comes to its scores."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Protocol

from persona_lora.core.chat import Exchange, Verdict
from persona_lora.core.errors import UserError


class Judge(Protocol):
    """Scores answers on a criterion: the name of the judge's trait, or ``COHERENCE``."""

    @property
    def name(self) -> str:
        """What verdicts carry as ``judge``."""

    def judge(self, exchanges: Sequence[Exchange], criterion: str) -> list[Verdict]:
        """Return one verdict per exchange, in order; raises UserError for an unknown criterion."""


class MultiJudge:
    """The mean of several judges' scores; None where one of them did not score.

    So all means are over the same judges. A verdict's reason lists each judge's score, then their
    range and standard deviation (of the judges at hand, not of a population); for a judge that did
    not score it says why.
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
        """Return one mean verdict per exchange, in order."""
        by_judge = [judge.judge(exchanges, criterion) for judge in self.judges]
        return [_mean_verdict(item, criterion, self.name) for item in zip(*by_judge, strict=True)]


def _mean_verdict(verdicts: Sequence[Verdict], criterion: str, name: str) -> Verdict:
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    parts = [
        f"{verdict.judge}: "
        + (f"unscored ({verdict.reason})" if verdict.score is None else f"{verdict.score:.1f}")
        for verdict in verdicts
    ]
    if len(scores) < len(verdicts):
        return Verdict(criterion, None, "; ".join(parts), name)
    spread = f"range {max(scores) - min(scores):.1f}, sd {statistics.pstdev(scores):.1f}"
    return Verdict(criterion, statistics.fmean(scores), "; ".join([*parts, spread]), name)
