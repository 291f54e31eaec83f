"""The time that steering takes: merged, live, by activations, by a prompt; against the plain model.

All variants run in turn within a round, and rounds repeat, so that whatever else the machine does
falls on all of them alike; a ratio is taken within a round. Answers have the same forced length.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from persona_lora.core import progress
from persona_lora.core.chat import user_question
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError
from persona_lora.core.options import TimingOptions
from persona_lora.core.runs import Output, Run
from persona_lora.core.traits import Trait
from persona_lora.models.generation import RowPlan, generate_answers
from persona_lora.models.loading import ChatModel
from persona_lora.projections.inputs import load_ordinary_prompts
from persona_lora.steering.bank import METHODS, ActivationSetting, Bank
from persona_lora.steering.steerer import Steerer, Unsteered
from persona_lora.steering.weights import LoRAMerger
from persona_lora.studies.asking.run import open_run
from persona_lora.studies.steering.calibration import Level, highest_level
from persona_lora.studies.steering.read_comparison import (
    ACTIVATION,
    ACTIVATIONS,
    LIVE,
    LORA,
    MERGED,
    PROMPT,
    RANDOM_LORA,
    VARIANTS,
    Timing,
)


def run_latency(
    chat_model: ChatModel,
    trait: Trait,
    bank: Bank,
    levels: Sequence[Level],
    output: Output | Path,
    *,
    timing: TimingOptions = TimingOptions(),
    datasets: Path | None = None,
) -> Run:
    """Time all ways of steering at the highest level into the run ``output``; it keeps its rounds.

    Writes ``timings.jsonl`` and ``times.jsonl`` (seconds of a swap, bytes beside the model).
    """
    coefficients = {each.method: each.coefficient for each in highest_level(levels)}
    prompts = load_ordinary_prompts(datasets)
    config = {"trait": trait.name, **dataclasses.asdict(timing)}
    told = trait.instructions[0].pos
    read = {
        "the instruction": digest_of(told),
        "the coefficients": digest_of(coefficients),
        "the ordinary prompts": digest_of(prompts),
    }
    with open_run(output, "latency", chat_model, config, bank.inputs, read) as run:
        rows = run.resume_rows("timings")
        per_round = len(VARIANTS) * len(timing.batches)
        kept = len(rows) // per_round
        run.write("timings", rows[: kept * per_round])  # without a round that a kill cut short
        with progress.stage("timing"):
            for found in measure_latency(
                chat_model, bank, coefficients, told, prompts, timing, first=kept + 1
            ):
                run.extend("timings", [dataclasses.asdict(each) for each in found])
        if not run.read("times"):
            seconds, held = swap_seconds(chat_model, bank), held_bytes(bank, chat_model)
            rows = [{"what": name, "unit": "s", "value": value} for name, value in seconds.items()]
            rows += [{"what": name, "unit": "bytes", "value": each} for name, each in held.items()]
            run.write("times", rows)
    return run


def measure_latency(
    chat_model: ChatModel,
    bank: Bank,
    coefficients: Mapping[str, float],
    system_prompt: str,
    prompts: Sequence[str],
    options: TimingOptions,
    *,
    first: int = 1,
) -> Iterator[list[Timing]]:
    """Time every variant at every batch size in turn; yield each round's timings as it ends.

    Rounds ``first`` to ``options.rounds`` are measured. Before each measurement stands a short
    generation that is not: memory is mapped and caches are warm for all alike. ``coefficients`` are
    those of "lora" and "activation". The prompts are repeated to fill a batch.
    """
    if not prompts:
        raise UserError("latency needs prompts, batches of at least 1, two rounds and two tokens")
    rounds, batches, new_tokens = options.rounds, options.batches, options.new_tokens
    total = (rounds + 1 - first) * len(batches) * len(VARIANTS)
    done = 0
    for number in range(first, rounds + 1):
        found = []
        for batch in batches:
            # A new order each round: what runs after what is not always the same.
            for variant in np.random.default_rng([number, batch]).permutation(VARIANTS).tolist():
                asked = [prompts[at % len(prompts)] for at in range(batch)]
                system = system_prompt if variant == PROMPT else None
                with _steered(chat_model, bank, coefficients, variant):
                    timed_generation(chat_model, asked, 2, system=system)
                    timing = timed_generation(chat_model, asked, new_tokens, system=system)
                found.append(Timing(variant, batch, number, *timing))
                done += 1
                progress.report(done, total)
        yield found


def swap_seconds(chat_model: ChatModel, bank: Bank, *, rounds: int = 5) -> dict[str, float]:
    """Return the median seconds of merging the diff, of swapping it for another, of restoring."""
    times: dict[str, list[float]] = {"merge": [], "swap": [], "restore": []}
    for _ in range(rounds):
        merger = LoRAMerger(chat_model.model, allow_other_base=True)
        with _timing(times["merge"]):
            merger.merge_lora_diff(bank.diffs[LORA], 1.0)
        with _timing(times["swap"]):
            merger.restore_original_weights()
            merger.merge_lora_diff(bank.diffs[RANDOM_LORA], 1.0)
        with _timing(times["restore"]):
            merger.restore_original_weights()
    return {name: float(np.median(each)) for name, each in times.items()}


def held_bytes(bank: Bank, chat_model: ChatModel) -> dict[str, int]:
    """Return the bytes that each way of steering keeps beside the model while it steers.

    Merged: a copy of every touched weight, to restore it; live: the factors, in the model's type,
    on a CPU in fp32 and rounded to it; activations: one vector per layer.
    """
    item = chat_model.model.dtype.itemsize
    live = item if item > 2 or chat_model.model.device.type != "cpu" else 4 + item
    factors, vector = bank.diffs[LORA].factors.values(), bank.vectors[ACTIVATION]
    return {
        MERGED: item * sum(each.shape[0] * each.shape[1] for each in factors),
        LIVE: live * sum(each.rank * sum(each.shape) for each in factors),
        ACTIVATIONS: 4 * len(vector.layers) * vector.hidden_size,
    }


@contextmanager
def _timing(times: list[float]) -> Iterator[None]:
    wait_for_device()
    start = time.perf_counter()
    yield
    wait_for_device()
    times.append(time.perf_counter() - start)


def _steered(
    chat_model: ChatModel, bank: Bank, coefficients: Mapping[str, float], variant: str
) -> Steerer:
    if variant in (MERGED, LIVE):
        return METHODS[variant](chat_model, {bank.diffs[LORA]: coefficients["lora"]})
    if variant == ACTIVATIONS:
        setting = ActivationSetting({bank.vectors[ACTIVATION]: coefficients["activation"]})
        return setting.steerer(chat_model)
    return Unsteered()


# -- one generation ---------------------------------------------------------------------------


def timed_generation(
    chat_model: ChatModel, prompts: Sequence[str], new_tokens: int, *, system: str | None = None
) -> tuple[float, float]:
    """Answer all prompts as one batch, greedily and with exactly ``new_tokens`` tokens each.

    Returns the seconds to the first token, and the tokens per second (of the batch) after it.
    """
    times: list[float] = []

    def note() -> None:
        if len(times) < 2:
            wait_for_device()
            times.append(time.perf_counter())

    wait_for_device()
    times.append(time.perf_counter())
    with progress.silent():
        generate_answers(
            chat_model,
            [user_question(prompt, system) for prompt in prompts],
            max_new_tokens=new_tokens,
            batch_size=len(prompts),
            plan=RowPlan(on_step=note, endless=True),
        )
    wait_for_device()
    end = time.perf_counter()
    start, first = times
    return first - start, len(prompts) * (new_tokens - 1) / (end - first)


def wait_for_device() -> None:
    """Wait until a GPU has done what it was asked for; a CPU has."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
