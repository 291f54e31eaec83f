"""The embedded default judge: no network, and independent of the model that is steered.

The trait's score is 100 · p(trait | question, answer) of a linear classifier over sentence
embeddings, fitted on the trait's own contrastive training answers (``answer_classifier``);
coherence comes from repetition and from the likelihood under the unsteered model
(``coherence``). Refuses to know that model: it is given as a function.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from persona_lora.core.chat import COHERENCE, Exchange, Verdict
from persona_lora.core.traits import ContrastivePair, Trait, load_pairs
from persona_lora.judges.answer_classifier import AnswerClassifier
from persona_lora.judges.coherence import EMPTY_REASON, CoherenceScorer, MeanLogprob
from persona_lora.judges.judge_prompts import check_criterion
from persona_lora.judges.judging import JudgeValidation, validate_judge, warn_if_untrusted
from persona_lora.models.embeddings import SentenceEmbedder

logger = logging.getLogger(__name__)

CALIBRATION_PAIRS = 16


class EmbeddingValidation(NamedTuple):
    """Agreement with hand-written labels on the trait, and of coherence with known breakage."""

    trait: JudgeValidation
    shuffled: JudgeValidation
    looped: JudgeValidation


class EmbeddingJudge:
    """A classifier of answers and a coherence scorer, validated whenever they are put together.

    ``validation.trait`` is the agreement with the trait's ``judge_eval.jsonl``;
    ``validation.shuffled`` and ``validation.looped`` tell how well held-out natural answers get a
    higher coherence than their shuffled and looped versions. Each AUC under 0.8 is warned about.
    """

    name = "embedding"

    def __init__(
        self, trait: Trait, *, classifier: AnswerClassifier, coherence: CoherenceScorer
    ) -> None:
        self.trait = trait
        self.classifier = classifier
        self.coherence = coherence
        self.validation = EmbeddingValidation(
            validate_judge(self, trait), coherence.shuffled, coherence.looped
        )
        warn_if_untrusted(coherence.shuffled)
        warn_if_untrusted(coherence.looped)

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
        pairs = load_pairs(trait)
        positives, negatives = _exchanges(pairs)
        classifier = AnswerClassifier.fit(positives, negatives, embedder=embedder, seed=seed)
        logger.info(
            "embedding judge for %s: held-out log loss %.3f at C = %g",
            trait.name,
            classifier.log_loss,
            classifier.inverse_penalty,
        )
        coherence = CoherenceScorer.fit(
            _sample([positives, negatives], calibration_pairs, seed),
            mean_logprob=mean_logprob,
            judge_name=cls.name,
            seed=seed,
        )
        return cls(trait, classifier=classifier, coherence=coherence)

    def judge(self, exchanges: Sequence[Exchange], criterion: str) -> list[Verdict]:
        """Return one verdict an exchange, in order; an empty answer is unscored."""
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


def _exchanges(pairs: Sequence[ContrastivePair]) -> tuple[list[Exchange], list[Exchange]]:
    """Return the positive and the negative exchanges of pairs."""
    questions = [pair.prompt[-1]["content"] for pair in pairs]
    positives = [pair.positive[-1]["content"] for pair in pairs]
    negatives = [pair.negative[-1]["content"] for pair in pairs]
    return (
        [Exchange(*each) for each in zip(questions, positives, strict=True)],
        [Exchange(*each) for each in zip(questions, negatives, strict=True)],
    )


def _sample(signs: Sequence[Sequence[Exchange]], count: int, seed: int) -> list[Exchange]:
    """Return the exchanges of both signs for ``count`` pairs (or all, if fewer), by ``seed``."""
    chosen = np.random.default_rng(seed).permutation(len(signs[0]))[:count]
    return [sign[index] for index in chosen for sign in signs]
