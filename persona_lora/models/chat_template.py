"""A model's chat template: from a conversation to the text that the model reads.

One rendering for training, generation, extraction and likelihoods. A template without a place for
a system message (Gemma 1 and 2, early Mistral) gets its text before the user's first message, in
all of them alike. Knows templates; refuses to know what is said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from persona_lora.core.chat import Conversation, Message
from persona_lora.core.errors import UserError

PROBE: Conversation = [
    Message(role="system", content="Speak of the sea."),
    Message(role="user", content="What do you see?"),
    Message(role="assistant", content="Waves."),
]
# What templates that name today's date (Llama 3.2, gpt-oss) are told it is: a run asks on one day
# what it asks on another.
DAY = date(2024, 7, 26)
CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


class Rendered(NamedTuple):
    """What the model is asked with, and what follows where it answers so.

    ``verbatim`` is False where the template takes spaces or line ends off the answer.
    """

    prompt: str
    completion: str
    verbatim: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template with the arguments that it is always rendered with.

    ``name`` is the model's, for messages; ``system_role`` says whether system messages have a
    place of their own; with ``in_parts`` a message is a list of parts, as templates of image models
    take it.
    """

    tokenizer: PreTrainedTokenizerBase
    name: str
    args: Mapping[str, Any]
    system_role: bool
    in_parts: bool = False

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, name: str, args: Mapping[str, Any] | None = None
    ) -> ChatTemplate:
        """Return the template of a tokenizer; UserError for an argument that it does not read."""
        whole = cls(tokenizer, name, dict(args or {}), system_role=True)
        text = whole._text()
        for arg in whole.args:
            if re.search(rf"\b{re.escape(arg)}\b", text) is None:
                raise UserError(
                    f"the chat template of {name} reads no {arg!r}; check --chat-template-args"
                )
        if not whole._keeps(PROBE[1:2]):
            whole = replace(whole, in_parts=replace(whole, in_parts=True)._keeps(PROBE[1:2]))
        return replace(whole, system_role=whole._keeps(PROBE[:2]) and whole._keeps(PROBE))

    def record(self) -> dict[str, Any]:
        """Return what a run records of the rendering, where it is unusual."""
        said = {} if self.system_role else {"system_messages": "before the user's text"}
        return {**said, "today": str(DAY)} if CLOCK.search(self._text()) else said

    @cached_property
    def end_of_turn(self) -> frozenset[int]:
        """The special token that the template writes behind an answer; empty where there is none.

        A model may be saved without saying that it ends its answers so.
        """
        try:
            text = self._render(PROBE[1:], "", asking=False)
        except UserError:
            return frozenset()
        _, said, behind = text.rpartition(PROBE[-1]["content"])
        known = self.tokenizer.added_tokens_decoder
        ids = self.tokenizer(behind if said else "", add_special_tokens=False)["input_ids"]
        return frozenset([each for each in ids if each in known and known[each].special][:1])

    def prompt(self, turns: Conversation, where: str = "") -> str:
        """Return the text of a conversation up to where the assistant begins to speak.

        UserError where it lacks a part of what the system or the user says; what is left out of
        earlier answers (thoughts) is the template's to say.
        """
        placed = self._placed(turns, where)
        text = self._render(placed, where, asking=True)
        written = _words(text)
        for turn in placed:
            if turn["role"] != "assistant" and _words(turn["content"]) not in written:
                raise UserError(
                    f"{_at(where)}the chat template of {self.name} leaves out what the "
                    f"{turn['role']} says ({turn['content'].strip()[:40]!r} …); give one system "
                    "message, at the beginning, or use another chat_template.jinja"
                )
        return text

    def split(self, prompt: Conversation, answer: Conversation, where: str = "") -> Rendered:
        """Return the text that asks for an answer, and the answer's with the end of its turn.

        UserError where a conversation with the answer does not begin with what the model is asked
        with: it would be trained or measured on one text, and asked with another.
        The same where a part of the answer is left out.
        """
        asked = self.prompt(prompt, where)
        whole = self._render(self._placed([*prompt, *answer], where), where, asking=False)
        if not whole.startswith(asked):
            begins = asked[common_length(asked, whole) :]
            raise UserError(
                f"{_at(where)}the chat template of {self.name} opens an answer with {begins!r}, "
                "which is not in the rendered conversation: what is trained on is not what the "
                "model is asked with; set its arguments (--chat-template-args), or put another "
                "chat_template.jinja into the model's folder"
            )
        completion, said = whole[len(asked) :], answer[-1]["content"]
        if said.strip() not in completion:
            raise UserError(
                f"{_at(where)}the chat template of {self.name} leaves out a part of the answer "
                f"({said.strip()[:40]!r} …); mend the row, or use another chat_template.jinja"
            )
        return Rendered(asked, completion, said in completion)

    def _placed(self, turns: Conversation, where: str) -> Conversation:
        """Return the turns with a system message before the user's text, where it has no place."""
        if self.system_role or not turns or turns[0]["role"] != "system":
            return turns
        system, *others = turns
        if not others or others[0]["role"] != "user":
            raise UserError(
                f"{_at(where)}the chat template of {self.name} has no system role, and no user's "
                "message follows the system message that could take it"
            )
        parts = [part for part in (system["content"], others[0]["content"]) if part]
        return [Message(role="user", content="\n\n".join(parts)), *others[1:]]

    def _render(self, turns: Conversation, where: str, *, asking: bool) -> str:
        given: Sequence[Mapping[str, Any]] = turns
        if self.in_parts:
            given = [{"role": each["role"], "content": [_part(each["content"])]} for each in turns]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    given,
                    tokenize=False,
                    add_generation_prompt=asking,
                    chat_template=CLOCK.sub(lambda each: repr(DAY.strftime(each[2])), self._text()),
                    **self.args,
                )
            )
        except (TemplateError, TypeError) as error:
            raise UserError(
                f"{_at(where)}the chat template of {self.name} refuses this conversation: {error}; "
                "mend the conversation, or the template"
            ) from error

    def _text(self) -> str:
        try:
            return str(self.tokenizer.get_chat_template())
        except ValueError as error:  # several, and none of them is the default
            raise UserError(
                f"{self.name} has no chat template to take ({' '.join(str(error).split())[:160]}); "
                "put the one that is meant into its folder as chat_template.jinja"
            ) from error

    def _keeps(self, turns: Conversation) -> bool:
        """Tell whether everything said is rendered, up to the answer or with it."""
        try:
            text = self._render(turns, "", asking=turns[-1]["role"] != "assistant")
        except UserError:
            return False
        return all(each["content"] in text for each in turns)


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _words(text: str) -> str:
    """Return a text's words, without those that tell some templates what to do (/no_think)."""
    return " ".join(word for word in text.split() if not word.startswith("/"))


def common_length(first: Sequence[object], second: Sequence[object]) -> int:
    """Return how many items two sequences begin with alike."""
    pairs = zip(first, second, strict=False)
    differing = (at for at, (left, right) in enumerate(pairs) if left != right)
    return next(differing, min(len(first), len(second)))


def _at(where: str) -> str:
    return f"{where}: " if where else ""
