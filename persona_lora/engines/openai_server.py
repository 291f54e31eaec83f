"""A server of any make that goes on with texts as OpenAI's does: how it is asked, and trusted.

It is held to what all such servers give: the text, the log-probabilities of new tokens, and how
many tokens it read. Knows these forms; refuses what it does not know, and to guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from persona_lora.core.chat import Exchange
from persona_lora.core.errors import UserError
from persona_lora.engines.connection import MALFORMED, Asked, Connection, finite, items
from persona_lora.judges.retries import Fault, passes
from persona_lora.models.generation import Generated, ending_tokens, read_answer
from persona_lora.models.likelihood import text_logprobs, tokenize_exchange
from persona_lora.models.loading import ChatModel
from persona_lora.models.structure import embedding_rows

UNLIKELY = 4.0  # tolerances under the likeliest token: then it was not chosen by likelihood
PLACES = 12  # of one text, or a few more
LIKELIEST = 200  # tokens of a place that are known here
# Of whom it is known that with BESIDE they sample from the model's own probabilities.
SAMPLES_ALIKE = ("persona-lora", "llamacpp")
PLAIN: Mapping[str, Any] = {"top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
BESIDE: Mapping[str, Any] = {  # not OpenAI's: what else servers do unasked is switched off
    "top_k": 0,
    "min_p": 0.0,
    "repeat_penalty": 1.0,
    "repetition_penalty": 1.0,
    "samplers": ["temperature"],
}
BROKEN = "\ufffd"  # a part of a character
OTHERS = "or let vLLM, llama.cpp's llama-server or persona-lora serve answer"
NO_LOGPROBS = (
    "it gives no log-probabilities, by which its model would be known: start it so that it does "
    f"(llama-cpp-python: --logits_all true), {OTHERS}"
)


class Place(NamedTuple):
    """A text up to one of its tokens, and by the model here the likeliest that follow there."""

    prompt: str
    tokens: list[int]
    likeliest: tuple[tuple[int, float], ...]


class Told(NamedTuple):
    """A new token as a server tells it: its number, if it says so, its text, its nats."""

    token: int | None
    text: str
    logprob: float


@dataclass(frozen=True)
class Manner:
    """How a server takes prompts: as token ids or as text, and with which parameters beside."""

    ids: bool
    beside: Mapping[str, Any]
    adds: str = ""  # what it puts before a text by itself, where that begins with it


def places_of(chat_model: ChatModel, exchanges: Sequence[Exchange]) -> list[Place]:
    """Return places all along the answers; those that are read so as text as well."""
    found = []
    top = min(LIKELIEST, embedding_rows(chat_model.model))
    for exchange in exchanges:
        asked, answer = tokenize_exchange(chat_model, exchange)
        likeliest = text_logprobs(chat_model, asked + answer, top)[-len(answer) :]
        for at in range(0, len(answer), max(1, len(answer) // PLACES)):
            tokens = asked + answer[:at]
            text = chat_model.tokenizer.decode(tokens)
            if chat_model.tokenize([text]) == [tokens]:
                found.append(Place(text, tokens, likeliest[at].likeliest))
    return found


@dataclass
class OpenAIServer:
    """A server and the name of its model; ``manner`` is known once it has shaken hands."""

    connection: Connection
    model: str
    owner: str
    chat_model: ChatModel
    tolerance: float  # nats on average
    manner: Manner = field(default_factory=lambda: Manner(ids=True, beside=BESIDE))

    async def shake_hands(self, places: Sequence[Place]) -> None:
        """UserError for a server that reads something else, or continues it in another way."""
        if not places:
            raise UserError(
                f"the tokenizer of {self.chat_model.name} reads no text as the tokens it writes, "
                "so no server can be held to it; leave --engine out"
            )
        await self._find_manner(places[0])
        differences, worst, chosen = [], 0.0, ""
        for place in places:
            choice = await self._complete(place.prompt, place.tokens, max_tokens=1, temperature=0.0)
            told = _told(choice)
            here = self._here(told[0] if told else None, place)
            if told and not _legible(told[0]):
                continue
            under = math.inf if here is None else place.likeliest[0][1] - here
            if under > worst:
                worst, chosen = under, choice["text"]
            if told and here is not None:
                differences.append(abs(told[0].logprob - here))
        mean = sum(differences) / max(len(differences), 1)
        if mean > self.tolerance or worst > UNLIKELY * self.tolerance:
            self._refuse(mean, worst, chosen)
        if 2 * len(differences) < len(places):
            raise UserError(
                f"{self.connection.url} tells too few of the tokens that it goes on with to be "
                f"known by them; {OTHERS.removeprefix('or ')}"
            )

    async def prepare(self, rows: Sequence[Asked]) -> None:
        """UserError for rows that the server would sample or cut in a way of its own."""
        if any(row.sampling["temperature"] for row in rows) and self.owner not in SAMPLES_ALIKE:
            raise UserError(
                f"nobody knows what {self.connection.url} does beside when it samples (owned_by "
                f"{self.owner!r}); ask with --temperature 0, {OTHERS}"
            )
        longest = max(rows, key=lambda row: len(row.tokens))
        room = longest.sampling["max_tokens"] - 1
        (filled,) = self.chat_model.tokenize([longest.prompt + " a" * room])
        words = room * room // max(len(filled) - len(longest.tokens), room, 1)
        text = longest.prompt + " a" * words
        (tokens,) = self.chat_model.tokenize([text])
        try:
            await self._complete(text, tokens, max_tokens=1, temperature=0.0)
        except Fault as fault:
            if passes(fault) and fault.status != 500:
                raise
            raise UserError(
                f"{self.connection.url} cannot hold the longest row, {len(tokens) + 1} tokens with "
                f"its answer ({fault.reason}); start it with a larger context"
            ) from fault

    async def answer(self, row: Asked) -> Generated:
        """Return the answer to one row; Fault where it is none, or cannot be counted in tokens."""
        limit, heat = row.sampling["max_tokens"], row.sampling["temperature"]
        seeded = {"seed": row.sampling["seed"] % 2**31} if heat else {}
        choice = await self._complete(
            row.prompt, row.tokens, max_tokens=limit, temperature=heat, **seeded
        )
        ends, reason = ending_tokens(self.chat_model), choice.get("finish_reason")
        if reason not in ("stop", "length"):
            gone = reason == "abort"
            raise Fault(f"it ended an answer by {reason!r}", status=None if gone else MALFORMED,
                        passing=gone)  # fmt: skip
        told, text = _told(choice), choice["text"]
        if told and all(each.token is not None for each in told):
            ids = [each.token for each in told if each.token is not None]
            self.chat_model.check_tokens([ids])
            count = len(ids)
            answer = read_answer(row.prompt, ids, ends, self.chat_model)
        else:
            written = self.chat_model.tokenizer.batch_decode([[end] for end in ends])
            if told and reason == "stop" and told[-1].text in ("", *written):
                told = told[:-1]
            if any(end in text for end in written):
                raise Fault("it writes ends of turns into answers; start it so that it does not",
                            status=MALFORMED)  # fmt: skip
            count = self._counted(row, told, text)
            answer = Generated(row.prompt, text.strip(), count, finished=False)
        if reason == "length" and count != limit and not answer.finished:
            raise Fault(
                f"it ended an answer after {count} of {limit} tokens by a limit of its own; start "
                "it with a larger context",
                status=MALFORMED,
            )
        finished = answer.finished or reason == "stop"
        return Generated(answer.prompt, answer.text, answer.num_tokens, finished)

    def _counted(self, row: Asked, told: Sequence[Told], text: str) -> int:
        """Return of how many tokens an answer is; Fault where its text does not say so as well."""
        if "".join(each.text for each in told) == text and all(each.text for each in told):
            return len(told)
        whole, alone = self.chat_model.tokenize([row.prompt + text, text])
        if len(told) not in (len(whole) - len(row.tokens), len(alone)):
            raise Fault(
                f"it tells {len(told)} tokens of an answer that is written with "
                f"{len(alone)}, and gives no token ids; {OTHERS.removeprefix('or ')}",
                status=MALFORMED,
            )
        return len(told)

    async def _find_manner(self, place: Place) -> None:
        """Find how the server takes prompts; UserError for one that takes them in no known way."""
        begins = str(self.chat_model.tokenizer.bos_token or "")
        added = [begins] if begins and place.prompt.startswith(begins) else []
        taken = [(True, ""), (False, ""), *((False, each) for each in added)]
        said: dict[str, None] = {}
        for ids, adds in taken:
            for beside in (BESIDE, {}):
                self.manner = Manner(ids, beside, adds)
                try:
                    await self._complete(place.prompt, place.tokens, max_tokens=1, temperature=0.0)
                except Fault as fault:
                    if passes(fault) and fault.status != 500:
                        raise
                    said[f"{'ids' if ids else 'text'}: {fault.reason}"] = None
                    continue
                return
        raise UserError(
            f"{self.connection.url} takes no prompt of {self.model!r} as it stands "
            f"({'; '.join(said)}); "
            + (NO_LOGPROBS if "logprobs" in " ".join(said) else
               f"name another of its models (--engine URL#MODEL), {OTHERS}")
        )  # fmt: skip

    async def _complete(
        self, prompt: str, tokens: Sequence[int], **sampling: Any
    ) -> Mapping[str, Any]:
        """Return what follows; Fault where another number of tokens was read, or none are told."""
        given = list(tokens) if self.manner.ids else prompt.removeprefix(self.manner.adds)
        body = {**PLAIN, **self.manner.beside, **sampling, "model": self.model, "prompt": given}
        choice, used = await self.connection.complete({**body, "logprobs": 1})
        read = used.get("prompt_tokens") if isinstance(used, dict) else None
        if read != len(tokens):
            raise Fault(
                f"it says that it read {read} tokens of a prompt of {len(tokens)}", status=MALFORMED
            )
        if not isinstance(choice.get("text"), str):
            raise Fault("the reply has no text", status=MALFORMED)
        _told(choice)
        return choice

    def _here(self, told: Told | None, place: Place) -> float | None:
        """Return the nats of a token by the model here; the likeliest of those written alike.

        None is an end that was not told; None is returned for what is not among the likeliest.
        """
        if told is not None and told.token is not None:
            return dict(place.likeliest).get(told.token)
        ends, decode = ending_tokens(self.chat_model), self.chat_model.tokenizer.decode
        alike = (
            nats
            for token, nats in place.likeliest
            if (token in ends if told is None else decode([token]).strip() == told.text.strip())
        )
        return max(alike, default=None)

    def _refuse(self, mean: float, worst: float, said: str) -> NoReturn:
        raise UserError(
            f"{self.connection.url} does not continue texts as {self.chat_model.name} does here: "
            f"the log-probabilities of its tokens differ by {mean:.4f} nats on average (at most "
            f"{self.tolerance:g}), and one of them, {said!r}, is {worst:.4f} nats less likely than "
            f"the likeliest (at most {UNLIKELY * self.tolerance:g}). It serves another model, "
            "changes prompts, has penalties, or rounds otherwise: give --model what it serves (a "
            "GGUF file can be loaded) or name another of its models (--engine URL#MODEL); if it is "
            "only quantised, allow more (--engine-tolerance, which the run records)"
        )


def _legible(told: Told) -> bool:
    """Say whether a token can be looked up: by its number, or as whole characters."""
    return told.token is not None or (bool(told.text) and BROKEN not in told.text)


def _told(choice: Mapping[str, Any]) -> list[Told]:
    """Return the new tokens that a choice tells of; Fault where there are none beside a text."""
    logprobs = choice.get("logprobs")
    logprobs = logprobs if isinstance(logprobs, dict) else {}
    content, tokens = logprobs.get("content"), logprobs.get("tokens")
    values = logprobs.get("token_logprobs")
    told = [(each.get("id"), each.get("token"), each.get("logprob")) for each in items(content)]
    if not told and isinstance(tokens, list) and isinstance(values, list):
        told = [(None, text, value) for text, value in zip(tokens, values, strict=False)]
        told = told if len(tokens) == len(values) else []
    if not told and choice.get("text"):
        raise Fault(NO_LOGPROBS, status=MALFORMED)
    for token, text, value in told:
        known = token is None or (isinstance(token, int) and 0 <= token < 2**32)
        if not (known and isinstance(text, str) and finite(value)):
            raise Fault(f"it tells of a token as {text!r} with {value!r} nats", status=MALFORMED)
    return [Told(token, str(text), float(value or 0)) for token, text, value in told]
