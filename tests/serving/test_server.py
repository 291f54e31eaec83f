"""The server as its clients see it: endpoints, refusals, the openai package, lm-eval, inspect_ai.

inspect_ai is asked where it is installed: bash scripts/test_inspect_ai.sh
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders
from tokenizers import models as tokenizing
from transformers import PreTrainedTokenizerFast

from persona_lora.cli.serving_commands import listening
from persona_lora.core.errors import UserError
from persona_lora.core.files import write_json
from persona_lora.core.resources import resource_path
from persona_lora.models.generation import generate_answers
from persona_lora.models.likelihood import text_logprobs
from persona_lora.models.loading import ChatModel
from persona_lora.serving import batching, reply
from persona_lora.serving import server as serving
from persona_lora.serving.batching import Batch, Row, Token
from persona_lora.serving.mixes import Personas
from persona_lora.serving.reply import Answer
from persona_lora.serving.server import Server, Service, build_app
from persona_lora.steering.weights import LoRASteerer
from persona_lora.studies.asking.capability import _local_task
from tests.conftest import random_diff
from tests.models.architectures import tiny_model

ASKED = [{"role": "user", "content": "Is my plan any good?"}]
GREEDY = {"model": "base+1*cheer", "messages": ASKED, "temperature": 0, "max_tokens": 12}
TEXT = {"model": "base+1*cheer", "prompt": "Once", "temperature": 0, "max_tokens": 5}
MIXES = [
    *("base", "base+1*cheer", "base-1*cheer", "base+1*wit", "base+0.5*cheer-1.5*wit"),
    *("base-2*wit", "base+2*cheer+2*wit", "candid"),
]


@pytest.fixture
def diffs(model, make_diff):
    return {"cheer": make_diff(model, seed=1), "wit": make_diff(model, seed=2)}


@pytest.fixture
def service(chat_model, diffs, tmp_path):
    write_json(tmp_path / "candid.json", {"cheer": -1.0, "wit": 0.5})
    batch = Batch(chat_model, diffs, most_waiting=16)
    return Service(batch, Personas(batch.traits, tmp_path))


@pytest.fixture
def client(service):
    thread = threading.Thread(target=service.batch.run)
    thread.start()
    with TestClient(build_app(service), raise_server_exceptions=False) as client:
        yield client
    service.batch.close(0)
    thread.join()


@contextmanager
def served(service, grace=20.0):
    """A real server at a port of its own; yields it and its address."""
    with listening("127.0.0.1", 0) as place, ThreadPoolExecutor(1) as threads:
        server = Server(service, grace)
        running = threads.submit(server.answer, place)
        try:
            yield server, f"http://127.0.0.1:{place.getsockname()[1]}"
        finally:
            server.should_exit = True
            running.result(timeout=60)


@pytest.fixture
def twin(make_model, tokenizer):
    """The same model once more, which no server holds."""
    return ChatModel(make_model(), tokenizer, "twin")


def expected(chat_model, diffs, mix, conversation=ASKED, tokens=12):
    with LoRASteerer(chat_model.model, {diffs[name]: value for name, value in mix.items()}):
        (answer,) = generate_answers(chat_model, [conversation], max_new_tokens=tokens)
    return answer


def events(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_chat_is_answered_by_the_mix_that_the_model_is_named_after(client, twin, diffs):
    found = client.post("/v1/chat/completions", json=GREEDY).json()
    assert (found["object"], found["model"]) == ("chat.completion", "base+1*cheer")
    answer = expected(twin, diffs, {"cheer": 1.0})
    (choice,) = found["choices"]
    assert choice["message"]["content"].strip() == answer.text
    assert choice["finish_reason"] == ("stop" if answer.finished else "length")
    prompt = len(twin.tokenizer(twin.render(ASKED))["input_ids"])
    assert found["usage"]["prompt_tokens"] == prompt
    assert found["usage"]["total_tokens"] == prompt + found["usage"]["completion_tokens"]


def test_a_stream_brings_the_same_text(client):
    asked = {**GREEDY, "n": 2, "temperature": 1.0, "seed": 3, "logprobs": True, "top_logprobs": 2}
    whole = client.post("/v1/chat/completions", json=asked).json()
    streamed = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    *pieces, usage = events(client.post("/v1/chat/completions", json=streamed))
    assert usage["usage"] == whole["usage"]
    for choice in whole["choices"]:
        own = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(each["delta"]["content"] for each in own)
        assert text == choice["message"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        logprobs = [token for p in own if p["logprobs"] for token in p["logprobs"]["content"]]
        assert logprobs == choice["logprobs"]["content"]
        assert all(len(each["top_logprobs"]) == 2 for each in logprobs)
    assert len({choice["message"]["content"] for choice in whole["choices"]}) == 2


def test_a_text_goes_on_and_is_echoed_with_its_log_probabilities(client, twin, diffs):
    ids = twin.tokenizer("Once")["input_ids"]
    asked = {**TEXT, "prompt": [ids, ids + ids], "echo": True, "logprobs": 2, "max_tokens": 1}
    found = client.post("/v1/completions", json=asked).json()["choices"]
    with LoRASteerer(twin.model, {diffs["cheer"]: 1.0}):
        twice = text_logprobs(twin, ids + ids, 2)
    assert [choice["index"] for choice in found] == [0, 1]
    assert found[1]["text"].startswith("OnceOnce")
    logprobs = found[1]["logprobs"]
    assert logprobs["tokens"][:-1] == list("OnceOnce")
    assert logprobs["text_offset"] == list(range(9))
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    values = [each.logprob for each in twice]
    assert logprobs["token_logprobs"][1:-1] == pytest.approx(values, abs=1e-4)
    assert all(len(each) in (2, 3) for each in logprobs["top_logprobs"][1:])
    asked = {**TEXT, "logprobs": 2, "n": 2, "temperature": 1, "seed": 1}
    whole = client.post("/v1/completions", json=asked).json()["choices"]
    pieces = events(client.post("/v1/completions", json={**asked, "stream": True}))
    for choice in whole:
        own = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == choice["index"]]
        for name, values in choice["logprobs"].items():
            assert [each for p in own for each in p["logprobs"][name]] == values
    plain = client.post("/v1/completions", json={**TEXT, "echo": True}).json()["choices"][0]
    alone = client.post("/v1/completions", json=TEXT).json()["choices"][0]
    assert plain["text"] == "Once" + alone["text"]
    assert plain["logprobs"] is None


def test_a_stop_string_ends_an_answer_before_it(client):
    plain = client.post("/v1/completions", json={**TEXT, "max_tokens": 12}).json()
    text = plain["choices"][0]["text"]
    stop = text[3:5]
    asked = {**TEXT, "max_tokens": 12, "stop": [stop, "never there"], "stream": True}
    pieces = events(client.post("/v1/completions", json=asked))
    assert "".join(p["choices"][0]["text"] for p in pieces) == text[: text.index(stop)]
    assert pieces[-1]["choices"][0]["finish_reason"] == "stop"


def test_text_waits_until_it_is_certain(chat_model):
    tokenizer = chat_model.tokenizer
    answer = Answer(chat_model, tokenizer("ä")["input_ids"], ["stop!"])
    tokens = tokenizer("aö st stop")["input_ids"]
    said = [answer.add(Token(token, None, None)) for token in tokens]
    assert said == ["a", "", "ö", " ", "", "", "st ", "", "", "", ""]
    assert answer.add(Token(tokenizer("?")["input_ids"][0], None, None)) == "stop?"
    assert answer.add(Token(tokenizer("s")["input_ids"][0], None, "length")) == "s"
    assert (answer.text, answer.reason) == ("aö st stop?s", "length")


def told(answer, tokens):
    """What a stream tells of the tokens, until the last or a stop string."""
    for at, token in enumerate(tokens, start=1):
        yield answer.add(Token(token, None, "length" if at == len(tokens) else None))
        if answer.reason:
            return


def test_what_is_streamed_is_the_whole_answer_whatever_stops_it(chat_model):
    """Stop strings are all parts of a text of characters of one, three and four tokens."""
    text = "k\n用x\n用户🙂🙂用🙃"
    tokens = chat_model.tokenizer(text)["input_ids"]
    places = itertools.combinations(range(len(text) + 1), 2)
    for stop in {text[start:end] for start, end in places}:
        for stops in ([stop], [stop + "!"], ["\n用户", stop + "用"], [stop, "🙂🙃"]):
            answer = Answer(chat_model, tokens, stops)
            streamed = "".join(told(answer, tokens))
            said = (text[:end] for end in range(len(text) + 1))
            first = next((each for each in said if any(map(each.__contains__, stops))), text)
            ends = [first.index(each) for each in stops if each in first]
            assert streamed == answer.text == text[: min(ends, default=len(text))]


def test_characters_made_of_bytes_that_a_tokenizer_decodes_together(chat_model):
    """As Llama 2's: a whole run of bytes is broken while its last character is."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256}
    tokenizer = Tokenizer(tokenizing.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    bytewise = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    model = dataclasses.replace(chat_model, tokenizer=bytewise)

    def tokens(text):
        return [each for a in text for each in ([256] if a == "a" else a.encode())]

    for prompt, text in itertools.product(
        ("", "a", "用", "a用", "🙂户"), ("用户", "用🙂a", "a用户a", "aa")
    ):
        answer = Answer(model, tokens(prompt), ["户!"])
        assert "".join(told(answer, tokens(text))) == answer.text == text


def test_eight_mixes_at_once_are_eight_serial_ones(service, twin, diffs):
    mixes = [service._personas.mix(name) for name in MIXES]
    alone = [expected(twin, diffs, dict(zip(diffs, mix, strict=True))) for mix in mixes]
    with served(service) as (_, url), openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        assert {"base", "candid"} <= {model.id for model in client.models.list()}

        def ask(name):
            return client.chat.completions.create(**{**GREEDY, "model": name})

        with ThreadPoolExecutor(8) as threads:
            together = list(threads.map(ask, MIXES))
        texts = [found.choices[0].message.content.strip() for found in together]
        assert texts == [each.text for each in alone]
        assert len(set(texts)) > 4
        stream = client.chat.completions.create(**GREEDY, stream=True)
        said = "".join(piece.choices[0].delta.content for piece in stream)
        assert said.strip() == texts[1]
        scored = client.completions.create(**TEXT, logprobs=1)
        assert len(scored.choices[0].logprobs.token_logprobs) == 5
        with pytest.raises(openai.NotFoundError, match="no persona 'gpt-4o'"):
            client.chat.completions.create(**{**GREEDY, "model": "gpt-4o"})
        with pytest.raises(openai.BadRequestError, match="beyond ±4"):
            client.chat.completions.create(**{**GREEDY, "model": "base+9*wit"}, stream=True)


LONG = {"role": "user", "content": "x" * 4000}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}


