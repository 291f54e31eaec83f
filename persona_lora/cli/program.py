"""The program: its groups of commands, logging, and how a mistake ends it."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from typer.core import TyperGroup

from persona_lora.cli.ending import MISTAKE, call_to_end
from persona_lora.cli.environment import export_hub_token
from persona_lora.cli.option_groups import Option, with_groups
from persona_lora.core.errors import UserError, nearest_names

# The uses of the program, as --help groups its commands.
STEER, PERSONAS, DRIFT, COMPARE = "Train and steer", "Personas", "Drift", "Compare"
DATA, MODELS, SERVE = "Data", "Models", "Serve"
ORDER = (
    *("train", "extract", "evaluate", "sweep", "vectors"),
    *("persona", "optimize", "compare-methods"),
    *("finetune", "project", "evaluate-checkpoints", "predict-finetuning", "compare-prevention"),
    *("compare", "paired", "benchmark", "report", "research-questions"),
    *("traits", "data", "export", "playground", "schema"),
)


class Commands(TyperGroup):
    """The commands in the order of their uses."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands, those of one use together."""
        return sorted(self.commands, key=ORDER.index)


app = typer.Typer(
    name="persona-lora",
    cls=Commands,
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
app.add_typer(vectors_app, name="vectors", rich_help_panel=STEER)
app.add_typer(persona_app, name="persona", rich_help_panel=PERSONAS)
app.add_typer(project_app, name="project", rich_help_panel=DRIFT)
app.add_typer(traits_app, name="traits", rich_help_panel=DATA)
app.add_typer(data_app, name="data", rich_help_panel=DATA)

Command = Callable[..., None]
OPTIONS: dict[str, list[Option]] = {}  # of every command, by its words


def command(name: str, panel: str, group: tuple[str, typer.Typer] | None = None) -> Any:
    """Make a function a command; its groups of options are flattened into flags."""
    prefix, owner = ("", app) if group is None else (f"{group[0]} ", group[1])

    def register(function: Command) -> Command:
        called, options = with_groups(function)
        OPTIONS[prefix + name] = options
        owner.command(name, rich_help_panel=panel if group is None else None)(called)
        return function

    return register


@command("schema", MODELS)
def schema(
    words: Annotated[list[str], typer.Argument(help="A command: sweep, or project activations.")],
) -> None:
    """Print the JSON schema of a command's configuration file, for --config and for editors.

    Example: persona-lora schema sweep
    """
    name = " ".join(words)
    if name not in OPTIONS:
        raise UserError(f"no command {name!r} takes --config; {nearest_names(name, OPTIONS)}")
    found = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"persona-lora {name}",
        "type": "object",
        "properties": {option.name: option.schema() for option in OPTIONS[name]},
    }
    sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


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
