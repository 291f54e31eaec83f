"""Every file form gives the same kind of conversations, of the speaker that was asked for."""

from __future__ import annotations

import json

import pytest

from persona_lora.core.errors import UserError
from persona_lora.profiles.conversations import load_conversations

MESSAGES = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Nice day"},
]


def write(path, value):
    text = value if isinstance(value, str) else json.dumps(value)
    path.write_text(text)
    return path


@pytest.fixture
def forms(tmp_path):
    """One conversation, A: Hello there, B: Hi, A: Nice day, in every form."""
    chronicles = {
        "dataID": "episode-7",
        "relationship": "Neighbors",
        "first_session_dialogue": ["Hello there", "Hi", "Nice day"],
        "first_session_speakers": ["Neighbors A", "Neighbors B", "Neighbors A"],
    }
    chat = {
        "personas": [[], []],
        "previous_dialogs": [],
        "dialog": [
            {"text": "Hello there", "id": "Speaker 1"},
            {"text": "Hi", "id": "Speaker 2"},
            {"text": "Nice day", "id": "Speaker 1"},
        ],
    }
    utterances = [
        {"history": ["Hello there"], "candidates": ["No", "Hi"]},
        {"history": ["Hello there", "Hi"], "candidates": ["What?", "Nice day"]},
    ]
    text = "1 your persona: i like tea.\n2 Hello there\tHi\t\tNo|Hi\n3 Nice day\n"
    return {
        "ours": write(tmp_path / "ours.jsonl", {"id": "x", "split": "train", "messages": MESSAGES}),
        "raw": write(tmp_path / "raw_conversations.json", MESSAGES),
        "chat": write(tmp_path / "chat.jsonl", {"messages": MESSAGES}),
        "chronicles": write(tmp_path / "chronicles.jsonl", chronicles),
        "multi_session": write(tmp_path / "msc.jsonl", chat),
        "persona_chat": write(
            tmp_path / "pc.json", [{"personality": ["x"], "utterances": utterances}]
        ),
        "convai2": write(tmp_path / "convai2.txt", text),
    }


@pytest.mark.parametrize(
    "form", ["ours", "raw", "chat", "chronicles", "multi_session", "persona_chat", "convai2"]
)
def test_every_form_gives_both_speakers(forms, form):
    (as_a,) = load_conversations(forms[form])
    assert as_a.utterances == ("Hello there", "Nice day")
    assert [turn["role"] for turn in as_a.messages] == ["user", "assistant", "user"]
    (as_b,) = load_conversations(forms[form], speaker="B")
    assert as_b.utterances == ("Hi",)
    assert [turn["role"] for turn in as_b.messages] == ["assistant", "user", "assistant"]


def test_several_sessions_are_conversations_of_their_own(tmp_path):
    row = {"dataID": "episode-7"}
    for index, name in enumerate(("first", "second", "third")):
        row[f"{name}_session_dialogue"] = [f"a{index}", f"b{index}"]
        # The one who speaks first in the first session stays A, whoever opens a later one.
        order = ["Wife", "Husband"] if index else ["Husband", "Wife"]
        row[f"{name}_session_speakers"] = order
    path = write(tmp_path / "cc.jsonl", json.dumps(row) + "\n" + json.dumps({**row, "dataID": "e"}))
    read = load_conversations(path, episode="episode-7")
    assert [each.id for each in read] == ["episode-7-1", "episode-7-2", "episode-7-3"]
    assert [each.utterances for each in read] == [("a0",), ("b1",), ("b2",)]
    assert [each.split for each in read] == ["train", "train", "test"]
    assert len(load_conversations(path)) == 6


def test_samples_of_one_session_stay_together(tmp_path):
    samples = [{"session": at // 3, "text": f"line {at}"} for at in range(9)]
    path = write(tmp_path / "samples.jsonl", {"persona_id": "p", "samples": samples})
    read = load_conversations(path)
    assert [(each.id, len(each.utterances)) for each in read] == [
        ("p-0", 3),
        ("p-1", 3),
        ("p-2", 3),
    ]


def test_earlier_sessions_of_a_multi_session_chat_come_first(tmp_path):
    earlier = [{"text": "First"}, {"text": "Yes"}]
    later = [{"text": "Again", "id": "Speaker 1"}]
    row = {
        "previous_dialogs": [{"dialog": earlier}],
        "dialog": later,
        "metadata": {"initial_data_id": "train_3"},
    }
    read = load_conversations(write(tmp_path / "msc.jsonl", row))
    assert [each.id for each in read] == ["train_3-1", "train_3-2"]
    assert [each.utterances for each in read] == [("First",), ("Again",)]


def test_convai2_text_holds_many_conversations(tmp_path):
    text = "1 Hello\tHi\n2 Bye\tSo long\n1 Morning\tEvening\n"
    read = load_conversations(write(tmp_path / "c.txt", text))
    assert [each.utterances for each in read] == [("Hello", "Bye"), ("Morning",)]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a.jsonl", {"text": "x"}, "entry 1 is of no known form"),
        ("a.json", [[1]], "entry 1 is of no known form"),
        ("a.jsonl", {"messages": [{"role": "user"}]}, "needs a role"),
        ("a.jsonl", {"messages": MESSAGES, "split": "dev"}, "split must be train or test"),
        ("a.txt", "no numbers here\n", "no numbered lines"),
        ("a.jsonl", {"dialog": ["x"], "previous_dialogs": []}, "needs a text"),
        (
            "a.jsonl",
            {"first_session_dialogue": ["x"], "first_session_speakers": []},
            "must name a speaker",
        ),
        ("a.json", [], "holds no conversation"),
    ],
)
def test_malformed_files_are_named(tmp_path, name, value, message):
    with pytest.raises(UserError, match=message):
        load_conversations(write(tmp_path / name, value))


def test_an_absent_file_speaker_or_episode_is_named(forms, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_conversations(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="episode 'z'"):
        load_conversations(forms["chronicles"], episode="z")
    alone = write(tmp_path / "alone.jsonl", {"messages": MESSAGES[:1]})
    with pytest.raises(UserError, match="try the other speaker"):
        load_conversations(alone, speaker="B")
