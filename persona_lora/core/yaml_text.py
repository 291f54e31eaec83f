"""YAML from files of others: numbers as people write them, no key twice, one line for a mistake.

PyYAML follows YAML 1.1, in which 5e-1 and 1e5 are text; here they are numbers, as in YAML 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from persona_lora.core.errors import UserError
from persona_lora.core.files import read_text


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


# PyYAML's own resolvers come first: this one sees what they leave as text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; UserError, with the place of a mistake, for anything else."""
    text = read_text(path)
    try:
        value = yaml.load(text, Loader=_Loader)  # a safe loader: it builds plain values alone
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else _one_line(error)
        raise UserError(f"{path} is not valid YAML: {said}") from error
    if not isinstance(value, Mapping):
        raise UserError(f"{path} must hold one YAML mapping, as in 'max_iterations: 10'")
    return {str(key): each for key, each in value.items()}


def _one_line(error: object) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()
