"""Option groups: a dataclass is declared once, and a command takes it as one parameter.

    @app.command("evaluate")
    @with_groups
    def evaluate(trait: TraitOption, model: ModelOptions) -> None: ...

Every field becomes an option of the field's name and default. Its help is that of its
``typer.Option`` where the field is ``Annotated`` with one, and its metadata's "help" otherwise, as
in the dataclasses of training; a mapping is given as JSON text. Knows typer; refuses to know what
options mean.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

EMPTY = inspect.Parameter.empty
MAPPING = "JSON"  # how --help calls the value of a mapping


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command whose dataclass parameters are flattened into options.

    Order is that of the signature. TypeError where two groups, or a group and the command, have an
    option of one name.
    """
    hints = get_type_hints(command, include_extras=True)
    flat: dict[str, inspect.Parameter] = {}
    groups: dict[str, tuple[type, list[str]]] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        kind = hints[name]
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            _add(flat, _option(name, parameter.default, kind))
            continue
        options = _options_of(kind)
        groups[name] = kind, [option.name for option in options]
        for option in options:
            _add(flat, option)

    @functools.wraps(command)
    def call(**given: Any) -> None:
        built = {
            name: kind(**{field: given.pop(field) for field in fields})
            for name, (kind, fields) in groups.items()
        }
        command(**given, **built)

    # typer reads the signature, and would otherwise look through the wrapper.
    vars(call)["__signature__"] = inspect.Signature(list(flat.values()))
    call.__annotations__ = {option.name: option.annotation for option in flat.values()}
    del vars(call)["__wrapped__"]
    return call


def _add(flat: dict[str, inspect.Parameter], option: inspect.Parameter) -> None:
    if option.name in flat:
        raise TypeError(f"the option {option.name} is there twice")
    flat[option.name] = option


def _options_of(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        _option(field.name, _default(field), _annotated(hints[field.name], field))
        for field in dataclasses.fields(group)
    ]


def _option(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _default(field: dataclasses.Field[Any]) -> Any:
    return EMPTY if field.default is dataclasses.MISSING else field.default


def _annotated(hint: Any, field: dataclasses.Field[Any]) -> Any:
    """Return a field's type with its option; a mapping, which typer does not know, is text."""
    if get_origin(hint) is Annotated:
        return hint
    help_text = field.metadata["help"]
    if any(get_origin(each) is dict for each in get_args(hint)):
        return Annotated[str | None, typer.Option(help=help_text, metavar=MAPPING)]
    return Annotated[hint, typer.Option(help=help_text)]
