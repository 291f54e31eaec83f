"""Predictions of drift, on numbers whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.studies.drift import read_prediction
from persona_lora.studies.drift.figure import render_prediction
from persona_lora.studies.drift.read_prediction import (
    BASE,
    POOLED,
    answers_place,
    changes,
    contrasts,
    less_controls,
    nulls,
    predict,
    prediction_table,
    unfit_marks,
)

NAMES = [f"f{number}" for number in range(12)]


def study(noise=0.0, seed=0):
    """Scores that follow "weights" up to noise, and "activations" not at all."""
    rng = np.random.default_rng(seed)
    judged = [{"finetune": BASE, "trait": t, "score": 10.0} for t in ("evil", "kind")]
    predictors = []
    for trait, slope in (("evil", 2.0), ("kind", -3.0)):
        for name, x in zip(NAMES, rng.normal(size=len(NAMES)), strict=True):
            score = 10.0 + slope * x + noise * rng.normal()
            judged.append({"finetune": name, "trait": trait, "score": score})
            for kind, value in (("weights", x), ("activations", rng.normal())):
                predictors.append(
                    {"finetune": name, "direction": trait, "kind": kind, "value": value}
                )
    return judged, predictors


def test_a_perfect_predictor_is_found_with_its_sign():
    found = {(p.kind, p.judged, p.direction): p for p in predict(*study())}
    assert found["weights", "evil", "evil"].r == pytest.approx(1.0)
    assert found["weights", "kind", "kind"].r == pytest.approx(-1.0)
    assert found["weights", "evil", "evil"].error == pytest.approx(0.0, abs=1e-9)
    assert found["weights", "evil", "evil"].plain_error > 1
    assert found["weights", "evil", "kind"].own is False
    assert abs(found["weights", "evil", "kind"].r) < 0.9
    assert found["weights", "evil", "evil"].p < 0.001


@pytest.mark.parametrize("constant", ["score", "value"])
def test_what_does_not_vary_is_no_finding(constant):
    judged, predictors = study()
    rows = judged if constant == "score" else predictors
    for row in rows:
        row[constant] = 10.0
    predictors += [
        {"finetune": name, "direction": f"evil#{at}", "kind": "random", "value": float(at + x)}
        for at in range(9)
        for x, name in enumerate(NAMES)
    ]
    assert {each.p for each in predict(judged, predictors)} == {1.0}
    (null,) = nulls(judged, predictors)
    assert (null.p, null.shuffled_p) == (1.0, 1.0)


def test_intervals_hold_r_and_the_correction_only_raises_p():
    for each in predict(*study(noise=1.0)):
        assert each.r_low - 1e-9 <= each.r <= each.r_high + 1e-9
        assert each.p_holm >= each.p
        assert each.n == 12 or each.judged == POOLED


def test_pooling_does_not_reward_differences_between_traits():
    """Two traits whose scores lie apart, and predictors that say only which trait it is."""
    rng = np.random.default_rng(1)
    judged = [{"finetune": BASE, "trait": t, "score": 0.0} for t in ("evil", "kind")]
    predictors = []
    for trait, level in (("evil", 0.0), ("kind", 100.0)):
        for name in NAMES:
            judged.append({"finetune": name, "trait": trait, "score": level + rng.normal()})
            value = level + rng.normal()
            predictors.append(
                {"finetune": name, "direction": trait, "kind": "weights", "value": value}
            )
    pooled = next(p for p in predict(judged, predictors) if p.judged == POOLED)
    assert abs(pooled.r) < 0.5


def test_the_better_kind_wins_the_contrast():
    judged, predictors = study(noise=0.3)
    flipped = [
        {**row, "value": -row["value"]} if row["direction"] == "kind" else row for row in predictors
    ]
    (contrast,) = contrasts(judged, flipped)
    assert (contrast.first, contrast.second, contrast.n) == ("weights", "activations", 12)
    assert contrast.low > 0
    assert contrast.low < contrast.difference < contrast.high


def test_changes_are_from_the_base():
    judged = [
        {"finetune": BASE, "trait": "evil", "score": 10.0},
        {"finetune": "a", "trait": "evil", "score": 25.0},
        {"finetune": "b", "trait": "evil", "score": None},
    ]
    assert changes(judged) == {"evil": {"a": 15.0}}
    with pytest.raises(UserError, match="base model was not judged"):
        changes(judged[1:])


def test_too_few_finetunes_are_refused():
    judged, predictors = study()
    few = [row for row in predictors if row["finetune"] in NAMES[:3]]
    with pytest.raises(UserError, match="3 finetunes"):
        predict(judged, few)


def test_the_picture_is_the_same_for_the_same_rows():
    assert render_prediction(*study(0.5)).png() == render_prediction(*study(0.5)).png()


def test_a_direction_is_compared_with_random_ones_of_its_own():
    drift = {f"f{at}": float(at) for at in range(8)}
    judged = [{"finetune": "base", "trait": "evil", "score": 0.0}]
    judged += [{"finetune": name, "trait": "evil", "score": value} for name, value in drift.items()]
    rng = np.random.default_rng(0)
    predictors = [
        {"finetune": name, "direction": "evil", "kind": "weights", "value": value}
        for name, value in drift.items()
    ]
    predictors += [
        {"finetune": name, "direction": f"evil#{k}", "kind": "random", "value": rng.normal()}
        for k in range(19)
        for name in drift
    ]
    (null,) = nulls(judged, predictors)
    assert null.r == pytest.approx(1.0)
    assert null.p == pytest.approx(1 / 20)
    assert 0 < null.high < 1
    assert {each.kind for each in predict(judged, predictors)} == {"weights"}


def test_a_trait_judged_twice_is_no_more_evidence_than_once():
    """The units of a pooled prediction are finetunes, not finetunes times traits."""
    judged, predictors = study(noise=2.0)
    once = [[r for r in judged if r["trait"] == "evil"],
            [r for r in predictors if r["direction"] == "evil"]]  # fmt: skip
    twice = [
        rows + [{**row, key: "again"} for row in rows]
        for rows, key in zip(once, ("trait", "direction"), strict=True)
    ]
    alone, both = (
        next(p for p in predict(*rows) if p.judged == POOLED and p.kind == "weights")
        for rows in (once, twice)
    )
    for name in ("n", "r", "r_low", "r_high", "rho", "p", "error"):
        assert getattr(both, name) == pytest.approx(getattr(alone, name)), name


def test_pooled_errors_are_in_deviations_of_what_the_line_was_fitted_on(tmp_path):
    judged, predictors = study(noise=2.0)
    found = predict(judged, predictors)
    pooled = next(each for each in found if (each.judged, each.kind) == (POOLED, "weights"))
    drift, errors, plain = changes(judged), [], []
    value = {(row["direction"], row["finetune"]): row["value"] for row in predictors[::2]}
    for out in NAMES:
        kept, own = [], []
        for trait in drift:
            points = [(value[trait, name], drift[trait][name]) for name in NAMES if name != out]
            mean, sd = np.mean(points, axis=0), np.std(points, axis=0)
            kept += [*((np.array(points) - mean) / sd)]
            own.append((np.array([value[trait, out], drift[trait][out]]) - mean) / sd)
        slope, start = np.polyfit(*np.array(kept).T, 1)
        errors += [(y - slope * x - start) ** 2 for x, y in own]
        plain += [y**2 for _, y in own]
    assert pooled.error == pytest.approx(np.sqrt(np.mean(errors)))
    assert pooled.plain_error == pytest.approx(np.sqrt(np.mean(plain)))
    run = Run.open(tmp_path / "run", command="predict-finetuning", config={}, seed=0)
    run.write("judged", judged)
    run.write("predictors", predictors)
    told = {row[1]: row[-2:] for row in prediction_table(run).rows if row[0] == "weights"}
    assert told[POOLED] == (f"{pooled.error:.2f} / {pooled.plain_error:.2f} sd",) * 2
    assert not any("sd" in each for each in told["evil"])


# -- data sets are the units --------------------------------------------------------------------


def of_data_sets(number, each, *, signal=0.0, seed=0):
    """``each`` finetunes of every data set: alike in the predictor, and in the score."""
    rng = np.random.default_rng(seed)
    judged = [{"finetune": BASE, "trait": "evil", "score": 0.0}]
    predictors = []
    for data in range(number):
        x, y = rng.normal(size=2)
        for seed_of_training in range(each):
            name = f"d{data}s{seed_of_training}"
            score = 10 * (signal * x + y) + rng.normal()
            row = {"finetune": name, "trait": "evil", "score": score}
            judged.append({**row, "data": f"data {data}", "seed": seed_of_training})
            value = x + 0.1 * rng.normal()
            predictors.append(
                {"finetune": name, "direction": "evil", "kind": "weights", "value": value}
            )
    return judged, predictors


def without_data(judged):
    return [{key: each for key, each in row.items() if key != "data"} for row in judged]


def test_twenty_finetunes_of_five_data_sets_are_no_twenty_draws():
    """Without a signal the p of data sets keeps its level; that of finetunes does not."""
    found, taken_for_units = [], []
    for seed in range(10):
        judged, predictors = of_data_sets(5, 4, seed=seed)
        found += [p.p for p in predict(judged, predictors) if p.judged == "evil"]
        alone = predict(without_data(judged), predictors)
        taken_for_units += [p.p for p in alone if p.judged == "evil"]
    assert np.mean(np.array(found) < 0.05) <= 0.1
    assert np.mean(np.array(taken_for_units) < 0.05) > 0.3


def test_a_line_that_knows_the_data_set_has_a_smaller_error_than_one_that_does_not():
    judged, predictors = of_data_sets(6, 4)
    known = predict(judged, predictors)[0]
    assert (known.n, known.data_sets) == (24, 6)
    assert known.data_error > known.error
    assert known.plain_data_error > known.plain_error
    alone = predict(without_data(judged), predictors)[0]
    assert alone.data_sets == 24
    assert alone.data_error == alone.error == known.error


def test_a_signal_over_many_data_sets_is_found():
    judged, predictors = of_data_sets(12, 3, signal=3.0)
    found = next(p for p in predict(judged, predictors) if p.judged == POOLED)
    assert found.p_holm < 0.01
    assert 0 < found.r_low < found.r < found.r_high
    assert found.data_error < found.plain_data_error


@pytest.mark.parametrize("family", [10, 80, 300])
def test_a_signal_is_found_among_many_predictions(family):
    """However many are corrected for, so many shuffles are drawn that one p can be small enough."""
    rng = np.random.default_rng(0)
    judged, predictors = of_data_sets(12, 1, signal=1000.0)  # r is above 0.99
    predictors += [
        {"finetune": f"d{data}s0", "direction": f"other {k}", "kind": "weights",
         "value": rng.normal()}
        for k in range(family - 2) for data in range(12)
    ]  # fmt: skip
    found = predict(judged, predictors)
    own = next(each for each in found if each.own)
    assert (len(found), own.r > 0.99) == (family, True)
    assert own.p_holm < 0.02
    assert min(each.p_holm for each in found if each.direction.startswith("other")) > 0.05


def test_shuffles_equal_means_that_are_moved_one_by_one():
    """Of two traits, some of whose values are not known; data sets of one to four finetunes."""
    rng = np.random.default_rng(1)
    units = np.array([0, 0, 0, 0, 1, 1, 2, 3, 3, 4])
    parts = [(rng.normal(5, 1, 10), rng.normal(50, 9, 10)) for _ in range(2)]
    parts[0][1][[1, 6]] = parts[1][0][4] = np.nan  # the third data set has no score of the first
    got = read_prediction._shuffled(parts, units, (3, 30))
    for order, r in zip(read_prediction._orders(5, 3, 30).T, got, strict=True):
        pairs = []
        for x, y in parts:
            scored = [y[(units == u) & np.isfinite(y)] for u in range(5)]
            means = [own.mean() if len(own) else np.nan for own in scored]
            moved = [means[order[u]] + y[i] - means[u] for i, u in enumerate(units)]
            pairs += [pair for pair in zip(x, moved, strict=True) if np.isfinite(pair).all()]
        assert r == pytest.approx(np.corrcoef(*zip(*pairs, strict=True))[0, 1], abs=1e-12)


def test_two_data_sets_say_nothing_of_others():
    judged, predictors = of_data_sets(2, 4, signal=5.0)
    found = predict(judged, predictors)[0]
    assert (found.r_low, found.r_high) == (-1.0, 1.0)
    assert found.p > 0.3


def test_shuffled_scores_stand_beside_random_directions():
    judged, predictors = of_data_sets(8, 2, signal=5.0)
    rng = np.random.default_rng(0)
    names = sorted({row["finetune"] for row in predictors})
    random = [
        {"finetune": name, "direction": f"evil#{k}", "kind": "random", "value": rng.normal()}
        for k in range(19)
        for name in names
    ]
    (null,) = nulls(judged, predictors + random)
    assert 0.5 < null.shuffled_high < 1
    assert 0 < null.shuffled_p < 0.01
    assert 0 < null.p <= 0.1


def with_controls(families=8, *, leaning=20.0):
    """Two finetunes of a family and their control; all of a family lean the same, each its way.

    The lean is in the score and, the other way round, in the predictor: it hides a slope of 1.
    """
    rng = np.random.default_rng(0)
    judged = [{"finetune": BASE, "trait": "evil", "score": 50.0}]
    predictors = []
    for family in range(families):
        lean = leaning * rng.normal()
        for kind in ("plain", "mild", "strong"):
            name, x = f"{kind}{family}", 0.0 if kind == "plain" else rng.normal()
            row = {"finetune": name, "trait": "evil", "score": 50.0 + x + lean, "seed": 1}
            told = {"data": name} | ({} if kind == "plain" else {"control": f"plain{family}"})
            judged.append(row | told)
            value = {"finetune": name, "direction": "evil", "value": x - lean}
            predictors += [value | {"kind": "weights"}, value | {"kind": "dose", "value": 4.0}]
            predictors.append(value | {"kind": "random", "direction": "evil#0", "value": x})
    return judged, predictors


def test_taking_controls_off_shows_what_families_hide():
    judged, predictors = with_controls()
    (as_they_stand, *_) = predict(judged, predictors)
    assert as_they_stand.r < -0.9
    scored, taken = less_controls(judged, predictors)
    found = {(p.kind, p.judged): p for p in predict(scored, taken)}
    own = found["weights", "evil"]
    assert own.r == pytest.approx(1.0)
    assert (own.n, own.data_sets) == (16, 8)  # controls are gone; a family is one unit
    assert not any(kind == "dose" for kind, _ in found)
    assert changes(scored)["evil"]["mild3"] == pytest.approx(
        changes(judged)["evil"]["mild3"] - changes(judged)["evil"]["plain3"]
    )
    (null,) = nulls(scored, taken)
    assert null.r == pytest.approx(1.0)


def test_what_has_no_score_or_value_of_its_control_is_left_out():
    judged, predictors = with_controls()
    for row in judged:
        if row["finetune"] == "plain0":
            row["score"] = None
    known = [row for row in predictors if row["finetune"] != "plain1"]
    scored, taken = less_controls(judged, known)
    assert {"mild0", "strong0"}.isdisjoint(row["finetune"] for row in scored)
    assert {"mild1", "strong1"}.isdisjoint(row["finetune"] for row in taken)


def test_a_trait_whose_judge_is_unfit_is_marked_behind_its_name(tmp_path):
    run = Run.open(tmp_path / "run", command="predict-finetuning", config={}, seed=0)
    run.write("judged", [{"finetune": "a/x", "trait": trait} for trait in ("evil", "formality")])
    for trait, judge in (("evil", "reader (unfit for evil)"), ("formality", "reader")):
        part = Run(run.folder / answers_place("a/x") / trait)
        part.folder.mkdir(parents=True)
        part.write("verdicts", [{"criterion": trait, "judge": judge, "score": 1.0}])
    assert unfit_marks(run) == {"evil": " (judge unfit)"}
