"""How a language model reads an answer: the hidden states at the end of a question about it.

The reader is shown the question, the answer and what the trait is, and is about to reply; what it
"thinks" there is the state of its last token. Nothing is generated. Knows prompts and states;
refuses to know what is made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.torch import save_file

from persona_lora.core import progress
from persona_lora.core.chat import Exchange, user_question
from persona_lora.core.content import digest_of
from persona_lora.core.files import atomic_path
from persona_lora.core.tensor_files import load_safetensors
from persona_lora.core.traits import Trait
from persona_lora.models.hidden_states import stream_hidden_means
from persona_lora.models.likelihood import TokenizedExchange
from persona_lora.models.loading import ChatModel
from persona_lora.models.structure import hidden_size, num_layers, weight_fingerprint

DEPTHS = (0.45, 0.7)  # of the model: where what was read is summed up, before words are chosen
PROMPT = (
    "Question:\n{question}\n\nAnswer:\n{answer}\n\n"
    "Does the answer make sense, and does it show {name}? That is: {description}"
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
        count = num_layers(self.chat_model.model)
        first = min(round(DEPTHS[0] * count), count - 1)
        return tuple(range(first, max(first + 1, round(DEPTHS[1] * count) + 1)))[: count - first]

    def content(self, exchanges: Sequence[Exchange]) -> str:
        """Return a digest of all that decides the states of exchanges, but the type of weights."""
        tokens = [self._tokens(each).prompt for each in exchanges]
        return digest_of([weight_fingerprint(self.chat_model.model), self.layers, tokens])

    def states(self, exchanges: Sequence[Exchange]) -> States:
        """Return the state of the last token: ``[len(exchanges), len(layers), hidden]``."""
        new = [each for each in dict.fromkeys(exchanges) if each not in self._known]
        if new:
            self._known.update(zip(new, self._read(new), strict=True))
        shape = (len(exchanges), len(self.layers), hidden_size(self.chat_model.model))
        return np.array([self._known[each] for each in exchanges], np.float32).reshape(shape)

    def kept_states(self, exchanges: Sequence[Exchange], folder: Path) -> States:
        """Return the same, from a file in ``folder`` where they were read before."""
        path = folder / f"{self.content(exchanges)}.safetensors"
        if path.is_file():
            states: States = load_safetensors(path)["states"].numpy()
            self._known.update(zip(exchanges, states, strict=True))
            return states
        states = self.states(exchanges)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file({"states": torch.from_numpy(states)}, temporary)
        return states

    def _read(self, exchanges: Sequence[Exchange]) -> States:
        model = self.chat_model.model
        base = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
        states: States = np.empty((len(exchanges), len(self.layers), hidden_size(model)), "f4")
        with base, progress.stage("reading answers"):
            texts = [self._tokens(each) for each in exchanges]
            for rows, means in stream_hidden_means(
                self.chat_model, texts, positions=("prompt_last",), layers=self.layers
            ):
                states[rows] = means[:, 0].numpy()
        return states

    def _tokens(self, exchange: Exchange) -> TokenizedExchange:
        asked = PROMPT.format(
            question=exchange.question,
            answer=exchange.answer,
            name=self.trait.name.replace("_", " "),
            description=self.trait.description,
        )
        prompt = self.chat_model.render(user_question(asked))
        encoded = self.chat_model.tokenizer(prompt, add_special_tokens=False)
        return TokenizedExchange(encoded["input_ids"], [])
