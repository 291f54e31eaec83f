"""Personas by model names: "base", "base+0.8*formality-0.05nat*evil", or a saved mix's name.

Knows names and coefficients; refuses to know what is steered with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from persona_lora.core.errors import UserError, nearest_names
from persona_lora.core.personas import Coefficients, saved_mixes
from persona_lora.core.strength import Nats, OfNats, Strength, read_strength

BASE = "base"
TERM = re.compile(r"([+-](?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?:nats?)?)\*")
LIKE = f"{BASE}+0.8*formality-1*evil"


class UnknownPersona(UserError):
    """A model name that nothing is served under."""


@dataclass(frozen=True)
class Personas:
    """What may stand in a request's ``model``: mixes of ``traits``, and mixes in a folder.

    ``of_nats`` makes coefficients of nats, by trait.
    """

    traits: tuple[str, ...]
    folder: Path
    of_nats: Mapping[str, OfNats] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Return "base", each trait alone, and the saved mixes that can be served now."""
        alone = [f"{BASE}+1*{trait}" for trait in self.traits]
        out = self.left_out()
        return [BASE, *alone, *(name for name in saved_mixes(self.folder) if name not in out)]

    def left_out(self) -> dict[str, str]:
        """Return why saved mixes cannot be served, by name; nothing of those that can."""
        found = {}
        for name in saved_mixes(self.folder):
            try:
                self.mix(name)
            except (UserError, OSError) as error:
                found[name] = str(error)
        return found

    def mix(self, name: str) -> list[float]:
        """Return a persona's coefficients in the order of the traits.

        UnknownPersona for a name or trait that is not here; UserError for a mix that is malformed
        or, in a name, out of bounds, which for nats are those that were measured. A saved mix has
        none: a search measured it, and parts of diffs take larger coefficients than whole ones.
        """
        found: Mapping[str, Strength]
        named = name == BASE or name.startswith((f"{BASE}+", f"{BASE}-"))
        if named:
            found = _parsed(name)
        elif name in saved_mixes(self.folder):
            found = Coefficients.read(self.folder / f"{name}.json").as_dict()
        else:
            known = nearest_names(name, self.names())
            raise UnknownPersona(
                f"no persona {name!r}: name a mix, as in {LIKE}, or a saved one ({known})"
            )
        for trait in found:
            if trait not in self.traits:
                raise UnknownPersona(
                    f"{name}: no trait {trait!r} is served; {nearest_names(trait, self.traits)}"
                )
        plain = {trait: each for trait, each in found.items() if not isinstance(each, Nats)}
        mix = Coefficients.of(plain)
        values = (mix.bounded() if named else mix).as_dict()
        for trait, each in found.items():
            if isinstance(each, Nats):
                if trait not in self.of_nats:
                    raise UserError(f"nats of {trait} are not served here; give a coefficient")
                values[trait] = self.of_nats[trait](each)
        return [values.get(trait, 0.0) for trait in self.traits]


def _parsed(name: str) -> dict[str, Strength]:
    """Read a mix from its name."""
    begin, *parts = TERM.split(name.removeprefix(BASE))
    numbers, traits = parts[::2], parts[1::2]
    if begin or not all(traits):
        raise UserError(f"{name!r} is no mix; write it like {LIKE}: a sign, a number, *, a trait")
    twice: Sequence[str] = [trait for trait in traits if traits.count(trait) > 1]
    if twice:
        raise UserError(f"{name!r} names {twice[0]} twice; add its coefficients up")
    return {trait: read_strength(each) for trait, each in zip(traits, numbers, strict=True)}
