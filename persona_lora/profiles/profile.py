"""A persona in a few plain sentences, and in utterances that are typical of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from persona_lora.core.errors import UserError
from persona_lora.profiles.features import Features, words_of

Steps = tuple[tuple[float, str], ...]

LENGTH: Steps = (
    (8, "speaks in very short utterances"),
    (15, "keeps utterances short"),
    (28, "speaks in utterances of middling length"),
    (1e9, "speaks at length, in long utterances"),
)
FORMALITY: Steps = (
    (0.15, "very casually"),
    (0.4, "casually"),
    (0.58, "neither formally nor casually"),
    (0.75, "rather formally"),
    (1e9, "very formally"),
)
SENTIMENT: Steps = (
    (-0.15, "The tone is gloomy or critical."),
    (0.05, "The tone is level and matter-of-fact."),
    (0.3, "The tone is friendly."),
    (1e9, "The tone is very positive and warm."),
)


def describe(features: Features) -> str:
    """Return the profile: sentences on length, register, focus, tone, manner and relations."""
    sentences = [
        f"This person {_step(features.avg_words, LENGTH)} (about {features.avg_words:.0f} words) "
        f"and writes {_step(features.formality, FORMALITY)}.",
        _focus(features),
        _step(features.sentiment, SENTIMENT),
        *_manners(features),
        *_relations(features),
    ]
    return " ".join(sentence for sentence in sentences if sentence) + "\n"


def _step(value: float, steps: Steps) -> str:
    return next(text for limit, text in steps if value < limit)


def _focus(features: Features) -> str:
    own, other = features.first_person_singular_rate, features.second_person_rate
    if own > 0.05 and own > 3 * other:
        return "Talk is mostly about the person's own life and thoughts."
    if other > 0.05 and other > own:
        return "Attention goes to the other person more than to the self."
    if own < 0.03:
        return "The person hardly speaks of the self."
    return "The person speaks of the self as much as most people do."


def _manners(features: Features) -> list[str]:
    """Return what stands out, strongest thresholds first; nothing for what is ordinary."""
    found = (
        (features.question_rate > 0.35, "Asks many questions."),
        (features.question_rate < 0.04, "Hardly ever asks a question."),
        (features.exclamation_rate > 0.3, "Uses many exclamation marks."),
        (features.lower_case_rate > 0.6, "Types in lower case."),
        (features.humor_rate > 0.12, "Jokes and laughs a lot."),
        (features.hedge_rate > 0.02, "Hedges: perhaps, probably, I suppose."),
        (features.past_rate > 0.1, "Tells of the past: memories and stories."),
        (features.advice_rate > 0.018, "Gives practical advice and solves problems."),
        (features.empathy_rate > 0.025, "Shows feeling for others."),
        (features.emotionality > 0.5, "Words carry strong emotion."),
        (features.contraction_rate < 0.005, "Avoids contractions."),
    )
    return [sentence for holds, sentence in found if holds]


def _relations(features: Features) -> list[str]:
    counts = features.relationship_contexts
    often = sorted(counts, key=lambda name: (-counts[name], name))[:2]
    return [f"Mentions {' and '.join(often)} most among relations."] if often else []


Embed = Callable[[Sequence[str]], NDArray[np.float32]]

SHORTEST = 4  # words; "Yes, indeed." says little about anyone
TYPICALITY = 0.6


def select_samples(
    utterances: Sequence[str], embed: Embed, *, number: int = 10, typicality: float = TYPICALITY
) -> list[str]:
    """Return up to ``number`` utterances by maximal marginal relevance, in their own order.

    The next one maximises t·cos(u, centroid) − (1 − t)·max cos(u, chosen) over unit embeddings
    (Carbonell & Goldstein 1998): typical, and unlike those chosen before. Equal utterances count
    once, ties go to the earlier one, so the choice is deterministic. Utterances of under four
    words are taken only where there are too few longer ones.
    """
    if number < 1 or not 0 <= typicality <= 1:
        raise UserError(
            f"samples: number must be at least 1 and typicality in [0, 1], got {number} and "
            f"{typicality}"
        )
    distinct = list(dict.fromkeys(utterances))
    long = [text for text in distinct if len(words_of(text)) >= SHORTEST]
    pool = long if len(long) >= number else distinct
    if not pool:
        raise UserError("there are no utterances to choose samples from")
    vectors = embed(pool)  # [n, size], unit rows
    centroid = vectors.mean(axis=0)
    typical = vectors @ (centroid / max(float(np.linalg.norm(centroid)), 1e-9))
    nearest = np.zeros(len(pool))
    chosen: list[int] = []
    while len(chosen) < min(number, len(pool)):
        scores = typicality * typical - (1 - typicality) * nearest
        scores[chosen] = -np.inf
        best = int(np.argmax(scores))
        chosen.append(best)
        similar = vectors @ vectors[best]
        nearest = similar if len(chosen) == 1 else np.maximum(nearest, similar)
    return [pool[index] for index in sorted(chosen)]