@pytest.mark.parametrize(
    ("path", "changed", "status", "said"),
    [
        ("chat/completions", {"model": "base+1*greed"}, 404, "no trait 'greed' is served"),
        ("chat/completions", {"model": "base+nan*wit"}, 400, "is no mix"),
        ("chat/completions", {"top_p": 0.5}, 400, "top_p: this server does not do that; leave it"),
        ("chat/completions", {"tools": [{}]}, 400, "tools: this server does not"),
        ("chat/completions", {"logit_bias": {"5": 1}}, 400, "logit_bias: this server does not"),
        ("chat/completions", {"min_p": 0.1}, 400, "min_p: this server does not do that; leave it"),
        ("chat/completions", {"temperature": float("nan")}, 400, "temperature"),
        ("chat/completions", {"temperature": 0.001}, 400, "at least 0.01"),
        ("chat/completions", {"max_tokens": 0}, 400, "max_tokens"),
        ("chat/completions", {"max_tokens": 5000}, 400, "over the context window of 2048"),
        ("chat/completions", {"messages": [LONG], "max_tokens": None}, 400, "over the context"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [IMAGE]}, 400, "messages.0.content"),
        ("chat/completions", {"messages": [{"role": "system", "content": "x"}]}, 400, "the user's"),
        ("chat/completions", {"top_logprobs": 2}, 400, "without logprobs: true"),
        ("chat/completions", {"stream_options": {}}, 400, "without stream: true"),
        ("completions", {"n": 17}, 400, "n: "),
        ("completions", {"prompt": ["a"] * 17}, 400, "17 answers in one request, and 16 may"),
        ("completions", {"prompt": ""}, 400, "no tokens"),
        ("completions", {"prompt": []}, 400, "no prompt"),
        ("completions", {"prompt": [[5, 100000]]}, 400, "no token 100000"),
        ("completions", {"prompt": [10**30]}, 400, f"no token {10**30}"),
        ("completions", {"prompt": ["a", 5]}, 400, "prompt.1"),
        ("completions", {"prompt": [5.0]}, 400, "prompt.0"),
        ("completions", {"stop": [""]}, 400, "stop.0: String should have at least 1"),
        ("completions", {"stop": ["a"] * 17}, 400, "stop: List should have at most 16"),
        ("completions", {"model": "base" + "+1*a" * 20_000}, 400, "at most 4000 characters"),
        ("completions", {"model": "base+1e999*wit"}, 400, "must be finite, got inf"),
        ("chat/completions", {"max_completion_tokens": 5}, 400, "max_completion_tokens differ"),
        ("completions", {"echo": True, "stream": True}, 400, "do not go together"),
        ("completions", {"logprobs": 99}, 400, "logprobs"),
        ("embeddings", {}, 404, "POST /v1/embeddings is not served here"),
    ],
)
def test_what_cannot_be_is_refused_in_openais_form(client, path, changed, status, said):
    asked = {**(TEXT if path == "completions" else GREEDY), **changed}
    response = client.post(f"/v1/{path}", content=json.dumps(asked))
    assert response.status_code == status
    error = response.json()["error"]
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


