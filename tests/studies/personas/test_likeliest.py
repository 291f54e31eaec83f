"""The likeliest mix against the merged model's own likelihoods, and on lines of a planted mix."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from persona_lora.core.chat import Exchange
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.lora_diff import mix as sum_of
from persona_lora.core.personas import Coefficients
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.likelihood import mean_logprobs, tokenize_exchange
from persona_lora.models.processes import Processes
from persona_lora.steering.bank import bank_of_diffs, bank_of_vectors
from persona_lora.steering.weights import LoRAMerger
from persona_lora.studies.personas import likeliest
from persona_lora.studies.personas.likeliest import (
    kept_mix,
    likeliest_mix,
    line_likelihoods,
    line_slopes,
)
from persona_lora.studies.personas.objective import Speaker

SCALES = {"calm": 1.0, "loud": 0.5}
QUESTIONS = ("Hi there.", "Any plans?", "What now?", "And then?", "Why?", "Who's there?")
LINES = [Exchange(question, f"line {at}") for at, question in enumerate(QUESTIONS)]


@pytest.fixture
def speaker(make_speaker):
    return make_speaker(SCALES, size=0.003, tokens=12)


def mix(calm=0.0, loud=0.0):
    return Coefficients.of({"calm": calm, "loud": loud})


def test_likelihoods_are_those_of_the_merged_model(speaker):
    mixes = [mix(), mix(calm=1.0), mix(calm=-0.5, loud=2.0)]
    found = line_likelihoods(speaker, mixes, LINES)
    for each, live in zip(mixes, found, strict=True):
        merger = LoRAMerger(speaker.chat_model.model)
        coefficients = speaker.coefficients(each)
        diffs = speaker.directions.diffs
        merger.merge_lora_diff(sum_of({diffs[at]: value for at, value in coefficients.items()}))
        assert np.mean(mean_logprobs(speaker.chat_model, LINES)) == pytest.approx(live, abs=1e-4)
        merger.restore_original_weights()


def test_slopes_are_those_of_the_gradient(speaker, monkeypatch):
    monkeypatch.setattr(likeliest, "STEP", 0.05)
    model, means = speaker.chat_model.model, []
    model.requires_grad_(True)
    for line in LINES:
        text = tokenize_exchange(speaker.chat_model, line)
        ids = torch.tensor([[*text.prompt, *text.answer]])
        told = model(ids).logits[0, len(text.prompt) - 1 : -1].log_softmax(dim=-1)
        means.append(told.gather(1, torch.tensor(text.answer)[:, None]).mean())
    torch.stack(means).mean().backward()
    weights = dict(model.named_parameters())
    for trait, found in zip(speaker.directions.names, line_slopes(speaker, LINES), strict=True):
        slope = sum(
            float((weights[f"{name}.weight"].grad * (each.B @ each.A)).sum())
            for name, each in speaker.directions.diffs[trait].factors.items()
        )
        coefficient = speaker.coefficients(Coefficients.of({trait: 1.0}))[trait]
        assert found == pytest.approx(coefficient * slope, rel=0.02)
    model.requires_grad_(False)
    model.zero_grad()


def test_lines_are_likelier_under_the_mix_and_diffs_turned_round_turn_it(speaker):
    found = likeliest_mix(speaker, LINES, 4.0)
    plain, better = line_likelihoods(speaker, [mix(), found], LINES)
    assert better > plain + 0.01
    turned = bank_of_diffs({at: each * -1.0 for at, each in speaker.directions.diffs.items()})
    other = likeliest_mix(dataclasses.replace(speaker, directions=turned), LINES, 4.0)
    assert other.values == pytest.approx([-each for each in found.values], abs=0.02)


def test_it_keeps_the_bound_and_stays_where_nothing_is_likelier(speaker, monkeypatch):
    found = likeliest_mix(speaker, LINES, 0.3)
    assert max(map(abs, found.values)) == pytest.approx(0.3, abs=0.005)

    def peaked(_, mixes, __):
        return np.array([0.1 * sum(each.values) - 10 * sum(each.values) ** 2 for each in mixes])

    monkeypatch.setattr(likeliest, "line_likelihoods", peaked)
    assert likeliest_mix(speaker, LINES, 4.0) == mix()


def test_it_is_read_once(speaker, tmp_path, monkeypatch):
    found = kept_mix(speaker, LINES, 4.0, tmp_path)
    other = kept_mix(speaker, LINES[:2], 4.0, tmp_path)
    monkeypatch.setattr(likeliest, "likeliest_mix", None)
    assert kept_mix(speaker, LINES, 4.0, tmp_path) == found
    assert kept_mix(speaker, LINES[:2], 4.0, tmp_path) == other
    with pytest.raises(TypeError):
        kept_mix(speaker, LINES, 3.0, tmp_path)


def test_without_lines_or_with_vectors_there_is_none(speaker):
    with pytest.raises(UserError, match="answers no line"):
        likeliest_mix(speaker, [], 4.0)
    vector = SteeringVector(
        {0: torch.ones(32)}, BaseModel("tiny", None), num_layers=2, trait="calm"
    )
    vectors = bank_of_vectors({"calm": vector}, (0,))
    told = Speaker(speaker.chat_model, vectors, {"calm": 1.0}, 1.0, speaker.options, Processes())
    with pytest.raises(UserError, match="differences alone"):
        likeliest_mix(told, [Exchange("Why?", "Because.")], 4.0)
