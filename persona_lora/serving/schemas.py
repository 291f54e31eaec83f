"""What a request may hold, in OpenAI's names; anything else is refused.

Parameters that this server does not carry out are taken at the value at which they do nothing.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from persona_lora.core.chat import Conversation, Message

MOST_CHOICES = 16
MOST_LIKELIEST = 20
LEAST_HEAT = 0.01
Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[float, Field(ge=1, le=1)]
Tokens = Annotated[int, Field(ge=1)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]


class Part(BaseModel):
    """A part of a message: text alone."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Said(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "user", "assistant"]
    content: str | list[Part]
    type: Literal["text"] | None = None

    def message(self) -> Message:
        """Return it as the chat template takes it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return Message(role=self.role, content=text)


class StreamOptions(BaseModel):
    """What a stream brings beside text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class Asked(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
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

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


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

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELIEST)] | None = None
    echo: bool | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, also where there is one."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if given and all(isinstance(each, int) for each in given):
            return [[each for each in given if isinstance(each, int)]]
        return [each for each in given if not isinstance(each, int)]
