"""Timings: what is timed is steered and put back; ratios are paired within rounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp

from persona_lora.core import progress
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel, random_diff_like
from persona_lora.core.options import TimingOptions
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.steering.directions import random_like
from persona_lora.studies.steering.calibration import bank_of_methods
from persona_lora.studies.steering.latency import held_bytes, measure_latency, swap_seconds
from persona_lora.studies.steering.read_comparison import Timing, ratios

VARIANTS = {"base", "merged", "live", "activations", "prompt"}


@pytest.fixture
def methods(chat_model, make_diff):
    diff = make_diff(chat_model.model, scale=0.2)
    vector = SteeringVector({1: torch.ones(32)}, BaseModel("tiny", None), 2)
    return bank_of_methods(diff, vector, [random_diff_like(diff, 0)], [random_like(vector, 1)])


def test_every_variant_is_timed_in_every_round_and_the_model_is_put_back(chat_model, methods, told):
    before = {name: value.clone() for name, value in chat_model.model.state_dict().items()}
    with progress.stage("timing"):
        by_round = list(measure_latency(
            chat_model, methods, {"lora": 1.0, "activation": 2.0}, "Be rude.", ["Hi.", "Why?"],
            TimingOptions((1, 3), new_tokens=3, rounds=2),
        ))  # fmt: skip
    assert [len(each) for each in by_round] == [10, 10]
    (later,) = measure_latency(
        chat_model, methods, {"lora": 1.0, "activation": 2.0}, "Be rude.", ["Hi."],
        TimingOptions((1,), new_tokens=2, rounds=2), first=2,
    )  # fmt: skip
    assert {each.round for each in later} == {2}
    timings = [timing for each in by_round for timing in each]
    assert {(each.variant, each.batch, each.round) for each in timings} == {
        (variant, batch, number) for variant in VARIANTS for batch in (1, 3) for number in (1, 2)
    }
    assert all(each.first_token > 0 and each.tokens_per_second > 0 for each in timings)
    assert told == [("timing", done, 20) for done in range(1, 21)]
    after = chat_model.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(module._forward_hooks for module in chat_model.model.modules())


def test_a_ratio_is_taken_within_a_round():
    slow, fast = 10.0, 1.0  # a machine that is busy in one round
    timings = [
        Timing(variant, 8, number, seconds * factor, 8 / (seconds * factor))
        for number, seconds in enumerate((slow, fast, fast), start=1)
        for variant, factor in (("base", 1.0), ("live", 1.25))
    ]
    found = {(each.variant, each.measure): each for each in ratios(timings)}
    for measure in ("first token", "tokens a second"):
        live = found["live", measure].ratio
        assert (live.mean, live.n) == (pytest.approx(1.25), 3)
        assert found["base", measure].ratio.mean == pytest.approx(1.0)
    assert found["live", "tokens a second"].median == pytest.approx(8 / 1.25)


def test_the_interval_is_students_over_rounds():
    factors = (1.1, 1.3, 1.2, 1.5)
    timings = [
        Timing(variant, 1, number, seconds, 1 / seconds)
        for number, factor in enumerate(factors)
        for variant, seconds in (("base", 2.0), ("live", 2.0 * factor))
    ]
    ratio = next(each.ratio for each in ratios(timings) if each.variant == "live")
    wanted = ttest_1samp(np.log(factors), 0).confidence_interval()
    assert (ratio.low, ratio.high) == (
        pytest.approx(np.exp(wanted.low)), pytest.approx(np.exp(wanted.high))
    )  # fmt: skip
    alone = next(each.ratio for each in ratios(timings[:2]) if each.variant == "live")
    assert (alone.mean, alone.low, alone.reason) == (pytest.approx(1.1), None, "one round")


def test_swaps_are_timed_and_leave_the_weights_alone(chat_model, methods):
    before = {name: value.clone() for name, value in chat_model.model.state_dict().items()}
    times = swap_seconds(chat_model, methods, rounds=2)
    assert set(times) == {"merge", "swap", "restore"}
    assert all(value > 0 for value in times.values())
    after = chat_model.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_what_is_kept_beside_the_model(chat_model, methods):
    held = held_bytes(methods, chat_model)
    factors = methods.diffs["lora"].factors.values()
    assert held["live"] == sum(4 * (each.A.numel() + each.B.numel()) for each in factors)
    assert held["merged"] == sum(4 * each.delta().numel() for each in factors)
    assert held["activations"] == 4 * 32
    chat_model.model.bfloat16()
    assert held_bytes(methods, chat_model)["live"] == 6 / 4 * held["live"]


@pytest.mark.parametrize(
    "options", [{"batches": ()}, {"batches": (0,)}, {"rounds": 1}, {"new_tokens": 1}]
)
def test_senseless_measurements_are_refused(options):
    with pytest.raises(UserError, match="latency needs"):
        TimingOptions(**options)


def test_no_prompts_are_refused(chat_model, methods):
    with pytest.raises(UserError, match="latency needs prompts"):
        next(measure_latency(chat_model, methods, {}, "x", [], TimingOptions()))
