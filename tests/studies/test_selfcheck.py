"""Every instrument passes as it is, and its row fails once what it rests on is broken."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from persona_lora.core.chat import COHERENCE, Verdict
from persona_lora.core.traits import load_pairs, load_trait
from persona_lora.judges import choice
from persona_lora.judges.labels import load_ratings
from persona_lora.projections import weight_space
from persona_lora.report import resampling
from persona_lora.steering import directions
from persona_lora.steering.activations import ActivationSteerer, DirectionAblation
from persona_lora.steering.weights import LoRAMerger
from persona_lora.studies import selfcheck
from persona_lora.studies.drift import row_pulls
from persona_lora.studies.drift.read_diagnosis import Alarm
from persona_lora.studies.personas.search import CMAES
from persona_lora.studies.selfcheck import INSTRUMENTS, Bench, Found

PROMPTS = ["Is tea good?", "Why do birds sing?", "How tall is a house?"]


class Raters:
    """A judge that knows the ratings, and gives nonsense nothing."""

    name = "raters"

    def __init__(self, trait, change=lambda score: score):
        rated = {row.exchange: row.rating("trait") for row in load_ratings(trait)}
        self.score = lambda each: change(rated.get(each, 0.0))

    def judge(self, exchanges, criterion):
        return [Verdict(criterion, self.score(each), "", self.name) for each in exchanges]


class Sense:
    """A scorer that knows sensible answers, or likes all of them, or none."""

    def __init__(self, trait, broken=0.0, whole=90.0):
        self.rated = {row.exchange for row in load_ratings(trait)}
        self.broken, self.whole = broken, whole

    def verdicts(self, exchanges, judge_name):
        scores = [self.whole if each in self.rated else self.broken for each in exchanges]
        return [Verdict(COHERENCE, score, "", judge_name) for score in scores]


def judged_by(name, change):
    def patch(monkeypatch):
        made = lambda trait, *_: Raters(trait, change)  # noqa: E731
        monkeypatch.setitem(choice.JUDGES, name, made)

    return patch


def scored_by(**scores):
    def patch(monkeypatch):
        trait = load_trait("sycophancy")
        monkeypatch.setattr(selfcheck, "coherence_scorer", lambda *_: Sense(trait, **scores))

    return patch


def put(owner, name, value):
    return lambda monkeypatch: monkeypatch.setattr(owner, name, value)


def around(owner, name, change):
    """Break a function by what is done with its result."""
    real = getattr(owner, name)
    return put(owner, name, lambda *args, **named: change(real(*args, **named)))


def anything(*_, **__):
    return None


def noise(sums, at):
    return directions.Direction(torch.randn(sums.difference.shape[1]), None)


def common(sums, at):
    return directions.Direction(torch.ones(sums.difference.shape[1]), None)


def narrow(found):
    low, high = ((end + found.mean) / 2 for end in (found.low, found.high))
    return dataclasses.replace(found, low=low, high=high)


def moved(projection, cosine):
    return dataclasses.replace(projection, inner=cosine, p=0.0)


BREAKS = [
    ("merge and restore", put(LoRAMerger, "restore_original_weights", anything), "rejects"),
    ("merge and restore", put(LoRAMerger, "merge_lora_diff", anything), "finds"),
    (
        "live LoRA",
        put(selfcheck, "steer_live", lambda model, terms: selfcheck.steer_merged(
            model, {diff: -c for diff, c in terms.items()}
        )),
        "finds",
    ),
    (
        "calibrate",
        around(selfcheck, "equal_effect_scales", lambda found: [
            dataclasses.replace(each, coefficient=each.coefficient / 2) for each in found
        ]),
        "finds",
    ),
    ("calibrate", around(selfcheck, "_merged_nats", lambda _: 0.05), "rejects"),
    (
        "project weights: an adapter",
        around(weight_space._Stack, "inner", lambda found: tuple(reversed(found))),
        "finds",
    ),
    (
        "project weights: an adapter",
        around(weight_space, "_projection", lambda each: moved(each, each.inner)),
        "rejects",
    ),
    ("project weights: full weights", put(weight_space._BlockSums, "add", anything), "finds"),
    (
        "project weights: full weights",
        around(weight_space, "_projection", lambda each: moved(each, each.inner)),
        "rejects",
    ),
    ("diagnose", put(Alarm, "flagged", False), "finds"),
    ("diagnose", put(Alarm, "flagged", True), "rejects"),
    ("data screen", around(row_pulls, "_slopes", lambda pulls: -pulls), "finds"),
    ("data screen", put(selfcheck, "turned_diff", lambda diff, seed: diff * 2), "rejects"),
    ("extract", lambda patch: patch.setitem(directions.EXTRACTORS, "mean_diff", noise), "finds"),
    ("extract", lambda patch: patch.setitem(directions.EXTRACTORS, "mean_diff", common), "rejects"),
    ("activation steering", put(ActivationSteerer, "chosen", lambda *_: 0), "rejects"),
    (
        "activation steering",
        put(DirectionAblation, "change", lambda self, layer, hidden: torch.zeros_like(hidden)),
        "finds",
    ),
    *(
        (f"judge: {name}", judged_by(name, change), side)
        for name in ("reader", "sentences")
        for change, side in ((lambda score: 100 - score, "finds"), (lambda _: 80.0, "rejects"))
    ),
    ("coherence", scored_by(whole=10.0), "finds"),
    ("coherence", scored_by(broken=90.0), "rejects"),
    ("optimize", put(CMAES, "tell", anything), "finds"),
    (
        "optimize",
        around(selfcheck, "search", lambda found: dataclasses.replace(
            found, mean=type(found.mean)(found.mean.traits, (0.8, -0.5, 0.3))
        )),
        "rejects",
    ),
    ("intervals", around(selfcheck, "bootstrap_mean", narrow), "finds"),
    (
        "intervals",
        around(resampling, "bca_bounds", lambda _: resampling.Bounds(0.0, 100.0)),
        "rejects",
    ),
    ("paired tests", around(selfcheck, "sign_flip_ps", lambda p: p * 100), "finds"),
    ("paired tests", around(selfcheck, "sign_flip_ps", lambda p: p / 3), "rejects"),
]  # fmt: skip


def said(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def bench(chat_model, tmp_path, monkeypatch, no_drawing):
    for name in ("reader", "sentences"):  # the real ones are tried on the real model
        judged_by(name, lambda score: score)(monkeypatch)
    scored_by()(monkeypatch)
    pairs = [  # a model of random weights makes nothing of the trait's own
        dataclasses.replace(each, positive=said(f"Yes! {at}"), negative=said(f"zzz. {at}"))
        for at, each in enumerate(load_pairs(load_trait("sycophancy")))
    ]
    monkeypatch.setattr(selfcheck, "load_pairs", lambda _: pairs)
    return Bench(chat_model, load_trait("sycophancy"), PROMPTS, tmp_path)


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_an_instrument_finds_what_is_planted_and_rejects_what_is_shuffled(name, bench):
    found = INSTRUMENTS[name](bench)
    assert found.finds, found
    assert found.rejects, found


@pytest.mark.parametrize(("name", "broken", "side"), BREAKS)
def test_a_broken_instrument_fails(name, broken, side, bench, monkeypatch):
    broken(monkeypatch)
    found = selfcheck._tried(INSTRUMENTS[name], bench)
    assert isinstance(found, Found)
    assert not getattr(found, side), found


def test_every_instrument_is_broken_once():
    assert {name for name, _, _ in BREAKS} == INSTRUMENTS.keys()


def test_all_instruments_are_one_run(bench, tmp_path):
    run = selfcheck.selfcheck(bench.chat_model, bench.trait, PROMPTS, tmp_path / "out")
    assert selfcheck.failed_instruments(run) == []
    table = selfcheck.instruments_table(run)
    assert [row[0] for row in table.rows] == list(INSTRUMENTS)
    assert {row[-1] for row in table.rows} == {"passed"}


def test_the_command_ends_with_status_1_where_one_fails(run, bench, model_folder, monkeypatch):
    for name in INSTRUMENTS.keys() - {"optimize", "paired tests"}:
        monkeypatch.delitem(INSTRUMENTS, name)
    words = ("selfcheck", "--model", model_folder, "--dtype", "float32", "--output")
    status, out, error = run(*words, "whole")
    assert (status, "every instrument passed" in out) == (0, True), error

    def fails(bench):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setitem(INSTRUMENTS, "paired tests", fails)
    status, out, error = run(*words, "broken")
    assert status == 1, error
    (line,) = (each for each in out.splitlines() if each.strip().startswith("paired tests"))
    assert "ZeroDivisionError: by nothing" in line
    assert line.rstrip().endswith("FAILED")
    assert "FAILED: paired tests" in out


def test_screening_is_tried_in_fp32_and_leaves_the_model_as_it_was(bench):
    model = bench.chat_model.model.to(torch.bfloat16)
    found = INSTRUMENTS["data screen"](bench)
    assert (found.finds, found.rejects) == (True, True), found
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    assert not any(each.requires_grad for each in model.to(torch.float32).parameters())
    INSTRUMENTS["data screen"](bench)
    assert not any(each.requires_grad for each in model.parameters())
