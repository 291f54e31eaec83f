"""The mix under which a person's own lines are likeliest, from forward passes alone.

The slope of the lines' mean log-likelihood along each direction is a central difference of two
mixes, held live; the mix goes that way, as far as the lines grow likelier. Nothing is generated and
no judge is asked: a start for a search, and what a search has to be better than. A likelihood
rewards what the model finds easy to say as well as the person's manner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from persona_lora.core import progress
from persona_lora.core.chat import Exchange
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError
from persona_lora.core.personas import Coefficients
from persona_lora.models.likelihood import (
    TokenizedExchange,
    answer_logprobs,
    tokenize_exchange,
)
from persona_lora.studies.personas.objective import Speaker

STEP = 0.25  # of a weight, to both sides: far over what bf16 rounds away
LENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)


def line_likelihoods(
    speaker: Speaker, mixes: Sequence[Coefficients], lines: Sequence[Exchange]
) -> NDArray[np.float64]:
    """Return the mean over lines of their mean log-probability (nats a token), ``[mixes]``.

    Empty ones are left out. Raises UserError where there are no others, and as ``likelihoods``.
    """
    texts = [tokenize_exchange(speaker.chat_model, each) for each in lines]
    texts = [each for each in texts if each.answer]
    if not texts:
        raise UserError("the person answers no line in training conversations; nothing to read")
    return likelihoods(speaker, mixes, texts).mean(axis=1)


def likelihoods(
    speaker: Speaker, mixes: Sequence[Coefficients | None], texts: Sequence[TokenizedExchange]
) -> NDArray[np.float64]:
    """Return the mean log-probability of a token of answers (none empty), ``[mixes, answers]``.

    Raises UserError for steering vectors, whose places in a given answer are another's business.
    """
    bank = speaker.directions
    if bank.vectors:
        raise UserError("likelihoods of given answers are read with LoRA differences alone")
    rows = [speaker.coefficients(mix) for mix in mixes for _ in texts]
    with bank.steerer(speaker.chat_model, rows) as steerer, progress.stage("reading answers"):
        found = answer_logprobs(speaker.chat_model, [*texts] * len(mixes), steerer.select_rows)
    return np.array(found).reshape(len(mixes), len(texts))


def line_slopes(
    speaker: Speaker, lines: Sequence[Exchange], fixed: Mapping[str, float] = MappingProxyType({})
) -> NDArray[np.float64]:
    """Return the slope of the lines' likelihood by each free direction's weight, ``[directions]``.

    In nats a token for a weight of 1: a central difference over ±``STEP``. ``fixed`` are held.
    """
    names = [name for name in speaker.directions.names if name not in fixed]
    steps = [Coefficients.of({**fixed, name: side}) for name in names for side in (STEP, -STEP)]
    up, down = line_likelihoods(speaker, steps, lines).reshape(len(names), 2).T
    return (up - down) / (2 * STEP)


def likeliest_mix(
    speaker: Speaker,
    lines: Sequence[Exchange],
    bound: float | None,
    fixed: Mapping[str, float] = MappingProxyType({}),
) -> Coefficients:
    """Return the mix along the slope of the lines' likelihood at which it is highest.

    Weights are those of a search (1 is a direction's equal effect), within ±``bound``, to two
    decimals. All zeros where no length of ``LENGTHS`` makes the lines likelier; ``fixed`` are held.
    """
    names = [name for name in speaker.directions.names if name not in fixed]
    slopes = line_slopes(speaker, lines, fixed)
    heading = slopes / (np.linalg.norm(slopes) or 1.0)
    reach = np.inf if bound is None else bound / (np.abs(heading).max() or 1.0)
    lengths = (0.0, *dict.fromkeys(min(length, reach) for length in LENGTHS))
    weights = (within(heading * length, bound) for length in lengths)
    tried = [Coefficients.of({**fixed, **dict(zip(names, each, strict=True))}) for each in weights]
    return tried[int(line_likelihoods(speaker, tried, lines).argmax())]


def within(weights: NDArray[np.float64], bound: float | None) -> list[float]:
    """Return weights to two decimals, none of them over the bound."""
    rounded = np.round(weights, 2)
    kept: list[float] = (rounded if bound is None else rounded.clip(-bound, bound)).tolist()
    return kept


def kept_mix(
    speaker: Speaker,
    lines: Sequence[Exchange],
    bound: float | None,
    folder: Path,
    fixed: Mapping[str, float] = MappingProxyType({}),
) -> Coefficients:
    """Return the same, from the file of ``folder`` that an earlier call with all this left."""
    held = [dict(sorted(fixed.items()))] if fixed else []
    said = [[each.question, each.answer] for each in lines]
    read = digest_of([speaker.inputs(), said, bound, STEP, LENGTHS, *held])
    path = folder / f"likeliest_{read[:16]}.json"
    if not path.exists():
        likeliest_mix(speaker, lines, bound, fixed).write(path)
    return Coefficients.read(path)
