"""The reader of a judge behind any OpenAI-compatible chat-completions endpoint.

Knows what is asked, what is kept, and when to stop; HTTP, prompts, replies, money and the cache
have modules of their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, get_args

from persona_lora.core import progress
from persona_lora.core.errors import UserError
from persona_lora.judges.budget import KNOWN_PRICES, Budget, CapReached, Prices, Usage
from persona_lora.judges.cache import VerdictCache, cache_key
from persona_lora.judges.completions import Completion, Mode, Reply, read_reply, score_reply
from persona_lora.judges.endpoint import (
    Address,
    Client,
    about_the_text,
    lasting_fault,
    persist,
    run_to_end,
    together,
)
from persona_lora.judges.judge_prompts import LARGEST_DIGIT, Reading, shows_whole_numbers
from persona_lora.judges.retries import REASONING_ROOM, Body, Dialect, Fault, Series

DEFAULT_MODEL = "gpt-4.1-mini-2025-04-14"

# Sent with every request, and part of the cache's key.
SAMPLING: Mapping[Mode, Mapping[str, int | bool]] = {
    "logprobs": {"n": 1, "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20},
    "number": {"n": 1, "max_tokens": 16, "temperature": 0},
}
# What an endpoint may refuse without harm to the reading; its first token must be the likeliest.
OPTIONAL: Mapping[Mode, tuple[str, ...]] = {"logprobs": (), "number": ("temperature",)}
WHOLE_NUMBER_PROMPT = "Reply with the number 100 and nothing else."


@dataclass(frozen=True)
class Limits:
    """How hard to press an endpoint, and when to stop.

    ``concurrency``: requests at a time. ``timeout``: seconds for one attempt, from its start to
    the last byte. ``max_retries``: further attempts after a passing fault. ``max_requests`` and
    ``max_cost`` (US dollars) hold over the judge's life, retries included. ``prices``: of the
    model, where they are not among the known ones.
    """

    concurrency: int = 16
    timeout: float = 60.0
    max_retries: int = 5
    max_requests: int | None = None
    max_cost: float | None = None
    prices: Prices | None = None

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.max_retries < 0 or not self.timeout > 0:
            raise UserError(
                f"judge limits are concurrency {self.concurrency}, timeout {self.timeout}, "
                f"max_retries {self.max_retries}; expected at least 1, over 0, at least 0"
            )


class EndpointReader:
    """Sends prompts to a chat model and reads the number that each reply is.

    In mode "logprobs" the number is the probability-weighted mean of the number tokens at the
    reply's first position (``prompts.weighted_score``); in mode "number", for endpoints without
    logprobs, tokenizers that split numbers, and models that reason, the whole reply must be a
    number. Numbers go from 0 to ``highest``.

    Refusals and caps give readings without a score and with a reason. Raises UserError, with the
    remedy, where going on has no sense (``retries.Series``): what was read by then is in the cache
    (in memory where none is given), and a later call asks for the rest alone.
    """

    def __init__(
        self,
        *,
        model: str = DEFAULT_MODEL,
        base_url: str | None = None,
        api_key: str | None = None,
        mode: Mode = "logprobs",
        limits: Limits | None = None,
        cache: VerdictCache | None = None,
        budget: Budget | None = None,
        highest: int = 100,
    ) -> None:
        if mode not in get_args(Mode):
            raise UserError(f"judge mode {mode!r} is unknown; expected 'logprobs' or 'number'")
        self.address = Address.checked(model, base_url, api_key)
        self.mode = mode
        self.highest = highest
        self.limits = limits if limits is not None else Limits()
        self.cache = cache if cache is not None else VerdictCache()
        self.dialect = Dialect(
            self.name, optional=OPTIONAL[mode], room=REASONING_ROOM if mode == "number" else 0
        )
        self.series = Series(f"{self.name} at {self.address.base_url}")
        # Where digits are all that is read, a first digit is the whole number.
        self.whole_numbers = mode == "number" or highest <= LARGEST_DIGIT
        self.budget = budget or budget_of(self.limits, model)
        Client(self.address, self.limits.timeout)  # an environment that forbids it is told of now

    @property
    def name(self) -> str:
        """The model, and the mode where it is not the default one."""
        return f"openai:{self.address.model}" + (":number" if self.mode == "number" else "")

    @property
    def usage(self) -> Usage:
        """Requests, tokens, estimated cost and cache hits so far."""
        return self.budget.usage()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, base_url={self.address.base_url!r})"

    def read(self, prompts: Sequence[str]) -> dict[str, Reading]:
        """Return a reading for every prompt; equal prompts are asked about once."""
        kept = {prompt: self.cache.get(self.key(prompt)) for prompt in dict.fromkeys(prompts)}
        readings = {prompt: reading for prompt, reading in kept.items() if reading is not None}
        for _ in readings:
            self.budget.count_cache_hit()
        missing = [prompt for prompt in kept if prompt not in readings]
        if missing:
            with progress.stage("judging"):
                readings |= run_to_end(self._ask_all(missing, len(readings)))
        return readings

    def key(self, prompt: str) -> str:
        """Return the cache's key of a prompt."""
        scale = {} if self.highest == 100 else {"highest": self.highest}
        return cache_key(
            base_url=self.address.base_url,
            model=self.address.model,
            mode=self.mode,
            prompt=prompt,
            sampling={**SAMPLING[self.mode], **scale},
        )

    async def _ask_all(self, prompts: Sequence[str], known: int) -> dict[str, Reading]:
        async with Client(self.address, self.limits.timeout) as client:
            call = _Call(self, client, known, known + len(prompts))
            readings = await together([call.read(prompt) for prompt in prompts])
        return dict(zip(prompts, readings, strict=True))


