"""A protocol: what a run asks and how its report decides, written down before any answer is seen.

A ``Design`` is what a command does, told by the command itself; a ``FrozenProtocol`` is a file that
says what it must be. A run is held to its protocol before anything is paid for, and its record
carries the file's SHA-256. Refuses to know when the file was written: publish the hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from persona_lora.core.errors import UserError, nearest_names
from persona_lora.core.runs import first_difference
from persona_lora.core.settings import read_yaml, typed_fields

LEVEL = 0.95
LEAST_SCORED = 0.8
Held = Literal[
    "evaluate",
    "sweep",
    "compare",
    "predict-finetuning",
    "compare-prevention",
    "optimize",
    "compare-methods",
]
REMEDY = "run what it says, or leave out --protocol: then the run is exploratory"


@dataclass(frozen=True)
class Design:
    """What a run asks, and how what it finds is decided.

    ``questions`` are how many are asked, by what they are; ``family`` names the comparisons whose
    p values are corrected together. Units, test and correction are those of the command's report.
    """

    command: Held
    questions: dict[str, int]
    family: tuple[str, ...] = ()
    seeds: int = 1
    units: str = "questions"
    test: str = "sign-flip"
    correction: str = "holm"
    level: float = LEVEL

    @classmethod
    def of(
        cls, command: Held, questions: Mapping[str, int], family: tuple[str, ...], seeds: int = 1
    ) -> Self:
        """Return a design with the units and the test that the report of the command has."""
        units, test = "questions", "sign-flip"
        if command == "predict-finetuning":
            units, test = "data sets", "permutation"
        elif command == "optimize":
            units = "prompts"
        elif command == "compare-methods" and seeds == 1:
            units = "personas"
        elif command == "compare-methods":
            units, test = "personas and seeds", "two-way t"
        elif seeds > 1:
            units, test = "questions and seeds", "two-way t"
        return cls(command, dict(questions), tuple(sorted(family)), seeds, units, test)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as a file holds them."""
        return {**asdict(self), "family": list(self.family)}


@dataclass(frozen=True)
class FrozenProtocol(Design):
    """A design that a run must have, and what else is fixed of it.

    ``settings`` are values of the run's recorded configuration; ``least_scored`` is the share of
    its questions that must be scored under every condition for the run to count as done.
    """

    least_scored: float = LEAST_SCORED
    settings: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", tuple(sorted(self.family)))
        usual = Design.of(self.command, self.questions, self.family, self.seeds).as_dict()
        frozen = self.as_dict()
        found = first_difference({name: frozen[name] for name in usual}, usual)
        if found is not None:
            raise UserError(
                f"the report of {self.command} cannot do what the protocol says ({found}); "
                "the second is what it does"
            )
        if not self.questions or min(*self.questions.values(), self.seeds, 1) < 1:
            raise UserError("a protocol needs questions and at least one seed; name how many")
        if not 0 < self.least_scored <= 1:
            raise UserError(f"least_scored must be in (0, 1], got {self.least_scored:g}")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file of exactly these fields; UserError for one that lacks or has another."""
        values, known = read_yaml(path), [each.name for each in fields(cls)[:-1]]
        for name in values:
            if name not in known:
                raise UserError(f"{path}: no field {name!r}; {nearest_names(name, known)}")
        lacking = [name for name in known if name not in values]
        if lacking:
            raise UserError(f"{path} does not say {lacking[0]}; a protocol says everything")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return cls(**typed_fields(cls, values, f"{path}: "), sha256=digest)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as a file holds them: without the file's own hash."""
        return {name: each for name, each in super().as_dict().items() if name != "sha256"}

    def hold(
        self, design: Design | None, config: Mapping[str, Any], later: Collection[str] = ()
    ) -> dict[str, Any]:
        """Return what the record of a run keeps of it; UserError for a run that does otherwise.

        ``later`` are settings that are not known yet, and are held when the run begins.
        """
        if design is None:
            raise UserError("this run cannot be held to a protocol; leave out --protocol")
        frozen, does = self.as_dict(), design.as_dict()
        found = first_difference({name: frozen[name] for name in does}, does)
        for name, value in self.settings.items():
            if name not in config and name in later:
                continue
            if name not in config:
                raise UserError(f"the run has no setting {name!r}; {nearest_names(name, config)}")
            found = found or first_difference(value, config[name], name)
        if found is not None:
            raise UserError(f"the protocol says otherwise ({found}); {REMEDY}")
        return {"sha256": self.sha256, **frozen}
