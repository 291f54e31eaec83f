"""Merge and restore: LoRAMerger against PEFT's merge_adapter and unmerge_adapter.

    python benchmarks/merging.py --diff checkpoints/sycophancy/diff --dtype float32

Both change the same modules of the packaged model by the same diff, in turn, in one process.
Printed: median seconds, the ratio to PEFT, the extra memory held while merged, and the share of
touched weights that differ from the original after ``--cycles`` cycles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.runs import package_versions
from persona_lora.models.loading import load_chat_model
from persona_lora.models.structure import linear_modules, weight_of
from persona_lora.steering.weights import LoRAMerger


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def touched_weights(model: nn.Module, diff: LoRADiff) -> dict[str, torch.Tensor]:
    modules = linear_modules(model)
    return {name: weight_of(modules[name]).clone() for name in diff.factors}


def changed_share(model: nn.Module, before: dict[str, torch.Tensor]) -> float:
    modules = linear_modules(model)
    changed = sum(
        int((weight_of(modules[name]) != weight).sum()) for name, weight in before.items()
    )
    return changed / sum(weight.numel() for weight in before.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--diff", default="checkpoints/sycophancy/diff")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    options = parser.parse_args()

    diff = LoRADiff.load(options.diff)
    ours = load_chat_model(dtype=options.dtype, device_map="cpu").model
    theirs = PeftModel.from_pretrained(
        load_chat_model(dtype=options.dtype, device_map="cpu").model, options.diff
    )
    merger = LoRAMerger(ours)
    before = touched_weights(ours, diff)
    times: dict[str, list[float]] = {key: [] for key in ("merge", "restore", "peft", "peft undo")}
    for _ in range(options.cycles):
        times["merge"].append(seconds(lambda: merger.merge_lora_diff(diff, 1.0)))
        times["restore"].append(seconds(merger.restore_original_weights))
        times["peft"].append(seconds(theirs.merge_adapter))
        times["peft undo"].append(seconds(theirs.unmerge_adapter))
    medians = {name: statistics.median(each) for name, each in times.items()}
    result = {
        "dtype": options.dtype,
        "cycles": options.cycles,
        "rank": diff.rank,
        "median_seconds": medians,
        "merge_ratio": medians["merge"] / medians["peft"],
        "restore_ratio": medians["restore"] / medians["peft undo"],
        "backup_bytes": sum(each.numel() * each.element_size() for each in before.values()),
        "peft_adapter_bytes": sum(
            each.numel() * each.element_size()
            for name, each in theirs.named_parameters()
            if "lora_" in name
        ),
        "changed_share": changed_share(ours, before),
        "peft_changed_share": changed_share(theirs, before),
        "versions": package_versions(),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"merging_{options.dtype}.json").write_text(
        json.dumps(result, indent=2) + "\n"
    )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
