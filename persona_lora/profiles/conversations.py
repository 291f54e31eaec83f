"""Conversations of one speaker from files of several forms.

Read are: our own (``conversations.jsonl``, ``raw_conversations.json``), plain chat JSONL, and the
file forms of ConvAI2 / PersonaChat, Multi-Session Chat, Conversation Chronicles, LaMP and
published personas. Whoever is chosen as the speaker becomes the ``user``, the other side the
``assistant``. The files of published personas hold one person's side: that person is speaker A."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from persona_lora.core.chat import Conversation, Message, parse_messages
from persona_lora.core.errors import UserError
from persona_lora.core.files import existing_file, read_json, read_jsonl, read_text
from persona_lora.core.personas import ConversationSplit, PersonaConversation, id_of


class Session(NamedTuple):
    """One conversation as read: its id, its turns ``(speaker, text)``, and its split if named."""

    id: str
    turns: list[tuple[str, str]]
    split: ConversationSplit | None = None


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


def _published_sessions(row: dict[str, Any], where: str, number: int) -> Iterator[Session]:
    """``session_text`` is what the person says, a line per utterance.

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
        names = id_of(row, "persona_id", number, where), id_of(each, "session_idx", place, where)
        yield Session("-".join(names), _said(text.split("\n")), split)


def _published_turns(row: dict[str, Any], where: str, number: int) -> Iterator[Session]:
    """One reply of the person a turn: ``input``, ``ground_truth``, or ``user``, ``assistant``."""
    by_session: dict[str, list[tuple[str, str]]] = {}
    for each in row["turns"]:
        turn = _table(each, where)
        keys = ("input", "ground_truth") if "ground_truth" in turn else ("user", "assistant")
        said_to, said = (_text(turn, key, where) for key in keys)
        session = id_of(turn, "session", 1, where)
        by_session.setdefault(session, []).extend([("B", said_to), ("A", said)])
    for name, spoken in by_session.items():
        yield Session(f"{id_of(row, 'persona_id', number, where)}-{name}", spoken)


def _published_texts(row: dict[str, Any], where: str, number: int) -> Iterator[Session]:
    """``utterances`` or ``example_utterances``: what the person says, in a list."""
    listed = row["utterances"] if "utterances" in row else row["example_utterances"]
    yield Session(id_of(row, "persona_id", number, where), _said(listed))


def _published_samples(row: dict[str, Any], where: str, number: int) -> Iterator[Session]:
    """``samples`` or ``example_responses``: several utterances, one a line, of each session."""
    listed = row["samples"] if "samples" in row else row["example_responses"]
    by_session: dict[str, list[tuple[str, str]]] = {}
    for place, each in enumerate(listed, start=1):
        sample = _table(each, where)
        session = id_of(sample, "session", sample.get("session_idx", place), where)
        by_session.setdefault(session, []).extend(_said(_text(sample, "text", where).split("\n")))
    for name, spoken in by_session.items():
        yield Session(f"{id_of(row, 'persona_id', number, where)}-{name}", spoken)


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


def _texts(values: list[Any], what: str) -> list[str]:
    for each in values:
        if not isinstance(each, str):
            raise UserError(f"{what} must be text, got {ascii(each)[:60]}")
    return values


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
        sessions = [each for each in sessions if f"{each.id}-".startswith(f"{episode}-")]
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
    yield Session(id_of(row, "id", number, where), turns, split)


def _chronicles(row: dict[str, Any], where: str, number: int) -> Iterator[Session]:
    """Conversation Chronicles (Jang et al. 2023, arXiv:2310.13420): five sessions of a pair."""
    episode = id_of(row, "dataID", number, where)
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
            if each not in first and len(first) == 2:
                raise UserError(
                    f"{where}: {each!r} is a third speaker, beside {' and '.join(first)}; leave "
                    "the episode out"
                )
            first.setdefault(each, "AB"[min(len(first), 1)])
        said = _texts(texts, f"{where}: every line of {name}_session_dialogue")
        turns = [(first[who], text) for who, text in zip(speakers, said, strict=True)]
        yield Session(f"{episode}-{index}", turns)


def _multi_session(row: dict[str, Any], where: str, number: int) -> Iterator[Session]:
    """Multi-Session Chat (Xu et al. 2022, arXiv:2107.07567): earlier sessions, then this one."""
    metadata = row.get("metadata")
    told = metadata if isinstance(metadata, dict) else {}
    episode = id_of(told, "initial_data_id", number, where)
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
    said = _texts([*history, *candidates[-1:]], f"{where}: history and candidates")
    turns = [("AB"[at % 2], text) for at, text in enumerate(said)]
    yield Session(id_of(row, "id", number, where), turns)


def _lamp(row: dict[str, Any], where: str, number: int) -> Iterator[Session]:
    """LaMP (Salemi et al. 2023, arXiv:2304.11406): a user's earlier texts, ten to a session."""
    texts = []
    for each in row["profile"]:
        if not isinstance(each, dict) or not isinstance(each.get("text"), str):
            raise UserError(f"{where}: every entry of a profile needs a text")
        texts.append(each["text"])
    user = id_of(row, "id", number, where)
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
    Form("utterances", _published_texts, of=str),
    Form("utterances", _persona_chat, of=dict),
    Form("profile", _lamp),
    Form("sessions", _published_sessions),
    Form("turns", _published_turns),
    Form("samples", _published_samples),
    Form("example_utterances", _published_texts, of=str),
    Form("example_responses", _published_samples),
)


def _as_chat(session: Session, speaker: Speaker) -> Conversation:
    return [
        Message(role="user" if who == speaker else "assistant", content=text.strip())
        for who, text in session.turns
        if text.strip()
    ]


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
