"""What a client is sent of an answer: its text as tokens come, and log-probabilities.

Knows texts and OpenAI's two forms of log-probabilities; refuses to know who asked for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from persona_lora.models.likelihood import TokenLogprob
from persona_lora.models.loading import ChatModel
from persona_lora.serving.batching import Reason, Token

BROKEN = "\ufffd"  # a character whose last bytes are yet to come
BEFORE = 4  # tokens of the prompt that decide how the first of an answer is written


class Answer:
    """One answer on its way; ``reason`` is set when it has ended."""

    def __init__(self, chat_model: ChatModel, prompt: list[int], stop: Sequence[str]) -> None:
        self._tokenizer = chat_model.tokenizer
        self._before = prompt[-BEFORE:]
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
        new, self.text = text[len(self.text) :], text
        return new

    def _written(self, tokens: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                self._before + tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _unsure(self, text: str) -> int:
        """Return how many characters at the end may still change, or begin a stop string."""
        broken = len(text) - len(text.rstrip(BROKEN))
        begun = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max([broken, *begun])


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

    def completion(self, found: Sequence[TokenLogprob], first: int | None = None) -> dict[str, Any]:
        """Return those of a text, which begins with the token ``first`` where that is given."""
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
        offsets = [*accumulate(map(len, tokens), initial=0)][:-1]
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
