"""Changes from rows that are made up: shares, signs and tests come back as they were planted."""

from __future__ import annotations

import pytest

from persona_lora.core.runs import Run
from persona_lora.studies.report_page import write_report
from persona_lora.studies.steering.figure_side_effects import render_side_effects
from persona_lora.studies.steering.read_side_effects import (
    CAPABILITY,
    gap_by_turn,
    read_side_effects,
    side_effects_lines,
    side_effects_table,
)

METHODS = ("none", "lora", "activation", "random", "random#2", "random#3", "prompt_neg")
QUESTIONS = 20
MOVED = {  # of each question, by kind and method: the steered trait falls, "warmth" rises
    ("own", "lora"): lambda at: -30.0 if at < 18 else 10.0,
    ("own", "activation"): lambda at: -30.0 if at < 10 else 2.0 if at < 15 else 10.0,
    ("own", "prompt_neg"): lambda at: 0.0,
    ("other", "lora"): lambda at: 20.0 + at % 3,
    ("other", "activation"): lambda at: (1, -1)[at % 2] * 20.0,
}


def score(kind, method, at):
    noise = (1, -1)[at % 2] * 8.0 if method.startswith("random") else 0.0
    return 50.0 + MOVED.get((kind, method), lambda _: noise)(at)


@pytest.fixture
def run(tmp_path):
    run = Run.open(
        tmp_path / "run", command="side-effects", config={"trait": "evil", "sign": -1.0}, seed=0
    )
    with run:
        run.write(
            "scores",
            [
                {"kind": kind, "asked": asked, "criterion": criterion, "judge": judge,
                 "method": method, "unit": at, "turn": 1,
                 "score": score(kind, method, at) if criterion != "coherence" else 90.0}
                for kind, asked, criterion in (
                    ("own", "eval", "evil"), ("other", "warmth", "warmth"),
                    ("other", "warmth", "coherence"),
                )
                for judge in ("first", "second")
                for method in METHODS
                for at in range(QUESTIONS)
                if judge == "first" or (kind, method) != ("other", "activation")
            ],
        )  # fmt: skip
        items = [
            {"condition": method, "task": "choice", "metric": "acc", "item": at, "score": right}
            for method in ("none", "lora")
            for at in range(30)
            for right in [float(at % 3 == 0 and method == "none")]
        ]
        Run.open(run.folder / CAPABILITY, command="benchmark", config={}, seed=0).write(
            "items", items
        )
    return run


def row(kind, asked, criterion, method, unit, score, turn=1):
    return {"kind": kind, "asked": asked, "criterion": criterion, "judge": "first",
            "method": method, "unit": unit, "turn": turn, "score": score}  # fmt: skip


def test_of_several_answers_to_a_question_the_mean_counts(run):
    """The last of three samples goes the other way than their mean, for both methods."""
    samples = {"none": (50, 50, 50), "lora": (90, 90, 40), "activation": (40, 40, 90)}
    rows = [
        row("own", "eval", "evil", method, unit, score)
        for method, scores in samples.items()
        for unit in range(8)
        for score in scores
    ]
    run.write("scores", rows)
    changes = read_side_effects(run)
    found = {each.method: each.value.mean for each in changes if each.measure == "wrong way"}
    assert found == {"lora": 100.0, "activation": 100.0}
    run.write("scores", [{**each, "kind": "other", "asked": "warmth"} for each in rows])
    changes = read_side_effects(run)
    moved = {each.method: each.value.mean for each in changes if each.group == "other"}
    assert moved == pytest.approx({"lora": 70 / 3, "activation": 20 / 3})


def test_slopes_over_turns_are_those_that_were_planted(run):
    """The unsteered model rises by 1 a turn, weights by 4, activations jump and stay."""
    rises = {"none": lambda turn: turn, "lora": lambda turn: 4.0 * turn,
             "activation": lambda turn: turn + 20.0}  # fmt: skip
    run.write("scores", [
        row("turns", "turns", "evil", method, unit, 10.0 + rise(turn) + unit % 3, turn)
        for method, rise in rises.items() for unit in range(10) for turn in range(1, 11)
    ])  # fmt: skip
    found = by_place(read_side_effects(run))
    weights, activations = (found["evil, every turn", each] for each in ("lora", "activation"))
    assert (weights.unsteered, weights.value.mean) == (pytest.approx(1.0), pytest.approx(3.0))
    assert weights.clear
    assert activations.value.mean == pytest.approx(0.0)
    turns, means = gap_by_turn(run, "evil")["activation"]
    assert (turns, means) == ([*range(1, 11)], [20.0] * 10)
    picture = render_side_effects("evil", [*found.values()], gap_by_turn(run, "evil"))
    assert picture.panels[-1].of("weights").y == tuple(3.0 * turn for turn in range(1, 11))


