"""Options of a command from a YAML file: its values stand in for the defaults, flags override."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
import yaml

from persona_lora.core.errors import UserError, nearest_names
from persona_lora.core.resources import resource_path


def read_defaults(context: typer.Context, path: Path | None) -> Path | None:
    """Take the file's values as the command's defaults.

    Keys are option names (``max_iterations`` or ``max-iterations``), one level of sections is
    only for the reader. UserError for a file that is none, a key that the command has not, and a
    key given twice.
    """
    if path is None or context.resilient_parsing:
        return path
    path = resource_path(path)
    names = {
        str(parameter.name) for parameter in context.command.params if parameter.name != "config"
    }
    found: dict[str, Any] = {}
    for key, value in _flat(_read(path)):
        name = key.replace("-", "_")
        if name not in names:
            raise UserError(f"{path}: no option {key!r}; {nearest_names(name, sorted(names))}")
        if name in found:
            raise UserError(f"{path} gives {key!r} twice")
        found[name] = value
    context.default_map = {**(context.default_map or {}), **found}
    return path


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; check --config")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {error}") from error
    if not isinstance(value, Mapping):
        raise UserError(f"{path} must hold options, as in 'max_iterations: 10'")
    return value


def _flat(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the pairs of a file, those of its sections in place of these; without empty ones."""
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        inner = value.items() if isinstance(value, Mapping) else [(key, value)]
        pairs += [(str(name), each) for name, each in inner if each is not None]
    return pairs
