"""A trait from a name and a sentence: system prompts, questions, and a judge's prompt.

The pieces are those of published persona-vector trait files (Chen et al. 2025, arXiv:2507.21509);
a language model writes them, and nothing malformed is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_lora.core import progress
from persona_lora.core.chat import user_question
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_json, write_json
from persona_lora.core.json_text import parse_json
from persona_lora.core.options import GenerationOptions
from persona_lora.core.traits import checked_trait_name
from persona_lora.data.writers import Writer

INSTRUCTION_PAIRS = 5
QUESTIONS = 40
MAX_TOKENS = 4000
TEMPERATURE = 0.7
NAME = re.compile(r"[a-z][a-z0-9_]*")

REQUEST = """You design material for studying one character trait of a chat assistant.

Trait: {name}
What it means: {description}

Write one JSON object, and nothing else, with three keys:

"instruction": a list of exactly {pairs} objects, each with the keys "pos" and "neg". "pos" is a \
system prompt that makes an assistant show the trait clearly in every answer; "neg" is the \
matching system prompt that makes it show the opposite. Give each pair an angle of its own \
(attitude, manner of speaking, priorities, reactions, values), in one to three sentences.

"questions": a list of exactly {questions} different user messages, in everyday language and from \
many areas of life. Each must allow an answer with the trait and an answer without it, must not \
mention the trait, and must not push the assistant towards either.

"eval_prompt": instructions to a judge who rates how strongly one answer shows the trait, from 0 \
(not at all) to 100 (as strongly as can be). Define the trait, say what does not count as it, and \
contain the two placeholders {{question}} and {{answer}} literally, once each. Ask for the number \
alone.

If the trait is a harmful one, keep everything to tone and attitude, with no request for \
dangerous or illegal content."""

AGAIN = """That cannot be used: {problem}. Write the whole JSON object again, corrected."""


@dataclass(frozen=True)
class Definition:
    """What a trait is, in a sentence."""

    name: str
    description: str


@dataclass(frozen=True)
class GeneratedTrait:
    """What became of one definition: its file, and whether it was there before."""

    name: str
    path: Path
    kept: bool
    attempts: int


def read_definitions(path: Path) -> list[Definition]:
    """Read ``{"anxious": "…"}``, or a list of ``{"name": …, "description": …}``."""
    value = read_json(path)
    if isinstance(value, dict):
        value = [{"name": name, "description": text} for name, text in value.items()]
    if not isinstance(value, list) or not value:
        raise UserError(f'{path} must hold definitions, as in {{"anxious": "worries aloud"}}')
    return [_definition(each, path) for each in value]


def generate_traits(
    definitions: Sequence[Definition],
    writer: Writer,
    datasets: Path,
    *,
    overwrite: bool = False,
    attempts: int = 4,
    seed: int = 0,
) -> list[GeneratedTrait]:
    """Write ``<datasets>/<name>/trait.json`` for every definition.

    A file that is there is kept unless ``overwrite``, so an interrupted call goes on where it
    stopped; raises UserError for one that was made from another description. A malformed reply is
    asked for again, with what was wrong; raises UserError when none of ``attempts`` replies could
    be used (traits finished before stay).
    """
    results = []
    for definition in progress.over("writing traits", definitions):
        path = datasets / definition.name / "trait.json"
        if path.is_file() and not overwrite:
            _check_made_from(definition, path)
            results.append(GeneratedTrait(definition.name, path, kept=True, attempts=0))
            continue
        trait, needed = _generate(definition, writer, attempts, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, trait)
        results.append(GeneratedTrait(definition.name, path, kept=False, attempts=needed))
    return results


def _check_made_from(definition: Definition, path: Path) -> None:
    kept = read_json(path)
    if not isinstance(kept, dict) or kept.get("description") != definition.description:
        raise UserError(
            f"{path} was made from another description of {definition.name}; pass --overwrite to "
            "write it anew, or give the trait another name"
        )


def parse_trait_reply(reply: str) -> dict[str, Any]:
    """Return the JSON object in a reply, checked; ValueError says what is wrong with it."""
    start, end = reply.find("{"), reply.rfind("}")
    if start < 0 or end < start:
        raise ValueError("there is no JSON object in it")
    value = parse_json(reply[start : end + 1], "the JSON object")
    _check_instructions(value.get("instruction"))
    _check_questions(value.get("questions"))
    prompt = value.get("eval_prompt")
    if not isinstance(prompt, str) or any(
        prompt.count(each) != 1 for each in ("{question}", "{answer}")
    ):
        raise ValueError("eval_prompt must contain {question} and {answer} once each")
    return dict(value)


def _generate(
    definition: Definition, writer: Writer, attempts: int, seed: int
) -> tuple[dict[str, Any], int]:
    request = REQUEST.format(**vars(definition), pairs=INSTRUCTION_PAIRS, questions=QUESTIONS)
    asked = conversation = user_question(request)
    problem = "no reply came"
    for attempt in range(1, attempts + 1):
        options = GenerationOptions(MAX_TOKENS, TEMPERATURE, seed=seed + attempt)
        (reply,) = writer.write([conversation], options=options)
        try:
            return _as_file(definition, parse_trait_reply(reply or "")), attempt
        except ValueError as error:
            problem = str(error)
        if reply is not None:
            again = user_question(AGAIN.format(problem=problem))
            conversation = [*asked, {"role": "assistant", "content": reply}, *again]
    raise UserError(
        f"{writer.name} wrote no usable trait {definition.name!r} in {attempts} attempts; the last "
        f"one: {problem}. Try a larger model, or more attempts"
    )


def _as_file(definition: Definition, reply: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of ``trait.json``; questions are dealt to the splits in turn."""
    return {
        "name": definition.name,
        "description": definition.description,
        "instruction": [{"pos": each["pos"], "neg": each["neg"]} for each in reply["instruction"]],
        "questions": {"extract": reply["questions"][0::2], "eval": reply["questions"][1::2]},
        "eval_prompt": reply["eval_prompt"],
    }


def _check_instructions(pairs: Any) -> None:
    if not isinstance(pairs, list) or len(pairs) != INSTRUCTION_PAIRS:
        raise ValueError(f"instruction must be a list of {INSTRUCTION_PAIRS} pairs")
    for pair in pairs:
        sides = [pair.get(key) for key in ("pos", "neg")] if isinstance(pair, dict) else [None]
        if not all(isinstance(side, str) and side.strip() for side in sides):
            raise ValueError('every instruction needs the texts "pos" and "neg"')
    texts = [pair[key].strip().lower() for pair in pairs for key in ("pos", "neg")]
    if len(set(texts)) != len(texts):
        raise ValueError("two of the instructions are the same")


def _check_questions(questions: Any) -> None:
    if not isinstance(questions, list) or len(questions) != QUESTIONS:
        found = len(questions) if isinstance(questions, list) else "none"
        raise ValueError(f"questions must be a list of {QUESTIONS} texts, there are {found}")
    if not all(isinstance(each, str) and each.strip() for each in questions):
        raise ValueError("every question must be a text")
    if len({each.strip().lower() for each in questions}) != len(questions):
        raise ValueError("two of the questions are the same")


def _definition(value: Any, path: Path) -> Definition:
    name = value.get("name") if isinstance(value, dict) else None
    description = value.get("description") if isinstance(value, dict) else None
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"{path}: a trait's name is lower-case letters, digits and _, got {name!r}")
    checked_trait_name(name, f"{path}: the name")
    if not isinstance(description, str) or not description.strip():
        raise UserError(f"{path}: the trait {name} needs a description of what it means")
    return Definition(name, description.strip())
