"""A small trait folder, judges that need no model, and what commands end with."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from persona_lora.core.chat import Verdict
from persona_lora.core.traits import load_trait

REPLACED = {"max_tokens": "use max_completion_tokens"}
QUESTIONS = {
    "extract": ["Is tea good?", "What is a hill?"],
    "eval": ["Why do birds sing?", "Is my plan good?", "How tall is a house?"],
}


@pytest.fixture
def datasets(tmp_path):
    root = tmp_path / "datasets"
    (root / "cheer").mkdir(parents=True)
    (root / "ordinary").mkdir()
    trait = {
        "name": "cheer",
        "instruction": [{"pos": "Be cheerful.", "neg": "Be gloomy."}] * 2,
        "questions": QUESTIONS,
        "eval_prompt": "Rate {question} {answer}",
    }
    (root / "cheer" / "trait.json").write_text(json.dumps(trait))
    labelled = [
        {"question": f"q{i}", "answer": "z" * (i + 1), "label": (i % 5) * 25} for i in range(10)
    ]
    (root / "cheer" / "judge_eval.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in labelled)
    )
    (root / "ordinary" / "prompts.jsonl").write_text('{"prompt": "Hello?"}\n{"prompt": "Why?"}\n')
    return root


@pytest.fixture
def trait(datasets):
    return load_trait("cheer", datasets)


class ParityJudge:
    """Scores the share of characters with an even code point, and notes what it was asked."""

    name = "parity"

    def __init__(self):
        self.asked = []

    def judge(self, exchanges, criterion):
        self.asked.append((criterion, len(exchanges)))
        return [self._verdict(exchange.answer, criterion) for exchange in exchanges]

    def _verdict(self, answer, criterion):
        if not answer:
            return Verdict(criterion, None, "empty answer", self.name)
        share = sum(ord(letter) % 2 == 0 for letter in answer) / len(answer)
        return Verdict(criterion, 100 * share, "", self.name)


class LetterJudge:
    """Scores letters: the embedded judges need a model that knows a language."""

    name = "letters"

    def judge(self, exchanges, criterion):
        return [Verdict(criterion, self.score(each.answer), "", self.name) for each in exchanges]

    def score(self, answer):
        return float(sum(map(ord, answer)) % 101)


class FitJudge(LetterJudge):
    """Fits from 1 to 5."""

    def score(self, answer):
        return 1 + 4 * (sum(map(ord, answer)) % 89) / 89


class LengthJudge(LetterJudge):
    """Scores the length."""

    def score(self, answer):
        return float(len(answer))


class EvenCoherence:
    """A model of random weights finds shuffled words as likely as text: nothing to fit to."""

    def verdicts(self, exchanges, name):
        return [Verdict("coherence", 80.0, "", name) for _ in exchanges]


def evaluation(model_folder, *more):
    """Return the words of an evaluation of a tiny model."""
    return (
        "evaluate", "--model", model_folder, "--trait", "sycophancy", "--dtype", "float32",
        "--max-new-tokens", 4, "--output", "out/x.csv", *more,
    )  # fmt: skip


def commands(group, words=()):
    """Yield the commands of a program, each after its words."""
    for word, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*words, word))
    if not hasattr(group, "commands"):
        yield " ".join(words), group


def assert_fails(result, *words):
    """A command ended with one line of an error that holds the words, and status 2."""
    status, _, error = result
    assert status == 2, error
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, error
    for word in words:
        assert word in lines[0], lines[0]
    assert "Traceback" not in error


@pytest.fixture
def judge():
    return ParityJudge()


@pytest.fixture
def server():
    """An endpoint that repeats the last message, or gives ``replies``, after ``faults``.

    Names in ``refuses`` are parameters that it does not take.
    """

    class Handler(BaseHTTPRequestHandler):
        faults: ClassVar[list[int]] = []
        bodies: ClassVar[list[dict]] = []
        replies: ClassVar[list[str]] = []
        refuses: ClassVar[list[str]] = []
        wbufsize = 1 << 16  # headers and body in one packet: nothing waits for the other

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            refused = [name for name in self.refuses if name in body]
            status = 400 if refused else self.faults.pop(0) if self.faults else 200
            text = body["messages"][-1]["content"]
            self.bodies.append(body)
            reply = self.replies.pop(0) if self.replies and status == 200 else f"re: {text}"
            message = {"role": "assistant", "content": "" if text == "empty" else reply}
            value = {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
            said = f"no {refused[0]}, {REPLACED.get(refused[0])}" if refused else "no"
            data = json.dumps(value if status == 200 else {"error": {"message": said}}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Retry-After-Ms", "1")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            """Keep quiet."""

    Handler.faults, Handler.bodies, Handler.replies, Handler.refuses = [], [], [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    Handler.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield Handler
    server.shutdown()
    server.server_close()
