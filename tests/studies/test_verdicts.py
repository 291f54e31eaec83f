"""What is said of a comparison follows its numbers: case by case, never the other way."""

from __future__ import annotations

from dataclasses import replace

import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.comparisons import ConditionFit
from persona_lora.report.curve import PairedDifference
from persona_lora.report.resampling import Interval
from persona_lora.studies import research_questions
from persona_lora.studies.drift.figure import _alarm_rows
from persona_lora.studies.drift.read import Curve, Point
from persona_lora.studies.drift.read_diagnosis import Alarm
from persona_lora.studies.drift.read_prediction import Prediction
from persona_lora.studies.drift.read_section import _finding
from persona_lora.studies.personas import read as personas
from persona_lora.studies.personas.read import _lead
from persona_lora.studies.steering.read import _cells, _latency_line, _layers, verdict_lines
from persona_lora.studies.steering.read_comparison import (
    TOKENS,
    Comparison,
    MethodEffect,
    Overall,
    Ratio,
)
from persona_lora.studies.steering.read_grid import grid_of


def interval(mean, low, high, n=8):
    return Interval(mean, low, high, n, n, 1.0)


# weights minus activations (mean, low, high), p after Holm, and who is said to steer further
WHO = [
    ((10.0, 5.0, 15.0), 0.01, "weights"),
    ((-10.0, -15.0, -5.0), 0.01, "activations"),
    ((10.0, -1.0, 21.0), 0.01, "weights"),  # the test decides alone
    ((-10.0, -21.0, 1.0), 0.01, "activations"),
    ((10.0, 5.0, 15.0), 0.2, None),
    ((-10.0, -15.0, -5.0), 0.2, None),
    ((10.0, 5.0, 15.0), None, None),
    ((10.0, None, None), 0.01, "weights"),
]


@pytest.mark.parametrize(("gap", "p", "winner"), WHO)
def test_who_steered_further_is_the_one_with_the_larger_effect(gap, p, winner):
    lora = Overall("eval", "lora", interval(30.0, 25.0, 35.0), None, None, None)
    other = Overall(
        "eval", "activation", interval(20.0, 15.0, 25.0), interval(*gap), None, p, p_holm=p
    )
    line, _ = verdict_lines(Comparison("evil", "mean", (), (lora, other)))
    said = {
        "weights": "weights steered further:",
        "activations": "activations steered further:",
        None: "neither steered clearly further than the other:",
    }
    assert [name for name, text in said.items() if f", {text}" in line] == [winner]
    assert "weights moved the trait by 30 [25, 35] points, activations by 20 [15, 25]" in line


# the gap of a direction to its random controls, p after Holm, how many there are, and what is said
CLEAR, UNCLEAR = ((10.0, 5.0, 15.0), 0.01), ((2.0, -8.0, 15.0), 0.7)
BESIDE_RANDOM = [
    (*CLEAR, 1, "further than a random"),
    (*CLEAR, 3, "further than 3 random"),
    (*UNCLEAR, 1, "did not steer clearly further than a random"),
    (*UNCLEAR, 3, "did not steer clearly further than 3 random"),
    ((-10.0, -15.0, -5.0), 0.01, 1, "steered less far than a random"),
    ((10.0, None, None), None, 2, "did not steer clearly further than 2 random"),
    (None, None, 1, "could not be compared with a random"),
]


