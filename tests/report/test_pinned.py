"""Equal rows give equal numbers and words: a report made again says what it said.

Truth is planted elsewhere in this folder; here every figure is held to what it was, so that no term
of a formula, no seed and no number of resamples changes in silence.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from persona_lora.core.chat import Condition
from persona_lora.report import (
    comparisons,
    correction,
    power,
    resampling,
    summary,
    two_way,
    wording,
)
from persona_lora.report.resampling import FITS, SCORES, Interval
from tests.pinned import hold

RNG = np.random.default_rng(3)
SCORED = {at: [float(each) for each in row] for at, row in enumerate(RNG.uniform(20, 90, (9, 2)))}
SCORED[3][1] = None
VALUES = RNG.normal(4, 6, (4, 7))


def plain(value: Any) -> Any:
    """Return values of ours as JSON has them."""
    if dataclasses.is_dataclass(value):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def test_intervals_and_tests():
    x, y = VALUES[0], VALUES[1]
    columns = np.abs(VALUES), np.ones(VALUES.shape)
    question = np.array([0, 0, 1, 1, 2, 3, 3])
    hold(
        "intervals",
        plain(
            {
                "bca": resampling.bootstrap_mean(SCORED),
                "scaled": resampling.bootstrap_mean(SCORED, scale=SCORES),
                "seed": resampling.bootstrap_mean(SCORED, scale=SCORES, seed=1, resamples=300),
                "fits": resampling.bootstrap_mean({0: [1.0], 1: [5.0], 2: [4.5]}, scale=FITS),
                "rho of means": resampling.resampled_estimate(
                    lambda means: resampling.rank_correlation(np.arange(4.0), means), *columns
                ),
                "rho of rows": resampling.row_rank_correlation(x, y, question),
                "flips": [resampling.sign_flip_p(row) for row in VALUES],
                "drawn flips": resampling.sign_flip_p(RNG.normal(0.5, 1, 20)),
                "holm": resampling.holm([0.01, None, 0.04, 0.03, 0.9]),
                "separation": resampling.separation(
                    [3.0, 1.0, 2.0, 2.0, 0.5, 4.0], [100, 75, 75, 25, 0, 50]
                ),
                "auc": [resampling.auc_bounds(auc, 12, 30) for auc in (0.0, 0.31, 0.8, 1.0)],
            }
        ),
    )


def test_two_ways_power_and_correction():
    pilot, one = power.Pilot.of(VALUES), power.Pilot.of(VALUES[:1])
    sizes = {"questions": (8, 20), "simulations": 60}
    scores = {name: list(np.abs(row)) for name, row in zip("abcd", VALUES, strict=True)}
    errors = {name: list(row) for name, row in zip("efgh", VALUES, strict=True)}
    found = power.plan_power(pilot, 5.0, 0.05, **sizes)

    def put_right(errors):
        raw = resampling.bootstrap_mean(scores, scale=resampling.SCORES)
        by_kind = correction.Errors({"lora +": errors})
        return correction.put_right(raw, by_kind, {"lora +": 1.0}, resampling.SCORES)

    hold(
        "planned",
        plain(
            {
                "components": two_way.components(VALUES),
                "crossed": two_way.crossed_mean(VALUES),
                "p": two_way.crossed_ps(np.stack([VALUES, VALUES + 9, np.full_like(VALUES, 2)])),
                "draws": two_way.mean_over_draws([SCORED] * 2 + [{k: [95.0] for k in SCORED}]),
                "draw": two_way.mean_over_draws([SCORED]),
                "gap": two_way.mean_gap([dict(enumerate(row)) for row in VALUES]),
                "pilot": [pilot, one],
                "power": found,
                "power of one": power.plan_power(one, -5.0, 0.05, **sizes),
                "finetunes": power.plan_finetunes(0.3, 0.6, 0.05, simulations=20),
                "cheapest": [power.cheapest(found, each) for each in (0.2, 0.5, 1.1)],
                "corrected": put_right(errors),
                "near an end": put_right({k: [-9.0] for k in "efg"}),
                "kinds": [
                    correction.kind_of(Condition(*each))
                    for each in (("lora", 1.5), ("activation", -1.0), ("none", 0.0), ("x", 1.0))
                ],
            }
        ),
    )


@pytest.mark.parametrize("kind", ["diff", "vector"])
def test_a_sweep(sweep_rows, kind):
    more = {} if kind == "diff" else {"layers": (12,), "control": 2}
    answers, verdicts = sweep_rows(
        questions=6, samples=2, coefficients=(-2.0, 0.0, 1.0, 2.0), **more
    )
    for row in verdicts[::7]:
        row["score"] = None
    norm = {"relative_weight_norm": 0.03} if kind == "diff" else {"relative_state_norm": 0.2}
    places = [("lora", None)] if kind == "diff" else [("activation", 12), ("random#1", 12)]
    divergences = [
        {"method": method, "layer": layer, "coefficient": c, **norm, "kl_mean": c * c,
         "kl_p95": 3.0}
        for method, layer in places for c in (-2.0, 1.0, 2.0)
    ]  # fmt: skip
    found = summary.summarise_sweep(
        answers, verdicts, divergences, trait="sycophancy", resamples=200, seed=5
    )
    lines = (
        *(wording.headline, wording.sweep_title, wording.at_layer, wording.statistics_line),
        *(wording.place_line, wording.control_line, wording.sample_line, wording.gaps),
    )
    hold(
        f"sweep_{kind}",
        plain(
            {
                "rows": summary.long_rows(found),
                "said": [line(found) for line in lines],
                "scored": [wording.scored(each.trait) for each in found.conditions],
                "floor": [summary.floor_under(each) for each in (None, 12.0, 47.3, 90.0)],
            }
        ),
    )


def test_conditions_beside_one():
    rows = [
        {"persona": who, "condition": name, "prompt_id": at, "score": 1 + (at * shift) % 4,
         "coherence": 80.0 + at, "relevance": None if at == 2 else 60.0 - shift}
        for who in ("a", "b", "c")
        for name, shift in (("none", 1), ("lora", 2.5), ("mean", 3))
        for at in range(5)
    ]  # fmt: skip
    items = [
        {"condition": name, "task": task, "metric": metric, "item": at, "score": level + at % 3}
        for name, level in (("plain", 0.5), ("added", 1.5))
        for task, metric in (("trait", "score"), ("text", "loglikelihood"))
        for at in range(6)
    ]
    fits = [
        comparisons.fits_over_prompts(rows[:15], "none"),
        comparisons.fits_over_personas(rows, "none"),
    ]
    tasks = comparisons.score_items(items, "plain")
    hold(
        "beside",
        plain(
            {
                "fits": fits,
                "tasks": tasks,
                "tables": [
                    *(comparisons.fit_table(each, "Fits").rows for each in fits),
                    comparisons.task_table(tasks).rows,
                    *(each.rows for each in comparisons.measure_tables(tasks)),
                ],
            }
        ),
    )


def test_numbers_in_words():
    value = Interval(70.64, 64.2, 77.0, 19, 10, 0.95)
    hold(
        "words",
        [
            *(wording.number(each, 1) for each in (0.05, -0.05, 12.25, -3.2)),
            *(wording.significant(each) for each in (0.00123, 9.95, 120.0, -0.4)),
            *(wording.interval(value, 1), wording.change(value), *wording.scored(value)),
            *(wording.time_or_memory("x", unit, size) for unit, size in (
                ("seconds", 1.2345), ("bytes", 2.0**20), ("bytes", 2.0**20 - 1), ("bytes", 512.0))),
            *(wording.p_value(each) for each in (0.001, 0.0009, 0.0499)),
            *(wording.condition_label(*each) for each in (
                ("random#2", 1.5), ("lora", -1.0), ("x_y", None))),
        ],
    )  # fmt: skip
