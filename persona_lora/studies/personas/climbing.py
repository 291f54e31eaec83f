"""The mixes up which the values of a model's own answers climb: a start for a search of any goal.

At no steering the slope of the mean value by a direction's weight is the mean of
(value − mean) · ∂ log p(answer) over the model's own answers (Williams 1992, REINFORCE). One set of
drawn answers, valued once, serves all directions: of each the likelihoods of the answers are read
at two mixes, held live. No gradients are computed; how sure a slope is stands beside.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from persona_lora.core import progress
from persona_lora.core.chat import Exchange
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_json, write_json
from persona_lora.core.personas import Coefficients
from persona_lora.judges.budget import refuse_spent
from persona_lora.judges.judging import Judge
from persona_lora.models.generation import ending_tokens
from persona_lora.models.likelihood import TokenizedExchange, tokenize_exchange
from persona_lora.steering.steerer import Unsteered
from persona_lora.studies.asking.run import Row, generate_rows, stream_of
from persona_lora.studies.personas.likeliest import STEP, likelihoods, within
from persona_lora.studies.personas.objective import Speaker
from persona_lora.studies.personas.search import SearchOptions

logger = logging.getLogger(__name__)

DRAWS = 8  # answers to each prompt, at temperature 1: the model's own probabilities
LENGTHS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Slopes:
    """The slope of the mean value by each free direction's weight, and its standard error.

    ``fixed`` are the weights that a search holds, and at which the slopes are taken.
    """

    traits: tuple[str, ...]
    values: tuple[float, ...]
    errors: tuple[float, ...]
    fixed: Mapping[str, float] = field(default_factory=dict)

    def mixes(self, bound: float | None) -> tuple[Coefficients, ...]:
        """Return mixes of ``LENGTHS`` up the slopes, within ±``bound``, to two decimals.

        None, with a warning, where nothing slopes: where all answers have one value.
        """
        if not any(self.values):
            logger.warning("all drawn answers to a prompt have one value: nothing to start from")
            return ()
        heading = np.array(self.values) / np.linalg.norm(self.values)
        reach = np.inf if bound is None else bound / np.abs(heading).max()
        return tuple(
            Coefficients.of({**self.fixed, **dict(zip(self.traits, weights, strict=True))})
            for weights in (within(heading * min(length, reach), bound) for length in LENGTHS)
        )


class Drawn(NamedTuple):
    """An answer that a model drew, and whether it ended by itself."""

    exchange: Exchange
    finished: bool


def value_slopes(
    speaker: Speaker,
    prompts: Sequence[str],
    judge: Judge,
    criterion: str,
    seed: int,
    fixed: Mapping[str, float] = MappingProxyType({}),
) -> Slopes:
    """Return the slopes of the mean value of answers to ``prompts``, over ``DRAWS`` of each.

    An answer's value is compared with the mean of the others to its prompt, all of them drawn from
    the model's own probabilities; the standard error is over prompts. All processes answer. Raises
    UserError where fewer than two prompts have two valued answers.
    """
    drawn = _drawn(speaker, prompts, seed, fixed)
    return speaker.processes.from_main(lambda: _slopes(speaker, drawn, judge, criterion, fixed))


def _drawn(
    speaker: Speaker, prompts: Sequence[str], seed: int, fixed: Mapping[str, float]
) -> list[Drawn]:
    mix = Coefficients.of(fixed) if fixed else None
    rows = [
        Row(prompt, mix, stream=stream_of(at, draw))
        for at, prompt in enumerate(prompts)
        for draw in range(DRAWS)
    ]
    model, processes = speaker.chat_model, speaker.processes
    bank, held = speaker.directions, speaker.coefficients(mix)
    steerer = bank.steerer(model, [held] * len(rows)) if any(held.values()) else Unsteered()
    options = replace(speaker.options, temperature=1.0, seed=seed)
    own = range(processes.index, len(rows), processes.count)
    with progress.stage("drawing answers"):
        answers = generate_rows(model, rows, steerer, options, numbers=own)
    told = [(each.text, each.finished) for each in answers]
    found = dict(processes.gather(list(zip(own, told, strict=True))))
    return [Drawn(Exchange(row.question, *found[at]), found[at][1]) for at, row in enumerate(rows)]


def _slopes(
    speaker: Speaker,
    drawn: Sequence[Drawn],
    judge: Judge,
    criterion: str,
    fixed: Mapping[str, float],
) -> Slopes:
    verdicts = judge.judge([each.exchange for each in drawn], criterion)
    refuse_spent(verdicts)
    values = [each.score for each in verdicts]
    by_prompt: dict[str, list[int]] = {}
    for at, value in enumerate(values):
        if value is not None:
            by_prompt.setdefault(drawn[at].exchange.question, []).append(at)
    known = [own for own in by_prompt.values() if len(own) > 1]
    if len(known) < 2:
        raise UserError(
            f"a warm start needs two prompts with two valued answers each, and has {len(known)} "
            f"({values.count(None)} of {len(values)} answers have no value); look at the judge, "
            "give more prompts, or leave --warm-start out"
        )
    names = tuple(name for name in speaker.directions.names if name not in fixed)
    gradients = _gradients(speaker, [drawn[at] for own in known for at in own], names, fixed)
    slopes, done = [], 0
    for own in known:
        valued = np.array([values[at] for at in own], dtype=float)
        over = (valued - valued.mean()) * len(own) / (len(own) - 1) * bool(np.ptp(valued))
        slopes.append((gradients[:, done : done + len(own)] * over).mean(axis=1))
        done += len(own)
    spread = np.std(slopes, axis=0, ddof=1) / np.sqrt(len(slopes))
    mean = np.mean(slopes, axis=0)
    said = (f"{n} {v:.2g} ± {e:.2g}" for n, v, e in zip(names, mean, spread, strict=True))
    logger.info("slopes of the value by weight (± a standard error): %s", ", ".join(said))
    return Slopes(names, tuple(mean.tolist()), tuple(spread.tolist()), dict(fixed))


def _gradients(
    speaker: Speaker, drawn: Sequence[Drawn], names: Sequence[str], fixed: Mapping[str, float]
) -> NDArray[np.float64]:
    """Return ∂ log p(answer) by each direction's weight, ``[directions, answers]``, in nats."""
    steps = [Coefficients.of({**fixed, name: side}) for name in names for side in (STEP, -STEP)]
    texts = [_ended(speaker, each) for each in drawn]
    found = likelihoods(speaker, steps, texts).reshape(len(names), 2, len(texts))
    tokens = np.array([len(each.answer) for each in texts])
    return (found[:, 0] - found[:, 1]) * tokens / (2 * STEP)


