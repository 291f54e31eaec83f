"""The embedded default judge: no network, and independent of the model that is steered.

The trait's score is 100 · p(trait | question, answer) of a linear classifier over sentence
embeddings, fitted on the trait's own contrastive training answers;
coherence comes from repetition and from the likelihood under the unsteered model
(``coherence``). Refuses to know that model: it is given as a function.

The classifier. The embedding of a whole answer is mostly its topic. Two things bring out its
manner instead:

1. The answer is cut into clauses, and also into overlapping windows of six words; for each kind of
   passage x is the mean of the passages' unit embeddings.
2. What x shares with the question is removed: x − (x·q) q, with q the question's unit embedding.

Both parts side by side are the features of a logistic regression with an L2 penalty and without
standardisation: p(trait | question, answer) = σ(w·x + b).

The penalty is chosen by cross-validation over the training pairs; both answers of a pair are in
one fold, so that a question is never on both sides. Of all penalties whose log loss is within a
standard error of the smallest the strongest is taken (the one-standard-error rule; Hastie,
Tibshirani & Friedman 2009, §7.10), which keeps probabilities away from 0 and 1. Knows nothing of
labelled answers for validation, and never sees them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from persona_lora.core.chat import COHERENCE, Exchange, Verdict
from persona_lora.core.errors import UserError
from persona_lora.core.traits import ContrastivePair, Trait, load_pairs
from persona_lora.judges.coherence import EMPTY_REASON, CoherenceScorer, MeanLogprob
from persona_lora.judges.fitness import JudgeValidation, validate_judge, warn_if_untrusted
from persona_lora.judges.judge_prompts import check_criterion
from persona_lora.models.embeddings import SentenceEmbedder
from persona_lora.report.resampling import Array

logger = logging.getLogger(__name__)

FOLDS = 5
WINDOW_WORDS = 6
# scikit-learn's C. Means of unit vectors are short, so that the useful values are large.
INVERSE_PENALTIES = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)

_CLAUSE_END = re.compile(r"(?<=[.!?;:,])\s+")


def clauses(text: str) -> list[str]:
    """Cut a text after every punctuation mark that ends a sentence or a part of one."""
    return [part for part in _CLAUSE_END.split(text.strip()) if part]


def word_windows(text: str) -> list[str]:
    """Return the windows of six words of a text, each overlapping the next by three."""
    words, step = text.split(), WINDOW_WORDS // 2
    starts = range(0, max(1, len(words) - WINDOW_WORDS + step), step)
    return [" ".join(words[start : start + WINDOW_WORDS]) for start in starts]


PASSAGES: tuple[Callable[[str], list[str]], ...] = (clauses, word_windows)


@dataclass(frozen=True, eq=False)
class AnswerClassifier:
    """p(trait | exchange) = σ(weights · x + bias), with x as the module describes.

    ``weights``: ``[len(PASSAGES) · dimension]``. ``inverse_penalty`` and ``log_loss`` are the
    chosen one and its mean loss over held-out pairs.
    """

    embedder: SentenceEmbedder
    weights: Array
    bias: float
    inverse_penalty: float
    log_loss: float

    @classmethod
    def fit(
        cls,
        positives: Sequence[Exchange],
        negatives: Sequence[Exchange],
        *,
        embedder: SentenceEmbedder,
        seed: int,
    ) -> AnswerClassifier:
        """Fit to pairs: ``positives[i]`` and ``negatives[i]`` share a question.

        Raises UserError for fewer than five pairs, or an empty answer.
        """
        check_enough_pairs(len(positives))
        x = exchange_features([*positives, *negatives], embedder)
        labels = np.repeat([1, 0], len(positives))
        pair_of = np.tile(np.arange(len(positives)), 2)
        folds = GroupKFold(FOLDS, shuffle=True, random_state=seed)

        def held_out(inverse: float) -> Array:
            """Return the log loss of each pair, predicted while it was held out: ``[pairs]``."""
            losses = np.zeros(len(labels))
            for kept, held in folds.split(x, labels, pair_of):
                model = _regression(inverse).fit(x[kept], labels[kept])
                signed = np.where(labels[held] == 1, 1.0, -1.0) * model.decision_function(x[held])
                losses[held] = np.logaddexp(0.0, -signed)
            return losses.reshape(2, -1).mean(axis=0)

        # Matrices this small are fitted ten times slower by several threads than by one.
        with threadpool_limits(limits=1, user_api="blas"):
            losses = {inverse: held_out(inverse) for inverse in INVERSE_PENALTIES}
            chosen = _one_standard_error(losses)
            model = _regression(chosen).fit(x, labels)
        loss = float(losses[chosen].mean())
        return cls(embedder, model.coef_[0], float(model.intercept_[0]), chosen, loss)

    def probabilities(self, exchanges: Sequence[Exchange]) -> Array:
        """Return p(trait | exchange) for exchanges with non-empty answers: ``[len(exchanges)]``."""
        logits = exchange_features(exchanges, self.embedder) @ self.weights + self.bias
        return 1.0 / (1.0 + np.exp(-logits))


def check_enough_pairs(number: int) -> None:
    """Raise UserError for fewer pairs than the judge can be fitted to."""
    if number < FOLDS:
        raise UserError(
            f"{number} training pairs are too few for the embedding judge; it needs at least "
            f"{FOLDS}, and over a hundred to be good"
        )


def exchange_features(exchanges: Sequence[Exchange], embedder: SentenceEmbedder) -> Array:
    """Return the features x: ``[len(exchanges), len(PASSAGES) · dimension]``."""
    empty = [exchange.question for exchange in exchanges if not exchange.answer.strip()]
    if empty:
        raise UserError(f"the answer to {empty[0]!r} is empty; expected text to embed")
    questions = embedder.embed([exchange.question for exchange in exchanges]).astype(np.float64)
    answers = [exchange.answer for exchange in exchanges]
    parts = []
    for cut in PASSAGES:
        means = _mean_embeddings([cut(answer) for answer in answers], embedder)
        shared = (means * questions).sum(axis=1, keepdims=True)
        parts.append(means - shared * questions)
    return np.concatenate(parts, axis=1)


def _mean_embeddings(passages: Sequence[Sequence[str]], embedder: SentenceEmbedder) -> Array:
    """Return the mean embedding of each group of passages: ``[len(passages), dimension]``."""
    rows = iter(embedder.embed([text for each in passages for text in each]).astype(np.float64))
    means = [np.mean([next(rows) for _ in each], axis=0) for each in passages]
    return np.array(means).reshape(len(passages), embedder.dimension)


def _one_standard_error(losses: dict[float, Array]) -> float:
    """Return the smallest inverse penalty whose mean loss is within one SE of the best one's."""
    best = min(losses.values(), key=lambda each: float(each.mean()))
    bound = float(best.mean() + best.std(ddof=1) / np.sqrt(len(best)))
    return min(inverse for inverse, each in losses.items() if float(each.mean()) <= bound)


