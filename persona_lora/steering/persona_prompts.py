"""A persona by system prompt: the baseline that every steering method is measured against."""

from __future__ import annotations

from typing import Literal

from persona_lora.core.errors import UserError
from persona_lora.core.traits import Trait

Sign = Literal["pos", "neg"]


def trait_prompt(trait: Trait, sign: Sign, index: int, *, assistant_name: str | None = None) -> str:
    """Return a system prompt of the trait; the pairs are taken in turn over the questions.

    With ``assistant_name`` a sentence goes before it: "You are an evil assistant." (Chen et al.
    2025, arXiv:2507.21509: the trait's adjective for the positive side; its antonym, or
    "helpful", for the negative one).
    """
    if not trait.instructions:
        raise UserError(f"the trait {trait.name} has no system prompts in its trait.json")
    pair = trait.instructions[index % len(trait.instructions)]
    instruction = pair.pos if sign == "pos" else pair.neg
    return instruction if assistant_name is None else named(assistant_name, instruction)


def named(assistant_name: str, instruction: str) -> str:
    """Return the instruction with "You are a(n) … assistant." before it."""
    article = "an" if assistant_name[:1].lower() in "aeiou" else "a"
    return f"You are {article} {assistant_name} assistant. {instruction}"
