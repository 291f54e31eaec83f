"""A protocol, written before; sweeps of several training seeds, held to it and read together."""

from __future__ import annotations

import dataclasses
import json

import pytest

from persona_lora.judges import choice
from tests.conftest import random_diff, tiny_llama
from tests.test_contents import LetterJudge

pytestmark = pytest.mark.usefixtures("no_drawing")
ASKED = "--trait cheer --datasets-dir datasets --model model --dtype float32 --max-new-tokens 3"
SWEEP = f"sweep {ASKED} --judge embedding --coefficients=-1,1 --output out"


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
    monkeypatch.setitem(choice.JUDGES, "embedding", lambda *_: LetterJudge())
    return tmp_path


def freeze(run, path, *words):
    family = ("--family=-1,+1",)
    status, said, error = run(
        *("preregister", "--command", "sweep", *family, "--output", path, *words)
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
