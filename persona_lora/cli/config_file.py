"""Options of a command from a YAML file, and back: its values stand in for the defaults.

Flags override the file. Every run that a command opens gets the options it was given as
``config.yaml``, so that it can be given again.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
import yaml
from typer.core import TyperOption

from persona_lora.core.errors import UserError, nearest_names, without_secrets
from persona_lora.core.resources import resource_path
from persona_lora.core.runs import COMMAND_CONFIG
from persona_lora.core.settings import read_yaml

MAPPING = "JSON"  # how --help calls the value of a mapping of anything
PAIRS = "NAME=VALUE,…"
NEVER_WRITTEN = ("config", "overwrite")  # a run that is given again replaces nothing


def read_defaults(context: typer.Context, path: Path | None) -> Path | None:
    """Take the file's values as the command's defaults.

    Keys are option names (``max_iterations`` or ``max-iterations``), one level of sections is
    only for the reader. UserError for a file that is none, a key that the command has not, and a
    key given twice.
    """
    if path is None or context.resilient_parsing:
        return path
    path = resource_path(path)
    parameters = {str(each.name): each for each in context.command.params if each.name != "config"}
    whole = {name for name, each in parameters.items() if each.metavar in (MAPPING, PAIRS)}
    found: dict[str, Any] = {}
    for key, value in _flat(read_yaml(path), whole):
        name = key.replace("-", "_")
        if name not in parameters:
            raise UserError(f"{path}: no option {key!r}; {nearest_names(name, parameters)}")
        if name in found:
            raise UserError(f"{path} gives {key!r} twice")
        found[name] = _as_flag(parameters[name], value, f"{path}: {key}")
    context.default_map = {**(context.default_map or {}), **found}
    return path


def _as_flag(parameter: Any, value: Any, name: str) -> Any:
    """Return a value in the form that flags give: text, or a list of it where one repeats.

    A list for an option that does not repeat is its text: ``layers: [10, 20]`` is "10,20".
    """
    if isinstance(value, Mapping):
        if parameter.metavar == MAPPING:
            return json.dumps(dict(value))
        if parameter.metavar == PAIRS:
            return [f"{each}={number}" for each, number in value.items()]
        raise UserError(f"{name} must be one value or a list, got a mapping")
    items = value if isinstance(value, list) else [value]
    is_switch = isinstance(parameter, TyperOption) and parameter.is_flag
    if any(isinstance(each, bool) != is_switch or isinstance(each, list | dict) for each in items):
        wanted = "true or false" if is_switch else "text or a number"
        raise UserError(f"{name} must be {wanted}, got {value!r}")
    if is_switch:
        return value
    repeats = parameter.multiple if isinstance(parameter, TyperOption) else parameter.nargs == -1
    return list(map(str, items)) if repeats else ",".join(map(str, items))


def _flat(values: Mapping[str, Any], taken_whole: Container[str]) -> list[tuple[str, Any]]:
    """Return the pairs of a file, those of its sections in place of these; without empty ones.

    A mapping under one of ``taken_whole`` is no section.
    """
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        whole = str(key).replace("-", "_") in taken_whole or not isinstance(value, Mapping)
        inner = [(key, value)] if whole else value.items()
        pairs += [(str(name), each) for name, each in inner if each is not None]
    return pairs


@contextmanager
def recorded(context: typer.Context) -> Iterator[None]:
    """Let every run that is opened inside hold the command's options as its ``config.yaml``."""
    command = " ".join(context.command_path.split()[1:])
    first = f"# persona-lora {command} --config config.yaml\n"
    token = COMMAND_CONFIG.set(first + yaml.safe_dump(_values(context), allow_unicode=True))
    try:
        yield
    finally:
        COMMAND_CONFIG.reset(token)


def _values(context: typer.Context) -> dict[str, Any]:
    values = {
        name: _plain(value)
        for name, value in context.params.items()
        if name not in NEVER_WRITTEN and value is not None and value != [] and value != ()
    }
    return dict(sorted(values.items()))


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, str | Path):
        return without_secrets(str(value))
    return value