@pytest.mark.parametrize("of", ["random_lora", "random"])
@pytest.mark.parametrize(("gap", "p", "draws", "said"), BESIDE_RANDOM)
def test_what_random_controls_do_as_well_is_said_before_the_winner(of, gap, p, draws, said):
    lora = Overall("eval", "lora", shown(30), None, None, None)
    vector = Overall("eval", "activation", shown(20), shown(10), None, 0.01, p_holm=0.01)
    found = None if gap is None else interval(*gap)
    # The other direction is clear of its own; "difference" of random vectors is the diff's gap.
    mine, clear = (found, p, p, draws), (shown(25), 0.01, 0.01, 1)
    gaps, own = (mine, (shown(15), 0.02)) if of == "random_lora" else (clear, (found, p))
    controls = [
        Overall("eval", "random_lora", shown(5), gaps[0], None, *gaps[1:]),
        Overall("eval", "random", shown(5), shown(-9), None, 0.9, 0.9, draws, 0, 0, *own),
    ]
    line, _ = verdict_lines(Comparison("evil", "mean", (), (lora, vector, *controls)))
    who = "weights" if of == "random_lora" else "activations"
    name = "difference" if of == "random_lora" else "vector"
    assert f"{said} {name}{'s' * (draws > 1)}" in line
    first = "On held-out questions, at equal divergence, "
    if said.startswith("further"):
        assert line.startswith(f"{first}weights steered further: ")
        assert line.index("weights moved") < line.index(said)
    else:
        assert line.startswith(f"{first}{who} {said}")
        assert line.index(said) < line.index(". Between the two, weights steered further: ")
    if gap is not None:
        known = "" if p == 0.01 else "; undecided"
        assert f"({wording.change(found)} points, p {wording.p_value(p)}{known})" in line


@pytest.mark.parametrize(("gap", "p", "winner"), WHO)
def test_a_pooled_row_names_the_same_winner(gap, p, winner):
    row = research_questions._pooled_row(
        research_questions.Pooled("eval", "effect", interval(*gap), p)
    )
    told = {"weights": "more with weights", "activations": "more with activations"}
    assert row[-1] == told.get(winner, "undecided")


@pytest.mark.parametrize(
    ("gap", "p", "said"),
    [
        ((1.0, -3.0, 5.0, 20), 0.6, "equal within 5 points"),
        ((1.0, -3.0, 5.1, 20), 0.6, "undecided"),
        ((1.0, -3.0, 5.0, 11), 0.6, "undecided"),
        ((3.0, 1.0, 5.0, 20), 0.01, ""),  # clear, and small: it is not called equal
    ],
)
def test_what_is_not_clear_is_equal_or_undecided_wherever_it_is_said(gap, p, said):
    """Every verdict on two that a test does not tell apart says what its interval excludes."""
    found = interval(*gap)
    pooled = research_questions.Pooled("eval", "effect", found, p)
    assert research_questions._pooled_row(pooled)[-1] == (said or "more with weights")
    lora = Overall("eval", "lora", shown(30), None, None, None)
    vector = Overall("eval", "activation", shown(29), found, None, p, p)
    random = Overall("eval", "random_lora", shown(29), found, None, p, p)
    line, _ = verdict_lines(Comparison("evil", "mean", (), (lora, vector, random)))
    assert line.count(f"; {said or 'undecided'}") == 2 * bool(said)
    fits = [
        ConditionFit(name, shown(3), shown(80), shown(60), difference, None, p_holm=p)
        for name, difference in (("none", None), ("lora", interval(*(each / 25 for each in gap))))
    ]
    fits[1] = replace(fits[1], difference=replace(fits[1].difference, n_questions=gap[-1]))
    told = said.replace("5 points", "0.2 points")  # of a scale from 1 to 5
    assert (f" The change is not clear: {told}." in _lead([], fits, "lora")) == bool(said)


@pytest.mark.parametrize(("gap", "p", "winner"), WHO)
def test_a_direction_is_clear_by_its_corrected_test(gap, p, winner):
    sign = {"weights": 1, "activations": -1, None: 0}[winner]
    assert wording.direction_of(PairedDifference(interval(*gap), p)) == sign
    assert wording.direction_of(PairedDifference(interval(*gap), 0.001, p_holm=p or 1.0)) == sign


