"""Strength in one unit: how many nats a token a direction moves its model, and how far that is.

A coefficient says how much of a diff or vector is taken, which means another thing for every one of
them; KL(p₀ ‖ p) of the next token, on the same ordinary text, means the same for all. ``calibrate``
measures it at some coefficients of both signs and keeps them beside the direction. "0.05nat" then
is the coefficient at which the model moves by 0.05 nats a token, "-0.05nat" that with a minus.
Beside it stands how coherent answers are; what lies beyond the last coherent one is warned of.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from persona_lora.core.errors import UserError
from persona_lora.core.files import read_json, write_json

logger = logging.getLogger(__name__)

TOLD = (-0.05, 0.05)  # nats
_TEXT = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*nats?")


@dataclass(frozen=True)
class Nats:
    """A strength: nats a token, with the sign of the coefficient."""

    value: float

    @classmethod
    def read(cls, text: Any) -> Self:
        """Read "0.05nat" or "-0.05nats"; ValueError for anything else."""
        found = _TEXT.fullmatch(text.strip()) if isinstance(text, str) else None
        if found is None:
            raise ValueError("expected nats a token, as in 0.05nat")
        return cls(float(found[1]))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Let a value of this type be written as text."""
        text = core_schema.str_schema(pattern=r"nats?$")
        return core_schema.no_info_plain_validator_function(cls.read, json_schema_input_schema=text)


Strength = float | Nats


def read_strength(text: str) -> Strength:
    """Read "-1.5" or "0.05nat"; ValueError for anything else."""
    try:
        return Nats.read(text)
    except ValueError:
        return float(text)


def refuse_nats_of(name: str, value: Any) -> None:
    """UserError for nats where ``name`` takes numbers alone."""
    if isinstance(value, str) and _TEXT.fullmatch(value.strip()):
        raise UserError(
            f"{name} takes no nats, got {value!r}: they are for coefficients of directions "
            "that calibrate measured (docs/concepts.md); give a number"
        )


def acting_at(layers: Sequence[int], positions: str) -> str:
    """Return where a vector acts, in words."""
    return f"layers {','.join(map(str, sorted(layers)))}, {positions} tokens"


class Moved(NamedTuple):
    """What one coefficient does: the mean and the 95th percentile of KL over tokens, in nats.

    ``low`` and ``high`` are the 95% interval of the mean over prompts; None where there was one, or
    none was measured. ``coherence`` is the mean of answers there, 0–100; None where it was not
    judged.
    """

    coefficient: float
    nats: float
    nats_p95: float
    low: float | None = None
    high: float | None = None
    coherence: float | None = None


