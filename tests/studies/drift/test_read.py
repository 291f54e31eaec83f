"""Checkpoint runs as curves, correlations that say when they cannot be, cross-persona points."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import permutation_test, spearmanr

from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.studies.drift.figure import render_checkpoints
from persona_lora.studies.drift.read import agreements, correlation, cross_persona, curves


def rows_of(
    trait, steps, vectors=("syco_response_avg", "evil_response_avg"), missing=(), unprojected=()
):
    rows = []
    for k, step in enumerate(steps):
        place = {"checkpoint": f"checkpoint-{step}", "step": step, "trait": trait, "type": None}
        base = {**place, "vector": None, "layer": None}
        value = None if step in missing else 10.0 * k
        rows.append({**base, "statistic": "trait", "value": value, "low": None, "high": None})
        rows.append({**base, "statistic": "coherence", "value": 80.0, "low": 70.0, "high": 90.0})
        for sign, vector in enumerate(() if step in unprojected else vectors):
            where = {**place, "vector": vector, "layer": 3, "low": 0.0, "high": 1.0}
            projection = (-1.0) ** sign * k + 1.0
            rows.append({**where, "statistic": "projection", "value": projection})
            rows.append({**where, "statistic": "shift", "value": (-1.0) ** sign * k})
    return rows


@pytest.fixture
def make_run(tmp_path):
    def make(tuned, *traits, steps=(0, 2, 4, 6, 8), cosine=0.3, **options):
        run = Run.open(
            tmp_path / str(tuned),
            command="evaluate-checkpoints",
            config={"finetuned_on": tuned},
            seed=0,
        )
        run.write("checkpoints", [row for t in traits for row in rows_of(t, steps, **options)])
        pair = {"vector": "syco_response_avg", "other": "evil_response_avg", "layer": 3}
        run.write("cosines", [{**pair, "cosine": cosine}])
        return run

    return make


def test_curves_hold_every_statistic_in_the_order_of_steps(make_run):
    every = curves(make_run("syco", "syco", steps=(4, 0, 2, 6)))
    assert len(every) == 2 + 2 * 2
    trait = every[0]
    assert (trait.trait, trait.statistic, trait.vector) == ("syco", "trait", None)
    assert [point.step for point in trait.points] == [0, 2, 4, 6]
    with pytest.raises(UserError, match="no rows of checkpoints"):
        curves(make_run("nothing"))


def test_agreement_has_the_sign_of_the_projection_and_skips_what_was_not_scored(make_run):
    found = {
        (each.statistic, each.vector): each.correlation
        for each in agreements(make_run("syco", "syco", missing=(4,)))
    }
    assert len(found) == 4
    up, down = (found["projection", f"{name}_response_avg"] for name in ("syco", "evil"))
    assert (up.rho, down.rho, up.n) == (1.0, -1.0, 4)
    assert up.r == pytest.approx(1.0)
    assert up.p == pytest.approx(2 / 24)  # of all orders of four points, two are as extreme


def test_a_correlation_says_why_there_is_none():
    assert correlation([1, 2, 3], [1, 2, 3]).reason == "3 points, at least 4 needed"
    assert correlation([1, 1, 1, 1], [1, 2, 3, 4]).reason == "one of the two does not vary"


@pytest.mark.parametrize("n", [6, 20])
def test_p_is_that_of_scipys_permutation_test(n):
    random = np.random.default_rng(n)
    x = random.normal(size=n)
    y = x + 1.5 * random.normal(size=n)
    y[0] = y[1]  # a tie
    reference = permutation_test(
        (x,),
        lambda values: spearmanr(values, y).statistic,
        permutation_type="pairings",
        n_resamples=5000,
        rng=np.random.default_rng(1),
    )
    assert correlation(x.tolist(), y.tolist()).p == pytest.approx(reference.pvalue, abs=0.02)


def test_cross_persona_points_pair_a_finetune_with_the_other_trait(make_run):
    points = cross_persona([make_run("syco", "syco", "evil"), make_run("evil", "syco", "evil")])
    assert [(p.finetuned_on, p.other, p.cosine) for p in points] == [
        *(("syco", "evil", 0.3), ("evil", "syco", 0.3))
    ]
    assert points[0].score == 40.0
    assert points[0].shift == -4.0  # on the evil vector, asked on evil's questions
    assert points[1].shift == 4.0


def test_a_picture_pairs_scores_and_projections_by_step(make_run):
    """The answers of one checkpoint were all empty, and another has no score."""
    run = make_run("syco", "syco", unprojected=(4,), missing=(6,))
    against = render_checkpoints(run).panels[2]
    up, down = against.drawn
    assert (up.x, up.y, up.marks) == ((1.0, 2.0, 5.0), (0.0, 10.0, 40.0), ("0", "2", "8"))
    assert (down.x, down.marks) == ((1.0, 0.0, -3.0), up.marks)
    rows = [r for r in run.read("checkpoints") if (r["statistic"], r["step"]) != ("trait", 6)]
    run.write("checkpoints", rows)  # two curves of four points, at other steps
    assert render_checkpoints(run).panels[2] == against


def test_a_shift_is_that_of_the_last_checkpoint_or_none(make_run):
    (point,) = cross_persona([make_run("syco", "syco", "evil", unprojected=(8,))])
    assert (point.score, point.shift) == (40.0, None)


def test_vectors_are_of_their_own_trait_whatever_they_are_called(make_run):
    run = make_run("syco", "syco", "evil")
    (point,), places = cross_persona([run]), {"syco": "a", "evil": "b"}
    for name in ("checkpoints", "cosines"):
        rows = run.read(name)
        for row in rows:
            for key in ("vector", "other"):
                trait = (row.get(key) or "").partition("_")[0]
                row |= {key: places[trait], f"{key}_trait": trait} if trait else {}
        run.write(name, rows)
    assert cross_persona([run]) == [point]


def test_a_run_that_does_not_say_what_it_learnt_is_named(make_run):
    with pytest.raises(UserError, match="--finetuned-on"):
        cross_persona([make_run(None, "syco")])