@pytest.mark.parametrize(
    ("gain", "p", "clear"),
    [
        ((1.0, 0.5, 1.5), 0.04, True),
        ((1.0, 0.5, 1.5), 0.06, False),  # the best of several ways, by an interval for one
        ((1.0, -0.1, 2.1), 0.06, False),
        ((1.0, 0.5, 1.5), None, False),  # two searches have no test
    ],
)
def test_a_gain_is_called_clear_by_its_corrected_test(gain, p, clear):
    even = [interval(90, 90, 90)] * 2
    fits = [
        ConditionFit(name, interval(fit, fit, fit), *even, difference, None, p_holm=p_holm)
        for name, fit, difference, p_holm in (
            ("none", 2.0, None, None), ("lora", 3.0, interval(*gain), p),
        )
    ]  # fmt: skip
    said = _lead([], fits, "lora")
    assert ("The change is not clear: undecided." not in said) == clear
    assert "LoRA, CMA-ES: fit 3.00 [3.00, 3.00] against 2.00 [2.00, 2.00] unsteered" in said
    assert wording.interval(fits[1].difference, 2) in said
    assert ("Holm" in said) == (p is not None)
    assert p is None or f"(p = {p:.3f}, Holm)" in said
    assert "the highest of 6 ways on these prompts" in _lead([], fits, "lora", 6)


@pytest.mark.parametrize(
    ("gap", "p", "said"),
    [
        # The intervals of both ends overlap: the paired test knows what they do not.
        ((4, 3, 5), 0.01, "goes from 10 [5, 15] at step 0 to 14 [9, 19] at step 9 (+4 [3, 5]"),
        ((4, 1, 9), 0.2, "does not clearly change (undecided): from 10 [5, 15] at step 0 to 14"),
        ((4, 3, 5), 0.2, "does not clearly change (equal within 5 points): from 10 [5, 15] at"),
        ((4, 3, 5), None, "does not clearly change"),
    ],
)
def test_a_finetune_changes_a_trait_by_its_paired_and_corrected_test(gap, p, said):
    points = tuple(Point(step, *each) for step, each in ((0, (10, 5, 15)), (9, (14, 9, 19))))
    change = PairedDifference(interval(*gap, n=20), p and 0.001, p)
    curve = Curve("evil", "trait", None, None, points)
    found = _finding(curve, change)
    assert found.startswith(f"Evil {said}")
    assert found.endswith(f"paired, p {wording.p_value(p)}).")
    unscored = Curve("evil", "trait", None, None, (Point(0, 10, None, None), points[1]))
    assert _finding(unscored, change) == "Evil could not be scored at both ends."


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.97, 1.04, "is as fast as the base within 5%"),
        (1.01, 1.04, "is as fast as the base within 5%"),
        (0.9, 1.04, "is not shown to be faster or slower than the base"),
        (0.97, 1.2, "is not shown to be faster or slower than the base"),
        (1.02, 1.1, "differs from the base in speed"),
        (0.8, 0.9, "differs from the base in speed"),
    ],
)
def test_merged_is_called_as_fast_only_where_its_whole_interval_is(low, high, said):
    ratios = [
        Ratio("merged", 8, TOKENS, interval((low + high) / 2, low, high), 9.0),
        Ratio("live", 8, TOKENS, interval(1.4, 1.3, 1.5), 9.0),
    ]
    line = _latency_line(ratios)
    assert f"Merged {said}." in line
    assert "live 1.40 [1.30, 1.50]" in line


@pytest.mark.parametrize(
    ("r", "low", "p", "said"),
    [
        (0.9, 0.75, 0.01, "Yes."),
        (0.9, 0.75, 0.2, "Not shown here."),
        (0.8, 0.2, 0.01, "Yes; how closely is less certain."),
        (0.5, 0.2, 0.01, "In part."),
        (0.5, 0.2, 0.2, "Not shown here."),
        (0.8, -0.1, 0.01, "Not shown here."),
        (-0.9, -0.99, 0.01, "Not shown here."),
    ],
)
def test_prediction_is_answered_by_r_and_its_interval(r, low, p, said):
    found = Prediction(
        "all", "all", "weights", True, 12, 12, r, low, 0.99, r, p, *[0.5, 1.0] * 2, p
    )
    assert research_questions._predicts(found) == said


