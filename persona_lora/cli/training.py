"""Commands that train: train, finetune."""

from __future__ import annotations

import logging

import typer

from persona_lora.cli.program import app


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def train(context: typer.Context) -> None:
    """Train a positive and a negative LoRA for a trait, and write their difference.

    Flags are TRL's and PEFT's own names, also in the YAML: persona-lora train --help.

    Example: persona-lora train --config train_configs/sycophancy.yaml
    """
    from persona_lora.training.contrastive import main as train_main

    _say_what_happens()
    train_main(context.args)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def finetune(context: typer.Context) -> None:
    """Finetune a LoRA on a JSONL file of chats, keeping checkpoints along the way.

    Flags are TRL's and PEFT's own names, also in the YAML: persona-lora finetune --help.

    Example: persona-lora finetune --config train_configs/finetune_evil_misaligned_2.yaml
    """
    from persona_lora.training.finetune import main as finetune_main

    _say_what_happens()
    finetune_main(context.args)


def _say_what_happens() -> None:
    """Show our own log: a run takes long, and its last line says where the result is."""
    logging.getLogger("persona_lora").setLevel(logging.INFO)
