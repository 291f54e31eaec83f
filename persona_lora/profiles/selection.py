"""Representative utterances of a persona: typical of it, and different from one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from persona_lora.core.errors import UserError
from persona_lora.profiles.features import words_of

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
