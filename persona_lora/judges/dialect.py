"""What an endpoint has been found to refuse, and the request that it takes instead.

Knows the names of a chat completion's parameters; refuses to know what is asked with them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from persona_lora.judges.retries import Fault

logger = logging.getLogger(__name__)

Body = Mapping[str, Any]

TOP_LOGPROBS = (20, 10, 8, 5)  # limits that endpoints are known to have
REASONING_ROOM = 2048  # tokens
_REFUSING_STATUSES = (400, 422)


class Dialect:
    """The requests of one endpoint: shared by all of them, and learnt from its refusals.

    ``optional`` names parameters that may be left out; ``room`` is how many more tokens a reply
    gets once the model is seen to reason before it answers, 0 where that would not help.
    """

    def __init__(self, name: str, *, optional: Collection[str] = (), room: int = 0) -> None:
        self._name = name
        self._optional = tuple(optional)
        self._room = room
        self._renamed = False
        self._left_out: set[str] = set()
        self._most_logprobs = TOP_LOGPROBS[0]
        self._extra_tokens = 0

    def spoken(self, body: Body) -> dict[str, Any]:
        """Return ``body`` as this endpoint takes it."""
        said = {name: value for name, value in body.items() if name not in self._left_out}
        if "top_logprobs" in said:
            said["top_logprobs"] = min(said["top_logprobs"], self._most_logprobs)
        if "max_tokens" in said:
            tokens = said.pop("max_tokens") + self._extra_tokens
            said["max_completion_tokens" if self._renamed else "max_tokens"] = tokens
        return said

    def learn(self, fault: Fault, sent: Body) -> bool:
        """Take a refusal of a parameter into account; False where it is about something else."""
        if fault.status not in _REFUSING_STATUSES:
            return False
        said = fault.said.lower()
        if "max_tokens" in sent and "max_completion_tokens" in said:
            self._renamed = True
            return True
        if "top_logprobs" in sent and "top_logprobs" in said:
            return self._fewer_logprobs(sent["top_logprobs"])
        for name in self._optional:
            if name in sent and name in said:
                logger.warning("%s refuses %s and is asked without it", self._name, name)
                self._left_out.add(name)
                return True
        return False

    def give_room(self) -> bool:
        """Let replies be longer, so that reasoning ends before they do; False where it cannot."""
        if self._room == self._extra_tokens:
            return False
        self._extra_tokens = self._room
        logger.warning(
            "%s reasons before it answers; its replies may be %d tokens longer from here on",
            self._name,
            self._room,
        )
        return True

    def _fewer_logprobs(self, asked: int) -> bool:
        fewer = [number for number in TOP_LOGPROBS if number < asked]
        if fewer:
            self._most_logprobs = fewer[0]
        return bool(fewer)
