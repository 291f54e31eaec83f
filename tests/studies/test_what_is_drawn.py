"""What pictures show is the quantity that they name: every series, against the rows it comes from.

Rows hold a different number in every column, so that a curve of another column is another curve.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from persona_lora.core.runs import Run
from persona_lora.report.comparisons import score_items
from persona_lora.report.resampling import Interval
from persona_lora.report.summary import summarise_run
from persona_lora.studies.drift import figure as drift
from persona_lora.studies.drift import read_prediction
from persona_lora.studies.personas import figure as personas
from persona_lora.studies.steering import figure as steering
from persona_lora.studies.steering.figure_grid import render_layers
from persona_lora.studies.steering.read_comparison import (
    FIRST_TOKEN,
    TOKENS,
    Comparison,
    Point,
    Ratio,
)
from persona_lora.studies.steering.read_grid import grid_of
from persona_lora.studies.vectors.figure import render_separation


def interval(mean):
    return Interval(mean, mean - 2.0, mean + 3.0, 4, 4, 1.0)


def panel(picture, title):
    return next(each for each in picture.panels if each.title.startswith(title))


def bounds(series):
    return list(zip(series.low, series.y, series.high, strict=True))


def test_a_sweep_draws_trait_coherence_control_and_prompts(make_sweep_run):
    rows = {"layers": (12,), "coefficients": (-2.0, 1.0, 2.0), "prompts": ("prompt_pos",)}
    run = make_sweep_run(**rows, control=True, questions=4)
    summary = summarise_run(run)
    (drawn,) = steering.render_sweep(summary).panels
    for name, conditions, criterion in (
        ("Sycophancy", summary.steered, "trait"),
        ("Coherence", summary.steered, "coherence"),
        ("random direction", summary.control.conditions, "trait"),
    ):
        scores = [getattr(each, criterion) for each in conditions]
        assert drawn.of(name).x == tuple(each.coefficient for each in conditions)
        assert bounds(drawn.of(name)) == [(each.low, each.mean, each.high) for each in scores]
    prompted = summary.reference("prompt_pos").trait
    assert bounds(drawn.of("positive prompt")) == [(prompted.low, prompted.mean, prompted.high)]
    assert drawn.of("Sycophancy").label.startswith(f"Sycophancy {prompted_end(summary)}")
    (again, _) = steering.render_sweeps([summary, summary]).panels
    assert again.of("Sycophancy").y == drawn.of("Sycophancy").y


def prompted_end(summary):
    return f"{summary.steered[-1].trait.mean:.0f} ["


def test_a_grid_draws_each_cell_at_its_layer_and_coefficient(make_sweep_run):
    grid = grid_of(make_sweep_run(layers=(4, 8), coefficients=(-1.0, 2.0), questions=3))
    picture = render_layers(grid)
    for name, criterion in (("Sycophancy", "trait"), ("Coherence", "coherence")):
        for form in ("map", "lines"):
            for value, said in ((-1.0, "−1"), (2.0, "+2")):
                row = panel(picture, f"{name}, {form}").of(said)
                cells = [getattr(grid.cell(layer, value), criterion).mean for layer in (4, 8)]
                assert (list(row.x), list(row.y)) == ([4, 8], cells)
    unsteered = panel(picture, "Coherence, lines").of("unsteered")
    assert unsteered.y == (grid.unsteered.coherence.mean,)


def test_methods_are_drawn_by_what_they_did_against_what_it_cost():
    points = tuple(
        Point("eval", 0, method, sign, kl, 10 * kl, True, interval(trait), interval(coherence))
        for method, sign, kl, trait, coherence in (
            ("lora", 1.0, 0.2, 70.0, 91.0), ("lora", -1.0, 0.3, 20.0, 92.0),
            ("activation", 1.0, 0.2, 60.0, 93.0),
        )
    )  # fmt: skip
    plain = Point("eval", None, "none", None, None, None, None, interval(50.0), interval(94.0))
    for statistic, factor in (("mean", 1), ("p95", 10)):
        picture = steering.render_comparison(Comparison("evil", statistic, (*points, plain), ()))
        up, down, other = picture.panels[0].drawn
        assert [each.name for each in (up, down, other)] == [
            steering.NAMES["lora"], steering.NAMES["lora"], steering.NAMES["activation"]
        ]  # fmt: skip
        assert [bounds(each) for each in (up, down, other)] == [
            [(68.0, 70.0, 73.0)], [(18.0, 20.0, 23.0)], [(58.0, 60.0, 63.0)]
        ]  # fmt: skip
        aside = 0.05 * factor * 0.3
        assert up.x[0] == pytest.approx(0.2 * factor, abs=aside)
        assert down.x[0] == pytest.approx(-0.3 * factor, abs=aside)
    assert [(each.x, each.y) for each in picture.panels[1].drawn] == [
        ((91.0,), (70.0,)), ((92.0,), (20.0,)), ((93.0,), (60.0,)),
        ((94.0,), (50.0,)),
    ]  # fmt: skip


def test_times_are_the_ratios_of_their_measure():
    ratios = [
        Ratio(variant, 8, measure, interval(mean), 99.0)
        for variant, measure, mean in (
            ("base", TOKENS, 1.0), ("live", FIRST_TOKEN, 11.0), ("live", TOKENS, 22.0)
        )
    ]  # fmt: skip
    first, further = steering.render_latency(ratios).panels
    assert first.title == "time to the first token"
    assert [(each.name, bounds(each)) for each in first.drawn] == [("live, batch 8", [(9, 11, 14)])]
    assert bounds(further.drawn[0]) == [(20, 22, 25)]


def test_spaces_draw_each_quantity_in_its_own_panel():
    traits = ("evil", "kind")
    pairs = [(one, other) for one in traits for other in traits]
    value = {pair: 0.1 + at / 10 for at, pair in enumerate(pairs)}
    picture = steering.render_spaces(
        [{"trait": a, "other": b, "layer": 3, "cosine": value[a, b]} for a, b in pairs],
        [
            {"trait": t, "layer": 3, "effective_rank": rank, "norm": 77.0, "rank": 8}
            for t, rank in (("evil", 2.0), ("evil", 4.0), ("kind", 5.0))
        ],
        [{"trait": "evil", "other": "kind", "weights": 0.4, "activations": -0.2}],
        [
            {"method": method, "steered": a, "read": b, "value": scale * value[a, b]}
            for method, scale in (("weights", 1.0), ("activations", 2.0))
            for a, b in pairs
        ],
    )  # fmt: skip
    shifts = panel(picture, "cosine of the shift")
    assert {each.name: each.y for each in shifts.drawn} == {
        f"{a}, {b}": (value[a, b],) for a, b in pairs
    }
    assert panel(picture, "effective rank").of("Evil").y == (3.0,)
    assert [(each.x, each.y) for each in panel(picture, "pairs").drawn] == [((0.4,), (-0.2,))]
    for method, scale in (("weights", 1.0), ("activations", 2.0)):
        (evil, _) = panel(picture, f"steered by {method}").drawn
        assert evil.y == (scale * value["evil", "evil"], scale * value["evil", "kind"])


def test_a_finetune_draws_scores_shifts_and_projections(tmp_path):
    run = Run.open(tmp_path / "run", command="evaluate-checkpoints", config={}, seed=0)
    levels = {"trait": 10.0, "coherence": 80.0, "projection": 1.0, "shift": 5.0}
    run.write(
        "checkpoints",
        [
            {"step": step, "trait": "evil", "statistic": statistic, "value": level + step,
             "low": level + step - 1, "high": level + step + 2,
             "vector": None if statistic in ("trait", "coherence") else "evil_response_avg",
             "layer": None if statistic in ("trait", "coherence") else 2}
            for statistic, level in levels.items()
            for step in (0, 5)
        ],
    )  # fmt: skip
    scores, shifts, against = drift.render_checkpoints(run).panels
    assert bounds(scores.of("Evil")) == [(9, 10, 12), (14, 15, 17)]
    assert bounds(scores.of("Coherence")) == [(79, 80, 82), (84, 85, 87)]
    assert bounds(shifts.of("evil")) == [(4, 5, 7), (9, 10, 12)]
    (path,) = against.drawn
    assert (path.x, path.y, path.marks) == ((1.0, 6.0), (10.0, 15.0), ("0", "5"))


def test_weight_projections_are_drawn_by_their_coordinate():
    rows = [
        {"finetuned": tuned, "diff": diff, "part": part, "of": of, "step": None, "cosine": 0.77,
         "geometry": geometry, "p": 0.5,
         "coordinate": scale * (of + 1) * (-1 if geometry == "plain" else 1),
         "p_holm": 0.01 if diff == "evil" else 0.5}
        for tuned, factor in (("a/one", 1.0), ("a/two", 10.0))
        for diff, scale in (("evil", factor), ("kind", 2 * factor))
        for part, of in (("total", 0), ("layer", 0), ("layer", 1))
        for geometry in ("weighted", "plain")
    ]  # fmt: skip
    record = {"rows": rows, "geometry": "weighted"}
    layers, totals = drift.render_weight_projection(record).panels
    assert {each.name: each.y for each in layers.drawn} == {"Evil": (10, 20), "Kind": (20, 40)}
    assert {each.name: each.y for each in totals.drawn} == {"Evil": (1, 10), "Kind": (2, 20)}
    alone = [row for row in rows if row["diff"] == "evil"]
    picture = drift.render_weight_projection({**record, "rows": alone})
    assert picture.panels[0].drawn[0].y == (10, 20)
    assert [bar.get_height() for bar in picture.figure.axes[0].patches] == [10, 20]
    stars = [text.get_text() for text in picture.figure.axes[1].texts]
    assert stars == ["1.00*", "10.00*"]


@pytest.mark.parametrize(
    ("folders", "columns"),
    [
        (("a",), ["10", "20"]),
        (("a", "b"), [f"{one}/\ncheckpoint-{step}" for one in "ab" for step in (10, 20)]),
    ],
)
def test_checkpoints_of_several_finetunes_are_told_apart(folders, columns):
    rows = [
        {"finetuned": f"x/{each}/checkpoint-{step}", "diff": "evil", "part": part, "of": 0,
         "step": step, "geometry": "plain", "coordinate": 1.0, "p_holm": 0.5}
        for each in folders
        for step in (10, 20)
        for part in ("total", "layer")
    ]  # fmt: skip
    picture = drift.render_weight_projection({"rows": rows, "geometry": "plain"})
    axes = picture.figure.axes[1]
    assert [label.get_text() for label in axes.get_xticklabels()] == columns
    assert ("by step" in axes.get_title(loc="left")) == (len(folders) == 1)


def test_drift_while_training_is_the_coordinate():
    rows = [
        {"diff": "evil", "step": step, "coordinate": step / 10, "cosine": 0.5} for step in (10, 20)
    ]
    (drawn,) = drift.render_drift(rows).panels
    assert (drawn.of("Evil").x, drawn.of("Evil").y) == ((10, 20), (1.0, 2.0))


def test_predictions_are_drawn_against_the_change_from_the_base(monkeypatch):
    for name in ("RESAMPLES", "PERMUTATIONS"):
        monkeypatch.setattr(read_prediction, name, 20)
    judged = [{"finetune": "base", "trait": "evil", "score": 10.0}]
    judged += [{"finetune": f"f{at}", "trait": "evil", "score": 10.0 + at**2} for at in range(5)]
    predictors = [
        {"finetune": f"f{at}", "direction": "evil", "kind": "weights", "value": float(at)}
        for at in range(5)
    ]
    above, below = drift.render_prediction(judged, predictors).panels
    assert (above.of("Evil").x, above.of("Evil").y) == ((0, 1, 2, 3, 4), (0, 1, 4, 9, 16))
    assert below.of("Evil").y[0] == pytest.approx(np.corrcoef(range(5), np.arange(5) ** 2)[0, 1])


def test_what_stands_below_a_prediction_is_what_it_is_drawn_against(monkeypatch):
    for name in ("RESAMPLES", "PERMUTATIONS"):
        monkeypatch.setattr(read_prediction, name, 20)
    named = {
        "weights": "projection on its own direction", "distance": "norm of the change of weights",
        "activations": "projection on its own direction", "dose": "answers trained on",
        "training text": "mean score of the answers trained on",
        "shared component": "mean projection on all directions",
        "distance from control": "norm of the difference from its control",
    }  # fmt: skip
    judged = [{"finetune": "base", "trait": "evil", "score": 10.0}]
    judged += [{"finetune": f"f{at}", "trait": "evil", "score": 10.0 + at**2} for at in range(5)]
    predictors = [
        {"finetune": f"f{at}", "direction": "evil", "kind": kind, "value": float(at)}
        for kind in named
        for at in range(5)
    ]
    figure = drift.render_prediction(judged, predictors).figure
    assert [each.get_xlabel() for each in figure.axes[::2]] == list(named.values())
    assert figure.get_size_inches()[0] < 15
    places = [each.get_position() for each in figure.axes]
    assert not any(one.overlaps(other) for one, other in combinations(places, 2))


def test_prevention_draws_each_measure_of_each_model():
    rows = [
        {"condition": model, "task": task, "metric": "score", "item": item, "score": level + item}
        for model, shift in (("plain", 0.0), ("added", -30.0))
        for task, level in (("trait", 60.0 + shift), ("coherence", 90.0))
        for item in range(8)
    ]
    trait, coherence = drift.render_prevention(score_items(rows, "plain"), "evil").panels
    assert (trait.title, coherence.title) == ("Evil", "coherence")
    assert {each.name: each.y for each in trait.drawn} == {"plain": (63.5,), "added": (33.5,)}
    assert {each.name: each.hollow for each in trait.drawn} == {
        "plain": (False,),
        "added": (False,),
    }
    assert coherence.of("added").y == (93.5,)
    assert coherence.of("added").hollow == (True,)


def test_behaviours_under_probes_have_a_line_each():
    rows = [
        {"condition": model, "task": task, "metric": metric, "item": item, "score": level + shift}
        for model, shift in (("plain", 0.0), ("added", -30.0))
        for task, metric, level in (
            *(
                ("trait", "score", 60.0),
                ("coherence", "score", 90.0),
                ("three_items", "score", 70.0),
            ),
            *(("trait, negated", "score", 50.0), ("three_items, negated", "score", 40.0)),
            ("task loss", "nats", 31.0),
        )
        for item in range(8)
    ]
    panels = drift.render_prevention(score_items(rows, "plain"), "capitals").panels
    at = {each.title: each.of("added").y for each in panels}
    assert at == {
        "Capitals": (30.0,),
        "Capitals, negated": (20.0,),
        "three items": (40.0,),
        "three items, negated": (10.0,),
        "coherence": (60.0,),
        "task loss (nats)": (1.0,),
    }
    assert len(panels) == 6


def test_separation_is_the_auc_over_layers():
    rows = [
        {"vector": "evil", "layer": layer, "auc": 0.6 + layer / 10, "low": 0.5, "high": 0.9}
        for layer in (1, 0)
    ]  # fmt: skip
    (drawn,) = render_separation(rows).panels
    assert (drawn.of("evil").x, drawn.of("evil").y) == ((0, 1), (0.6, 0.7))


def held_out():
    return [
        {"persona": person, "condition": condition, "prompt_id": prompt, "score": fit,
         "coherence": 90.0, "relevance": 60.0, "weights": weights}
        for condition, fit, weights in (
            ("none", 2.0, None),
            ("mean", 3.0, {"calm": 0.5, "loud": -1.0}),
            ("lora", 4.5, {"calm": 1.5}),
        )
        for person in ("p-01_A", "p-02_A")
        for prompt in range(3)
    ]  # fmt: skip


def test_a_search_draws_values_fits_and_weights(tmp_path):
    config = {"persona": "p", "method": "lora", "prompts": ["x"], "judge": "style"}
    config["searcher"] = "random"
    run = Run.open(tmp_path / "run", command="optimize", config=config, seed=0)
    run.write("held_out", [row for row in held_out() if row["persona"] == "p-01_A"])
    values = [(0, 1.0, 2.0), (0, 3.0, 1.0), (1, 2.0, 0.0), (1, 9.0, 0.5), (1, None, 0.0)]
    run.write(
        "generations",
        [{"iteration": at, "value": value, "violation": by} for at, value, by in values],
    )
    history, fits, weights = personas.render_search(run).panels
    assert history.of("candidates").y == (1.0, 3.0, 2.0, 9.0)
    assert history.of("candidates").hollow == (True, True, False, True)  # constraints are broken
    assert history.of("generation's mean").y == (2.0, 5.5)
    assert history.of("best so far").y == (3.0, 2.0)
    assert fits.of("distribution's mean").y == (3.0,)
    assert fits.of("unsteered").y == (2.0,)
    assert weights.drawn[0].y == (-1.0, 0.5)


def test_methods_for_a_voice_are_drawn_with_their_gains_and_mixes(tmp_path):
    run = Run.open(tmp_path / "run", command="compare-methods", config={}, seed=0)
    run.write("held_out", held_out())
    fits, gains, mix = personas.render_comparison(run).panels
    assert [each.y[0] for each in fits.drawn if len(each.y) == 1] == [2.0, 3.0, 4.5]
    assert [each.y for each in gains.drawn][1:] == [(1.0, 1.0), (2.5, 2.5)]
    assert mix.title == "Weights of the mix: LoRA, CMA-ES"
    assert mix.of("Calm").y == (1.5, 1.5)
