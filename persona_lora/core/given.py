"""What callers of the library give: one thing or several, numbers of Python, numpy and torch alike.

Knows no type of ours.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from persona_lora.core.errors import UserError


def items_of(given: Any) -> list[Any] | None:
    """Return the items of what has some; None for a single thing, as a text and a number are."""
    single = isinstance(given, str) or getattr(given, "ndim", None) == 0
    return list(given) if isinstance(given, Iterable) and not single else None


def several(given: Any) -> list[Any]:
    """Return a list of what is given, be it one thing or several of them."""
    items = items_of(given)
    return [given] if items is None else items


def whole_numbers(given: int | Iterable[int], what: str) -> list[int]:
    """Return one whole number or several; UserError, beginning with ``what``, for anything else."""
    try:
        return [operator.index(each) for each in several(given)]
    except TypeError as error:
        raise UserError(
            f"{what} must be whole numbers, as 16 or [10, 20], got {repr(given)[:80]}"
        ) from error
