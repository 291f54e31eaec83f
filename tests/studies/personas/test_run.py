"""A whole persona search on the tiny model: files, resume, held-out fits, methods compared."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from persona_lora.core.chat import Exchange, Verdict
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_jsonl, write_jsonl
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.options import ObjectiveOptions
from persona_lora.core.personas import PersonaPrompts, load_persona
from persona_lora.core.protocol import FrozenProtocol
from persona_lora.core.runs import Output, Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.judges.choice import JudgeOptions
from persona_lora.models.embeddings import SentenceEmbedder
from persona_lora.profiles.conversations import load_conversations
from persona_lora.profiles.folders import build_persona
from persona_lora.projections.inputs import kept_inputs, load_ordinary_prompts
from persona_lora.report.comparisons import fits_over_prompts
from persona_lora.steering.bank import bank_of_diffs
from persona_lora.studies.asking.run import GenerationOptions
from persona_lora.studies.personas.baselines import Wanted, default_layers, load_directions
from persona_lora.studies.personas.bench import (
    CMAESPersonaOptimizer,
    Optimized,
    PersonaBench,
)
from persona_lora.studies.personas.figure import name_of
from persona_lora.studies.personas.likeliest import likeliest_mix
from persona_lora.studies.personas.method_comparison import compare_methods
from persona_lora.studies.personas.read_fits import BOUNDS
from persona_lora.studies.personas.run import (
    Method,
    PersonaProblem,
    best_of,
    first_prompts,
    optimise_over_seeds,
    optimise_persona,
    persona_system_prompt,
    speaker_of,
)
from persona_lora.studies.personas.search import SearchOptions
from persona_lora.studies.report_page import write_report
from tests.scenes import EvenCoherence, FitJudge

PROMPTS = PersonaPrompts(
    ("Hi there.", "Any plans?"), ("What now?", "And then?", "Why?"), ("Who's there?", "Since when?")
)
TRAITS = ("calm", "loud")
OPTIONS = SearchOptions(max_iterations=3, population_size=4)
JUDGES = ("search_judge", "report_judge")


def even_relevance(exchanges):
    return [90.0] * len(exchanges)


def letter_counts(texts):
    """Unit vectors of texts by their letters."""
    counts = np.array([[text.count(each) for each in "aeiou "] for text in texts]) + 0.1
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def talk(name, split, lines):
    turns = []
    for line in lines:
        turns += [{"role": "user", "content": line}, {"role": "assistant", "content": "I see."}]
    return {"id": name, "split": split, "messages": turns}


@pytest.fixture(scope="module")
def personas(tmp_path_factory):
    """Two persons who are easily told apart, with all their files."""
    root = tmp_path_factory.mktemp("personas")
    shout = [f"Wow, the {word} was so great!" for word in ("cat", "dog", "sea", "sun", "car")]
    quiet = [f"perhaps i looked at a {word} then" for word in ("map", "box", "cup", "pen", "jar")]
    for name, lines in (("ann", shout), ("bob", quiet)):
        more = [f"{line} {extra}" for line in lines for extra in ("Again", "Then home")]
        rows = [talk(f"{name}-1", "train", lines + more), talk(f"{name}-2", "test", more[::-1])]
        write_jsonl(root / name / "conversations.jsonl", rows)
        read = load_conversations(root / name / "conversations.jsonl")
        build_persona(root / name, read, SentenceEmbedder().embed, num_samples=3)
    (root / "prompts.json").write_text(
        json.dumps({"train": PROMPTS.train + PROMPTS.fresh, "held_out": PROMPTS.held_out})
    )
    return root


@pytest.fixture
def problem(chat_model, personas):
    return PersonaProblem(
        chat_model,
        load_persona("ann", personas),
        PROMPTS,
        FitJudge(),
        FitJudge(),
        EvenCoherence(),
        even_relevance,
        letter_counts,
        GenerationOptions(max_new_tokens=6),
    )


@pytest.fixture
def method(chat_model, make_diff):
    diffs = {
        name: make_diff(chat_model.model, seed=seed, scale=0.2) for seed, name in enumerate(TRAITS)
    }
    return Method("lora", bank_of_diffs(diffs), {"calm": 1.0, "loud": 0.5})


def test_a_search_writes_the_files_it_is_known_by(problem, method, tmp_path):
    result = optimise_persona(problem, method, tmp_path / "ann_lora", searching=OPTIONS)
    record = json.loads((tmp_path / "ann_optimization.json").read_text())
    weights = json.loads((tmp_path / "ann_best_weights.json").read_text())
    assert record["persona_id"] == "ann"
    assert record["best_weights"] == weights == result.weights.as_dict()
    mix = json.loads((tmp_path / "ann_mix.json").read_text())
    assert (
        record["best_coefficients"]
        == mix
        == speaker_of(problem, method).coefficients(result.weights)
    )
    assert mix != weights
    assert record["best_score"] == result.fit_of(result.best).fit.mean
    assert record["best"] == result.best
    assert (record["num_iterations"], record["num_evaluations"]) == (3, 12)
    history = record["optimization_history"]
    assert history["iterations"] == [1, 2, 3]
    assert history["best_scores"] == sorted(history["best_scores"])
    assert set(record["held_out"]) == {"none", "mean", "incumbent", *BOUNDS}
    assert {row["prompt"] for row in result.rows} == set(PROMPTS.held_out)


def test_what_is_named_best_stood_highest_on_fresh_prompts(problem, method, tmp_path):
    asked, ended = [], []

    class Watching(FitJudge):
        def judge(self, exchanges, criterion):
            asked.append([each.question for each in exchanges])
            ended.extend(each.finished for each in exchanges if each.answer)
            return super().judge(exchanges, criterion)

    watched = dataclasses.replace(problem, search_judge=Watching())
    result = optimise_persona(watched, method, tmp_path / "run", searching=OPTIONS)
    assert set(asked[-1]) <= set(PROMPTS.fresh)
    rows = Run(tmp_path / "run").read("finalists")
    assert {tuple(row["details"]["prompts"]) for row in rows} == {(0, 1)}
    assert max(row["value"] for row in rows) == result.standing.value
    assert result.weights == result.finalists[result.best].coefficients
    page = write_report([tmp_path / "run"], tmp_path / "page.html").read_text()
    mean, *others = (f"{row['value']:.2f}" for row in rows)
    assert f"the mean {mean}, the best candidates {', '.join(others)};" in page
    assert "(does not count: echo)" not in page
    kept = [{**row, "failed": "echo"} for row in Run(tmp_path / "run").read("held_out")]
    assert not all(ended)  # a judge is told which answers were cut, and rows keep it
    assert not all(row["finished"] for row in kept)
    write_jsonl(tmp_path / "run" / "held_out.jsonl", kept)
    page = write_report([tmp_path / "run"], tmp_path / "page.html").read_text()
    assert "(does not count: echo)" in page
    few = dataclasses.replace(problem, prompts=dataclasses.replace(PROMPTS, fresh=()))
    with pytest.raises(UserError, match="search on fewer"):
        optimise_persona(few, method, tmp_path / "none", searching=OPTIONS)
    assert not (tmp_path / "none").exists()


def test_constraints_are_enforced_on_fresh_prompts(problem, method, tmp_path, caplog):
    """The mix that is named best is one that keeps them there, however high others stand."""

    class Fresh(EvenCoherence):
        kept: tuple = ()

        def verdicts(self, exchanges, name):
            scores = [90.0 if self.keeps(e) else 60.0 + len(e.answer) / 10 for e in exchanges]
            return [Verdict("coherence", score, "", name) for score in scores]

        def keeps(self, each):
            return each.question not in PROMPTS.fresh or each.answer in self.kept

    def search(name, kept):
        coherence = Fresh()
        coherence.kept = kept
        limited = ObjectiveOptions(min_coherence=80.0)
        asked = dataclasses.replace(problem, coherence=coherence)
        found = optimise_persona(
            asked, method, tmp_path / name, searching=OPTIONS, objective=limited
        )
        page = write_report([tmp_path / name], tmp_path / f"{name}.html").read_text()
        return found, Run(tmp_path / name).read("finalists"), page

    warning = "on fresh prompts no mix kept the constraints"
    found, rows, page = search("none", ())
    assert all(row["violation"] for row in rows)
    assert found.standing.kept == -min(row["violation"] for row in rows)
    assert "breaks them least" in caplog.text
    assert f"WARNING: {warning}" in page
    lowest = min(rows, key=lambda row: row["value"])
    assert lowest["value"] < max(row["value"] for row in rows)
    caplog.clear()
    found, rows, page = search("lowest", lowest["details"]["answers"])
    assert [row["values"] for row in rows if not row["violation"]] == [lowest["values"]]
    assert list(found.weights.values) == lowest["values"]
    assert warning not in page
    assert "breaks them least" not in caplog.text


def test_a_real_line_is_placed_among_the_prompts_that_a_model_is_asked(problem):
    asked = []

    def placed(exchanges):
        asked.append([each.question for each in exchanges])
        return [float(len(asked)), *[None] * (len(exchanges) - 1)]

    rows = dataclasses.replace(problem, relevance=placed).bounds
    assert [own[0] for own in asked] == [row["prompt"] for row in rows]
    assert all(own[1:] == list(PROMPTS.held_out) for own in asked)
    assert [row["relevance"] for row in rows] == [1.0 + at for at in range(len(rows))]
    assert {row["condition"] for row in rows} == set(BOUNDS)


def test_a_search_by_another_method_says_whose_result_it_replaces(
    problem, method, tmp_path, caplog
):
    random = dataclasses.replace(method, searcher="random")
    twice = dataclasses.replace(OPTIONS, seeds=2)
    for _ in range(2):  # its own seeds, and a search that goes on, say nothing
        optimise_over_seeds(problem, [method], Output(tmp_path / "ann_lora"), searching=twice)
    assert "held what" not in caplog.text
    optimise_persona(problem, random, tmp_path / "ann_lora_random", searching=OPTIONS)
    assert "held what ann_lora found, and holds what ann_lora_random found now" in caplog.text
    kept = json.loads((tmp_path / "ann_optimization.json").read_text())
    assert kept["search"] == "ann_lora_random"


def test_every_seed_and_every_persona_draws_candidates_of_its_own(problem, method, tmp_path):
    bob = dataclasses.replace(problem.persona, id="bob")
    drawn, twice = [], dataclasses.replace(OPTIONS, seeds=2)
    for each in (problem, dataclasses.replace(problem, persona=bob)):
        random = dataclasses.replace(method, searcher="random")
        output = Output(tmp_path / each.persona.id / "run")
        found = optimise_over_seeds(each, [random], output, searching=twice)
        drawn += [result.search.candidates[0].coefficients for result in found]
        record = json.loads(
            (output.path.parent / f"{each.persona.id}_optimization.json").read_text()
        )
        assert record["best_weights"] == best_of(found).weights.as_dict()
    assert len(set(drawn)) == 4
    assert (tmp_path / "ann" / "run_seed1" / "generations.jsonl").is_file()
    with pytest.raises(UserError, match="at least one seed"):
        dataclasses.replace(OPTIONS, seeds=0)


@pytest.mark.parametrize("searcher", ["cmaes", "tpe", "random"])
def test_a_warm_start_tries_the_likeliest_mix_first(problem, method, tmp_path, searcher):
    output = Output(tmp_path / "ann" / "run")
    method = dataclasses.replace(method, searcher=searcher)
    (found,) = optimise_over_seeds(problem, [method], output, searching=OPTIONS, warm_start=True)
    lines = problem.persona.answers("train")
    likeliest = likeliest_mix(speaker_of(problem, method), lines, OPTIONS.bound)
    assert found.search.candidates[0].coefficients == likeliest
    (cold,) = optimise_over_seeds(problem, [method], Output(tmp_path / "cold"), searching=OPTIONS)
    assert likeliest not in [each.coefficients for each in cold.search.candidates]


def test_a_search_is_held_to_the_seeds_of_its_protocol(problem, method, tmp_path):
    asked = {"held out": len(PROMPTS.held_out)}
    frozen = FrozenProtocol("optimize", asked, ("incumbent", "mean"), 2, "prompts")
    output = Output(tmp_path / "run", protocol=frozen)
    with pytest.raises(UserError, match=r"seeds: 2, now 1"):
        optimise_over_seeds(problem, [method], output, searching=OPTIONS)
    assert not output.path.exists()


def test_a_second_call_generates_nothing(problem, method, tmp_path, monkeypatch):
    first = optimise_persona(problem, method, tmp_path / "run", searching=OPTIONS)
    assert first.rows
    monkeypatch.setattr(
        "persona_lora.steering.steerer.generate_answers",
        lambda *_, **__: pytest.fail("it generated"),
    )
    assert optimise_persona(problem, method, tmp_path / "run", searching=OPTIONS) == first


class Tired(FitJudge):
    """Scores so many answers to what no search asks."""

    def __init__(self, name, most):
        self.name, self.left = name, most

    def judge(self, exchanges, criterion):
        verdicts = zip(exchanges, super().judge(exchanges, criterion), strict=True)
        return [
            Verdict(criterion, None, "down", self.name) if self._is_over(exchange) else verdict
            for exchange, verdict in verdicts
        ]

    def _is_over(self, exchange):
        unsearched = exchange.question not in (*PROMPTS.train, *PROMPTS.fresh)
        self.left -= unsearched
        return unsearched and self.left < 0


@pytest.mark.parametrize("tired", ["report_judge", "search_judge"])
def test_what_a_judge_left_unscored_is_judged_by_a_later_call(problem, method, tmp_path, tired):
    many = 10**6

    def found(place, most):
        fresh = {each: Tired(each, most if each == tired else many) for each in JUDGES}
        known = dataclasses.replace(problem, **fresh)
        optimise_persona(known, method, tmp_path / place, searching=OPTIONS)
        return Run(tmp_path / place).read("held_out") + Run(tmp_path / place).read("bounds")

    column = "score" if tired == "report_judge" else "searched_by"
    left = [row["condition"] for row in found("run", 4) if row[column] is None]
    assert {"incumbent", *BOUNDS} <= set(left)
    assert found("run", many) == found("whole", many)


def test_a_longer_search_goes_on_from_a_shorter_one(problem, method, tmp_path):
    longer = SearchOptions(max_iterations=5, population_size=4)
    expected = optimise_persona(problem, method, tmp_path / "whole", searching=longer)
    optimise_persona(problem, method, tmp_path / "run", searching=OPTIONS)
    result = optimise_persona(problem, method, tmp_path / "run", searching=longer)
    assert result.search == expected.search
    assert result.fits == expected.fits


def test_other_settings_are_another_run(problem, method, tmp_path):
    optimise_persona(problem, method, tmp_path / "run", searching=OPTIONS)
    other = SearchOptions(max_iterations=3, population_size=4, sigma0=0.5)
    with pytest.raises(UserError, match="--overwrite"):
        optimise_persona(problem, method, tmp_path / "run", searching=other)
    optimise_persona(problem, method, Output(tmp_path / "run", overwrite=True), searching=other)


def test_what_was_read_is_another_run_when_it_has_changed(problem, method, tmp_path, make_diff):
    folder = tmp_path / "ann_lora"
    known = dataclasses.replace(problem, judged_by={"the other personas": "as they were"})
    optimise_persona(known, method, folder, searching=OPTIONS)
    told = problem.persona.conversations[0]
    longer = dataclasses.replace(told, messages=[*told.messages, *told.messages])
    diffs = {name: diff * -1.0 for name, diff in method.directions.diffs.items()}
    changed = dataclasses.replace(problem.persona, conversations=(longer,))
    changes = {
        "the persona ann": {"persona": changed},
        "the other personas": {"judged_by": {"the other personas": "changed"}},
        "the diff of calm": {},
        "the fresh prompts": {"prompts": dataclasses.replace(PROMPTS, fresh=("Is it so?", "How?"))},
    }
    for named, change in changes.items():
        other = method if change else dataclasses.replace(method, directions=bank_of_diffs(diffs))
        with pytest.raises(UserError, match=f"the content of .*{named}.* has changed"):
            optimise_persona(
                dataclasses.replace(known, **change),
                other,
                tmp_path / "ann_lora",
                searching=OPTIONS,
            )


def test_differences_are_paired_by_prompt():
    rows = [
        {
            "persona": "ann",
            "condition": name,
            "prompt_id": at,
            "score": score,
            "coherence": 70.0,
            "relevance": 60.0,
        }
        for name, scores in (("none", (1.0, 2.0, None)), ("mean", (2.0, 4.0, 5.0)))
        for at, score in enumerate(scores)
    ]
    plain, steered = fits_over_prompts(rows, "none")
    assert plain.difference is None
    assert plain.fit.coverage == pytest.approx(2 / 3)
    assert steered.difference.mean == pytest.approx(1.5)
    assert steered.difference.n == 2
    assert steered.p == 0.5  # two pairs: the least there is
    assert (steered.coherence.mean, steered.relevance.mean) == (70.0, 60.0)


@pytest.fixture
def bench(chat_model, personas, make_diff, tmp_path, monkeypatch):
    for seed, name in enumerate(TRAITS):
        make_diff(chat_model.model, seed=seed, scale=0.2).save(tmp_path / "own" / name / "diff")
    bench = PersonaBench(
        chat_model,
        PROMPTS,
        GenerationOptions(max_new_tokens=6),
        JudgeOptions("embedding"),
        TRAITS,
        tmp_path / "own",
        personas,
    )
    bench.coherence = EvenCoherence()
    return bench


def test_methods_share_prompts_judge_and_budget(bench, tmp_path):
    folder = tmp_path / "out"
    comparison = compare_methods(
        bench, ["ann", "bob"], ["lora", "random", "tpe", "prompt"], folder, searching=OPTIONS
    )
    methods = ["none", "prompt", "lora", "random", "tpe"]
    assert [each.condition for each in comparison.overall] == [*methods, *BOUNDS]
    assert {each.fit.n_questions for each in comparison.overall} == {2}  # units are personas
    rows = [json.loads(line) for line in (comparison.folder / "held_out.jsonl").open()]
    assert len(rows) == 2 * (5 + len(BOUNDS)) * len(PROMPTS.held_out)
    for persona in ("ann", "bob"):
        budgets = {
            name: (folder / name / f"{persona}_{name}" / "generations.jsonl")
            .read_text()
            .count("\n")
            for name in ("lora", "random", "tpe")
        }
        assert set(budgets.values()) == {12}
        found = {name: Run(folder / name / f"{persona}_{name}").record for name in budgets}
        searchers = {name: each["config"]["searcher"] for name, each in found.items()}
        assert searchers == {"lora": "cmaes", "random": "random", "tpe": "tpe"}
    plain = [each.fit for each in comparison.by_persona["ann"] if each.condition == "none"]
    assert plain[0].n == 3
    for name in ("overall", "against_random"):
        lines = (comparison.folder / f"{name}.csv").read_text().splitlines()
        assert len(lines) >= 1 + 4 + len(BOUNDS)
    spent = [
        (row["persona"], row["condition"], row["evaluations"], row["stopped"])
        for name in ("comparison", "overall")
        for row in csv.DictReader((comparison.folder / f"{name}.csv").open())
        if row["condition"] in ("lora", "random", "prompt")
    ]
    assert ("ann", "lora", "12", "maxiter") in spent
    assert ("all", "random", "24", "maxiter") in spent
    assert ("bob", "prompt", "", "") in spent
    canned = next(each for each in comparison.overall if each.condition == "canned")
    assert (canned.fit.mean, canned.counted) == (1.0, 0.0)
    assert comparison.lines[0] == "Exploratory."
    assert "canned 1.00" in comparison.lines[1]


def test_a_comparison_is_held_to_its_protocol_and_so_is_every_search_below(bench, tmp_path):
    path = tmp_path / "protocol.yaml"
    asked = {"held out": len(PROMPTS.held_out), "personas": 1}
    frozen = FrozenProtocol(
        *("compare-methods", asked, ("lora", "prompt"), 1, "personas"),
        least_scored=0.01,  # of a tiny model that often says nothing
        settings={"max_iterations": OPTIONS.max_iterations},
    )
    path.write_text(yaml.safe_dump(frozen.as_dict()))
    held = Output(tmp_path / "out", protocol=FrozenProtocol.read(path))
    for personas, methods, searching, said in (
        (["ann", "bob"], ["lora", "prompt"], OPTIONS, "personas: 1, now 2"),
        (["ann"], ["lora"], OPTIONS, "family"),
        (["ann"], ["lora", "prompt"], dataclasses.replace(OPTIONS, max_iterations=9), "now 9"),
    ):
        with pytest.raises(UserError, match=said):
            compare_methods(bench, personas, methods, held, searching=searching)
    assert not held.path.exists()
    comparison = compare_methods(bench, ["ann"], ["lora", "prompt"], held, searching=OPTIONS)
    sha = held.protocol.sha256
    assert comparison.lines[0] == f"Pre-registered (sha256 {sha[:12]}…)."
    assert comparison.lines[0] in (comparison.folder / "report.html").read_text()
    below = [tmp_path / "out" / each for each in ("plain/ann", "prompt/ann", "lora/ann_lora")]
    assert [Run(each).record["config"]["protocol"] for each in below] == [sha] * 3


def test_what_was_searched_without_a_protocol_is_not_pre_registered_afterwards(bench, tmp_path):
    folder = tmp_path / "out"
    compare_methods(bench, ["ann"], ["lora"], folder, searching=OPTIONS)
    asked = {"held out": len(PROMPTS.held_out), "personas": 1}
    frozen = FrozenProtocol("compare-methods", asked, ("lora",), 1, "personas")
    with pytest.raises(UserError, match="protocol"):
        compare_methods(
            bench, ["ann"], ["lora"], Output(folder, protocol=frozen), searching=OPTIONS
        )


def test_what_is_not_searched_is_asked_anew_at_another_temperature(bench, tmp_path):
    compare_methods(bench, ["ann"], ["prompt"], tmp_path / "out")
    bench.generation = dataclasses.replace(bench.generation, temperature=1.0)
    with pytest.raises(UserError, match=r"temperature.*--overwrite"):
        compare_methods(bench, ["ann"], ["prompt"], tmp_path / "out")


def test_equal_weights_need_no_search_and_vectors_name_their_layers(bench, tmp_path):
    for trait in TRAITS:
        folder = bench.trait_folder / "vectors" / trait
        directions = {layer: torch.randn(32) for layer in (0, 1)}
        vector = SteeringVector(directions, BaseModel("tiny", None), num_layers=2, trait=trait)
        vector.save(folder / f"{trait}_response_avg_svd.safetensors")
    methods = ["equal", "likelihood", "svd@0", "svd@0-1"]
    comparison = compare_methods(bench, ["ann"], methods, tmp_path / "out", searching=OPTIONS)
    assert [each.condition for each in comparison.overall] == ["none", *methods, *BOUNDS]
    (mix,) = {
        tuple(sorted(row["weights"].items()))
        for row in map(json.loads, (tmp_path / "out/equal/ann/held_out.jsonl").open())
    }
    assert mix == tuple((trait, 1.0) for trait in sorted(TRAITS))
    kept = Run(tmp_path / "out/likelihood/ann").record["config"]["mix"]
    rows = read_jsonl(comparison.folder / "held_out.jsonl")
    assert [row["weights"] for row in rows if row["condition"] == "likelihood"] == [kept] * 3
    for method, layers in (("svd@0", [0]), ("svd@0-1", [0, 1])):
        config = Run(tmp_path / "out" / method / f"ann_{method}").record["config"]
        assert config["directions"]["layers"] == layers
    assert name_of("svd@0") == "SVD vectors, CMA-ES, at 0"


def test_the_divergence_of_what_is_not_searched_is_measured_where_it_is_limited(bench, tmp_path):
    limits = ObjectiveOptions(max_kl=1e-9)
    comparison = compare_methods(
        bench, ["ann"], ["equal", "prompt"], tmp_path / "out", objective=limits
    )
    found = {each.condition: (each.kl, each.feasible) for each in comparison.overall}
    assert found["none"] == (0.0, 1.0)
    assert found["equal"][0] > 1e-9
    assert found["equal"][1] == 0.0
    assert found["prompt"] == (None, None)  # no mix, and so not read as one
    with pytest.raises(UserError, match=r"max_kl.*--overwrite"):
        compare_methods(bench, ["ann"], ["equal"], tmp_path / "out")


def trained_thrice(bench, make_diff):
    """Move the bench to a folder where every trait was trained with three seeds."""
    bench.trait_folder = bench.trait_folder.with_name("thrice")
    for at, trait in enumerate(TRAITS):
        for seed in range(3):
            diff = make_diff(bench.chat_model.model, seed=10 * at + seed, scale=0.2)
            sources = {"training": {"training": {"seed": seed}}, "seed": seed}
            named = dataclasses.replace(diff, trait=trait, sources=sources)
            named.save(bench.trait_folder / trait / f"seed{seed}" / "diff")


def test_every_training_seed_has_a_search_of_its_own(bench, make_diff, tmp_path):
    trained_thrice(bench, make_diff)
    methods = bench.methods("lora", cache=tmp_path / "scales.json")
    assert [each.trained for each in methods] == ["seed0", "seed1", "seed2"]
    comparison = compare_methods(
        bench, ["ann"], ["lora", "equal"], tmp_path / "out", searching=OPTIONS
    )
    assert comparison.lines[2] == "3 seeds, of the search and of the differences' training."
    rows = [json.loads(line) for line in (comparison.folder / "held_out.jsonl").open()]
    for name in ("lora", "equal"):
        drawn = {(row["seed"], row["trained"]) for row in rows if row["condition"] == name}
        assert drawn == {(0, "seed0"), (1, "seed1"), (2, "seed2")}


def test_the_best_mix_is_kept_with_the_training_that_it_is_of(bench, make_diff, tmp_path):
    trained_thrice(bench, make_diff)
    methods = bench.methods("lora")
    found = optimise_over_seeds(
        bench.problem("ann"), methods, Output(tmp_path / "ann_lora"), searching=OPTIONS
    )
    kept = tmp_path / "ann_optimization.json"
    assert json.loads(kept.read_text())["trained"] == f"seed{found.index(best_of(found))}"
    read = Optimized.load(kept, bench.trait_folder)
    speaker = read.speaker(bench.chat_model, bench.generation)
    assert speaker.directions.inputs == methods[found.index(best_of(found))].directions.inputs
    assert read.mix == best_of(found).weights


def test_training_seeds_that_do_not_fit_together_are_refused(bench, make_diff, tmp_path):
    trained_thrice(bench, make_diff)
    twice = dataclasses.replace(OPTIONS, seeds=2)
    with pytest.raises(UserError, match="3 training seeds"):
        compare_methods(bench, ["ann"], ["lora"], tmp_path, searching=twice)
    shutil.rmtree(bench.trait_folder / "loud" / "seed2")
    with pytest.raises(UserError, match="calm seed0, seed1, seed2; loud seed0, seed1"):
        bench.methods("lora")


@pytest.mark.parametrize(
    ("method", "words"), [("magic", "'magic'"), ("lora@3", "chosen layers"), ("svd@9", "svd@9")]
)
def test_a_method_that_cannot_be_is_named(bench, tmp_path, method, words):
    with pytest.raises(UserError, match=words):
        compare_methods(bench, ["ann"], [method], tmp_path)


def test_cutting_the_rank_keeps_the_energy_and_is_recorded(bench):
    whole = load_directions("lora", Wanted(TRAITS, bench.trait_folder))
    cut = load_directions("lora", Wanted(TRAITS, bench.trait_folder, energy=0.8))
    assert cut.record["energy"] == 0.8
    for trait, norm in cut.record["norms"].items():
        assert 0.8 <= (norm / whole.record["norms"][trait]) ** 2 < 1
        assert cut.diffs[trait].rank < whole.diffs[trait].rank
    with pytest.raises(UserError, match="energy"):
        load_directions("svd", Wanted(TRAITS, bench.trait_folder, (1,), energy=0.8))


def test_a_search_cuts_by_what_flows_through_the_model_unless_it_is_told_not_to(bench):
    (whole,) = bench.methods("lora")
    bench.energy = 0.8
    (weighed,) = bench.methods("lora")
    bench.plain = True
    (plain,) = bench.methods("lora")
    inputs = kept_inputs(bench.chat_model, load_ordinary_prompts())
    assert weighed.directions.record["weighed_by"] == inputs.prompts
    assert plain.directions.record.keys() == whole.directions.record.keys() | {"energy"}
    for trait, diff in whole.directions.diffs.items():
        for found, weigh in ((weighed, inputs.weigh), (plain, lambda each: each)):
            lost = weigh(diff - found.directions.diffs[trait]).norm() / weigh(diff).norm()
            assert 0.8 <= 1 - lost**2 < 1
        alike = dict.fromkeys(weighed.directions.diffs[trait].factors)
        ranks = [
            [each.directions.diffs[trait].factors[name].rank for name in alike]
            for each in (weighed, plain)
        ]
        assert sum(ranks[0]) < sum(ranks[1])


def test_a_run_whose_ranks_were_cut_the_other_way_is_not_gone_on_with(bench, tmp_path):
    bench.energy, bench.plain = 0.8, True
    output = Output(tmp_path / "ann_lora")
    optimise_over_seeds(bench.problem("ann"), bench.methods("lora"), output, searching=OPTIONS)
    kept = json.loads((tmp_path / "ann_optimization.json").read_text())
    assert (kept["energy"], kept["weighed_by"]) == (0.8, None)
    optimise_over_seeds(bench.problem("ann"), bench.methods("lora"), output, searching=OPTIONS)
    bench.plain = False
    with pytest.raises(UserError, match="another configuration"):
        optimise_over_seeds(bench.problem("ann"), bench.methods("lora"), output, searching=OPTIONS)


def test_a_mix_of_cut_differences_is_read_back_as_it_was_cut(bench, tmp_path):
    for plain in (True, False):
        bench.energy, bench.plain = 0.8, plain
        methods = bench.methods("lora")
        folder = tmp_path / f"{plain}"
        optimise_over_seeds(
            bench.problem("ann"), methods, Output(folder / "ann_lora"), searching=OPTIONS
        )
        place = folder / "ann_optimization.json"
        read = Optimized.load(place, bench.trait_folder)
        speaker = read.speaker(bench.chat_model, bench.generation)
        assert speaker.directions.inputs == methods[0].directions.inputs
    place.write_text(place.read_text().replace(read.weighed_by, "0" * 32))
    other = Optimized.load(place, bench.trait_folder)
    with pytest.raises(UserError, match="other prompts"):
        other.speaker(bench.chat_model, bench.generation)


def test_judges_of_search_and_report_are_fitted_on_different_conversations(bench):
    problem = bench.problem("ann")
    assert problem.search_judge.scale.own != problem.report_judge.scale.own
    assert (problem.search_judge.name, problem.report_judge.name) == ("embedding", "letters")
    bench.judging = JudgeOptions("letters")
    assert bench.problem("ann").report_judge.name == "embedding"
    assert [check.fitted_on for check in problem.checks] == ["train", "test"]
    assert all(check.auc > 0.9 for check in problem.checks)


def test_an_endpoint_judges_both_parts_through_one_reader(bench, server):
    """The scripted endpoint says 4 to everything: 4 where the steered answer is B, 2 where A."""
    server.replies.extend(["4"] * 20)
    bench.judging = JudgeOptions(
        judge="openai", judge_model="gpt-4o-mini", judge_url=server.url, judge_mode="number"
    )
    bench.report_judge = "openai"
    problem = bench.problem("ann")
    exchanges = [Exchange(prompt, "So great!") for prompt in PROMPTS.held_out]
    verdicts = problem.report_judge.judge(exchanges, "persona_fit")
    assert {verdict.score for verdict in verdicts} <= {2.0, 4.0}
    assert len(server.bodies) == len(exchanges)
    sent = [body["messages"][0]["content"] for body in server.bodies]  # in any order
    assert all("So great!" in message for message in sent)
    for exchange in exchanges:
        assert any(
            exchange.question in message and bench.baselines[exchange.question] in message
            for message in sent
        )
    assert bench.dollars() > 0
    before = bench.dollars()
    server.replies.extend(["4"] * 20)
    problem.search_judge.judge([Exchange(PROMPTS.train[0], "Fine.")], "persona_fit")
    assert bench.dollars() > before  # one account for the search and the report
    assert problem.checks == ()


def test_embedded_and_endpoint_judges_are_averaged(bench, server):
    server.replies.extend(["3"] * 4)
    bench.judging = JudgeOptions(
        judge="embedding,openai", judge_model="x", judge_url=server.url, judge_mode="number"
    )
    problem = bench.problem("ann")
    (verdict,) = problem.search_judge.judge([Exchange("Hi there.", "Wow, great!")], "persona_fit")
    assert verdict.judge == "multi:embedding+openai:x:number"
    assert 3.0 < verdict.score < 4.2  # the endpoint's 3, and an embedded fit near 5


def test_a_judge_of_another_family_reports_and_the_searching_one_stands_beside(bench, monkeypatch):
    monkeypatch.setattr(
        "persona_lora.studies.personas.bench.likelihood_contrast",
        lambda *_: lambda exchanges: [each.answer.count("!") for each in exchanges],
    )
    bench.report_judge = "likelihood"
    problem = bench.problem("ann")  # who shouts, unlike bob
    assert [each.fitted_on for each in problem.checks] == ["train", "likelihood"]
    assert problem.checks[-1].auc == 1
    rows = problem.bounds
    assert {row["judge"] for row in rows} == {"likelihood"}
    assert all(1 <= row["searched_by"] <= 5 for row in rows)
    with pytest.raises(UserError, match="no likelier than others"):
        bench.problem("bob")
    with pytest.raises(UserError, match="'oracle'"):
        dataclasses.replace(bench, report_judge="oracle")


def test_scales_are_kept_and_measured_once(bench, tmp_path, monkeypatch):
    prompts = tmp_path / "datasets" / "ordinary" / "prompts.jsonl"
    prompts.parent.mkdir(parents=True)
    prompts.write_text('{"prompt": "Hello?"}\n{"prompt": "Why?"}\n')
    bench.datasets = tmp_path / "datasets"
    cache = tmp_path / "scales.json"
    (first,) = bench.methods("lora", cache=cache)
    monkeypatch.setattr(
        "persona_lora.studies.personas.bench.equal_effect_scales",
        lambda *_, **__: pytest.fail("measured again"),
    )
    assert bench.methods("lora", cache=cache)[0].scales == first.scales
    prompts.write_text('{"prompt": "Hello?"}\n{"prompt": "Who?"}\n')
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        bench.methods("lora", cache=cache)


def test_the_optimiser_class_takes_weights_in_order(bench, chat_model, personas, tmp_path):
    optimiser = CMAESPersonaOptimizer(
        "ann",
        model=chat_model,
        traits=TRAITS,
        trait_vector_dir=tmp_path / "own",
        persona_dir=personas,
        generation=GenerationOptions(max_new_tokens=6),
        eval_prompts=["Hi there.", "And how are you?"],
    )
    optimiser.bench.coherence = EvenCoherence()
    result = optimiser.optimize(2, 0.5, [0.5, -0.5], tmp_path / "out")
    assert result.search.evaluations > 0
    assert (tmp_path / "out" / "ann_best_weights.json").is_file()
    with pytest.raises(UserError, match="3 initial weights for 2 traits"):
        optimiser.optimize(1, 1.0, [1.0, 2.0, 3.0], tmp_path / "other")


def test_a_prompt_that_is_searched_on_is_not_reported_on(bench, chat_model, personas):
    with pytest.raises(UserError, match=r"'What now\?' is in train and in held_out"):
        CMAESPersonaOptimizer(
            "ann", model=chat_model, persona_dir=personas, eval_prompts=["Hi there.", "What now?"]
        )


def test_the_prompt_baseline_holds_profile_and_samples(personas):
    persona = load_persona("ann", personas)
    prompt = persona_system_prompt(persona)
    assert persona.read("persona_profile.txt").strip() in prompt
    assert all(sample in prompt for sample in persona.read("persona_samples.json"))


def test_missing_directions_and_prompts_are_named(tmp_path):
    with pytest.raises(UserError, match="train_style_traits"):
        load_directions("lora", Wanted(["calm"], tmp_path))
    with pytest.raises(UserError, match="mean_diff"):
        load_directions("mean-diff", Wanted(["calm"], tmp_path, (1,)))
    assert first_prompts(PROMPTS, 1).fresh == ("Any plans?", *PROMPTS.fresh)
    with pytest.raises(UserError, match="2 training prompts; 9"):
        first_prompts(PROMPTS, 9)


@pytest.mark.parametrize(
    ("model_layers", "expected"), [(30, (19, 20, 21)), (32, (20, 21, 22)), (2, (0, 1)), (1, (0,))]
)
def test_vectors_act_around_two_thirds_of_the_depth(model_layers, expected):
    assert default_layers(model_layers) == expected


TWO = """
import os, sys
from pathlib import Path
sys.path.insert(0, os.getcwd())
from persona_lora.core.personas import Coefficients
from persona_lora.steering.bank import bank_of_diffs
from persona_lora.studies.asking.run import GenerationOptions
from persona_lora.studies.personas.search import SearchOptions
from persona_lora.studies.report_page import write_report
from persona_lora.studies.personas.run import Method, PersonaProblem, optimise_persona
from persona_lora.models.processes import current_processes
from persona_lora.models.loading import load_chat_model
from persona_lora.core.personas import load_persona
from persona_lora.core.lora_diff import LoRADiff
from tests.scenes import EvenCoherence, FitJudge
from tests.studies.personas.test_run import OPTIONS, PROMPTS, even_relevance, letter_counts

