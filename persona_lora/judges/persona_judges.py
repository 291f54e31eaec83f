"""The judges of a persona search: one for the search, another for what is reported.

The embedded judge of the search is fitted on the persona's training conversations, the one that
reports on its test conversations; each is validated on the conversations of the other split. A
language model reads the same judge prompt for both: it sees ``final_judge_prompt.txt`` of the
persona with the unsteered and the steered answer as A and B, in an order drawn for each answer, and
says 1 (much worse) to 5. Language models favour a side; the drawn order turns that into noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from persona_lora.core.chat import Exchange, Verdict
from persona_lora.core.errors import UserError, nearest_names
from persona_lora.core.personas import ConversationSplit, Persona
from persona_lora.core.traits import load_pairs, load_trait
from persona_lora.judges.cache import VerdictCache
from persona_lora.judges.choice import JudgeOptions, local_judge_model
from persona_lora.judges.coherence import CoherenceScorer
from persona_lora.judges.judge_prompts import Reading, weighted_score
from persona_lora.judges.judging import Judge, MultiJudge
from persona_lora.judges.openai import EndpointReader
from persona_lora.judges.style_judge import (
    HIGHEST,
    LOWEST,
    PERSONA_FIT,
    StyleJudge,
    TextFeatures,
    has_words,
)
from persona_lora.models.likelihood import mean_logprobs, next_token_logprobs
from persona_lora.models.loading import ChatModel
from persona_lora.profiles.judge_prompt import checked_judge_prompt, fill_judge_prompt
from persona_lora.report.separation import auc_of

Read = Callable[[Sequence[str]], Mapping[str, Reading]]


class ComparisonJudge:
    """A ``Judge`` of the criterion "persona_fit" that asks a language model.

    ``read`` returns a number for each prompt; ``template`` is a persona's judge prompt, with its
    places for the message and both answers; ``baselines`` holds the unsteered answer by message.
    """

    def __init__(
        self, name: str, read: Read, template: str, baselines: Mapping[str, str], *, seed: int = 0
    ) -> None:
        self.name = name
        self._read = read
        self._template = template
        self._baselines = baselines
        self._seed = seed

    def judge(self, exchanges: Sequence[Exchange], criterion: str = PERSONA_FIT) -> list[Verdict]:
        """Return one verdict of 1–5 per exchange.

        Raises UserError for a message without a baseline.
        """
        if criterion != PERSONA_FIT:
            raise UserError(f"a persona's judge scores {PERSONA_FIT!r}, not {criterion!r}")
        prompts = [self._prompt(exchange) for exchange in exchanges]
        readings = self._read(prompts)
        return [
            self._verdict(readings[prompt], self._swapped(exchange))
            for prompt, exchange in zip(prompts, exchanges, strict=True)
        ]

    def _swapped(self, exchange: Exchange) -> bool:
        """Tell whether the steered answer stands first: drawn by seed, message and answer."""
        drawn = hashlib.sha256(f"{self._seed}\n{exchange.question}\n{exchange.answer}".encode())
        return drawn.digest()[0] % 2 == 1

    def _prompt(self, exchange: Exchange) -> str:
        baseline = self._baselines.get(exchange.question)
        if baseline is None:
            raise UserError(
                f"there is no unsteered answer to {exchange.question!r} to compare with"
            )
        answers = (baseline, exchange.answer)
        first, second = reversed(answers) if self._swapped(exchange) else answers
        return fill_judge_prompt(self._template, exchange.question, first, second)

    def _verdict(self, reading: Reading, swapped: bool) -> Verdict:
        score = reading.score
        if score is None:
            return Verdict(PERSONA_FIT, None, reading.reason, self.name)
        if not LOWEST <= score <= HIGHEST:
            reason = f"the reply {score:g} is not from 1 to 5"
            return Verdict(PERSONA_FIT, None, reason, self.name)
        fit = LOWEST + HIGHEST - score if swapped else score
        return Verdict(PERSONA_FIT, fit, "", self.name)


COHERENCE_PAIRS = 16
PERSONA_JUDGES = ("embedding", "openai", "local")


@dataclass(frozen=True)
class JudgeCheck:
    """How well a style judge tells the person's utterances from others', where it was not fitted.

    ``auc`` is the chance that an utterance of the person gets the higher score.
    """

    fitted_on: ConversationSplit
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
    """Return the language models that ``options.judge`` names.

    Raises UserError for an unknown judge.
    """
    names = [name.strip() for name in options.judge.split(",") if name.strip()]
    for name in names:
        if name not in PERSONA_JUDGES:
            raise UserError(f"no persona judge {name!r}; {nearest_names(name, PERSONA_JUDGES)}")
    return {name: _reader(name, options, reference) for name in names if name != "embedding"}


def judge_prompt_of(persona: Persona) -> str:
    """Return a persona's prompt for a language model as judge.

    Raises UserError for one with a mistake.
    """
    name = "final_judge_prompt.txt"
    return checked_judge_prompt(persona.read(name), persona.folder / name)


def make_persona_judge(
    persona: Persona,
    personas: Sequence[Persona],
    split: ConversationSplit,
    options: JudgeOptions,
    *,
    features: TextFeatures,
    readers: Mapping[str, Reader],
    baselines: Mapping[str, str],
) -> Judge:
    """Build the judges that ``options.judge`` names; several are averaged."""
    judges: list[Judge] = [
        ComparisonJudge(
            reader.name,
            reader.read,
            judge_prompt_of(persona),
            baselines,
            seed=options.seed,
        )
        for reader in readers.values()
    ]
    if "embedding" in options.judge:
        judges.insert(0, fit_style_judge(persona, personas, split, features, seed=options.seed))
    return judges[0] if len(judges) == 1 else MultiJudge(judges)


def fit_style_judge(
    persona: Persona,
    personas: Sequence[Persona],
    split: ConversationSplit,
    features: TextFeatures,
    *,
    seed: int,
) -> StyleJudge:
    """Fit the persona's embedded judge on one split against all other personas."""
    others = [text for each in personas if each.id != persona.id for text in each.utterances(split)]
    return StyleJudge.fit(
        persona.id, persona.utterances(split), others, features=features, seed=seed
    )


