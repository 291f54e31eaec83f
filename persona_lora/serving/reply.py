"""A request's answers on their way, and OpenAI's forms of them: whole, or as a stream of events.

Knows what a client is sent; refuses to know how a request is read, and HTTP.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

from persona_lora.models.likelihood import TokenLogprob
from persona_lora.models.loading import ChatModel
from persona_lora.serving.batching import Event, Reason, Row, Scored, Token
from persona_lora.serving.schemas import refusal_of

BROKEN = "\ufffd"  # a character whose last bytes are yet to come
BEFORE = 4  # tokens of the prompt that decide how the first of an answer is written
LOOKING = 1.0  # seconds without news after which a client is looked for


class Answer:
    """One answer on its way; ``reason`` is set when it has ended."""

    def __init__(self, chat_model: ChatModel, prompt: list[int], stop: Sequence[str]) -> None:
        self._tokenizer = chat_model.tokenizer
        self._before: list[int] = []
        self._before = self._whole_end(prompt)
        self._cut = len(self._written([]))
        self._stop = stop
        self._tokens: list[int] = []
        self.text = ""
        self.count = 0
        self.logprobs: list[TokenLogprob] = []
        self.reason: Reason | None = None

    def add(self, token: Token) -> str:
        """Take a token; return the text that it adds for certain.

        What may become a stop string, or a character of several tokens, waits for the next.
        """
        self.count += 1
        if token.reason != "stop":
            self._tokens.append(token.token)
        if token.logprobs is not None:
            self.logprobs.append(token.logprobs)
        text, self.reason = self._written(self._tokens)[self._cut :], token.reason
        ends = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            text, self.reason = text[: min(ends)], "stop"
        elif self.reason is None:
            text = text[: len(text) - self._unsure(text)]
        new = text[len(self.text) :]
        self.text += new  # what was told stays: bytes that follow may turn it into broken ones
        return new

    def _whole_end(self, prompt: list[int]) -> list[int]:
        """Return the last tokens of a prompt that are whole characters, which nothing changes."""
        ends = (prompt[-number:] for number in range(BEFORE, 0, -1))
        return next((end for end in ends if BROKEN not in self._written(end)), [])

    def _written(self, tokens: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                self._before + tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _unsure(self, text: str) -> int:
        """Return how many characters at the end may still change, or begin a stop string."""
        whole = text.rstrip(BROKEN)
        begun = (n for stop in self._stop for n in range(1, len(stop)) if whole.endswith(stop[:n]))
        return len(text) - len(whole) + max(begun, default=0)


class Logprobs:
    """Log-probabilities as the two endpoints send them, with the ``top`` likeliest tokens."""

    def __init__(self, chat_model: ChatModel, top: int) -> None:
        self._tokenizer = chat_model.tokenizer
        self._top = top

    def chat(self, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return those of a chat's answer."""
        return {
            "content": [
                {
                    **self._entry(each.token, each.logprob),
                    "top_logprobs": [self._entry(*pair) for pair in each.likeliest[: self._top]],
                }
                for each in found
            ]
        }

    def completion(
        self, found: Sequence[TokenLogprob], first: int | None = None, offset: int = 0
    ) -> dict[str, Any]:
        """Return those of a text, which begins with the token ``first`` where that is given.

        ``offset`` is how many characters of tokens were told before.
        """
        tokens = [] if first is None else [self._text(first)]
        values: list[float | None] = [None] * len(tokens)
        likeliest: list[dict[str, float] | None] = [None] * len(tokens)
        for each in found:
            tokens.append(self._text(each.token))
            values.append(each.logprob)
            by_text: dict[str, float] = {}  # tokens of equal text keep the likeliest
            for token, value in (*each.likeliest[: self._top], (each.token, each.logprob)):
                by_text.setdefault(self._text(token), value)
            likeliest.append(by_text)
        offsets = [*accumulate(map(len, tokens), initial=offset)][:-1]
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": likeliest,
            "text_offset": offsets,
        }

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        text = self._text(token)
        whole = BROKEN not in text
        return {"token": text, "logprob": value, "bytes": [*text.encode()] if whole else None}

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))


Gone = Callable[[], Awaitable[bool]]


