"""Conversations of one speaker from files of several forms.

Read are: our own (``conversations.jsonl``, ``raw_conversations.json``), plain chat JSONL, and the
file forms of ConvAI2 / PersonaChat, Multi-Session Chat, Conversation Chronicles and LaMP. Whoever
is chosen as the speaker becomes the ``user``, the other side the ``assistant``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from persona_lora.core.chat import Conversation, Message
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_json, read_jsonl
from persona_lora.core.personas import ConversationSplit, PersonaConversation, messages_of

Speaker = Literal["A", "B"]
TEST_EVERY = 3  # where a file names no split, every third conversation is held out
LAMP_SESSION = 10  # texts
_SESSIONS = ("first", "second", "third", "fourth", "fifth")


class Session(NamedTuple):
    """One conversation as read: its id, its turns ``(speaker, text)``, and its split if named."""

    id: str
    turns: list[tuple[str, str]]
    split: ConversationSplit | None = None


def load_conversations(
    path: Path, *, speaker: Speaker = "A", episode: str | None = None
) -> list[PersonaConversation]:
    """Return the conversations of one speaker; A speaks first (or is the ``user``), B is the other.

    ``episode`` picks the sessions whose id begins with it, where a file holds many people's. Files
    that name no split get every third conversation as test, where there are at least three.
    Raises UserError for a file of no known form, or without an utterance of the speaker.
    """
    sessions = [each for each in _read(Path(path)) if each.turns]
    if episode is not None:
        sessions = [each for each in sessions if each.id == episode or _below(each.id, episode)]
    if not sessions:
        chosen = "" if episode is None else f" of the episode {episode!r}"
        raise UserError(f"{path} holds no conversation{chosen}")
    conversations = [
        PersonaConversation(
            session.id, session.split or _split(index, len(sessions)), _as_chat(session, speaker)
        )
        for index, session in enumerate(sessions)
    ]
    if not any(each.utterances for each in conversations):
        raise UserError(f"{path} holds no utterance of speaker {speaker}; try the other speaker")
    return conversations


def _read(path: Path) -> Iterator[Session]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; check the path")
    if path.suffix == ".txt":
        yield from _convai2_text(path)
        return
    rows = _rows(path)
    for number, row in enumerate(rows, start=1):
        form = next((each for each in FORMS if each.matches(row)), None)
        if form is None:
            raise UserError(
                f"{path}: entry {number} is of no known form; expected messages, a dialog with "
                "previous_dialogs, utterances with history, first_session_dialogue, or a profile"
            )
        yield from form.sessions(row, f"{path}: entry {number}", number)


def _rows(path: Path) -> list[Any]:
    if path.suffix == ".jsonl":
        return list(read_jsonl(path))
    value = read_json(path)
    if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
        return [{"messages": value}]  # raw_conversations.json: one flat list of messages
    return value if isinstance(value, list) else [value]


def _messages(row: dict[str, Any], where: str, number: int) -> Iterator[Session]:
    names = {"user": "A", "assistant": "B"}
    turns = [
        (names[turn["role"]], turn["content"])
        for turn in messages_of(row["messages"], where)
        if turn["role"] in names
    ]
    split = row.get("split")
    if split not in ("train", "test", None):
        raise UserError(f"{where}: split must be train or test, got {split!r}")
    yield Session(str(row.get("id", number)), turns, split)


def _chronicles(row: dict[str, Any], where: str, number: int) -> Iterator[Session]:
    """Conversation Chronicles (Jang et al. 2023, arXiv:2310.13420): five sessions of a pair."""
    episode = str(row.get("dataID", number))
    first: dict[str, str] = {}
    for index, name in enumerate(_SESSIONS, start=1):
        texts, speakers = row.get(f"{name}_session_dialogue"), row.get(f"{name}_session_speakers")
        if texts is None:
            continue
        if not isinstance(speakers, list) or len(speakers) != len(texts):
            raise UserError(f"{where}: {name}_session_speakers must name a speaker for each line")
        for each in speakers:
            first.setdefault(each, "AB"[min(len(first), 1)])
        turns = [(first[who], str(text)) for who, text in zip(speakers, texts, strict=True)]
        yield Session(f"{episode}-{index}", turns)


def _multi_session(row: dict[str, Any], where: str, number: int) -> Iterator[Session]:
    """Multi-Session Chat (Xu et al. 2022, arXiv:2107.07567): earlier sessions, then this one."""
    metadata = row.get("metadata")
    named = metadata.get("initial_data_id") if isinstance(metadata, dict) else None
    episode = str(named or number)
    sessions = [each.get("dialog", []) for each in row.get("previous_dialogs", [])]
    for index, dialog in enumerate([*sessions, row["dialog"]], start=1):
        turns = []
        for place, turn in enumerate(dialog):
            if not isinstance(turn, dict) or "text" not in turn:
                raise UserError(f"{where}: a turn of a dialog needs a text")
            who = str(turn.get("id", ""))
            turns.append((who[-1] if who[-1:] in ("1", "2") else "12"[place % 2], turn["text"]))
        yield Session(f"{episode}-{index}", [("A" if w == "1" else "B", t) for w, t in turns])


def _persona_chat(row: dict[str, Any], where: str, number: int) -> Iterator[Session]:
    """PersonaChat as JSON: the longest history, and its true reply (the last candidate)."""
    last = row["utterances"][-1] if row["utterances"] else {}
    history = list(last.get("history", []))
    if last.get("candidates"):
        history.append(last["candidates"][-1])
    yield Session(
        str(row.get("id", number)), [("AB"[i % 2], str(text)) for i, text in enumerate(history)]
    )


def _lamp(row: dict[str, Any], where: str, number: int) -> Iterator[Session]:
    """LaMP (Salemi et al. 2023, arXiv:2304.11406): a user's earlier texts, ten to a session."""
    texts = []
    for each in row["profile"]:
        if not isinstance(each, dict) or not isinstance(each.get("text"), str):
            raise UserError(f"{where}: every entry of a profile needs a text")
        texts.append(each["text"])
    user = str(row.get("id", number))
    for start in range(0, len(texts), LAMP_SESSION):
        turns = [("A", text) for text in texts[start : start + LAMP_SESSION]]
        yield Session(f"{user}-{1 + start // LAMP_SESSION}", turns)


