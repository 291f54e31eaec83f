"""One conversation as it was read, whoever speaks in it."""

from __future__ import annotations

from typing import NamedTuple

from persona_lora.core.personas import ConversationSplit


class Session(NamedTuple):
    """One conversation as read: its id, its turns ``(speaker, text)``, and its split if named."""

    id: str
    turns: list[tuple[str, str]]
    split: ConversationSplit | None = None
