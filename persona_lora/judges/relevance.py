"""Relevance of an answer: is it nearer to its own question than to the other questions asked?

A judge of style or of a trait asks how something is said. Steered far enough, a model says the
same whatever it is asked, and such a judge is content; this measure is not. Knows questions and
answers; refuses to know how texts become vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from persona_lora.core.chat import Exchange

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
