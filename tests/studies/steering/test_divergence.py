"""How far steering moves the model: zero at zero, growing with it, equal to dense references."""

from __future__ import annotations

import pytest
import torch

from persona_lora.core.chat import Exchange, user_question
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.generation import generate_answers
from persona_lora.models.likelihood import tokenize_exchange
from persona_lora.models.structure import linear_modules
from persona_lora.projections.inputs import load_ordinary_prompts
from persona_lora.steering.activations import ActivationSteerer
from persona_lora.studies.steering import divergence
from persona_lora.studies.steering.divergence import (
    measure_divergences,
    relative_weight_norm,
)
from persona_lora.studies.steering.run import diff_population, vector_population

PROMPTS = ["Hello?", "Why?"]


@pytest.fixture
def vector():
    generator = torch.Generator().manual_seed(3)
    directions = {layer: torch.randn(32, generator=generator) for layer in (0, 1)}
    return SteeringVector(directions, BaseModel("tiny"), num_layers=2)


def divergences_of(chat_model, population):
    return measure_divergences(chat_model, population.bank, population.conditions, PROMPTS)


def test_divergences_are_zero_at_zero_and_grow_with_the_coefficient(chat_model, make_diff):
    diff = make_diff(chat_model.model)
    found = divergences_of(chat_model, diff_population(diff, (0.5, 2.0, -2.0)))
    low, zero, half, two = found
    assert [each.coefficient for each in found] == [-2.0, 0.0, 0.5, 2.0]
    assert zero.kl_mean == zero.kl_p95 == zero.relative_weight_norm == 0
    assert 0 < half.kl_mean < two.kl_mean
    assert two.relative_weight_norm == low.relative_weight_norm
    assert two.relative_weight_norm == pytest.approx(4 * half.relative_weight_norm)
    assert two.relative_state_norm is None


def test_the_relative_weight_norm_is_that_of_dense_matrices(chat_model, make_diff):
    diff = make_diff(chat_model.model)
    modules = linear_modules(chat_model.model)
    deltas = torch.cat([each.delta().flatten() for each in diff.factors.values()])
    weights = torch.cat([modules[name].weight.flatten() for name in diff.factors])
    expected = float(deltas.norm() / weights.norm())
    assert relative_weight_norm(chat_model, diff) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_the_divergence_of_a_vector_is_that_of_a_naive_loop(chat_model, vector, monkeypatch):
    monkeypatch.setattr(divergence, "ROWS_PER_PASS", 3)  # several passes for the conditions
    found = divergences_of(chat_model, vector_population(vector, (0, 1), (-1.0, 2.0)))
    assert len(found) == 4
    answers = generate_answers(chat_model, [user_question(p) for p in PROMPTS], max_new_tokens=40)
    for each in found:
        kl, norms = [], []
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            text = tokenize_exchange(chat_model, Exchange(prompt, answer.text))
            ids = torch.tensor([text.prompt + text.answer])
            start = len(text.prompt) - 1
            plain = chat_model.model(ids, output_hidden_states=True)
            steerer = ActivationSteerer(chat_model.model, vector, each.coefficient, each.layer)
            with steerer:
                steerer.select_positions(torch.arange(ids.shape[1])[None] >= start)
                steered = chat_model.model(ids).logits
            p, q = plain.logits[0, start:-1].log_softmax(-1), steered[0, start:-1].log_softmax(-1)
            kl += (p.exp() * (p - q)).sum(-1).tolist()
            if each.layer == 0:  # transformers' last hidden state is after the final norm
                norms += plain.hidden_states[1][0, start + 1 :].norm(dim=-1).tolist()
        assert each.kl_mean == pytest.approx(sum(kl) / len(kl), rel=1e-4)
        assert each.num_tokens == len(kl)
        if norms:
            length = float(vector.directions[0].norm()) * abs(each.coefficient)
            expected = length / (sum(norms) / len(norms))
            assert each.relative_state_norm == pytest.approx(expected, rel=1e-4)


def test_measuring_leaves_no_hook(chat_model, vector):
    divergences_of(chat_model, vector_population(vector, (1,), (1.0,)))
    assert not any(module._forward_hooks for module in chat_model.model.modules())


def test_ordinary_prompts_that_are_none_are_named(tmp_path):
    (tmp_path / "ordinary").mkdir()
    path = tmp_path / "ordinary" / "prompts.jsonl"
    path.write_text('{"question": "Hello?"}\n')
    with pytest.raises(UserError, match=r"prompts\.jsonl:1: prompt must be a text"):
        load_ordinary_prompts(tmp_path)
