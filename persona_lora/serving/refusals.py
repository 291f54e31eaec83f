"""What a request is refused with: a status, and OpenAI's form of an error.

Knows which mistake is whose; refuses to know where it was found.
"""

from __future__ import annotations

from typing import Any

from persona_lora.core.errors import UserError, without_secrets
from persona_lora.serving.batching import Busy
from persona_lora.serving.mixes import UnknownPersona

RETRY_AFTER = {"Retry-After": "2"}  # seconds
KINDS = {401: "authentication_error", 429: "rate_limit_error"}
OTHER = "invalid_request_error"


class Refusal(Exception):
    """An answer that is none: the status, what is said, and the headers."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """Return OpenAI's form of it."""
        kind = "server_error" if self.status >= 500 else KINDS.get(self.status, OTHER)
        said = " ".join(without_secrets(str(self)).split())
        return {"error": {"message": said, "type": kind, "param": None, "code": self.code}}


def refusal_of(error: Exception) -> Refusal:
    """Return what a client is told of an error."""
    match error:
        case Refusal():
            return error
        case UnknownPersona():
            return Refusal(404, str(error), "model_not_found")
        case UserError():
            return Refusal(400, str(error))
        case Busy(closed=True):
            return Refusal(503, str(error))
        case Busy():
            return Refusal(429, str(error), "rate_limit_exceeded", RETRY_AFTER)
        case _:
            return Refusal(500, f"the model failed ({str(error)[:200]}); see the server's log")
