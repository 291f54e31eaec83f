"""Failures in a row, and when they end the work: a dead endpoint is not asked ten thousand times.

Knows what became of replies; refuses to know what they were to.
"""

from __future__ import annotations

from typing import Literal

from persona_lora.core.errors import UserError

FAULTS_IN_A_ROW = 5
FORMLESS_IN_A_ROW = 20

Outcome = Literal["good", "about the text", "formless", "fault", "lasting"]
"""What became of one reply.

"about the text": there is none because of what was asked (a refusal, a filter); "formless": the
model answered, but not in the form that was asked for; "fault": the endpoint failed, after all
retries; "lasting": every reply will lack the same.
"""


class Series:
    """The outcomes of one reader or writer over its life; ``kept`` counts the good ones.

    ``note`` raises UserError, with what is kept and how to go on, after five faults in a row,
    after twenty formless replies where none has ever been good, and at once for what lasts.
    """

    def __init__(self, name: str) -> None:
        self.kept = 0
        self._name = name
        self._faults = 0
        self._formless = 0

    def note(self, outcome: Outcome, reason: str) -> None:
        """Take one outcome into account; ``reason`` is why it is not good."""
        if outcome == "good":
            self.kept += 1
            self._faults = self._formless = 0
        elif outcome == "lasting" and not self.kept:
            self.stop(reason)
        elif outcome in ("fault", "lasting"):
            self._faults += 1
            if self._faults >= FAULTS_IN_A_ROW:
                self.stop(f"{self._name} failed {self._faults} times in a row: {reason}")
        elif outcome == "formless":
            self._formless += 1
            if self._formless >= FORMLESS_IN_A_ROW and not self.kept:
                self.stop(f"none of {self._formless} replies of {self._name} is usable: {reason}")

    def stop(self, reason: str) -> None:
        """Raise UserError with what is kept; a later call starts a new series."""
        self._faults = self._formless = 0
        kept = f"kept so far: {self.kept}; " if self.kept else ""
        raise UserError(f"{reason}; {kept}the same command goes on from here once that is mended")
