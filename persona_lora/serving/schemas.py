"""What a request may hold, in OpenAI's names, and what it is refused with.

Parameters that this server does not carry out are taken at the value at which they do nothing; a
refusal is a status and OpenAI's form of an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from persona_lora.core.chat import Conversation, Message
from persona_lora.core.errors import UserError, without_secrets
from persona_lora.serving.batching import Busy
from persona_lora.serving.mixes import UnknownPersona

MOST_CHOICES = 16
MOST_LIKELIEST = 20
LEAST_HEAT = 0.01
# Known, and not carried out.
UNSERVED = (
    *("top_p", "presence_penalty", "frequency_penalty", "logit_bias", "response_format"),
    *("tools", "suffix", "best_of"),
)
Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[float, Field(ge=1, le=1)]
Tokens = Annotated[int, Field(ge=1)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Name = Annotated[str, Field(max_length=4000)]


def _listed(value: Any) -> Any:
    """Return one text, or the token ids of one, as a list of it."""
    one = isinstance(value, list) and value and all(isinstance(each, int) for each in value)
    return [value] if one or isinstance(value, str) else value


class Given(BaseModel):
    """A part of a request; what is null in it was not given."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        """Leave out what is null, as clients send what they do not use (tools, a refusal)."""
        if not isinstance(value, dict):
            return value
        return {name: each for name, each in value.items() if each is not None}


class Part(Given):
    """A part of a message: text alone."""

    type: Literal["text"]
    text: str


class Said(Given):
    """A message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]
    type: Literal["text"] | None = None

    def message(self) -> Message:
        """Return it as the chat template takes it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return Message(role=self.role, content=text)


class StreamOptions(Given):
    """What a stream brings beside text."""

    include_usage: bool = False


class Asked(Given):
    """What both endpoints take."""

    model: Name
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[Stop], Field(max_length=16), BeforeValidator(_listed)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    user: str | None = None
    top_p: One | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @field_validator("temperature")
    @classmethod
    def _warm(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < LEAST_HEAT:
            raise ValueError(f"must be 0 (greedy) or at least {LEAST_HEAT}")
        return value


class AskedChat(Asked):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[Said], Field(min_length=1)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELIEST)] | None = None
    response_format: Annotated[dict[str, Literal["text"]], Field(max_length=1)] | None = None
    tools: Annotated[list[str], Field(max_length=0)] | None = None

    @property
    def conversation(self) -> Conversation:
        """The messages as the chat template takes them."""
        return [said.message() for said in self.messages]


class AskedText(Asked):
    """A request to /v1/completions; prompts are texts or token ids."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_listed)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELIEST)] | None = None
    echo: bool | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None


# -- refusals ---------------------------------------------------------------------------------

RETRY_AFTER = {"Retry-After": "2"}  # seconds
KINDS = {401: "authentication_error", 429: "rate_limit_error"}
OTHER = "invalid_request_error"


@dataclass(eq=False)
class Refusal(Exception):
    """An answer that is none: the status, what is said, and the headers."""

    status: int
    message: str
    code: str | None = None
    headers: dict[str, str] | None = None

    def body(self) -> dict[str, Any]:
        """Return OpenAI's form of it."""
        kind = "server_error" if self.status >= 500 else KINDS.get(self.status, OTHER)
        said = " ".join(without_secrets(self.message).split())
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
