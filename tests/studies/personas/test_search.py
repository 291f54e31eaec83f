"""The search knows candidates and values: convergence, resume after a kill, faults."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.personas import Coefficients
from persona_lora.core.runs import Run
from persona_lora.studies.personas.search import (
    GENERATIONS,
    SEARCHERS,
    SearchOptions,
    Value,
    evaluate_once,
    front_of,
    search,
)

TRAITS = ("a", "b", "c")
GOAL = np.array([1.0, -2.0, 0.5])


def parabola(mixes, iteration):
    return [Value(-float(np.sum((np.array(mix.values) - GOAL) ** 2))) for mix in mixes]


@pytest.fixture
def run(tmp_path):
    return Run.open(tmp_path / "run", command="optimize", config={}, seed=0)


def test_cmaes_finds_the_optimum_and_its_mean_is_there_too(run):
    found = search(parabola, TRAITS, SearchOptions(max_iterations=80), run)
    assert np.allclose(found.best.coefficients.values, GOAL, atol=0.05)
    assert np.allclose(found.mean.values, GOAL, atol=0.05)
    assert found.evaluations == len(run.read(GENERATIONS))


def test_random_search_has_the_same_budget_and_does_worse(tmp_path):
    options = SearchOptions(max_iterations=30, population_size=6)
    values = {}
    for searcher in SEARCHERS:
        run = Run.open(tmp_path / searcher, command="optimize", config={}, seed=0)
        found = search(parabola, TRAITS, options, run, searcher=searcher)
        assert found.evaluations == 180
        values[searcher] = found.best.value
    assert min(values["cmaes"], values["tpe"]) > values["random"]


def test_tpe_begins_as_random_search_does_and_then_learns(tmp_path):
    options = SearchOptions(max_iterations=4, population_size=6)
    found = {}
    for searcher in ("tpe", "random"):
        run = Run.open(tmp_path / searcher, command="optimize", config={}, seed=0)
        found[searcher] = search(parabola, TRAITS, options, run, searcher=searcher).candidates
    assert found["tpe"][:12] == found["random"][:12]
    assert all(a != b for a, b in zip(found["tpe"][12:], found["random"][12:], strict=True))


ENDS = np.array([[1.5, -1.0, 0.0], [-1.5, 1.0, 0.0]])
SEGMENT = float(np.linalg.norm(ENDS[0] - ENDS[1]))


def two_ends(mixes, iteration, wall=np.inf):
    """Two objectives, best at one end each: the segment between is the front, √f₁ + √f₂ its length.

    Beyond a wall across it a constraint is broken.
    """
    away = [((np.array(mix.values) - ENDS) ** 2).sum(axis=1) for mix in mixes]
    return [
        Value(-float(each.mean()), {"parts": {"a": -float(each[0]), "b": -float(each[1])}}, beyond)
        for each, mix in zip(away, mixes, strict=True)
        for beyond in [max(0.0, mix.values[0] - wall)]
    ]


def excess(front):
    """How much longer the way from end to end is through each mix of a front."""
    points = np.sqrt([[-part for part in each.standing.parts] for each in front])
    return points.sum(axis=1) - SEGMENT


def test_a_planted_front_is_found_from_end_to_end(tmp_path):
    options = SearchOptions(max_iterations=15, population_size=8, seed=3)
    dominated = Coefficients(TRAITS, (0.0, 0.0, 2.0))
    options = dataclasses.replace(options, inject=(dominated.as_dict(),))
    found = {}
    for searcher in ("tpe", "random"):
        run = Run.open(tmp_path / searcher, command="optimize", config={}, seed=0)
        result = search(two_ends, TRAITS, options, run, searcher=searcher)
        found[searcher] = front_of(result.candidates)
        if searcher == "tpe":
            assert result.candidates[0].coefficients == dominated
            assert dominated not in [each.coefficients for each in found["tpe"]]
    assert excess(found["tpe"]).mean() < 0.15 < excess(found["random"]).mean()
    first, *_, last = (each.standing.parts for each in found["tpe"])
    assert first[0] > -0.2
    assert last[1] > -0.2
    ordered = [each.standing.parts for each in found["tpe"]]
    assert ordered == sorted(ordered, reverse=True)
    assert [b for _, b in ordered] == sorted(b for _, b in ordered)  # as one falls, one rises


def test_a_front_holds_only_what_keeps_the_constraints(run):
    walled = partial(two_ends, wall=0.0)
    options = SearchOptions(max_iterations=15, population_size=8)
    result = search(walled, TRAITS, options, run, searcher="tpe")
    front = front_of(result.candidates)
    assert all(each.coefficients.values[0] <= 0 for each in front)
    tempted = [each for each in result.candidates if each.violation]
    assert max(each.standing.parts for each in tempted)[0] > front[0].standing.parts[0]
    broken = front_of(tempted)
    assert [each.violation for each in broken] == [min(each.violation for each in tempted)]


def test_what_has_one_objective_or_no_score_is_in_no_front(run):
    assert front_of(search(parabola, TRAITS, SearchOptions(max_iterations=1), run).candidates) == []

    def partly(mixes, iteration):
        values = two_ends(mixes, iteration)
        return [Value(None), *values[1:]]

    options = SearchOptions(max_iterations=4, population_size=6)
    run = Run.open(run.folder.with_name("partly"), command="optimize", config={}, seed=0)
    result = search(partly, TRAITS, options, run, searcher="tpe")
    assert None not in [each.value for each in front_of(result.candidates)]


@pytest.mark.parametrize(
    ("searcher", "objective"), [*((each, parabola) for each in SEARCHERS), ("tpe", two_ends)]
)
def test_a_resumed_search_asks_what_an_uninterrupted_one_asks(tmp_path, searcher, objective):
    options = SearchOptions(max_iterations=6, population_size=5)
    whole = Run.open(tmp_path / "whole", command="optimize", config={}, seed=0)
    expected = search(objective, TRAITS, options, whole, searcher=searcher)
    cut = Run.open(tmp_path / "cut", command="optimize", config={}, seed=0)
    rows = whole.read(GENERATIONS)
    cut.append(GENERATIONS, rows[: 2 * 5 + 3])  # two generations, and a part of the third
    asked = []

    def watched(mixes, iteration):
        asked.append(iteration)
        return objective(mixes, iteration)

    assert search(watched, TRAITS, options, cut, searcher=searcher) == expected
    assert asked == [3, 4, 5, 6]
    assert cut.read(GENERATIONS) == rows


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from persona_lora.core.runs import Run
from persona_lora.studies.personas.search import SearchOptions, Value, search

def killed_in_the_third(mixes, iteration):
    if iteration == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return [Value(-float(np.sum((np.array(mix.values) - 1.0) ** 2))) for mix in mixes]

run = Run.open(Path(sys.argv[1]), command="optimize", config={}, seed=0)
options = SearchOptions(max_iterations=8, population_size=5)
search(killed_in_the_third, ("a", "b", "c"), options, run)
"""


