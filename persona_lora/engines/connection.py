"""One server over HTTP, of whatever make: where it is, which models it names, one completion.

Knows addresses of engines and the outer form of replies; refuses to know what is in a choice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from persona_lora.core.errors import UserError
from persona_lora.judges.endpoint import NO_KEY, Address, Client, checked_url
from persona_lora.judges.retries import Fault, passes

TIMEOUT = 600.0  # seconds for one answer, behind all others that the server has taken
MALFORMED = 422  # as a status: waiting does not help
VLLM, OPENAI = "vllm", "openai"  # kinds of servers: what runs record


@dataclass(frozen=True)
class Asked:
    """One row as it is sent: its number in the plan, its mix, its prompt, how it is sampled."""

    number: int
    mix: Mapping[str, float]
    prompt: str
    tokens: Sequence[int]
    sampling: Mapping[str, Any]


class Connection:
    """Connections to a server; an asynchronous context manager for one event loop."""

    def __init__(self, url: str) -> None:
        self.url = engine_url(url)
        base, _, self.named = self.url.partition("#")
        self._client = Client(Address("", base, NO_KEY), TIMEOUT)

    async def cards(self) -> list[Mapping[str, Any]]:
        """Return what it says of its models; Fault where it names none."""
        cards = items(_read(await self._client.get("/models")).get("data"))
        if not cards:
            raise Fault("it serves no model", status=404)
        return cards

    async def complete(self, body: Mapping[str, Any]) -> tuple[Mapping[str, Any], Any]:
        """Return the one choice of a completion, and what was used; Fault where there is none."""
        reply = _read(await self._client.post(body, "/completions"))
        choices = items(reply.get("choices"))
        if not choices:
            raise Fault("the reply has no choices", status=MALFORMED)
        return choices[0], reply.get("usage")

    async def kind(self, model: str) -> str:
        """Say whether it gives log-probabilities of prompts as vLLM does; Fault for a dead one."""
        body = {"model": model, "prompt": [0], "max_tokens": 1, "temperature": 0.0}
        try:
            choice, _ = await self.complete({**body, "prompt_logprobs": 0})
        except Fault as fault:
            if passes(fault) and fault.status != 500:  # some answer so to token ids
                raise
            return OPENAI
        return VLLM if choice.get("prompt_logprobs") is not None else OPENAI

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *details: Any) -> None:
        await self._client.__aexit__(*details)


def engine_url(url: str) -> str:
    """Return a server's base URL, which ends in /v1, with ``#`` and the model where one is named.

    UserError for what is no URL.
    """
    place, mark, model = url.partition("#")
    if mark and not model:
        raise UserError(f"--engine {url} names no model after #; name one, or leave # out")
    checked = checked_url(place)
    return f"{checked if checked.endswith('/v1') else f'{checked}/v1'}{mark}{model}"


def _read(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Fault("the reply is no JSON", status=MALFORMED) from error
    if not isinstance(value, dict):
        raise Fault("the reply is no JSON object", status=MALFORMED)
    return value


def items(value: Any) -> list[Mapping[str, Any]]:
    """Return the objects in a list that a server sent."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def finite(value: Any) -> bool:
    """Say whether it is a number, and neither NaN nor infinity."""
    return isinstance(value, int | float) and abs(value) < math.inf