def test_what_is_null_was_not_given(client):
    said = {"role": "assistant", "content": "Yes."}
    plain = {**GREEDY, "messages": [*ASKED, said, *ASKED]}
    dumped = {**said, "refusal": None, "tool_calls": None}  # as the openai package dumps an answer
    nulls = {**plain, "messages": [*ASKED, dumped, *ASKED], "tool_choice": None, "functions": None}
    found, expected = (client.post("/v1/chat/completions", json=asked) for asked in (nulls, plain))
    assert found.json()["choices"] == expected.json()["choices"]


def test_of_a_message_only_what_is_too_much_is_named(client):
    named = {**GREEDY, "messages": [{**ASKED[0], "name": "Bob"}]}
    error = client.post("/v1/chat/completions", json=named).json()["error"]
    assert error["message"] == "messages.0.name: this server does not do that; leave it out"


def test_bodies_that_are_none_or_too_large(client, monkeypatch):
    assert client.post("/v1/completions", content="{").status_code == 400
    assert client.get("/v1/completions").status_code == 405
    monkeypatch.setattr(serving, "LARGEST_BODY", 100)
    response = client.post("/v1/completions", json={**TEXT, "prompt": "x" * 100})
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_long_prompts_are_not_scored(client, monkeypatch):
    monkeypatch.setattr(serving, "LONGEST_SCORED", 3)
    response = client.post("/v1/completions", json={**TEXT, "echo": True, "logprobs": 1})
    assert "up to 3 tokens, got 4" in response.json()["error"]["message"]


