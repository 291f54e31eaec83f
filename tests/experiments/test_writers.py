"""The endpoint's writer over HTTP: order kept, passing faults retried, lasting ones explained."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from persona_lora.core.chat import user_question
from persona_lora.core.errors import UserError
from persona_lora.experiments.writers import Endpoint, EndpointWriter, LocalWriter

ASKED = {"max_tokens": 16, "temperature": 0.0, "seed": 3}


@pytest.fixture
def server():
    """Repeats the last message, after as many faults as it is told."""

    class Handler(BaseHTTPRequestHandler):
        faults: ClassVar[list[int]] = []
        bodies: ClassVar[list[dict]] = []

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status = self.faults.pop(0) if self.faults else 200
            text = body["messages"][-1]["content"]
            self.bodies.append(body)
            message = {"role": "assistant", "content": "" if text == "empty" else f"re: {text}"}
            value = {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
            data = json.dumps(value if status == 200 else {"error": {"message": "no"}}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Retry-After-Ms", "1")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            """Keep quiet."""

    Handler.faults, Handler.bodies = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    Handler.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield Handler
    server.shutdown()
    server.server_close()


def writer_of(server, **options):
    return EndpointWriter(Endpoint("m", server.url, **options))


def test_replies_keep_the_order_of_the_questions(server):
    texts = [f"q{i}" for i in range(20)] + ["empty"]
    seen = []
    replies = writer_of(server).write(
        [user_question(text) for text in texts], **ASKED, progress=lambda *at: seen.append(at)
    )
    assert replies == [f"re: q{i}" for i in range(20)] + [None]
    assert seen[-1] == (21, 21)
    assert {body["model"] for body in server.bodies} == {"m"}
    assert sorted(body["seed"] for body in server.bodies) == list(range(3, 24))


def test_a_passing_fault_is_retried_and_a_stubborn_one_is_none(server):
    server.faults += [500, 429]
    assert writer_of(server).write([user_question("q")], **ASKED) == ["re: q"]
    server.faults += [500] * 2
    assert writer_of(server, max_retries=1).write([user_question("q")], **ASKED) == [None]


@pytest.mark.parametrize("status", [401, 404])
def test_a_lasting_fault_is_explained(server, status):
    server.faults += [status]
    with pytest.raises(UserError, match=rf"HTTP {status}.*OPENAI_API_KEY"):
        writer_of(server).write([user_question("q")], **ASKED)


def test_openai_itself_needs_a_key():
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        EndpointWriter(Endpoint("m", "https://api.openai.com/v1"))
    with pytest.raises(UserError, match="base URL"):
        EndpointWriter(Endpoint("m", "nowhere"))


def test_the_local_writer_repeats_itself_for_a_seed(chat_model):
    writer = LocalWriter(chat_model)
    ask = {"max_tokens": 8, "temperature": 1.0}
    first = writer.write([user_question("Hello?")] * 2, seed=1, **ask)
    assert first == writer.write([user_question("Hello?")] * 2, seed=1, **ask)
    assert first != writer.write([user_question("Hello?")] * 2, seed=2, **ask)
