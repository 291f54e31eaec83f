"""Floors, ceiling and what is said of fits: orders that a reader must be warned of."""

from __future__ import annotations

import numpy as np
import pytest

from persona_lora.core.chat import Exchange
from persona_lora.core.options import ObjectiveOptions
from persona_lora.core.personas import Persona, PersonaConversation
from persona_lora.report.comparisons import fits_over_personas
from persona_lora.report.resampling import EQUAL
from persona_lora.studies.personas.bounds import bound_answers
from persona_lora.studies.personas.read import _lead
from persona_lora.studies.personas.read_fits import (
    BOUNDS,
    agreement_line,
    condition_fits,
    constraints_line,
    order_line,
    over_personas,
    over_prompts,
    seeds_line,
)

PROMPTS = ("Did it rain?", "Any plans?", "Why?")


def person(tmp_path):
    def talk(split, lines):
        said = [("assistant", f"line {at}") if at % 2 else ("user", text) for at, text in lines]
        messages = [{"role": role, "content": text} for role, text in said]
        return PersonaConversation(split, split, messages)

    train = talk("train", [(0, "rain fell on us"), (1, ""), (2, "plans are for fools"), (3, "")])
    test = talk("test", [(0, "first of all"), (1, ""), (2, "so i said"), (3, ""), (4, "and so on")])
    return Persona("ann", tmp_path, (train, test))


def embed(texts):
    vectors = np.array([["rain" in t, "plans" in t, 0.1 + ("why" in t.lower())] for t in texts])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_floors_and_ceiling_are_made_of_what_the_person_said(tmp_path):
    bounds = bound_answers(person(tmp_path), PROMPTS, embed)
    assert tuple(bounds) == BOUNDS
    assert len({each.answer for each in bounds["canned"]}) == 1
    nearest = [each.answer for each in bounds["retrieval"]]
    assert nearest[:2] == ["rain fell on us", "plans are for fools"]
    words = {"rain", "fell", "on", "us", "plans", "are", "for", "fools"}
    assert all(set(each.answer.split()) <= words for each in bounds["salad"])
    assert bounds["salad"] == bound_answers(person(tmp_path), PROMPTS, embed)["salad"]
    assert bounds["real"] == [Exchange("line 1", "so i said"), Exchange("line 3", "and so on")]


def rows(fits, *, coherence=90.0, persona="ann", **more):
    return [
        {"persona": persona, "condition": name, "prompt_id": at, "score": fit, "failed": "",
         "coherence": coherence, "relevance": 90.0, **more}
        for name, fit in fits.items()
        for at in range(3)
    ]  # fmt: skip


GOOD = {"none": 2.0, "mean": 3.0, "canned": 1.0, "retrieval": 1.0, "salad": 1.2, "real": 4.4}


def test_a_fit_that_orders_the_bounds_is_said_to():
    assert order_line(condition_fits(rows(GOOD))).startswith("Canned and salad stand below")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"canned": 4.8}, "canned is not below unsteered"),
        ({"salad": 2.0}, "salad is not below unsteered"),
        ({"real": 2.5}, "mean is above real utterances"),
    ],
)
def test_a_fit_that_does_not_warns_first(change, said):
    line = order_line(condition_fits(rows({**GOOD, **change})))
    assert line.startswith("WARNING: do not trust this fit")
    assert said in line


def test_without_bounds_nothing_is_known():
    line = order_line(condition_fits(rows({"none": 2.0, "mean": 3.0})))
    assert line.startswith("WARNING: without floors")


def test_bounds_are_not_corrected_for():
    alone = condition_fits(rows({"none": 2.0, "mean": 3.0}))
    beside = {each.condition: each for each in condition_fits(rows(GOOD))}
    assert beside["mean"].p_holm == alone[1].p_holm
    assert beside["canned"].p_holm is None
    assert beside["canned"].difference.mean == -1.0


def test_divergence_is_over_tokens_as_it_is_where_a_search_limits_it():
    told = [*rows({"none": 2.0}), *rows({"lora": 3.0})]
    for row, (kl, tokens) in zip(told[3:], ((0.1, 30), (0.9, 2), (0.0, 0)), strict=True):
        row |= {"kl": kl, "kl_tokens": tokens}
    lora = condition_fits(told, ObjectiveOptions(max_kl=0.2))[1]
    assert lora.kl == pytest.approx(0.15)  # over answers it would be a third
    assert lora.feasible == 1.0
    for row in told[3:]:
        row["kl_tokens"] = 0
    assert condition_fits(told)[1].kl is None


