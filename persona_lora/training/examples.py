"""From contrastive pairs to token rows: chat template, completion-only labels, order, batches.

Both signs of a trait go through the same order of pairs. Knows chat templates; refuses to know
models.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from persona_lora.core.chat import Conversation
from persona_lora.core.errors import UserError
from persona_lora.core.traits import ContrastivePair, Sign
from persona_lora.models.chat_template import ChatTemplate, Rendered, common_length

logger = logging.getLogger(__name__)

SIGNS: tuple[Sign, Sign] = ("pos", "neg")
IGNORED = -100


@dataclass(frozen=True)
class TokenRow:
    """One training row; the labels are the tokens of the completion, and −100 before it."""

    input_ids: list[int]
    labels: list[int]


def tokenize_pairs(
    pairs: Sequence[ContrastivePair],
    template: ChatTemplate,
    *,
    end_tokens: set[int],
    max_length: int | None = None,
) -> dict[Sign, list[TokenRow]]:
    """Tokenise both signs of every pair; row i of either sign comes from pair i.

    A completion begins where the rendered prompt ends, and ends with the first of ``end_tokens``
    after its last word, which the model so learns to say. Rows longer than ``max_length`` are cut
    at their end, counted and warned about.

    Raises UserError for a template that refuses a row, that writes a conversation in which the
    prompt is not the beginning, or that never ends a turn, and for a prompt that alone fills
    ``max_length``.
    """
    rows = tokenize_rows(
        [
            (f"row {number}", pair.prompt, answer)
            for number, pair in enumerate(pairs, start=1)
            for answer in (pair.positive, pair.negative)
        ],
        template,
        end_tokens=end_tokens,
        max_length=max_length,
    )
    return {"pos": rows[::2], "neg": rows[1::2]}


def tokenize_rows(
    rows: Sequence[tuple[str, Conversation, Conversation]],
    template: ChatTemplate,
    *,
    end_tokens: set[int],
    max_length: int | None = None,
) -> list[TokenRow]:
    """Tokenise rows of a name, a prompt and a completion, as ``tokenize_pairs`` does."""
    found, num_cut, num_changed = [], 0, 0
    for where, prompt, completion in rows:
        rendered = template.split(prompt, completion, where)
        num_changed += not rendered.verbatim
        row = _token_row(rendered, template, end_tokens, where)
        if max_length is not None and len(row.input_ids) > max_length:
            row = _cut_row(row, max_length, where)
            num_cut += 1
        found.append(row)
    if num_changed:
        logger.warning(
            "the chat template of %s takes spaces or line ends off %d of %d answers; they are "
            "trained on without",
            template.name,
            num_changed,
            len(rows),
        )
    if num_cut:
        logger.warning(
            "%d of %d rows are longer than max_length %s and were cut: their end of turn is not "
            "learnt; raise max_length",
            num_cut,
            len(rows),
            max_length,
        )
    return found


def _token_row(
    rendered: Rendered, template: ChatTemplate, end_tokens: set[int], where: str
) -> TokenRow:
    opening = _token_ids(template, rendered.prompt)
    whole = _token_ids(template, rendered.prompt + rendered.completion)
    start = common_length(opening, whole)
    ends = [index for index in range(start, len(whole)) if whole[index] in end_tokens]
    if not ends:
        raise UserError(
            f"{where}: the chat template ends the answer without an end-of-turn token, so that "
            "the model would never learn to stop; name the token with eos_token, or use the "
            "template of an instruct model"
        )
    ids = whole[: ends[-1] + 1]
    return TokenRow(ids, [IGNORED] * start + ids[start:])


def _token_ids(template: ChatTemplate, text: str) -> list[int]:
    return template.tokenizer(text, add_special_tokens=False)["input_ids"]


def _cut_row(row: TokenRow, max_length: int, where: str) -> TokenRow:
    """Return the row cut at its end; UserError where nothing of the completion would be left."""
    labels = row.labels[:max_length]
    if all(label == IGNORED for label in labels):
        raise UserError(
            f"{where}: its prompt alone fills max_length {max_length}; raise max_length"
        )
    return TokenRow(row.input_ids[:max_length], labels)


def shared_lengths(rows: dict[Sign, list[TokenRow]]) -> list[int]:
    """Return a length for each pair that does not depend on the sign: the longer of its rows."""
    return [max(len(each.input_ids) for each in pair) for pair in zip(*rows.values(), strict=True)]


class LengthGroupedOrder(Sampler[int]):
    """An order of rows in which those of one batch have nearly the same length.

    It depends on the lengths, ``seed`` and the epoch alone, so that both signs, a resumed run and
    every process see the same one. Lengths are jittered in every epoch, so that rows change their
    neighbours; whole batches are shuffled, and a last short batch comes last.
    """

    JITTER = 6.0  # tokens: enough to mix neighbours, little against the spread of lengths

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = torch.tensor(lengths, dtype=torch.float64)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is iterated next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        noise = torch.rand(len(self), generator=generator, dtype=torch.float64) * self.JITTER
        by_length = torch.argsort(self.lengths + noise)
        # Which rows make up the short batch is left to chance, not to their length.
        num_left = len(self) % self.batch_size
        leftover = torch.randperm(len(self), generator=generator)[:num_left]
        full = by_length[~torch.isin(by_length, leftover)].view(-1, self.batch_size)
        yield from full[torch.randperm(len(full), generator=generator)].flatten().tolist()
        yield from leftover.tolist()
