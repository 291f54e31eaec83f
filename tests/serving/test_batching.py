"""Rows of different mixes, lengths, temperatures and seeds in one running batch."""

from __future__ import annotations

import copy
import dataclasses
import queue
import threading

import pytest
import torch

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRAFactors
from persona_lora.models.generation import RowPlan, generate_answers
from persona_lora.models.likelihood import text_logprobs
from persona_lora.serving import batching
from persona_lora.serving.batching import Batch, Busy, Row, Scored, Token
from persona_lora.steering.weights import LoRASteerer

TEXTS = ["a", "a longer question", "mid", "a very much longer question than the others"]
ASKED = [[{"role": "user", "content": text}] for text in TEXTS * 2]
MIXES = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.5, 0.5], [2.0, -2.0], [0.3, 0.3], [-1, -1], [3, 1]]


@pytest.fixture
def diffs(model, make_diff):
    return {"cheer": make_diff(model, seed=1), "wit": make_diff(model, seed=2)}


@pytest.fixture
def family(diffs):
    """The same on one basis: a mix is made once for all rows that are steered alike."""
    one, other = diffs["cheer"], diffs["wit"]
    factors = {
        name: LoRAFactors(one.factors[name].A, each.B) for name, each in other.factors.items()
    }
    return {"cheer": one, "wit": dataclasses.replace(other, factors=factors)}


class Asker:
    """Puts rows into a batch whose turns a test takes itself, and keeps what they are told."""

    def __init__(self, chat_model, diffs, **limits):
        self.batch = Batch(chat_model, diffs, **limits)
        self.tokenizer = chat_model.tokenizer
        self.chat_model = chat_model

    def row(self, conversation, mix, **settings):
        told = []
        prompt = self.tokenizer(self.chat_model.render(conversation))["input_ids"]
        row = Row(prompt=prompt, mix=mix, tell=told.append, **{"max_tokens": 12, **settings})
        self.batch.put([row])
        return row, told

    def turn(self, number=1):
        with self.batch._steerer, torch.inference_mode():
            for _ in range(number):
                self.batch._turn()

    def run(self):
        """Take turns until nothing waits or runs."""
        with self.batch._steerer, torch.inference_mode():
            while any(self.batch.load):
                self.batch._turn()


def ids(told):
    return [event.token for event in told if isinstance(event, Token)]


def text(asker, told):
    tokens = ids(told)
    ended = told[-1].reason == "stop"
    return asker.tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)


def merged(chat_model, diffs, mix, conversation, **options):
    with LoRASteerer(chat_model.model, dict(zip(diffs.values(), mix, strict=True))):
        return generate_answers(chat_model, [conversation], **{"max_new_tokens": 12, **options})[0]


@pytest.mark.parametrize("kind", ["diffs", "family"])
def test_eight_mixes_in_one_batch_give_the_tokens_of_eight_serial_merges(chat_model, request, kind):
    diffs = request.getfixturevalue(kind)
    asker = Asker(chat_model, diffs)
    rows = [asker.row(asked, mix) for asked, mix in zip(ASKED, MIXES, strict=True)]
    asker.run()
    answers = [text(asker, told).strip() for _, told in rows]
    alone = [merged(chat_model, diffs, mix, asked) for asked, mix in zip(ASKED, MIXES, strict=True)]
    assert answers == [each.text for each in alone]
    assert len(set(answers)) > 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_join_and_leave_and_the_others_do_not_notice(
    chat_model, diffs, monkeypatch, temperature
):
    """Rows come at different times, take different numbers of tokens, and outgrow the room."""
    monkeypatch.setattr(batching, "ROOM", 5)
    asker = Asker(chat_model, diffs, max_batch=5)
    rows, lengths = [], [3, 17, 1, 9, 23, 2, 30, 12]
    sizes = []
    for at, (asked, mix) in enumerate(zip(ASKED, MIXES, strict=True)):
        rows.append(asker.row(asked, mix, temperature=temperature, seed=at, max_tokens=lengths[at]))
        asker.turn(2)
        sizes.append(asker.batch.load[0])
    asker.run()
    assert max(sizes) > 2
    for at, (asked, mix) in enumerate(zip(ASKED, MIXES, strict=True)):
        alone = merged(
            chat_model, diffs, mix, asked,
            max_new_tokens=lengths[at], temperature=temperature, seed=at, plan=RowPlan(streams=[0]),
        )  # fmt: skip
        assert text(asker, rows[at][1]).strip() == alone.text
        assert rows[at][1][-1].reason == ("stop" if alone.finished else "length")


