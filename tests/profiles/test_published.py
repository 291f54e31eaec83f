"""Published personas build from every form of their files, and a user's files stay."""

from __future__ import annotations

import json

import pytest

from persona_lora.core.errors import UserError, checked_name
from persona_lora.core.personas import load_persona
from persona_lora.profiles.conversations import load_conversations
from persona_lora.profiles.folders import build_persona
from persona_lora.profiles.judge_prompt import (
    DEFAULT_TEMPLATE,
    PLACEHOLDERS,
    build_judge_prompt,
    checked_judge_prompt,
)
from tests.profiles.test_folders import embed

SAID = [f"I carried the {thing} over to Nora's again." for thing in "abcdefghijkl"]
ASKED = [f"Did she want the {thing}?" for thing in "abcdefghijkl"]
WHO = {"persona_id": "episode-9_B"}
PAIRED = list(zip(ASKED, SAID, strict=True))
SESSIONS = [
    {"session_idx": 1, "speaker_role": "B", "session_text": " \n".join(SAID[:8]), "split": "train"},
    {"session_idx": 2, "speaker_role": "B", "session_text": "\n".join(SAID[8:]), "split": "test"},
]
FORMS = {
    "raw_conversations.json": [
        {"role": role, "content": text}
        for asked, said in PAIRED
        for role, text in (("assistant", asked), ("user", said))
    ],
    "sessions": {**WHO, "num_sessions": 2, "sessions": SESSIONS},
    "sessions of training": {
        **WHO,
        "sessions": [{**each, "split": "train"} for each in SESSIONS],
    },
    "one session": {
        **WHO,
        "sessions": [{"session_text": "\n".join(SAID), "split": "train", "speaker_role": "B"}],
    },
    "train_turns.json": {
        **WHO,
        "turns": [
            {"turn_id": 1, "session": "first", "context": "…", "input": a, "ground_truth": s}
            for a, s in PAIRED
        ],
    },
    "three sessions of turns": {
        **WHO,
        "turns": [
            {"session": str(at % 3), "context": "", "input": a, "ground_truth": s}
            for at, (a, s) in enumerate(PAIRED)
        ],
    },
    "persona specific": {
        **WHO,
        "split": "train",
        "turns": [{"user": a, "assistant": s, "context": ""} for a, s in PAIRED],
    },
    "train_data.json": {**WHO, "relationship": "Siblings", "utterances": SAID},
    "persona_samples.json": {**WHO, "samples": [{"session": 1, "text": "\n".join(SAID)}]},
    "list of samples": SAID,
    "profile.json": {**WHO, "traits": {"directness": 0.3}, "example_utterances": SAID},
    "persona_profile.json": {
        **WHO,
        "example_responses": [{"text": "\n".join(SAID), "session_idx": 0, "relationship": "x"}],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_training_and_held_out_utterances(tmp_path, form):
    (tmp_path / "x.json").write_text(json.dumps(FORMS[form]))
    read = load_conversations(tmp_path / "x.json")
    by_split = {
        split: [text for each in read if each.split == split for text in each.utterances]
        for split in ("train", "test")
    }
    assert sorted(by_split["train"] + by_split["test"]) == SAID
    assert len(by_split["train"]) == 8
    assert len({each.id for each in read}) == len(read)
    answers = [t["content"] for each in read for t in each.messages if t["role"] == "assistant"]
    assert sorted(answers) in ([], ASKED)
    if answers:  # what is held out begins with what is answered
        assert all(each.messages[0]["role"] == "assistant" for each in read)


def test_training_and_held_out_files_of_a_folder_go_together(tmp_path):
    for name, part in (("train", PAIRED[:7]), ("test", PAIRED[7:])):
        turns = [{"session": "1", "input": a, "ground_truth": s} for a, s in part]
        (tmp_path / f"{name}_turns.json").write_text(json.dumps({**WHO, "turns": turns}))
        # A fuller file is preferred.
        (tmp_path / f"{name}_data.json").write_text(json.dumps({"utterances": ["x"]}))
    read = load_conversations(tmp_path)
    assert [(each.split, len(each.utterances)) for each in read] == [("train", 7), ("test", 5)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "holds no conversation"),
        ({"sessions": []}, "holds no conversation"),
        ({"samples": []}, "holds no conversation"),
        ({"sessions": ["x"]}, "expected objects"),
        ({"sessions": [{"session_text": None}]}, "'session_text' must be text"),
        ({"turns": [{"input": "x"}]}, "'user' must be text"),
        ({"turns": [{"input": 1, "ground_truth": "x"}]}, "'input' must be text"),
        ({"samples": [{"text": ["x"]}]}, "'text' must be text"),
        ({"utterances": ["x", 1]}, "no known form"),
        ({"personality": {}}, "no known form"),
        ({"dialog": ["x"], "previous_dialogs": "y"}, "previous_dialogs must be a list"),
        ({"dialog": [{"text": 1}]}, "needs a text"),
        ({"first_session_dialogue": ["x"], "first_session_speakers": [[]]}, "name a speaker"),
        ({"utterances": [{"history": "x"}]}, "must be lists"),
    ],
)
def test_a_malformed_form_is_named(tmp_path, value, message):
    (tmp_path / "x.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=message):
        load_conversations(tmp_path / "x.json")


def test_a_folder_of_one_raw_file_builds_and_keeps_it(tmp_path):
    folder = tmp_path / "ann"
    folder.mkdir()
    raw = folder / "raw_conversations.json"
    raw.write_text(json.dumps(FORMS["sessions"]))
    before = raw.read_bytes()
    for overwrite in (True, False):
        build_persona(folder, load_conversations(folder), embed, overwrite=overwrite)
        assert raw.read_bytes() == before
    persona = load_persona("ann", tmp_path)
    assert len(persona.utterances("train")) == 8
    assert set(persona.samples()) <= set(SAID)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


MINE = '{"messages": [{"role": "user", "content": "mine"}]}\n'


@pytest.fixture
def ann(tmp_path):
    folder = tmp_path / "ann"
    folder.mkdir()
    (folder / "train_data.json").write_text(json.dumps(FORMS["train_data.json"]))
    return folder


def never(*_):
    raise AssertionError("the writer was paid before the check")


@pytest.mark.parametrize(
    "name", ["persona_profile.txt", "persona_samples.json", "final_judge_prompt.txt"]
)
def test_what_a_publisher_wrote_stays_beside_what_is_built(ann, name):
    (ann / name).write_text(MINE)
    built = build_persona(ann, load_conversations(ann), embed)
    assert built.kept == (() if name == "persona_profile.txt" else (name,))  # used as it is
    assert (ann / name).read_text() == MINE
    assert len(load_persona("ann", ann.parent).utterances("test")) == 4
    told = (ann / "final_judge_prompt.txt").read_text()
    assert ("mine" in told) == (name != "persona_samples.json")
    assert build_persona(ann, load_conversations(ann), embed, overwrite=True).kept == ()
    assert (ann / name).read_text() != MINE


@pytest.mark.parametrize("name", ["persona_profile.txt", "persona_features.json"])
def test_what_was_built_is_made_anew_only_when_asked(ann, name):
    build_persona(ann, load_conversations(ann), embed)
    (ann / name).write_text(MINE)
    before = {path.name: path.read_bytes() for path in ann.iterdir()}
    paid = {"write_profile": never} if name == "persona_profile.txt" else {}
    with pytest.raises(UserError, match=r"exists and would change; pass --overwrite"):
        build_persona(ann, load_conversations(ann), embed, **paid)
    assert {path.name: path.read_bytes() for path in ann.iterdir()} == before
    build_persona(ann, load_conversations(ann), embed, overwrite=True)
    assert (ann / name).read_text() != MINE


def test_conversations_of_a_user_are_not_overwritten(ann, tmp_path):
    (ann / "conversations.jsonl").write_text(MINE)
    with pytest.raises(UserError, match=r"conversations\.jsonl exists and would change"):
        build_persona(ann, load_conversations(ann / "train_data.json"), embed)
    assert (ann / "conversations.jsonl").read_text() == MINE


def test_samples_are_read_in_both_forms(tmp_path):
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "conversations.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "x"}]})
    )
    persona = load_persona("ann", tmp_path)
    for value in (SAID, FORMS["persona_samples.json"]):
        (persona.folder / "persona_samples.json").write_text(json.dumps(value))
        assert persona.samples() == SAID
    for value in ({}, [1], {"samples": [{"text": 1}]}, "x", []):
        (persona.folder / "persona_samples.json").write_text(json.dumps(value))
        with pytest.raises(UserError, match="list of utterances"):
            persona.samples()


