"""Language models that write data: one behind an OpenAI-compatible endpoint, or one in-process.

Knows how a text is asked for; refuses to know what it is for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from persona_lora.core import progress
from persona_lora.core.chat import Conversation
from persona_lora.core.content import digest_of
from persona_lora.core.options import GenerationOptions
from persona_lora.judges.completions import Reply, read_reply
from persona_lora.judges.endpoint import (
    Address,
    Client,
    about_the_text,
    lasting_fault,
    persist,
    run_to_end,
    together,
)
from persona_lora.judges.retries import REASONING_ROOM, Body, Dialect, Fault, Series
from persona_lora.models.generation import Generated, RowPlan, generate_answers
from persona_lora.models.loading import ChatModel

logger = logging.getLogger(__name__)

OnText = Callable[[int, str], None]
OPTIONAL = ("temperature", "seed")
UNFINISHED = "the model was still reasoning when its reply was cut off"
EMPTY = "the reply is empty"


class Writer(Protocol):
    """Writes one text for each conversation; None where it could not.

    Text i is drawn with the seed and ``streams[i]`` (its place by default), so that it does not
    depend on what else is asked for. ``on_text`` gets i and the text as soon as it is there.
    """

    name: str

    def write(
        self,
        conversations: Sequence[Conversation],
        *,
        options: GenerationOptions,
        streams: Sequence[int] | None = None,
        on_text: OnText | None = None,
    ) -> list[str | None]: ...


@dataclass(frozen=True)
class Endpoint:
    """Where an OpenAI-compatible endpoint is, what to ask it for, and how hard to press it."""

    model: str
    base_url: str
    api_key: str | None = None
    concurrency: int = 8
    timeout: float = 120.0
    max_retries: int = 5


class EndpointWriter:
    """Asks an OpenAI-compatible endpoint; passing faults are retried.

    UserError, with the remedy, where going on has no sense: a fault that every request would meet
    (a refused key, an unknown model), or several in a row (``retries.Series``).
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.name = endpoint.model
        self._address = Address.checked(endpoint.model, endpoint.base_url, endpoint.api_key)
        self._dialect = Dialect(self.name, optional=OPTIONAL, room=REASONING_ROOM)
        self._series = Series(f"{self.name} at {self._address.base_url}")
        Client(self._address, endpoint.timeout)  # an environment that forbids it is told of now

    def inputs(self) -> dict[str, str]:
        """Return a digest of where it is asked."""
        return {"the writer's endpoint": digest_of(self.endpoint.base_url)}

    def write(
        self,
        conversations: Sequence[Conversation],
        *,
        options: GenerationOptions,
        streams: Sequence[int] | None = None,
        on_text: OnText | None = None,
    ) -> list[str | None]:
        """Return the replies in order; what failed after all retries is None, and logged."""
        places = range(len(conversations)) if streams is None else streams
        bodies = [
            {
                "model": self.endpoint.model,
                "messages": conversation,
                "max_tokens": options.max_new_tokens,
                "temperature": options.temperature,
                "seed": options.seed + place,
            }
            for conversation, place in zip(conversations, places, strict=True)
        ]
        return run_to_end(self._write(bodies, on_text))

    async def _write(
        self, bodies: Sequence[dict[str, Any]], on_text: OnText | None
    ) -> list[str | None]:
        slots = asyncio.Semaphore(self.endpoint.concurrency)
        done = 0

        async def write(client: Client, index: int) -> str | None:
            nonlocal done
            async with slots:
                text = await self._ask(client, bodies[index])
            done += 1
            if text is not None and on_text is not None:
                on_text(index, text)
            progress.report(done, len(bodies))
            return text

        async with Client(self._address, self.endpoint.timeout) as client:
            return await together([write(client, index) for index in range(len(bodies))])

    async def _ask(self, client: Client, body: Body) -> str | None:
        async def send(sent: Body) -> Reply:
            return read_reply(await client.post(sent))

        try:
            reply = await persist(send, body, self._dialect, self.endpoint.max_retries)
        except Fault as fault:
            self._failed(fault)
            return None
        if reply.text and not reply.withheld:
            self._series.note("good", "")
            return reply.text
        reason = reply.withheld or (UNFINISHED if reply.reasoned else EMPTY)
        logger.warning("%s wrote nothing: %s", self.name, reason)
        self._series.note("about the text" if reply.withheld else "formless", reason)
        return None

    def _failed(self, fault: Fault) -> None:
        logger.warning("a request to %s failed: %s", self.name, fault.reason)
        if about_the_text(fault):
            return
        if lasting := lasting_fault(fault, self._address):
            self._series.stop(lasting)
        self._series.note("fault", fault.reason)


class LocalWriter:
    """Asks a model in-process, in batches."""

    def __init__(self, chat_model: ChatModel) -> None:
        self.chat_model = chat_model
        self.name = chat_model.name

    def inputs(self) -> dict[str, str]:
        """Return digests of the model."""
        return self.chat_model.inputs("the writer")

    def write(
        self,
        conversations: Sequence[Conversation],
        *,
        options: GenerationOptions,
        streams: Sequence[int] | None = None,
        on_text: OnText | None = None,
    ) -> list[str | None]:
        """Return the answers in order; an empty one is None."""

        def told(rows: Sequence[int], batch: Sequence[Generated]) -> None:
            for row, generated in zip(rows, batch, strict=True):
                if on_text is not None and generated.text:
                    on_text(row, generated.text)

        answers = generate_answers(
            self.chat_model,
            conversations,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
            plan=RowPlan(streams, on_batch=told),
        )
        return [answer.text or None for answer in answers]
