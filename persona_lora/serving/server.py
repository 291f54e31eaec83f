"""An OpenAI-compatible server over a running batch; a persona is the name of a model.

Knows HTTP and what a request may ask for; refuses to know tensors. What a request may be refused
for is found before its rows wait: a name, a parameter, the context window.
"""

from __future__ import annotations

import hmac
import math
import secrets
import socket
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import NamedTuple, TypeVar

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from persona_lora.core.errors import UserError
from persona_lora.models.structure import (
    LONGROPE,
    context_window,
    embedding_rows,
    longrope_crossing,
)
from persona_lora.serving.batching import Batch, Busy, Row
from persona_lora.serving.mixes import Personas
from persona_lora.serving.reply import Answer, Choice, Logprobs, Reply
from persona_lora.serving.schemas import UNSERVED, Asked, AskedChat, AskedText, Refusal, refusal_of

LARGEST_BODY = 4_000_000  # bytes
USUAL_LENGTH = 512  # tokens of a chat's answer that asks for no number
USUAL_TEXT = 16  # of a completion: OpenAI's own
LAST_WORDS = 5  # seconds, after the grace, in which clients may read how their answers end
LONGEST_SCORED = 2048  # tokens of a prompt whose logits are held at once


class Prompt(NamedTuple):
    """A prompt's tokens, how many may follow, how many likeliest are told, and its text to echo."""

    tokens: list[int]
    limit: int
    top: int | None
    echoed: str | None = None


class Service:
    """What stands behind the endpoints. UserError for a model that names no context window."""

    def __init__(self, batch: Batch, personas: Personas, key: str | None = None) -> None:
        model, tokenizer = batch.chat_model.model, batch.chat_model.tokenizer
        self.batch = batch
        self._personas = personas
        self._key = key
        self._tokenizer = tokenizer
        # A tokenizer may have tokens, for padding, that the model has no embedding of.
        self._known = min(len(tokenizer), embedding_rows(model))
        window = context_window(model.config)
        if window is None:
            raise UserError(
                f"the configuration of {batch.chat_model.name} names no max_position_embeddings, "
                "and no request could be held to the context window; add it to config.json"
            )
        self._window = window
        self._why = f" ({LONGROPE})" if longrope_crossing(model.config) else ""

    def check_key(self, request: Request) -> None:
        """Refuse a request without the key, where there is one."""
        header = request.headers.get("authorization", "").encode("latin-1")  # as it was sent
        given = header.removeprefix(b"Bearer ")
        if self._key is not None and not hmac.compare_digest(given, self._key.encode()):
            raise Refusal(401, "the key is missing or wrong; send Authorization: Bearer KEY")

    def health(self) -> Response:
        """Say whether requests are taken, and how many rows run and wait."""
        running, waiting = self.batch.load
        status = "stopping" if self.batch.closed else "ok"
        body = {"status": status, "running": running, "waiting": waiting}
        return JSONResponse(body, status_code=503 if self.batch.closed else 200)

    def models(self) -> dict[str, object]:
        """List the personas that have a name; any other mix is a name, too."""
        entry = {"object": "model", "created": 0, "owned_by": "persona-lora"}
        return {"object": "list", "data": [{"id": n, **entry} for n in self._personas.names()]}

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        asked = await _read(request, AskedChat)
        mix = self._mix(asked, 1)
        if asked.messages[-1].role != "user":
            raise UserError("the last message must be the user's: that is what is answered")
        if asked.top_logprobs is not None and not asked.logprobs:
            raise UserError("top_logprobs does nothing without logprobs: true")
        rendered = self.batch.chat_model.render(asked.conversation)
        encoded = self._tokenizer(rendered, add_special_tokens=False)
        tokens = self._checked(encoded["input_ids"])
        limit = asked.max_completion_tokens or asked.max_tokens
        if asked.max_tokens not in (None, limit):
            raise UserError("max_tokens and max_completion_tokens differ; leave one out")
        limit = limit or max(1, min(USUAL_LENGTH, self._window - len(tokens)))
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        reply = Reply(asked.model, Logprobs(self.batch.chat_model, top or 0), chat=True)
        self._add(reply, asked, mix, Prompt(tokens, limit, top))
        return await self._send(request, reply, asked)

    async def completion(self, request: Request) -> Response:
        """Go on with texts, given as they are or as token ids."""
        asked = await _read(request, AskedText)
        mix = self._mix(asked, len(asked.prompt))
        if asked.echo and asked.stream:
            raise UserError("echo and stream do not go together; leave one out")
        reply = Reply(asked.model, Logprobs(self.batch.chat_model, asked.logprobs or 0), chat=False)
        for prompt in asked.prompt:
            given = self._tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
            tokens = self._checked(given)
            echoed = None
            if asked.echo:
                echoed = prompt if isinstance(prompt, str) else str(self._tokenizer.decode(tokens))
            limit = asked.max_tokens or USUAL_TEXT
            self._add(reply, asked, mix, Prompt(tokens, limit, asked.logprobs, echoed))
        return await self._send(request, reply, asked)

    def _mix(self, asked: Asked, prompts: int) -> list[float]:
        """Return the persona's coefficients; refuse more answers than may wait."""
        if not prompts:
            raise UserError("there is no prompt; give one")
        number = prompts * (asked.n or 1)
        if number > self.batch.most_waiting:
            raise UserError(
                f"{number} answers in one request, and {self.batch.most_waiting} may wait "
                "here; ask for fewer at a time"
            )
        return self._personas.mix(asked.model)

    def _checked(self, tokens: list[int]) -> list[int]:
        """Return a prompt's tokens; UserError for one that the model does not have."""
        for token in tokens:
            if not 0 <= token < self._known:
                raise UserError(f"prompt: no token {token}; the model has 0 to {self._known - 1}")
        return tokens

    def _add(self, reply: Reply, asked: Asked, mix: list[float], prompt: Prompt) -> None:
        """Add the answers to one prompt, in streams of random numbers of their own."""
        length = len(prompt.tokens)
        if not length:
            raise UserError("a prompt has no tokens; write something")
        if length + prompt.limit > self._window:
            raise UserError(
                f"a prompt of {length} tokens and max_tokens {prompt.limit} are "
                f"{length + prompt.limit}, over the context window of {self._window}{self._why}; "
                "shorten one"
            )
        scored = prompt.echoed is not None and prompt.top is not None
        if scored and length > LONGEST_SCORED:
            raise UserError(
                f"echo with logprobs is for prompts of up to {LONGEST_SCORED} tokens, got {length}"
            )
        heat = 1.0 if asked.temperature is None else asked.temperature
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        for stream in range(asked.n or 1):
            row = Row(
                prompt=prompt.tokens,
                mix=mix,
                max_tokens=prompt.limit,
                tell=reply.teller(),
                temperature=heat,
                seed=seed,
                stream=stream,
                top=prompt.top,
                scored=scored,
            )
            answer = Answer(self.batch.chat_model, prompt.tokens, asked.stop or [])
            reply.choices.append(Choice(row, answer, prompt.echoed or ""))

    async def _send(self, request: Request, reply: Reply, asked: Asked) -> Response:
        """Let the rows wait, and send what becomes of them."""
        if asked.stream_options is not None and not asked.stream:
            raise UserError("stream_options do nothing without stream: true")
        rows = [choice.row for choice in reply.choices]
        self.batch.put(rows)
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            events = reply.stream(request.is_disconnected, usage=usage)
            return StreamingResponse(events, media_type="text/event-stream")
        return JSONResponse(await reply.whole(request.is_disconnected))


