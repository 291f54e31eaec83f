"""An option that is given and would do nothing is refused: else it is believed to have acted."""

from __future__ import annotations

import typer

from persona_lora.core.errors import UserError

GIVEN = ("COMMANDLINE", "DEFAULT_MAP")  # by a flag, or by the file of --config


def refuse_useless(context: typer.Context, names: str, reason: str) -> None:
    """UserError for the first of the named options that was given; ``reason`` says why it is idle.

    ``names`` are parameter names with spaces between them, as in "batches rounds".
    """
    for name in names.split():
        source = context.get_parameter_source(name)
        if source is not None and source.name in GIVEN:
            raise does_nothing(name, reason)


def does_nothing(name: str, reason: str) -> UserError:
    """Return the refusal of an option that would do nothing."""
    return UserError(f"--{name.replace('_', '-')} does nothing {reason}; leave it out")