@dataclass(frozen=True)
class Strengths:
    """What was measured of a direction: ``content`` is its digest, ``acting`` where a vector acts.

    ``points`` are of both signs. ``floor`` is the least mean coherence of answers that still make
    sense; None where coherence was not judged. ``weighted_norm`` is ‖ΔW‖ weighted by what flows
    through the modules of a diff, for a coefficient of 1; None where that was not measured.
    """

    content: str
    acting: str
    prompts: str
    points: tuple[Moved, ...]
    floor: float | None = None
    weighted_norm: float | None = None

    def coherent(self) -> tuple[float, float]:
        """Return the coefficients of both signs up to which answers are coherent.

        0 where none is; without an end where coherence was not judged.
        """
        if self.floor is None:
            return -math.inf, math.inf
        low, high = (self._last_coherent(sign, self.floor) for sign in (-1.0, 1.0))
        return low, high

    def _last_coherent(self, sign: float, floor: float) -> float:
        """Return where coherence falls under the floor: between two points, log-linearly."""
        last, before = 0.0, floor
        for point in self.of(sign):
            if point.coherence is None or (point.coherence < floor and not last):
                break
            if point.coherence < floor:
                share = (before - floor) / (before - point.coherence)
                return last * (point.coefficient / last) ** share
            last, before = point.coefficient, point.coherence
        return last

    def coherent_line(self) -> str:
        """Return the same in words, and where it ends only because the measurement does."""
        if self.floor is None:
            return "whether answers are coherent was not judged"
        low, high = self.coherent()
        ends = {point.coefficient for sign in (-1.0, 1.0) for point in self.of(sign)[-1:]}
        far = " (as far as was measured)"
        said = (f"{each:+.3g}{far * (each in ends)}" for each in (low, high))
        return "coherent from {} to {}".format(*said)

    def coefficient(self, strength: float, name: str) -> float:
        """Return the coefficient for so many nats, 0 for 0, by log-linear interpolation.

        Under the least that was measured KL grows as c². UserError above the most, and where no
        coefficient of that sign did anything: ``name`` is what the direction is called.
        """
        nats, sign = abs(strength), -1.0 if strength < 0 else 1.0
        if nats == 0:
            return 0.0
        rising = self._rising(sign)
        if not rising:
            raise UserError(
                f"{name} does nothing there as far as was measured, got {strength:g}nat; ask for "
                "the other sign, or give a coefficient"
            )
        if nats > rising[-1].nats * (1 + 1e-9):
            raise UserError(
                f"{name} was measured up to {sign * rising[-1].nats:.3g}nat, got {strength:g}nat; "
                "ask for less (beyond it more does not move the model further)"
            )
        first, nats = rising[0], min(nats, rising[-1].nats)
        if nats <= first.nats:
            return first.coefficient * math.sqrt(nats / first.nats)
        low, high = next(pair for pair in pairwise(rising) if nats <= pair[1].nats)
        share = math.log(nats / low.nats) / math.log(high.nats / low.nats)
        return low.coefficient * (high.coefficient / low.coefficient) ** share

    def of(self, sign: float) -> list[Moved]:
        """Return the points of one sign, nearest first."""
        own = (point for point in self.points if point.coefficient * sign > 0)
        return sorted(own, key=lambda point: abs(point.coefficient))

    def _rising(self, sign: float) -> list[Moved]:
        """Return the points of one sign that do anything, nearest first, as far as KL rises."""
        own = [point for point in self.of(sign) if point.nats > 0]
        kept = own[:1]
        for point in own[1:]:
            if point.nats <= kept[-1].nats:
                break
            kept.append(point)
        return kept

    def save(self, direction: Path) -> Path:
        """Write the file that belongs to a direction; return its path."""
        path = file_beside(direction)
        write_json(path, self.to_json())
        return path

    def to_json(self) -> dict[str, Any]:
        """Return what ``of_json`` reads."""
        return {**asdict(self), "points": [each._asdict() for each in self.points]}

    @classmethod
    def of_json(cls, value: Any, path: Path) -> Self:
        """Return the strengths that ``path`` holds; UserError where they are none."""
        try:
            points = tuple(
                Moved(
                    float(each["coefficient"]),
                    float(each["nats"]),
                    float(each["nats_p95"]),
                    _judged(each.get("low")),
                    _judged(each.get("high")),
                    _judged(each["coherence"]),
                )
                for each in value["points"]
            )
            return cls(
                *(value["content"], value["acting"], value["prompts"], points),
                floor=_judged(value["floor"]),
                weighted_norm=_judged(value.get("weighted_norm")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} holds no strengths; make it anew with calibrate") from error


def file_beside(direction: Path) -> Path:
    """Return where the strengths of a diff's folder, or of a vector's file, are kept: beside it."""
    whole = direction if direction.name else direction.resolve()  # "." has no name
    return whole.with_name(f"{whole.name}.strength.json")


def coefficient_of(strength: Strength, direction: Path, content: str, acting: str = "") -> float:
    """Return the coefficient that a strength is for a direction at a path; UserError as below."""
    return coefficients_of([strength], direction, content, acting)[0]


OfNats = Callable[[Nats], float]  # the coefficient that nats are, of one direction


def coefficients_of(
    strengths: Sequence[Strength], direction: Path, content: str, acting: str = ""
) -> tuple[float, ...]:
    """Return the coefficients that strengths are for a direction at a path.

    UserError for nats that were not measured, or for another direction, layers or positions. What
    lies beyond the coherent range, where that was measured, is warned of.
    """
    plain = tuple(each for each in strengths if not isinstance(each, Nats))
    try:
        found = read_strengths(direction, content, acting)
    except UserError:
        if len(plain) < len(strengths):
            raise
        return plain
    values = tuple(
        found.coefficient(each.value, str(direction)) if isinstance(each, Nats) else each
        for each in strengths
    )
    low, high = found.coherent()
    known = filter(math.isfinite, values)
    beyond = [f"{each:+.3g}" for each in known if not low <= each <= high]
    if beyond:
        logger.warning(
            "%s is %s, as calibrate measured it, and no further: %s",
            *(direction, found.coherent_line(), ", ".join(beyond)),
        )
    return values


def strength_line(direction: Path, content: str) -> str:
    """Return in words what was measured of a direction at a path; "" where nothing was."""
    try:
        found = read_strengths(direction, content)
        at = ", ".join(f"{n:+g}nat at {found.coefficient(n, str(direction)):+.3g}" for n in TOLD)
    except UserError:
        return ""
    return f"{at}; {found.coherent_line()}"


def read_strengths(direction: Path, content: str, acting: str = "") -> Strengths:
    """Return what was measured of a direction at a path; UserError where nothing was."""
    path = file_beside(direction)
    remedy = f"measure them with: persona-lora calibrate, on {direction}"
    if not path.is_file():
        raise UserError(f"nats of {direction} were not measured; {remedy}")
    found = Strengths.of_json(read_json(path), path)
    if found.content != content:
        raise UserError(f"{path} is of another direction than what lies there now; {remedy}")
    if found.acting != acting:
        raise UserError(
            f"{path} was measured for a vector acting at {found.acting}, and it acts at {acting} "
            f"here; {remedy}"
        )
    return found


def _judged(value: Any) -> float | None:
    return None if value is None else float(value)
