"""Means of hidden states over prompts and answers: every layer in one pass, nothing kept.

Knows batches, hooks and positions; refuses to know what the means are for. The state of layer k is
the output of decoder block k, which is what steering at layer k adds to. That holds for the last
layer too, where the ``hidden_states`` of transformers have gone through the final norm already.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from persona_lora.core import progress
from persona_lora.core.errors import UserError
from persona_lora.models.hooks import Hook, Hooked
from persona_lora.models.likelihood import TokenizedExchange, batches_by_length, right_padded
from persona_lora.models.loading import ChatModel
from persona_lora.models.structure import decoder_layers, text_decoder
from persona_lora.models.turns import refuse_untold_rows

POSITIONS = ("response_avg", "prompt_avg", "prompt_last")


class HiddenMeans(NamedTuple):
    """The means of one batch: row numbers of the texts, and ``[batch, positions, layers, hidden]``.

    The tensor is fp32, on the CPU.
    """

    rows: list[int]
    means: Tensor


def stream_hidden_means(
    chat_model: ChatModel,
    texts: Sequence[TokenizedExchange],
    *,
    positions: Sequence[str] = POSITIONS,
    layers: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> Iterator[HiddenMeans]:
    """Yield the mean hidden states of texts, batch by batch, in an order by length.

    For a text of p prompt and n answer tokens with states h₁ … h₍ₚ₊ₙ₎ at a layer: "response_avg"
    is the mean of the last n, "prompt_avg" of the first p, "prompt_last" is hₚ. ``layers`` are all
    of the model by default; the forward pass ends after the last of them, and makes no logits.
    Each batch is reduced inside the blocks: memory does not grow with the number of texts.
    Progress counts texts. ``names`` are what errors call them; "row 3" by default.

    Raises UserError at once for unknown positions, layers out of range, and texts without the
    tokens that a position needs; and when a state is NaN or infinite, naming text and layer.
    """
    unknown = [position for position in positions if position not in POSITIONS]
    if unknown or not positions:
        raise UserError(f"positions must be of {', '.join(POSITIONS)}, got {list(positions)!r}")
    refuse_untold_rows(chat_model.model)
    blocks = decoder_layers(chat_model.model)
    wanted = list(range(len(blocks))) if layers is None else list(layers)
    for layer in wanted:
        if not 0 <= layer < len(blocks):
            raise UserError(
                f"layer {layer} is out of range; the model has layers 0–{len(blocks) - 1}"
            )
    if not wanted:
        raise UserError("hidden states of no layer were asked for; name at least one")
    called = list(names) if names is not None else [f"row {row}" for row in range(len(texts))]
    for text, name in zip(texts, called, strict=True):
        if "response_avg" in positions and not text.answer:
            raise UserError(f"the answer of {name} is empty: no mean over it; leave it out")
        if not text.prompt and {"prompt_avg", "prompt_last"} & set(positions):
            raise UserError(f"the prompt of {name} is empty: no mean over it; leave it out")

    def batches() -> Iterator[HiddenMeans]:
        done = 0
        for rows in batches_by_length([len(text.prompt) + len(text.answer) for text in texts]):
            batch = [texts[row] for row in rows]
            ids = right_padded(chat_model, [text.prompt + text.answer for text in batch])
            weights = averaging_weights(batch, positions, ids.shape[1])
            reduction = _Reduction(chat_model, wanted, weights)
            with torch.no_grad():
                reduction.read(ids, use_cache=False)
            means = reduction.means.cpu()
            broken = ~torch.isfinite(means).all(-1).all(1)  # [batch, layers]
            if broken.any():
                at, layer = broken.nonzero()[0].tolist()
                what = f"the hidden states of {called[rows[at]]} at layer {wanted[layer]}"
                raise chat_model.not_finite(what)
            done += len(rows)
            progress.report(done, len(texts))
            yield HiddenMeans(rows, means)

    return batches()


def averaging_weights(
    batch: Sequence[TokenizedExchange], positions: Sequence[str], length: int
) -> Tensor:
    """Return weights ``[batch, positions, length]`` in fp32 that average right-padded states."""
    weights = torch.zeros(len(batch), len(positions), length)
    for row, (prompt, answer) in enumerate(batch):
        spans = {
            "response_avg": (len(prompt), len(prompt) + len(answer)),
            "prompt_avg": (0, len(prompt)),
            "prompt_last": (len(prompt) - 1, len(prompt)),
        }
        for index, position in enumerate(positions):
            start, stop = spans[position]
            weights[row, index, start:stop] = 1.0 / (stop - start)
    return weights


class _LastLayerDone(Exception):
    """Raised behind the last wanted layer: what comes after it is not needed."""


class BlockOutputs(Hooked):
    """Context manager: what decoder layers put out is taken, and the pass ends after the last."""

    def __init__(self, chat_model: ChatModel, layers: Sequence[int]) -> None:
        super().__init__()
        self.chat_model = chat_model
        self.layers = layers
        self._last = max(range(len(layers)), key=lambda index: (layers[index], index))
        self._seen: set[int] = set()  # which of the layers have run

    @abstractmethod
    def take(self, index: int, hidden: Tensor) -> None:
        """Take the output ``[batch, seq, hidden]`` of the layer at a place in ``layers``."""

    def hooks(self) -> list[Hook]:
        """Return a hook on every block of the layers."""
        blocks = decoder_layers(self.chat_model.model)
        return [
            Hook(blocks[layer], partial(self._took, index), f"block {index}")
            for index, layer in enumerate(self.layers)
        ]

    def _took(self, index: int, module: nn.Module, arguments: object, output: Any) -> None:
        self.take(index, output[0] if isinstance(output, tuple) else output)
        self._seen.add(index)
        if index == self._last:
            raise _LastLayerDone

    def read(self, ids: Tensor, **keywords: Any) -> None:
        """Run the decoder on token ids; UserError names a layer that did not run."""
        with self.chat_model.turn(), self, suppress(_LastLayerDone):
            text_decoder(self.chat_model.model).module(input_ids=ids, **keywords)
        silent = [layer for index, layer in enumerate(self.layers) if index not in self._seen]
        if silent:
            raise UserError(
                f"decoder layer {silent[0]} of {self.chat_model.name} did not run ({len(silent)} "
                f"of {len(self.layers)} did not); its structure is not known here, see "
                "docs/models.md"
            )


class _Reduction(BlockOutputs):
    """Averages the outputs of blocks with weights, at once."""

    def __init__(self, chat_model: ChatModel, layers: Sequence[int], weights: Tensor) -> None:
        super().__init__(chat_model, layers)
        self.weights = weights.to(chat_model.model.device)  # [batch, positions, seq]
        self.means = torch.empty(0)  # [batch, positions, layers, hidden], at the first output

    def take(self, index: int, hidden: Tensor) -> None:
        """Average it."""
        if not self.means.numel():
            batch, positions, _ = self.weights.shape
            shape = (batch, positions, len(self.layers), hidden.shape[-1])
            self.means = torch.empty(shape, device=self.weights.device)
        self.means[:, :, index] = torch.bmm(self.weights.to(hidden.device), hidden.float())
