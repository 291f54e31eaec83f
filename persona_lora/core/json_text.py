"""JSON from strangers: what the standard's reader lets through and nothing after it can hold.

Python's reader takes NaN, reads 1e999 as infinity, keeps the last of two equal keys, and makes a
string of half an emoji that no tokenizer and no file takes. Here each is an error with its place.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NoReturn

from persona_lora.core.errors import UserError

DEEPEST = 64  # levels; nothing that is read here has ten
LONGEST_NUMBER = 40  # characters of a whole number
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # as it is written
_LONE = re.compile(r"[\ud800-\udfff]")  # as it is read, where its other half is missing


def parse_json(text: str, where: str) -> Any:
    """Return the value of a JSON text.

    Raises UserError, beginning with ``where``, for a mistake in it.

    A mistake of form is named by line and column where the text has several lines. Refused too:
    NaN and infinity, numbers out of range, a key given twice, lone surrogates, absurd depth.
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f":{error.lineno}:{error.colno}" if "\n" in text.strip() else ""
        raise UserError(f"{where}{place} is not valid JSON: {error.msg}; mend that line") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply; {DEEPEST} levels are allowed") from error
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if _HALF_PAIR.search(text) or text.count("[") + text.count("{") > DEEPEST:
        _check(value, where)
    return value


def read_reply_json(text: str) -> Any:
    """Return the value of JSON that a server sent, with U+FFFD for each half of a character.

    A reply that was cut inside an emoji ends in one. Raises ValueError and RecursionError as
    ``json.loads`` does.
    """
    value = json.loads(text)
    if not _HALF_PAIR.search(text):
        return value
    halves = json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass")
    return json.loads(halves.decode("utf-16", "replace"))


def as_json(sources: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is said of something's sources; UserError for what JSON cannot hold."""
    try:
        json.dumps(dict(sources), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"sources are written as JSON (texts, numbers, lists, objects): {error}; use str(…) of "
            "a path, and float(…) of a number of numpy or torch"
        ) from error
    return dict(sources)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} stands twice in one object; keep one")
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number; leave the value out, or write null")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:LONGEST_NUMBER]} is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} digits is too large")
    return int(text)


def _check(value: Any, where: str) -> None:
    """Raise UserError for text that is not Unicode, and for more levels than are allowed."""
    level = [value]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, str) and _LONE.search(each):
                raise UserError(
                    f"{where}: {ascii(each)[:60]} holds half of a character (a lone surrogate), "
                    "as text cut inside an emoji does; mend or drop that row"
                )
            if isinstance(each, dict):
                inner += [*each.keys(), *each.values()]
            elif isinstance(each, list):
                inner += each
        level = inner
        if not level:
            return
    raise UserError(f"{where} is nested too deeply; {DEEPEST} levels are allowed")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_no_number, parse_float=_finite, parse_int=_whole
)