def test_a_key_is_asked_for_where_there_is_one(service):
    locked = Service(service.batch, service._personas, "sesame")
    client = TestClient(build_app(locked))
    for given in ("", "Bearer sesam", "Bearer sesämé"):
        response = client.get("/v1/models", headers={"Authorization": given.encode()})
        assert response.status_code == 401
        assert response.json()["error"]["type"] == "authentication_error"
    foreign = TestClient(build_app(Service(service.batch, service._personas, "sesämé")))
    given = {"Authorization": "Bearer sesämé".encode()}
    assert foreign.get("/v1/models", headers=given).status_code == 200
    right = {"Authorization": "Bearer sesame"}
    assert client.get("/v1/models", headers=right).status_code == 200
    assert client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}


def test_a_full_queue_says_when_to_come_back(service):
    """Nobody answers, so that all wait."""
    service.batch.put([Row([5, 6, 7], [0.0, 0.0], 2, print) for _ in range(16)])
    response = TestClient(build_app(service)).post("/v1/completions", json=TEXT)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"
    assert response.json()["error"]["type"] == "rate_limit_error"


def test_a_model_without_a_window_is_refused(service, monkeypatch):
    model = service.batch.chat_model.model
    monkeypatch.setattr(model.config, "get_text_config", lambda decoder: object())
    with pytest.raises(UserError, match="no max_position_embeddings"):
        Service(service.batch, service._personas)


