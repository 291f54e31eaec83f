"""The endpoint's writer over HTTP: order kept, passing faults retried, lasting ones explained."""

from __future__ import annotations

import pytest

from persona_lora.core import progress
from persona_lora.core.chat import user_question
from persona_lora.core.errors import UserError
from persona_lora.core.options import GenerationOptions
from persona_lora.data.profile_writing import profile_writer
from persona_lora.data.writers import Endpoint, EndpointWriter, LocalWriter
from persona_lora.profiles.features import extract_features

ASKED = {"options": GenerationOptions(max_new_tokens=16, seed=3)}


def writer_of(server, **options):
    return EndpointWriter(Endpoint("m", server.url, **options))


def test_replies_keep_the_order_of_the_questions(server, told):
    texts = [f"q{i}" for i in range(20)] + ["empty"]
    with progress.stage("writing"):
        replies = writer_of(server).write([user_question(text) for text in texts], **ASKED)
    assert replies == [f"re: q{i}" for i in range(20)] + [None]
    assert told[-1] == ("writing", 21, 21)
    assert {body["model"] for body in server.bodies} == {"m"}
    assert sorted(body["seed"] for body in server.bodies) == list(range(3, 24))


def test_a_passing_fault_is_retried_and_a_stubborn_one_is_none(server):
    server.faults += [500, 429]
    assert writer_of(server).write([user_question("q")], **ASKED) == ["re: q"]
    server.faults += [500] * 2
    assert writer_of(server, max_retries=1).write([user_question("q")], **ASKED) == [None]


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "OPENAI_API_KEY"), (404, "OPENAI_BASE_URL"), (405, "/v1")]
)
def test_a_lasting_fault_is_explained(server, status, remedy):
    server.faults += [status]
    with pytest.raises(UserError, match=rf"HTTP {status}.*{remedy}"):
        writer_of(server).write([user_question("q")], **ASKED)


def test_a_text_is_drawn_by_its_stream_and_told_as_it_comes(server):
    told = {}
    texts = [user_question(text) for text in ("a", "empty", "c")]
    writer_of(server).write(texts, **ASKED, streams=[7, 8, 9], on_text=told.__setitem__)
    assert told == {0: "re: a", 2: "re: c"}
    assert sorted(body["seed"] for body in server.bodies) == [10, 11, 12]


def test_a_dead_endpoint_is_not_asked_for_ever(server):
    server.faults += [500] * 40
    told = {}
    with pytest.raises(UserError, match=r"5 times in a row: HTTP 500: no; the same command"):
        writer_of(server, max_retries=1, concurrency=2).write(
            [user_question("q")] * 30, **ASKED, on_text=told.__setitem__
        )
    assert len(server.bodies) <= 12
    assert told == {}


def test_what_an_endpoint_refuses_is_left_out_and_reasoning_is_no_text(server, caplog):
    server.replies += ["<think>Hm. 'q'?</think>\n\nAn answer.", "<think>Hm"]
    server.refuses += ["seed", "temperature", "max_tokens"]
    writer = writer_of(server)
    assert writer.write([user_question("q")], **ASKED) == ["An answer."]
    assert writer.write([user_question("q")], **ASKED) == [None]
    assert set(server.bodies[-1]) == {"model", "messages", "max_completion_tokens"}
    assert "refuses seed" in caplog.text
    assert "refuses temperature" in caplog.text


def test_a_reply_that_was_cut_inside_an_emoji_is_text(server):
    server.replies += ["Nice \ud83d", "\ude00 \ud83d\ude00"]
    writer = writer_of(server, concurrency=1)
    texts = writer.write([user_question("q")] * 2, **ASKED)
    assert texts == ["Nice \ufffd", "\ufffd \U0001f600"]
    server.replies += ["Terse. \ud83d"]
    assert profile_writer(writer)(extract_features(["hm"]), ["hm"]) == "Terse. \ufffd"


def test_openai_itself_needs_a_key():
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        EndpointWriter(Endpoint("m", "https://api.openai.com/v1"))
    with pytest.raises(UserError, match="base URL"):
        EndpointWriter(Endpoint("m", "nowhere"))


def test_the_local_writer_repeats_itself_for_a_seed(chat_model):
    writer = LocalWriter(chat_model)
    twice = [user_question("Hello?")] * 2
    one, two = (GenerationOptions(8, temperature=1.0, seed=seed) for seed in (1, 2))
    first = writer.write(twice, options=one)
    assert first == writer.write(twice, options=one)
    assert first != writer.write(twice, options=two)