def _ended(speaker: Speaker, drawn: Drawn) -> TokenizedExchange:
    """Return the tokens of an answer, with its end where it was not cut off: that was drawn too."""
    model, text = speaker.chat_model, tokenize_exchange(speaker.chat_model, drawn.exchange)
    if text.answer and not drawn.finished:
        return text
    ends = model.template.end_of_turn or ending_tokens(model)
    return text._replace(answer=[*text.answer, min(ends)])


def kept_slopes(
    speaker: Speaker,
    prompts: Sequence[str],
    judge: Judge,
    *,
    criterion: str,
    searching: SearchOptions,
    read: object,
    folder: Path,
) -> Slopes:
    """Return the same, from the file of ``folder`` that an earlier call with all this left.

    Seed and fixed weights are those of ``searching``; ``read`` tells what the judge was made of.
    """
    seed, fixed = searching.seed, dict(sorted(searching.fixed.items()))
    asked = [speaker.options.max_new_tokens, list(prompts), criterion, seed, fixed, read]
    path = folder / f"climbing_{digest_of([speaker.inputs(), *asked, STEP, DRAWS])[:16]}.json"
    processes = speaker.processes
    if not processes.from_main(path.exists):
        found = value_slopes(speaker, prompts, judge, criterion, seed, fixed)
        processes.from_main(lambda: write_json(path, vars(found)))
    kept = processes.from_main(lambda: read_json(path))
    traits, values, errors = (tuple(kept[name]) for name in ("traits", "values", "errors"))
    return Slopes(traits, values, errors, kept["fixed"])
