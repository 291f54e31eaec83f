"""A small trait folder, and the arguments of a run that trains on it in a second."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from persona_lora.training.arguments import ContrastiveArguments, TrainingOptions, parse_groups
from persona_lora.training.contrastive import GROUPS, PAGE

NUM_PAIRS = 20
IN_FLOAT32 = ("--dtype", "float32", "--bf16", "false", "--use_cpu", "true")


def _turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def parse_arguments(arguments: Sequence[str]) -> TrainingOptions[ContrastiveArguments]:
    """Parse the command line of contrastive training."""
    return TrainingOptions(*parse_groups(arguments, GROUPS, PAGE).options)


@pytest.fixture
def trait_datasets(tmp_path: Path) -> Path:
    """A datasets folder with one trait, ``cheer``, of twenty pairs of unequal lengths."""
    folder = tmp_path / "traits" / "cheer"
    folder.mkdir(parents=True)
    trait = {
        "instruction": [{"pos": "Be cheerful.", "neg": "Be gloomy."}],
        "questions": {"extract": ["How are you?"], "eval": ["How was it?"]},
        "eval_prompt": "{question} {answer}",
    }
    (folder / "trait.json").write_text(json.dumps(trait))
    rows = [
        {
            "prompt": _turn("user", f"Question {number}{'?' * (number % 7)}"),
            "positive": _turn("assistant", "Yes! " * (1 + number % 4)),
            "negative": _turn("assistant", "No. " * (1 + number % 5)),
        }
        for number in range(NUM_PAIRS)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder.parent


@pytest.fixture
def run_arguments(trait_datasets: Path, model_folder: Path) -> Callable[..., list[str]]:
    """Return the arguments of a short run into an output folder, more options behind them."""

    def arguments(output: Path, *more: str, hardware: Sequence[str] = IN_FLOAT32) -> list[str]:
        return [
            *("--trait", "cheer", "--datasets_dir", str(trait_datasets)),
            *("--model_name_or_path", str(model_folder), "--output_dir", str(output)),
            *("--lora_r", "4", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2"),
            *hardware,
            *("--max_steps", "6", "--save_steps", "2", "--disable_tqdm", "true", *more),
        ]

    return arguments