def check_style_judge(
    judge: StyleJudge,
    persona: Persona,
    personas: Sequence[Persona],
    fitted_on: ConversationSplit,
) -> JudgeCheck:
    """Validate a style judge on the utterances of the other split."""
    unseen: ConversationSplit = "test" if fitted_on == "train" else "train"
    own = [text for text in persona.utterances(unseen) if has_words(text)]
    others = [
        text
        for each in personas
        if each.id != persona.id
        for text in each.utterances(unseen)
        if has_words(text)
    ]
    if not own or not others:
        raise UserError(f"{persona.id} or the other personas have no {unseen} conversations")
    auc = auc_of(np.asarray(judge.logits(own)), np.asarray(judge.logits(others)))
    return JudgeCheck(fitted_on, float(auc), len(own), len(others))


def fit_coherence(
    chat_model: ChatModel, traits: Sequence[str], *, datasets: Path | None = None, seed: int = 0
) -> CoherenceScorer:
    """Fit coherence to natural answers: some training answers of each trait."""
    share = max(1, COHERENCE_PAIRS // len(traits))
    exchanges = []
    for name in traits:
        pairs = load_pairs(load_trait(name, datasets))[:share]
        for pair in pairs:
            question = pair.prompt[-1]["content"]
            exchanges += [
                Exchange(question, side[-1]["content"]) for side in (pair.positive, pair.negative)
            ]
    return CoherenceScorer.fit(
        exchanges,
        mean_logprob=lambda asked: mean_logprobs(chat_model, asked),
        judge_name="embedding",
        seed=seed,
    )


def _reader(name: str, options: JudgeOptions, reference: ChatModel) -> Reader:
    if name == "openai":
        endpoint = EndpointReader(
            **options.endpoint,
            mode=options.judge_mode,
            limits=options.limits,
            budget=options.budget,
            cache=VerdictCache(options.cache),
            highest=int(HIGHEST),
        )
        return Reader(endpoint.name, endpoint.read, lambda: endpoint.usage.dollars)
    chosen = options.judge_model
    model = local_judge_model(chosen, reference)

    def read(prompts: Sequence[str]) -> dict[str, Reading]:
        distinct = list(dict.fromkeys(prompts))
        logprobs = next_token_logprobs(model, [(prompt, "") for prompt in distinct])
        return {
            prompt: weighted_score(each, int(HIGHEST))
            for prompt, each in zip(distinct, logprobs, strict=True)
        }

    return Reader(f"local:{model.name}", read)
