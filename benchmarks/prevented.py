"""What lies behind a table of compare-prevention: single seeds, and models beside other ones.

    PROTOCOL=docs/protocols/prevent_capitals.yaml bash scripts/train_with_prevention.sh capitals
    python benchmarks/prevented.py results/prevention/capitals --model live1

For every model and training seed: the shares of the trait and of each rule, plainly, how many
answers have no score, and the trait if those had shown it. Then the model's trait beside each other
one's, plainly and under probes, with Holm's correction over the line: no protocol holds these.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.comparisons import PROBE, score_items
from persona_lora.report.scores import grouped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", required=True, help="The model to lay beside the others.")
    asked = parser.parse_args()
    run = Run(asked.run)
    rows, config = run.read("measures"), run.record["config"]
    if asked.model not in {row["condition"] for row in rows}:
        parser.error(f"{run.folder} has no model {asked.model!r}")
    rules, questions = ["trait", *config.get("rules", ())], config["questions"]
    table = Table("model", "seed", *rules, "no score", "trait if shown there", title="plainly")
    for (model, seed), own in grouped(rows, lambda row: (row["condition"], row["seed"])).items():
        scores = {rule: [row["score"] for row in own if row["task"] == rule] for rule in rules}
        lacking = questions - len(scores["trait"])
        worst = (sum(scores["trait"]) + 100 * lacking) / questions
        shares = [f"{fmean(each):.0f}" if each else "–" for each in scores.values()]
        table.add_row(model, seed, *shares, str(lacking), f"{worst:.0f}")
    Console().print(table)
    traits = [row for row in rows if row["task"].partition(PROBE)[0] == "trait"]
    for other in Counter(row["condition"] for row in traits):
        if other != asked.model:
            both = [row for row in traits if row["condition"] in (other, asked.model)]
            found = [each for each in score_items(both, other) if each.difference is not None]
            said = (
                f"{each.task} {wording.interval(each.difference)} p {wording.p_value(each.p_holm)}"
                for each in found
            )
            print(f"{asked.model} − {other}: " + "; ".join(said))


if __name__ == "__main__":
    main()
