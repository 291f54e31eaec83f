"""Is it still an answer? Coherence and relevance, without a language-model judge.

coherence = 100 · min(variety, fluency), each in [0, 1]: a text is as coherent as its worse side.

variety = distinct share / its natural value, at most 1. The distinct share is the number of
different word n-grams over the number of all, averaged over n = 2, 3, 4; its natural value is the
5% quantile over the trait's training answers. A text that says one thing k times has about 1/k.

fluency = (m − m₀) / (m₁ − m₀), cut to [0, 1], with m the mean log probability of the answer's
tokens after its question under the unsteered model, m₁ the 10% quantile of m over natural
training answers, and m₀ the median over the same answers with their words shuffled.

Loops are likely text to a language model and shuffled words rarely repeat: neither measure sees
what the other does. Both refuse to know whether the answer is true, kind, or to the point.

relevance: is an answer nearer to its own question than to the others asked? A judge of style or of
a trait asks how something is said. Steered far enough, a model says the same whatever it is asked,
and such a judge is content; this measure is not. Refuses to know how texts become vectors."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from persona_lora.core.chat import COHERENCE, Exchange, Verdict
from persona_lora.core.errors import UserError
from persona_lora.judges.fitness import JudgeValidation, agreement

logger = logging.getLogger(__name__)

MeanLogprob = Callable[[Sequence[Exchange]], Sequence[float]]

NGRAM_SIZES = (2, 3, 4)
NATURAL_SHARE_QUANTILE = 0.05
FLUENT_QUANTILE = 0.10
LOOP_WORDS = 8
FOLDS = 5
EMPTY_REASON = "the answer is empty"

# Long runs of letters are cut, so that a word of one syllable a hundred times over repeats too.
_WORD = re.compile(r"\w{1,16}|[^\w\s]")


@dataclass(frozen=True)
class CoherenceScale:
    """The anchors of coherence: ``natural_share``, ``fluent`` (m₁) and ``scrambled`` (m₀)."""

    natural_share: float
    fluent: float
    scrambled: float

    def score(self, answer: str, mean_logprob: float) -> float:
        """Return the coherence of one answer, 0–100."""
        variety = min(1.0, distinct_share(answer) / self.natural_share)
        fluency = (mean_logprob - self.scrambled) / (self.fluent - self.scrambled)
        return 100.0 * min(variety, max(0.0, min(1.0, fluency)))


def distinct_share(text: str) -> float:
    """Return the share of different word n-grams among all, averaged over n = 2, 3, 4.

    In (0, 1]; sizes that the text is too short for are left out, and a text of one word has 1.
    """
    words = _WORD.findall(text.lower())
    shares = []
    for size in NGRAM_SIZES:
        grams = list(zip(*(words[start:] for start in range(size)), strict=False))
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else 1.0


def shuffled_words(text: str, generator: random.Random) -> str:
    """Return the words of ``text`` in random order."""
    words = text.split()
    generator.shuffle(words)
    return " ".join(words)


def looped_words(text: str) -> str:
    """Return the first eight words of ``text``, repeated up to the length of ``text``."""
    words = text.split()
    return " ".join((words[:LOOP_WORDS] * len(words))[: max(len(words), 4 * LOOP_WORDS)])


def fit_scale(
    answers: Sequence[str], natural: Sequence[float], scrambled: Sequence[float]
) -> CoherenceScale:
    """Fit the anchors to natural ``answers`` and to mean log probabilities.

    ``natural`` and ``scrambled`` hold values for natural and for shuffled answers. Raises
    UserError where shuffled answers are as likely as natural ones.
    """
    fluent = float(np.quantile(natural, FLUENT_QUANTILE))
    floor = float(np.median(scrambled))
    if not fluent > floor:
        raise UserError(
            f"mean_logprob gives shuffled answers {floor:.2f} and natural ones {fluent:.2f}; "
            "expected natural ones to be likelier: use the unsteered model and its own tokenizer"
        )
    shares = [distinct_share(answer) for answer in answers]
    return CoherenceScale(float(np.quantile(shares, NATURAL_SHARE_QUANTILE)), fluent, floor)


@dataclass(frozen=True)
class CoherenceScorer:
    """Scores coherence with a fitted scale.

    ``shuffled`` and ``looped`` hold how well held-out natural answers are told from their
    shuffled and from their looped versions.
    """

    scale: CoherenceScale
    mean_logprob: MeanLogprob
    shuffled: JudgeValidation
    looped: JudgeValidation

    @classmethod
    def fit(
        cls, exchanges: Sequence[Exchange], *, mean_logprob: MeanLogprob, judge_name: str, seed: int
    ) -> CoherenceScorer:
        """Calibrate on natural exchanges and on shuffled versions of their answers.

        ``mean_logprob`` is called twice, on as many exchanges as are given.
        """
        generator = random.Random(seed)
        answers = [exchange.answer for exchange in exchanges]
        salad = [
            Exchange(each.question, shuffled_words(each.answer, generator)) for each in exchanges
        ]
        natural = _finite(mean_logprob(exchanges), exchanges)
        scrambled = _finite(mean_logprob(salad), salad)
        scores = _held_out(answers, [each.answer for each in salad], natural, scrambled, seed)

        def told_from(kind: str, at: int) -> JudgeValidation:
            pairs = [(score, label) for label, of in ((100, 0), (0, at)) for score in scores[of]]
            criterion = f"{COHERENCE}: natural vs {kind}"
            verdicts = [Verdict(criterion, score, "", judge_name) for score, _ in pairs]
            return agreement(verdicts, [label for _, label in pairs])

        scale = fit_scale(answers, natural, scrambled)
        return cls(scale, mean_logprob, told_from("shuffled", 1), told_from("looped", 2))

    def verdicts(self, exchanges: Sequence[Exchange], judge_name: str) -> list[Verdict]:
        """Return one coherence verdict per exchange; an empty answer has no score."""
        filled = [exchange for exchange in exchanges if exchange.answer.strip()]
        values = iter(self.mean_logprob(filled) if filled else ())
        return [
            self._verdict(exchange, next(values), judge_name)
            if exchange.answer.strip()
            else Verdict(COHERENCE, None, EMPTY_REASON, judge_name)
            for exchange in exchanges
        ]

    def _verdict(self, exchange: Exchange, mean_logprob: float, judge_name: str) -> Verdict:
        if not np.isfinite(mean_logprob):
            reason = f"the answer's mean log probability is {mean_logprob}"
            return Verdict(COHERENCE, None, reason, judge_name)
        return Verdict(COHERENCE, self.scale.score(exchange.answer, mean_logprob), "", judge_name)


def _held_out(
    answers: Sequence[str],
    salad: Sequence[str],
    natural: Sequence[float],
    scrambled: Sequence[float],
    seed: int,
) -> list[tuple[float, ...]]:
    """Return held-out scores of natural, of shuffled and of looped answers, fold by fold.

    A loop gets its natural answer's own likelihood, though a loop is likelier: its variety alone
    has to give it away.
    """
    order = np.random.default_rng(seed).permutation(len(answers))
    scores = []
    for fold in range(FOLDS):
        held = order[fold::FOLDS].tolist()
        kept = sorted(set(range(len(answers))) - set(held))
        scale = fit_scale(
            [answers[at] for at in kept],
            [natural[at] for at in kept],
            [scrambled[at] for at in kept],
        )
        for at in held:
            texts = (answers[at], salad[at], looped_words(answers[at]))
            likely = (natural[at], scrambled[at], natural[at])
            scores.append([scale.score(*each) for each in zip(texts, likely, strict=True)])
    return list(zip(*scores, strict=True))


def _finite(values: Sequence[float], exchanges: Sequence[Exchange]) -> list[float]:
    """Return the values as floats; raises UserError for a wrong number of them, NaN or infinity."""
    floats = [float(value) for value in values]
    if len(floats) != len(exchanges) or not np.isfinite(floats).all():
        raise UserError(
            f"mean_logprob returned {len(floats)} values for {len(exchanges)} training answers, "
            "or values that are not finite; expected one finite number each"
        )
    return floats


Embed = Callable[[Sequence[str]], NDArray[np.floating]]


def relevance(exchanges: Sequence[Exchange], embed: Embed) -> list[float | None]:
    """Return 0–100 an answer: the share of other questions that are less like it than its own.

    Likeness is the cosine of sentence embeddings (``embed`` gives unit vectors); ties count half,
    so that an answer that could be to any question has 50 on average. None for an empty answer,
    and where all exchanges have one question.
    """
    questions = list(dict.fromkeys(each.question for each in exchanges))
    if len(questions) < 2:
        return [None] * len(exchanges)
    answered = [at for at, each in enumerate(exchanges) if each.answer.strip()]
    found: list[float | None] = [None] * len(exchanges)
    if not answered:
        return found
    likeness = embed([exchanges[at].answer for at in answered]) @ embed(questions).T
    place = {question: at for at, question in enumerate(questions)}
    for at, row in zip(answered, likeness, strict=True):
        own = place[exchanges[at].question]
        others = np.delete(row, own)
        share = np.mean(others < row[own]) + np.mean(others == row[own]) / 2
        found[at] = 100 * float(share)
    return found
