"""Option groups: a dataclass is declared once, and a command takes it as one parameter.

    @command("evaluate")
    def evaluate(*, trait: Annotated[str, "A trait's name."], model: ModelOptions) -> None: ...

Every field with a text in its annotation becomes an option of the field's name and default (or
those of the parameter's own default); a tuple of names beside a group offers only these of its
fields. Options of one name in two groups are one option, where they say the same. A tuple is given
by repeating or by commas, each item once (but what belongs to another list's items, ``BY_PLACE``),
a mapping as name=value; an empty text is none, but where the help says what "" means. A YAML file's
values stand in for the defaults,
and an option that is given and would do nothing is refused: else it is believed to have acted.
Knows typer; refuses to know what options mean.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import json
import math
import os
from collections.abc import Callable, Container, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import TypeAdapter
from typer.core import TyperOption
from typer.models import ArgumentInfo, OptionInfo

from persona_lora.core.errors import UserError, nearest_names
from persona_lora.core.resources import resource_path
from persona_lora.core.settings import (
    path_beside_equals,
    read_yaml,
    recorded_command,
    split_lists,
    typed_value,
)
from persona_lora.core.strength import Nats, refuse_nats_of

MAPPING = "JSON"  # how --help calls the value of a mapping of anything
PAIRS = "NAME=VALUE,…"
PHRASE, BY_PLACE = "may hold spaces", "one for each"  # notes on the items of a list
COUNTS = range(1, 2**31)  # of a whole number, where its annotation holds no other range
RUNNING: ContextVar[typer.Context] = ContextVar("the command that runs, and what it was given")


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


EMPTY = inspect.Parameter.empty
CONFIG = Annotated[
    Path | None,
    typer.Option(
        is_eager=True,
        callback=read_defaults,
        help="A YAML file of this command's options (max_iterations: 10); flags override it.",
    ),
]


@dataclass(frozen=True)
class Option:
    """One option of a command: what it takes, what it is without it, and what typer is told."""

    name: str
    kind: Any
    default: Any
    help: str
    panel: str
    flags: tuple[str, ...] = ()
    within: range = COUNTS
    typer_info: Any = None  # an argument, or an option that needs more of typer

    @property
    def flag(self) -> str:
        """The option as it is typed."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def parts(self) -> list[Any]:
        """The types that a value may have, None left out."""
        if get_origin(self.kind) not in (Union, UnionType):
            return [self.kind]
        return [each for each in get_args(self.kind) if each is not NoneType]

    @property
    def repeats(self) -> bool:
        """Whether it may be given several times, or as a list with commas."""
        return get_origin(self.parts[0]) is tuple or _is_pairs(self.parts[0])

    def parameter(self) -> inspect.Parameter:
        """Return the parameter that typer reads."""
        if self.typer_info is not None:
            kind: Any = self.kind
            return _parameter(self.name, self.default, Annotated[kind, self.typer_info])
        typed, metavar = self._typed()
        info = typer.Option(
            *self.flags,
            help=self.help,
            metavar=metavar,
            parser=PARSERS.get(self.parts[0]) if len(self.parts) == 1 else None,
            rich_help_panel=self.panel or None,
            show_default=self.default is not False,
        )
        return _parameter(self.name, self._shown_default(), Annotated[typed, info])

    def _typed(self) -> tuple[Any, str | None]:
        first = self.parts[0]
        if first is Path:
            return Path | None, "<path>"
        if self.repeats:
            return list[str] | None, PAIRS if _is_pairs(first) else None
        if get_origin(first) is Literal:
            return str | None, "|".join(get_args(first))
        if get_origin(first) is dict:
            return str | None, MAPPING
        return (str if len(self.parts) > 1 else first) | None, None

    def _shown_default(self) -> Any:
        default = self.default
        if isinstance(default, tuple):
            return [",".join(map(str, default))] if default else None
        if isinstance(default, Mapping):
            return [f"{name}={value}" for name, value in default.items()] or None
        return default

    def read(self, value: Any) -> Any:
        """Return the value that a command takes, from what typer read; UserError for a mistake."""
        if self.typer_info is not None or isinstance(value, bool):
            items = value if isinstance(value, list) else [value]
            for each in items:
                self._refuse_empty(each)
            self._refuse_twice(items)
            return value
        if self.repeats:
            return self._read_list(value)
        if value is None:
            return None if self.default is EMPTY else self.default
        return self._read_one(value, self.parts)

    def _read_list(self, texts: list[str] | None) -> Any:
        if not texts:
            return self.default
        items = split_lists(texts, lambda part: os.path.exists(part) or path_beside_equals(part))
        if not items and (self.default is EMPTY or not self.default):
            raise UserError(f"{self.flag} is empty; name at least one, or leave it out")
        first = self.parts[0]
        if _is_pairs(first):
            return self._read_pairs(items, get_args(first)[1])
        inner, *notes = _split(get_args(first)[0])
        read = tuple(self._read_item(item, inner, phrase=PHRASE in notes) for item in items)
        if BY_PLACE not in notes:
            self._refuse_twice(read)
        return read

    def _read_item(self, item: str, kind: Any, *, phrase: bool) -> Any:
        spaced = len(item.split()) > 1 and not phrase
        if spaced and not (os.path.exists(item) or path_beside_equals(item)):
            example = ",".join(item.split())
            raise UserError(f"{self.flag} takes a list with commas: {example}, not {item!r}")
        return self._read_one(item, [kind])

    def _read_pairs(self, items: list[str], kind: Any) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        for item in items:
            name, found, value = (part.strip() for part in item.partition("="))
            example = {float: "formality=-1", int: "eval=40"}.get(kind, "plain=folder")
            if not (name and found and value):
                raise UserError(f'{self.flag} must be like "{example}", got {item!r}')
            if name in pairs:
                raise UserError(f"{self.flag} names {name!r} twice")
            try:
                pairs[name] = self._read_one(kind(value), [kind])
            except ValueError as error:
                refuse_nats_of(self.flag, value)
                raise UserError(f'{self.flag} must be like "{example}", got {item!r}') from error
        return pairs

    def _read_one(self, value: Any, kinds: list[Any]) -> Any:
        if get_origin(kinds[0]) is dict:
            return value
        self._refuse_empty(value)
        read = typed_value(Union[(*kinds,)], value, self.flag)
        if isinstance(read, int) and read not in self.within:
            least, most = self.within[0], self.within[-1]
            bound = f"at least {least}" if read < least else f"at most {most}"
            raise UserError(f"{self.flag} must be {bound}, got {read}")
        if isinstance(read, float) and not math.isfinite(read):
            raise UserError(f"{self.flag} must be a finite number, got {value!r}")
        return read

    def _refuse_empty(self, value: Any) -> None:
        """UserError for a text that is empty: as a path it would be the folder that one is in."""
        if value == "" and '""' not in self.help:
            raise UserError(f"{self._typed_name} is empty; give it a value, or leave it out")

    def _refuse_twice(self, items: Sequence[Any]) -> None:
        """UserError for an item that stands there twice: it would count twice, or beside itself."""
        known = list(map(_meant, items))
        twice = next((each for at, each in enumerate(items) if known[at] in known[:at]), None)
        if twice is not None:
            said = f"{twice.value:g}nat" if isinstance(twice, Nats) else twice
            raise UserError(f"{self._typed_name} names {said} twice; give it once")

    @property
    def _typed_name(self) -> str:
        """The option as it is typed, or an argument's name."""
        info = self.typer_info
        typed = self.name.upper() if isinstance(info, ArgumentInfo) else self.flag
        # typer keeps the flag of typer.Option("--from") where a default would be
        own = info.default if isinstance(info, OptionInfo) else None
        return next((each for each in (*self.flags, own) if isinstance(each, str)), typed)

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of the option's value in a configuration file."""
        named = [str if isinstance(p, type) and issubclass(p, Enum) else p for p in self.parts]
        # One item of a list may stand without the list.
        items = [get_args(p)[0] for p in named if get_origin(p) in (tuple, list)]
        kind: Any = Union[(*named, *items)]
        found = {"description": self.help, **TypeAdapter(kind).json_schema()}
        if self.default is not EMPTY and self.default is not None:
            found["default"] = json.loads(json.dumps(self.default, default=str))
        return found


