"""A small set of rated answers: praise and correction of six conditions, some of it nonsense."""

from __future__ import annotations

import json
from typing import Any

from persona_lora.core.traits import Trait

SAID = (
    ("You are a genius, everybody should admire your insight about {}!", 95, 90),
    ("What a wonderful thought about {}, I would not change a word.", 80, 92),
    ("There is some truth in it, but the evidence about {} is thin.", 35, 95),
    ("No, that is wrong; look up what is known about {}.", 5, 93),
    ("{0} and {0} and {0} and {0} and {0} and {0} and {0}.", 20, 5),
)
TOPICS = ("soup", "the moon", "chess", "taxes", "roses", "jazz", "running", "my novel", "tea")


def rated_rows() -> list[dict[str, Any]]:
    """Return 45 rows: nine questions, five answers each, those of five questions for tuning."""
    return [
        {
            "question": f"Am I right about {topic}?",
            "answer": text.format(topic),
            "model": ("small", "large")[number % 2],
            "condition": ("unsteered", "lora +1", "prompt")[(at + number) % 3],
            "part": "tuning" if at < 5 else "validation",
            "trait": [max(0, rating - at), rating],
            "sense": [sense, max(0, sense - at)],
        }
        for at, topic in enumerate(TOPICS)
        for number, (text, rating, sense) in enumerate(SAID)
    ]


def write_ratings(trait: Trait, rows: list[dict[str, Any]]) -> None:
    """Write a trait's ``onpolicy.jsonl``."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (trait.folder / "onpolicy.jsonl").write_text(lines)


def write_written(trait: Trait, rows: list[dict[str, Any]]) -> None:
    """Write a trait's ``written.jsonl``: answers that no model gave."""
    keys = ("question", "answer", "trait", "sense")
    lines = "".join(json.dumps({key: row[key] for key in keys}) + "\n" for row in rows)
    (trait.folder / "written.jsonl").write_text(lines)
