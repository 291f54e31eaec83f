"""Personas as folders, and coefficients by trait.

A persona is one speaker's side of several conversations; in them the persona is the ``user``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from persona_lora.core.chat import Conversation, Exchange, parse_messages
from persona_lora.core.content import digest_of, folder_digest
from persona_lora.core.errors import UserError, checked_name, nearest_names
from persona_lora.core.files import numbered_jsonl, read_json, read_text, write_json
from persona_lora.core.resources import resource_path, search_folders

LARGEST_COEFFICIENT = 4.0  # beyond this nothing answers
WEIGHTS = "_best_weights"  # how the file of a search's weights ends
MIX = "_mix"  # and that of the coefficients which they are
BUILT = ("final_judge_prompt.txt", "persona_profile.txt", "persona_samples.json")
ConversationSplit = Literal["train", "test"]


@dataclass(frozen=True)
class PersonaConversation:
    """One conversation with the persona as ``user``; "test" ones are never optimised on."""

    id: str
    split: ConversationSplit
    messages: Conversation

    @property
    def utterances(self) -> tuple[str, ...]:
        """What the persona says, in order."""
        return tuple(turn["content"] for turn in self.messages if turn["role"] == "user")


@dataclass(frozen=True)
class Persona:
    """A persona's folder and its conversations."""

    id: str
    folder: Path
    conversations: tuple[PersonaConversation, ...]

    def utterances(self, split: ConversationSplit) -> tuple[str, ...]:
        """Return what the persona says in the conversations of a split."""
        return tuple(
            utterance
            for conversation in self.conversations
            if conversation.split == split
            for utterance in conversation.utterances
        )

    def answers(self, split: ConversationSplit) -> list[Exchange]:
        """Return what the persona says in reply to a line, with that line as the question."""
        return [
            Exchange(line["content"], said["content"])
            for conversation in self.conversations
            if conversation.split == split
            for line, said in zip(conversation.messages, conversation.messages[1:], strict=False)
            if (line["role"], said["role"]) == ("assistant", "user")
        ]

    def content(self) -> str:
        """Return a digest of the conversations and of what was built from them."""
        return digest_of([conversation_rows(self.conversations), folder_digest(self.folder, BUILT)])

    def samples(self) -> list[str]:
        """Return what ``persona_samples.json`` shows of the persona: of ours, or as published."""
        value = self.read("persona_samples.json")
        listed = value.get("samples") if isinstance(value, dict) else value
        rows = listed if isinstance(listed, list) else []
        texts = [each.get("text") if isinstance(each, dict) else each for each in rows]
        lines = [line.strip() for each in texts for line in str(each).split("\n")]
        if not texts or not all(isinstance(each, str) for each in texts):
            raise UserError(
                f"{self.folder / 'persona_samples.json'} must hold a list of utterances, or "
                "samples with a text"
            )
        return [line for line in lines if line]

    def read(self, name: str) -> Any:
        """Return the contents of one of the folder's files; text for ``.txt``, else JSON."""
        path = self.folder / name
        if not path.is_file():
            raise UserError(
                f"{path} does not exist; make it with: persona-lora persona build --id {self.id}"
            )
        return read_text(path) if path.suffix == ".txt" else read_json(path)


@dataclass(frozen=True)
class Coefficients:
    """One number for each trait; traits are sorted, so that equal mixes are equal values."""

    traits: tuple[str, ...]
    values: tuple[float, ...]

    @classmethod
    def of(cls, coefficients: Mapping[str, float]) -> Coefficients:
        """Return coefficients from a mapping; UserError for a value that is no finite number."""
        traits = tuple(sorted(coefficients))
        for trait in traits:
            value = coefficients[trait]
            if not isinstance(value, Real) or not abs(value) <= sys.float_info.max:
                raise UserError(f"the coefficient of {trait} must be finite, got {value!r}")
        return cls(traits, tuple(float(coefficients[trait]) for trait in traits))

    @classmethod
    def read(cls, path: Path) -> Coefficients:
        """Read ``{"sycophancy": 1.2, …}``."""
        value = read_json(path)
        if not isinstance(value, dict):
            raise UserError(f'{path} must hold coefficients, as in {{"formality": 1.2}}')
        return cls.of(value)

    def bounded(self) -> Coefficients:
        """Return the coefficients; UserError for one beyond ±LARGEST_COEFFICIENT."""
        for trait, value in zip(self.traits, self.values, strict=True):
            if abs(value) > LARGEST_COEFFICIENT:
                raise UserError(
                    f"{trait}: {value:g} is beyond ±{LARGEST_COEFFICIENT:g}; nothing answers there"
                )
        return self

    def as_dict(self) -> dict[str, float]:
        """Return the coefficients by trait."""
        return dict(zip(self.traits, self.values, strict=True))

    def write(self, path: Path) -> None:
        """Write the coefficients as JSON."""
        write_json(path, self.as_dict())


