"""The mix under which a person's own lines are likeliest, from forward passes alone.

The slope of the lines' mean log-likelihood along each direction is a central difference of two
mixes, held live; the mix goes that way, as far as the lines grow likelier. Nothing is generated and
no judge is asked: a start for a search, and what a search has to be better than. A likelihood
rewards what the model finds easy to say as well as the person's manner.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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


def line_slopes(speaker: Speaker, lines: Sequence[Exchange]) -> NDArray[np.float64]:
    """Return the slope of the lines' likelihood by each direction's weight, ``[directions]``.

    In nats a token for a weight of 1: a central difference over ±``STEP``.
    """
    names = speaker.directions.names
    steps = [Coefficients.of({name: side}) for name in names for side in (STEP, -STEP)]
    up, down = line_likelihoods(speaker, steps, lines).reshape(len(names), 2).T
    return (up - down) / (2 * STEP)


def likeliest_mix(speaker: Speaker, lines: Sequence[Exchange], bound: float | None) -> Coefficients:
    """Return the mix along the slope of the lines' likelihood at which it is highest.

    Weights are those of a search (1 is a direction's equal effect), within ±``bound``, to two
    decimals. All zeros where no length of ``LENGTHS`` makes the lines likelier.
    """
    names, slopes = speaker.directions.names, line_slopes(speaker, lines)
    heading = slopes / (np.linalg.norm(slopes) or 1.0)
    reach = np.inf if bound is None else bound / (np.abs(heading).max() or 1.0)
    tried = [
        Coefficients.of(dict(zip(names, np.round(heading * length, 2), strict=True)))
        for length in (0.0, *dict.fromkeys(min(length, reach) for length in LENGTHS))
    ]
    return tried[int(line_likelihoods(speaker, tried, lines).argmax())]


def kept_mix(
    speaker: Speaker, lines: Sequence[Exchange], bound: float | None, folder: Path
) -> Coefficients:
    """Return the same, from the file of ``folder`` that an earlier call with all this left."""
    read = digest_of([speaker.inputs(), lines, bound, STEP, LENGTHS])
    path = folder / f"likeliest_{read[:16]}.json"
    if not path.exists():
        likeliest_mix(speaker, lines, bound).write(path)
    return Coefficients.read(path)
