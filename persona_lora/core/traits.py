"""Traits as folders: system-prompt pairs, questions, contrastive answers, labelled judge answers.

Positive always means: shows the trait that the folder is named after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from persona_lora.core.chat import Conversation, Message
from persona_lora.core.errors import UserError, nearest_names
from persona_lora.core.files import read_json, read_jsonl

Split = Literal["extract", "eval"]
LABELS = (0, 25, 50, 75, 100)


@dataclass(frozen=True)
class InstructionPair:
    """A system prompt that elicits the trait, and one that elicits its opposite."""

    pos: str
    neg: str


@dataclass(frozen=True)
class Trait:
    """A named trait, its system prompts, its questions by split, and the LLM judge's prompt.

    The schema is that of published persona-vector trait files, with both question sets in one
    file (Chen et al. 2025, arXiv:2507.21509).
    """

    name: str
    description: str
    instructions: tuple[InstructionPair, ...]
    questions: Mapping[str, tuple[str, ...]]
    eval_prompt: str
    folder: Path


@dataclass(frozen=True)
class ContrastivePair:
    """One user prompt with an answer that shows the trait and one that shows its opposite."""

    prompt: Conversation
    positive: Conversation
    negative: Conversation
    domain: str


@dataclass(frozen=True)
class LabelledAnswer:
    """A hand-labelled answer (0, 25, 50, 75 or 100) for validating a judge."""

    question: str
    answer: str
    label: int
    note: str


def default_datasets_folder() -> Path:
    """Return ``datasets/`` of the working folder, or of the checkout that holds this package."""
    local = Path("datasets")
    return local if local.is_dir() else Path(__file__).resolve().parents[2] / "datasets"


def list_traits(datasets: Path | None = None) -> list[str]:
    """Return the names of all trait folders, sorted."""
    root = datasets if datasets is not None else default_datasets_folder()
    return sorted(path.parent.name for path in root.glob("*/trait.json"))


def load_trait(name: str | Path, datasets: Path | None = None) -> Trait:
    """Load a trait by name from ``datasets``, or by the path of its folder.

    Raises UserError for an unknown name (with the nearest known ones) or a malformed file.
    """
    root = datasets if datasets is not None else default_datasets_folder()
    folder = Path(name) if (Path(name) / "trait.json").is_file() else root / name
    if not (folder / "trait.json").is_file():
        known = list_traits(root)
        raise UserError(f"no trait {str(name)!r} in {root}; {nearest_names(str(name), known)}")
    return _parse_trait(read_json(folder / "trait.json"), folder)


def load_pairs(trait: Trait) -> list[ContrastivePair]:
    """Load the contrastive training pairs of a trait from its ``train.jsonl``."""
    path = trait.folder / "train.jsonl"
    rows = read_jsonl(path)
    if not rows:
        raise UserError(f"{path} is empty; it needs rows with prompt, positive and negative")
    return [_parse_pair(row, f"{path}:{number}") for number, row in enumerate(rows, start=1)]


def load_labelled_answers(trait: Trait) -> list[LabelledAnswer]:
    """Load the hand-labelled answers of a trait from its ``judge_eval.jsonl``."""
    path = trait.folder / "judge_eval.jsonl"
    rows = read_jsonl(path)
    if not rows:
        raise UserError(f"{path} is empty; it needs rows with question, answer and label")
    return [_parse_labelled(row, f"{path}:{number}") for number, row in enumerate(rows, start=1)]


def _parse_trait(value: Any, folder: Path) -> Trait:
    path = folder / "trait.json"
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    for key in ("instruction", "questions", "eval_prompt"):
        if key not in value:
            raise UserError(f"{path} has no {key!r}; it needs instruction, questions, eval_prompt")
    questions = value["questions"]
    if not isinstance(questions, dict) or set(questions) != {"extract", "eval"}:
        raise UserError(f"{path}: questions must be an object with the lists extract and eval")
    eval_prompt = str(value["eval_prompt"])
    if "{question}" not in eval_prompt or "{answer}" not in eval_prompt:
        raise UserError(f"{path}: eval_prompt must contain {{question}} and {{answer}}")
    return Trait(
        name=str(value.get("name", folder.name)),
        description=str(value.get("description", "")),
        instructions=tuple(
            InstructionPair(_text(pair, "pos", path), _text(pair, "neg", path))
            for pair in value["instruction"]
        ),
        questions={
            split: tuple(_filled(question, path) for question in questions[split])
            for split in ("extract", "eval")
        },
        eval_prompt=eval_prompt,
        folder=folder,
    )


def _text(value: Any, key: str, where: Path | str) -> str:
    if not isinstance(value, dict) or key not in value:
        raise UserError(f"{where} has no {key!r}")
    return _filled(value[key], where)


def _filled(value: Any, where: Path | str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: expected a non-empty string, got {value!r}")
    return value


def _parse_pair(row: dict[str, Any], where: str) -> ContrastivePair:
    return ContrastivePair(
        prompt=_conversation(row, "prompt", where),
        positive=_conversation(row, "positive", where),
        negative=_conversation(row, "negative", where),
        domain=str(row.get("domain", "")),
    )


def _conversation(row: dict[str, Any], key: str, where: str) -> Conversation:
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where} has no {key!r}; expected a list of {{role, content}} messages")
    return [
        Message(role=_text(turn, "role", where), content=_text(turn, "content", where))
        for turn in turns
    ]


def _parse_labelled(row: dict[str, Any], where: str) -> LabelledAnswer:
    if row.get("label") not in LABELS:
        raise UserError(f"{where}: label must be one of {LABELS}, got {row.get('label')!r}")
    return LabelledAnswer(
        question=_text(row, "question", where),
        answer=_text(row, "answer", where),
        label=int(row["label"]),
        note=str(row.get("note", "")),
    )
