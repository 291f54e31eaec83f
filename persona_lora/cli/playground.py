"""The command that serves the mixing desk's page (``mixing_page``)."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Any
from urllib.request import getproxies, proxy_bypass

import typer

from persona_lora.cli.console import console
from persona_lora.cli.option_groups import with_groups
from persona_lora.cli.parsing import load_model
from persona_lora.cli.program import app
from persona_lora.cli.shared_options import (
    DatasetsOption,
    ModelOptions,
    OtherBaseOption,
)
from persona_lora.core.errors import UserError

INSTALL = 'pip install "persona-lora[playground]"'


@app.command("playground")
@with_groups
def playground(
    *,
    traits: Annotated[
        str | None,
        typer.Option(help='Traits with a diff in --directions, as in "evil formality"; all found.'),
    ] = None,
    directions: Annotated[Path, typer.Option(help="Where {trait}/diff is.")] = Path("checkpoints"),
    mixes: Annotated[
        Path, typer.Option(help="Where mixes are kept and found: *_best_weights.json, *.json.")
    ] = Path("results/mixes"),
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The page's port.")] = 7860,
    model: ModelOptions,
    datasets_dir: DatasetsOption = None,
    allow_other_base: OtherBaseOption = False,
) -> None:
    """Chat with the model while sliders set each trait's coefficient; needs the extra "playground".

    Steered and unsteered answers stand side by side. On this machine only, unless --host says so.

    Example: persona-lora playground --traits "evil sycophancy formality"
    """
    from persona_lora.core.lora_diff import LoRADiff
    from persona_lora.playground.mixing_desk import MixingDesk

    found = sorted(path.parent.parent.name for path in directions.glob("*/diff/diff.json"))
    chosen = found if traits is None else traits.replace(",", " ").split()
    missing = [trait for trait in chosen if trait not in found]
    if missing or not chosen:
        known = ", ".join(found) or "none"
        raise UserError(
            f"{directions} holds no diff of {missing[0] if missing else 'any trait'}; it has "
            f"{known}; train one with: bash scripts/train_and_sweep.sh evil"
        )
    _check_address(host, port)
    try:
        from persona_lora.playground.mixing_page import build_page, serve
    except ImportError as error:
        raise UserError(f"the playground's library is not installed; run: {INSTALL}") from error
    diffs = {trait: LoRADiff.load(directions / trait / "diff") for trait in chosen}
    chat_model = load_model(model, diffs.values(), allow_other_base=allow_other_base)
    judges = _judges(chosen, chat_model, datasets_dir)
    desk = MixingDesk(chat_model, diffs, judges)
    console.print(f"open http://{host}:{port} (Ctrl+C ends it)")
    serve(build_page(desk, mixes), host, port)


def _judges(traits: list[str], chat_model: Any, datasets: Path | None) -> dict[str, Any]:
    """Return what builds the embedded judge of every trait that has labelled answers."""
    from persona_lora.core.traits import list_traits, load_trait
    from persona_lora.judges.choice import JudgeOptions, make_judge

    known = list_traits(datasets)
    return {
        trait: (
            lambda trait=trait: make_judge(load_trait(trait, datasets), chat_model, JudgeOptions())
        )
        for trait in traits
        if trait in known
    }


def _check_address(host: str, port: int) -> None:
    """Raise UserError, before a model is loaded, for an address where no page can be served."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise UserError(
            f"nothing can be served at {host}, port {port} ({error.strerror or error}); choose "
            "another --port or --host"
        ) from error
    own = "localhost" if host == "0.0.0.0" else host
    if {"http", "all"} & getproxies().keys() and not proxy_bypass(own):
        raise UserError(
            "the page's own address would be reached through the environment's proxy; set "
            f"NO_PROXY={own} (beside what it holds) and give the same command again"
        )
