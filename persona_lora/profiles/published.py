"""The files of published personas, which hold one person's side: that person is speaker A.

``raw_conversations.json`` with sessions, ``train_turns.json`` and ``test_turns.json`` (and those
selected from them), ``train_data.json`` and ``test_data.json``, ``persona_samples.json``, and the
examples in ``profile.json`` and ``persona_profile.json``. A flat ``raw_conversations.json`` is a
chat like any other. Knows these forms; refuses to know what becomes of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from persona_lora.core.errors import UserError
from persona_lora.core.personas import ConversationSplit
from persona_lora.profiles.session import Session

# What a folder may hold, the fullest first; pairs are training and held-out files.
PAIRS = (("train_turns.json", "test_turns.json"), ("train_data.json", "test_data.json"))
SINGLE = (
    *("raw_conversations.json", *(name for pair in PAIRS for name in pair)),
    *("persona_samples.json", "profile.json", "persona_profile.json"),
)


def files_of(folder: Path) -> list[tuple[Path, ConversationSplit | None]]:
    """Return the files of a persona's folder to read, and the split that each stands for."""
    own = folder / "conversations.jsonl"
    if own.is_file():
        return [(own, None)]
    for train, test in PAIRS:
        if (folder / train).is_file() and (folder / test).is_file():
            return [(folder / train, "train"), (folder / test, "test")]
    for name in SINGLE:
        if (folder / name).is_file():
            return [(folder / name, None)]
    raise UserError(
        f"{folder} holds no conversations; expected conversations.jsonl or one of "
        f"{', '.join(SINGLE)}"
    )


def sessions(row: dict[str, Any], where: str, number: int) -> Iterator[Session]:
    """``session_text`` is what the person says, a line an utterance.

    Splits count where both occur; a file of training sessions alone is split like any other.
    """
    each: dict[str, Any]
    found = [_table(each, where) for each in row["sessions"]]
    splits = [each.get("split") for each in found]
    both = all(split in splits for split in ("train", "test"))
    for place, each in enumerate(found, start=1):
        text = _text(each, "session_text", where)
        split = each.get("split") if both else None
        if split not in ("train", "test", None):
            raise UserError(f"{where}: split must be train or test, got {ascii(split)[:60]}")
        name = f"{row.get('persona_id', number)}-{each.get('session_idx', place)}"
        yield Session(name, _said(text.split("\n")), split)


def turns(row: dict[str, Any], where: str, number: int) -> Iterator[Session]:
    """One reply of the person a turn: ``input``, ``ground_truth``, or ``user``, ``assistant``."""
    by_session: dict[str, list[tuple[str, str]]] = {}
    for each in row["turns"]:
        turn = _table(each, where)
        keys = ("input", "ground_truth") if "ground_truth" in turn else ("user", "assistant")
        said_to, said = (_text(turn, key, where) for key in keys)
        by_session.setdefault(str(turn.get("session", 1)), []).extend([("B", said_to), ("A", said)])
    for name, spoken in by_session.items():
        yield Session(f"{row.get('persona_id', number)}-{name}", spoken)


def texts(row: dict[str, Any], where: str, number: int) -> Iterator[Session]:
    """``utterances`` or ``example_utterances``: what the person says, in a list."""
    listed = row["utterances"] if "utterances" in row else row["example_utterances"]
    yield Session(str(row.get("persona_id", number)), _said(listed))


def samples(row: dict[str, Any], where: str, number: int) -> Iterator[Session]:
    """``samples`` or ``example_responses``: several utterances, one a line, of each session."""
    listed = row["samples"] if "samples" in row else row["example_responses"]
    for place, sample in enumerate(listed, start=1):
        sample = _table(sample, where)
        session = sample.get("session", sample.get("session_idx", place))
        yield Session(
            f"{row.get('persona_id', number)}-{session}",
            _said(_text(sample, "text", where).split("\n")),
        )


def _said(lines: list[str]) -> list[tuple[str, str]]:
    return [("A", line) for line in lines if line.strip()]


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected objects, found a {type(value).__name__}")
    return value


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(row.get(key), str):
        raise UserError(f"{where}: {key!r} must be text, got {ascii(row.get(key))[:60]}")
    return str(row[key])
