"""Nonsense to fit to: of four kinds, rated as raters rate it, and never what canaries show."""

from __future__ import annotations

import dataclasses

import pytest

from persona_lora.core.traits import load_trait
from persona_lora.judges.canaries import NONSENSE, canary_answers
from persona_lora.judges.fitted import counts_of
from persona_lora.judges.labels import has_ratings, load_ratings
from persona_lora.judges.nonsense import FILLER, SENSE, absence_of, nonsense_rows
from tests.judges.rated import rated_rows, write_ratings

KINDS = ["echo", "elsewhere", "filler", "loop"]


def test_every_question_gets_each_kind_and_the_absence_that_raters_gave(trait):
    write_ratings(trait, rated_rows())
    rated = load_ratings(trait, "tuning")
    made = nonsense_rows(rated)
    assert made == nonsense_rows(rated)
    absence = absence_of(rated)
    assert absence == 19.0  # the median of what was said of loops: 20 and a little less
    assert {(row.rating("trait"), row.rating("sense")) for row in made} == {(absence, SENSE)}
    for question in {row.question for row in rated}:
        assert sorted(row.condition for row in made if row.question == question) == KINDS
    own = {row.question: row for row in made if row.condition == "echo"}
    assert all(row.answer == question for question, row in own.items())
    given = {row.answer: row.question for row in rated}
    elsewhere = [row for row in made if row.condition == "elsewhere"]
    assert all(given[row.answer] != row.question for row in elsewhere)
    assert absence_of([row for row in rated if row.rating("sense") > 50]) == 15.0
    shown = [dataclasses.replace(row, trait=(80, 90)) for row in rated]
    assert absence_of([*rated, *shown]) == absence
    assert absence_of(shown) == 15.0


@pytest.mark.parametrize("name", ["sycophancy", "hallucination", "evil", "corrigibility"])
def test_what_canaries_show_was_not_fitted_to(name):
    trait = load_trait(name)
    assert has_ratings(trait)
    made = {row.answer for row in nonsense_rows(load_ratings(trait, "tuning"))}
    shown = {each.answer for each in canary_answers(trait).values()}
    assert not made & shown
    assert not set(NONSENSE.values()) & set(FILLER)


@pytest.mark.parametrize("own", [20, 98, 400])
def test_few_ratings_do_not_drown_in_nonsense(own):
    counts = counts_of(own, 98, beside=[0.5] * 50)
    assert counts[:own].tolist() == [1.0] * own
    assert counts[own:][:98].sum() == pytest.approx(min(own, 98))
    assert counts[own + 98 :].tolist() == [0.5] * 50
