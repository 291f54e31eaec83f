"""How much of what it knows a model keeps under a mix: multiple choice, read and not generated.

Of every question stands the share of the right choice among its choices, each by its probability a
token (which does not favour short ones) as an answer in the model's own template. What a mix keeps
is the mean in percent of the unsteered model's. A search is limited on a quarter of the questions,
measured again on another, and reported on the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from persona_lora.core.chat import Exchange
from persona_lora.core.files import read_jsonl
from persona_lora.core.personas import Coefficients
from persona_lora.core.resources import resource_path
from persona_lora.models.likelihood import tokenize_exchange
from persona_lora.studies.personas.likeliest import likelihoods
from persona_lora.studies.personas.objective import Speaker

Part = Literal["train", "fresh", "held_out"]
FILE = Path("datasets/capability/multiple_choice.jsonl")
QUARTERS: dict[Part, tuple[int, ...]] = {"train": (0,), "fresh": (1,), "held_out": (2, 3)}


class Choice(NamedTuple):
    """A question, what may be answered to it, and the place of the right answer."""

    question: str
    choices: tuple[str, ...]
    right: int


def choices_of(part: Part) -> list[Choice]:
    """Return the questions of a part; every fourth one is of a quarter."""
    rows = read_jsonl(resource_path(FILE))
    asked = [row for at, row in enumerate(rows) if at % 4 in QUARTERS[part]]
    return [Choice(row["question"], tuple(row["choices"]), row["answer"]) for row in asked]


def kept_choices(
    speaker: Speaker, mixes: Sequence[Coefficients | None], choices: Sequence[Choice]
) -> list[float]:
    """Return what each mix keeps, in percent: over 100 where it knows more than without it.

    Raises UserError for steering vectors, as ``likelihoods`` does.
    """
    found = _right(speaker, [None, *mixes], choices).mean(axis=1)
    return [float(100 * each / found[0]) for each in found[1:]]


def _right(
    speaker: Speaker, mixes: Sequence[Coefficients | None], choices: Sequence[Choice]
) -> NDArray[np.float64]:
    """Return the share of the right choice among all, ``[mixes, questions]``."""
    asked = [Exchange(each.question, said) for each in choices for said in each.choices]
    texts = [tokenize_exchange(speaker.chat_model, each) for each in asked]
    log_p = likelihoods(speaker, mixes, texts)
    ends = np.cumsum([len(each.choices) for each in choices])[:-1]
    by_question = np.split(log_p, ends, axis=1)
    right = [
        1 / np.exp(own - own[:, [each.right]]).sum(axis=1)
        for each, own in zip(choices, by_question, strict=True)
    ]
    return np.stack(right, axis=1)
