"""Judges without a network: linear probes on what an unsteered model makes of an answer.

Of two families: ``ReaderEvidence`` is how a language model reads an answer, ``SentenceEvidence``
what a sentence embedder makes of question and answer. Neither knows of the other; scoring,
abstention and the agreement with rated answers are the same. Refuses to know the models whose
answers it scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Literal

import numpy as np

from persona_lora.core.chat import COHERENCE, Exchange, Verdict
from persona_lora.core.content import digest_of
from persona_lora.core.traits import Trait
from persona_lora.judges.answer_states import Reader
from persona_lora.judges.coherence import EMPTY_REASON
from persona_lora.judges.fitness import own_agreement, warn_if_untrusted
from persona_lora.judges.fitted import (
    Array,
    Evidence,
    FittedProbes,
    Scores,
    cache_folder,
    fitted_probes,
)
from persona_lora.judges.judge_prompts import check_criterion
from persona_lora.judges.labels import SCALES, RatedAnswer, Scale, load_ratings
from persona_lora.models.embeddings import SentenceEmbedder, embedder_content

# Scores of 0–100 from which an answer shows a trait, or its opposite, and makes sense at all.
SHOWS, OPPOSITE, SENSIBLE = 60.0, 40.0, 30.0

Outcome = Literal["shows it", "opposite", "neither"]


@dataclass(frozen=True, eq=False)
class ReaderEvidence:
    """The states with which a language model reads an answer."""

    reader: Reader
    name: ClassVar[str] = "reader"

    @property
    def trait(self) -> Trait:
        """The reader's trait."""
        return self.reader.trait

    def beside(self, trait: Trait) -> ReaderEvidence:
        """Return what the same model makes of another trait."""
        return ReaderEvidence(Reader(self.reader.chat_model, trait))

    def content(self, exchanges: Sequence[Exchange]) -> str:
        """Return a digest of model and prompts."""
        return self.reader.content(exchanges)

    def read(self, exchanges: Sequence[Exchange], *, keep: bool = False) -> Array:
        """Return states; what is to be kept is in the user's cache folder."""
        if keep:
            return self.reader.kept_states(exchanges, cache_folder())
        return self.reader.states(exchanges)


@dataclass(frozen=True)
class SentenceEvidence:
    """Sentence embeddings of question and answer."""

    trait: Trait
    name: ClassVar[str] = "sentences"

    def beside(self, trait: Trait) -> SentenceEvidence:
        """Return the same: an embedding knows of no trait."""
        return replace(self, trait=trait)

    def content(self, exchanges: Sequence[Exchange]) -> str:
        """Return a digest of texts and embedder."""
        return digest_of([embedder_content(), [[each.question, each.answer] for each in exchanges]])

    def read(self, exchanges: Sequence[Exchange], *, keep: bool = False) -> Array:
        """Return q, a and q·a (entry by entry), ``[n, 1, 3 · dimension]``; they cost no keeping."""
        texts = ([e.question for e in exchanges], [e.answer for e in exchanges])
        asked, said = (_embedder().embed(each).astype(np.float64) for each in texts)
        return np.concatenate([asked, said, asked * said], axis=1)[:, None]


@cache
def _embedder() -> SentenceEmbedder:
    return SentenceEmbedder()


@dataclass(eq=False)
class ProbeJudge:
    """Scores the trait and coherence with fitted probes; both from one reading of an answer.

    ``validation`` is the agreement with the validation part of the trait's rated answers.
    """

    evidence: Evidence
    fitted: FittedProbes
    labels: Sequence[RatedAnswer]

    def __post_init__(self) -> None:
        self.name, self.trait = self.evidence.name, self.evidence.trait
        self._known: dict[Exchange, dict[str, Verdict]] = {}
        said = self._said(self.fitted.scores, self.fitted.distances)
        unseen = [p for p in zip(said, self.labels, strict=True) if p[1].part == "validation"]
        rows = [row for _, row in unseen]
        self.validation = tuple(
            own_agreement([verdicts[criterion] for verdicts, _ in unseen], rows)
            for criterion in (self.trait.name, COHERENCE)
        )
        for each in self.validation:
            warn_if_untrusted(each)

    @classmethod
    def of(cls, evidence: Evidence, labels: Sequence[RatedAnswer] | None = None) -> ProbeJudge:
        """Return the judge of rated answers, by default the trait's; fitted where it never was."""
        labels = load_ratings(evidence.trait) if labels is None else labels
        return cls(evidence, fitted_probes(evidence, labels), labels)

    def judge(self, exchanges: Sequence[Exchange], criterion: str) -> list[Verdict]:
        """Return one verdict per exchange, in order; empty and unfamiliar answers are unscored.

        The reason of a scored one is its outcome: "shows it", "opposite", or "neither" (no sense).
        """
        check_criterion(self.trait, criterion)
        filled = [each for each in dict.fromkeys(exchanges) if each.answer.strip()]
        new = [each for each in filled if each not in self._known]
        if new:
            read = self.evidence.read(new)
            said = self._said(self.fitted.predict(read), self.fitted.strangeness(read))
            self._known |= zip(new, said, strict=True)
        return [
            self._known[each][criterion]
            if each.answer.strip()
            else Verdict(criterion, None, EMPTY_REASON, self.name)
            for each in exchanges
        ]

    def _said(
        self, scores: Mapping[Scale, Scores], distances: Scores
    ) -> Iterator[dict[str, Verdict]]:
        """Yield the verdicts on both criteria, answer by answer."""
        limit = self.fitted.familiarity.limit
        by_scale = [scores[scale].tolist() for scale in SCALES]
        for trait, sense, distance in zip(*by_scale, distances.tolist(), strict=True):
            far = f"distance {distance:.1f}, limit {limit:.1f}"
            strange = f"unlike all answers that were rated ({far})" if distance > limit else None
            yield {
                criterion: Verdict(criterion, None, strange, self.name)
                if strange
                else Verdict(criterion, score, outcome(trait, sense), self.name)
                for criterion, score in ((self.trait.name, trait), (COHERENCE, sense))
            }


def outcome(trait: float, sense: float) -> Outcome:
    """Return what an answer does with a trait, by its scores on both scales (or its ratings)."""
    if sense < SENSIBLE or OPPOSITE < trait < SHOWS:
        return "neither"
    return "shows it" if trait >= SHOWS else "opposite"
