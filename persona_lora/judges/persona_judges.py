"""The judges of a persona search: one for the search, another for what is reported.

The embedded judge of the search is fitted on the persona's training conversations, the one that
reports on its test conversations; each is validated on the conversations of the other split.
Search and report are of different families unless told otherwise: style features with embeddings,
letters, the likelihood of the unsteered model, or language models. A
language model reads the same judge prompt for both: it sees ``final_judge_prompt.txt`` of the
persona with the unsteered and the steered answer as A and B, in an order drawn for each answer, and
says 1 (much worse) to 5. Language models favour a side; the drawn order turns that into noise.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np

from persona_lora.core.chat import Exchange, Verdict
from persona_lora.core.errors import UserError
from persona_lora.core.options import PERSONA_JUDGES, judge_names
from persona_lora.core.personas import ConversationSplit, Persona
from persona_lora.core.traits import load_pairs, load_trait
from persona_lora.judges.choice import JudgeOptions, likelihood_under, local_reader
from persona_lora.judges.coherence import CoherenceScorer
from persona_lora.judges.embedding import exchanges_of
from persona_lora.judges.judge_prompts import Reading
from persona_lora.judges.judging import Judge, MultiJudge
from persona_lora.judges.style_judge import (
    HIGHEST,
    LOWEST,
    NO_WORDS,
    PERSONA_FIT,
    FitScale,
    StyleJudge,
    Voices,
    has_words,
)
from persona_lora.models.likelihood import mean_logprobs
from persona_lora.models.loading import ChatModel
from persona_lora.profiles.judge_prompt import checked_judge_prompt, fill_judge_prompt
from persona_lora.report.resampling import auc_of

Read = Callable[[Sequence[str]], Mapping[str, Reading]]


@dataclass(frozen=True, eq=False)
class ComparisonJudge:
    """A ``Judge`` of the criterion "persona_fit" that asks a language model.

    ``read`` returns a number for each prompt; ``template`` is a persona's judge prompt, with its
    places for the message and both answers; ``baselines`` holds the unsteered answer by message.
    """

    name: str
    read: Read
    template: str
    baselines: Mapping[str, str]
    seed: int = 0

    def judge(self, exchanges: Sequence[Exchange], criterion: str = PERSONA_FIT) -> list[Verdict]:
        """Return one verdict of 1–5 per exchange; UserError for a message without a baseline."""
        if criterion != PERSONA_FIT:
            raise UserError(f"a persona's judge scores {PERSONA_FIT!r}, not {criterion!r}")
        prompts = [self._prompt(exchange) for exchange in exchanges]
        readings = self.read(prompts)
        return [
            self._verdict(readings[prompt], self._swapped(exchange))
            for prompt, exchange in zip(prompts, exchanges, strict=True)
        ]

    def _swapped(self, exchange: Exchange) -> bool:
        """Tell whether the steered answer stands first: drawn by seed, message and answer."""
        drawn = hashlib.sha256(f"{self.seed}\n{exchange.question}\n{exchange.answer}".encode())
        return drawn.digest()[0] % 2 == 1

    def _prompt(self, exchange: Exchange) -> str:
        baseline = self.baselines.get(exchange.question)
        if baseline is None:
            raise UserError(
                f"there is no unsteered answer to {exchange.question!r} to compare with"
            )
        answers = (baseline, exchange.answer)
        first, second = reversed(answers) if self._swapped(exchange) else answers
        return fill_judge_prompt(self.template, exchange.question, first, second)

    def _verdict(self, reading: Reading, swapped: bool) -> Verdict:
        score = reading.score
        if score is None:
            return Verdict(PERSONA_FIT, None, reading.reason, self.name)
        if not LOWEST <= score <= HIGHEST:
            return Verdict(PERSONA_FIT, None, f"the reply {score:g} is not from 1 to 5", self.name)
        fit = LOWEST + HIGHEST - score if swapped else score
        return Verdict(PERSONA_FIT, fit, "", self.name)


Contrast = Callable[[Sequence[Exchange]], Sequence[float]]


@dataclass(frozen=True, eq=False)
class LikelihoodJudge:
    """The fit of answers to one person by how likely they are; a ``Judge`` of "persona_fit".

    contrast = mean log p(token | told who the person is, question) − mean log p(token | question),
    under the unsteered model. Held-out utterances of the person and of others, as answers to the
    lines before them, anchor the scale of 1–5 (``FitScale``).
    """

    contrast: Contrast
    scale: FitScale
    name: str = "likelihood"

    def judge(self, exchanges: Sequence[Exchange], criterion: str = PERSONA_FIT) -> list[Verdict]:
        """Return one verdict of 1–5 per exchange, in order; one without words has no score."""
        if criterion != PERSONA_FIT:
            raise UserError(f"a persona's judge scores {PERSONA_FIT!r}, not {criterion!r}")
        worded = [each for each in exchanges if has_words(each.answer)]
        found = self.scale.scores(np.array(self.contrast(worded))) if worded else ()
        scores = iter(map(float, found))
        return [
            Verdict(criterion, next(scores), "", self.name)
            if has_words(each.answer)
            else Verdict(criterion, None, NO_WORDS, self.name)
            for each in exchanges
        ]


def fit_likelihood_judge(
    persona: Persona, personas: Sequence[Persona], contrast: Contrast, *, seed: int
) -> tuple[Judge, list[JudgeCheck]]:
    """Anchor a likelihood judge on held-out utterances, and say how well it tells them apart.

    At most ``OTHERS`` of other persons are drawn. Raises UserError where the person's are no
    likelier when the model is told who speaks.
    """

    def answers(of: Iterable[Persona]) -> list[Exchange]:
        return [each for some in of for each in some.answers("test") if has_words(each.answer)]

    own, pool = answers([persona]), answers(each for each in personas if each.id != persona.id)
    others = random.Random(seed).sample(pool, min(OTHERS, len(pool)))
    if not own or not others:
        raise UserError(f"{persona.id} or the other personas answer nothing in test conversations")
    found = np.array(contrast([*own, *others]))
    mine, theirs = found[: len(own)], found[len(own) :]
    if not mine.mean() > theirs.mean():
        raise UserError(
            f"the model finds utterances of {persona.id} no likelier than others' when it is told "
            "who speaks; report by another judge (--report-judge embedding)"
        )
    scale = FitScale(float(mine.mean()), float(theirs.mean()))
    check = JudgeCheck(LIKELIHOOD, float(auc_of(mine, theirs)), len(own), len(others))
    return LikelihoodJudge(contrast, scale), [check]


def likelihood_contrast(chat_model: ChatModel, told: str) -> Contrast:
    """Return by how much likelier answers are when the model is ``told`` who speaks."""

    def contrast(exchanges: Sequence[Exchange]) -> list[float]:
        with chat_model.base():
            knowing, not_knowing = (mean_logprobs(chat_model, exchanges, a) for a in (told, None))
        return [a - b for a, b in zip(knowing, not_knowing, strict=True)]

    return contrast


COHERENCE_PAIRS = 16
OTHERS = 40
FITTED = ("embedding", "letters")
LIKELIHOOD: Literal["likelihood"] = "likelihood"


@dataclass(frozen=True)
class JudgeCheck:
    """How well a judge tells the person's utterances from others', where it was not fitted.

    ``fitted_on`` is the split that a style judge learnt from, or "likelihood": told by what the
    person said in training conversations. ``auc`` is the chance that an utterance of the person
    gets the higher score.
    """

    fitted_on: ConversationSplit | Literal["likelihood"]
    auc: float
    n_own: int
    n_others: int


@dataclass(frozen=True, eq=False)
class Reader:
    """A language model that reads prompts as numbers; ``dollars`` is what was spent on it.

    One reader serves the search and the report, so that a cap on the dollars holds over both.
    """

    name: str
    read: Read
    dollars: Callable[[], float | None] = lambda: None


def make_readers(options: JudgeOptions, reference: ChatModel) -> dict[str, Reader]:
    """Return the language models that ``options.judge`` names; UserError for an unknown judge."""
    names = judge_names(options.judge, PERSONA_JUDGES)
    return {name: _reader(name, options, reference) for name in names if name not in FITTED}


def judge_prompt_of(persona: Persona) -> str:
    """Return a persona's prompt for a language model as judge; UserError for one with a mistake."""
    name = "final_judge_prompt.txt"
    return checked_judge_prompt(persona.read(name), persona.folder / name)


