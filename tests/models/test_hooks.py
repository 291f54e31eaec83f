"""One owner of hooks: they come off, they run, and one that is left behind does nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.hooks import Hook, Hooked
from persona_lora.steering.activations import ActivationSteerer, DirectionAblation
from persona_lora.steering.live import LiveLoRA

TOKENS = torch.arange(3, 9)[None]
VECTOR = SteeringVector({0: torch.ones(32), 1: torch.ones(32)}, BaseModel("tiny"), num_layers=2)


@pytest.mark.parametrize(
    "steerer_of",
    [
        lambda model, diff: ActivationSteerer(model, VECTOR),
        lambda model, diff: DirectionAblation(model, VECTOR),
        lambda model, diff: LiveLoRA(model, [diff.at(1)], [[1.0]]),
    ],
)
@torch.no_grad()
def test_a_hook_that_never_runs_is_an_error_in_the_first_pass(model, make_diff, steerer_of):
    steerer = steerer_of(model, make_diff(model))
    with steerer:
        model(TOKENS)
    with steerer, pytest.raises(UserError, match=r"did not run in a whole pass of this Llama"):
        model.config.num_hidden_layers = 1  # the second block is there, and is never called
        model.generate(TOKENS, max_new_tokens=2)
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_experts_that_nobody_chose_are_no_error(model, make_diff):
    """Of the modules of a diff some may rest; all of them may not."""
    with LiveLoRA(model, [make_diff(model)], [[1.0]]):
        model.config.num_hidden_layers = 1
        model(TOKENS)


@torch.no_grad()
def test_a_weight_that_is_read_without_a_call_is_an_error(model, make_diff, monkeypatch):
    """As in a projection of Jamba's: a merge changes it, a live LoRA would pass it by."""

    def read(mlp, states):
        gated = mlp.act_fn(mlp.gate_proj(states)) * mlp.up_proj(states)
        return functional.linear(gated, mlp.down_proj.weight)

    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", read)
    with (
        LiveLoRA(model, [make_diff(model)], [[1.0]]),
        pytest.raises(UserError, match=r"2 of the 14 modules .*down_proj"),
    ):
        model(TOKENS)


def test_a_hook_that_is_left_behind_does_nothing():
    module = nn.Linear(2, 2)
    inputs = torch.ones(1, 2)
    plain = module(inputs)
    hooks = Hooked([Hook(module, lambda *_: torch.zeros(1, 2), "it")])
    with hooks:
        assert not module(inputs).any()
        left = dict(module._forward_hooks)
    assert not module._forward_hooks
    module._forward_hooks.update(left)
    assert torch.equal(module(inputs), plain)


def test_what_a_hook_returns_takes_the_place_of_arguments_or_output():
    module = nn.Linear(2, 2)
    inputs = torch.ones(1, 2)
    twice = Hook(module, lambda _, args, keywords: ((2 * args[0],), keywords), "it", before=True)
    with Hooked([twice]):
        assert torch.equal(
            module(inputs), nn.functional.linear(2 * inputs, module.weight, module.bias)
        )