@dataclass
class Choice:
    """One answer of a request: its row, its text so far, and what is sent before it (echo)."""

    row: Row
    answer: Answer
    before: str = ""
    scored: list[TokenLogprob] = field(default_factory=list)
    offset: int = 0  # characters of the tokens whose log-probabilities are sent


class News(NamedTuple):
    """What a token adds to a choice."""

    place: int
    text: str
    logprobs: list[TokenLogprob]


class Reply:
    """The answers to one request, in the form of chats or of completions."""

    def __init__(self, model: str, logprobs: Logprobs, *, chat: bool) -> None:
        self._chat = chat
        self._logprobs = logprobs
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.choices: list[Choice] = []
        self._shared = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def teller(self) -> Callable[[Event], None]:
        """Return what the row of the next choice tells; it may be called in any thread."""
        index = len(self.choices)

        def tell(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

        return tell

    async def news(self, gone: Gone) -> AsyncIterator[News]:
        """Yield what is new until all answers have ended, or nobody is there to read them.

        Raises what ended a row early. However it ends, no row goes on.
        """
        try:
            while any(choice.answer.reason is None for choice in self.choices):
                news = None
                with suppress(TimeoutError):
                    news = await asyncio.wait_for(self._queue.get(), LOOKING)
                if await gone():
                    return
                if news is None:
                    continue
                index, event = news
                choice = self.choices[index]
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Scored):
                    choice.scored = event.logprobs
                elif choice.answer.reason is None:
                    found = [] if event.logprobs is None else [event.logprobs]
                    yield News(index, choice.answer.add(event), found)
                    if choice.answer.reason is not None:  # a stop string, which the row cannot see
                        choice.row.gone = True
        finally:
            for choice in self.choices:
                choice.row.gone = True

    async def whole(self, gone: Gone) -> dict[str, Any]:
        """Return the answers when all have ended."""
        async for _ in self.news(gone):
            pass
        choices = [self._whole(index, choice) for index, choice in enumerate(self.choices)]
        return {**self._shared, "choices": choices, "usage": self._usage()}

    async def stream(self, gone: Gone, *, usage: bool) -> AsyncIterator[str]:
        """Yield the answers as server-sent events, and what ends them early as the last one."""
        shared = {**self._shared}
        if self._chat:
            shared["object"] = "chat.completion.chunk"
            for index in range(len(self.choices)):
                piece = self._piece(News(index, "", []), {"role": "assistant", "content": ""})
                yield _event({**shared, "choices": [piece]})
        try:
            async for news in self.news(gone):
                if news.text or news.logprobs or self.choices[news.place].answer.reason:
                    piece = self._piece(news, {"content": news.text})
                    yield _event({**shared, "choices": [piece]})
        except Exception as error:  # noqa: BLE001 - whatever ended a row is told
            yield _event(refusal_of(error).body())
            return
        if usage:
            yield _event({**shared, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _piece(self, news: News, delta: dict[str, str]) -> dict[str, Any]:
        said = {"delta": delta} if self._chat else {"text": news.text}
        choice, found = self.choices[news.place], None
        if news.logprobs and self._chat:
            found = self._logprobs.chat(news.logprobs)
        elif news.logprobs:
            found = self._logprobs.completion(news.logprobs, offset=choice.offset)
            choice.offset += sum(map(len, found["tokens"]))
        return {
            "index": news.place,
            **said,
            "logprobs": found,
            "finish_reason": choice.answer.reason,
        }

    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        answer = choice.answer
        if self._chat:
            found = self._logprobs.chat(answer.logprobs)
            said: dict[str, Any] = {"message": {"role": "assistant", "content": answer.text}}
        else:
            first = choice.row.prompt[0] if choice.row.scored else None
            found = self._logprobs.completion([*choice.scored, *answer.logprobs], first)
            said = {"text": choice.before + answer.text}
        return {
            "index": index,
            **said,
            "logprobs": None if choice.row.top is None else found,
            "finish_reason": answer.reason,
        }

    def _usage(self) -> dict[str, int]:
        """Return the numbers of tokens; a prompt that has several answers counts once."""
        asked = {id(choice.row.prompt): len(choice.row.prompt) for choice in self.choices}
        prompt, answered = sum(asked.values()), sum(each.answer.count for each in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answered,
            "total_tokens": prompt + answered,
        }


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
