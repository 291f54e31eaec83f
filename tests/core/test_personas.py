"""Personas by id, their splits, and coefficients as sorted values."""

from __future__ import annotations

import json

import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.personas import (
    Coefficients,
    list_personas,
    load_persona,
    load_persona_prompts,
)


def write(root, rows, persona="ann"):
    (root / persona).mkdir(parents=True, exist_ok=True)
    path = root / persona / "conversations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def conversation(text, split="train"):
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "I see."}]
    return {"id": text, "split": split, "messages": turns}


def test_the_persona_is_the_user_and_splits_stay_apart(tmp_path):
    write(tmp_path, [conversation("one"), conversation("two", "test"), conversation("three")])
    persona = load_persona("ann", tmp_path)
    assert persona.utterances("train") == ("one", "three")
    assert persona.utterances("test") == ("two",)
    assert list_personas(tmp_path) == ["ann"]


@pytest.mark.parametrize(
    ("train", "held_out", "twice"),
    [
        (["One?", "Two?"], ["Three?", "One?"], "'One?' is in train and in held_out"),
        (["One?", "Two?", "One?"], ["Three?"], "'One?' is in train and in train"),
        (["One?"], ["Two?", "Three?", "Two?"], "'Two?' is in held_out and in held_out"),
    ],
)
def test_a_prompt_that_is_there_twice_is_refused(tmp_path, train, held_out, twice):
    """In a part of its own it would be an answer that counts twice, and repeats itself."""
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"train": train, "held_out": held_out}))
    with pytest.raises(UserError) as refused:
        load_persona_prompts(path)
    assert str(refused.value).startswith(f"{path}: {twice}")


def test_what_is_not_there_or_malformed_is_named(tmp_path):
    path = write(tmp_path, [conversation("one")])
    with pytest.raises(UserError, match="did you mean 'ann'"):
        load_persona("anm", tmp_path)
    with pytest.raises(UserError, match="persona build --id ann"):
        load_persona("ann", tmp_path).read("persona_features.json")
    write(tmp_path, [conversation("one", "dev")])
    with pytest.raises(UserError, match=r"conversations\.jsonl:1: split must be train or test"):
        load_persona("ann", tmp_path)
    write(tmp_path, [{"messages": [{"role": "assistant", "content": "x"}]}])
    with pytest.raises(UserError, match="no utterance of the persona"):
        load_persona("ann", tmp_path)
    path.write_text(json.dumps({"messages": [{"role": "robot", "content": "x"}]}) + "\n")
    with pytest.raises(UserError, match="needs a role"):
        load_persona("ann", tmp_path)


def test_coefficients_are_sorted_and_round_trip(tmp_path):
    mix = Coefficients.of({"warmth": 1, "evil": -0.5})
    assert mix.traits == ("evil", "warmth")
    assert mix == Coefficients.of({"evil": -0.5, "warmth": 1.0})
    mix.write(tmp_path / "mix.json")
    assert Coefficients.read(tmp_path / "mix.json") == mix
    assert json.loads((tmp_path / "mix.json").read_text()) == {"evil": -0.5, "warmth": 1.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None])
def test_a_coefficient_that_is_no_finite_number_is_named(value):
    with pytest.raises(UserError, match="coefficient of evil"):
        Coefficients.of({"evil": value})
