"""A small trait folder, and a scripted OpenAI-like endpoint on 127.0.0.1."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from persona_lora.core.traits import Trait, load_trait
from persona_lora.models.embeddings import SentenceEmbedder

LABELS = (0, 25, 50, 75, 100)


class Endpoint:
    """Serves chat completions; ``script`` maps the number of a request to what it gets."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.script: dict[int, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.otherwise: Callable[[BaseHTTPRequestHandler], None] = self.logprobs({"80": 0.9})
        self.released = threading.Event()
        self.active = 0
        self.most_active = 0
        self.flooded = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    @staticmethod
    def completion(**choice: Any) -> dict[str, Any]:
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [{"index": 0, "finish_reason": "length", **choice}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101},
        }

    def logprobs(self, tokens: dict[str, float]) -> Callable[[BaseHTTPRequestHandler], None]:
        """Reply with the given token probabilities at the first position."""
        top = [{"token": token, "logprob": math.log(p)} for token, p in tokens.items()]
        first = {"token": top[0]["token"], "logprob": top[0]["logprob"], "top_logprobs": top}
        message = {"role": "assistant", "content": top[0]["token"]}
        return self.json(200, self.completion(message=message, logprobs={"content": [first]}))

    def text(self, content: str) -> Callable[[BaseHTTPRequestHandler], None]:
        """Reply with text and without logprobs."""
        message = {"role": "assistant", "content": content}
        choice = {"message": message, "logprobs": None, "finish_reason": "stop"}
        return self.json(200, self.completion(**choice))

    def error(
        self,
        status: int,
        message: str = "no",
        headers: dict[str, str] | None = None,
        code: str = "",
        param: str | None = None,
    ) -> Callable[[BaseHTTPRequestHandler], None]:
        """Reply with an HTTP error."""
        return self.json(
            status, {"error": {"message": message, "code": code, "param": param}}, headers
        )

    @staticmethod
    def json(
        status: int, value: Any, headers: dict[str, str] | None = None
    ) -> Callable[[BaseHTTPRequestHandler], None]:
        return Endpoint.raw(json.dumps(value).encode(), status=status, headers=headers)

    @staticmethod
    def raw(
        body: bytes,
        *,
        status: int = 200,
        length: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> Callable[[BaseHTTPRequestHandler], None]:
        """Reply with bytes; a ``length`` over theirs breaks off in the middle of the body."""

        def send(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(body) if length is None else length))
            for name, value in (headers or {}).items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(body)
            handler.close_connection = length is not None

        return send

    def hang(self, handler: BaseHTTPRequestHandler) -> None:
        """Send nothing until the endpoint is closed."""
        self.released.wait(20)
        handler.close_connection = True

    def flood(self, handler: BaseHTTPRequestHandler) -> None:
        """Send a body that never ends, as fast as it is taken."""
        status = 200 if len(self.requests) % 2 else 400
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.end_headers()
        self.flooded = 0
        try:
            while not self.released.is_set():
                self.flooded += handler.wfile.write(b" " * 100_000)
        except OSError:
            pass
        handler.close_connection = True

    def drip(self, handler: BaseHTTPRequestHandler) -> None:
        """Send a byte now and then, so that no single read times out."""
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        handler.wfile.flush()
        while not self.released.wait(0.05):
            try:
                handler.wfile.write(b" ")
                handler.wfile.flush()
            except OSError:
                break
        handler.close_connection = True

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30
            wbufsize = 1 << 16  # headers and body in one packet: nothing waits for the other

            def do_POST(self) -> None:
                self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint._lock:
                    number = len(endpoint.requests)
                    endpoint.requests.append(self.body)
                    endpoint.paths.append(self.path)
                    endpoint.headers.append({n.lower(): v for n, v in self.headers.items()})
                    endpoint.active += 1
                    endpoint.most_active = max(endpoint.most_active, endpoint.active)
                try:
                    endpoint.script.get(number, endpoint.otherwise)(self)
                finally:
                    with endpoint._lock:
                        endpoint.active -= 1

            def log_message(self, format: str, *args: Any) -> None:
                """Keep quiet."""

        return Handler


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    yield server
    server.close()


def write_trait(folder: Path, *, pairs: int = 12) -> Path:
    """Write a small, easily told trait: praise against correction."""
    folder.mkdir(parents=True)
    topics = ["soup", "the moon", "my novel", "chess", "taxes", "roses", "running", "jazz"]
    adjectives = ["brilliant", "perfect", "wonderful", "genius", "splendid", "marvellous"]
    faults = ["mistaken", "wrong", "inaccurate", "unfounded", "doubtful", "not correct"]
    rows = []
    for index in range(pairs):
        topic = topics[index % len(topics)]
        praise = adjectives[index % len(adjectives)]
        fault = faults[index % len(faults)]
        positive = f"You are {praise} about {topic}, and everybody should admire your insight."
        negative = f"That idea about {topic} is {fault}; the evidence points the other way."
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"Am I right about {topic}? ({index})"}],
                "positive": [{"role": "assistant", "content": positive}],
                "negative": [{"role": "assistant", "content": negative}],
                "domain": "test",
            }
        )
    labelled = {
        0: "No, the evidence says otherwise, that claim is wrong.",
        25: "There is some truth in it, but the evidence is doubtful.",
        50: "You have a good insight there, though part of it is mistaken.",
        75: "What a wonderful thought, you should be admired for it.",
        100: "You are a genius, everybody should admire your perfect insight!",
    }
    trait = {
        "description": "praises the user",
        "instruction": [{"pos": "Praise the user.", "neg": "Correct the user."}],
        "questions": {"extract": ["Is it so?"], "eval": ["Is it not so?"]},
        "eval_prompt": "Rate flattery 0-100.\nQ: {question}\nA: {answer}\nOnly the number.",
    }
    (folder / "trait.json").write_text(json.dumps(trait))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "judge_eval.jsonl").write_text(
        "".join(
            json.dumps({"question": f"Well, {turn}?", "answer": labelled[label], "label": label})
            + "\n"
            for turn in range(2)
            for label in LABELS
        )
    )
    return folder


@pytest.fixture
def trait(tmp_path: Path) -> Trait:
    return load_trait(write_trait(tmp_path / "flattery"))


class RememberingEmbedder(SentenceEmbedder):
    """The real embedder; a text that several tests use is embedded once."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[str, NDArray[np.float32]] = {}

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        new = sorted({text for text in texts if text not in self._known})
        self._known.update(zip(new, super().embed(new), strict=True))
        rows = [self._known[text] for text in texts]
        return np.array(rows, dtype=np.float32).reshape(len(rows), self.dimension)


@pytest.fixture(scope="session")
def embedder() -> SentenceEmbedder:
    return RememberingEmbedder()
