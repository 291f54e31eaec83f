"""The mixes along which the values of a model's own answers climb, from forward passes alone.

At no steering the slope of the mean value by a direction's weight is the mean of
(value − mean) · ∂ log p(answer) over the unsteered model's own answers (Williams 1992, REINFORCE).
One set of drawn answers, valued once, serves all directions: of each the likelihoods of the answers
are read at two mixes, held live. A start for a search of any goal; how sure it is stands beside.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from persona_lora.core.chat import Exchange
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_json, write_json
from persona_lora.core.personas import Coefficients
from persona_lora.judges.judging import Judge
from persona_lora.models.generation import ending_tokens
from persona_lora.models.likelihood import TokenizedExchange, tokenize_exchange
from persona_lora.report import wording
from persona_lora.studies.asking.run import Row, stream_of
from persona_lora.studies.personas.likeliest import STEP, likelihoods
from persona_lora.studies.personas.objective import Speaker

logger = logging.getLogger(__name__)

DRAWS = 8  # answers to each prompt, at temperature 1: the model's own probabilities
LENGTHS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Slopes:
    """The slope of the mean value by each direction's weight, and its standard error."""

    traits: tuple[str, ...]
    values: tuple[float, ...]
    errors: tuple[float, ...]

    def mixes(self, bound: float | None) -> tuple[Coefficients, ...]:
        """Return mixes of ``LENGTHS`` up the slopes, within ±``bound``, to two decimals.

        None, with a warning, where nothing slopes: where all answers have one value.
        """
        if not any(self.values):
            logger.warning("all drawn answers to a prompt have one value: nothing to start from")
            return ()
        heading = np.array(self.values) / np.linalg.norm(self.values)
        reach = np.inf if bound is None else bound / np.abs(heading).max()
        steps = dict.fromkeys(min(length, reach) for length in LENGTHS)
        weights = (np.round(heading * length, 2).tolist() for length in steps)
        return tuple(Coefficients.of(dict(zip(self.traits, each, strict=True))) for each in weights)


def value_slopes(
    speaker: Speaker, prompts: Sequence[str], judge: Judge, criterion: str, seed: int
) -> Slopes:
    """Return the slopes of the mean value of answers to ``prompts``, over ``DRAWS`` of each.

    An answer's value is compared with the mean of the others to its prompt, all of them drawn from
    the model's own probabilities; the standard error is over prompts. All processes answer. Raises
    UserError where fewer than two prompts have two valued answers.
    """
    options = replace(speaker.options, temperature=1.0, seed=seed)
    drawing = replace(speaker, options=options)
    asked = [(at, draw) for at in range(len(prompts)) for draw in range(DRAWS)]
    rows = [Row(prompts[at], None, stream=stream_of(at, draw)) for at, draw in asked]
    answers = drawing.answers(rows)
    exchanges = [Exchange(row.question, text) for row, text in zip(rows, answers, strict=True)]
    return speaker.processes.from_main(lambda: _slopes(speaker, exchanges, judge, criterion))


def _slopes(
    speaker: Speaker, exchanges: Sequence[Exchange], judge: Judge, criterion: str
) -> Slopes:
    values = [each.score for each in judge.judge(exchanges, criterion)]
    by_prompt: dict[str, list[int]] = {}
    for at, value in enumerate(values):
        if value is not None:
            by_prompt.setdefault(exchanges[at].question, []).append(at)
    known = [own for own in by_prompt.values() if len(own) > 1]
    if len(known) < 2:
        raise UserError(
            f"a warm start needs two prompts with two valued answers each, and has {len(known)}; "
            "give more prompts, or leave --warm-start out"
        )
    gradients = _gradients(speaker, [exchanges[at] for own in known for at in own])
    slopes, done = [], 0
    for own in known:
        valued = np.array([values[at] for at in own], dtype=float)
        over = (valued - valued.mean()) * len(own) / (len(own) - 1)
        slopes.append((gradients[:, done : done + len(own)] * over).mean(axis=1))
        done += len(own)
    names, spread = speaker.directions.names, np.std(slopes, axis=0, ddof=1)
    found = Slopes(
        names,
        tuple(np.mean(slopes, axis=0).tolist()),
        tuple((spread / np.sqrt(len(slopes))).tolist()),
    )
    said = zip(names, found.values, found.errors, strict=True)
    each = (f"{name} {wording.number(at)} ± {wording.number(error)}" for name, at, error in said)
    logger.info("slopes of the value by weight (± a standard error): %s", ", ".join(each))
    return found


def _gradients(speaker: Speaker, exchanges: Sequence[Exchange]) -> NDArray[np.float64]:
    """Return ∂ log p(answer) by each direction's weight, ``[directions, answers]``, in nats."""
    names = speaker.directions.names
    steps = [Coefficients.of({name: side}) for name in names for side in (STEP, -STEP)]
    texts = [_ended(speaker, each) for each in exchanges]
    found = likelihoods(speaker, steps, texts).reshape(len(names), 2, len(texts))
    tokens = np.array([len(each.answer) for each in texts])
    return (found[:, 0] - found[:, 1]) * tokens / (2 * STEP)


def _ended(speaker: Speaker, exchange: Exchange) -> TokenizedExchange:
    """Return the tokens of an answer, with its end where it was not cut off: that was drawn too."""
    model, text = speaker.chat_model, tokenize_exchange(speaker.chat_model, exchange)
    if len(text.answer) >= speaker.options.max_new_tokens:
        return text
    ends = model.template.end_of_turn or ending_tokens(model)
    return text._replace(answer=[*text.answer, min(ends)])


def kept_slopes(
    speaker: Speaker,
    prompts: Sequence[str],
    judge: Judge,
    *,
    criterion: str,
    seed: int,
    read: object,
    folder: Path,
) -> Slopes:
    """Return the same, from the file of ``folder`` that an earlier call with all this left.

    ``read`` tells what the judge was made of.
    """
    said = [speaker.inputs(), speaker.options.max_new_tokens, list(prompts), criterion, seed, read]
    path = folder / f"climbing_{digest_of([*said, STEP, DRAWS])[:16]}.json"
    processes = speaker.processes
    if not processes.from_main(path.exists):
        found = value_slopes(speaker, prompts, judge, criterion, seed)
        processes.from_main(lambda: write_json(path, vars(found)))
    kept = processes.from_main(lambda: read_json(path))
    return Slopes(**{name: tuple(each) for name, each in kept.items()})
