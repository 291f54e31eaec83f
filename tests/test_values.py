"""What could change in silence: values, which are frozen, and what flags are by default."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest
import typer

from persona_lora import cli
from tests.pinned import hold
from tests.scenes import commands

PACKAGE = Path(__file__).resolve().parents[1] / "persona_lora"
ROOMS = ("core", "steering", "projections", "report", "cli")
MODULES = sorted(path for room in ROOMS for path in (PACKAGE / room).glob("*.py"))
# A book of what is merged, and sums that grow over batches.
GROWING = {"PairSums", "MergedWeight"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_values_are_frozen(path):
    name = f"persona_lora.{path.parent.name}.{path.stem}".removesuffix(".__init__")
    module = importlib.import_module(name)
    own = [each for each in vars(module).values() if getattr(each, "__module__", "") == name]
    for each in own:
        if (
            inspect.isclass(each)
            and dataclasses.is_dataclass(each)
            and each.__name__ not in GROWING
        ):
            assert each.__dataclass_params__.frozen, f"{name}.{each.__name__} can be changed"


def defaults():
    """Yield every flag of every command with what it is by default."""
    for words, command in commands(typer.main.get_command(cli.app)):
        for parameter in command.params:
            value = parameter.default() if callable(parameter.default) else parameter.default
            if isinstance(value, list | tuple):
                value = [str(part) for part in value]
            elif not isinstance(value, bool | int | float | None):
                value = str(value)
            yield f"{words}: {parameter.opts[-1]}", value


def test_what_a_flag_is_by_default_stays():
    """Runs that name no flag are the same runs in the next version, or this table says so."""
    hold("defaults", {name: value for name, value in defaults() if value is not None})


def signatures(name, module):
    """Yield what the public functions of a module do where nothing is said, with their places."""
    for each in vars(module).values():
        own = getattr(each, "__module__", "") == name and not getattr(
            each, "__name__", "_"
        ).startswith("_")
        for call in (each, *vars(each).values()) if inspect.isclass(each) else (each,):
            call = getattr(call, "__func__", call)
            if own and inspect.isfunction(call):
                for key, value in inspect.signature(call).parameters.items():
                    if isinstance(value.default, bool | int | float | str | tuple):
                        yield f"{name}.{call.__qualname__}: {key}", value.default


def test_what_a_function_does_by_default_stays():
    names = [f"persona_lora.{path.parent.name}.{path.stem}" for path in MODULES]
    names = [name for name in names if not name.endswith("__init__") and ".cli." not in name]
    hold(
        "signatures",
        dict(each for n in names for each in signatures(n, importlib.import_module(n))),
    )
