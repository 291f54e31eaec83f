"""Directions of equal effect: the scale found is the one at which the divergence is as asked."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from unittest import mock

import pytest
import scipy.stats
import torch

from persona_lora.core.chat import Exchange, Verdict
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.options import GenerationOptions
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.strength import Strengths
from persona_lora.projections.inputs import measure_inputs
from persona_lora.steering.bank import bank_of_diffs, bank_of_vectors
from persona_lora.studies.steering import calibration
from persona_lora.studies.steering.calibration import (
    Divergences,
    equal_effect_scales,
    highest_level,
    match_divergence,
    measure_strengths,
    strengths_of,
)
from persona_lora.studies.steering.divergence import ordinary_texts, own_answers, row_divergences

PROMPTS = ["Hello?", "Why?", "What then?"]


def vector(name, seed):
    generator = torch.Generator().manual_seed(seed)
    directions = {layer: torch.randn(32, generator=generator) for layer in range(2)}
    return SteeringVector(directions, BaseModel("tiny", None), 2, trait=name)


@pytest.fixture(params=["lora", "vectors"])
def directions(request, chat_model, make_diff):
    if request.param == "lora":
        return bank_of_diffs(
            {
                "a": make_diff(chat_model.model, seed=1, scale=0.02),
                "b": make_diff(chat_model.model, seed=2, scale=0.2),
            }
        )
    return bank_of_vectors({"a": vector("a", 1), "b": vector("b", 2) * 5.0}, (0, 1))


def test_every_direction_gets_the_same_effect(directions, chat_model):
    scales = equal_effect_scales(chat_model, directions, PROMPTS, effect=0.02)
    texts = ordinary_texts(chat_model, PROMPTS)
    for scale in scales:
        rows = [{scale.trait: scale.coefficient}, {scale.trait: -scale.coefficient}]
        effect = row_divergences(chat_model, directions, rows, texts).mean()
        assert float(effect) == pytest.approx(0.02, rel=0.15)
        assert float(effect) == pytest.approx(scale.kl)


def test_a_direction_ten_times_as_long_gets_a_tenth_of_the_coefficient(chat_model, make_diff):
    diff = make_diff(chat_model.model, seed=1, scale=0.05)
    both = bank_of_diffs({"short": diff, "long": diff * 10.0})
    scales = {
        each.trait: each.coefficient
        for each in equal_effect_scales(chat_model, both, PROMPTS, effect=0.02)
    }
    assert scales["short"] == pytest.approx(10 * scales["long"], rel=0.1)


def scales_on(curve, monkeypatch, **options):
    """Measure scales where KL at a coefficient is what a curve says."""

    def diverge(chat_model, bank, rows, texts):
        return torch.tensor([[curve(abs(*row.values()))] * 4 for row in rows], dtype=torch.float64)

    monkeypatch.setattr(calibration, "ordinary_texts", lambda *_: None)
    monkeypatch.setattr(calibration, "row_divergences", diverge)
    (scale,) = equal_effect_scales(None, SimpleNamespace(names=("d",)), PROMPTS, **options)
    return scale


@pytest.mark.parametrize(
    ("curve", "coefficient"),
    [
        (lambda c: (c / 1e5) ** 2, 1e5 * 0.03**0.5),
        (lambda c: min(5.0, (c / 3) ** 6), 3 * 0.03 ** (1 / 6)),  # steep, then as far as it goes
        (lambda c: c**0.5, 0.03**2),
    ],
)
def test_the_effect_is_reached_where_kl_is_no_parabola(curve, coefficient, monkeypatch):
    scale = scales_on(curve, monkeypatch)
    assert scale.kl == pytest.approx(0.03, rel=0.05)
    assert scale.kl == curve(scale.coefficient)
    assert scale.coefficient == pytest.approx(coefficient, rel=0.1)


def test_an_effect_that_is_out_of_reach_is_refused_and_not_missed(monkeypatch):
    with pytest.raises(
        UserError, match=r"no coefficient of d .* 0\.03 nats .* 0\.01: leave it out"
    ):
        scales_on(lambda c: min(0.01, c), monkeypatch)


def test_a_direction_without_effect_is_named(chat_model, make_diff):
    nothing = bank_of_diffs({"flat": make_diff(chat_model.model, seed=1) * 0.0})
    with pytest.raises(UserError, match="flat"):
        equal_effect_scales(chat_model, nothing, PROMPTS)


@pytest.mark.parametrize("coefficients", [(2.0, 1.0, 0.5), (0.5, 1.0, 2.0), (-2.0, 1.0)])
def test_the_highest_level_is_the_one_that_diverges_most(coefficients):
    def at(rows):
        return [torch.tensor([sum(row.values()) ** 2], dtype=torch.float64) for row in rows]

    levels = match_divergence(Divergences(at, ("lora", "activation")), coefficients)
    highest = {each.method: abs(each.coefficient) for each in highest_level(levels)}
    assert highest == pytest.approx({"lora": 2.0, "activation": 2.0}, rel=0.02)


def test_directions_need_a_direction_and_a_layer():
    with pytest.raises(UserError, match="at least one direction"):
        bank_of_diffs({})
    with pytest.raises(UserError, match="at least one layer"):
        bank_of_vectors({"a": vector("a", 1)}, ())
    with pytest.raises(UserError):
        bank_of_vectors({"a": vector("a", 1)}, (7,))


def test_nats_are_reached_and_do_not_depend_on_the_length_of_a_diff(chat_model, make_diff):
    diff = make_diff(chat_model.model, seed=1, scale=0.05)
    short, long = (
        Strengths("", "", "", tuple(measure_strengths(chat_model, each, PROMPTS)))
        for each in (diff, diff * 3.0)
    )
    texts = ordinary_texts(chat_model, PROMPTS)
    banks = [bank_of_diffs({"d": each}) for each in (diff, diff * 3.0)]
    said = [
        [
            [answer.text for answer in answers]
            for answers in own_answers(
                chat_model,
                bank,
                [{"d": found.coefficient(nats, "d")} for nats in (0.0, 0.3, -0.3)],
                PROMPTS,
            )
        ]
        for bank, found in zip(banks, (short, long), strict=True)
    ]
    assert said[0] == said[1]
    assert said[0][0] not in said[0][1:]
    for nats in (0.004, 0.02, -0.05, 0.1):
        coefficient = short.coefficient(nats, "d")
        assert coefficient == pytest.approx(3 * long.coefficient(nats, "d"), rel=1e-4)
        rows = row_divergences(chat_model, bank_of_diffs({"d": diff}), [{"d": coefficient}], texts)
        assert float(rows.mean()) == pytest.approx(abs(nats), rel=0.05)


def test_nats_have_an_interval_over_prompts(chat_model, make_diff):
    diff = make_diff(chat_model.model, seed=1, scale=0.05)
    points = measure_strengths(chat_model, diff, PROMPTS)
    texts = ordinary_texts(chat_model, PROMPTS)
    for point in points:
        (row,) = row_divergences(
            chat_model, bank_of_diffs({"d": diff}), [{"d": point.coefficient}], texts
        )
        parts = row.split([len(each.answer) for each in texts])
        # by the jackknife over prompts, of the same ratio
        left_out = [
            float(torch.cat([*parts[:at], *parts[at + 1 :]]).mean()) for at in range(len(parts))
        ]
        n, mean = len(parts), float(row.mean())
        error = ((n - 1) / n * sum((each - mean) ** 2 for each in left_out)) ** 0.5
        reach = scipy.stats.t.ppf(0.975, n - 1) * error
        assert point.low <= point.nats <= point.high
        assert point.high - point.nats >= 0.7 * reach
        assert point.high - point.low <= 4 * reach
    alone = measure_strengths(chat_model, diff, PROMPTS[:1])
    assert {(each.low, each.high) for each in alone} == {(None, None)}


class UnchangedIsCoherent:
    """Scores what the unsteered model says 80, and anything else as it is told."""

    def __init__(self, plain, other):
        self.plain, self.other = plain, other

    def judge(self, exchanges, name):
        scores = [80.0 if each in self.plain else self.other for each in exchanges]
        return [Verdict(name, score, "", name) for score in scores]


def test_the_coherent_range_is_where_answers_are_judged_coherent(chat_model, make_diff):
    diff = make_diff(chat_model.model, seed=1, scale=0.05)
    bank = bank_of_diffs({"d": diff})

    def answers(coefficient):
        row, options = {"d": coefficient}, GenerationOptions()
        (own,) = own_answers(chat_model, bank, [row], PROMPTS, options)
        return [Exchange(*each) for each in zip(PROMPTS, (a.text for a in own), strict=True)]

    plain = answers(0.0)
    judge = UnchangedIsCoherent(plain, 5.0)
    found = strengths_of(chat_model, diff, PROMPTS, judge, content="c")
    by_coefficient = {each.coefficient: each.coherence for each in found.points}
    assert (by_coefficient[0.0], found.floor) == (80.0, 50.0)
    for coefficient, coherence in by_coefficient.items():
        same = sum(each in plain for each in answers(coefficient))
        assert coherence == pytest.approx((80 * same + 5 * (3 - same)) / 3)
    low, high = found.coherent()
    assert min(by_coefficient) < low <= 0 <= high < max(by_coefficient)

    judge = UnchangedIsCoherent(plain, None)
    unscored = strengths_of(chat_model, diff, PROMPTS, judge, content="c")
    for each in unscored.points:  # of three answers, one without a score is more than a fifth
        same = sum(said in plain for said in answers(each.coefficient))
        assert each.coherence == (80.0 if same == len(plain) else None)
    assert unscored.coherent() == (low, high)


def test_the_weighted_norm_is_the_length_of_what_a_diff_adds(chat_model, make_diff, caplog):
    """The root of the sum over modules of mean ‖ΔW x‖² over the tokens that flow through them."""
    diff, judge = make_diff(chat_model.model, seed=1), UnchangedIsCoherent([], 50.0)

    def norm(direction):
        return strengths_of(chat_model, direction, PROMPTS, judge, content="c").weighted_norm

    inputs = measure_inputs(chat_model, PROMPTS)
    added = [
        (inputs.roots[name].double().T @ each.delta().double().T).square().sum()
        for name, each in diff.factors.items()
    ]
    assert norm(diff) == pytest.approx(float(sum(added)) ** 0.5, rel=1e-5)
    assert norm(diff * 3.0) == pytest.approx(3 * norm(diff))
    assert norm(vector("a", 1)) is None

    bare = dataclasses.replace(inputs, roots=dict(list(inputs.roots.items())[:1]))
    with mock.patch(f"{strengths_of.__module__}.kept_inputs", return_value=bare):
        assert norm(diff) is None
    assert "no weighted norm: what flows into model.layers.0" in caplog.text


def test_a_direction_of_no_length_has_no_strength(chat_model, make_diff):
    nothing = make_diff(chat_model.model, seed=1) * 0.0
    for each in (nothing, vector("a", 1) * 0.0):
        with pytest.raises(UserError, match="a length of 0: it does nothing"):
            measure_strengths(chat_model, each, PROMPTS)


def test_nats_of_a_vector_are_those_of_all_its_layers_together(chat_model):
    own = vector("a", 1)
    found = Strengths("", "", "", tuple(measure_strengths(chat_model, own, PROMPTS)))
    row = {"a": found.coefficient(0.02, "a")}
    bank, texts = bank_of_vectors({"a": own}, (0, 1)), ordinary_texts(chat_model, PROMPTS)
    assert float(row_divergences(chat_model, bank, [row], texts).mean()) == pytest.approx(
        0.02, rel=0.05
    )
