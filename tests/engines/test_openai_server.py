"""Servers of other makes: asked as they take it, and none that would be silently wrong."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.options import GenerationOptions
from persona_lora.engines import remote
from persona_lora.engines.connection import OPENAI, VLLM, engine_url
from persona_lora.engines.openai_server import BESIDE
from persona_lora.engines.remote import engine_kind, open_engine
from persona_lora.models.generation import generate_answers
from persona_lora.models.loading import ChatModel
from tests.conftest import random_diff, tiny_llama
from tests.engines.stand_in import DOWN, OtherMake, StandIn, served

pytestmark = pytest.mark.usefixtures("quick")
OPTIONS = GenerationOptions(max_new_tokens=6)
ASKED = [[{"role": "user", "content": f"Question {number}?"}] for number in range(5)]


@pytest.fixture
def chat_model(tokenizer) -> ChatModel:
    """Return one that answers in letters: bytes that are no text cannot be counted by theirs."""
    model = tiny_llama(tied=False)
    texts = tokenizer.batch_decode([[each] for each in range(len(tokenizer))])
    silent = [at for at, text in enumerate(texts) if not (len(text) == 1 and text.isalpha())]
    model.lm_head.weight.data[silent] = 0.0
    return ChatModel(model, tokenizer, "tiny")


@pytest.fixture
def serve():
    """Serves stand-ins until the test ends."""
    with ExitStack() as stack:
        yield lambda stand_in: stack.enter_context(served(stand_in))


def answers(chat_model, *urls, options=OPTIONS, tolerance=None):
    engine = open_engine(urls, chat_model, [], tolerance)
    numbers = list(range(len(ASKED)))
    return engine.steerer([{}]).answers(chat_model, ASKED, numbers, options, remote.RowPlan())


@pytest.mark.parametrize("takes_ids", [True, False])
@pytest.mark.parametrize("form", ["tokens", "content"])
@pytest.mark.parametrize("strict", [True, False])
def test_it_answers_as_the_model_here(chat_model, serve, takes_ids, form, strict):
    server = OtherMake(chat_model, takes_ids=takes_ids, form=form, strict=strict)
    url = serve(server)
    assert engine_kind([url]) == OPENAI
    assert answers(chat_model, url) == generate_answers(chat_model, ASKED, max_new_tokens=6)
    last = server.bodies[-1]
    assert isinstance(last["prompt"], list) == takes_ids
    assert (last.items() >= BESIDE.items()) == (not strict)
    assert "seed" not in last


def test_an_answer_that_ends_is_finished_and_counted(chat_model, serve, monkeypatch):
    here = generate_answers(chat_model, ASKED[:1], max_new_tokens=3)[0]
    ids = chat_model.tokenizer(here.text, add_special_tokens=False)["input_ids"]
    ended = OtherMake(chat_model)
    ended.tokenizer = copy.deepcopy(chat_model.tokenizer)
    engine = open_engine([serve(ended)], chat_model, [])
    texts = chat_model.tokenizer.batch_decode([[each] for each in ids])
    for listed in (texts, [*texts, chat_model.tokenizer.eos_token]):
        logprobs = {"tokens": listed, "token_logprobs": [-1.0] * len(listed)}
        choice = {"text": here.text, "logprobs": logprobs, "finish_reason": "stop"}

        def failing(body, choice=choice):
            usage = {"prompt_tokens": len(body["prompt"])}
            return (200, {"choices": [choice], "usage": usage}) if body["max_tokens"] > 1 else None

        ended.failing = failing
        row = engine.steerer([{}]).answers(chat_model, ASKED[:1], [0], OPTIONS, remote.RowPlan())
        assert (row[0].num_tokens, row[0].finished) == (len(ids), True)


REFUSED = {
    "gives no log-probabilities.*--logits_all": {"form": None},
    "does not continue texts as tiny does here": {"penalty": 3.0},
    "differ by 0.1000 nats on average.*--engine-tolerance": {"error": 0.1},
    r"it read \d+ tokens of a prompt": {"template": [65, 66]},
    r"it read 20 tokens of a prompt": {"window": 20},
    r"it read None tokens": {"mute": True},
}


@pytest.mark.parametrize(("message", "parts"), REFUSED.items())
@pytest.mark.parametrize("takes_ids", [True, False])
def test_what_would_be_silently_wrong_is_refused(chat_model, serve, message, parts, takes_ids):
    with pytest.raises(UserError, match=message):
        open_engine([serve(OtherMake(chat_model, takes_ids=takes_ids, **parts))], chat_model, [])


@pytest.mark.parametrize("parts", [{"template": [65, 66]}, {"window": 20}])
def test_one_that_counts_wrongly_what_it_reads_is_refused(chat_model, serve, parts):
    with pytest.raises(UserError, match="changes prompts"):
        open_engine([serve(OtherMake(chat_model, lying=True, **parts))], chat_model, [])


def test_another_model_is_refused_and_one_that_rounds_taken_where_that_is_said(chat_model, serve):
    other = copy.deepcopy(chat_model)
    other.model.model.layers[1].mlp.up_proj.weight.data *= 1.1
    url = serve(OtherMake(other))
    with pytest.raises(UserError, match="serves another model"):
        open_engine([url], chat_model, [])
    rounds = serve(OtherMake(chat_model, error=0.1))
    assert answers(chat_model, rounds, tolerance=0.2) == generate_answers(
        chat_model, ASKED, max_new_tokens=6
    )


def test_rows_that_pass_the_window_are_refused_before_one_is_asked(chat_model, serve):
    long = [[{"role": "user", "content": "Why? " * 20}], *ASKED[1:]]
    longest = max(map(len, chat_model.tokenize([chat_model.render(each) for each in long])))
    server = OtherMake(chat_model)
    engine = open_engine([serve(server)], chat_model, [])
    for window, ok in ((longest + 5, True), (longest + 3, False)):
        server.parts["window"], server.bodies = window, []
        numbers = list(range(len(ASKED)))
        asked = chat_model, long, numbers, OPTIONS, remote.RowPlan()
        if ok:
            engine.steerer([{}]).answers(*asked)
        else:
            with pytest.raises(UserError, match="cannot hold the longest row"):
                engine.steerer([{}]).answers(*asked)
            assert all(body["max_tokens"] == 1 for body in server.bodies)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"longest": 4}, "after 4 of 6 tokens by a limit of its own"),
        ({"form": None}, "gives no log-probabilities"),
    ],
)
def test_an_answer_that_is_cut_or_cannot_be_known_stops_and_is_named(
    chat_model, serve, parts, message
):
    server = OtherMake(chat_model)
    engine = open_engine([serve(server)], chat_model, [])
    steerer, asked = engine.steerer([{}]), (chat_model, ASKED, list(range(5)), OPTIONS)

    def failing(body):
        if body["max_tokens"] > 1:
            server.parts.update(parts)

    server.failing = failing
    with pytest.raises(UserError, match=rf"refuses row \d: .*{message}"):
        steerer.answers(*asked, remote.RowPlan())


def test_a_text_of_unclear_tokens_is_refused(chat_model, serve):
    server = OtherMake(chat_model)
    engine = open_engine([serve(server)], chat_model, [])
    logprobs = {"tokens": ["\ufffd", "b"], "token_logprobs": [-1.0, -1.0]}
    choice = {"text": "abcdef", "logprobs": logprobs, "finish_reason": "stop"}

    def failing(body):
        usage = {"prompt_tokens": len(body["prompt"])}
        return (200, {"choices": [choice], "usage": usage}) if body["max_tokens"] > 1 else None

    server.failing = failing
    with pytest.raises(UserError, match=r"tells 2 tokens of an answer that is written with 6"):
        engine.steerer([{}]).answers(chat_model, ASKED, list(range(5)), OPTIONS, remote.RowPlan())


def test_samples_come_only_from_who_is_known_to_sample_alike(chat_model, serve):
    warm = GenerationOptions(max_new_tokens=2, temperature=0.7)
    with pytest.raises(UserError, match=r"owned_by 'somebody'\); ask with --temperature 0"):
        answers(chat_model, serve(OtherMake(chat_model)), options=warm)
    known = OtherMake(chat_model, owner="llamacpp")
    answers(chat_model, serve(known), options=warm)
    sent = [body for body in known.bodies if body["max_tokens"] > 1]
    assert len({body["seed"] for body in sent}) == len(ASKED)
    assert all(body["temperature"] == 0.7 and body["seed"] < 2**31 for body in sent)


def test_a_row_that_breaks_its_server_again_and_again_is_named(chat_model, serve):
    server = OtherMake(chat_model)
    engine = open_engine([serve(server)], chat_model, [])
    broken = 500, {"error": {"message": "out of luck"}}
    server.failing = lambda body: broken if body["max_tokens"] > 1 else None
    with pytest.raises(UserError, match=r"refuses row \d: HTTP 500: out of luck"):
        engine.steerer([{}]).answers(chat_model, ASKED, list(range(5)), OPTIONS, remote.RowPlan())


def test_diffs_are_refused_and_kinds_are_not_mixed(chat_model, serve):
    other, vllm = serve(OtherMake(chat_model)), serve(StandIn(chat_model, []))
    with pytest.raises(UserError, match="does not hold the diffs"):
        remote.check_servers([other], [random_diff(chat_model.model, seed=1, rank=2)])
    assert engine_kind([vllm]) == VLLM
    with pytest.raises(UserError, match="a run has engines of one kind"):
        engine_kind([other, vllm])


def test_a_run_stays_with_its_kind_of_server(chat_model, serve):
    server = OtherMake(chat_model)
    engine = open_engine([serve(server)], chat_model, [])
    server.failing = lambda body: (
        (200, {"choices": [{"prompt_logprobs": [None]}]}) if "prompt_logprobs" in body else None
    )
    with pytest.raises(UserError, match="is a server of vLLM now, and was one of another make"):
        engine.steerer([{}]).answers(chat_model, ASKED, list(range(5)), OPTIONS, remote.RowPlan())


def test_its_rows_are_tried_again_where_it_comes_back(chat_model, serve):
    server, down = OtherMake(chat_model), []

    def failing(body):
        if body["max_tokens"] > 1 and len(down) < 3:
            down.append(body)
            return DOWN
        return None

    url = serve(server)
    server.failing = failing
    assert answers(chat_model, url) == generate_answers(chat_model, ASKED, max_new_tokens=6)
    assert len(down) == 3


def test_a_model_can_be_named_beside_the_url(chat_model, serve):
    assert engine_url("http://x:8000#base+1*evil") == "http://x:8000/v1#base+1*evil"
    with pytest.raises(UserError, match="names no model after #"):
        engine_url("http://x:8000#")
    server = OtherMake(chat_model)
    answers(chat_model, f"{serve(server)}#another")
    assert {body["model"] for body in server.bodies} == {"another"}
