"""Does a family steer as well as training both factors? Two ways of training, beside each other.

    python benchmarks/families.py results/both results/family
    python benchmarks/families.py results/lora results/full --seed seed42    # of one seed

Each folder holds a sweep per trait and training seed, ``<trait>/<seed>``, over the same questions
and as many coefficients; those of one rank are compared, so give them in nats. The table says of
every strength how far the trait goes from − to +, how coherent the answers are, and the second
way minus the first, with an interval over seeds and questions alike (of one seed over questions,
of two none). A question that a judge abstains on, under any seed of either way, is left out of
that row.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from persona_lora.core.chat import COHERENCE
from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.two_way import mean_gap


def answers(folder: Path, seed: str) -> pd.DataFrame:
    """Return the scores of all sweeps below a folder, with the rank of each coefficient from 0."""
    frames = []
    for path in sorted(folder.glob(f"*/{seed}")):
        run = Run(path)
        rows = pd.DataFrame(run.read("answers"))[["row", "question_id", "coefficient"]]
        for judge, name in (("", "verdicts"), ("second ", "second_verdicts")):
            verdicts = pd.DataFrame(run.read(name)).pivot(
                index="row", columns="criterion", values="score"
            )
            names = {
                column: judge + ("trait" if column != COHERENCE else column) for column in verdicts
            }
            rows = rows.join(verdicts.rename(columns=names), on="row")
        moved = pd.DataFrame(run.read("divergence")).set_index("coefficient")["kl_mean"]
        rows["nats"] = rows["coefficient"].map(moved)
        rows["level"] = rows["coefficient"].rank(method="dense").astype(int)
        rows["level"] -= (rows["level"].max() + 1) // 2
        frames.append(rows.assign(trait_name=path.parent.name, seed=path.name))
    return pd.concat(frames, ignore_index=True)


def values(rows: pd.DataFrame, column: str, level: int) -> np.ndarray:
    """Return a column's value at one level, ``[seeds, questions]``."""
    at = rows[rows["level"] == level]
    return at.pivot(index="seed", columns="question_id", values=column).sort_index().to_numpy()


def reach(rows: pd.DataFrame, column: str, level: int) -> np.ndarray:
    return values(rows, column, level) - values(rows, column, -level)


def sense(rows: pd.DataFrame, column: str, level: int) -> np.ndarray:
    return (values(rows, column, level) + values(rows, column, -level)) / 2


def compared(one: np.ndarray, other: np.ndarray) -> str:
    """Return the number of questions, both means and their difference, as cells."""
    known = ~np.isnan(one + other).any(axis=0)
    cells = (one[:, known], other[:, known], (other - one)[:, known])
    draws = ([dict(enumerate(row)) for row in each.tolist()] for each in cells)
    means = " | ".join(wording.interval(mean_gap(each).interval, 1) for each in draws)
    return f"{known.sum()} | {means}"


def table(first: pd.DataFrame, second: pd.DataFrame) -> None:
    print("| trait | nats | | questions | first | second | second − first |")
    print("|---|---|---|---|---|---|---|")
    for trait in first["trait_name"].unique():
        of = [each[each["trait_name"] == trait] for each in (first, second)]
        for level in range(1, int(of[0]["level"].max()) + 1):
            nats = ", ".join(
                f"{each[each['level'].abs() == level]['nats'].mean():.3f}" for each in of
            )
            for name, measure, column in (
                ("trait, + less −", reach, "trait"),
                ("by the second judge", reach, "second trait"),
                ("coherence", sense, COHERENCE),
            ):
                cells = compared(*(measure(each, column, level) for each in of))
                print(f"| {trait} | {nats} | {name} | {cells} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--seed", default="*")
    given = parser.parse_args()
    table(*(answers(each, given.seed) for each in (given.first, given.second)))


if __name__ == "__main__":
    main()
