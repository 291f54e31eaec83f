"""Settings as people write them: YAML, several values in one string, each held to its type.

PyYAML follows YAML 1.1, in which 1e5 is text, 010 is eight and 1:01 is sixty-one; here they are a
hundred thousand, ten and text, as in YAML 1.2."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from persona_lora.core.errors import UserError, without_secrets
from persona_lora.core.files import read_text
from persona_lora.core.runs import COMMAND_CONFIG, CONFIG, EMPTYING, RECORD, Run, first_difference
from persona_lora.core.strength import Nats, refuse_nats_of

NEVER_WRITTEN = ("config", "overwrite")  # a run that is given again replaces nothing


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2; a key given twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node, once each key is its only one."""
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        seen: set[str] = set()
        for key in keys:
            if key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def whole_number(self, node: yaml.ScalarNode) -> int:
        """Return the number of a node that is written as one."""
        base = {"0o": 8, "0x": 16}.get(node.value[:2], 10)
        return int(node.value, base)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which puts into quotes what is a number to it or to ``_Loader``."""


INT, FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
NUMBERS = {  # the core schema of YAML 1.2
    INT: r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    FLOAT: r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)"
    r"|\.(nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {
    first: [each for each in known if each[0] not in NUMBERS]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _form in NUMBERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"({_form})$"), list("-+.0123456789"))
_Loader.add_constructor(INT, _Loader.whole_number)


def yaml_text(value: Mapping[str, Any], *, sort_keys: bool = True) -> str:
    """Return a mapping of plain values as YAML that ``read_yaml`` reads as the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=sort_keys, allow_unicode=True)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; raises UserError, with the place of a mistake, for anything else."""
    text = read_text(path)
    try:
        value = yaml.load(text, Loader=_Loader)  # a safe loader: it builds plain values alone
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        said = "nested too deeply" if deep else " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {said}") from error
    if not isinstance(value, Mapping):
        raise UserError(f"{path} must hold one YAML mapping, as in 'max_iterations: 10'")
    return {str(key): each for key, each in value.items()}


@contextmanager
def recorded_command(words: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Let every run that is opened inside hold the command's options as its ``config.yaml``."""
    values = {
        name: _plain(value)
        for name, value in sorted(options.items())
        if name not in NEVER_WRITTEN and value is not None and value != [] and value != ()
    }
    first = f"# persona-lora {words} --config config.yaml\n"
    token = COMMAND_CONFIG.set(first + yaml_text(values))
    try:
        yield
    finally:
        COMMAND_CONFIG.reset(token)


# Options that belong to every run they are given to, and stand in its record as they are typed.
DECIDING = (
    *("trait", "model", "revision", "quantize", "attn_implementation", "seed", "max_questions"),
    *("max_new_tokens", "temperature", "samples"),
)


def refuse_other_run(folder: Path) -> None:
    """UserError where a folder is seen to hold another run than that of the running command.

    What is seen are the options of both: their words, whatever they load. Opening the run says the
    rest.
    """
    given, path = COMMAND_CONFIG.get(), folder / CONFIG
    if given is None or not path.is_file() or not (folder / RECORD).is_file():
        return
    if Run(folder).record["status"] == EMPTYING:
        return
    old, new = (_deciding(each) for each in (read_text(path), given))
    both = [name for name in new if name in old]  # an option of one of two versions says nothing
    found = first_difference({name: old[name] for name in both}, {name: new[name] for name in both})
    if found is not None:
        raise UserError(
            f"{folder} holds a run of another configuration ({found}); "
            "choose another output or pass --overwrite"
        )


def _deciding(text: str) -> dict[str, Any]:
    """Return what decides of a config.yaml: the command in its first line, and some options."""
    words = re.match(r"# persona-lora (.+) --config config\.yaml\n", text)
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        values = None
    values = values if isinstance(values, Mapping) else {}
    found = {name: values[name] for name in DECIDING if name in values}
    if "trait" in found:  # by its name or its folder
        found["trait"] = Path(str(found["trait"])).name
    return found if words is None else {"command": words[1], **found}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return without_secrets(str(value)) if isinstance(value, str | Path) else value


def split_list(text: str, whole: Callable[[str], bool] = os.path.exists) -> list[str]:
    """Split text at commas, but nowhere inside the longest part that is ``whole``.

    By default that is a path that exists: "My Drive/a,b" is one, where it is there.
    """
    spans = [found.span() for found in re.finditer(r"[^,\s](?:[^,]*[^,\s])?", text)]
    parts: list[str] = []
    at = 0
    while at < len(spans):
        ends = range(len(spans) - 1, at, -1)  # the longest part first, a single one last
        last = next((end for end in ends if whole(text[spans[at][0] : spans[end][1]])), at)
        parts.append(text[spans[at][0] : spans[last][1]])
        at = last + 1
    return parts


def split_lists(texts: Iterable[str], whole: Callable[[str], bool] = os.path.exists) -> list[str]:
    """Split each of several texts, as an option that may be repeated gives them."""
    return [part for text in texts for part in split_list(text, whole)]


def path_beside_equals(part: str) -> bool:
    """Say whether the path in "path=value" or "name=path" exists: a comma in it is its own."""
    before, _, last = part.rpartition("=")
    first, _, after = part.partition("=")
    return ("," not in last and os.path.exists(before)) or (
        "," not in first and os.path.exists(after)
    )


def typed_value(hint: Any, value: Any, name: str) -> Any:
    """Return a value of the type of ``hint``: numbers in text are numbers, one item is a list.

    UserError names ``name`` and the value where it is of another type. A yes or no is no number,
    and a number is no text.
    """
    kinds = _kinds(hint)
    stray = _holds_bool(value) and not {bool, Any, dict, list} & _leaves(hint)
    adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    tried = [value] if isinstance(value, list) or list not in kinds else [value, [value]]
    for each in [] if stray else tried:
        try:
            return adapter.validate_python(each)
        except ValidationError:
            continue
    refuse_nats_of(name, value)
    quotes = "; put text that looks like a number into quotes" if str in kinds else ""
    text = repr(value)
    shown = text if len(text) <= 80 else text[:77] + "…"
    raise UserError(f"{name} must be {_expected(hint)}, got {shown}{quotes}")


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


def _leaves(hint: Any) -> set[Any]:
    """Return the types that a hint allows at any level."""
    inner = [] if get_origin(hint) is Literal else get_args(hint)
    return set().union(*map(_leaves, inner)) if inner else {hint}


def _holds_bool(value: Any) -> bool:
    """Say whether a value is a yes or no, or holds one at any level."""
    if isinstance(value, Mapping):
        return _holds_bool(list(value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_bool, value))
    return isinstance(value, bool)


WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    Nats: "nats as in 0.05nat",
}


def _expected(hint: Any) -> str:
    """Return what a hint allows, in words."""
    if get_origin(hint) in (list, tuple):
        return f"a list of {_expected(get_args(hint)[0])}"
    if get_origin(hint) is Literal:
        choices = list(map(str, get_args(hint)))
        return f"one of {', '.join(choices)}" if len(choices) > 2 else " or ".join(choices)
    if get_origin(hint) not in (Union, UnionType):
        return WORDS.get(get_origin(hint) or hint, "")
    return " or ".join(dict.fromkeys(filter(None, map(_expected, get_args(hint)))))