def test_constraints_on_what_was_not_measured_are_neither_kept_nor_broken():
    told = [*rows({"prompt": 3.0, **GOOD}), *rows({"lora": 3.0}, kl=0.1, kl_tokens=5)]
    told += rows({"random": 3.0}, kl=0.0, kl_tokens=0)  # empty answers
    limits = ObjectiveOptions(min_coherence=80.0, max_kl=0.2)
    found = {each.condition: each.feasible for each in condition_fits(told, limits)}
    assert (found.pop("lora"), found.pop("random")) == (1.0, 1.0)
    assert set(found.values()) == {None}
    unknown = condition_fits(told, limits)[0]
    assert constraints_line(unknown) == "Not every constraint was measured on held-out prompts."
    low = [dict(row, coherence=10.0) for row in told if row["condition"] == "prompt"]
    found = next(e for e in condition_fits([*rows({"none": 2.0}), *low], limits) if e.feasible == 0)
    assert found.condition == "prompt"  # by what was measured
    assert constraints_line(found).startswith("WARNING")
    twice = [*rows({"none": 2.0, "lora": 3.0}, kl=0.1, seed=0), *rows({"lora": 3.0}, seed=1)]
    assert [each.feasible for each in condition_fits(twice, limits)] == [1.0, None]
    assert limits.violation(90.0, None) > 0


def test_searches_that_break_their_constraints_on_held_out_prompts_are_counted():
    limits = ObjectiveOptions(min_coherence=80.0)
    told = [
        *rows({"none": 2.0, "lora": 3.0}, seed=0),
        *rows({"lora": 3.0}, coherence=70.0, seed=1),
        *rows({"lora": 3.0}, coherence=79.0, persona="bob", seed=0),
        *rows({"lora": 3.0}, coherence=81.0, persona="bob", seed=1),
    ]
    plain, lora = condition_fits(told, limits, over=fits_over_personas)
    assert (plain.feasible, lora.feasible) == (1.0, 0.5)
    assert "in 50% of searches" in constraints_line(lora)
    assert constraints_line(plain) == "It keeps the constraints on held-out prompts."
    assert condition_fits(told)[0].feasible is None
    assert seeds_line(rows(GOOD, seed=3)) == "One seed."
    assert seeds_line(told) == "2 seeds of the search; the directions are of one training."
    trained = [{**row, "trained": f"seed{row['seed']}"} for row in told]
    assert seeds_line(trained) == "2 seeds, of the search and of the differences' training."


def test_a_gain_over_seeds_is_as_uncertain_as_they_differ():
    def told(*gains):
        found = [dict(row, seed=0) for row in rows({"none": 2.0})]
        for seed, gain in enumerate(gains):
            found += rows({"mean": 2.0 + gain}, seed=seed)
        return condition_fits(found)[1]

    one, alike, apart = told(1.0), told(1.0, 1.0, 1.0), told(0.0, 1.0, 2.0)
    assert one.p is not None
    assert (alike.difference.low, alike.difference.reason, alike.p) == (None, EQUAL, 2**-2)
    assert apart.difference.mean == 1.0
    assert apart.difference.low < 0.5
    assert apart.difference.high > 1.5


def test_answers_that_count_are_shared_out_and_unknown_where_nobody_looked():
    told = rows({"none": 2.0, "mean": 3.0})
    told[4]["failed"] = "copy"
    plain, mean = condition_fits(told)
    assert (plain.counted, mean.counted) == (1.0, pytest.approx(2 / 3))
    for row in told:
        del row["failed"]
    assert condition_fits(told)[0].counted is None


