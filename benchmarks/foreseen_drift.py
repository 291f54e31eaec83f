"""What lies behind the pooled numbers of predict-finetuning --control-rows, family by family.

    bash scripts/predict_finetuning.sh
    python benchmarks/foreseen_drift.py results/prediction

For every judged trait: what each family's finetunes have above their controls, in the score, on the
trait's own direction and in the text; and the correlations inside the trait's own family, beside
that of how far the weights moved, which knows no direction. Then the pooled correlations over some
of the finetunes (those of one dose; without the families of the judged traits), and those of the
text times how far a finetune is from its control, which knows rows and dose and no direction.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from rich.console import Console
from rich.table import Table

from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.scores import Row, grouped
from persona_lora.studies.drift.read_prediction import (
    BASE,
    DISTANCE,
    FROM_CONTROL,
    POOLED,
    TEXT,
    WEIGHTS,
    changes,
    contrasts,
    predict,
    rows_of,
)

PLAIN, ACTIVATIONS = "weights, plain", "activations"
KINDS = (WEIGHTS, PLAIN, ACTIVATIONS, TEXT)
TIMES = "text times distance"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path)
    run = Run(parser.parse_args().run)
    judged, predictors = rows_of(run)
    control = {row["finetune"]: row["control"] for row in judged if row.get("control")}
    if not control:
        parser.error(f"{run.folder} has no controls; run predict-finetuning with --control-rows")
    values = {(row["kind"], row["direction"], row["finetune"]): row["value"] for row in predictors}
    moved = {
        row["finetune"]: row["value"]
        for row in run.read("predictors")
        if row["kind"] == DISTANCE  # of the finetune itself: its control's is much the same
    }
    for trait, drift in changes(judged).items():
        table = Table(f"less their controls: {trait}", "score", "coordinate", "text", "finetunes")
        families = grouped(drift, lambda name: _kind_of(name, control[name]))
        for (family, variant), names in families.items():
            means = [fmean(drift[name] for name in names)]
            means += [
                fmean(values[kind, trait, name] for name in names) for kind in (WEIGHTS, TEXT)
            ]
            cells = (f"{means[0]:+.1f}", f"{means[1]:+.2f}", f"{means[2]:+.1f}", str(len(names)))
            table.add_row(f"{family}{variant}", *cells)
        Console().print(table)
        own = [name for name in drift if _kind_of(name, control[name])[0] == trait]
        told = {kind: [values[kind, trait, name] for name in own] for kind in KINDS}
        told[DISTANCE] = [moved[name] for name in own]
        scores = [drift[name] for name in own]
        if len(own) > 2:
            line = (f"{kind} {np.corrcoef(x, scores)[0, 1]:.2f}" for kind, x in told.items())
            print(f"r inside its own family ({len(own)} finetunes): " + ", ".join(line))
    told_by = [row for row in predictors if row["kind"] in (*KINDS, FROM_CONTROL)]
    told_by += [
        {**row, "kind": TIMES, "value": row["value"] * values[FROM_CONTROL, *_place(row)]}
        for row in predictors
        if row["kind"] == TEXT and (FROM_CONTROL, *_place(row)) in values
    ]
    _selections(judged, told_by, {name: _kind_of(name, control[name]) for name in control})


def _selections(
    judged: Sequence[Row], predictors: Sequence[Row], kinds: Mapping[str, tuple[str, str]]
) -> None:
    """Print the pooled correlations over all finetunes, of one variant each, and without own."""
    traits = set(changes(judged))
    chosen = {"all": set(kinds)}
    for variant in {variant for _, variant in kinds.values()}:
        chosen[variant.strip("_")] = {name for name in kinds if kinds[name][1] == variant}
    chosen["without own families"] = {name for name in kinds if kinds[name][0] not in traits}
    columns = list(dict.fromkeys(row["kind"] for row in predictors))
    table = Table("pooled r", "finetunes", *columns, f"{WEIGHTS} − {TEXT}", f"{WEIGHTS} − {TIMES}")
    for title, names in sorted(chosen.items()):
        scores = [row for row in judged if row["finetune"] in {BASE, *names}]
        told = [row for row in predictors if row["finetune"] in names]
        found = {each.kind: each.said for each in predict(scores, told) if each.judged == POOLED}
        gaps = {(each.first, each.second): each for each in contrasts(scores, told)}
        shown = (
            wording.between(each.difference, each.low, each.high, 2)
            for each in (gaps[WEIGHTS, other] for other in (TEXT, TIMES))
        )
        table.add_row(title, str(len(names)), *(found[kind] for kind in columns), *shown)
    Console(width=220).print(table)


def _place(row: Row) -> tuple[str, str]:
    return row["direction"], row["finetune"]


def _kind_of(finetune: str, control: str) -> tuple[str, str]:
    """Return the family that a finetune shares with its control, and what it is in it."""
    family = Path(control).name.partition("_normal")[0]
    rest = Path(finetune).name.removeprefix(family)
    return family.removeprefix("organisms_"), rest.partition("_seed")[0]


if __name__ == "__main__":
    main()
