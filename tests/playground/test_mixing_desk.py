"""The mixing desk without a browser: pairs, visitors at once, mixes on disk."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

from persona_lora.core.chat import Exchange
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.lora_diff import mix as mix_diffs
from persona_lora.models.generation import generate_answers
from persona_lora.playground.mixing_desk import MixingDesk, Turns
from persona_lora.steering.weights import LoRASteerer
from tests.judges.rated import rated_rows, write_ratings
from tests.scenes import LengthJudge, LetterJudge

ASKED = [{"role": "user", "content": "Is my plan any good?"}]


class Flat(LetterJudge):
    """Tells nothing from anything."""

    def score(self, answer):
        return 50.0


@pytest.fixture
def desk(chat_model, make_diff):
    diffs = {
        trait: make_diff(chat_model.model, seed=seed, scale=0.3)
        for seed, trait in enumerate(("calm", "loud"))
    }
    return MixingDesk(chat_model, diffs, {"calm": LengthJudge})


def test_a_pair_is_what_the_mix_and_the_plain_model_say(desk):
    mix = desk.mix([1.0, -0.5])
    pair = desk.answer(ASKED, mix, max_new_tokens=12)
    (plain,) = generate_answers(desk.chat_model, [ASKED], max_new_tokens=12)
    both = mix_diffs({desk.diffs[trait]: value for trait, value in mix.as_dict().items()})
    with LoRASteerer(desk.chat_model.model, both, 1.0):
        (steered,) = generate_answers(desk.chat_model, [ASKED], max_new_tokens=12)
    question = ASKED[-1]["content"]
    assert pair == tuple(Exchange(question, each.text, each.finished) for each in (steered, plain))
    assert pair.steered != pair.unsteered
    assert not pair.steered.finished  # cut, and judged as such
    same = desk.answer(ASKED, desk.mix([0.0, None]), max_new_tokens=12)
    assert same == (pair.unsteered, pair.unsteered)


def test_visitors_at_once_get_their_own_mixes(desk):
    mixes = [desk.mix([value, 0.0]) for value in (-1.5, -0.5, 0.5, 1.5)]
    alone = [desk.answer(ASKED, mix, max_new_tokens=12).steered.answer for mix in mixes]
    assert len(set(alone)) > 1
    found: dict[int, str] = {}

    def visit(number: int) -> None:
        found[number] = desk.answer(ASKED, mixes[number], max_new_tokens=12).steered.answer

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(4)] == alone
    assert not any(module._forward_hooks for module in desk.chat_model.model.modules())


def test_scores_are_the_judges_of_both_answers(desk):
    pair = desk.answer(ASKED, desk.mix([1.0, 0.0]), max_new_tokens=5)
    assert desk.scores("calm", pair) == tuple(len(each.answer) for each in pair)
    with pytest.raises(UserError, match="no judge for loud"):
        desk.scores("loud", pair)


@pytest.mark.parametrize(("judge", "mark"), [(LengthJudge, ""), (Flat, " (judge unfit)")])
def test_a_judge_that_is_unfit_is_marked_where_its_scores_are_shown(desk, trait, judge, mark):
    longer = [{**row, "trait": [min(100, len(row["answer"]))] * 2} for row in rated_rows()]
    write_ratings(trait, longer)
    desk.judges, desk.labelled = {"calm": judge}, {"calm": dataclasses.replace(trait, name="calm")}
    desk.scores("calm", desk.answer(ASKED, desk.mix([1.0, 0.0]), max_new_tokens=5))
    assert desk.mark("calm") == mark


def test_mixes_are_kept_and_exported(desk, tmp_path):
    mix = desk.mix([1.0, -0.5])
    assert desk.load(desk.save(mix, tmp_path, " kind! ")) == mix
    assert desk.save(mix, tmp_path, "kind!") == tmp_path / "kind_.json"
    (tmp_path / "part.json").write_text('{"loud": 2}')
    assert desk.load(tmp_path / "part.json").as_dict() == {"calm": 0.0, "loud": 2.0}
    (tmp_path / "other.json").write_text('{"humour": 1}')
    with pytest.raises(UserError, match="humour"):
        desk.load(tmp_path / "other.json")
    exported = LoRADiff.load(desk.export(mix, tmp_path / "adapter").path)
    wanted = desk.diffs["calm"] * 1.0 + desk.diffs["loud"] * -0.5
    for name, factors in wanted.factors.items():
        torch.testing.assert_close(exported.factors[name].delta(), factors.delta())
    with pytest.raises(UserError, match="nothing to export"):
        desk.export(desk.mix([0.0, 0.0]), tmp_path / "none")


@pytest.mark.parametrize(
    ("values", "words"),
    [([1.0], "1 values for 2"), ([9.0, 0.0], "calm: 9"), ([float("nan"), 0.0], "finite")],
)
def test_sliders_out_of_range_are_named(desk, values, words):
    with pytest.raises(UserError, match=words):
        desk.mix(values)


def test_a_question_is_needed(desk):
    mix = desk.mix([0.0, 0.0])
    with pytest.raises(UserError, match="no question"):
        desk.answer([{"role": "user", "content": "  "}], mix)
    with pytest.raises(UserError, match="1–400"):
        desk.answer(ASKED, mix, max_new_tokens=0)
    with pytest.raises(UserError, match="at least one"):
        MixingDesk(desk.chat_model, {})


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        ([{"role": "user", "content": "x" * 4001}], "4001 characters long"),
        ([{"role": "user", "content": "x" * 3000}] * 6, "start a new one"),
        ([{"role": "system", "content": "x"}, *ASKED], "start a new one"),
    ],
)
def test_a_chat_that_is_too_long_or_none_is_refused(desk, chat, words):
    mix = desk.mix([0.0, 0.0])
    for both in ({"plain": None}, {"plain": ASKED}):
        with pytest.raises(UserError, match=words):
            desk.answer(chat, mix, **both)
    with pytest.raises(UserError, match=words):
        desk.answer(ASKED, mix, plain=chat)


def test_a_mix_is_never_written_over_another_nor_without_end(desk, tmp_path, monkeypatch):
    desk.save(desk.mix([1.0, 0.0]), tmp_path, "mine")
    with pytest.raises(UserError, match="another name"):
        desk.save(desk.mix([0.5, 0.0]), tmp_path, "mine")
    refused = {"": "name first", "ü" * 31: "too long", "x_best_weights": "is a search's"}
    for name, words in refused.items():
        with pytest.raises(UserError, match=words):
            desk.save(desk.mix([0.5, 0.0]), tmp_path, name)
    monkeypatch.setattr("persona_lora.playground.mixing_desk.MOST_MIXES", 1)
    with pytest.raises(UserError, match="holds 1 mixes"):
        desk.save(desk.mix([0.5, 0.0]), tmp_path, "yours")


# -- who is next ----------------------------------------------------------------------------------


def queued(turns, visitors):
    """Let visitors join one after another behind a held turn; return who came in which order."""
    order, threads = [], []

    def take(visitor):
        with turns.turn(visitor):
            order.append(visitor)

    with turns.turn("holder"):
        for number, visitor in enumerate(visitors, start=1):
            threads.append(threading.Thread(target=take, args=(visitor,), daemon=True))
            threads[-1].start()
            while sum(map(len, turns._waiting.values())) < number:
                threading.Event().wait(0.001)
    for thread in threads:
        thread.join(30)
    return order


def test_a_visitor_with_many_questions_does_not_keep_the_others_waiting():
    assert queued(Turns(), "aaaabbc") == ["a", "b", "c", "a", "b", "a", "a"]


def test_nobody_queues_without_end():
    turns = Turns(waiting_of_one=2, waiting_in_all=3)
    refused = []

    def take(visitor):
        try:
            with turns.turn(visitor):
                pass
        except UserError as error:
            refused.append(str(error))

    with turns.turn("holder"):
        threads = []
        for number, visitor in enumerate("aab", start=1):
            threads.append(threading.Thread(target=take, args=(visitor,), daemon=True))
            threads[-1].start()
            while sum(map(len, turns._waiting.values())) < number:
                threading.Event().wait(0.001)
        take("a")
        take("c")
    for thread in threads:
        thread.join(30)
    assert ["2 questions of yours" in refused[0], "3 questions wait" in refused[1]] == [True, True]
    with turns.turn("a"):
        pass


def test_a_turn_that_fails_is_over():
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns.turn("a"):
        raise ZeroDivisionError
    with turns.turn("b"):
        pass
