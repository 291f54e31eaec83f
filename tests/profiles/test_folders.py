"""A persona's files: made from training conversations alone, whole or absent."""

from __future__ import annotations

import json

import numpy as np
import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.personas import PersonaConversation, load_persona
from persona_lora.profiles.folders import build_persona, select_samples
from persona_lora.profiles.judge_prompt import PLACEHOLDERS, build_judge_prompt


def embed(texts):
    """Letter counts, normalised: enough to tell equal from different."""
    rows = np.array([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts], float)
    rows += 1e-3
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def talk(name, split, words):
    turns = []
    for word in words:
        turns.append({"role": "user", "content": f"I went to the {word} with my sister today"})
        turns.append({"role": "assistant", "content": f"And how was the {word}?"})
    return PersonaConversation(name, split, turns)


PLACES = [
    *("market", "harbour", "museum", "theatre", "garden"),
    *("castle", "bakery", "library", "station", "forest"),
]
TALKS = [talk("one", "train", PLACES), talk("two", "test", ["zoo", "jazzclub"])]


def test_six_files_are_written_from_training_conversations_alone(tmp_path):
    built = build_persona(tmp_path / "ann", TALKS, embed, num_samples=4)
    assert (built.num_train, built.num_test) == (10, 2)
    names = {path.name for path in built.folder.iterdir()}
    assert names == {
        *("conversations.jsonl", "raw_conversations.json", "persona_features.json"),
        *("persona_samples.json", "persona_profile.txt", "final_judge_prompt.txt"),
    }
    for path in built.folder.iterdir():
        assert ("zoo" in path.read_text()) == (path.name == "conversations.jsonl")
    raw = json.loads((built.folder / "raw_conversations.json").read_text())
    assert raw == TALKS[0].messages
    persona = load_persona("ann", tmp_path)
    assert persona.conversations == tuple(TALKS)
    assert len(persona.read("persona_samples.json")) == 4
    assert persona.read("persona_features.json")["num_utterances"] == 10
    prompt = persona.read("final_judge_prompt.txt")
    assert persona.read("persona_profile.txt").strip() in prompt
    assert all(prompt.count(each) == 1 for each in PLACEHOLDERS)


def test_building_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        build_persona(tmp_path / name, TALKS, embed)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_too_few_utterances_write_nothing(tmp_path):
    with pytest.raises(UserError, match="3 utterances of the persona; at least 5"):
        build_persona(tmp_path / "ann", [talk("one", "train", PLACES[:3])], embed)
    assert not (tmp_path / "ann").exists()


def test_samples_are_typical_first_and_then_different():
    texts = ["aaa aab aaa baa", "aaa aab aaa bba", "zzz zzy zzz yzz", "aaa aab aab bab", "no"]
    chosen = select_samples(texts, embed, number=2, typicality=0.5)
    assert len(chosen) == 2
    assert "zzz zzy zzz yzz" in chosen  # the most different from the first one chosen
    assert "no" not in select_samples(texts, embed, number=4)
    assert select_samples(texts, embed, number=9) == texts  # the short one only where needed
    assert select_samples([*texts, texts[0]], embed, number=9) == texts


def test_senseless_sampling_is_refused():
    with pytest.raises(UserError, match="at least 1"):
        select_samples(["a"], embed, number=0)
    with pytest.raises(UserError, match="no utterances"):
        select_samples([], embed)


def test_a_template_without_its_placeholders_is_refused():
    with pytest.raises(UserError, match=r"\{samples\} once"):
        build_judge_prompt("p", ["s"], template="{profile} {question} {answer_a} {answer_b}")
