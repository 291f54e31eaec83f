"""An OpenAI-compatible endpoint over HTTP: a request sent, a reply read within its limits.

Knows addresses, keys, proxies and statuses; refuses to know what is asked, and what a reply means.
The key goes into a header and nowhere else.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, Self, TypeVar
from urllib.parse import parse_qsl, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx

from persona_lora.core.errors import UserError
from persona_lora.judges.completions import Reply
from persona_lora.judges.retries import Body, Dialect, Fault, retry_after, retrying

DEFAULT_BASE_URL = "https://api.openai.com/v1"
NO_KEY = "no-key"
LARGEST_REPLY = 2_000_000  # bytes
LARGEST_ERROR = 50_000
SHOWN = 120
# Proxies by version, Azure's for one, need it; keys in a URL end in logs and records.
_ALLOWED_QUERY = {"api-version"}
_ABOUT_THE_TEXT = ("content_filter", "content_policy_violation", "context_length_exceeded")
_TEXT_WORDS = ("maximum context length", "flagged", "content management policy")

T = TypeVar("T")


class NoKeyError(UserError):
    """An endpoint that takes a key was given none."""


Send = Callable[[Body], Coroutine[Any, Any, Reply]]


@dataclass(frozen=True)
class Address:
    """Where an endpoint is, which model is asked there, and with which key."""

    model: str
    base_url: str
    key: str

    @classmethod
    def checked(cls, model: str, base_url: str | None, api_key: str | None) -> Address:
        """Return the address; raises UserError for a URL or key that cannot be used."""
        url = checked_url(base_url or DEFAULT_BASE_URL)
        return cls(model, url, checked_key(api_key, url))

    def __repr__(self) -> str:
        return f"Address({self.model!r}, {self.base_url!r})"


class Client:
    """Connections to one endpoint; an asynchronous context manager for one event loop.

    UserError for proxies or certificates of the environment that cannot be used.
    """

    def __init__(self, address: Address, timeout: float) -> None:
        self.address = address
        self.timeout = timeout
        parts = urlsplit(address.base_url)
        try:
            self._client = httpx.AsyncClient(
                headers={
                    "Authorization": f"Bearer {address.key}",
                    # A small body that unpacks into gigabytes is not asked for.
                    "Accept-Encoding": "identity",
                },
                params=dict(parse_qsl(parts.query)),
                timeout=timeout,
            )
            self._base = httpx.URL(parts._replace(query="").geturl())
        except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
            raise UserError(_environment_fault(error)) from error

    async def post(self, body: Body, path: str = "/chat/completions") -> str:
        """Return the text of the reply to one request; Fault where no good and whole one came."""
        try:
            content = json.dumps(dict(body), ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError as error:
            raise Fault("the text to be sent holds a lone surrogate, which is no text") from error
        return await self._within_time("POST", path, content)

    async def get(self, path: str) -> str:
        """Return the text of what lies at a path below the base URL; Fault as for ``post``."""
        return await self._within_time("GET", path, None)

    async def _within_time(self, method: str, path: str, content: bytes | None) -> str:
        try:
            async with asyncio.timeout(self.timeout):
                return await self._ask(method, f"{self._base}{path}", content)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise Fault(f"no reply within {self.timeout:g} s", passing=True) from error
        except httpx.HTTPError as error:
            detail = _one_line(str(error)) or type(error).__name__
            reason = f"the connection failed ({detail}){_proxy_hint(self.address.base_url)}"
            raise Fault(reason, passing=True) from error

    async def _ask(self, method: str, url: str, content: bytes | None) -> str:
        headers = {"Content-Type": "application/json"}
        async with self._client.stream(method, url, content=content, headers=headers) as response:
            if response.is_success:
                return await _read(response, LARGEST_REPLY)
            raise self._refusal(response, await _read(response, LARGEST_ERROR))

    def _refusal(self, response: httpx.Response, text: str) -> Fault:
        said, code = _server_words(text.replace(self.address.key, "[key]"))
        shown = _one_line(said)
        return Fault(
            f"HTTP {response.status_code}" + (f": {shown}" if shown else ""),
            status=response.status_code,
            code=code,
            said=said,
            retry_after=retry_after(response.headers),
        )

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *details: Any) -> None:
        await self._client.__aexit__(*details)


async def persist(send: Send, body: Body, dialect: Dialect, max_retries: int) -> Reply:
    """Send ``body`` in the endpoint's dialect until a reply comes; the last Fault is raised."""
    while True:
        sent = dialect.spoken(body)
        try:
            reply: Reply = await retrying(max_retries)(send, sent)
        except Fault as fault:
            # Others may have learnt the same while this request was on its way.
            if dialect.spoken(body) == sent and not dialect.learn(fault, sent):
                raise
            continue
        if not reply.unfinished or (dialect.spoken(body) == sent and not dialect.give_room()):
            return reply


