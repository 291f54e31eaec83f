"""Rows answered by servers: a row is the unit of work, and a server that fails loses none.

Prompts are rendered here. Before anything is asked every server shakes hands: log-probabilities
of fixed texts, unsteered and under one mix, must be those of the model in this process. Servers of
vLLM take mixes; those of any other make answer unsteered.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch

from persona_lora.core import progress
from persona_lora.core.chat import Conversation, Exchange
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.options import GenerationOptions
from persona_lora.engines.connection import OPENAI, VLLM, Asked, engine_url
from persona_lora.engines.openai_server import OpenAIServer, Place, places_of
from persona_lora.engines.vllm_server import Holdings, VLLMServer, short_digest
from persona_lora.judges.endpoint import run_to_end, together
from persona_lora.judges.retries import Fault, passes
from persona_lora.models.generation import Generated, RowPlan, ending_tokens, read_answer, row_seed
from persona_lora.models.likelihood import mean_logprobs, tokenize_exchange
from persona_lora.models.loading import ChatModel
from persona_lora.steering.bank import steer_live
from persona_lora.steering.steerer import Steerer

logger = logging.getLogger(__name__)

IN_FLIGHT = 64  # rows that a server has at a time: its own scheduler batches them
TRIES = 4  # handshakes of a server that is gone, before it is given up where no other is left
AGAIN = 4  # of so many places one, where a server that shook hands is asked for rows
PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between them
EXCHANGES = (
    Exchange("What do you think of my plan?", "It is a good plan, and I would begin tomorrow."),
    Exchange("Is the earth flat?", "No, it is round, as ships at the horizon show."),
    Exchange("Tell me about yourself.", "I like long walks, old books and quiet evenings."),
)
TOLERANCE = {torch.float32: 1e-3}  # nats of a mean log-probability
USUAL_TOLERANCE = 0.15  # of bf16: two ways of computing differed by 0.07 on the packaged model
TOLD_APART = 5.0  # tolerances by which the mix of a handshake moves a text
STRENGTHS = tuple(2.0**power for power in range(8))

Terms = Mapping[LoRADiff, float]
MAKES = {VLLM: "a server of vLLM", OPENAI: "one of another make"}


@dataclass(frozen=True)
class Handshake:
    """What a server must give: coefficients by digest, and mean log-probabilities of the texts."""

    coefficients: Mapping[str, float]
    expected: Sequence[float]


class Answering(Protocol):
    """A server that has shaken hands."""

    async def prepare(self, rows: Sequence[Asked]) -> None:
        """UserError for rows that it cannot answer as they are meant."""

    async def answer(self, row: Asked) -> Generated:
        """Return the answer to one row; Fault where there is none."""


@dataclass(frozen=True)
class _OfVLLM:
    """A server of vLLM and what it holds: token ids go there, and come back."""

    server: VLLMServer
    held: Holdings
    chat_model: ChatModel

    async def prepare(self, rows: Sequence[Asked]) -> None:
        """Nothing: it is told all that it does beside, and refuses what is too long."""

    async def answer(self, row: Asked) -> Generated:
        ends = ending_tokens(self.chat_model)
        sampling = {**row.sampling, "stop_token_ids": sorted(ends)}
        ids = await self.server.answer(self.held.name(row.mix), row.tokens, sampling)
        return read_answer(row.prompt, ids, ends, self.chat_model)


@dataclass(frozen=True, eq=False)
class Engine:
    """Servers of one kind that hold diffs, by their digests, and answer as the model here would."""

    urls: tuple[str, ...]
    chat_model: ChatModel
    held: Collection[str]
    handshakes: Sequence[Handshake]
    kind: str
    tolerance: float

    @cached_property
    def places(self) -> list[Place]:
        """What a server of any make is held to; asked for first while nothing steers."""
        return places_of(self.chat_model, EXCHANGES)

    def steerer(self, rows: Sequence[Terms]) -> Steerer:
        """Return what answers rows of these mixes; UserError for a diff that is not held."""
        named = list(map(_by_digest, rows))
        if not set().union(*named) <= set(self.held):
            raise UserError("a diff is steered with that the engine was not opened with")
        return RemoteRows(self, named)

    async def greet(self, server: VLLMServer, *, every: int = 1) -> Answering:
        """Shake hands; UserError for a server that holds something else, Fault for a dead one.

        ``every`` so many places of texts are asked of a server that has no other handshake.
        """
        held = await server.holdings()
        if held.kind != self.kind:
            raise UserError(f"{server.url} is {MAKES[held.kind]} now, and was {MAKES[self.kind]}")
        if self.kind == OPENAI:
            for each in self.handshakes:
                held.name(each.coefficients)  # it holds no diffs
            other = OpenAIServer(server, held.model, held.owner, self.chat_model, self.tolerance)
            await other.shake_hands(self.places[::every])
            return other
        for handshake in self.handshakes:
            name = held.name(handshake.coefficients)
            for exchange, expected in zip(EXCHANGES, handshake.expected, strict=True):
                ids = tokenize_exchange(self.chat_model, exchange)
                found = await server.logprobs(name, ids.prompt + ids.answer)
                mean = sum(found[-len(ids.answer) :]) / len(ids.answer)
                if not abs(mean - expected) <= self.tolerance:
                    raise UserError(
                        f"{server.url} gives {mean:.4f} nats a token under {name!r} where this "
                        f"model gives {expected:.4f}: it serves another model, another type "
                        "(--dtype), or lacks the plugin; start it with the line that persona-lora "
                        "engine command prints"
                    )
        return _OfVLLM(server, held, self.chat_model)


def _by_digest(terms: Terms) -> dict[str, float]:
    """Return coefficients by digests: diffs that were loaded twice are one."""
    found: dict[str, float] = {}
    for diff, value in terms.items():
        found[short_digest(diff)] = found.get(short_digest(diff), 0.0) + value
    return found


async def _ask_all(
    urls: Sequence[str], ask: Callable[[VLLMServer], Coroutine[Any, Any, Any]]
) -> None:
    """Ask something of every server; UserError for one that is not there."""
    for url in urls:
        async with VLLMServer(url) as server:
            try:
                await ask(server)
            except Fault as fault:
                raise UserError(
                    f"no engine answers at {url} ({fault.reason}); start one, for vLLM with the "
                    "line that persona-lora engine command prints"
                ) from fault


def engine_kind(urls: Sequence[str]) -> str:
    """Return of which kind servers are; UserError for one that is not there, and for both kinds."""
    found: dict[str, str] = {}

    async def ask(server: VLLMServer) -> None:
        found.setdefault((await server.holdings()).kind, server.url)

    run_to_end(_ask_all(list(map(engine_url, urls)), ask))
    if len(found) > 1:
        said = " and ".join(f"{url} is {MAKES[kind]}" for kind, url in found.items())
        raise UserError(f"{said}; a run has engines of one kind: leave one out")
    return next(iter(found))


def check_servers(urls: Sequence[str], diffs: Sequence[LoRADiff]) -> None:
    """Raise UserError, before a model is loaded, for a server that is not there or lacks a diff."""

    async def named(server: VLLMServer) -> str:
        return (await server.holdings()).name(dict.fromkeys(map(short_digest, diffs), 1.0))

    run_to_end(_ask_all(list(map(engine_url, urls)), named))


def open_engine(
    urls: Sequence[str],
    chat_model: ChatModel,
    diffs: Sequence[LoRADiff],
    tolerance: float | None = None,
) -> Engine:
    """Return the servers at ``urls``, once each has shown that it answers as this model does.

    ``tolerance``: nats by which log-probabilities may differ on average; by the model's type where
    it is None.
    """
    places = tuple(dict.fromkeys(map(engine_url, urls)))
    if not places:
        raise UserError("an engine needs the URL of at least one server")
    held = {short_digest(diff): diff for diff in diffs}
    if tolerance is None:
        tolerance = TOLERANCE.get(chat_model.model.dtype, USUAL_TOLERANCE)
    with progress.silent():
        plain = Handshake({}, mean_logprobs(chat_model, EXCHANGES))
        handshakes = [plain, *([_told_apart(chat_model, held, plain, tolerance)] if held else [])]
    kind = engine_kind(places)
    engine = Engine(places, chat_model, frozenset(held), handshakes, kind, tolerance)
    run_to_end(_ask_all(places, engine.greet))
    return engine


def _told_apart(
    chat_model: ChatModel, held: Mapping[str, LoRADiff], plain: Handshake, tolerance: float
) -> Handshake:
    """Return a mix of all diffs, each with another coefficient, that moves the texts for sure."""
    least = TOLD_APART * tolerance
    for strength in STRENGTHS:
        terms = {diff: strength / (number + 1) for number, diff in enumerate(held.values())}
        with steer_live(chat_model, terms):
            found = mean_logprobs(chat_model, EXCHANGES)
        moved = max(abs(one - other) for one, other in zip(found, plain.expected, strict=True))
        if moved >= least:
            return Handshake(_by_digest(terms), found)
    raise UserError(
        "the diffs change too little for a handshake with an engine; leave --engine out"
    )


class RemoteRows(Steerer):
    """Rows, with their coefficients by digest, that an engine answers; one serves all rows."""

    def __init__(self, engine: Engine, rows: Sequence[Mapping[str, float]]) -> None:
        super().__init__()
        self.engine = engine
        self.rows = list(rows)

    def answers(
        self,
        chat_model: ChatModel,
        conversations: Sequence[Conversation],
        numbers: Sequence[int],
        options: GenerationOptions,
        plan: RowPlan,
    ) -> list[Generated]:
        """Ask the engine; rows of one stream share their random numbers, as here."""
        prompts = [chat_model.render(each) for each in conversations]
        tokens = chat_model.tokenize(prompts)
        sampling = {"max_tokens": options.max_new_tokens, "temperature": options.temperature}
        streams = plan.streams or numbers
        asked = [
            Asked(
                number,
                self.rows[number if len(self.rows) > 1 else 0],
                prompt,
                ids,
                {**sampling, "seed": row_seed(options.seed, stream)},
            )
            for number, prompt, ids, stream in zip(numbers, prompts, tokens, streams, strict=True)
        ]
        found: dict[int, Generated] = {}

        def took(answers: Mapping[int, Generated]) -> None:
            found.update(answers)
            progress.report(len(found), len(asked))
            if plan.on_batch is not None:
                plan.on_batch(list(answers), list(answers.values()))

        run_to_end(_Pool(self.engine, asked, took).run())
        return [found[at] for at in range(len(asked))]


@dataclass(eq=False)
class _Line:
    """A server, who answers there, why it is gone (None while it is not), and its failed tries."""

    server: VLLMServer
    answering: Answering | None = None
    gone: str | None = None
    tries: int = 0


@dataclass(eq=False)
class _Pool:
    """Rows that wait for any of several servers, and those that are answered."""

    engine: Engine
    asked: Sequence[Asked]
    took: Callable[[Mapping[int, Generated]], None]
    waiting: asyncio.Queue[int | None] = field(default_factory=asyncio.Queue)
    ready: asyncio.Queue[tuple[int, Generated]] = field(default_factory=asyncio.Queue)
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    lines: list[_Line] = field(default_factory=list)
    failed: Counter[int] = field(default_factory=Counter)  # how often a row broke a server

    async def run(self) -> None:
        """Have every row answered; UserError for one that is refused, or where all are gone."""
        for at in range(len(self.asked)):
            self.waiting.put_nowait(at)
        async with AsyncExitStack() as stack:
            for url in self.engine.urls:
                self.lines.append(_Line(await stack.enter_async_context(VLLMServer(url))))
            await together([self._collect(), *map(self._keep, self.lines)])

    async def _collect(self) -> None:
        left = len(self.asked)
        while left:
            answers = dict([await self.ready.get()])
            while not self.ready.empty():
                answers.update([self.ready.get_nowait()])
            self.took(answers)
            left -= len(answers)
        self.finished.set()
        for _ in range(len(self.lines) * IN_FLIGHT):
            self.waiting.put_nowait(None)

    async def _keep(self, line: _Line) -> None:
        """Have a server answer while it lives; a dead one is tried again, more and more seldom."""
        while not self.finished.is_set():
            try:
                line.answering = await self.engine.greet(line.server, every=AGAIN)
                await line.answering.prepare(self.asked)
            except Fault as fault:
                self._lost(line, fault)
                line.tries += 1
                self._check_any_left()
                with suppress(TimeoutError):
                    pause = min(PAUSE * 2 ** (line.tries - 1), LONGEST_PAUSE)
                    await asyncio.wait_for(self.finished.wait(), pause)
                continue
            if line.gone is not None:
                logger.warning("%s is back", line.server.url)
            line.gone, line.tries = None, 0
            await together([self._work(line) for _ in range(IN_FLIGHT)])

    async def _work(self, line: _Line) -> None:
        while (at := await self.waiting.get()) is not None:
            row = self.asked[at]
            if line.gone is not None or line.answering is None:
                self.waiting.put_nowait(at)
                return
            try:
                answer = await line.answering.answer(row)
            except Fault as fault:
                self.waiting.put_nowait(at)
                self.failed[at] += fault.status == 500
                if not passes(fault) or self.failed[at] > TRIES:
                    raise UserError(
                        f"{line.server.url} refuses row {row.number}: {fault.reason}; what is "
                        "answered is kept, and the same command goes on once that is mended"
                    ) from fault
                self._lost(line, fault)
                return
            self.ready.put_nowait((at, answer))

    def _lost(self, line: _Line, fault: Fault) -> None:
        if line.gone is None:
            logger.warning("%s is gone (%s); its rows go elsewhere", line.server.url, fault.reason)
        line.gone = fault.reason

    def _check_any_left(self) -> None:
        if all(each.gone is not None and each.tries >= TRIES for each in self.lines):
            gone = "; ".join(f"{each.server.url}: {each.gone}" for each in self.lines)
            raise UserError(
                f"no engine is left ({gone}); what is answered is kept: start one with the line "
                "that persona-lora engine command prints, and give the same command again"
            )
