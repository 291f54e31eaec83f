"""The geometry of trained directions: norms, cosines, compression, and the wrong difference.

    python benchmarks/directions.py checkpoints/sycophancy checkpoints/evil

For each trained folder (``pos``, ``neg``, ``diff``): the norm of the diff, the cosine of positive
and negative LoRA, the energy that lower ranks keep, and the cosine and relative error of
(B₊ − B₋)(A₊ − A₋), which is not the difference. Then the cosines between the diffs.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

from persona_lora.core.lora_diff import LoRADiff, LoRAFactors


def subtracted_factors(pos: LoRADiff, neg: LoRADiff) -> LoRADiff:
    factors = {
        name: LoRAFactors(each.A - neg.factors[name].A, each.B - neg.factors[name].B)
        for name, each in pos.factors.items()
    }
    return LoRADiff(factors, pos.base_model)


def describe(folder: Path) -> LoRADiff:
    pos, neg = LoRADiff.load(folder / "pos"), LoRADiff.load(folder / "neg")
    diff = LoRADiff.from_adapters(folder / "pos", folder / "neg")
    wrong = subtracted_factors(pos, neg)
    kept = {rank: diff.compress(rank=rank).energy_kept for rank in (diff.rank // 4, diff.rank // 2)}
    print(
        f"{folder.name}: norm {diff.norm():.2f}, cos(pos, neg) {pos.cosine(neg):.2f}, "
        + ", ".join(f"rank {rank} keeps {share:.1%}" for rank, share in kept.items())
        + f"; subtracted factors: cosine {wrong.cosine(diff):+.2f}, "
        f"relative error {(wrong - diff).norm() / diff.norm():.2f}"
    )
    return diff


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    folders = parser.parse_args().folders
    diffs = {folder.name: describe(folder) for folder in folders}
    for one, other in combinations(diffs, 2):
        print(f"cos({one}, {other}) {diffs[one].cosine(diffs[other]):+.2f}")


if __name__ == "__main__":
    main()