def test_a_judge_prompt_has_its_places_and_no_other(tmp_path):
    ours = build_judge_prompt("Calm.", ["I said {smile} and {answer_b}."])
    assert checked_judge_prompt(ours, tmp_path) == ours
    assert all(ours.count(each) == 1 for each in PLACEHOLDERS)
    published = "Which fits? {prompt} A: {response_a} B: {response_b}"
    assert checked_judge_prompt(published, tmp_path) == (
        "Which fits? {question} A: {answer_a} B: {answer_b}"
    )
    for text, message in (
        (f"{published} for {{trait_name}}", "contains {trait_name}, which nothing fills in"),
        (published.replace("{prompt}", ""), "must contain {question} once"),
        (f"{published} {{question}}", "must contain {question} once"),
    ):
        with pytest.raises(UserError, match=message):
            checked_judge_prompt(text, tmp_path)
    with pytest.raises(UserError, match=r"contains \{trait\}"):
        build_judge_prompt("Calm.", ["x"], template=DEFAULT_TEMPLATE + "{trait}")


@pytest.mark.parametrize("name", ["ann", "episode-184019_A", "Zoë 2.1", "a+b@c", "影"])
def test_a_name_is_one_part_of_a_path(name):
    assert checked_name(name, "x") == name


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../../x", "a/b", "a\\b", "/etc", ".hidden", "-o", "a\nb", "a\0b"),
        *("x" * 101, " a", "~", None, 3, ["x"]),
    ],
)
def test_a_name_that_leads_elsewhere_is_refused(name):
    with pytest.raises(UserError, match="like a file's name"):
        checked_name(name, "a persona's id")
