"""The prompt by which a language model judges how well an answer fits a persona."""

from __future__ import annotations

import re
from collections.abc import Sequence

from persona_lora.core.errors import UserError

PLACEHOLDERS = ("{question}", "{answer_a}", "{answer_b}")

DEFAULT_TEMPLATE = """You judge how much an answer sounds like one particular person.

The person:
{profile}

Things the person has said:
{samples}

Look at manner, not at content: the length of utterances, how formal they are, whom they are \
about, how close they come to the other person, stories or solutions, the emotional tone, \
questions, and turns of phrase. A correct or helpful answer is not better for that.

Message:
{question}

Answer A:
{answer_a}

Answer B:
{answer_b}

How well does answer B fit the person, compared with answer A? 1: much worse than A. 2: worse. \
3: about as well. 4: better. 5: so well that the person could have said it. Reply with the \
number alone."""


def build_judge_prompt(
    profile: str, samples: Sequence[str], *, template: str = DEFAULT_TEMPLATE
) -> str:
    """Return the template with profile and samples filled in; the A/B placeholders stay.

    UserError for a template that lacks one of its five placeholders.
    """
    missing = [
        name for name in ("{profile}", "{samples}", *PLACEHOLDERS) if template.count(name) != 1
    ]
    if missing:
        raise UserError(f"the judge prompt's template must contain {missing[0]} once")
    listed = "\n".join(f"- {sample}" for sample in samples)
    return template.replace("{profile}", profile.strip()).replace("{samples}", listed)


def fill_judge_prompt(template: str, question: str, first: str, second: str) -> str:
    """Put the message and both answers literally into their places, in one pass."""
    values = dict(zip(PLACEHOLDERS, (question, first, second), strict=True))
    pattern = "|".join(map(re.escape, PLACEHOLDERS))
    return re.sub(pattern, lambda found: values[found.group()], template)
