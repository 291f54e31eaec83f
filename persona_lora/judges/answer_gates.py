"""Does an answer count? What must hold before the fit of its manner is believed.

A judge of style is content with a sentence of the person's own, whatever was asked, and with the
person's words in any order. So an answer counts as the worst fit, 1, where it

- is a *copy*: half of its word trigrams stand in the utterances that the person was learnt from;
- is an *echo*: half of them stand in the prompt that it answers;
- is a *repeat*: half of them stand in the same speaker's answers to other prompts;
- is *broken*: its coherence is under ``BROKEN``;
- is *off topic*: half of the other prompts are more like it than its own (its relevance is under
  ``OFF_TOPIC``).

Refuses to know how fit, coherence and relevance are measured, and whether the answer is true.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from persona_lora.core.chat import Exchange
from persona_lora.judges.style_judge import LOWEST
from persona_lora.profiles.features import words_of

NGRAM = 3
SHARED = 0.5
BROKEN = 60.0
OFF_TOPIC = 50.0
THRESHOLDS = {"shared": SHARED, "coherence": BROKEN, "relevance": OFF_TOPIC}
Gram = tuple[str, ...]


def grams_of(text: str) -> list[Gram]:
    """Return the word trigrams of a text; a shorter text is one gram."""
    words = words_of(text)
    size = min(NGRAM, len(words))
    return [tuple(words[at : at + size]) for at in range(len(words) - size + 1)] if words else []


def shared(text: str, known: Collection[Gram]) -> float:
    """Return the share of a text's grams that are known; 0 for a text without words."""
    grams = grams_of(text)
    return sum(gram in known for gram in grams) / len(grams) if grams else 0.0


def failures(
    exchanges: Sequence[Exchange],
    learnt_from: Sequence[str],
    coherence: Sequence[float | None],
    relevance: Sequence[float | None],
) -> list[str]:
    """Return what is wrong with each of one speaker's answers, "" for one that counts.

    ``coherence`` and ``relevance`` have a number for each, or are empty where not measured.
    """
    own = {gram for text in learnt_from for gram in grams_of(text)}
    told = Counter(gram for each in exchanges for gram in set(grams_of(each.answer)))
    again = {gram for gram, answers in told.items() if answers > 1}
    none = [None] * len(exchanges)
    measured = zip(exchanges, coherence or none, relevance or none, strict=True)

    def failure(exchange: Exchange, coherent: float | None, relevant: float | None) -> str:
        taken = {"copy": own, "echo": set(grams_of(exchange.question)), "repeat": again}
        for name, known in taken.items():
            if shared(exchange.answer, known) >= SHARED:
                return name
        if coherent is not None and coherent < BROKEN:
            return "broken"
        return "off topic" if relevant is not None and relevant < OFF_TOPIC else ""

    return [failure(*each) for each in measured]


def counted(score: float | None, failure: str) -> float | None:
    """Return the fit of an answer that counts, and the worst one where something is wrong."""
    return LOWEST if score is not None and failure else score
