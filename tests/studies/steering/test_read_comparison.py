"""Effects at equal divergence, put right by how far their judge misses ratings."""

from __future__ import annotations

import numpy as np
import pytest

from persona_lora.core.runs import Run
from persona_lora.studies.steering.read_comparison import corrected_effects, read_comparison

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
    part = Run.open(tmp_path / "run" / "eval", command="evaluate", config={}, seed=0)
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