def test_a_killed_process_loses_at_most_the_running_generation(tmp_path):
    script = tmp_path / "search.py"
    script.write_text(KILLED)

    def run(folder, killed_in):
        return subprocess.run([sys.executable, script, tmp_path / folder, killed_in]).returncode

    assert run("whole", "-1") == 0
    rows = tmp_path / "killed" / f"{GENERATIONS}.jsonl"
    assert run("killed", "3") == -signal.SIGKILL
    before = rows.read_text()
    assert before.count("\n") == 10
    assert run("killed", "-1") == 0
    assert rows.read_text().startswith(before)
    assert rows.read_text() == (tmp_path / "whole" / rows.name).read_text()


@pytest.mark.parametrize("searcher", ["cmaes", "tpe"])
def test_an_unscored_candidate_gets_the_worst_value_of_its_generation(run, searcher):
    """pycma's own rule is the median, which would reward what cannot be judged."""

    def partly(mixes, iteration):
        values = parabola(mixes, iteration)
        pairs = zip(mixes, values, strict=True)
        return [Value(None) if mix.values[0] > 0 else value for mix, value in pairs]

    options = SearchOptions(max_iterations=25, population_size=12, initial={"a": -1.0})
    found = search(partly, TRAITS, options, run, searcher=searcher)
    flagged = [each for each in found.candidates if each.value is None]
    assert flagged
    assert all(each.coefficients.values[0] > 0 for each in flagged)
    assert found.best.coefficients.values[0] <= 0
    assert found.mean.values[0] < 0.5