Kind = TypeVar("Kind", bound=Asked)


async def _read(request: Request, kind: type[Kind]) -> Kind:
    """Return what a request asks for; Refusal for too large a body, UserError for a wrong one."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_BODY:
            raise Refusal(413, f"a request may hold {LARGEST_BODY} bytes; send less at a time")
    try:
        return kind.model_validate_json(bytes(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the request"
        said, unknown = first["msg"], first["type"] == "extra_forbidden"
        if unknown or where.partition(".")[0] in UNSERVED:
            said = "this server does not do that; leave it out"
        if unknown and len(first["loc"]) == 1:
            said += f", or use {', '.join(kind.model_fields)}"
        raise UserError(f"{where}: {said}") from error


def build_app(service: Service) -> FastAPI:
    """Return the application: the endpoints, and errors in OpenAI's form."""

    async def refuse(request: Request, error: Exception) -> Response:
        refusal = refusal_of(error)
        return JSONResponse(refusal.body(), refusal.status, refusal.headers)

    async def unknown(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 404
        path = f"{request.method} {request.url.path}"
        return await refuse(
            request, Refusal(status, f"{path} is not served here; see docs/serving.md")
        )

    app = FastAPI(title="persona-lora", openapi_url=None)
    for kind in (UserError, Busy, Refusal, Exception):
        app.add_exception_handler(kind, refuse)
    app.add_exception_handler(HTTPException, unknown)
    app.add_api_route("/health", service.health, response_model=None)
    guarded = APIRouter(prefix="/v1", dependencies=[Depends(service.check_key)])
    guarded.add_api_route("/models", service.models)
    for path, answer in (("/chat/completions", service.chat), ("/completions", service.completion)):
        guarded.add_api_route(path, answer, methods=["POST"], response_model=None)
    app.include_router(guarded)
    return app


class Server(uvicorn.Server):
    """uvicorn, which closes the batch before it waits for open requests, and ends with status 0."""

    def __init__(self, service: Service, grace: float) -> None:
        app, most = build_app(service), math.ceil(min(grace, 1e9)) + LAST_WORDS
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=most
        )
        super().__init__(config)
        self._batch = service.batch
        self._grace = grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at the first signal; at the second, at once."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse what comes, end what waits, and let what runs end in the time it has."""
        self._batch.close(0 if self.force_exit else self._grace)
        await super().shutdown(sockets)

    def answer(self, place: socket.socket) -> None:
        """Serve until a signal, or until the batch fails: its error is raised."""

        def work() -> None:
            try:
                self._batch.run()
            finally:
                self.should_exit = True

        with ThreadPoolExecutor(1, "batch") as threads:
            working = threads.submit(work)
            try:
                self.run(sockets=[place])
            finally:
                self._batch.close(0)
            working.result()
