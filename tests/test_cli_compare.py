"""The comparison from the command line: one page on behaviour, latency and both spaces."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from persona_lora.core.lora_diff import BaseModel, LoRADiff
from persona_lora.core.runs import Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.engines import remote
from persona_lora.judges import choice
from persona_lora.models.loading import load_chat_model
from persona_lora.models.structure import weight_fingerprint
from tests.engines.stand_in import StandIn, dies_after, served
from tests.scenes import LetterJudge, assert_fails

CHECKOUT = Path(__file__).resolve().parents[1]
TRAITS = ("evil", "sycophancy", "hallucination")


@pytest.fixture
def words(model, model_folder, make_diff, tmp_path):
    fingerprint = weight_fingerprint(model)
    for at, trait in enumerate(TRAITS):
        diff = make_diff(model, seed=at, scale=0.05, fingerprint=fingerprint)
        diff.save(tmp_path / "checkpoints" / trait / "diff")
        generator = torch.Generator().manual_seed(at)
        directions = {layer: torch.randn(32, generator=generator) for layer in range(2)}
        vector = SteeringVector(directions, BaseModel("tiny", fingerprint), 2, trait=trait)
        vector.save(
            tmp_path / "checkpoints" / "vectors" / trait / f"{trait}_response_avg.safetensors"
        )
    return (
        *("compare", "--trait", "evil", "--diff", "checkpoints/evil/diff", "--activation-vector"),
        *("checkpoints/vectors/evil/evil_response_avg.safetensors", "--layers", 1),
        *("--model", model_folder, "--dtype", "float32", "--max-questions", 2),
        *("--max-new-tokens", 4, "--coefficients", "1", "--datasets-dir", CHECKOUT / "datasets"),
    )


def test_one_page_holds_behaviour_latency_and_spaces(run, words, tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "make_judges", lambda *_: LetterJudge)
    more = ("--latency", "--batches", "1,2", "--rounds", 2, "--spaces", ",".join(TRAITS[1:]))
    status, out, error = run(*words, *more)
    assert status == 0, error
    assert "at equal divergence" in out
    bars = re.findall(r"^\s*(\w+(?: \w+)?) +━+ +\d+/\d+", error, re.MULTILINE)
    behaviour = ("calibration", "answering", "judging", "timing", "equal effect")
    spaces = ("shifts", "spectra", "cosines", "interference", "linearity", "words")
    assert bars == [*behaviour, *spaces]
    folder = tmp_path / "results" / "compare" / "evil"
    page = (folder / "report.html").read_text()
    assert "weights or activations?" in page
    assert any(said in page for said in ("as fast as the base", "not shown to be", "differs from"))
    assert "two spaces" in page
    assert page.count("data:image/png") == 3
    timings = [json.loads(line) for line in (folder / "latency" / "timings.jsonl").open()]
    assert len(timings) == 5 * 2 * 2
    before = (folder / "spaces" / "linearity.jsonl").stat().st_mtime_ns
    assert run(*words, *more)[0] == 0  # goes on where it stopped: nothing is left to do
    assert (folder / "spaces" / "linearity.jsonl").stat().st_mtime_ns == before
    kept = (folder / "latency" / "timings.jsonl").read_text().splitlines(keepends=True)
    (folder / "latency" / "timings.jsonl").write_text("".join(kept[:13]) + kept[13][:20])  # a kill
    (folder / "spaces" / "linearity.jsonl").unlink()
    assert run(*words, *more)[0] == 0
    again = (folder / "latency" / "timings.jsonl").read_text().splitlines(keepends=True)
    assert again[:10] == kept[:10]  # the first round is kept, the second measured again
    assert len(again) == len(kept)
    assert again[10:13] != kept[10:13]
    assert (folder / "spaces" / "linearity.jsonl").is_file()


def test_side_effects_stand_in_the_terminal_and_on_the_page(run, words, tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "make_judges", lambda *_: LetterJudge)
    more = ("--side-effects", "sycophancy,anxious,capability", "--task-limit", 2)
    status, out, error = run(*words, *more)
    assert status == 0, error
    for said in ("other traits", "went the wrong way", "sycophancy", "exact_match", "report:"):
        assert said in out
    folder = tmp_path / "results" / "compare" / "evil"
    assert "Evil: side effects" in (folder / "report.html").read_text()
    beside = folder / "side_effects"
    for name in ("anxious/verdicts.jsonl", "capability/items.jsonl", "side_effects.png"):
        assert (beside / name).is_file()
    assert json.loads((beside / "run.json").read_text())["config"]["judge"]["judge"] == "reader"
    header, *rows = (beside / "changes.csv").read_text().splitlines()
    assert header.startswith("group,measure,method,unsteered,value,low,high")
    assert len(rows) == 5 * (2 + 1 + 2 + 4)  # traits, coherence, wrong ways, measures of tasks


def test_two_traits_are_enough_for_the_spaces(run, words, tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "make_judges", lambda *_: LetterJudge)
    status, _, error = run(*words, "--spaces", "sycophancy")
    assert status == 0, error
    (agreed,) = (tmp_path / "results/compare/evil/spaces/agreement.jsonl").read_text().splitlines()
    assert json.loads(agreed) == {"rho": None, "p": None, "n": 1}


def test_spaces_are_compared_over_training_seeds(
    run, words, model, make_diff, tmp_path, monkeypatch
):
    monkeypatch.setattr(choice, "make_judges", lambda *_: LetterJudge)
    fingerprint, seeds = weight_fingerprint(model), tmp_path / "seeds"
    (tmp_path / "checkpoints" / "vectors").rename(seeds.parent / "vectors")
    for at, trait in enumerate(TRAITS):
        for seed in range(2):
            made = make_diff(model, seed=10 * at + seed, scale=0.05, fingerprint=fingerprint)
            sources = {"seed": seed, "training": {"training": {}}}
            replace(made, trait=trait, sources=sources).save(seeds / trait / f"seed{seed}" / "diff")
    (tmp_path / "vectors").rename(seeds / "vectors")
    options = [str(each).replace("checkpoints/vectors", "seeds/vectors") for each in words]
    more = ("--spaces", "sycophancy,hallucination", "--trait-vector-dir", "seeds")
    status, _, error = run(*options, *more)
    assert status == 0, error
    folder = tmp_path / "results/compare/evil"
    rows = [json.loads(line) for line in (folder / "spaces/seeds.jsonl").open()]
    assert len(rows) == 3 * 3
    both = [json.loads(line) for line in (folder / "spaces/linearity.jsonl").open()]
    asked = Counter((row["method"], row["seed"]) for row in both)
    assert asked == dict.fromkeys(
        (("weights", "seed0"), ("weights", "seed1"), ("activations", "")), 6
    )
    one, other = ([r["residual"] for r in both if r["seed"] == s] for s in ("seed0", "seed1"))
    assert one != other  # each seed's own diffs
    assert "each trained 2 times" in (folder / "report.html").read_text()
    (seeds / "evil" / "seed1").rename(tmp_path / "away")
    status, _, error = run(*options, *more, "--output", "other")
    assert (status, "different training seeds (evil seed0; sycophancy seed0, seed1)" in error) == (
        2,
        True,
    ), error
    assert not (tmp_path / "other").exists()


def test_a_trait_of_another_base_is_refused_before_the_comparison(
    run, words, model, make_diff, tmp_path
):
    foreign = make_diff(model, seed=1, fingerprint="0" * 32)
    foreign.save(tmp_path / "checkpoints" / "sycophancy" / "diff")
    status, _, error = run(*words, "--spaces", "sycophancy")
    assert (status, "--allow-other-base" in error) == (2, True), error
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--match", "median"), ("--match", "'median'")),
        (("--split", "evil"), ("--split", "'evil'")),
        (("--latency", "--batches", "many"), ("--batches", "'many'")),
        (("--spaces", "humour"), ("humour", "does not exist")),
        (("--layers", "7"), ("--layers", "0–1")),
        (("--side-effects", "humour"), ("humour",)),
        (("--side-effects", "sycophancy,evil"), ("--side-effects", "evil", "capability")),
        (("--task-limit", "2"), ("--task-limit", "--side-effects capability")),
    ],
)
def test_mistakes_are_one_line(run, words, more, said):
    at = words.index(more[0]) if more[0] in words else len(words)
    status, _, error = run(*words[:at], *more, *words[at + 2 :])
    assert status == 2
    assert all(word in error for word in said), error


def test_a_comparison_needs_a_strength(run, words):
    at = words.index("--coefficients") + 1
    status, _, error = run(*words[:at], "0", *words[at + 1 :])
    assert (status, "other than 0" in error) == (2, True), error


def test_an_engine_answers_for_the_weights_and_the_rest_is_answered_here(
    run, words, model_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(choice, "make_judges", lambda *_: LetterJudge)
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    more = ("--side-effects", "sycophancy", "--batch-size", 3)
    status, _, error = run(*words, *more, "--output", "here")
    assert status == 0, error
    server = StandIn(
        load_chat_model(str(model_folder), dtype="float32"),
        [LoRADiff.load("checkpoints/evil/diff")],
    )
    with served(server) as url:
        there = (*words, *more, "--output", "there", "--engine", url)
        server.failing = dies_after(3)
        assert_fails(run(*there), "no engine is left", "give the same command again")
        assert len(Run(tmp_path / "there/eval").read("answers")) == 3
        server.failing = lambda body: None
        status, _, error = run(*there)
    assert status == 0, error
    assert Run(tmp_path / "there").read("levels") == Run(tmp_path / "here").read("levels")
    for part in ("eval", "ood", "side_effects/sycophancy"):
        found = Run(tmp_path / "there" / part)
        assert found.read("answers") == Run(tmp_path / "here" / part).read("answers")
        assert found.record["config"]["engine"] == "vllm"
    # unsteered, three prompts and the diff, in two splits; then one prompt, of another trait
    assert Counter(server.rows) == {"tiny": 2 * 2 * 4 + 2 * 2, "mix:c0ffee:1.0": 2 * 2 + 2}
    assert_fails(run(*words, *more, "--output", "there"), "config.engine: 'vllm', now not set")


def test_an_engine_holds_the_diffs_of_all_training_seeds(
    run, words, model, model_folder, make_diff, tmp_path, monkeypatch
):
    monkeypatch.setattr(choice, "make_judges", lambda *_: LetterJudge)
    diffs = []
    for seed in range(2):
        made = make_diff(model, seed=seed, scale=0.05, fingerprint=weight_fingerprint(model))
        sources = {"seed": seed, "training": {"training": {}}}
        replace(made, trait="evil", sources=sources).save(tmp_path / f"seeds/seed{seed}/diff")
        diffs.append(LoRADiff.load(tmp_path / f"seeds/seed{seed}/diff"))
    words = ["seeds" if each == "checkpoints/evil/diff" else each for each in words]
    chat_model = load_chat_model(str(model_folder), dtype="float32")
    with served(StandIn(chat_model, diffs[:1])) as url:
        assert_fails(run(*words, "--engine", url), "does not hold the diffs", "engine command")
    server = StandIn(chat_model, diffs)
    with served(server) as url:
        status, _, error = run(*words, "--engine", url)
    assert status == 0, error
    assert set(server.rows) == {"tiny", "mix:c0ffee:1.0,0.0", "mix:c0ffee:0.0,1.0"}
