"""What does a search gain over drawing at random, and who says so? Of a comparison of methods.

    bash scripts/reproduce.sh 4
    python benchmarks/persona_searches.py results/personas
    python benchmarks/persona_searches.py results/personas --swapped

For each searched method: the best mix that keeps the constraints, by the judge of the search on its
training prompts; what was named best, by the same judge on fresh prompts; and on held-out prompts
the fit by the judge that reports and by the one that searched (an answer that does not count has
1), each against random search. Reads rows; a few seconds.

``--swapped``: does a mix speak as *this* person, or only less like an assistant? The same answers
by the judges of the other persons compared (letters, all shipped persons told apart), by a person's
mean: what is left over them is the person's. And the fit by manner alone, where no answer counts
as failed, with the share of answers that count.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

import numpy as np

from persona_lora.core.chat import Exchange
from persona_lora.core.personas import list_personas, load_persona
from persona_lora.core.runs import Run
from persona_lora.judges.style_judge import LOWEST, LetterFeatures, fit_voices, has_words
from persona_lora.report.resampling import bootstrap_mean, sign_flip_p
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


def swapped(folder: Path) -> None:
    """Print how far answers fit their own person over the others that are compared."""
    rows = Run(folder / "comparison").read("held_out")
    personas = [load_persona(each) for each in list_personas()]
    voices = fit_voices(personas, "test", features=LetterFeatures())
    judges = {each: voices.judge_of(each) for each in sorted({row["persona"] for row in rows})}
    plain: dict[str, float] = {}
    for condition in ("none", "prompt", "equal", "lora", "random", "real"):
        asked = [row for row in rows if row["condition"] == condition and has_words(row["answer"])]
        exchanges = [Exchange(row["prompt"], row["answer"]) for row in asked]
        fits = {name: judge.judge(exchanges) for name, judge in judges.items()}
        over: dict[str, list[float]] = {}
        manner: dict[str, list[float]] = {}
        for at, row in enumerate(asked):
            said = {name: each[at].score or LOWEST for name, each in fits.items()}
            manner.setdefault(row["persona"], []).append(said[row["persona"]])
            others = fmean(fit for name, fit in said.items() if name != row["persona"])
            counted = 0.0 if row["failed"] else said[row["persona"]] - others
            over.setdefault(row["persona"], []).append(counted)
        share = fmean(not row["failed"] for row in asked)
        p = sign_flip_p(np.array([fmean(each) for each in over.values()]))
        means = {name: fmean(each) for name, each in manner.items()}
        plain = plain or means
        gain = {name: [mean - plain[name]] for name, mean in means.items()}
        alone, more, gap = (interval(bootstrap_mean(each), 2) for each in (manner, gain, over))
        said_of = f"{share:.0%} count, by manner alone {alone} (gain {more})"
        print(f"{condition}: {said_of}, over others {gap}, p {p:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--swapped", action="store_true")
    options = parser.parse_args()
    (swapped if options.swapped else main)(options.folder)
