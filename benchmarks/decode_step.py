"""What does live LoRA add to a step of decoding?

    persona-lora gallery get --traits evil,sycophancy
    python benchmarks/decode_step.py               # whole steps
    python benchmarks/decode_step.py --hooks-only  # what is called after the modules of one block

Without steering, with one diff, with several that share their A, and with one of rank 32 of random
factors, in turn and in a new order each round, in one process; bf16. Printed: the median of the
ratio to the unsteered step of the same round, in CPU seconds and in seconds, each with a bootstrap
interval. ``--beside FILE`` times another version of ``steering/live.py`` in the same rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel

from persona_lora.core.lora_diff import LoRADiff, LoRAFactors
from persona_lora.models.decoding import Decoding
from persona_lora.models.loading import load_chat_model
from persona_lora.steering import live

CONTEXT = 32  # tokens before the first step
Seconds = tuple[float, float]  # of the CPU, and of the clock


def random_diff(diff: LoRADiff, rank: int) -> LoRADiff:
    """Return a diff of the same modules with random factors."""
    generator = torch.Generator().manual_seed(0)

    def factors(each: LoRAFactors) -> LoRAFactors:
        A = torch.randn(rank, each.A.shape[1], generator=generator)
        return LoRAFactors(A, 1e-4 * torch.randn(each.B.shape[0], rank, generator=generator))

    made = {name: factors(each) for name, each in diff.factors.items()}
    return LoRADiff(made, diff.base_model)


def version(path: Path) -> ModuleType:
    """Return another version of ``steering/live.py``."""
    spec = importlib.util.spec_from_file_location("live_beside", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def one_round(
    model: PreTrainedModel, variants: dict[str, Any], rows: int, steps: int
) -> dict[str, Seconds]:
    """Return the least CPU seconds and the least seconds of some steps of each variant.

    All go on with the same rows, one after the other in a new order, each with a step to warm up.
    """
    tokens = torch.randint(100, 5000, (rows, CONTEXT))
    room = len(variants) * (steps + 1)
    decoding = Decoding(model, tokens, torch.ones_like(tokens), None, room)
    newest = decoding.begin().argmax(dim=-1)
    least = {}
    for name in random.sample(list(variants), len(variants)):
        taken = []
        with variants[name]:
            for _ in range(1 + steps):
                cpu, begun = time.process_time(), time.perf_counter()
                newest = decoding.step(newest).argmax(dim=-1)
                taken.append((time.process_time() - cpu, time.perf_counter() - begun))
        least[name] = min(each[0] for each in taken[1:]), min(each[1] for each in taken[1:])
    return least


def block_calls(steerer: Any, rows: int, dtype: torch.dtype) -> Callable[[], None]:
    """Return what a step does beside the modules of one block: all its hooks, on random states."""
    hooks = [hook for hook in steerer.hooks() if ".layers.3." in hook.name]
    widths = {width for hook in hooks for width in hook.module.weight.shape}
    states = {width: torch.randn(rows, 1, width).to(dtype) for width in widths}

    def call() -> None:
        for hook in hooks:
            out, width = hook.module.weight.shape
            hook.call(hook.module, (states[width],), torch.zeros(rows, 1, out, dtype=dtype))

    return call


@torch.no_grad()
def hooks_round(calls: dict[str, Callable[[], None]], times: int = 20) -> dict[str, Seconds]:
    """Return the seconds of each variant's calls, the mean of some, in a new order."""
    taken = {}
    for name in random.sample(list(calls), len(calls)):
        cpu, begun = time.thread_time(), time.perf_counter()
        for _ in range(times):
            calls[name]()
        taken[name] = (time.thread_time() - cpu) / times, (time.perf_counter() - begun) / times
    return taken


def print_hooks(variants: dict[str, Any], sizes: Sequence[int], dtype: torch.dtype) -> None:
    """Print what the hooks of one block take, in microseconds of CPU."""
    print("| rows | live | least | lower quartile | now over it |\n|---|---|---|---|---|")
    for rows in sizes:
        calls = {name: block_calls(each, rows, dtype) for name, each in variants.items()}
        hooks_round(calls)
        found = [hooks_round(calls) for _ in range(100)]
        for name in calls:
            least, lower = (
                1e6 * sorted(each[name][0] for each in found)[at] for at in (0, len(found) // 4)
            )
            now = name.removeprefix("before, ")
            over = "" if name == now else ratio(found, now, name, 0)
            print(f"| {rows} | {name} | {least:.0f} | {lower:.0f} | {over} |", flush=True)


def ratio(found: Sequence[dict[str, Seconds]], one: str, other: str, at: int) -> str:
    """Return the median over rounds of one's seconds over the other's, with a 95% interval."""
    ratios = [each[one][at] / each[other][at] for each in found]
    drawn = random.Random(0)
    medians = sorted(statistics.median(drawn.choices(ratios, k=len(ratios))) for _ in range(2000))
    return f"{statistics.median(ratios):.3f} [{medians[49]:.3f}, {medians[1949]:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--diffs", nargs="+", default=["evil", "sycophancy"])
    parser.add_argument("--folder", type=Path, default=Path("checkpoints/ready"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mixes", nargs="+", default=["one", "family", "rank 32"])
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--hooks-only", action="store_true")
    asked = parser.parse_args()
    model = load_chat_model(dtype=asked.dtype).model
    diffs = [LoRADiff.load(asked.folder / name / "diff") for name in asked.diffs]
    mixes = {"one": diffs[:1], "family": diffs, "rank 32": [random_diff(diffs[0], 32)]}
    versions = {"": live} | ({"before, ": version(asked.beside)} if asked.beside else {})
    variants: dict[str, Any] = {"unsteered": nullcontext()}
    for kind in asked.mixes:
        for name, code in versions.items():
            weights = [[0.5] * len(mixes[kind])]
            variants[name + kind] = code.LiveLoRA(model, mixes[kind], weights)
    print(f"threads: {torch.get_num_threads()}\n")
    if asked.hooks_only:
        del variants["unsteered"]
        print_hooks(variants, asked.rows, model.dtype)
        return
    print("| rows | live | CPU seconds, ratio | seconds, ratio | CPU seconds, now over it |")
    print("|---|---|---|---|---|")
    for rows in asked.rows:
        found = [one_round(model, variants, rows, asked.steps) for _ in range(asked.rounds)]
        for name in list(variants)[1:]:
            cpu, clock = (ratio(found, name, "unsteered", at) for at in (0, 1))
            now = name.removeprefix("before, ")
            over = "" if name == now else ratio(found, now, name, 0)
            print(f"| {rows} | {name} | {cpu} | {clock} | {over} |", flush=True)


if __name__ == "__main__":
    main()
