"""Weights in two geometries: cosines of directions, and coordinates of finetunes on them.

    python benchmarks/geometry.py --diffs checkpoints/sycophancy/diff checkpoints/evil/diff \
        --finetunes checkpoints/finetunes/sycophancy_misaligned_2/adapter

Plain weight space, and weighted by the inputs of the model's modules on ordinary prompts. Give
directions of one trait from several seeds, and finetunes on one set of rows from several seeds, to
see how much of each number is the seed. A control's mean change is taken off the finetunes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from itertools import combinations
from pathlib import Path

from persona_lora.core.lora_diff import LoRADiff, mix
from persona_lora.models.load_options import DEFAULT_MODEL
from persona_lora.models.loading import load_chat_model
from persona_lora.projections.inputs import ModuleInputs, kept_inputs, load_ordinary_prompts
from persona_lora.projections.weight_space import project_adapter

Folders = dict[str, LoRADiff]


def opened(paths: list[Path]) -> Folders:
    """Open diffs or adapters, each called by what its path does not share with the others."""
    shared = os.path.commonpath(paths) if len(paths) > 1 else paths[0].parent
    return {str(path.relative_to(shared)): LoRADiff.load(path) for path in paths}


def _only(change: LoRADiff, other: LoRADiff) -> LoRADiff:
    """Return a change in the modules that another one changes, too."""
    shared = {name: each for name, each in change.factors.items() if name in other.factors}
    return dataclasses.replace(change, factors=shared)


def print_cosines(title: str, changes: Folders, inputs: ModuleInputs) -> None:
    weighed = {name: inputs.weigh(change) for name, change in changes.items()}
    print(f"{title}: norm, plain and weighted")
    for name, change in changes.items():
        print(f"  {name}: {change.norm():.3f}, {weighed[name].norm():.3f}")
    print(f"{title}: cosine, plain and weighted; weighted over the modules that both change")
    for one, other in combinations(changes, 2):
        if not changes[one].factors.keys() & changes[other].factors.keys():
            print(f"  {one} and {other}: no module in common")
            continue
        plain, weighted = (each[one].cosine(each[other]) for each in (changes, weighed))
        left, right = weighed[one], weighed[other]
        over = _only(left, right).cosine(_only(right, left))
        print(f"  {one} and {other}: {plain:+.3f}, {weighted:+.3f}; {over:+.3f}")


def print_coordinates(
    finetunes: Folders, diffs: Folders, inputs: ModuleInputs, control: LoRADiff | None
) -> None:
    print("coordinate (null sd), plain and weighted")
    for name, change in finetunes.items():
        plain, weighted = (
            project_adapter(change, diffs, inputs=each, control=control).total
            for each in (None, inputs)
        )
        for diff in diffs:
            said = (f"{x.coordinate:+.4f} ({x.null_sd:.4f})" for x in (plain[diff], weighted[diff]))
            print(f"  {name} on {diff}: {', '.join(said)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--diffs", type=Path, nargs="+", required=True)
    parser.add_argument("--finetunes", type=Path, nargs="*", default=[])
    parser.add_argument("--controls", type=Path, nargs="*", default=[])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    given = parser.parse_args()
    inputs = kept_inputs(load_chat_model(given.model), load_ordinary_prompts())
    print(f"inputs: {inputs.tokens} tokens; prompts {inputs.prompts[:12]}")
    diffs = opened(given.diffs)
    print_cosines("directions", diffs, inputs)
    if given.finetunes:
        finetunes = opened(given.finetunes)
        share = 1 / max(1, len(given.controls))
        controls = {LoRADiff.load(each): share for each in given.controls}
        print_cosines("finetunes", finetunes, inputs)
        print_coordinates(finetunes, diffs, inputs, mix(controls) if controls else None)


if __name__ == "__main__":
    main()