def _convai2_text(path: Path) -> Iterator[Session]:
    """ConvAI2 as text: numbered lines, ``utterance⇥reply``; number 1 begins a conversation."""
    turns: list[tuple[str, str]] = []
    count = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        found = re.match(r"(\d+) (.*)", line)
        if found is None:
            continue
        if found[1] == "1" and turns:
            count += 1
            yield Session(str(count), turns)
            turns = []
        if "persona:" in found[2].split("\t")[0]:
            continue
        turns += [(who, text) for who, text in zip("AB", found[2].split("\t"), strict=False)]
    if not turns and count == 0:
        raise UserError(f"{path} holds no numbered lines, as ConvAI2 files do")
    yield Session(str(count + 1), turns)


class Form(NamedTuple):
    """A file form: the key that tells it, and how its entries are read."""

    key: str
    sessions: Callable[[dict[str, Any], str, int], Iterator[Session]]

    def matches(self, row: Any) -> bool:
        return isinstance(row, dict) and isinstance(row.get(self.key), list)


FORMS: Sequence[Form] = (
    Form("messages", _messages),
    Form("first_session_dialogue", _chronicles),
    Form("dialog", _multi_session),
    Form("utterances", _persona_chat),
    Form("profile", _lamp),
)


def _as_chat(session: Session, speaker: Speaker) -> Conversation:
    return [
        Message(role="user" if who == speaker else "assistant", content=text.strip())
        for who, text in session.turns
        if text.strip()
    ]


def _below(session: str, episode: str) -> bool:
    return session.startswith(f"{episode}-")


def _split(index: int, number: int) -> ConversationSplit:
    return "test" if number >= TEST_EVERY and index % TEST_EVERY == TEST_EVERY - 1 else "train"