own, personas, out, model = map(Path, sys.argv[1:5])
processes = current_processes(os.environ)
assert processes.count == int(sys.argv[5]), processes.count
problem = PersonaProblem(
    load_chat_model(str(model), device_map="cpu", allow_other_base=True),
    load_persona("ann", personas), PROMPTS,
    FitJudge(), FitJudge(), EvenCoherence(), even_relevance, letter_counts,
    GenerationOptions(max_new_tokens=6), processes,
)
diffs = {name: LoRADiff.load(own / name / "diff") for name in ("calm", "loud")}
method = Method("lora", bank_of_diffs(diffs), {"calm": 1.0, "loud": 0.5})
optimise_persona(problem, method, out / "run", searching=OPTIONS)
"""


def test_two_processes_find_what_one_finds(bench, personas, model_folder, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    root = Path(__file__).resolve().parents[3]
    for number in (1, 2):
        arguments = [script, tmp_path / "own", personas, tmp_path / str(number), model_folder]
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        # With --cpu one process would be started, whatever the number.
        config = "train_configs/accelerate/two_processes_cpu.yaml"
        setting = ["--config_file", config, "--num_processes", str(number)]
        done = subprocess.run(
            [*launch, *setting, *map(str, arguments), str(number)],
            env=environment,
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
    one, two = (
        {
            path.name: (tmp_path / str(number) / "run" / path.name).read_text()
            for path in (tmp_path / "1" / "run").glob("*.jsonl")
        }
        for number in (1, 2)
    )
    assert one == two
    assert one["generations.jsonl"]


def test_another_persona_that_cannot_be_read_is_named_and_left_out(bench, personas, caplog):
    whole = bench.problem("ann")
    broken = personas / "zoe" / "conversations.jsonl"
    broken.parent.mkdir()
    broken.write_text('{"id": 1\n')
    problem = bench.problem("ann")
    assert f"{broken}:1 is not valid JSON" in caplog.text
    assert "it is not among those that the judge tells apart" in caplog.text
    assert problem.judged_by == whole.judged_by
    with pytest.raises(UserError, match="jsonl:1 is not valid JSON"):
        bench.problem("zoe")
