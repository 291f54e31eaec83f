"""The floors and the ceiling of a fit: answers of a person that need no model at all.

- *canned*: the person's most typical training utterance, said to every prompt;
- *retrieval*: the training utterance that is most like the prompt;
- *salad*: words of the training utterances in any order, as many as an utterance has;
- *real*: held-out utterances, as answers to the lines that came before them.

A measure of a voice is worth something where the real utterances stand on top, and canned and salad
below the unsteered model (``read_fits.order_line``). Refuses to know how they are judged.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from persona_lora.core.chat import Exchange
from persona_lora.core.personas import Persona
from persona_lora.judges.coherence import Embed
from persona_lora.profiles.folders import select_samples
from persona_lora.studies.personas.read_fits import CANNED, REAL, RETRIEVAL, SALAD


def bound_answers(
    persona: Persona, prompts: Sequence[str], embed: Embed
) -> dict[str, list[Exchange]]:
    """Return the answers of each bound: to the prompts, and the real ones to their own.

    At most as many real ones as there are prompts; none for a person whose held-out utterances
    all begin their conversations.
    """
    told = list(persona.utterances("train"))
    (typical,) = select_samples(told, embed, number=1, typicality=1.0)
    nearest = (embed(prompts) @ embed(told).T).argmax(axis=1)
    drawn = random.Random(persona.id)
    words = [word for text in told for word in text.split()]
    lengths = [len(text.split()) for text in told]
    salads = [
        " ".join(drawn.sample(words, min(drawn.choice(lengths), len(words)))) for _ in prompts
    ]
    return {
        CANNED: [Exchange(prompt, typical) for prompt in prompts],
        RETRIEVAL: [Exchange(q, told[int(at)]) for q, at in zip(prompts, nearest, strict=True)],
        SALAD: list(map(Exchange, prompts, salads)),
        REAL: persona.answers("test")[: len(prompts)],
    }
