"""What does a search gain over drawing at random, and who says so? Of a comparison of methods.

    bash scripts/reproduce.sh 4
    python benchmarks/persona_searches.py results/personas

For each searched method: the best mix that keeps the constraints, by the judge of the search on its
training prompts; what was named best, by the same judge on fresh prompts; and on held-out prompts
the fit by the judge that reports and by the one that searched (an answer that does not count has
1), each against random search. Reads rows; a few seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean

from persona_lora.core.runs import Run
from persona_lora.judges.style_judge import LOWEST
from persona_lora.report.wording import interval
from persona_lora.studies.personas.read_fits import UNSTEERED, condition_fits, over_personas


def best_kept(rows: list[dict]) -> float | None:
    """Return the highest value of what keeps the constraints."""
    values = [row["value"] for row in rows if not row["violation"] and row["value"] is not None]
    return max(values, default=None)


def main(folder: Path) -> None:
    rows = Run(folder / "comparison").read("held_out")
    searched = [{**row, "score": LOWEST if row["failed"] else row["searched_by"]} for row in rows]
    trained = sorted({row["trained"] for row in rows if row.get("trained")})
    for method in ("lora", "random"):
        runs = [Run(path.parent) for path in sorted(folder.glob(f"{method}/*/run.json"))]
        for part, where in (("generations", "training prompts"), ("finalists", "fresh prompts")):
            best = [value for run in runs if (value := best_kept(run.read(part))) is not None]
            print(f"{method}, {len(best)} searches, {where}: {fmean(best):.2f}")
        for judge, judged in (("reports", rows), ("searched", searched)):
            fits = condition_fits(judged, over=over_personas, reference="random")
            (own,) = (each for each in fits if each.condition == method)
            gap = "" if own.difference is None else f", over random {interval(own.difference, 2)}"
            print(f"  held out, the judge that {judge}: {own.fit.mean:.2f}{gap}")
        for seed in trained:
            kept = [row for row in rows if row.get("trained") in (seed, "", None)]
            fits = condition_fits(kept, over=over_personas, reference=UNSTEERED)
            (own,) = (each for each in fits if each.condition == method)
            gain = own.difference and own.difference.mean
            print(f"  over unsteered, {seed}: {gain:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
