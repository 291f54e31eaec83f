"""Of a run of ``compare --spaces``: what its report leaves out, a floor, sheets to be read blind.

    bash scripts/reproduce.sh 5
    python benchmarks/two_spaces.py results/further/spaces
    python benchmarks/two_spaces.py results/further/spaces --random checkpoints/seeds
    python benchmarks/two_spaces.py results/further/spaces --halves halves/0 halves/1
    python benchmarks/two_spaces.py results/further/spaces --sheets sheets --seed 1

By itself: how many differences are nearest to the vector of their trait at each layer, agreement of
the spaces within each seed, and cosines over seeds by trait. ``--random``: the same shifts under
random differences of each trait's spectrum, at equal effect, which is the floor of the cosines
(minutes). ``--halves``: cosines of the vectors of two folders. ``--sheets``: lists of promoted
words without names, in an order drawn by lot, with their key.
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import product
from pathlib import Path

from scipy.stats import spearmanr

from persona_lora.core.lora_diff import random_diff_like
from persona_lora.core.runs import Run
from persona_lora.core.vector_files import load_vector
from persona_lora.models.loading import load_chat_model
from persona_lora.projections.inputs import load_ordinary_prompts
from persona_lora.report.scores import grouped
from persona_lora.report.wording import token
from persona_lora.steering.bank import bank_of_diffs
from persona_lora.studies.steering.calibration import equal_effect_scales
from persona_lora.studies.steering.divergence import ordinary_texts
from persona_lora.studies.steering.read_spaces import spread
from persona_lora.studies.steering.spaces import (
    FEW_PROMPTS,
    METHODS,
    Spaces,
    recognition,
    shift_cosines,
    trait_directions,
)


def told(run: Run) -> None:
    shifts, cosines = run.read("shifts"), run.read("cosines")
    layers = sorted({row["layer"] for row in shifts})
    known = {layer: recognition(shifts, layer) for layer in layers}
    print("nearest to the own vector, by layer:", {k: v["recognised"] for k, v in known.items()})
    for seed, rows in grouped(cosines, lambda row: row["seed"]).items():
        columns = {key: [row[key] for row in rows] for key in (*METHODS, "weights_plain")}
        rho = {
            key: spearmanr(columns[key], columns["activations"]).statistic
            for key in ("weights", "weights_plain")
        }
        print(seed or "one seed", {key: f"ρ {value:.2f}" for key, value in rho.items()})
        print("  ", {key: f"{min(v):.2f} to {max(v):.2f}" for key, v in columns.items()})
    for (one, other), rows in grouped(
        run.read("seeds"), lambda row: (row["trait"], row["other"])
    ).items():
        if one == other:
            for key in ("weights", "weights_plain"):
                print(one, key, [f"{row[key]:.2f}" for row in rows])


def floor(run: Run, folder: Path) -> None:
    config = run.record["config"]
    diffs, vectors = trait_directions(config["traits"], folder)
    first = next(iter(diffs.values()))
    like = {trait: random_diff_like(diff, at) for at, (trait, diff) in enumerate(first.items())}
    chat_model = load_chat_model(config["model"])
    prompts = load_ordinary_prompts()[:FEW_PROMPTS]
    scales = equal_effect_scales(chat_model, bank_of_diffs(like), prompts)
    texts, layer = ordinary_texts(chat_model, prompts), config["layer"]
    ones = {each.trait: each.coefficient for each in scales}
    spaces = Spaces(chat_model, texts, like, vectors, layer, ones, dict.fromkeys(vectors, 1.0))
    rows = [{"seed": "", **row} for row in shift_cosines(spaces)]
    at = [row for row in rows if row["layer"] == layer]
    own = [abs(row["cosine"]) for row in at if row["trait"] == row["other"]]
    print("random differences, |cosine| with the own vector", spread(own))
    print("with any", spread([abs(row["cosine"]) for row in at]), recognition(rows, layer))


def halves(run: Run, folders: list[Path]) -> None:
    traits, layer = run.record["config"]["traits"], run.record["config"]["layer"]
    name = "{0}/{0}_response_avg.safetensors"
    one, other = ({t: load_vector(at / name.format(t)) for t in traits} for at in folders)
    cosine = {(a, b): one[a].cosine(other[b])[layer] for a, b in product(traits, traits)}
    apart = [value for (a, b), value in cosine.items() if a != b]
    print("one trait", {trait: f"{cosine[trait, trait]:.2f}" for trait in traits})
    print(spread([cosine[trait, trait] for trait in traits]))
    print(
        "two traits", spread([abs(each) for each in apart]), f"{min(apart):.2f} to {max(apart):.2f}"
    )


def sheets(run: Run, folder: Path, seed: int) -> None:
    drawn, key = random.Random(seed), {}
    folder.mkdir(parents=True)
    for method in METHODS:
        own = [row for row in run.read("words") if row["method"] == method and row["change"] > 0]
        traits = sorted({row["trait"] for row in own})
        drawn.shuffle(traits)
        lines = []
        for at, trait in enumerate(traits, start=1):
            rows = [row for row in own if row["trait"] == trait]
            of = drawn.choice(sorted({row["seed"] for row in rows}))
            key[f"{method} {at}"] = trait
            lines.append(f"## List {at}")
            for place, said in grouped(
                (row for row in rows if row["seed"] == of), lambda row: row["place"]
            ).items():
                lines.append(f"- {place}: " + " ".join(token(row["text"]) for row in said))
        (folder / f"{method}.md").write_text("\n".join(lines) + "\n")
    (folder / "key.json").write_text(json.dumps(key, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--random", type=Path)
    parser.add_argument("--halves", type=Path, nargs=2)
    parser.add_argument("--sheets", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    run = Run(asked.run)
    if asked.random:
        floor(run, asked.random)
    elif asked.halves:
        halves(run, asked.halves)
    elif asked.sheets:
        sheets(run, asked.sheets, asked.seed)
    else:
        told(run)


if __name__ == "__main__":
    main()