def make_persona_judge(
    persona: Persona,
    options: JudgeOptions,
    *,
    voices: Callable[[str], Voices],
    readers: Mapping[str, Reader],
    baselines: Mapping[str, str],
) -> Judge:
    """Build the judges that ``options.judge`` names; several are averaged.

    ``voices`` are the fits of the embedded ones, by family.
    """

    def made(name: str) -> Judge:
        if name in FITTED:
            return voices(name).judge_of(persona.id)
        reader = readers[name]
        template = judge_prompt_of(persona)
        return ComparisonJudge(reader.name, reader.read, template, baselines, seed=options.seed)

    names = judge_names(options.judge, PERSONA_JUDGES)
    judges = [made(name) for name in sorted(names, key=lambda name: name not in FITTED)]
    return judges[0] if len(judges) == 1 else MultiJudge(judges)


def check_style_judge(
    judge: StyleJudge, persona: Persona, personas: Sequence[Persona], fitted_on: ConversationSplit
) -> JudgeCheck:
    """Validate a style judge on the utterances of the other split."""
    unseen: ConversationSplit = "test" if fitted_on == "train" else "train"

    def texts(of: Iterable[Persona]) -> list[str]:
        return list(filter(has_words, chain(*(each.utterances(unseen) for each in of))))

    own, others = texts([persona]), texts(each for each in personas if each.id != persona.id)
    if not own or not others:
        raise UserError(
            f"{persona.id} has {len(own)} utterances in {unseen} conversations and the other "
            f"personas {len(others)}, both need some: mark conversations with split {unseen!r}"
        )
    auc = auc_of(np.asarray(judge.logits(own)), np.asarray(judge.logits(others)))
    return JudgeCheck(fitted_on, float(auc), len(own), len(others))


def fit_coherence(
    chat_model: ChatModel, traits: Sequence[str], *, datasets: Path | None = None, seed: int = 0
) -> CoherenceScorer:
    """Fit coherence to natural answers: some training answers of each trait."""
    share = max(1, COHERENCE_PAIRS // len(traits))
    pairs = [pair for name in traits for pair in load_pairs(load_trait(name, datasets))[:share]]
    return CoherenceScorer.fit(
        list(chain(*zip(*exchanges_of(pairs), strict=True))),
        mean_logprob=likelihood_under(chat_model),
        judge_name="embedding",
        seed=seed,
    )


def _reader(name: str, options: JudgeOptions, reference: ChatModel) -> Reader:
    if name == "openai":
        endpoint = options.reader(int(HIGHEST))
        return Reader(endpoint.name, endpoint.read, lambda: endpoint.usage.dollars)
    local = local_reader(options, reference, int(HIGHEST))
    return Reader(local.name, local.read)
