"""Conversations of one speaker from files of several forms.

Read are: our own (``conversations.jsonl``, ``raw_conversations.json``), plain chat JSONL, and the
file forms of ConvAI2 / PersonaChat, Multi-Session Chat, Conversation Chronicles, LaMP and
published personas. Whoever is chosen as the speaker becomes the ``user``, the other side the
``assistant``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from persona_lora.core.chat import Conversation, Message
from persona_lora.core.errors import UserError
from persona_lora.core.files import existing_file, read_json, read_jsonl, read_text
from persona_lora.core.personas import ConversationSplit, PersonaConversation, parse_messages
from persona_lora.profiles import published
from persona_lora.profiles.published import files_of
from persona_lora.profiles.session import Session

Speaker = Literal["A", "B"]
TEST_EVERY = 3  # where a file names no split, every third conversation is held out
LAMP_SESSION = 10  # texts
_SESSIONS = ("first", "second", "third", "fourth", "fifth")


def load_conversations(
    path: Path, *, speaker: Speaker = "A", episode: str | None = None
) -> list[PersonaConversation]:
    """Return the conversations of one speaker; A speaks first (or is the ``user``), B is the other.

    ``path`` is a file, or a persona's folder with files of a known name. ``episode`` picks the
    sessions whose id begins with it, where a file holds many people's. Where no split is named,
    every third conversation is held out, of two the second, and of one its last third.
    Raises UserError for a file of no known form, or without an utterance of the speaker.
    """
    path = Path(path)
    sessions = [each for each in _sessions(path) if each.turns]
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
    if len(sessions) == 1 and sessions[0].split is None:
        return _cut(conversations[0])
    return conversations


def _sessions(path: Path) -> Iterator[Session]:
    if not path.is_dir():
        yield from _read(existing_file(path))
        return
    for file, split in files_of(path):
        for session in _read(file):
            name = session.id if split is None else f"{session.id}-{split}"
            yield Session(name, session.turns, split or session.split)


def _read(path: Path) -> Iterator[Session]:
    if path.suffix == ".txt":
        yield from _convai2_text(path)
        return
    for number, row in enumerate(_rows(path), start=1):
        form = next((each for each in FORMS if each.matches(row)), None)
        if form is None:
            raise UserError(
                f"{path}: entry {number} is of no known form; expected messages, a dialog with "
                "previous_dialogs, utterances with history, first_session_dialogue, a profile, or "
                "what published personas hold (sessions, turns, utterances, samples)"
            )
        yield from form.sessions(row, f"{path}: entry {number}", number)


def _rows(path: Path) -> list[Any]:
    if path.suffix == ".jsonl":
        return list(read_jsonl(path))
    value = read_json(path)
    if not isinstance(value, list):
        return [value]
    if value and all(isinstance(each, str) for each in value):
        return [{"utterances": value}]  # persona_samples.json: what the person says
    if value and isinstance(value[0], dict) and "role" in value[0]:
        return [{"messages": value}]  # raw_conversations.json: one flat list of messages
    return value


def _messages(row: dict[str, Any], where: str, number: int) -> Iterator[Session]:
    names = {"user": "A", "assistant": "B"}
    turns = [
        (names[turn["role"]], turn["content"])
        for turn in parse_messages(row["messages"], where)
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
        if not isinstance(texts, list) or not isinstance(speakers, list):
            raise UserError(f"{where}: {name}_session_dialogue and its speakers must be lists")
        if len(speakers) != len(texts) or not all(isinstance(each, str) for each in speakers):
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
    earlier = row.get("previous_dialogs", [])
    if not isinstance(earlier, list) or not all(isinstance(each, dict) for each in earlier):
        raise UserError(f"{where}: previous_dialogs must be a list of objects with a dialog")
    sessions = [each.get("dialog", []) for each in earlier]
    for index, dialog in enumerate([*sessions, row["dialog"]], start=1):
        turns = []
        if not isinstance(dialog, list):
            raise UserError(f"{where}: a dialog must be a list of turns")
        for place, turn in enumerate(dialog):
            if not isinstance(turn, dict) or not isinstance(turn.get("text"), str):
                raise UserError(f"{where}: a turn of a dialog needs a text")
            who = str(turn.get("id", ""))
            turns.append((who[-1] if who[-1:] in ("1", "2") else "12"[place % 2], turn["text"]))
        yield Session(f"{episode}-{index}", [("A" if w == "1" else "B", t) for w, t in turns])


def _persona_chat(row: dict[str, Any], where: str, number: int) -> Iterator[Session]:
    """PersonaChat as JSON: the longest history, and its true reply (the last candidate)."""
    last = row["utterances"][-1] if row["utterances"] else {}
    history, candidates = last.get("history", []), last.get("candidates") or []
    if not isinstance(history, list) or not isinstance(candidates, list):
        raise UserError(f"{where}: history and candidates must be lists of text")
    history = [*history, *candidates[-1:]]
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
    for line in read_text(path).splitlines():
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
    """A file form: the key that tells it, what its list holds, and how its entries are read."""

    key: str
    sessions: Callable[[dict[str, Any], str, int], Iterator[Session]]
    of: type = object

    def matches(self, row: Any) -> bool:
        listed = row.get(self.key) if isinstance(row, dict) else None
        return isinstance(listed, list) and all(isinstance(each, self.of) for each in listed)


FORMS: Sequence[Form] = (
    Form("messages", _messages),
    Form("first_session_dialogue", _chronicles),
    Form("dialog", _multi_session),
    Form("utterances", published.texts, of=str),
    Form("utterances", _persona_chat, of=dict),
    Form("profile", _lamp),
    Form("sessions", published.sessions),
    Form("turns", published.turns),
    Form("samples", published.samples),
    Form("example_utterances", published.texts, of=str),
    Form("example_responses", published.samples),
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
    every = min(number, TEST_EVERY)
    return "test" if number > 1 and index % every == every - 1 else "train"


def _cut(conversation: PersonaConversation) -> list[PersonaConversation]:
    """Hold out the last third of the only conversation, where the person speaks three times."""
    places = [at for at, turn in enumerate(conversation.messages) if turn["role"] == "user"]
    held_out = len(places) // TEST_EVERY
    if not held_out:
        return [conversation]
    at = places[-held_out]
    at -= int(at > 0 and conversation.messages[at - 1]["role"] == "assistant")  # what is answered
    name, messages = conversation.id, conversation.messages
    return [
        PersonaConversation(f"{name}-begin", "train", messages[:at]),
        PersonaConversation(f"{name}-end", "test", messages[at:]),
    ]