# -- tables: each column is the quantity that its heading names ---------------------------------


def shown(at):
    """An interval whose words are like no other's: "30 [29, 32]" of 30."""
    return interval(float(at), at - 1.0, at + 2.0)


def test_a_fit_stands_under_its_headings():
    fit = ConditionFit("lora", shown(3), shown(80), shown(60), shown(1), 0.5, 0.7, 0.04, 0.9, 0.3)
    assert personas._row(fit) == (
        *("LoRA, CMA-ES", "3.00 [2.00, 5.00]", "8", "100%", "90%", "1.00 [0.00, 3.00]", "0.70"),
        *("0.040", "80 [79, 82]", "60 [59, 62]", "30%"),
    )


def test_the_effects_of_a_comparison_stand_in_their_order():
    methods = ("lora", "activation", "random_lora", "random")
    own = {
        ("eval", name): MethodEffect(shown(10 * at), shown(50 + at), at / 100, most, at / 10)
        for at, (name, most) in enumerate(
            zip(methods, (None, None, 61.0, 62.0), strict=True), start=1
        )
    }
    assert tuple(research_questions._effects("eval", own)) == (
        *("10 [9, 12], p 0.100", "20 [19, 22], p 0.200", "30 [29, 32] (61)", "40 [39, 42] (62)"),
        *("52 [51, 54], p 0.020", "53 [52, 55], p 0.030"),
    )


def test_cells_and_layers_of_a_grid_stand_under_their_headings(make_sweep_run):
    grid = grid_of(make_sweep_run(layers=(4, 8), coefficients=(-1.0, 2.0), questions=4, control=1))
    for table, rows in (
        (
            _cells(grid),
            {
                f"{cell.layer}, {wording.label(cell)}": [
                    wording.interval(cell.trait), wording.interval(cell.coherence),
                    wording.change(cell.from_zero.interval), wording.p_value(cell.from_zero.p),
                    wording.p_value(cell.from_zero.p_holm),
                ]
                for cell in grid.cells
            },
        ),
        (
            _layers(grid),
            {
                str(each.layer): [
                    wording.change(each.best.gain), wording.coefficient(each.best.coefficient),
                    wording.p_value(each.best.p), wording.p_value(each.best.p_holm),
                    wording.number(each.best.coherence), wording.interval(each.rho_means, 2),
                    wording.number(100 * grid.selection.layer_shares.get(each.layer, 0)),
                    wording.change(each.over_control.interval),
                    wording.p_value(each.over_control.p_holm),
                ]
                for each in grid.by_layer
            },
        ),
    ):  # fmt: skip
        found = {row[0]: list(row[1:]) for row in table.rows}
        for name, wanted in rows.items():
            assert found[name][: len(wanted)] == wanted, name


def test_the_best_mix_is_the_one_that_its_search_named(tmp_path):
    run = Run.open(tmp_path / "run", command="optimize", config={}, seed=0)
    run.write("finalists", [{"value": value} for value in (3.0, 4.0)])
    with pytest.raises(UserError, match="run its optimize command again"):
        personas._best(run)
    run.write("finalists", [{"value": value, "best": "front_2"} for value in (3.0, 4.0)])
    assert personas._best(run) == "front_2"


def test_an_alarm_is_drawn_at_its_coordinate_over_its_threshold():
    usual, controls, own = _alarm_rows(Alarm("evil", 5.0, 2.0, 0.5, controls=(1.0, -1.5)))
    assert (usual.low, usual.high, controls.y) == ((-2.0,), (2.0,), (1.0, -1.5))
    assert (own.low, own.y, own.high, own.label) == ((4.5,), (5.0,), (5.5,), "5.000")