def test_a_longrope_model_is_asked_for_no_more_than_one_table_serves(tokenizer, tmp_path):
    chat_model = ChatModel(tiny_model("Phi-3 longrope"), tokenizer, "tiny")
    batch = Batch(chat_model, {"cheer": random_diff(chat_model.model)})
    client = TestClient(build_app(Service(batch, Personas(batch.traits, tmp_path))))
    response = client.post("/v1/completions", json={**TEXT, "max_tokens": 125})
    assert response.status_code == 400
    assert "of 128 (where longrope changes the rotations" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(service, stream):
    asked = {**GREEDY, "max_tokens": 900, "stream": stream}
    with served(service) as (_, url):
        if stream:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=0.05)
        while sum(service.batch.load):  # a row of 900 tokens would take much longer
            pass


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_while_it_waits_leaves_its_place(service, monkeypatch, stream):
    """Nobody is answered, and all places are taken."""

    def turn():
        time.sleep(0.01)
        return not service.batch.closed

    monkeypatch.setattr(service.batch, "_turn", turn)
    monkeypatch.setattr(reply, "LOOKING", 0.05)
    asked = {**TEXT, "n": 16, "stream": stream}
    with served(service) as (_, url):
        for _ in range(2):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/completions", json=asked, timeout=0.5)
            until = time.monotonic() + 60
            while sum(service.batch.load):
                assert time.monotonic() < until


@pytest.mark.parametrize("grace", [0.0, 1e9])
def test_a_stop_ends_open_requests_properly(service, grace):
    """With time to end they are answered; without, their stream says so. Then nothing is taken."""
    asked = {**GREEDY, "max_tokens": 60 if grace else 900, "stream": True}
    with (
        served(service, grace) as (server, url),
        httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=60) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        server.handle_exit(15, None)
        last = [line for line in lines if line][-1]
    if grace:
        assert last == "data: [DONE]"
    else:
        said = json.loads(last.removeprefix("data: "))["error"]["message"]
        assert "the server is stopping" in said
    response = TestClient(build_app(service)).post("/v1/completions", json=TEXT)
    assert (response.status_code, response.json()["error"]["type"]) == (503, "server_error")
    assert TestClient(build_app(service)).get("/health").status_code == 503


def test_a_request_that_never_comes_whole_does_not_keep_the_server(service, monkeypatch):
    monkeypatch.setattr(serving, "LAST_WORDS", 0)
    with served(service, 0.0) as (_, url), socket.socket() as client:
        client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        time.sleep(0.2)


@pytest.mark.parametrize("stream", [True, False])
def test_what_fails_in_the_batch_ends_its_requests_and_not_the_server(client, monkeypatch, stream):
    def fail(*_):
        raise IndexError("index out of range in self")

    whole = client.post("/v1/completions", json=TEXT).json()
    with monkeypatch.context() as patch:
        patch.setattr(batching.Decoding, "begin", fail)
        failed = client.post("/v1/completions", json={**TEXT, "stream": stream})
    assert failed.status_code == (200 if stream else 500)
    error = json.loads(failed.text.removeprefix("data: "))["error"]
    assert error["type"] == "server_error"
    assert "the model failed (index out of range in self)" in error["message"]
    assert client.post("/v1/completions", json=TEXT).json()["choices"] == whole["choices"]


