"""An option that is given and would do nothing is refused: else it is believed to have acted."""

from __future__ import annotations

from contextvars import ContextVar

import typer

from persona_lora.core.errors import UserError

RUNNING: ContextVar[typer.Context] = ContextVar("the command that runs, and what it was given")


def refuse_useless(names: str, reason: str) -> None:
    """UserError for the first of the named options that was given; ``reason`` says why it is idle.

    ``names`` are parameter names with spaces between them, as in "batches rounds". The file of
    --config may hold what is the default anyway: a run's own config.yaml holds everything.
    """
    context = RUNNING.get()
    for name in names.split():
        source = context.get_parameter_source(name)
        typed = source is not None and source.name == "COMMANDLINE"
        in_file = source is not None and source.name == "DEFAULT_MAP" and _changed(context, name)
        if typed or in_file:
            raise does_nothing(name, reason)


def _changed(context: typer.Context, name: str) -> bool:
    usual = next(each.default for each in context.command.params if each.name == name)
    value = context.params[name]
    both = [list(each) if isinstance(each, list | tuple) else each for each in (value, usual)]
    return str(both[0]) != str(both[1])


def does_nothing(name: str, reason: str) -> UserError:
    """Return the refusal of an option that would do nothing."""
    return UserError(f"--{name.replace('_', '-')} does nothing {reason}; leave it out")
