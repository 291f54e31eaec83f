"""Rows that users write, in every reader of them: what is no row is one line that says where.

Beside what each reader's own tests hold: faults that one reader refused and another took.
"""

from __future__ import annotations

import json

import pytest

from persona_lora.core import personas, traits
from persona_lora.core.errors import UserError
from persona_lora.judges.labels import AnswerFile, RatingSheet, load_ratings
from persona_lora.profiles.conversations import load_conversations
from persona_lora.projections.inputs import read_prompts
from persona_lora.studies.asking.capability import perplexity_items
from persona_lora.studies.steering.side_effects import load_refusal_prompts
from persona_lora.studies.vectors.text_projection import read_texts
from persona_lora.training import finetune

NO_TEXTS = (None, 5, ["a"], {"a": "b"})
BLANK = "   "
CHAT = {
    "finetune": ("x.jsonl", finetune.read_conversations),
    "personas": ("x.jsonl", personas.read_conversations),
    "profiles": ("x.jsonl", load_conversations),
    "texts": ("x.jsonl", read_texts),
    "traits": ("x.jsonl", traits.read_finetuning_rows),
    "perplexity": (
        "calm/normal.jsonl",
        lambda path: perplexity_items(None, path.parent.parent),
    ),
}
TRAIT = {
    "description": "calm",
    "instruction": [{"pos": "Be calm.", "neg": "Be wild."}],
    "questions": {"extract": ["Why?"], "eval": ["How?"]},
    "eval_prompt": "{question} {answer}",
    "surface_exception": {"counts": ["digits"], "reason": "numbers"},
}


def said(content, role="assistant"):
    return [{"role": role, "content": content}]


def row(**changes):
    """Return a row that every reader takes but for what ``changes`` put into it."""
    usual = {
        "prompt": said("Why?", "user"), "positive": said("Yes."), "negative": said("No."),
        "messages": said("Why?", "user") + said("So."),
        "question": "Why?", "answer": "So.", "label": 50, "kind": "decline",
    }  # fmt: skip
    return {**usual, **changes}


def write(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in rows))
    return path


@pytest.fixture
def calm(tmp_path):
    write(tmp_path / "calm" / "trait.json", TRAIT)
    return traits.load_trait("calm", tmp_path)


NO_CHATS = [
    {},
    {"conversations": [{"from": "human", "value": "x"}]},
    *({"messages": value} for value in (*NO_TEXTS, "x", [], [5], [said("x")])),
    *({"messages": said(value, "user") + said(value)} for value in NO_TEXTS),
    *({"messages": said("x", role) + said("y", role)} for role in ("human", None)),
]


@pytest.mark.parametrize("bad", NO_CHATS, ids=str)
@pytest.mark.parametrize("reader", CHAT)
def test_what_is_no_chat_is_refused_by_the_name_of_its_file(tmp_path, reader, bad):
    name, read = CHAT[reader]
    path = write(tmp_path / name, row(), bad)
    with pytest.raises(UserError, match=str(path)):
        read(path)


def readers_of_lines(trait, folder):
    """Return for each reader where it reads, what reads it, and a row that it refuses."""
    chats = {name: (*CHAT[name], {"messages": []}) for name in CHAT if name != "profiles"}
    answers = AnswerFile.read(write(folder / "answers.jsonl", row()))
    sheet = RatingSheet(answers, folder / "x.jsonl")
    return chats | {
        "pairs": ("calm/train.jsonl", lambda _: traits.load_pairs(trait), {}),
        "labelled": ("calm/judge_eval.jsonl", lambda _: traits.load_labelled_answers(trait), {}),
        "prompts": ("x.jsonl", read_prompts, {}),
        "refusal": ("refusal/prompts.jsonl", lambda _: load_refusal_prompts(folder), {}),
        "labels": ("calm/onpolicy.jsonl", lambda _: load_ratings(trait), {}),
        "sheet": ("x.jsonl", lambda _: sheet.ratings(), {}),
    }