def test_refusals_are_percentages_of_either_kind(run):
    refused = {("none", "decline"): 6, ("none", "harmless"): 1, ("lora", "decline"): 0,
               ("lora", "harmless"): 1, ("activation", "harmless"): 9}  # fmt: skip
    run.write("scores", [
        row("refusal", kind, "refusal", method, unit, 100.0 * (unit < number))
        for (method, kind), number in refused.items() for unit in range(10)
    ])  # fmt: skip
    found = by_place(read_side_effects(run))
    assert found["refuses what it should", "lora"].value.mean == -60.0
    assert found["refuses what it should", "lora"].unsteered == 60.0
    same = found["refuses what is harmless", "lora"].value  # none of ten changed
    assert same.mean == 0.0
    assert -50 < same.low < -15 < 15 < same.high < 50
    over = found["refuses what is harmless", "activation"]
    assert (over.value.mean, over.clear) == (80.0, True)
    assert "activations, refuses what is harmless: 80 [" in side_effects_lines([over])[-1]


def by_place(found):
    return {(each.measure, each.method): each for each in found}


def test_wrong_ways_are_against_what_was_asked_for(run):
    found = by_place(read_side_effects(run))
    assert found["wrong way", "lora"].value.mean == 10.0  # less was asked for: 2 of 20 rose
    assert found["wrong way", "activation"].value.mean == 50.0
    assert found["wrong way by over 5", "activation"].value.mean == 25.0
    assert found["wrong way", "prompt_neg"].value.mean == 0.0  # what does not move is not wrong
    random = found["wrong way", "random"]
    assert (random.value.mean, random.draws) == (50.0, 3)
    assert found["wrong way", "lora"].p is None
    assert found["wrong way", "activation"].clear
    assert random.p is None  # controls are not tested
    for each in found.values():
        if each.group == "wrong way" and each.draws == 1:
            assert 0 <= each.value.low <= each.value.mean <= each.value.high <= 100


def test_other_traits_are_differences_by_question_corrected_together(run):
    found = by_place(read_side_effects(run))
    warm, still = found["warmth", "lora"], found["warmth", "activation"]
    assert (warm.unsteered, warm.value.mean) == (50.0, pytest.approx(20.95))
    assert (warm.clear, still.clear, still.value.mean) == (True, False, 0.0)
    tested = [each for each in found.values() if each.group == "other" and each.p is not None]
    assert len(tested) == 6  # two measures by three methods
    assert warm.p_holm == pytest.approx(6 * warm.p)
    assert found["choice: acc", "lora"].value.mean == pytest.approx(-1 / 3)
    assert found["choice: acc", "lora"].clear


def test_the_second_judge_stands_apart(run):
    found = by_place(read_side_effects(run, "second"))
    assert ("warmth", "activation") not in found
    assert not any(each.group == CAPABILITY for each in found.values())


def test_words_table_figure_and_page_say_the_same(run, tmp_path):
    found = read_side_effects(run)
    line, wrong, beyond = side_effects_lines(found)
    assert "weights, choice: acc: −0.33 [" in beyond
    assert "weights clearly moved 1 of 1 other traits (warmth +21 [" in line
    assert "activations clearly moved 0 of 1 other traits;" in line
    assert "weights 10 [" in wrong
    rows = {row[0]: row for row in side_effects_table(found).rows}
    assert rows["warmth"][1] == "50"
    assert rows["warmth"][2].startswith("21 [")
    assert rows["warmth"][2].endswith("]*")
    assert rows["choice: acc"][3] == "–"  # activations did not answer it
    picture = render_side_effects("evil", found)
    heat, *forests = picture.panels
    assert heat.of("weights").y == (pytest.approx(20.95), 0.0)
    assert [each.title for each in forests] == ["wrong way", "wrong way by over 5", "choice: acc"]
    assert forests[0].of("activations").y == (50.0,)
    page = write_report([run.folder], tmp_path / "page.html").read_text()
    assert "Evil: side effects" in page
    assert "By the second judge" in page
