"""One vLLM server over HTTP: what it holds, answers as token ids, log-probabilities of a text.

Knows the requests and replies of vLLM's completions; refuses to know what is done about a fault.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from persona_lora.core.errors import UserError
from persona_lora.engines.vllm_command import BASIS, ServedBasis
from persona_lora.judges.endpoint import NO_KEY, Address, Client, checked_url
from persona_lora.judges.retries import Fault

TIMEOUT = 600.0  # seconds for one answer, behind all others that the server has taken
OF_VLLM = "an engine is a server of vLLM"
MALFORMED = 422  # as a status: waiting does not help
PLAIN: Mapping[str, Any] = {  # nothing beside, whatever a model's authors would have
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@dataclass(frozen=True)
class Holdings:
    """The names of a server's plain model, and of its basis where it has one."""

    model: str
    basis: ServedBasis | None

    def name(self, coefficients: Mapping[str, float]) -> str:
        """Return the model name for coefficients by the digests of diffs; zeros are the model."""
        used = {diff: value for diff, value in coefficients.items() if value}
        if not used:
            return self.model
        if self.basis is None or not used.keys() <= set(self.basis.diffs):
            raise UserError(
                "the engine does not hold the diffs that are asked for; start it with the line "
                "that persona-lora engine command --basis prints, and name diffs of that basis "
                "(basis/evil/diff)"
            )
        return self.basis.mix(used)


class VLLMServer:
    """Connections to a server; an asynchronous context manager for one event loop."""

    def __init__(self, url: str) -> None:
        self.url = engine_url(url)
        self._client = Client(Address("", self.url, NO_KEY), TIMEOUT)

    async def holdings(self) -> Holdings:
        """Ask what the server holds; Fault for what does not answer as vLLM does."""
        reply = _read(await self._client.get("/models"))
        cards = _items(reply.get("data"))
        names = [str(each.get("id")) for each in cards if each.get("parent") is None]
        bases = [ServedBasis.of_name(each) for each in names if each.startswith(BASIS)]
        if not names:
            raise Fault("it serves no model", status=404)
        return Holdings(names[0], bases[0] if bases else None)

    async def answer(
        self, model: str, tokens: Sequence[int], sampling: Mapping[str, Any]
    ) -> list[int]:
        """Return the new tokens of one row, with the one that ended it; Fault where there are none.

        Each token comes with its log-probability: NaN or infinity is never an answer.
        """
        body = {**PLAIN, **sampling, "model": model, "prompt": list(tokens)}
        choice = await self._choice({**body, "return_token_ids": True, "logprobs": 0})
        ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {})
        found = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        if not isinstance(ids, list) or not all(isinstance(each, int) for each in ids):
            raise Fault(f"the reply has no token ids; {OF_VLLM}", status=MALFORMED)
        if not isinstance(found, list) or len(found) != len(ids) or not all(map(_finite, found)):
            raise Fault(f"{model} gives NaN or infinity; steer with less", status=MALFORMED)
        return ids

    async def logprobs(self, model: str, tokens: Sequence[int]) -> list[float]:
        """Return the log-probability of each token of a text but the first."""
        body = {"model": model, "prompt": list(tokens), "max_tokens": 1, "prompt_logprobs": 0}
        choice = await self._choice({**PLAIN, **body, "temperature": 0.0})
        places = choice.get("prompt_logprobs")
        if not isinstance(places, list) or len(places) != len(tokens):
            raise Fault(f"the reply has no prompt_logprobs; {OF_VLLM}", status=MALFORMED)
        try:
            pairs = zip(tokens[1:], places[1:], strict=True)
            return [float(place[str(token)]["logprob"]) for token, place in pairs]
        except (KeyError, TypeError, ValueError) as error:
            raise Fault(
                f"its prompt_logprobs are malformed; {OF_VLLM}", status=MALFORMED
            ) from error

    async def _choice(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        choices = _items(_read(await self._client.post(body, "/completions")).get("choices"))
        if not choices:
            raise Fault("the reply has no choices", status=MALFORMED)
        return choices[0]

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *details: Any) -> None:
        await self._client.__aexit__(*details)


def engine_url(url: str) -> str:
    """Return a server's base URL, which ends in /v1; UserError for what is no URL."""
    checked = checked_url(url)
    return checked if checked.endswith("/v1") else f"{checked}/v1"


def _read(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Fault(f"the reply is no JSON; {OF_VLLM}", status=MALFORMED) from error
    if not isinstance(value, dict):
        raise Fault(f"the reply is no JSON object; {OF_VLLM}", status=MALFORMED)
    return value


def _items(value: Any) -> list[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