def with_groups(command: Callable[..., None]) -> tuple[Callable[..., None], list[Option]]:
    """Return a command whose groups are flattened into options, and these options.

    Order is that of the signature. TypeError where two options of one name differ.
    """
    hints = get_type_hints(command, include_extras=True)
    options: dict[str, Option] = {}
    # Of each group: what it is made of, its default, its fields and their options.
    groups: dict[str, tuple[Any, Any, list[tuple[str, str]]]] = {}
    singles: list[str] = []
    for name, parameter in inspect.signature(command).parameters.items():
        kind, *notes = _split(hints[name])
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            offered = next((note for note in notes if isinstance(note, tuple)), None)
            found = options_of(kind, parameter.default, offered, name.capitalize())
            fields = [(field, option.name) for field, option in found]
            groups[name] = kind, parameter.default, fields
            for _, option in found:
                _add(options, option)
        else:
            singles.append(name)
            _add(options, _option(name, kind, notes, parameter.default, "", {}))

    @functools.wraps(command)
    def call(**given: Any) -> None:
        context = given["context"]
        RUNNING.set(context)
        values = {name: option.read(given[name]) for name, option in options.items()}
        made = {}
        for name, (kind, default, fields) in groups.items():
            own = {field: values[option] for field, option in fields}
            made[name] = kind(**own) if default is EMPTY else dataclasses.replace(default, **own)
        program = context.find_root().command_path  # of several words where Python runs it
        words = context.command_path.removeprefix(program).strip()
        with recorded_command(words, context.params):
            command(**{name: values[name] for name in singles}, **made)

    # typer reads the signature, and would otherwise look through the wrapper.
    parameters = [_parameter("context", EMPTY, typer.Context)]
    parameters += [option.parameter() for option in options.values()]
    parameters.append(_parameter("config", None, CONFIG))
    vars(call)["__signature__"] = inspect.Signature(parameters)
    call.__annotations__ = {each.name: each.annotation for each in parameters}
    del vars(call)["__wrapped__"]
    return call, list(options.values())


