"""Effects at equal divergence, put right by how far their judge misses ratings."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from persona_lora.core.runs import Run
from persona_lora.studies.steering.read_comparison import (
    corrected_effects,
    read_comparison,
    write_points,
)

LEVELS = [
    {"level": level, "method": method, "coefficient": value}
    for level, sign in enumerate((1.0, -1.0))
    for method, value in (("lora", sign), ("activation", 3 * sign), ("random", 2 * sign))
]
# What the judge adds: it is 10 too kind to weights with +, 4 to vectors with +, and 6 less to those
# with −. So weights − activations is off by 10 / 2 − (4 + 6) / 2 = 0, weights by 5, vectors by 5.
KIND = {"lora +": 10.0, "lora -": 0.0, "vector +": 4.0, "vector -": -6.0, "unsteered": 3.0}


@pytest.fixture
def compared(tmp_path):
    random, run = (
        np.random.default_rng(0),
        Run.open(
            tmp_path / "run",
            command="compare",
            config={"trait": "evil", "statistic": "mean", "model": "small"},
            seed=0,
        ),
    )
    config = {"model": "small"}
    part = Run.open(tmp_path / "run" / "eval", command="evaluate", config=config, seed=0)
    run.write("splits", [{"split": "eval"}])
    measured = {f"{name}_{each}": 0.1 for name in ("kl", "ordinary") for each in ("mean", "p95")}
    run.write("levels", [{**row, **measured, "matched": True} for row in LEVELS])
    places = [("none", None), *((row["method"], row["coefficient"]) for row in LEVELS)]
    asked = [(*place, at) for place in places for at in range(12)]
    part.write(
        "answers",
        [
            {"row": row, "method": method, "coefficient": value, "question_id": at}
            for row, (method, value, at) in enumerate(asked)
        ],
    )
    part.write(
        "verdicts",
        [
            {"row": row, "criterion": each, "judge": "j",
             "score": 40 + 8 * np.sign(value or 0) + random.normal()}
            for row, (_, value, _) in enumerate(asked)
            for each in ("evil", "coherence")
        ],
    )  # fmt: skip
    rated = [
        {"model": model, "condition": kind, "question": f"q{at}", "rating": 50.0,
         "score": 50.0 + bias * (1 if model == "small" else 9) + random.normal()}
        for model in ("small", "large")
        for kind, bias in KIND.items()
        for at in range(10)
    ]  # fmt: skip
    own = {"within": 0.6, "calibration_error": 4.0, "compared": rated}
    part.write("validation", [{"criterion": "evil", "judge": "j", "own": own}])
    return run


def test_effects_are_put_right_by_the_errors_of_their_kinds_on_the_run_s_model(compared):
    effects = {(e.split, e.method): e for e in read_comparison(compared).overall}
    (table,) = corrected_effects(compared, effects)
    said = {
        row[1]: [int(cell.split()[0].replace("−", "-")) for cell in row[2:]] for row in table.rows
    }
    assert said["weights"] == [pytest.approx(8, abs=1), pytest.approx(3, abs=1)]
    assert said["activations"] == [pytest.approx(8, abs=1), pytest.approx(3, abs=1)]
    assert said["weights − activations"] == [pytest.approx(0, abs=1), pytest.approx(0, abs=1)]
    assert "(small)" in table.note  # and not the larger one, which is misjudged nine times as far
    Run(compared.folder / "eval").write("validation", [])
    assert corrected_effects(compared, effects) == ()


def test_the_table_has_points_and_differences_corrected_and_none_of_what_was_not_rated(compared):
    write_points(compared, read_comparison(compared))
    with (compared.folder / "comparison.csv").open(newline="") as stream:
        rows = {(row["method"], row["level"]): row for row in csv.DictReader(stream)}
    shift = {
        place: float(row["trait_corrected"]) - float(row["trait"])
        for place, row in rows.items()
        if row["trait_corrected"]
    }
    near = {("none", ""): -3, ("lora", "0"): -10, ("lora", "1"): 0}
    near |= {("activation", "0"): -4, ("activation", "1"): 6}
    assert shift == {place: pytest.approx(by, abs=1) for place, by in near.items()}
    gap = {
        place: float(row["difference_corrected"]) - float(row["difference"])
        for place, row in rows.items()
        if row["difference_corrected"]
    }
    # With + weights lose 10 and vectors 4; with −, less is more, and vectors lose 6.
    near = {("activation", "0"): -6, ("activation", "1"): 6}
    assert gap == {place: pytest.approx(by, abs=1) for place, by in near.items()}
    for row in rows.values():
        if row["trait_corrected"]:
            ends = [float(row[f"trait_corrected_{end}"]) for end in ("low", "high")]
            assert ends[1] - ends[0] > float(row["trait_high"]) - float(row["trait_low"])