GOOD = {
    "prompts": {"prompt": "Why?"},
    "refusal": {"prompt": "Why?", "kind": "decline"},
    "labels": {
        "question": "q", "answer": "a", "model": "m", "condition": "c", "part": "tuning",
        "trait": [1, 2], "sense": [3, 4],
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "reader", [*(each for each in CHAT if each != "profiles"), "pairs", "labelled", *GOOD, "sheet"]
)
def test_the_line_of_an_error_is_that_of_the_file(calm, tmp_path, reader):
    name, read, bad = readers_of_lines(calm, tmp_path)[reader]
    good = GOOD.get(reader, row())
    if reader == "sheet":
        RatingSheet(AnswerFile.read(tmp_path / "answers.jsonl"), tmp_path / "x.jsonl").add(0, 1, 2)
        good = json.loads((tmp_path / "x.jsonl").read_text())
    path = write(tmp_path / name, good, "", "  ", bad)
    with pytest.raises(UserError, match=rf"{path}:4\b"):
        read(path)


def test_a_second_rating_of_an_answer_names_both_lines(calm, tmp_path):
    write(tmp_path / "calm" / "onpolicy.jsonl", "", GOOD["labels"], "", "", GOOD["labels"])
    with pytest.raises(UserError, match=r"onpolicy\.jsonl:5 is the answer of line 2 again"):
        load_ratings(calm)


def in_trait(place):
    """Return a reader of a trait whose text at ``place``, keys and numbers, is another."""

    def read(value, calm):
        changed = json.loads(json.dumps(TRAIT))
        *path, last = place
        within = changed
        for each in path:
            within = within[each]
        within[last] = value
        write(calm.folder / "trait.json", changed)
        return traits.load_trait(calm.folder)

    return read


def in_row(name, key, read, good):
    def reading(value, calm):
        write(calm.folder / name, {**good, key: value})
        return read(calm)

    return reading


def in_conversations(make):
    def read(value, calm):
        return load_conversations(write(calm.folder / "x.json", make(value)))

    return read


def labelled(key):
    return in_row("judge_eval.jsonl", key, traits.load_labelled_answers, row())


TEXTS = {  # blank ones are refused too
    "pos": in_trait(("instruction", 0, "pos")),
    "neg": in_trait(("instruction", 0, "neg")),
    "question": in_trait(("questions", "eval", 0)),
    "eval_prompt": in_trait(("eval_prompt",)),
    "count": in_trait(("surface_exception", "counts", 0)),
    "reason": in_trait(("surface_exception", "reason")),
    "labelled question": labelled("question"),
    "labelled answer": labelled("answer"),
    "prompt": in_row("x.jsonl", "prompt", lambda calm: read_prompts(calm.folder / "x.jsonl"), {}),
    "prompt to refuse": in_row(
        "../refusal/prompts.jsonl",
        "prompt",
        lambda calm: load_refusal_prompts(calm.folder.parent),
        row(),
    ),
}
LINES = {  # a blank one is left out, as an empty message is
    "chronicles": in_conversations(
        lambda value: {
            "first_session_dialogue": ["a", value], "first_session_speakers": ["x", "y"]
        }
    ),
    "history": in_conversations(lambda value: {"utterances": [{"history": ["a", value]}]}),
    "candidates": in_conversations(
        lambda value: {"utterances": [{"history": ["a"], "candidates": ["no", value]}]}
    ),
    "dialog": in_conversations(lambda value: {"dialog": [{"text": "a"}, {"text": value}]}),
    "profile": in_conversations(lambda value: {"profile": [{"text": value}]}),
    "sessions": in_conversations(lambda value: {"sessions": [{"session_text": value}]}),
    "turns": in_conversations(lambda value: {"turns": [{"user": "a", "assistant": value}]}),
    "samples": in_conversations(lambda value: {"samples": [{"text": value}]}),
    "utterances": in_conversations(lambda value: {"utterances": ["a", value]}),
}  # fmt: skip
OPTIONAL = {
    "description": (in_trait(("description",)), lambda trait: trait.description),
    "domain": (
        in_row("train.jsonl", "domain", traits.load_pairs, row()),
        lambda pairs: pairs[0].domain,
    ),
    "note": (labelled("note"), lambda rows: rows[0].note),
}


@pytest.mark.parametrize("value", [*NO_TEXTS, BLANK], ids=str)
@pytest.mark.parametrize("key", [*TEXTS, *LINES])
def test_what_is_no_text_is_refused_and_never_becomes_a_word(calm, key, value):
    if key in TEXTS or value != BLANK:
        (calm.folder.parent / "refusal").mkdir()
        with pytest.raises(UserError):
            {**TEXTS, **LINES}[key](value, calm)


@pytest.mark.parametrize("key", OPTIONAL)
def test_a_text_that_may_be_missing_is_empty_then(calm, key):
    read, found = OPTIONAL[key]
    assert found(read(None, calm)) == ""
    assert found(read("sea", calm)) == "sea"
    for value in NO_TEXTS[1:]:
        with pytest.raises(UserError, match=f"{key} must be a text"):
            read(value, calm)


IDS = {
    "id": lambda value: row(id=value),
    "dataID": lambda value: {
        "dataID": value, "first_session_dialogue": ["a"], "first_session_speakers": ["x"]
    },
    "initial_data_id": lambda value: {
        "dialog": [{"text": "a"}], "metadata": {"initial_data_id": value}
    },
    "persona_id": lambda value: {"persona_id": value, "utterances": ["a"]},
}  # fmt: skip


@pytest.mark.parametrize("key", IDS)
def test_an_id_is_a_text_or_a_number_or_counted(tmp_path, key):
    def read(value):
        (first, *_) = load_conversations(write(tmp_path / "x.json", IDS[key](value)))
        return first.id.partition("-")[0]

    assert [read(value) for value in ("ann", 7, 0, None, "")] == ["ann", "7", "0", "1", "1"]
    for value in NO_TEXTS[2:]:
        with pytest.raises(UserError, match=f"'{key}' must be a text or a number"):
            read(value)


def test_a_row_of_a_persona_without_an_id_is_called_by_its_line(tmp_path):
    path = write(tmp_path / "x.jsonl", row(id=None), row(id=3))
    assert [each.id for each in personas.read_conversations(path)] == ["x.jsonl:1", "3"]
    with pytest.raises(UserError, match=r"x\.jsonl:1: 'id' must be a text or a number"):
        personas.read_conversations(write(path, row(id=["a"])))


def test_a_third_speaker_of_a_pair_is_named(tmp_path):
    def episode(*speakers):
        lines = {"first_session_dialogue": list("abc"), "first_session_speakers": list(speakers)}
        return write(tmp_path / "x.json", lines)

    (found, *_) = load_conversations(episode("Ann", "Bob", "Ann"))
    assert found.utterances == ("a", "c")
    with pytest.raises(UserError, match="'Cid' is a third speaker, beside Ann and Bob"):
        load_conversations(episode("Ann", "Bob", "Cid"))
