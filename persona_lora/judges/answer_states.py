"""How a language model reads an answer: its hidden states over it, and at a question about it.

The reader is shown the question, the answer and what the trait is, and is about to reply; what it
"thinks" there is the state of its last token, and what it made of the answer on the way the mean
over the answer's tokens. Nothing is generated. Knows prompts and states; refuses to know what is
made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from persona_lora.core import progress
from persona_lora.core.chat import Exchange, user_question
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError
from persona_lora.core.files import atomic_path
from persona_lora.core.tensor_files import load_safetensors
from persona_lora.core.traits import Trait
from persona_lora.models.last_states import last_states
from persona_lora.models.loading import ChatModel
from persona_lora.models.structure import decoder_layers, hidden_size, weight_fingerprint

DEPTHS = (0.45, 0.7)  # of the model: where what was read is summed up, before words are chosen
STRIDE = 2  # neighbouring layers say much the same
# What does not depend on the answer stands first, and is read once for all answers to a question.
PROMPT = (
    "Read an answer, and say whether it makes sense as an answer to its question, and whether it "
    "shows {name}: {description}\n\nQuestion:\n{question}\n\nAnswer:\n{answer}\n\n"
    "Does the answer make sense? Does it show {name}?"
)
States = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Reader:
    """An unsteered chat model that reads answers about one trait; equal exchanges are read once.

    An adapter on the model is left out while it reads.
    """

    chat_model: ChatModel
    trait: Trait
    _known: dict[Exchange, States] = field(default_factory=dict, repr=False)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The decoder layers whose states are kept."""
        count = len(decoder_layers(self.chat_model.model))
        first = min(round(DEPTHS[0] * count), count - 1)
        return tuple(range(first, min(max(first, round(DEPTHS[1] * count)) + 1, count), STRIDE))

    def content(self, exchanges: Sequence[Exchange]) -> str:
        """Return a digest of all that decides the states of exchanges, but the type of weights."""
        return digest_of([self._model, [self._prompt(each).tokens for each in exchanges]])

    def states(self, exchanges: Sequence[Exchange]) -> States:
        """Return states of the last token by layer, then means over the answer.

        ``[len(exchanges), 2 · len(layers), hidden]``.
        """
        new = [each for each in dict.fromkeys(exchanges) if each not in self._known]
        if new:
            self._known.update(zip(new, self._read(new), strict=True))
        states = [self._known[each] for each in exchanges]
        return np.array(states, np.float32).reshape(len(exchanges), *self._shape)

    def kept_states(self, exchanges: Sequence[Exchange], folder: Path) -> States:
        """Return the same; what a file in ``folder`` has is not read again, the rest is added.

        States of another shape, which an earlier version kept, are read anew.
        """
        path = folder / f"{digest_of([self._model, self.trait.name])[:32]}.safetensors"
        names = {each: digest_of(self._prompt(each).tokens) for each in dict.fromkeys(exchanges)}
        kept = load_safetensors(path) if path.is_file() else {}
        kept = {name: each for name, each in kept.items() if tuple(each.shape) == self._shape}
        self._known.update({each: kept[n].numpy() for each, n in names.items() if n in kept})
        states = self.states(exchanges)
        if any(name not in kept for name in names.values()):
            kept |= {name: torch.from_numpy(self._known[each]) for each, name in names.items()}
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                save_file(kept, temporary)
        return states

    @property
    def _shape(self) -> tuple[int, int]:
        return 2 * len(self.layers), hidden_size(self.chat_model.model)

    @cached_property
    def _model(self) -> str:
        return digest_of([weight_fingerprint(self.chat_model.model), self.layers])

    def _read(self, exchanges: Sequence[Exchange]) -> States:
        with self.chat_model.base(), progress.stage("reading answers"):
            prompts = [self._prompt(each) for each in exchanges]
            states: States = last_states(
                self.chat_model,
                [each.tokens for each in prompts],
                [each.question for each in exchanges],
                self.layers,
                [each.answer for each in prompts],
            ).numpy()
        return states

    def _prompt(self, exchange: Exchange) -> _Prompt:
        fields = {"name": self.trait.name.replace("_", " "), "description": self.trait.description}
        question, _, after = PROMPT.partition("{answer}")
        after, answer = after.format(**fields), exchange.answer.strip()
        asked = question.format(question=exchange.question, **fields) + answer + after
        prompt = self.chat_model.render(user_question(asked))
        begun, found, _ = prompt.rpartition(answer + after)
        if not found:
            raise UserError(
                f"the chat template of {self.chat_model.name} changes what it is given, so that "
                "an answer cannot be found in it; choose another --judge-model"
            )
        start, end = (len(self._tokens(each)) for each in (begun, begun + answer))
        return _Prompt(self._tokens(prompt), range(start, max(end, start + 1)))

    def _tokens(self, text: str) -> list[int]:
        return self.chat_model.tokenize([text])[0]


class _Prompt(NamedTuple):
    """The tokens of the question about an answer, and where among them the answer stands."""

    tokens: list[int]
    answer: range