def test_judges_that_disagree_on_a_gain_are_warned_of():
    def told(gain):
        found = rows({"none": 2.0, "mean": 3.0})
        for at, row in enumerate(found):
            row["score"] += row["prompt_id"] / 10
            own = gain + (row["prompt_id"] - 1) / 50  # equal gains have no interval
            row["searched_by"] = 3.0 + row["prompt_id"] / 5 + (own if at > 2 else 0.0)
        return found

    assert agreement_line(told(0.5)).endswith("disagree on the sign of no gain.")
    assert "ρ 1.00" in agreement_line(told(0.5))
    opposed = agreement_line(told(-0.5))
    assert opposed.startswith("WARNING: the two judges disagree on the sign of a gain (mean: 1.00")
    assert "-0.50 [-0.5" in opposed.replace("−", "-")
    assert "one family" in agreement_line(rows(GOOD))
    unclear = told(0.1)  # neither interval is clear of 0: signs differ by chance
    for at, row in enumerate(unclear[3:]):
        row["score"], row["searched_by"] = 2.1 + at % 2, 3.5 - at % 2
    assert "no gain" in agreement_line(unclear)
    assert "nothing can be said" in agreement_line(told(0.5)[3:])


def test_the_lead_of_a_page_begins_with_a_sign_that_two_families_disagree_on():
    found = rows(GOOD | {"mean": 3.0})
    for row in found:
        lower = (row["condition"] == "mean") * (1 + (row["prompt_id"] - 1) / 50)
        row["searched_by"] = 3.0 - lower + row["prompt_id"] / 5
        row["score"] += row["prompt_id"] / 10
    lead = _lead(found, condition_fits(found), "mean")
    assert lead.startswith("WARNING: the two judges disagree on the sign of a gain (")
    assert "mean: 1.00" in lead.split(")")[0]
    for row in found:
        row["searched_by"] = row["score"]
    lead = _lead(found, condition_fits(found), "mean")
    assert not lead.startswith("WARNING")
    assert "have ρ 1.00. They disagree on the sign of no gain." in lead
    others = [{**row, "persona": "bob"} for row in found]
    assert "no gain" in agreement_line([*found, *others])


def of_trainings(random, luck, persons=8):
    """Rows of persons: a gain of 1, the luck of each training, each person's own, and the rest."""
    own = random.normal(0, 0.3, persons)
    for person, gain in enumerate(own):
        told = [("none", "", 2.0)]
        for at, lucky in enumerate(luck):
            rest = random.normal(0, 0.1)
            told += [("lora", f"seed{at}", 3.0 + gain + lucky + rest), ("random", f"seed{at}", 2.5)]
        for condition, trained, score in told:
            yield {
                "persona": f"p{person}",
                "condition": condition,
                "prompt_id": 0,
                "score": score,
                "trained": trained,
                "seed": None,
                "coherence": 90.0,
                "relevance": 90.0,
            }


def test_a_gain_over_persons_is_as_uncertain_as_trainings_differ():
    random = np.random.default_rng(0)

    def gain(luck, reference="none"):
        told = list(of_trainings(random, luck))
        found = {each.condition: each for each in over_personas(told, reference)}
        return found["lora"]

    alike, apart = gain((0.0, 0.0, 0.0)), gain((-0.9, 0.0, 0.9))
    assert alike.difference.low > 0
    assert alike.p_holm < 0.05
    assert apart.difference.low < 0 < apart.difference.high
    assert apart.p > 0.1
    assert gain((0.0, 0.0)).difference.low is None  # of two nothing is known between them
    assert gain((0.0,)).p_holm == 4 / 256  # sign flips of eight persons, two comparisons
    paired = gain((0.0, 0.0, 0.0), "random")
    assert paired.difference.mean == pytest.approx(0.5, abs=0.4)


def test_an_interval_over_persons_and_trainings_covers():
    random = np.random.default_rng(1)
    found = []
    for _ in range(200):
        told = list(of_trainings(random, random.normal(0, 0.3, 3)))
        gain = next(e for e in over_personas(told, "none") if e.condition == "lora").difference
        found.append(gain.low <= 1.0 <= gain.high)
    assert np.mean(found) > 0.9


def test_a_reference_that_differs_by_seed_counts_with_its_mean():
    told = {"mean": (4.0, 4.0), "other": (1.0, 3.0)}
    rows = [
        {"persona": "p", "condition": name, "prompt_id": at, "score": score, "seed": seed}
        | {"coherence": 90.0, "relevance": 90.0}
        for name, scores in told.items()
        for seed, score in enumerate(scores)
        for at in range(4)
    ]
    found = {each.condition: each for each in over_prompts(rows, "other")}
    assert found["mean"].difference.mean == 2.0
