"""Projecting ΔW on directions: streaming against loading both models and forming matrices.

    python benchmarks/weight_projection.py
    python benchmarks/weight_projection.py --sizes 1024x4096x4 1024x4096x64   # how memory grows

Generates pairs of models of growing size in bf16 (random weights in shards, and the same with
noise) and three directions of rank 32, in a temporary folder. Each way runs in a process of its
own, so that its peak memory is its own: (a) ours, streamed; (b) load both models and form every
dense direction, in float32, as a first script would. Printed: seconds, peak memory beyond an empty
Python with torch, both ratios, and ours as a share of the speed of merely reading both models.
A way that asks for more memory than the machine has free fails by itself. (c) An adapter is
projected on the same directions from its factors alone, loading them not counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from persona_lora.core.lora_diff import BaseModel, LoRADiff, LoRAFactors
from persona_lora.models.weight_files import StoredWeights
from persona_lora.projections.weight_space import project_adapter, project_weights
from persona_lora.studies.drift.run import load_diffs

SHAPES = {  # hidden, intermediate, layers
    "0.1B": (768, 2048, 16),
    "0.5B": (1536, 4096, 20),
    "2B": (2560, 6912, 28),
    "70B/40": (8192, 28672, 2),  # two of eighty layers: what a block needs does not grow with them
}
RANK, DIRECTIONS = 32, 3


def modules(hidden: int, inner: int, layers: int) -> dict[str, tuple[int, int]]:
    shapes = {}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{block}.self_attn.{name}"] = (hidden, hidden)
        shapes[f"{block}.mlp.gate_proj"] = shapes[f"{block}.mlp.up_proj"] = (inner, hidden)
        shapes[f"{block}.mlp.down_proj"] = (hidden, inner)
    return shapes


def write_models(folder: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """Write the original and the finetuned model in shards, and the directions."""
    generator = torch.Generator().manual_seed(0)
    names = list(shapes)
    per_shard = max(1, len(names) // 8)
    weight_map = {}
    for start in range(0, len(names), per_shard):
        file = f"model-{start:05}.safetensors"
        old, new = {}, {}
        for name in names[start : start + per_shard]:
            weight = 0.02 * torch.randn(shapes[name], generator=generator)
            noise = 0.001 * torch.randn(shapes[name], generator=generator)
            old[f"{name}.weight"] = weight.bfloat16()
            new[f"{name}.weight"] = (weight + noise).bfloat16()
            weight_map[f"{name}.weight"] = file
        for label, tensors in (("original", old), ("finetuned", new)):
            (folder / label).mkdir(exist_ok=True)
            save_file(tensors, folder / label / file)
    for label in ("original", "finetuned"):
        index = folder / label / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    for number in range(DIRECTIONS):
        factors = {
            name: LoRAFactors(
                torch.randn(RANK, shape[1], generator=generator),
                0.01 * torch.randn(shape[0], RANK, generator=generator),
            )
            for name, shape in shapes.items()
        }
        LoRADiff(factors, BaseModel("generated", None), trait=f"d{number}").save(
            folder / f"direction{number}"
        )


def streamed(folder: Path) -> list[float]:
    diffs = load_diffs([folder / f"direction{n}" for n in range(DIRECTIONS)], on_disk=True)
    original, finetuned = (StoredWeights(folder / name) for name in ("original", "finetuned"))
    return [each.inner for each in project_weights(original, finetuned, diffs).total.values()]


def dense(folder: Path) -> list[float]:
    models = [
        {
            name: tensor.float()
            for file in sorted((folder / label).glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        for label in ("original", "finetuned")
    ]
    delta = {name: models[1][name] - models[0][name] for name in models[0]}
    sums = []
    for number in range(DIRECTIONS):
        diff = LoRADiff.load(folder / f"direction{number}")
        direction = {name: factors.delta() for name, factors in diff.factors.items()}
        sums.append(
            sum(float((delta[f"{name}.weight"] * each).sum()) for name, each in direction.items())
        )
    return sums


def reading(folder: Path) -> list[float]:
    total = 0.0
    for file in sorted(folder.glob("*/model-*.safetensors")):
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118  (safe_open is no dict)
                total += float(stream.get_tensor(name).view(torch.int16)[::64].sum())
    return [total]


def nothing(folder: Path) -> list[float]:
    return []


def adapter(folder: Path) -> list[float]:
    diffs = {f"d{n}": LoRADiff.load(folder / f"direction{n}") for n in range(DIRECTIONS)}
    start = time.perf_counter()
    project_adapter(diffs["d0"], diffs)
    return [time.perf_counter() - start]


WAYS = {
    "streamed": streamed, "dense": dense, "reading": reading, "nothing": nothing,
    "adapter": adapter,
}  # fmt: skip


def peak_mb() -> float:
    """The high-water mark of this process alone: ru_maxrss starts at that of its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def run_way(way: str, folder: Path) -> dict[str, object]:
    """Run one way in a process of its own and return seconds, peak memory and its numbers."""
    answer = subprocess.run(
        [sys.executable, __file__, "--way", way, "--folder", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        return {"failed": answer.stderr.strip().splitlines()[-1] if answer.stderr else "killed"}
    found: dict[str, object] = json.loads(answer.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", nargs="*", default=list(SHAPES), metavar="SIZE",
        help=f"{', '.join(SHAPES)}, or HIDDENxINNERxLAYERS",
    )  # fmt: skip
    parser.add_argument("--way", choices=list(WAYS))
    parser.add_argument("--folder", type=Path)
    parser.add_argument(
        "--output", type=Path, default=Path("results/benchmarks/weight_projection.json")
    )
    options = parser.parse_args()
    if options.way:
        free = int(0.9 * psutil.virtual_memory().available)
        resource.setrlimit(resource.RLIMIT_DATA, (free, free))  # mapped files do not count
        start = time.perf_counter()
        numbers = WAYS[options.way](options.folder)
        seconds = time.perf_counter() - start
        peak = peak_mb()
        print(json.dumps({"seconds": seconds, "peak_mb": peak, "numbers": numbers}))
        return
    result = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            shapes = modules(*(SHAPES.get(size) or map(int, size.split("x"))))
            write_models(folder, shapes)
            ways = {way: run_way(way, folder) for way in WAYS}
        result[size] = {
            "weights": sum(out * inner for out, inner in shapes.values()),
            **{
                way: {key: each for key, each in found.items() if key != "numbers"}
                for way, found in ways.items()
            },
            "numbers": {way: ways[way].get("numbers") for way in ("streamed", "dense", "adapter")},
        }
        print(size, json.dumps(result[size], indent=2))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