def _regression(inverse_penalty: float) -> LogisticRegression:
    return LogisticRegression(C=inverse_penalty, max_iter=5000)


CALIBRATION_PAIRS = 16


class EmbeddingValidation(NamedTuple):
    """Agreement with hand-written labels on the trait, and of coherence with known breakage."""

    trait: JudgeValidation
    shuffled: JudgeValidation
    looped: JudgeValidation


@dataclass(eq=False)
class EmbeddingJudge:
    """A classifier of answers and a coherence scorer, validated whenever they are put together.

    ``validation.trait`` is the agreement with the trait's ``judge_eval.jsonl``;
    ``validation.shuffled`` and ``validation.looped`` tell how well held-out natural answers get a
    higher coherence than their shuffled and looped versions. Each AUC under 0.8 is warned about.
    """

    trait: Trait
    classifier: AnswerClassifier
    coherence: CoherenceScorer
    name: ClassVar[str] = "embedding"

    def __post_init__(self) -> None:
        broken = self.coherence.shuffled, self.coherence.looped
        self.validation = EmbeddingValidation(validate_judge(self, self.trait), *broken)
        for each in broken:
            warn_if_untrusted(each)

    @classmethod
    def fit(
        cls,
        trait: Trait,
        *,
        embedder: SentenceEmbedder,
        mean_logprob: MeanLogprob,
        seed: int = 0,
        calibration_pairs: int = CALIBRATION_PAIRS,
    ) -> EmbeddingJudge:
        """Fit to the trait's training answers; equal seeds give equal judges.

        ``mean_logprob`` returns, for each exchange, the mean natural-log probability of the
        answer's tokens after its question under the **unsteered** model. Fitting calls it on both
        answers of ``calibration_pairs`` pairs, natural and shuffled. Raises UserError for too few
        pairs, or a ``mean_logprob`` that finds shuffled answers as likely as natural ones.
        """
        positives, negatives = exchanges_of(load_pairs(trait))
        classifier = AnswerClassifier.fit(positives, negatives, embedder=embedder, seed=seed)
        logger.info(
            "embedding judge for %s: held-out log loss %.3f at C = %g",
            trait.name,
            classifier.log_loss,
            classifier.inverse_penalty,
        )
        coherence = CoherenceScorer.fit(
            sampled(positives, negatives, calibration_pairs, seed),
            mean_logprob=mean_logprob,
            judge_name=cls.name,
            seed=seed,
        )
        return cls(trait, classifier=classifier, coherence=coherence)

    def judge(self, exchanges: Sequence[Exchange], criterion: str) -> list[Verdict]:
        """Return one verdict per exchange, in order; an empty answer is unscored."""
        check_criterion(self.trait, criterion)
        if criterion == COHERENCE:
            return self.coherence.verdicts(exchanges, self.name)
        filled = [exchange for exchange in exchanges if exchange.answer.strip()]
        scores = iter(100.0 * self.classifier.probabilities(filled))
        return [
            Verdict(criterion, float(next(scores)), "", self.name)
            if exchange.answer.strip()
            else Verdict(criterion, None, EMPTY_REASON, self.name)
            for exchange in exchanges
        ]


def exchanges_of(pairs: Sequence[ContrastivePair]) -> tuple[list[Exchange], list[Exchange]]:
    """Return the positive and the negative exchanges of pairs."""
    both = [
        [Exchange(pair.prompt[-1]["content"], said[-1]["content"]) for said in answers]
        for pair in pairs
        for answers in [(pair.positive, pair.negative)]
    ]
    return [yes for yes, _ in both], [no for _, no in both]


def sampled(
    positives: Sequence[Exchange], negatives: Sequence[Exchange], count: int, seed: int
) -> list[Exchange]:
    """Return the exchanges of both signs for ``count`` pairs (or all, if fewer), by ``seed``."""
    chosen = np.random.default_rng(seed).permutation(len(positives))[:count]
    return [sign[index] for index in chosen for sign in (positives, negatives)]
