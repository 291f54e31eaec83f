"""A model's chat template: from a conversation to the text that the model reads.

One rendering for training, generation, extraction and likelihoods. A template without a place for
a system message (Gemma 1 and 2, early Mistral) gets its text before the user's first message, in
all of them alike. Knows templates; refuses to know what is said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    place of their own.
    """

    tokenizer: PreTrainedTokenizerBase
    name: str
    args: Mapping[str, Any]
    system_role: bool

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, name: str, args: Mapping[str, Any] | None = None
    ) -> ChatTemplate:
        """Return the template of a tokenizer; UserError for an argument that it does not read."""
        text = str(tokenizer.get_chat_template())
        for arg in args or {}:
            if re.search(rf"\b{re.escape(arg)}\b", text) is None:
                raise UserError(
                    f"the chat template of {name} reads no {arg!r}; check --chat-template-args"
                )
        whole = cls(tokenizer, name, dict(args or {}), system_role=True)
        return cls(tokenizer, name, whole.args, whole._keeps_system())

    def record(self) -> dict[str, Any]:
        """Return what a run records of how system messages are rendered, where it is unusual."""
        return {} if self.system_role else {"system_messages": "before the user's text"}

    def prompt(self, turns: Conversation, where: str = "") -> str:
        """Return the text of a conversation up to where the assistant begins to speak."""
        return self._render(self._placed(turns, where), where, asking=True)

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
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=asking, **self.args
                )
            )
        except (TemplateError, TypeError) as error:
            raise UserError(
                f"{_at(where)}the chat template of {self.name} refuses this conversation: {error}; "
                "mend the conversation, or the template"
            ) from error

    def _keeps_system(self) -> bool:
        """Tell whether a system message is rendered, asked with and answered alike."""
        system, question, answer = PROBE
        try:
            asked = self._render([system, question], "", asking=True)
            whole = self._render([system, question, answer], "", asking=False)
        except UserError:
            return False
        return system["content"] in asked and system["content"] in whole


def common_length(first: Sequence[object], second: Sequence[object]) -> int:
    """Return how many items two sequences begin with alike."""
    pairs = zip(first, second, strict=False)
    differing = (at for at, (left, right) in enumerate(pairs) if left != right)
    return next(differing, min(len(first), len(second)))


def _at(where: str) -> str:
    return f"{where}: " if where else ""
