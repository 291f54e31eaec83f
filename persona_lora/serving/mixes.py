"""Personas by model names: "base", "base+0.8*formality-1*evil", or the name of a saved mix.

Knows names and coefficients; refuses to know what is steered with them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from persona_lora.core.errors import UserError, nearest_names
from persona_lora.core.personas import Coefficients, saved_mixes

BASE = "base"
TERM = re.compile(r"([+-](?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\*")
LIKE = f"{BASE}+0.8*formality-1*evil"


class UnknownPersona(UserError):
    """A model name that nothing is served under."""


@dataclass(frozen=True)
class Personas:
    """What may stand in a request's ``model``: mixes of ``traits``, and mixes in a folder."""

    traits: tuple[str, ...]
    folder: Path

    def names(self) -> list[str]:
        """Return "base", each trait alone, and the saved mixes that can be served now."""
        alone = [f"{BASE}+1*{trait}" for trait in self.traits]
        return [BASE, *alone, *(name for name in saved_mixes(self.folder) if self._served(name))]

    def mix(self, name: str) -> list[float]:
        """Return a persona's coefficients in the order of the traits.

        UnknownPersona for a name or trait that is not here; UserError for a mix that is malformed
        or out of bounds.
        """
        if name == BASE or name.startswith((f"{BASE}+", f"{BASE}-")):
            found = _parsed(name)
        elif name in saved_mixes(self.folder):
            found = Coefficients.read(self.folder / f"{name}.json")
        else:
            known = nearest_names(name, self.names())
            raise UnknownPersona(
                f"no persona {name!r}: name a mix, as in {LIKE}, or a saved one ({known})"
            )
        for trait in found.traits:
            if trait not in self.traits:
                raise UnknownPersona(
                    f"{name}: no trait {trait!r} is served; {nearest_names(trait, self.traits)}"
                )
        values = found.bounded().as_dict()
        return [values.get(trait, 0.0) for trait in self.traits]

    def _served(self, name: str) -> bool:
        try:
            self.mix(name)
        except (UserError, OSError):
            return False
        return True


def _parsed(name: str) -> Coefficients:
    """Read a mix from its name."""
    begin, *parts = TERM.split(name.removeprefix(BASE))
    numbers, traits = parts[::2], parts[1::2]
    if begin or not all(traits):
        raise UserError(f"{name!r} is no mix; write it like {LIKE}: a sign, a number, *, a trait")
    twice: Sequence[str] = [trait for trait in traits if traits.count(trait) > 1]
    if twice:
        raise UserError(f"{name!r} names {twice[0]} twice; add its coefficients up")
    return Coefficients.of({trait: float(n) for trait, n in zip(traits, numbers, strict=True)})