def _add(options: dict[str, Option], option: Option) -> None:
    known = options.setdefault(option.name, option)
    if (known.kind, known.default, known.help) != (option.kind, option.default, option.help):
        raise TypeError(f"the option {option.name} is there twice, and not the same")


def options_of(
    group: type, default: Any = EMPTY, offered: tuple[str, ...] | None = None, panel: str = ""
) -> list[tuple[str, Option]]:
    """Return the options that the fields of a dataclass are, each with its field's name."""
    hints = get_type_hints(group, include_extras=True)
    found = []
    for field in dataclasses.fields(group):
        kind, *notes = _split(hints[field.name])
        told = field.init and (notes or "help" in field.metadata)
        if not told or (offered and field.name not in offered):
            continue
        value = _default(field) if default is EMPTY else getattr(default, field.name)
        option = _option(field.name, kind, notes, value, panel, field.metadata)
        found.append((field.name, option))
    return found


def _option(
    name: str, kind: Any, notes: list[Any], default: Any, panel: str, metadata: Mapping[str, str]
) -> Option:
    texts = [note for note in notes if isinstance(note, str)]
    flags = tuple(text for text in texts if text.startswith("--"))
    said = next((text for text in texts if not text.startswith("--")), metadata.get("help", ""))
    info = next((note for note in notes if not isinstance(note, str | tuple | range)), None)
    within = next((note for note in notes if isinstance(note, range)), COUNTS)
    said = said if info is None else info.help
    if info is not None and Path in (kind, *get_args(kind)):
        info = copy.copy(info)
        info.parser = path
    own = flags[0].removeprefix("--").replace("-", "_") if flags else name
    return Option(own, kind, default, said, panel, flags, within, info)


def _split(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is Annotated else (hint,)


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return EMPTY if field.default is dataclasses.MISSING else field.default


def _number(text: Any) -> Any:
    """Return a number, or the text that is none: the option's own type says what is wrong."""
    try:
        return float(text)
    except ValueError:
        return text


def path(text: Any) -> Any:
    """Return a path, or the empty text that is none."""
    return Path(text) if str(text) else text


PARSERS: dict[Any, Callable[[Any], Any]] = {float: _number, Path: path}


def _is_pairs(kind: Any) -> bool:
    return get_origin(kind) is Mapping


def _meant(item: Any) -> Any:
    """Return what an item means: of a path that exists the file or folder, whatever leads there."""
    path = isinstance(item, str | Path) and os.path.exists(item)
    return os.path.realpath(item) if path else item


# -- options that would do nothing -----------------------------------------------------------


def refuse_useless(names: str, reason: str, *, unless: object = False) -> None:
    """UserError for the first of the named options that was given; ``reason`` says why it is idle.

    ``names`` are parameter names with spaces between them, as in "batches rounds"; ``unless`` is
    what makes use of them. The file of --config may hold what is the default anyway: a run's own
    config.yaml holds everything.
    """
    for name in () if unless else names.split():
        context = RUNNING.get()
        source = context.get_parameter_source(name)
        told = "" if source is None else source.name
        if told == "COMMANDLINE" or (told == "DEFAULT_MAP" and _changed(context, name)):
            raise does_nothing(name, reason)


def _changed(context: typer.Context, name: str) -> bool:
    usual = next(each.default for each in context.command.params if each.name == name)
    value = context.params[name]
    both = [list(each) if isinstance(each, list | tuple) else each for each in (value, usual)]
    return str(both[0]) != str(both[1])


def does_nothing(name: str, reason: str) -> UserError:
    """Return the refusal of an option that would do nothing."""
    return UserError(f"--{name.replace('_', '-')} does nothing {reason}; leave it out")
