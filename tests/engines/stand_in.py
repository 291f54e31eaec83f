"""A server that answers as vLLM with the plugin does, from a tiny model in this process."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from persona_lora.core.lora_diff import LoRADiff
from persona_lora.engines.vllm_server import MIX, ServedBasis, short_digest
from persona_lora.models.loading import ChatModel
from persona_lora.steering.live import LiveLoRA

Reply = tuple[int, Any]
Failing = Callable[[Mapping[str, Any]], Reply | None]
DOWN: Reply = (503, {"error": {"message": "starting"}})


def is_row(body: Mapping[str, Any]) -> bool:
    """Say whether a row is asked for, and no text's log-probabilities."""
    return "prompt_logprobs" not in body


def dies_after(number: int) -> Failing:
    """Answers so many rows, and then nothing any more."""
    asked: list[Mapping[str, Any]] = []

    def failing(body: Mapping[str, Any]) -> Reply | None:
        asked.extend([body] if is_row(body) else [])
        return DOWN if len(asked) > number else None

    return failing


class StandIn:
    """What it holds, what it was asked, and when it fails: ``failing`` may answer in its place."""

    def __init__(
        self,
        chat_model: ChatModel,
        diffs: Sequence[LoRADiff],
        *,
        plugin: bool = True,
        failing: Failing = lambda body: None,
    ) -> None:
        self.model = copy.deepcopy(chat_model.model)
        self.diffs = list(diffs)
        self.basis = ServedBasis("c0ffee", tuple(map(short_digest, diffs)))
        self.plugin = plugin
        self.failing = failing
        self.rows: list[str] = []  # the models that rows were answered with
        self._lock = threading.Lock()

    def models(self) -> Reply:
        names = ["tiny", *([self.basis.name] if self.diffs and self.plugin else [])]
        return 200, {"data": [{"id": name, "parent": None} for name in names]}

    def complete(self, body: Mapping[str, Any]) -> Reply:
        failed = self.failing(body)
        if failed is not None:
            return failed
        mix = body["model"].startswith(MIX)
        if mix and not self.plugin:
            return 404, {"error": {"message": "The model does not exist."}}
        numbers = body["model"].rpartition(":")[2].split(",") if mix else ["0"] * len(self.diffs)
        with self._lock, torch.inference_mode():
            if not self.diffs:
                return 200, {"choices": [self._choice(body)]}
            with LiveLoRA(self.model, self.diffs, [list(map(float, numbers))]):
                return 200, {"choices": [self._choice(body)]}

    def _choice(self, body: Mapping[str, Any]) -> dict[str, Any]:
        ids = list(body["prompt"])
        if "prompt_logprobs" in body:
            logprobs = torch.log_softmax(self.model(torch.tensor([ids])).logits[0], dim=-1)
            pairs = zip(logprobs, ids[1:], strict=False)
            places = [{str(token): {"logprob": float(row[token])}} for row, token in pairs]
            return {"prompt_logprobs": [None, *places]}
        self.rows.append(body["model"])
        new: list[int] = []
        while len(new) < body["max_tokens"]:
            new.append(int(self.model(torch.tensor([ids + new])).logits[0, -1].argmax()))
            if new[-1] in body["stop_token_ids"]:
                break
        return {"token_ids": new, "logprobs": {"token_logprobs": [-0.5] * len(new)}}


class OtherMake(StandIn):
    """A server of another make, whose parts are changed by name.

    ``takes_ids``: token ids as prompts; ``form`` of its log-probabilities ("tokens", "content"
    with ids, or None); ``window``: it keeps so many tokens of a prompt, and, where it is
    ``lying``, counts them all; ``template`` goes before a prompt; ``penalty`` on tokens that were
    there already; ``error`` in nats; ``strict``: parameters that it does not know are refused.
    """

    def __init__(self, chat_model: ChatModel, **parts: Any) -> None:
        super().__init__(chat_model, [])
        self.tokenizer = chat_model.tokenizer
        self.parts = {"takes_ids": True, "form": "tokens", "window": 10**6, **parts}
        self.bodies: list[Mapping[str, Any]] = []

    def models(self) -> Reply:
        return 200, {"data": [{"id": "tiny", "owned_by": self.parts.get("owner", "somebody")}]}

    def complete(self, body: Mapping[str, Any]) -> Reply:
        failed = self.failing(body)
        if failed is not None:
            return failed
        refused = 400, {"error": {"message": "it takes no such thing"}}
        strange = {"top_k", "prompt_logprobs", "samplers"} & body.keys()
        prompt = body["prompt"]
        if not (self.parts["takes_ids"] or isinstance(prompt, str)):
            return refused
        if self.parts.get("strict") and strange:
            return refused
        self.bodies.append(body)
        encoded = (
            self.tokenizer(prompt, add_special_tokens=False) if isinstance(prompt, str) else {}
        )
        ids = encoded.get("input_ids", prompt)
        ids = [*self.parts.get("template", ()), *ids][-self.parts["window"] :]
        with self._lock, torch.inference_mode():
            choice, new = self._continued(ids, body)
        read = len(prompt) if self.parts.get("lying") else len(ids)
        usage = {"prompt_tokens": read, "completion_tokens": new}
        return 200, {"choices": [choice], **({} if self.parts.get("mute") else {"usage": usage})}

    def _continued(self, ids: list[int], body: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        new: list[int] = []
        values: list[float] = []
        ends = () if self.parts.get("endless") else (self.tokenizer.eos_token_id,)
        reason = "length"
        while len(new) < min(body["max_tokens"], self.parts.get("longest", 10**6)):
            scores = torch.log_softmax(self.model(torch.tensor([ids + new])).logits[0, -1], dim=-1)
            seen = torch.zeros_like(scores)
            seen[torch.tensor(ids + new)] = self.parts.get("penalty", 0.0)
            token = int((scores - seen).argmax())
            if token in ends:
                reason = "stop"
                break
            new.append(token)
            values.append(float(scores[token]) + self.parts.get("error", 0.0))
        texts = self.tokenizer.batch_decode([[each] for each in new])
        triples = zip(new, texts, values, strict=True)
        logprobs = {
            "tokens": {"tokens": texts, "token_logprobs": values},
            "content": {
                "content": [{"id": i, "token": text, "logprob": v} for i, text, v in triples]
            },
            None: None,
        }[self.parts["form"]]
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        return {"text": text, "logprobs": logprobs, "finish_reason": reason}, len(new)


@contextmanager
def served(stand_in: StandIn) -> Iterator[str]:
    """Serve it on this machine; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(*stand_in.models())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*stand_in.complete(body))

        def _send(self, status: int, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
