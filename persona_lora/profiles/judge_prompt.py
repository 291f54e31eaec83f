"""The prompt by which a language model judges how well an answer fits a persona."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from persona_lora.core.errors import UserError

PLACEHOLDERS = ("{question}", "{answer_a}", "{answer_b}")
PUBLISHED = ("{prompt}", "{response_a}", "{response_b}")  # the same, as others call them
_ANY = re.compile(r"\{[A-Za-z_]\w*\}")

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


def check_template(template: str) -> None:
    """Raise UserError for a template whose placeholders are not the five, once each."""
    _check(template, ("{profile}", "{samples}", *PLACEHOLDERS), "the judge prompt's template")


def build_judge_prompt(
    profile: str, samples: Sequence[str], *, template: str = DEFAULT_TEMPLATE
) -> str:
    """Return the template with profile and samples filled in; the A/B placeholders stay.

    What looks like a placeholder in a person's own words gets spaces inside. Raises UserError for a
    template with a placeholder too many or too few.
    """
    check_template(template)
    values = {
        "{profile}": _as_text(profile.strip()),
        "{samples}": _as_text("\n".join(f"- {sample}" for sample in samples)),
    }
    return re.sub(r"\{(profile|samples)\}", lambda found: values[found.group()], template)


def checked_judge_prompt(text: str, path: Path) -> str:
    """Return a judge prompt as read, with our names for the places; UserError for other places."""
    for published, ours in zip(PUBLISHED, PLACEHOLDERS, strict=True):
        text = text.replace(published, ours)
    _check(text, PLACEHOLDERS, str(path))
    return text


def fill_judge_prompt(template: str, question: str, first: str, second: str) -> str:
    """Put the message and both answers literally into their places, in one pass."""
    values = dict(zip(PLACEHOLDERS, (question, first, second), strict=True))
    pattern = "|".join(map(re.escape, PLACEHOLDERS))
    return re.sub(pattern, lambda found: values[found.group()], template)


def _check(text: str, wanted: Sequence[str], where: str) -> None:
    unknown = sorted(set(_ANY.findall(text)) - set(wanted))
    missing = [name for name in wanted if text.count(name) != 1]
    if missing:
        raise UserError(f"{where} must contain {missing[0]} once")
    if unknown:
        raise UserError(
            f"{where} contains {unknown[0]}, which nothing fills in; known are "
            f"{', '.join(wanted)}. Take it out, or make the prompt "
            "anew with: persona-lora persona build --overwrite"
        )


def _as_text(text: str) -> str:
    return _ANY.sub(lambda found: f"{{ {found.group()[1:-1]} }}", text)
