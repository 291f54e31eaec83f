"""A protocol, written before; runs of several training seeds, held to it and read together."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil

import pytest

from persona_lora.core.chat import Verdict
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.judges import choice
from tests.conftest import random_diff, tiny_llama
from tests.test_contents import LetterJudge

pytestmark = pytest.mark.usefixtures("no_drawing")
ASKED = "--trait cheer --datasets-dir datasets --model model --dtype float32 --max-new-tokens 3"
SWEEP = f"sweep {ASKED} --judge embedding --coefficients=-1,1 --output out"
EVALUATE = f"evaluate {ASKED} --judge embedding --output out.csv"
COMPARE = (
    f"compare {ASKED} --judge local --coefficients 1 --second-judge embedding --split eval "
    "--calibrate-on prompts --activation-vector vector.safetensors --layers 1 --output out"
)


@pytest.fixture
def world(run, make_world, tmp_path, monkeypatch):
    make_world(tmp_path)
    for seed in range(3):
        diff = dataclasses.replace(
            random_diff(tiny_llama(), seed=seed),
            trait="cheer",
            sources={"training": {"trait": "cheer", "training": {"seed": seed}}, "seed": seed},
        )
        diff.save(tmp_path / f"trained/seed{seed}/diff")
    for name in ("embedding", "local"):
        monkeypatch.setitem(choice.JUDGES, name, lambda *_: LetterJudge())
    return tmp_path


def freeze(run, path, *words, command="sweep", family="-1,+1"):
    status, said, error = run(
        *(
            "preregister",
            "--command",
            command,
            *(["--family", family] if family else []),
            "--output",
            path,
            *words,
        )
    )
    assert status == 0, error
    return said


def test_seeds_are_swept_held_to_their_protocol_and_read_together(run, world):
    said = freeze(run, "p.yaml", "--questions", "eval=2", "--seeds", "3")
    digest = said.split("sha256 ")[1].strip()
    words = [*SWEEP.split(), "--diff", "trained", "--protocol", "p.yaml"]
    status, said, error = run(*words)
    assert status == 0, error
    assert said.startswith(f"Pre-registered (sha256 {digest[:12]}…), 3 seeds.")
    for seed in range(3):
        record = json.loads((world / f"out/seed{seed}/run.json").read_text())
        assert record["protocol"]["sha256"] == digest
        assert record["inputs"]["the seed of the diff"] == str(seed)
    rows = (world / "out/seeds.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:4]] == ["−1", "0", "'+1"]  # no formula
    assert "Over 3 training seeds" in (world / "out/report.html").read_text()
    assert run(*words)[:2] == (0, said)


@pytest.mark.parametrize(
    ("frozen", "said"),
    [
        (("--questions", "eval=20", "--seeds", "3"), "questions.eval: 20, now 2"),
        (("--questions", "eval=2"), "seeds: 1, now 3"),
        (
            ("--questions", "eval=2", "--seeds", "3", "--settings", '{"trait": "gloom"}'),
            "trait: 'gloom', now 'cheer'",
        ),
    ],
)
def test_a_sweep_that_does_otherwise_asks_nothing(run, world, frozen, said):
    freeze(run, "p.yaml", *frozen)
    status, _, error = run(*SWEEP.split(), "--diff", "trained", "--protocol", "p.yaml")
    assert status == 2
    assert said in error
    assert not list(world.glob("out/**/*.jsonl"))


def test_a_protocol_is_not_written_over(run, world):
    freeze(run, "p.yaml", "--questions", "eval=2")
    words = ("preregister", "--command", "sweep", "--questions", "eval=3", "--output", "p.yaml")
    status, _, error = run(*words)
    assert status == 2
    assert "a protocol is not changed" in error


def test_one_seed_is_exploratory_and_says_so(run, world):
    status, said, error = run(*SWEEP.split(), "--diff", "trained/seed1/diff")
    assert status == 0, error
    assert said.startswith("Exploratory, one seed.")
    assert "Exploratory, one seed." in (world / "out/report.html").read_text()


@pytest.mark.parametrize("words", [SWEEP, EVALUATE, COMPARE])
def test_a_single_seed_in_the_folder_of_seeds_is_one_run(run, world, words):
    for seed in (1, 2):
        shutil.rmtree(world / f"trained/seed{seed}")
    status, said, error = run(*words.split(), "--diff", "trained")
    assert status == 0, error
    assert said.startswith("Exploratory, one seed.")
    assert json.loads((world / "out/seed0/run.json").read_text())["status"] == "finished"
    if words == EVALUATE:
        assert [row["seed"] for row in csv.DictReader((world / "out.csv").open())] == ["seed0"] * 2


def test_evaluate_asks_every_seed_and_reads_them_together(run, world):
    family = {"command": "evaluate", "family": ""}
    freeze(run, "p.yaml", "--questions", "eval=2", "--seeds", "3", **family)
    status, said, error = run(*EVALUATE.split(), "--diff", "trained", "--protocol", "p.yaml")
    assert status == 0, error
    assert said.startswith("Pre-registered")
    assert "3 seeds." in said.splitlines()[0]
    assert "Over 3 seeds: +1: " in said
    assert "nothing" not in said  # no change was measured, so that none can have been clear
    rows = list(csv.DictReader((world / "out.csv").open()))
    assert [row["seed"] for row in rows] == [f"seed{seed}" for seed in range(3) for _ in range(2)]
    assert {row["question"] for row in rows} == {"Is my plan good?", "Why?"}
    (found,) = csv.DictReader((world / "out/seeds.csv").open())
    assert float(found["score"]) == pytest.approx(sum(float(row["cheer"]) for row in rows) / 6)
    assert (found["seeds"], found["questions"]) == ("3", "2")
    assert "Over 3 training seeds" in (world / "out/report.html").read_text()


def test_compare_matches_and_asks_every_seed_and_reads_them_together(run, world):
    family = {"command": "compare", "family": "eval: activation,eval: random_lora,eval: random"}
    freeze(run, "p.yaml", "--questions", "eval=2", "--seeds", "3", **family)
    words = [*COMPARE.split(), "--diff", "trained", "--protocol", "p.yaml"]
    status, said, error = run(*words)
    assert status == 0, error
    assert said.startswith("Pre-registered")
    assert "3 seeds." in said.splitlines()[0]
    found = {row["condition"]: row for row in csv.DictReader((world / "out/seeds.csv").open())}
    assert list(found) == [
        f"eval: {each}"
        for each in ("lora", "activation", "random_lora", "random", "activation beside random")
    ]
    one = [
        next(row for row in csv.DictReader(at.open()) if row["method"] == "activation")
        for at in sorted(world.glob("out/seed*/comparison.csv"))
    ]
    records = [json.loads(at.read_text()) for at in sorted(world.glob("out/seed*/run.json"))]
    drawn = [{each["seed"] for each in record["config"]["controls"]} for record in records]
    assert sum(map(len, drawn)) == len(set.union(*drawn)) >= 3  # no two have a control in common
    assert "the same random controls" not in said
    assert len({row["kl_mean"] for row in one}) == 3  # each brought to the divergence of its seed
    gap = sum(float(row["difference"]) for row in one) / 3
    second = [float(row["difference_second"]) for row in one]  # the same judge by another name
    assert second == pytest.approx([float(row["difference"]) for row in one])
    assert float(found["eval: activation"]["change"]) == pytest.approx(gap)
    assert float(found["eval: activation"]["p_holm"]) >= float(found["eval: activation"]["p"])
    assert run(*words)[:2] == (0, said)


NOT_TOGETHER = {
    "unlike": "seed1/diff differs in more than its seed (the training of the diff",
    "twice": "training seed of its own, got 0, 0, 2",
    "unfinished": "seed1 holds no diff; train that seed to its end",
}


@pytest.mark.parametrize("command", [SWEEP, EVALUATE, COMPARE], ids=lambda each: each.split()[0])
@pytest.mark.parametrize("fault", NOT_TOGETHER)
def test_seeds_that_cannot_be_read_together_are_not_asked(run, world, fault, command):
    at = world / "trained/seed1/diff"
    if fault == "unfinished":
        shutil.rmtree(at)
    else:
        told = json.loads((at / "diff.json").read_text())
        if fault == "twice":
            told["sources"]["seed"] = 0
        else:
            told["sources"]["training"]["training"]["learning_rate"] = 1.0
        (at / "diff.json").write_text(json.dumps(told))
    status, _, error = run(*command.split(), "--diff", "trained")
    assert (status, NOT_TOGETHER[fault] in error) == (2, True), error
    assert not list(world.glob("out*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"{EVALUATE} --diff diff,trained", "give one seed of it: trained/seed0/diff"),
        (f"{COMPARE} --diff trained --latency", "--latency is of one diff, and trained holds 3"),
        (f"{COMPARE} --diff trained --spaces cheer", "--spaces is of one diff"),
    ],
)
def test_what_is_of_one_diff_takes_no_seeds(run, world, words, said):
    status, _, error = run(*words.split())
    assert (status, said in error) == (2, True), error
    assert not list(world.glob("out*"))


class Senseless:
    def judge(self, exchanges, name):
        return [Verdict(name, 3.0, "", name) for _ in exchanges]


def test_nats_steer_as_the_coefficient_that_was_measured_for_them(run, world, monkeypatch, caplog):
    monkeypatch.setattr(choice, "sense_judge", lambda *_: Senseless())
    words = [*EVALUATE.split(), "--diff", "diff", "--coefficient", "0.05nat"]

    def refused(said, *given):
        status, _, error = run(*given)
        assert status == 2, error
        assert said in error

    refused("nats of diff were not measured", *words)
    measured = "calibrate --diff diff --model model --dtype float32 --num-prompts 3"
    status, said, error = run(*measured.split())
    assert status == 0, error
    assert "nats a token" in said
    assert "coherent from +0 to +0" in said
    assert (world / "diff.strength.png").is_file()
    status, _, error = run(*words)
    assert status == 0, error
    assert "diff is coherent from +0 to +0, as calibrate measured it, and no further" in caplog.text
    (found,) = json.loads((world / "out/run.json").read_text())["config"]["coefficients"]
    kept = json.loads((world / "diff.strength.json").read_text())["points"]
    under, over = (
        [each["coefficient"] for each in kept if each["coefficient"] > 0 and test(each["nats"])]
        for test in ((0.05).__gt__, (0.05).__le__)
    )
    assert max(under) < found < min(over)
    sweep = [*f"sweep {ASKED} --judge embedding --coefficients 0.05nat --output swept".split()]
    refused("--allow-other-base takes another", *sweep, "--diff", "diff", "--allow-other-base")
    refused("every training seed", *sweep, "--diff", "trained")
    status, _, error = run(*sweep, "--diff", "diff")
    assert status == 0, error
    assert json.loads((world / "swept/run.json").read_text())["config"]["nats"] == [[found, 0.05]]
    compare = COMPARE.replace("--coefficients 1", "--coefficients 0.05nat").split()
    compare[-1:] = ["compared", "--random-controls", "1"]
    refused("every training seed", *compare, "--diff", "trained")
    refused("--allow-other-base takes another", *compare, "--diff", "diff", "--allow-other-base")
    refused("that --adapter puts on", *words, "--adapter", "diff")
    refused("that --adapter puts on", *sweep, "--diff", "diff", "--adapter", "diff")
    for flag, value in {"--bound": "0.05nat", "--alpha": "1nat", "--fixed": "evil=1nat"}.items():
        refused(f"{flag} takes no nats", "optimize", "--persona-id", "x", flag, value)
    status, _, error = run(*compare, "--diff", "diff")
    assert status == 0, error
    first, *_ = (world / "compared/levels.jsonl").read_text().splitlines()
    assert json.loads(first)["coefficient"] == found
    refused("name a direction", "calibrate")
    (LoRADiff.load("diff") * 0.0).save(world / "flat")
    refused("flat has a length of 0", *measured.replace("--diff diff", "--diff flat").split())
    refused("--num-prompts must be at least 1", *measured.split()[:-1], "0")
    misspelt = [word.replace("nat", "nut") for word in sweep]
    refused("a number or nats as in 0.05nat", *misspelt, "--diff", "diff")