class Endpoint(TypedDict):
    """Which chat model to ask, where, and with which key."""

    model: str
    base_url: str | None
    api_key: str | None


def endpoint_of(environ: Mapping[str, str]) -> Endpoint:
    """Return the endpoint that OPENAI_API_KEY, OPENAI_BASE_URL and JUDGE_MODEL name."""
    return {
        "model": environ.get("JUDGE_MODEL", "").strip() or DEFAULT_MODEL,
        "base_url": environ.get("OPENAI_BASE_URL", "").strip() or None,
        "api_key": environ.get("OPENAI_API_KEY", "").strip() or None,
    }


@dataclass(eq=False)
class _Call:
    """One call of ``read``: the client of its event loop, and its progress."""

    _reader: EndpointReader
    _client: Client
    _done: int
    _total: int

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self._reader.limits.concurrency)
        self._probing = asyncio.Lock()

    async def read(self, prompt: str) -> Reading:
        """Return the reading for one prompt; a score is in the cache before this returns."""
        async with self._slots:
            completion = await self._ask(prompt)
            if completion.outcome == "good":
                completion = await self._whole(completion)
            if completion.outcome == "good":
                self._reader.cache.put(self._reader.key(prompt), completion.reading)
            self._reader.series.note(completion.outcome, completion.reading.reason)
        self._done += 1
        progress.report(self._done, self._total)
        return completion.reading

    async def _ask(self, prompt: str) -> Completion:
        reader = self._reader
        body = {
            "model": reader.address.model,
            "messages": [{"role": "user", "content": prompt}],
            **SAMPLING[reader.mode],
        }
        try:
            reply = await persist(self._attempt, body, reader.dialect, reader.limits.max_retries)
        except CapReached as cap:
            return Completion(Reading(None, str(cap)), "about the text")
        except Fault as fault:
            if about_the_text(fault):
                return Completion(Reading(None, fault.reason), "about the text")
            lasting = lasting_fault(fault, reader.address) or _refused_form(fault, reader.name)
            if lasting:
                reader.series.stop(lasting)
            return Completion(Reading(None, fault.reason), "fault")
        return score_reply(reply, reader.mode, reader.highest)

    async def _attempt(self, sent: Body) -> Reply:
        """Send one request within the budget."""
        budget = self._reader.budget
        tokens = int(sent.get("max_tokens") or sent["max_completion_tokens"])
        reservation = budget.reserve(str(sent["messages"][0]["content"]), tokens)
        used: tuple[int, int] = reservation  # a request that was cut off may be billed all the same
        try:
            reply = read_reply(await self._client.post(sent))
            used = reply.tokens or reservation
        except Fault as fault:
            if fault.status is not None:
                used = (0, 0)
            raise
        finally:
            budget.settle(reservation, *used)
        return reply

    async def _whole(self, completion: Completion) -> Completion:
        """Return a scored completion where the tokenizer is seen to write numbers whole.

        A confident "0" or "8" beside words could be a score or the beginning of one: then the
        endpoint is asked for 100, once.
        """
        reader = self._reader
        if reader.whole_numbers or shows_whole_numbers(completion.first_tokens):
            reader.whole_numbers = True
            return completion
        async with self._probing:
            if not reader.whole_numbers:
                probe = await self._ask(WHOLE_NUMBER_PROMPT)
                if probe.outcome not in ("good", "formless"):
                    return probe
                reader.whole_numbers = shows_whole_numbers(probe.first_tokens)
        if not reader.whole_numbers:
            reader.series.stop(
                f"{reader.name} seems to split numbers into digits (asked for 100 it begins with "
                "a digit or a word), which makes first-token scores meaningless; use --judge-mode "
                "number with it"
            )
        return completion


def _refused_form(fault: Fault, name: str) -> str:
    """Return the remedy for an endpoint that refuses what a score by logprobs rests on, or ""."""
    said = fault.said.lower()
    if fault.status in (400, 422) and ("temperature" in said or "logprobs" in said):
        return (
            f"{name} takes no one-token question (models that reason do not): {fault.reason}; use "
            "--judge-mode number, or another model"
        )
    return ""


def budget_of(limits: Limits, model: str) -> Budget:
    """Return an account for a model's requests within the limits."""
    known = limits.prices if limits.prices is not None else KNOWN_PRICES.get(model)
    return Budget(known, limits.max_requests, limits.max_cost)
