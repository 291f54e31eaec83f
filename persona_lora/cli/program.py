"""The program: its groups of commands, logging, and how a mistake ends it."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from persona_lora.cli.ending import MISTAKE, call_to_end
from persona_lora.cli.environment import export_hub_token
from persona_lora.core.errors import UserError

app = typer.Typer(
    name="persona-lora",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train, merge, measure and undo the character of a language model with LoRA differences.",
)
data_app = typer.Typer(no_args_is_help=True, help="Trait data: generate it, check it.")
traits_app = typer.Typer(no_args_is_help=True, help="Traits: make them from a sentence.")
persona_app = typer.Typer(no_args_is_help=True, help="Personas from conversations.")
project_app = typer.Typer(no_args_is_help=True, help="Projections on persona directions.")
vectors_app = typer.Typer(no_args_is_help=True, help="Steering vectors: convert them.")
app.add_typer(vectors_app, name="vectors")
app.add_typer(project_app, name="project")
app.add_typer(persona_app, name="persona")
app.add_typer(traits_app, name="traits")
app.add_typer(data_app, name="data")


@app.callback()
def configure(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")] = False,
) -> None:
    """Set up logging for every command."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_time=False)],
    )
    for noisy in ("httpx", "httpx2", "openai", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if not verbose:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    export_hub_token()


def main() -> None:
    """Run the command line; whatever ends it early is one line and an exit status."""
    call_to_end(_run, verbose=not {"-v", "--verbose"}.isdisjoint(sys.argv))


def _run() -> int | None:
    """Run a command; return its exit status where it set one."""
    try:
        status = app(standalone_mode=False)
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort as stop:
        raise KeyboardInterrupt from stop
    except typer.TyperException as error:
        if not error.format_message():  # a command was left out, and the help page is shown
            return MISTAKE
        raise UserError(error.format_message()) from error
    return status if isinstance(status, int) else None