def walled(mixes, iteration):
    """The parabola, and a better region behind a wall: there the constraint is broken."""
    return [
        Value(value.value + 50.0 * (mix.values[0] > 2), violation=max(0.0, mix.values[0] - 2.0))
        for mix, value in zip(mixes, parabola(mixes, iteration), strict=True)
    ]


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_a_better_region_that_breaks_a_constraint_is_not_named_best(tmp_path, searcher):
    run = Run.open(tmp_path / "run", command="optimize", config={}, seed=0)
    options = SearchOptions(max_iterations=60, population_size=8, sigma0=2.0, initial={"a": 4.0})
    found = search(walled, TRAITS, options, run, searcher=searcher)
    tempted = [each for each in found.candidates if each.violation]
    assert max(each.value for each in tempted) > found.best.value
    assert found.best.violation == 0
    assert found.mean.values[0] <= 2
    if searcher == "cmaes":
        assert np.allclose(found.best.coefficients.values, GOAL, atol=0.1)
    assert search(walled, TRAITS, options, run, searcher=searcher) == found  # from rows


def test_where_nothing_keeps_the_constraints_the_least_broken_is_best(run):
    def far(mixes, iteration):
        return [Value(mix.values[0], violation=10 + abs(mix.values[0])) for mix in mixes]

    found = search(far, TRAITS, SearchOptions(max_iterations=30), run)
    assert found.best.violation == min(each.violation for each in found.candidates)
    assert abs(found.mean.values[0]) < 0.5


def test_mixes_are_measured_once_outside_of_a_search(run):
    asked = []

    def watched(mixes, iteration):
        asked.append(len(mixes))
        return parabola(mixes, iteration)

    mixes = [Coefficients(TRAITS, (x, 0.0, 0.0)) for x in (0.0, 1.0)]
    first = evaluate_once(watched, mixes, run, "finalists")
    assert evaluate_once(watched, mixes, run, "finalists") == first
    assert evaluate_once(watched, mixes[1:], run, "finalists") == first[1:]
    assert asked == [2, 1]


def test_nothing_scored_is_an_error_not_a_result(run):
    with pytest.raises(UserError, match="not one candidate"):
        search(lambda mixes, iteration: [Value(None) for _ in mixes], TRAITS, SearchOptions(), run)


def test_mixes_that_were_not_scored_are_measured_again(run):
    scored = [False, True]

    def sometimes(mixes, iteration):
        return [Value(1.0), Value(2.0 if scored.pop(0) else None)]

    mixes = [Coefficients(TRAITS, (x, 0.0, 0.0)) for x in (0.0, 1.0)]
    assert [each.value for each in evaluate_once(sometimes, mixes, run, "finalists")] == [1.0, None]
    again = evaluate_once(sometimes, mixes, run, "finalists")
    assert [each.value for each in again] == [1.0, 2.0]
    assert evaluate_once(sometimes, mixes, run, "finalists") == again
    with pytest.raises(UserError, match="not one candidate"):
        evaluate_once(lambda *_: [Value(None)], mixes[:1], run, "others")
    assert not run.read("others")


@pytest.mark.parametrize(
    "shorter", [{"max_iterations": 3}, {"max_evaluations": 15}, {"target": -1e9}]
)
def test_a_search_that_ends_before_what_is_on_disk_is_refused(run, shorter):
    longer = SearchOptions(max_iterations=5, population_size=4)
    found = search(parabola, TRAITS, longer, run)
    rows = run.read(GENERATIONS)
    with pytest.raises(UserError, match=r"ends with generation [13] .* on disk it went on to 5"):
        search(parabola, TRAITS, dataclasses.replace(longer, **shorter), run)
    assert run.read(GENERATIONS) == rows
    assert search(parabola, TRAITS, longer, run) == found


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (SearchOptions(max_iterations=2), "maxiter"),
        (SearchOptions(max_evaluations=15, population_size=7), "maxevals"),
        (SearchOptions(target=-10.0), "target"),
    ],
)
def test_why_a_search_stops(options, reason, run):
    assert reason in search(parabola, TRAITS, options, run).reason


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_fixed_weights_bounds_and_injected_points(run, searcher):
    options = SearchOptions(
        max_iterations=5 if searcher == "tpe" else 1,
        population_size=6,
        sigma0=3.0,
        bound=1.5,
        fixed={"b": -1.0},
        inject=({"a": 1.0, "b": -1.0, "c": 0.5},),
    )
    found = search(parabola, TRAITS, options, run, searcher=searcher)
    for each in found.candidates:
        assert each.coefficients.as_dict()["b"] == -1.0
        assert all(abs(value) <= 1.5 for value in each.coefficients.values)
    assert found.best.coefficients == Coefficients(TRAITS, (1.0, -1.0, 0.5))


