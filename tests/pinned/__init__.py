"""Numbers that stay: what a function gave before is in a JSON file beside this one.

``PINNED=write`` writes them anew, after a change that is meant: look at the file's difference.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what stands inside nested values, each with its place."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in pairs:
            yield from leaves(each, f"{place}/{key}")
    else:
        yield place, value


def hold(name: str, found: Any) -> None:
    """Hold plain nested values against those of the file; what it does not have yet is let pass."""
    file, found = HERE / f"{name}.json", json.loads(json.dumps(found))
    if os.environ.get("PINNED") == "write":
        file.write_text(json.dumps(found, indent=0, sort_keys=True, ensure_ascii=False) + "\n")
    now = dict(leaves(found))
    for place, was in leaves(json.loads(file.read_text())):
        assert place in now, f"{name}: {place} is gone; it was {was!r}"
        numbers = all(isinstance(each, int | float) for each in (was, now[place]))
        same = was == now[place] and isinstance(was, bool) == isinstance(now[place], bool)
        if numbers and isinstance(was, float):
            same = math.isclose(was, now[place], rel_tol=1e-6, abs_tol=1e-9)
        assert same, f"{name}: {place} is {now[place]!r}; it was {was!r}"