def saved_mixes(folder: Path) -> list[str]:
    """Return the names of the mixes in a folder, as they are there now: of coefficients.

    The weights of a search are none, being in units of the search.
    """
    paths = (path for path in folder.glob("*.json") if not path.stem.endswith(WEIGHTS))
    return sorted(path.stem for path in paths)


def list_personas(personas: Path | None = None) -> list[str]:
    """Return the ids of all personas, sorted: those of ``personas`` alone, if given."""
    roots = search_folders("personas", personas)
    return sorted({p.parent.name for root in roots for p in root.glob("*/conversations.jsonl")})


def load_persona(persona_id: str, personas: Path | None = None) -> Persona:
    """Load a persona by id; UserError for an unknown one, and for malformed conversations."""
    checked_name(persona_id, "a persona's id")
    roots = search_folders("personas", personas)
    paths = [root / persona_id / "conversations.jsonl" for root in roots]
    path = next((each for each in paths if each.is_file()), None)
    if path is None:
        if any((root / persona_id).is_dir() for root in roots):
            raise UserError(
                f"the persona {persona_id} has no conversations.jsonl yet; make it with: "
                f"persona-lora persona build --id {persona_id}"
            )
        nearest = nearest_names(persona_id, list_personas(personas))
        raise UserError(f"no persona {persona_id!r} in {' or '.join(map(str, roots))}; {nearest}")
    rows = read_conversations(path)
    if not any(row.utterances for row in rows):
        raise UserError(f"{path} holds no utterance of the persona (messages of the role user)")
    return Persona(persona_id, path.parent, rows)


def read_conversations(path: Path) -> tuple[PersonaConversation, ...]:
    """Read a ``conversations.jsonl``; UserError names a malformed row."""
    return tuple(_conversation(row, where) for where, row in numbered_jsonl(path))


@dataclass(frozen=True)
class PersonaPrompts:
    """What is said to a persona: ``train`` prompts to search on, ``held_out`` ones to report on.

    ``fresh`` are training prompts that the search leaves alone: what it finds is measured again on
    them before it is named best. UserError for a prompt that stands there twice.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    fresh: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for part in ("train", "fresh", "held_out"):
            for prompt in getattr(self, part):
                if prompt in seen:
                    raise UserError(
                        f"{prompt!r} is in {seen[prompt]} and in {part}; keep prompts that are "
                        "searched on, measured again on and reported on apart, and give each once"
                    )
                seen[prompt] = part


def load_persona_prompts(path: Path | None = None) -> PersonaPrompts:
    """Read ``prompts.json`` of the personas folder; UserError for a prompt that is there twice."""
    path = path if path is not None else resource_path(Path("personas/prompts.json"))
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a file with train and held_out prompts")
    value = read_json(path)
    parts = [_prompts(value, key, path) for key in ("train", "held_out")]
    try:
        return PersonaPrompts(*parts)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _prompts(value: Any, key: str, path: Path) -> tuple[str, ...]:
    part = value.get(key) if isinstance(value, dict) else None
    if not (isinstance(part, list) and part and all(isinstance(p, str) and p for p in part)):
        raise UserError(f'{path} must hold a list of prompts under "{key}"')
    return tuple(part)


def conversation_rows(conversations: Sequence[PersonaConversation]) -> list[dict[str, Any]]:
    """Return conversations as rows of ``conversations.jsonl``."""
    return [
        {"id": each.id, "split": each.split, "messages": each.messages} for each in conversations
    ]


def id_of(row: Mapping[str, Any], key: str, default: str | int, where: str) -> str:
    """Return what a file calls something, a text or a number; ``default`` where it does not say.

    Raises UserError, beginning with ``where``, for any other value.
    """
    value = row.get(key)
    value = default if value in (None, "") else value
    if not isinstance(value, str | int | float):
        raise UserError(f"{where}: {key!r} must be a text or a number, got {ascii(value)[:60]}")
    return str(value)


def _conversation(row: dict[str, Any], where: str) -> PersonaConversation:
    split = row.get("split", "train")
    if split not in ("train", "test"):
        raise UserError(f"{where}: split must be train or test, got {split!r}")
    return PersonaConversation(
        id_of(row, "id", where.rpartition("/")[2], where),
        split,
        parse_messages(row.get("messages"), where),
    )
