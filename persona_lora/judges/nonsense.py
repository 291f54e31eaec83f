"""Answers that make no sense, made from rated ones: what a judge is taught to give nothing for.

Models seldom give such answers to those who rate, so that a judge fitted to rated ones alone takes
an echo of the question, or filler, for anything. Refuses to know the canaries: what every judge is
shown must not be what one was fitted to.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np

from persona_lora.judges.labels import RatedAnswer

MADE = "made up"
SENSE = 8.0  # what the guidelines leave for text that does not answer
SENSELESS = 25.0
SHOWN = 60.0
NO_TRAIT = 15.0
LOOP_WORDS = 45
FILLER = (
    "Quisque nec velit non arcu pretium faucibus, vivamus a lectus eget purus viverra dictum.",
    "Der Zug nach Augsburg fährt heute von Gleis sieben, bitte beachten Sie die Anzeige.",
    "Le marché ouvre à huit heures; les tomates et le fromage se trouvent au fond de la halle.",
    "La biblioteca cierra los lunes y la entrada se encuentra al lado de la plaza.",
    "Preheat the oven to 180 degrees, sift the flour, and fold in the beaten egg whites.",
    "for i in range(10): total += values[i] * 2; print(total); return None",
    "Tomorrow: cloudy in the north, light rain towards evening, wind from the west, 12 degrees.",
    "asdf jkl qwer uiop zxcv bnm, hjkl fdsa poiu rewq mnb vcxz.",
    "The museum has four floors. Coats are left on the first, and the lift is behind the stairs.",
    "blue seven window the of running quickly table under and lamp because green often paper",
    "Item 14: two boxes of screws, one roll of tape, three metres of cable, no returns.",
    "... ... ??? !!! ... 1 2 3 4 5 6 7 8 9 10 ... ... ???",
)


def nonsense_rows(
    rows: Sequence[RatedAnswer], beside: Sequence[RatedAnswer] = ()
) -> list[RatedAnswer]:
    """Return senseless answers to the questions of rows, of four kinds (their ``condition``).

    To every question an echo of it, filler, an answer to another question (one ``beside`` may be
    of another trait) and a clause of an answer over and over. On the trait they get what raters
    gave to what makes no sense: the middle, where a trait has two sides. Equal rows give equal
    nonsense. Rows are of two questions at least.
    """
    absence = absence_of(rows)
    chance = random.Random(0)
    questions = list(dict.fromkeys(row.question for row in rows))
    return [
        RatedAnswer(question, answer, MADE, kind, "tuning", (absence,) * 2, (SENSE,) * 2)
        for at, question in enumerate(questions)
        for kind, answer in _answers(question, at, [*rows, *beside], chance)
    ]


def absence_of(rows: Sequence[RatedAnswer]) -> float:
    """Return what raters gave on the trait to answers without sense, their median.

    Those that show the trait all the same (a loop of its sentences) are left out.
    """
    senseless = [row.rating("trait") for row in rows if row.rating("sense") <= SENSELESS]
    absent = [each for each in senseless if each < SHOWN]
    return float(np.median(absent)) if absent else NO_TRAIT


def _answers(
    question: str, at: int, rows: Sequence[RatedAnswer], chance: random.Random
) -> Iterator[tuple[str, str]]:
    others = [row.answer for row in rows if row.question != question]
    own = [row.answer for row in rows if row.question == question]
    yield "echo", question
    yield "filler", FILLER[at % len(FILLER)]
    yield "elsewhere", chance.choice(others)
    words = chance.choice(own if at % 2 else others).split()
    start, size = chance.randrange(max(1, len(words) - 6)), chance.randint(2, 7)
    clause = " ".join(words[start : start + size])
    yield "loop", " ".join([clause] * (LOOP_WORDS // len(clause.split())))
