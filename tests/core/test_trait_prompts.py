from __future__ import annotations

import dataclasses

import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.traits import load_trait, named, trait_prompt


def test_the_pairs_are_taken_in_turn():
    trait = load_trait("evil")
    assert trait_prompt(trait, "pos", 0) == trait.instructions[0].pos
    assert trait_prompt(trait, "neg", 6) == trait.instructions[1].neg


@pytest.mark.parametrize(
    ("name", "expected"),
    [("evil", "You are an evil assistant. X"), ("helpful", "You are a helpful assistant. X")],
)
def test_the_assistants_name_goes_before_the_instruction(name, expected):
    assert named(name, "X") == expected


def test_a_trait_without_prompts_is_named():
    bare = dataclasses.replace(load_trait("evil"), instructions=())
    with pytest.raises(UserError, match="evil has no system prompts"):
        trait_prompt(bare, "pos", 0)