@pytest.mark.parametrize("searcher", SEARCHERS)
@pytest.mark.parametrize("fixed", [{}, {"b": 9.0}])
def test_injected_points_are_tried_as_given_at_the_bound_and_in_generations_of_one_size(
    run, searcher, fixed
):
    points = [{"a": x, "b": -3.9, "c": 4.0} for x in (4.0, 3.95, 0.3, -3.999, 2.0)]
    options = SearchOptions(
        max_iterations=4, population_size=4, inject=tuple(points), fixed=fixed, seed=1
    )
    found = search(parabola, TRAITS, options, run, searcher=searcher).candidates
    assert [each.iteration for each in found] == [at for at in range(1, 5) for _ in range(4)]
    tried = np.array([each.coefficients.values for each in found])
    for each in points:
        given = [{**each, **fixed}[trait] for trait in TRAITS]
        assert np.isclose(tried, given, rtol=0, atol=1e-12).all(axis=1).any()


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_the_default_population_is_that_of_the_free_directions(searcher):
    traits = tuple("abcdefg")
    for held in range(len(traits)):
        options = SearchOptions(fixed=dict.fromkeys(traits[:held], 0.5))
        asked = SEARCHERS[searcher](traits, options).ask()
        assert len(asked) == 4 + int(3 * np.log(len(traits) - held))


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_values_that_tell_nothing_apart_spend_the_whole_budget_and_are_warned_of_once(
    run, searcher, caplog
):
    """A judge of whole points gives many candidates one value, far from where they converge."""

    def flat_at_first(mixes, iteration):
        return parabola(mixes, iteration) if iteration > 15 else [Value(1.0) for _ in mixes]

    options = SearchOptions(max_iterations=17, population_size=5)
    found = search(flat_at_first, TRAITS, options, run, searcher=searcher)
    assert (found.evaluations, found.reason) == (85, "maxiter")
    warned = [each.message for each in caplog.records if "stand the same" in each.message]
    assert len(warned) == 1
    assert "generation 1 " in warned[0]
    assert "--num-prompts" in warned[0]


def test_equal_values_of_many_generations_end_cmaes(run):
    options = SearchOptions(max_iterations=200, tolx=1e-9)
    found = search(parabola, TRAITS, options, run)
    assert "tolfun" in found.reason
    assert found.iterations < 200


def test_a_single_free_direction_may_widen_to_its_bound(run):
    fixed = {"b": -2.0, "c": 0.5}
    options = SearchOptions(max_iterations=25, bound=4.0, fixed=fixed, seed=1)
    found = search(
        lambda mixes, iteration: [Value(mix.values[0]) for mix in mixes], TRAITS, options, run
    )
    assert found.best.coefficients.as_dict()["a"] == pytest.approx(4.0, abs=0.05)


def test_the_global_random_generator_is_left_alone(run):
    np.random.seed(3)
    expected = np.random.rand(4)
    np.random.seed(3)
    search(parabola, TRAITS, SearchOptions(max_iterations=2), run)
    assert np.array_equal(np.random.rand(4), expected)


def test_rows_of_other_options_are_refused(run):
    search(parabola, TRAITS, SearchOptions(max_iterations=2, seed=1), run)
    with pytest.raises(UserError, match="--overwrite"):
        search(parabola, TRAITS, SearchOptions(max_iterations=2, seed=2), run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma0": 0.0}, "sigma0"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"population_size": 2}, "population_size"),
        ({"bound": -1.0}, "bound"),
        ({"initial": {"a": 9.0}}, "bound 4 cannot start from a=9; raise --bound"),
        ({"bound": 1.0, "inject": ({"b": -2.0},)}, "bound 1 cannot start from b=-2"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        SearchOptions(**options)


def test_an_unknown_trait_or_searcher_is_named(run):
    with pytest.raises(UserError, match="'d'"):
        search(parabola, TRAITS, SearchOptions(initial={"d": 1.0}), run)
    held = SearchOptions(fixed=dict.fromkeys(TRAITS, 1.0))
    with pytest.raises(UserError, match="every direction of the search is fixed; leave one"):
        search(parabola, TRAITS, held, run)
    with pytest.raises(UserError, match="cmaes"):
        search(parabola, TRAITS, SearchOptions(), run, searcher="annealing")


def test_tpe_without_its_library_or_a_bound_is_refused_with_the_remedy(run, monkeypatch):
    with pytest.raises(UserError, match="--bound 4"):
        search(parabola, TRAITS, SearchOptions(bound=0), run, searcher="tpe")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"persona-lora\[search\]"):
        search(parabola, TRAITS, SearchOptions(), run, searcher="tpe")
    assert run.read(GENERATIONS) == []
