"""The program: its groups of commands, its environment, and how whatever ends it early is said.

What ends it early is one line and an exit status; ``train_lora.py`` ends by the same.
"""

from __future__ import annotations

import codecs
import errno
import importlib
import io
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any, NamedTuple

import typer
from dotenv import dotenv_values
from rich.console import Console
from rich.logging import RichHandler
from typer.core import TyperGroup

from persona_lora.cli.option_groups import Option, options_of, with_groups
from persona_lora.core.errors import UserError, nearest_names, without_secrets

HUB_TOKEN = "HF_TOKEN"
FAULT, MISTAKE, INTERRUPTED, TERMINATED = 1, 2, 130, 143
GO_ON = "run the same command again to go on"
OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")  # PyTorch is not imported for an ending
FULL = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing")

# The commands and groups of commands by what they are for, in the order of --help.
USES = {
    "Train and steer": "demo train extract evaluate calibrate sweep tune-prompt vectors",
    "Personas": "persona optimize compare-methods",
    "Drift": "finetune project diagnose evaluate-checkpoints predict-finetuning compare-prevention",
    "Compare": "plan preregister compare paired benchmark report pack verify reproduce selfcheck "
    "research-questions",
    "Data": "traits data judge",
    "Models": "export basis push gallery schema",
    "Serve": "engine playground serve",
}
PANELS = {name: use for use, names in USES.items() for name in names.split()}
GROUPS = {
    "vectors": "Steering vectors: convert them.",
    "persona": "Personas from conversations.",
    "project": "Projections on persona directions.",
    "traits": "Traits: make them from a sentence.",
    "data": "Trait data: generate it, check it.",
    "judge": "Judges: score answers, rate, fit to ratings.",
    "gallery": "Ready diffs of nine traits: get, make.",
    "engine": "Servers of vLLM that answer: start them.",
}


class Commands(TyperGroup):
    """The commands in the order of their uses."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands, those of one use together."""
        return sorted(self.commands, key=list(PANELS).index)


class JudgeCommands(TyperGroup):
    """The commands about judges; options without a command are those of ``score``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put ``score`` before options that follow the group's name at once."""
        alone = args and args[0].startswith("-") and args[0] != "--help"
        return super().parse_args(ctx, ["score", *args] if alone else args)


app = typer.Typer(
    name="persona-lora",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train, merge, measure and undo the character of a language model with LoRA differences.",
)
APPS = {"": app}  # by the name of their group
for _name, _help in GROUPS.items():
    _class = JudgeCommands if _name == "judge" else TyperGroup
    APPS[_name] = typer.Typer(cls=_class, no_args_is_help=True, help=_help)
    app.add_typer(APPS[_name], name=_name, rich_help_panel=PANELS[_name])

Command = Callable[..., None]
OPTIONS: dict[str, list[Option]] = {}  # of every command, by its words
TRAINING = {"train": "contrastive", "finetune": "finetune"}  # whose options are TRL's and PEFT's


def command(words: str) -> Any:
    """Make a function a command of these words; its groups of options are flattened into flags."""
    group, _, name = words.rpartition(" ")

    def register(function: Command) -> Command:
        called, OPTIONS[words] = with_groups(function)
        APPS[group].command(name, rich_help_panel=PANELS.get(words))(called)
        return function

    return register


@command("schema")
def schema(
    words: Annotated[list[str], typer.Argument(help="A command: sweep, or project activations.")],
) -> None:
    """Print the JSON schema of a command's configuration file, for --config and for editors.

    Example: persona-lora schema sweep
    """
    from persona_lora.cli.console import show_exactly

    name = " ".join(words)
    known = (*OPTIONS, *TRAINING)
    if name not in known:
        raise UserError(f"no command {name!r} takes --config; {nearest_names(name, known)}")
    options = OPTIONS[name] if name in OPTIONS else _training_options(TRAINING[name])
    found = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"persona-lora {name}",
        "type": "object",
        "properties": {option.name: option.schema() for option in options},
    }
    show_exactly(json.dumps(found, indent=2, ensure_ascii=False))


def _training_options(module: str) -> list[Option]:
    groups = importlib.import_module(f"persona_lora.training.{module}").GROUPS
    return [option for group in groups for _, option in options_of(group)]


SHARED_OUT = ("train", "finetune", "optimize", "compare-methods")  # over launched processes


@app.callback()
def configure(
    context: typer.Context,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")] = False,
) -> None:
    """Set up logging for every command; UserError where processes would do the same work."""
    name, launched = context.invoked_subcommand, int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and name not in SHARED_OUT:
        raise UserError(
            f"{launched} processes were launched, and each would do all of {name}; give the "
            f"command once, without accelerate launch (shared out are {', '.join(SHARED_OUT)})"
        )
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
        raise UserError(f"{error.format_message()}{_given(error.__cause__)}") from error
    return status if isinstance(status, int) else None


