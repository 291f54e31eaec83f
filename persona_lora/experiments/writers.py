"""Language models that write data: one behind an OpenAI-compatible endpoint, or one in-process.

Knows how a text is asked for; refuses to know what it is for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from openai import APIStatusError, OpenAI, OpenAIError

from persona_lora.core.chat import Conversation
from persona_lora.core.errors import UserError
from persona_lora.judges.openai import checked_key, checked_url
from persona_lora.models.generation import generate_answers
from persona_lora.models.loading import ChatModel

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
LASTING_STATUSES = (400, 401, 403, 404)


class Writer(Protocol):
    """Writes one text for each conversation; None where it could not."""

    name: str

    def write(
        self,
        conversations: Sequence[Conversation],
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        progress: Progress | None = None,
    ) -> list[str | None]: ...


@dataclass(frozen=True)
class Endpoint:
    """Where an OpenAI-compatible endpoint is, what to ask it for, and how hard to press it."""

    model: str
    base_url: str
    api_key: str | None = None
    concurrency: int = 8
    timeout: float = 120.0
    max_retries: int = 5


class EndpointWriter:
    """Asks an OpenAI-compatible endpoint; passing faults are retried by its client.

    A fault that every request would meet (a refused key, an unknown model) is a UserError.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.name = endpoint.model
        url = checked_url(endpoint.base_url)
        self._client = OpenAI(
            api_key=checked_key(endpoint.api_key, url),
            base_url=url,
            timeout=endpoint.timeout,
            max_retries=endpoint.max_retries,
        )

    def write(
        self,
        conversations: Sequence[Conversation],
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        progress: Progress | None = None,
    ) -> list[str | None]:
        """Return the replies in order; what failed after all retries is None, and logged."""

        def ask(numbered: tuple[int, Conversation]) -> str | None:
            number, conversation = numbered
            return self._ask(conversation, max_tokens, temperature, seed + number)

        texts: list[str | None] = []
        with ThreadPoolExecutor(max_workers=self.endpoint.concurrency) as pool:
            for text in pool.map(ask, enumerate(conversations)):
                texts.append(text)
                if progress is not None:
                    progress(len(texts), len(conversations))
        return texts

    def _ask(
        self, conversation: Conversation, max_tokens: int, temperature: float, seed: int
    ) -> str | None:
        try:
            response = self._client.chat.completions.create(
                model=self.endpoint.model,
                messages=conversation,  # type: ignore[arg-type]
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
            )
        except OpenAIError as error:
            status = error.status_code if isinstance(error, APIStatusError) else None
            if status in LASTING_STATUSES:
                raise UserError(
                    f"the endpoint {self.endpoint.base_url} refused model {self.endpoint.model!r} "
                    f"(HTTP {status}); check --model, the URL and OPENAI_API_KEY"
                ) from error
            logger.warning("a request for %s failed: %s", self.name, type(error).__name__)
            return None
        text = response.choices[0].message.content if response.choices else None
        return text.strip() if text and text.strip() else None


class LocalWriter:
    """Asks a model in-process, in batches."""

    def __init__(self, chat_model: ChatModel) -> None:
        self.chat_model = chat_model
        self.name = chat_model.name

    def write(
        self,
        conversations: Sequence[Conversation],
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        progress: Progress | None = None,
    ) -> list[str | None]:
        """Return the answers in order; an empty one is None."""
        answers = generate_answers(
            self.chat_model,
            conversations,
            max_new_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            progress=progress,
        )
        return [answer.text or None for answer in answers]
