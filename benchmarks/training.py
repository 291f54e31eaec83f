"""Training steps against plain TRL: same model, rows, LoRA, batch size and precision, side by side.

    python benchmarks/training.py --steps 5 --rounds 3 --output results/benchmark_training.json

Rounds alternate between the two, so that both meet the same load of the machine; the first step
of every round is left out. Both train in fp32 without activation checkpointing (TRL's own
defaults, bf16 and checkpointing, are slower still on a CPU without bf16). Time is given for a
thousand tokens of the data, padding not counted, as wall time and as CPU time: the latter says
more on a machine with other work.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from persona_lora.core.files import write_json
from persona_lora.core.runs import package_versions
from persona_lora.core.traits import ContrastivePair, load_pairs, load_trait
from persona_lora.models.loading import ChatModel, load_chat_model
from persona_lora.training.arguments import ContrastiveConfig
from persona_lora.training.examples import shared_lengths, tokenize_pairs
from persona_lora.training.lora import LoRAArguments, attach_lora, detach_lora
from persona_lora.training.trainer import CompletionTrainer

SAME: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-4,
    "bf16": False,
    "use_cpu": not torch.cuda.is_available(),
    "activation_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}


@dataclass
class StepClock(TrainerCallback):
    """Times every step but the first, in wall and CPU seconds."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    started: tuple[float, float] = (0.0, 0.0)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.started = (time.perf_counter(), time.process_time())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock."""
        self.wall.append(time.perf_counter() - self.started[0])
        self.cpu.append(time.process_time() - self.started[1])


def token_counter(trainer: SFTTrainer) -> list[tuple[int, int]]:
    """Return a list that grows by (tokens of the data, tokens with padding) at every step."""
    counts: list[tuple[int, int]] = []
    compute_loss = trainer.compute_loss

    def counted(model: nn.Module, inputs: dict[str, Tensor], *more: Any, **named: Any) -> Any:
        mask = inputs["attention_mask"]
        counts.append((int(mask.sum()), mask.numel()))
        return compute_loss(model, inputs, *more, **named)

    trainer.compute_loss = counted
    return counts


def plain_trl(chat_model: ChatModel, pairs: list[ContrastivePair], **options: Any) -> SFTTrainer:
    """TRL as its documentation has it: prompt and completion rows, completion-only loss."""
    rows = [{"prompt": pair.prompt, "completion": pair.positive} for pair in pairs]
    return SFTTrainer(
        model=attach_lora(chat_model, LoRAArguments(), seed=0),
        args=SFTConfig(completion_only_loss=True, **SAME, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=chat_model.tokenizer,
    )


def ours(chat_model: ChatModel, pairs: list[ContrastivePair], **options: Any) -> SFTTrainer:
    """The trainer of ``persona-lora train`` for the positive sign."""
    ends = {chat_model.tokenizer.eos_token_id}
    rows = tokenize_pairs(pairs, chat_model.template, end_tokens=ends)
    columns = {
        "input_ids": [row.input_ids for row in rows["pos"]],
        "labels": [row.labels for row in rows["pos"]],
        "length": shared_lengths(rows),
    }
    config = ContrastiveConfig(
        dataset_kwargs={"skip_prepare_dataset": True},
        length_column_name="length",
        **SAME,
        **options,
    )
    return CompletionTrainer(
        model=attach_lora(chat_model, LoRAArguments(), seed=0),
        args=config,
        train_dataset=Dataset.from_dict(columns),
        processing_class=chat_model.tokenizer,
    )


def measure(
    build: Callable[..., SFTTrainer], chat_model: ChatModel, pairs: list[ContrastivePair], **o: Any
) -> dict[str, float]:
    """Train a few steps; return seconds of preparation, and seconds for a thousand tokens."""
    before = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(chat_model, pairs, output_dir=folder, **o)
        prepared = time.perf_counter() - before
        clock = StepClock()
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(clock)
        counts = token_counter(trainer)
        trainer.train()
        detach_lora(trainer.model)
    tokens, padded = (sum(column) for column in zip(*counts[1:], strict=True))
    return {
        "prepare_seconds": prepared,
        "wall_per_1000_tokens": 1000 * sum(clock.wall[1:]) / tokens,
        "cpu_per_1000_tokens": 1000 * sum(clock.cpu[1:]) / tokens,
        "padding_share": 1 - tokens / padded,
    }


def main() -> None:
    """Alternate both trainers, print a table, and write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trait", default="sycophancy")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/benchmark_training.json"))
    options = parser.parse_args()
    chat_model = load_chat_model(dtype="float32")
    pairs = load_pairs(load_trait(options.trait))
    rounds: dict[str, list[dict[str, float]]] = {"plain TRL": [], "persona_lora": []}
    for number in range(options.rounds):
        for name, build in (("plain TRL", plain_trl), ("persona_lora", ours)):
            rounds[name].append(
                measure(build, chat_model, pairs, max_steps=options.steps, seed=number)
            )
    medians = {
        name: {key: statistics.median(each[key] for each in found) for key in found[0]}
        for name, found in rounds.items()
    }
    ratios = {
        key: medians["persona_lora"][key] / medians["plain TRL"][key]
        for key in medians["plain TRL"]
    }
    table = Table("median of rounds", *medians, "ratio")
    for key, ratio in ratios.items():
        table.add_row(key, *(f"{medians[name][key]:.3f}" for name in medians), f"{ratio:.2f}")
    Console().print(table)
    write_json(
        options.output,
        {"medians": medians, "ratios": ratios, "rounds": rounds, "versions": package_versions()},
    )


if __name__ == "__main__":
    main()