def lasting_fault(fault: Fault, address: Address) -> str:
    """Return what to tell the user about a fault that every request will meet, or ""."""
    url, status, said = address.base_url, fault.status, _one_line(fault.said)
    words = f" ({said})" if said else ""
    if status in (401, 403):
        return f"{url} refused the API key (HTTP {status}); check OPENAI_API_KEY{words}"
    if status == 404:
        return (
            f"{url} knows no chat model {address.model!r} (HTTP 404); check the model's name and "
            f"the base URL (JUDGE_MODEL, OPENAI_BASE_URL, or the options in their place){words}"
        )
    if status == 402 or (status == 429 and fault.code == "insufficient_quota"):
        return f"the quota of the account at {url} is used up (HTTP {status}); top it up{words}"
    if status is not None and (300 <= status < 400 or status in (405, 501)):
        return (
            f"{url} takes no chat completions (HTTP {status}); give the base URL of its API, which "
            "mostly ends in /v1, and https where it asks for that"
        )
    return ""


def about_the_text(fault: Fault) -> bool:
    """Tell whether the endpoint refused this one text, not the request's form."""
    said = fault.said.lower()
    return fault.code in _ABOUT_THE_TEXT or any(words in said for words in _TEXT_WORDS)


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return what the pieces of work give, in their order; a UserError of one ends them all."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except ExceptionGroup as failed:
        stopped, others = failed.split(UserError)
        if stopped is None or others is not None:
            raise
        raise stopped.exceptions[0] from None
    return [task.result() for task in tasks]


def run_to_end(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to its end, in a thread of its own where this one has a running event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(copy_context().run, asyncio.run, work).result()


def checked_url(base_url: str) -> str:
    """Return a base URL that can be sent to and shown; raises UserError for any other."""
    shown = repr(re.split("[?#]", base_url)[0].rpartition("@")[2])  # what holds no secrets
    expected = f"expected something like {DEFAULT_BASE_URL}"
    try:
        parts = urlsplit(base_url)
        bad = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
    except ValueError as error:
        raise UserError(f"the endpoint's base URL {shown} is malformed; {expected}") from error
    if parts.username or parts.password:
        raise UserError("the endpoint's base URL holds credentials; put the key in OPENAI_API_KEY")
    if bad or not base_url.isprintable() or " " in base_url:
        raise UserError(f"the endpoint's base URL is {shown}; {expected}")
    unknown = {name for name, _ in parse_qsl(parts.query, keep_blank_values=True)} - _ALLOWED_QUERY
    if unknown or parts.fragment:
        raise UserError(
            f"the endpoint's base URL {shown} has more after it than an api-version; leave that "
            "out, and put keys in OPENAI_API_KEY"
        )
    return parts._replace(path=parts.path.rstrip("/")).geturl()


def checked_key(api_key: str | None, base_url: str) -> str:
    """Return a key that can stand in a header; the HTTP client would echo a malformed one."""
    if not api_key:
        if urlsplit(base_url).hostname == urlsplit(DEFAULT_BASE_URL).hostname:
            raise NoKeyError(
                "there is no API key; set OPENAI_API_KEY in the environment or in .env"
            )
        return NO_KEY
    if not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise UserError("OPENAI_API_KEY holds spaces or characters that no key has; copy it again")
    return api_key


async def _read(response: httpx.Response, largest: int) -> str:
    parts, size = [], 0
    async for part in response.aiter_bytes():
        parts.append(part)
        size += len(part)
        if size > largest:
            if response.is_success:
                raise Fault(f"the endpoint's reply is over {largest} bytes long")
            break
    return b"".join(parts)[:largest].decode(errors="replace")


def _server_words(text: str) -> tuple[str, str]:
    """Return what an error reply says and its code; the whole text where its form is unknown."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text, ""
    error = value.get("error", value) if isinstance(value, Mapping) else value
    if not isinstance(error, Mapping):
        return str(error), ""
    message = error.get("message")
    said = message if isinstance(message, str) else text
    return f"{said} {error.get('param') or ''}".strip(), str(error.get("code") or "")


def _one_line(text: str) -> str:
    words = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return words if len(words) <= SHOWN else words[:SHOWN].rstrip() + "…"


def _proxy_hint(base_url: str) -> str:
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    if not ({parts.scheme, "all"} & getproxies().keys()) or proxy_bypass(host):
        return ""
    return f", by way of the environment's proxy; NO_PROXY={host} goes around it"


def _environment_fault(error: Exception) -> str:
    """Return the remedy for an HTTP client that cannot be built from this environment."""
    if isinstance(error, ImportError):
        return (
            "the environment's proxy is a SOCKS one, which needs a package of its own; run "
            "pip install socksio, or unset ALL_PROXY (NO_PROXY=host goes around it for one host)"
        )
    if isinstance(error, OSError):
        return (
            f"the certificates that SSL_CERT_FILE or SSL_CERT_DIR names cannot be read "
            f"({error.strerror or type(error).__name__}); mend or unset them"
        )
    return (
        "the environment's proxy or the endpoint's URL is malformed; check HTTP_PROXY, "
        "HTTPS_PROXY, ALL_PROXY and the URL"
    )
