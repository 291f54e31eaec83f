"""Values from files held to the types of the dataclasses that they fill."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from persona_lora.core.errors import UserError


def typed_value(hint: Any, value: Any, name: str) -> Any:
    """Return a value of the type of ``hint``: numbers in text are numbers, one item is a list.

    UserError names ``name`` and the value where it is of another type. A yes or no is no number,
    and a number is no text.
    """
    kinds = _kinds(hint)
    adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    tried = [value] if isinstance(value, list) or list not in kinds else [value, [value]]
    for each in tried:
        if isinstance(each, bool) and not {bool, Any} & kinds:
            continue
        try:
            return adapter.validate_python(each)
        except ValidationError:
            continue
    quotes = "; put text that looks like a number into quotes" if str in kinds else ""
    raise UserError(f"{name} must be {_expected(hint)}, got {_shortened(value)}{quotes}")


def typed_fields(group: type, values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the values of a dataclass's fields in the types of these; UserError as above."""
    hints = get_type_hints(group)
    defaults = {each.name: each.default for each in dataclasses.fields(group)}
    return {
        key: typed_value(hints[key], value, f"{name}{key}")
        if key in defaults and not (value is None and defaults[key] is None)
        else value
        for key, value in values.items()
    }


def _kinds(hint: Any) -> set[Any]:
    """Return the types that a hint allows, at its top level."""
    inner = [each for each in get_args(hint) if not isinstance(each, str)]
    if get_origin(hint) in (list, dict, tuple):
        return {get_origin(hint)}
    return set().union(*map(_kinds, inner)) if inner else {hint}


WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
}


def _expected(hint: Any) -> str:
    """Return what a hint allows, in words."""
    kinds = [hint] if get_origin(hint) in (list, tuple) else get_args(hint) or [hint]
    named = [
        f"a list of {_expected(get_args(kind)[0])}"
        if get_origin(kind) in (list, tuple)
        else WORDS.get(get_origin(kind) or kind, "")
        for kind in kinds
    ]
    return " or ".join(dict.fromkeys(filter(None, named))) or "one of its choices"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