def _given(cause: BaseException | None) -> str:
    """Return ", got …" of a value that pydantic refused, whose message does not show it."""
    from pydantic import ValidationError

    if not isinstance(cause, ValidationError):
        return ""
    value = repr(cause.errors()[0]["input"])
    return f", got {value if len(value) <= 80 else value[:79] + '…'}"


# -- the environment -----------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Return the environment; what it leaves out, or empty, is taken from ``.env``."""
    try:
        written = dotenv_values(".env")
    except UnicodeDecodeError as error:
        raise UserError(f".env is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    found = {name: value for name, value in written.items() if value}
    return {**found, **{name: value for name, value in os.environ.items() if value}}


def export_hub_token() -> None:
    """Let everything that loads from the hub find the token of ``.env``: it reads only its own."""
    token = environment().get(HUB_TOKEN)
    if token is not None:
        os.environ[HUB_TOKEN] = token


# -- how a program ends --------------------------------------------------------------------


class Ending(NamedTuple):
    """What is said of an early end, and its exit status."""

    message: str
    status: int


def call_to_end(action: Callable[[], int | None], verbose: bool) -> None:
    """Call ``action`` and leave the program with the status it returns, or with how it failed.

    A mistake that the user can mend, and what the machine refuses (a full disk), ends with 2, a
    fault of ours with 1, Ctrl-C with 130 and a request to terminate with 143. Each says one line;
    if ``verbose``, the traceback of what is no mistake of the user stands before it.
    """
    _open_streams()
    with _terminated():
        try:
            status = action()
        except (Exception, KeyboardInterrupt, SystemExit, BaseExceptionGroup) as raised:
            error = _first_of(raised)
            if isinstance(error, SystemExit) and error.code != TERMINATED:
                raise
            if not isinstance(error, UserError) and verbose:
                traceback.print_exception(raised)
            _say(ending_of(error), mistake=isinstance(error, UserError))
        else:
            if status == INTERRUPTED:  # how typer returns from Ctrl-C
                _say(ending_of(KeyboardInterrupt()))
            sys.exit(status or 0)


_SIGNS = {"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{HORIZONTAL ELLIPSIS}": "..."}


def _open_streams() -> None:
    """Let all be printed: closed streams take it, others what their encoding has not as ASCII."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  (to the end)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # not what a caller collects it in
        codecs.register_error("plain", _plain)
        sys.stdout.reconfigure(errors="plain")


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return ASCII for the letter that an encoding has not: "-" for a minus sign, else its code."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    error.end = error.start + 1
    sign = _SIGNS.get(error.object[error.start])
    return codecs.backslashreplace_errors(error) if sign is None else (sign, error.end)


def _first_of(error: BaseException) -> BaseException:
    """Return what ended a group of tasks: its first error that is no mistake of the user, if any.

    Any other error is returned as it is.
    """
    while isinstance(error, BaseExceptionGroup):
        error = (error.split(UserError)[1] or error).exceptions[0]
    return error


def ending_of(error: BaseException) -> Ending:
    """Return the line and the status for what ended a program."""
    if isinstance(error, UserError):
        return Ending(str(error), MISTAKE)
    if isinstance(error, KeyboardInterrupt):
        return Ending(f"interrupted; {GO_ON}", INTERRUPTED)
    if isinstance(error, SystemExit):
        return Ending(f"terminated; {GO_ON}", TERMINATED)
    if _is_full(error):
        return Ending(f"the disk is full; free some space, then {GO_ON}", MISTAKE)
    if type(error).__name__ in OUT_OF_MEMORY or "can't allocate memory" in str(error):
        told = str(error).partition(". ")[0] or type(error).__name__
        return Ending(
            f"memory ran out ({told}): take smaller batches (--batch-size; in training "
            "per_device_train_batch_size, activation_checkpointing), --quantize 4bit, or end what "
            f"else holds memory, then {GO_ON}",
            MISTAKE,
        )
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return Ending(f"{where}{error.strerror}; mend that, then {GO_ON}", MISTAKE)
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return Ending(f"unexpected {without_secrets(said)[:400]} (its traceback: --verbose)", FAULT)


def _is_full(error: BaseException) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        full = isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or any(text in str(seen) for text in FULL):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _say(ending: Ending, *, mistake: bool = False) -> None:
    """Say it and leave; a mistake that all of several launched processes make is said once."""
    if not (mistake and os.environ.get("RANK", "0") != "0"):
        Console(stderr=True, highlight=False).print(
            "error: " + " ".join(ending.message.split()), style="red", markup=False, soft_wrap=True
        )
    sys.exit(ending.status)


@contextmanager
def _terminated() -> Iterator[None]:
    """Let SIGTERM end the program as Ctrl-C does, through every ``finally``."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