def test_a_seed_says_all_whatever_stands_beside(chat_model, diffs):
    """The same row alone, beside greedy ones, and beside itself; another stream is another row."""
    hot = {"temperature": 1.3, "seed": 7, "max_tokens": 20}
    alone = Asker(chat_model, diffs)
    _, expected = alone.row(ASKED[1], [1.0, -1.0], **hot)
    alone.run()
    crowd = Asker(chat_model, diffs)
    crowd.row(ASKED[0], [0.0, 0.0])
    told = [crowd.row(ASKED[1], [1.0, -1.0], **hot)[1] for _ in range(2)]
    _, other = crowd.row(ASKED[1], [1.0, -1.0], **hot, stream=1)
    crowd.run()
    assert [ids(each) for each in told] == [ids(expected)] * 2
    assert ids(other) != ids(expected)


@pytest.mark.parametrize("ends", ["its prompt fails", "nobody waits for it once it is scored"])
def test_a_row_that_ends_before_it_joins_leaves_its_mix_to_nobody(
    chat_model, diffs, monkeypatch, ends
):
    alone = Asker(chat_model, diffs)
    _, expected = alone.row(ASKED[1], [1.0, 0.0], max_tokens=20)
    alone.run()
    asker = Asker(chat_model, diffs)
    _, told = asker.row(ASKED[1], [1.0, 0.0], max_tokens=20)
    asker.turn(3)
    scored = ends != "its prompt fails"
    other, _ = asker.row(ASKED[0], [-3.0, 3.0], max_tokens=3, scored=scored, top=1)
    if scored:
        other.tell = lambda _: setattr(other, "gone", True)
        asker.turn()
    else:
        with monkeypatch.context() as patch:
            patch.setattr(batching.Decoding, "begin", out_of_memory)
            asker.turn()
    asker.run()
    assert ids(told) == ids(expected)


def out_of_memory(decoding):
    raise torch.OutOfMemoryError


def test_a_row_that_nobody_waits_for_leaves(chat_model, diffs):
    asker = Asker(chat_model, diffs, max_batch=1)
    row, told = asker.row(ASKED[0], MIXES[1], max_tokens=500)
    _, second = asker.row(ASKED[1], MIXES[2], max_tokens=2)
    waiting, nothing = asker.row(ASKED[2], MIXES[2])
    asker.turn(3)
    assert (len(told), second) == (3, [])
    row.gone = waiting.gone = True
    asker.run()
    assert len(told) == 3
    assert second[-1].reason == "length"
    assert nothing == []


def test_more_than_may_wait_are_refused(chat_model, diffs):
    asker = Asker(chat_model, diffs, most_waiting=2)
    for _ in range(2):
        asker.row(ASKED[0], MIXES[1])
    with pytest.raises(Busy, match="2 answers wait already, and 2 may"):
        asker.row(ASKED[0], MIXES[1])
    asker.run()
    gone = [asker.row(ASKED[0], MIXES[1])[0] for _ in range(2)]
    gone[0].gone = True
    assert asker.batch.load == (0, 1)
    asker.row(ASKED[0], MIXES[1])


