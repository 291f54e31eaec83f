"""A judge behind any OpenAI-compatible chat-completions endpoint.

Knows the client, its faults and its limits; prompts, replies, money and the cache have modules
of their own. The API key goes to the client and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypedDict, get_args
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, OpenAIError

from persona_lora.core.chat import Exchange, Verdict
from persona_lora.core.errors import UserError
from persona_lora.core.traits import Trait
from persona_lora.judges.budget import KNOWN_PRICES, Budget, Prices, Usage
from persona_lora.judges.cache import VerdictCache, cache_key
from persona_lora.judges.completions import Completion, Mode, read_completion, unscored
from persona_lora.judges.prompts import Reading, judge_prompt, splits_numbers
from persona_lora.judges.retries import passes, retrying

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "gpt-4.1-mini-2025-04-14"
DEFAULT_BASE_URL = "https://api.openai.com/v1"
NO_KEY = "no-key"

# Sent with every request, and part of the cache's key.
SAMPLING: Mapping[Mode, Mapping[str, int | bool]] = {
    "logprobs": {"n": 1, "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20},
    "number": {"n": 1, "max_tokens": 8, "temperature": 0},
}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Limits:
    """How hard to press an endpoint, and when to stop.

    ``concurrency``: requests at a time. ``timeout``: seconds for one attempt, from its start to
    the last byte. ``max_retries``: further attempts after a passing fault. ``max_requests`` and
    ``max_cost`` (US dollars) hold over the judge's life, retries included.
    """

    concurrency: int = 16
    timeout: float = 60.0
    max_retries: int = 5
    max_requests: int | None = None
    max_cost: float | None = None

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.max_retries < 0 or not self.timeout > 0:
            raise UserError(
                f"judge limits are concurrency {self.concurrency}, timeout {self.timeout}, "
                f"max_retries {self.max_retries}; expected at least 1, over 0, at least 0"
            )


class EndpointReader:
    """Sends prompts to a chat model and reads the number that each reply begins with.

    In mode "logprobs" the number is the probability-weighted mean of the number tokens at the
    reply's first position (``prompts.weighted_score``); in mode "number", for endpoints without
    logprobs or with tokenizers that split numbers, the whole reply must be a number.

    Faults, refusals and caps give readings without a score and with a reason; finished readings
    are never lost. UserError: no key for OpenAI's own endpoint; a refused key, an unknown model or
    a used-up quota before anything was scored.
    """

    def __init__(
        self,
        *,
        model: str = DEFAULT_MODEL,
        base_url: str | None = None,
        api_key: str | None = None,
        mode: Mode = "logprobs",
        limits: Limits | None = None,
        prices: Prices | None = None,
        cache: VerdictCache | None = None,
        progress: Progress | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise UserError(f"judge mode {mode!r} is unknown; expected 'logprobs' or 'number'")
        self.model = model
        self.mode = mode
        self.base_url = checked_url(base_url or DEFAULT_BASE_URL)
        self.limits = limits if limits is not None else Limits()
        self.cache = cache
        self.progress = progress
        self._api_key = checked_key(api_key, self.base_url)
        self._budget = Budget(
            prices if prices is not None else KNOWN_PRICES.get(model),
            self.limits.max_requests,
            self.limits.max_cost,
        )

    @property
    def name(self) -> str:
        """The model, and the mode where it is not the default one."""
        return f"openai:{self.model}" + (":number" if self.mode == "number" else "")

    @property
    def usage(self) -> Usage:
        """Requests, tokens, estimated cost and cache hits so far."""
        return self._budget.usage()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, base_url={self.base_url!r})"

    def read(self, prompts: Sequence[str]) -> dict[str, Reading]:
        """Return a reading for every prompt; equal prompts are asked about once."""
        readings = self._cached(prompts)
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in readings]
        if missing:
            readings |= _run(self._ask_all(missing, len(readings)))
        return readings

    def _cached(self, prompts: Iterable[str]) -> dict[str, Reading]:
        if self.cache is None:
            return {}
        found = {}
        for prompt in dict.fromkeys(prompts):
            reading = self.cache.get(self._key(prompt))
            if reading is not None:
                found[prompt] = reading
                self._budget.count_cache_hit()
        return found

    def _key(self, prompt: str) -> str:
        return cache_key(
            base_url=self.base_url,
            model=self.model,
            mode=self.mode,
            prompt=prompt,
            sampling=SAMPLING[self.mode],
        )

    async def _ask_all(self, prompts: Sequence[str], known: int) -> dict[str, Reading]:
        async with AsyncOpenAI(
            api_key=self._api_key,
            base_url=self.base_url,
            timeout=self.limits.timeout,
            max_retries=0,
        ) as client:
            call = _Call(self, client, known, known + len(prompts))
            readings = await asyncio.gather(*(call.read(prompt) for prompt in prompts))
        if call.stopped and all(reading.score is None for reading in readings):
            raise UserError(call.stopped)
        if splits_numbers(call.first_tokens):
            logger.warning(
                "%s seems to split numbers into digits, which makes first-token scores "
                "meaningless; use the number mode with it",
                self.name,
            )
        return dict(zip(prompts, readings, strict=True))

    async def _attempt(self, client: AsyncOpenAI, prompt: str) -> Completion:
        """Send one request within the budget; transport faults are raised."""
        sampling = SAMPLING[self.mode]
        reservation = self._budget.reserve(prompt, int(sampling["max_tokens"]))
        if isinstance(reservation, str):
            return unscored(reservation)
        used: tuple[int, int] = (0, 0)
        try:
            async with asyncio.timeout(self.limits.timeout):
                response = await client.chat.completions.with_raw_response.create(
                    model=self.model,
                    messages=[{"role": "user", "content": prompt}],
                    extra_body=dict(sampling),
                )
            completion = read_completion(response.http_response.text, self.mode)
            used = completion.tokens or reservation
        except (APIConnectionError, TimeoutError):
            used = reservation  # the endpoint may have worked, and billed, all the same
            raise
        finally:
            self._budget.settle(reservation, *used)
        return completion


class OpenAIJudge(EndpointReader):
    """Asks a chat model for a number from 0 to 100 with the trait's ``eval_prompt``."""

    def __init__(
        self,
        trait: Trait,
        *,
        model: str = DEFAULT_MODEL,
        base_url: str | None = None,
        api_key: str | None = None,
        mode: Mode = "logprobs",
        limits: Limits | None = None,
        prices: Prices | None = None,
        cache: VerdictCache | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(
            model=model,
            base_url=base_url,
            api_key=api_key,
            mode=mode,
            limits=limits,
            prices=prices,
            cache=cache,
            progress=progress,
        )
        self.trait = trait

    @classmethod
    def from_environment(
        cls,
        trait: Trait,
        environ: Mapping[str, str],
        *,
        mode: Mode = "logprobs",
        limits: Limits | None = None,
        prices: Prices | None = None,
        cache: VerdictCache | None = None,
        progress: Progress | None = None,
    ) -> OpenAIJudge:
        """Build a judge from OPENAI_API_KEY, OPENAI_BASE_URL and JUDGE_MODEL in ``environ``."""
        return cls(
            trait,
            **endpoint_of(environ),
            mode=mode,
            limits=limits,
            prices=prices,
            cache=cache,
            progress=progress,
        )

    def judge(self, exchanges: Sequence[Exchange], criterion: str) -> list[Verdict]:
        """Return one verdict an exchange, in order; equal exchanges are asked about once."""
        prompts = [judge_prompt(self.trait, criterion, exchange) for exchange in exchanges]
        readings = self.read(prompts)
        verdicts = [
            Verdict(criterion, readings[prompt].score, readings[prompt].reason, self.name)
            for prompt in prompts
        ]
        log_unscored(verdicts, self.name)
        return verdicts


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


class _Call:
    """One call of ``judge``: the client of its event loop, its progress, and why it stopped."""

    def __init__(self, judge: EndpointReader, client: AsyncOpenAI, done: int, total: int) -> None:
        self.stopped = ""
        self.first_tokens: set[str] = set()
        self._judge = judge
        self._client = client
        self._done = done
        self._total = total
        self._slots = asyncio.Semaphore(judge.limits.concurrency)

    async def read(self, prompt: str) -> Reading:
        """Return the reading for one prompt; it is in the cache before this returns."""
        async with self._slots:
            completion = unscored(self.stopped) if self.stopped else await self._ask(prompt)
        self.first_tokens.update(completion.first_tokens)
        if completion.lasting and self._judge.cache is not None:
            self._judge.cache.put(self._judge._key(prompt), completion.reading)
        self._done += 1
        if self._judge.progress is not None:
            self._judge.progress(self._done, self._total)
        return completion.reading

    async def _ask(self, prompt: str) -> Completion:
        attempts = retrying(self._judge.limits.max_retries)
        try:
            return await attempts(self._judge._attempt, self._client, prompt)
        except (OpenAIError, TimeoutError) as error:
            lasting = _lasting_fault(error, self._judge)
            self.stopped = self.stopped or lasting
            return unscored(lasting or _fault_reason(error, self._judge))


def _lasting_fault(error: Exception, judge: EndpointReader) -> str:
    """Return what to tell the user about a fault that every request will meet, or ""."""
    status = error.status_code if isinstance(error, APIStatusError) else None
    if status in (401, 403):
        return f"{judge.base_url} refused the API key (HTTP {status}); check OPENAI_API_KEY"
    if status == 404:
        return (
            f"{judge.base_url} knows no chat model {judge.model!r} (HTTP 404); check JUDGE_MODEL "
            "and OPENAI_BASE_URL"
        )
    if status == 429 and not passes(error):
        return f"the quota of the account at {judge.base_url} is used up; top it up"
    return ""


def _fault_reason(error: Exception, judge: EndpointReader) -> str:
    if isinstance(error, APITimeoutError | TimeoutError):
        return f"no reply within {judge.limits.timeout:g} s"
    if isinstance(error, APIConnectionError):
        return f"the connection failed ({type(error.__cause__).__name__})"
    if isinstance(error, APIStatusError):
        said = " ".join(_server_message(error).replace(judge._api_key, "[key]").split())
        return f"HTTP {error.status_code}" + (f": {said[:120]}" if said else "")
    return f"the client failed ({type(error).__name__})"


def _server_message(error: APIStatusError) -> str:
    message = error.body.get("message") if isinstance(error.body, dict) else None
    return message if isinstance(message, str) else ""


def log_unscored(verdicts: Sequence[Verdict], name: str) -> None:
    reasons = Counter(verdict.reason for verdict in verdicts if verdict.score is None)
    if reasons:
        common = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
        logger.warning(
            "%s left %d of %d answers unscored: %s", name, reasons.total(), len(verdicts), common
        )


def _run(work: Coroutine[Any, Any, dict[str, Reading]]) -> dict[str, Reading]:
    """Run ``work`` to its end, in a thread of its own where this one has a running event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, work).result()


def checked_url(base_url: str) -> str:
    try:
        parts = urlsplit(base_url)
    except ValueError as error:
        raise UserError(f"the endpoint's base URL is malformed: {error}") from error
    if parts.username or parts.password:
        raise UserError("the endpoint's base URL holds credentials; put the key in OPENAI_API_KEY")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"the endpoint's base URL is {base_url!r}; expected something like {DEFAULT_BASE_URL}"
        )
    return base_url.rstrip("/")


def checked_key(api_key: str | None, base_url: str) -> str:
    """Return a key that can stand in a header; the HTTP client would echo a malformed one."""
    if not api_key:
        if urlsplit(base_url).hostname == urlsplit(DEFAULT_BASE_URL).hostname:
            raise UserError(
                "there is no API key; set OPENAI_API_KEY in the environment or in .env "
                "(--judge embedding needs none)"
            )
        return NO_KEY  # the client wants a key; endpoints of one's own mostly ignore it
    if not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise UserError("OPENAI_API_KEY holds spaces or characters that no key has; copy it again")
    return api_key
