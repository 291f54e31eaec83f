"""Projections in one pass equal a ten-line loop over texts, layers and vectors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from persona_lora.core.chat import Exchange
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.likelihood import tokenize_exchange
from persona_lora.models.structure import decoder_layers
from persona_lora.projections.activation_space import project_hidden_states

POSITIONS = ("response_avg", "prompt_avg", "prompt_last")


def make_vector(seed):
    generator = torch.Generator().manual_seed(seed)
    directions = {layer: torch.randn(32, generator=generator) for layer in (0, 1)}
    return SteeringVector(directions, BaseModel("tiny"), num_layers=2)


@pytest.fixture
def texts(chat_model):
    pairs = [("Hello?", "Yes, hello."), ("Why is it so?", "So."), ("And?", "Nothing at all to say")]
    return [tokenize_exchange(chat_model, Exchange(*pair)) for pair in pairs]


@torch.no_grad()
def outputs_of_blocks(model, ids):
    states = []
    hooks = [
        block.register_forward_hook(lambda m, a, output: states.append(output[0]))
        for block in decoder_layers(model)
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return states


def naive(chat_model, texts, vectors, layers):
    """Every text, layer and vector on its own, with all hidden states kept."""
    result = torch.empty(len(texts), len(vectors), len(layers), len(POSITIONS))
    for row, (prompt, answer) in enumerate(texts):
        states = outputs_of_blocks(chat_model.model, torch.tensor([prompt + answer]))
        p = len(prompt)
        for at, layer in enumerate(layers):
            h = states[layer]
            means = (h[p:].mean(0), h[:p].mean(0), h[p - 1])
            for v, vector in enumerate(vectors.values()):
                direction = vector.directions[layer]
                for position, mean in enumerate(means):
                    result[row, v, at, position] = mean @ direction / direction.norm()
    return result


@pytest.mark.parametrize("layers", [[0, 1], [1], [1, 0]])
def test_one_pass_equals_a_naive_loop(chat_model, texts, layers):
    vectors = {"a": make_vector(1), "b": make_vector(2), "longer": make_vector(1) * 5.0}
    fast = project_hidden_states(chat_model, texts, vectors, layers, positions=POSITIONS)
    torch.testing.assert_close(
        fast, naive(chat_model, texts, vectors, layers), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(fast[:, 0], fast[:, 2])  # the length of a vector plays no part


def test_what_does_not_fit_is_named(chat_model, texts):
    vector = make_vector(1)
    wide = dataclasses.replace(vector, directions={0: torch.ones(8)})
    with pytest.raises(UserError, match=r"vector x is of a model with 2 layers of width 8"):
        project_hidden_states(chat_model, texts, {"x": wide}, [0])
    with pytest.raises(UserError, match="no layer 7"):
        project_hidden_states(chat_model, texts, {"x": vector}, [7])
    with pytest.raises(UserError, match="length 0 at layer 1"):
        project_hidden_states(chat_model, texts, {"x": vector * 0.0}, [1])
    with pytest.raises(UserError, match="at least one text"):
        project_hidden_states(chat_model, [], {"x": vector}, [0])