def test_padding_without_an_embedding_is_never_read(chat_model, diffs):
    tokenizer = copy.deepcopy(chat_model.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == chat_model.model.config.vocab_size
    asker = Asker(dataclasses.replace(chat_model, tokenizer=tokenizer), diffs)
    rows = [asker.row(asked, MIXES[3]) for asked in ASKED[:2]]
    asker.run()
    for asked, (_, told) in zip(ASKED, rows, strict=False):
        assert text(asker, told).strip() == merged(chat_model, diffs, MIXES[3], asked).text


def test_a_mix_that_breaks_the_model_ends_its_own_rows_alone(chat_model, diffs):
    asker = Asker(chat_model, diffs)
    _, broken = asker.row(ASKED[0], [1e30, 0.0])
    _, scored = asker.row(ASKED[0], [1e30, 0.0], scored=True, top=1)
    _, fine = asker.row(ASKED[1], MIXES[3])
    asker.run()
    assert [type(each) for each in broken + scored] == [UserError, UserError]
    assert "smaller coefficient" in str(broken[0])
    assert text(asker, fine).strip() == merged(chat_model, diffs, MIXES[3], ASKED[1]).text


@pytest.mark.parametrize("place", ["begin", "step"])
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, IndexError])
def test_what_fails_ends_the_rows_and_not_the_batch(chat_model, diffs, monkeypatch, place, kind):
    asker = Asker(chat_model, diffs)
    _, running = asker.row(ASKED[0], MIXES[1])
    asker.turn(2)

    def fail(*_):
        raise kind("out of memory, or of range")

    with monkeypatch.context() as context:
        context.setattr(batching.Decoding, place, fail)
        _, told = asker.row(ASKED[1], MIXES[2])
        asker.turn(2)
    failed = isinstance(running[-1], kind)
    assert isinstance(told[-1], kind)
    assert failed == (place == "step")
    _, after = asker.row(ASKED[2], MIXES[3])
    asker.run()
    assert text(asker, after).strip() == merged(chat_model, diffs, MIXES[3], ASKED[2]).text


def test_log_probabilities_are_those_of_the_merged_model(chat_model, diffs):
    asker = Asker(chat_model, diffs)
    row, told = asker.row(ASKED[1], MIXES[3], top=3, scored=True, max_tokens=4)
    asker.row(ASKED[0], MIXES[1])
    asker.run()
    scored, *tokens = told
    assert isinstance(scored, Scored)
    found = [*scored.logprobs, *(each.logprobs for each in tokens)]
    with LoRASteerer(chat_model.model, dict(zip(diffs.values(), MIXES[3], strict=True))):
        expected = text_logprobs(chat_model, row.prompt + ids(told), 3)
    assert [each.token for each in found] == [each.token for each in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert ours.likeliest[0] == pytest.approx(theirs.likeliest[0], abs=1e-4)
    assert all(each.logprobs.logprob == each.logprobs.likeliest[0][1] for each in tokens)  # greedy


def test_a_closed_batch_ends_what_waits_and_lets_the_others_end(chat_model, diffs):
    batch = Batch(chat_model, diffs, max_batch=1)
    told: list[queue.Queue] = [queue.Queue(), queue.Queue()]
    rows = [Row([5, 6, 7], [0.0, 1.0], 40, each.put) for each in told]
    thread = threading.Thread(target=batch.run)
    thread.start()
    try:
        batch.put(rows)
        told[0].get(timeout=60)
        batch.close(grace=1e9)
        thread.join(timeout=60)
        assert not thread.is_alive()
    finally:
        batch.close(0)
    events = [*told[0].queue]
    assert events[-1].reason is not None
    assert [type(each) for each in told[1].queue] == [Busy]
    with pytest.raises(Busy, match="stopping"):
        batch.put(rows)


def test_where_the_batch_ends_rows_on_their_way_into_it_are_told(chat_model, diffs, monkeypatch):
    def fail(*_):
        raise KeyError("ours")

    asker = Asker(chat_model, diffs)
    _, told = asker.row(ASKED[0], MIXES[1])
    monkeypatch.setattr(asker.batch, "_begin", fail)
    with pytest.raises(KeyError, match="ours"):
        asker.batch.run()
    assert [type(each) for each in told] == [Busy]


def test_no_time_ends_what_runs(chat_model, diffs):
    asker = Asker(chat_model, diffs)
    _, told = asker.row(ASKED[0], MIXES[1], max_tokens=500)
    asker.turn(2)
    asker.batch.close(0)
    asker.turn()
    assert [type(each) for each in told] == [Token, Token, Busy]
    assert asker.batch.load == (0, 0)


def test_a_model_whose_rows_cannot_join_is_refused(chat_model, diffs, monkeypatch):
    monkeypatch.setattr(batching, "decodes", lambda model: False)
    with pytest.raises(UserError, match="cannot join a running batch"):
        Batch(chat_model, diffs)
