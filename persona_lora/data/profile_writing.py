"""A persona's profile in prose, written by a language model from features and samples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence

from persona_lora.core.chat import user_question
from persona_lora.core.errors import UserError
from persona_lora.core.options import GenerationOptions
from persona_lora.data.writers import Writer
from persona_lora.profiles.features import Features

DEFAULT_PROMPT = """\
Here is how one person writes, as numbers and as sentences of theirs.

Measured on all their messages:
{features}

Some of their messages:
{samples}

Describe this person's way of speaking in six to ten plain sentences: register, length, \
punctuation, favourite words, humour, what they talk about, how they treat the other one. \
Describe; do not imitate, and do not guess at facts of their life.
"""
PLACEHOLDERS = ("{features}", "{samples}")
GREEDY = GenerationOptions(max_new_tokens=400)


def profile_writer(
    writer: Writer, prompt: str = DEFAULT_PROMPT
) -> Callable[[Features, Sequence[str]], str]:
    """Return a function from features and samples to the profile that the writer gives.

    UserError for a prompt without its placeholders, and when the writer returns nothing.
    """
    missing = [name for name in PLACEHOLDERS if name not in prompt]
    if missing:
        raise UserError(f"the prompt for a profile must contain {missing[0]}")

    def write(features: Features, samples: Sequence[str]) -> str:
        numbers = json.dumps(dataclasses.asdict(features), indent=1, ensure_ascii=False)
        listed = "\n".join(f"- {sample}" for sample in samples)
        asked = prompt.replace("{features}", numbers).replace("{samples}", listed)
        (text,) = writer.write([user_question(asked)], options=GREEDY)
        if not (text or "").strip():
            raise UserError(f"{writer.name} wrote no profile; try again, or leave the writer out")
        return str(text).strip()

    return write