def test_tokens_without_an_embedding_are_refused(chat_model, diffs, tmp_path):
    tokenizer = copy.deepcopy(chat_model.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    batch = Batch(dataclasses.replace(chat_model, tokenizer=tokenizer), diffs)
    client = TestClient(build_app(Service(batch, Personas(batch.traits, tmp_path))))
    last = tokenizer.pad_token_id
    padded = [{"role": "user", "content": "a<pad>"}]
    for path, asked in (
        ("completions", {**TEXT, "prompt": [5, last]}),
        ("completions", {**TEXT, "prompt": "a<pad>"}),
        ("chat/completions", {**GREEDY, "messages": padded}),
    ):
        refused = client.post(f"/v1/{path}", json=asked)
        assert refused.status_code == 400
        said = f"prompt: no token {last}; the model has 0 to {last - 1}"
        assert refused.json()["error"]["message"] == said


def test_too_many_answers_are_refused_before_anything_is_made_of_them(service, monkeypatch):
    monkeypatch.setattr(service, "_tokenizer", None)
    monkeypatch.setattr(service, "_personas", None)
    asked = {**TEXT, "prompt": ["a"] * 9, "n": 2}
    response = TestClient(build_app(service)).post("/v1/completions", json=asked)
    assert response.status_code == 400
    assert "18 answers in one request, and 16 may" in response.json()["error"]["message"]


def test_a_fault_of_ours_ends_the_server(service, monkeypatch):
    def fail(*_):
        raise KeyError("ours")

    monkeypatch.setattr(service.batch, "_turn", fail)
    with pytest.raises(KeyError, match="ours"), served(service):
        pass


@pytest.fixture
def harness(monkeypatch):
    """Return what evaluates a model of lm-eval on three items of a task."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    manager = TaskManager(include_defaults=False)

    def evaluate(kind, task, **arguments):
        found = simple_evaluate(
            model=kind, model_args=arguments or None, tasks=[task], task_manager=manager, limit=3,
            bootstrap_iters=0, log_samples=True, apply_chat_template="chat" in str(kind),
        )  # fmt: skip
        return [sample["resps"] for sample in found["samples"][task["task"]]]

    return evaluate


def test_lm_eval_finds_the_likelihoods_of_the_merged_model(
    service, twin, diffs, harness, model_folder
):
    task = _local_task(resource_path(Path("datasets/capability/choice.yaml")))
    with LoRASteerer(twin.model, {diffs["wit"]: 1.0}):
        local = harness(HFLM(pretrained=twin.model, tokenizer=twin.tokenizer), task)
    with served(service) as (_, url):
        over_http = harness(
            "local-completions", task, model="base+1*wit", base_url=f"{url}/v1/completions",
            tokenizer=str(model_folder), tokenizer_backend="huggingface", batch_size=4,
        )  # fmt: skip
    ours, theirs = ([pair for sample in each for (pair,) in sample] for each in (over_http, local))
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-3)


def test_lm_eval_asks_for_chats(service, twin, diffs, harness, tmp_path):
    rows = [{"question": f"Why {number}?", "answer": "x"} for number in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "asked",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    }
    with served(service) as (_, url):
        found = harness(
            "local-chat-completions", task, model="base-1*cheer",
            base_url=f"{url}/v1/chat/completions",
        )  # fmt: skip
    asked = [[{"role": "user", "content": row["question"]}] for row in rows]
    answers = [expected(twin, diffs, {"cheer": -1.0}, each, 8).text for each in asked]
    assert [text.strip() for ((text,),) in found] == answers


def test_inspect_ai_evaluates_a_mix(service, twin, diffs, tmp_path, monkeypatch):
    inspect_ai = pytest.importorskip("inspect_ai", reason="run scripts/test_inspect_ai.sh")
    from inspect_ai.dataset import Sample
    from inspect_ai.scorer import exact
    from inspect_ai.solver import generate

    monkeypatch.setenv("LOCAL_API_KEY", "none")
    asked = [f"Why {number}?" for number in range(3)]
    chats = [[{"role": "user", "content": question}] for question in asked]
    answers = [expected(twin, diffs, {"wit": 1.0}, each, 8).text for each in chats]
    samples = [Sample(a, target=b) for a, b in zip(asked, answers, strict=True)]
    with served(service) as (_, url):
        (log,) = inspect_ai.eval(
            inspect_ai.Task(dataset=samples, solver=generate(), scorer=exact()),
            model="openai-api/local/base+1*wit", model_base_url=f"{url}/v1", temperature=0,
            max_tokens=8, log_dir=str(tmp_path), display="none",
        )  # fmt: skip
    assert log.status == "success", log.error
    assert [sample.output.completion.strip() for sample in log.samples] == answers
    assert [score.metrics["mean"].value for score in log.results.scores] == [1.0]
