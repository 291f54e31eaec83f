"""Batched, seeded generation of answers.

Knows batching, padding and sampling; refuses to know what steers the model. A steerer that needs
to know which rows are in the current batch passes ``prepare_batch``. Rows that share a steering
and the beginning of their prompts share the computation of that beginning, where the model's cache
makes that exact.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
)

from persona_lora.core import progress
from persona_lora.core.chat import Conversation
from persona_lora.core.errors import UserError
from persona_lora.models.caches import (
    KeptCache,
    ignores_padding,
    kept_cache,
    plans_sharing,
    shares_prefix,
)
from persona_lora.models.decoding import Decoding, decodes
from persona_lora.models.hardware import free_memory
from persona_lora.models.likelihood import contiguous_input
from persona_lora.models.loading import ChatModel
from persona_lora.models.structure import (
    decoder_linear_modules,
    features,
    hidden_size,
    text_decoder,
    unwrapped,
)
from persona_lora.models.turns import refuse_untold_rows

logger = logging.getLogger(__name__)

LARGEST_BATCH = 256
LEAVING = 1 / 8  # of a batch have to end before they leave it: what is kept of the others is copied
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")  # in errors
SHORTEST_PREFIX = 8  # tokens; sharing fewer is not worth a pass of its own


@dataclass(frozen=True)
class Generated:
    """One answer: the prompt text it continues, its text, its length, and whether it ended."""

    prompt: str
    text: str
    num_tokens: int
    finished: bool


@dataclass(frozen=True)
class RowPlan:
    """What rows of a generation share, and who is told of their batches.

    Each row samples from a random stream of its own, seeded by the seed and by its entry in
    ``streams`` (its row number by default; rows with equal entries share their random numbers).
    So a row's sample does not depend on its batch neighbours as far as the logits do not: a batch
    of another shape may sum in another order, and a difference in the last bits turns a token
    only when the drawn number falls between the two (rare in fp32, now and then in bf16).

    ``alike`` names what each row is steered with. Where many rows of a batch are steered alike, the
    tokens with which all its prompts begin (a chat template's system part) run once for each
    steering instead of once for each row; ``prepare_prefix`` is called before that pass with the
    row numbers that stand for their kind and the number of tokens. Last bits may differ for it.
    A model with recurrent layers shares nothing, one with sliding windows only among rows of one
    length.

    Where rows leave a batch once some answers have ended, ``keep_rows`` is called with the places
    in it of those that go on, in order; where ``prepare_batch`` is given without it, all stay.
    ``on_batch`` is called with the row numbers and answers of each batch after it, ``on_step``
    whenever each row of a batch has a token more. ``endless`` rows end at the limit alone.
    """

    streams: Sequence[int] | None = None
    alike: Sequence[Hashable] | None = None
    prepare_prefix: Callable[[Sequence[int], int], None] | None = None
    keep_rows: Callable[[Sequence[int]], None] | None = None
    on_batch: Callable[[Sequence[int], Sequence[Generated]], None] | None = None
    on_step: Callable[[], None] | None = None
    endless: bool = False


def generate_answers(
    chat_model: ChatModel,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int = 80,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int | Literal["auto"] = "auto",
    prepare_batch: Callable[[Sequence[int]], None] | None = None,
    plan: RowPlan = RowPlan(),
) -> list[Generated]:
    """Answer every conversation; the result has the order of the input.

    Batches are left-padded and sorted by length, longest first; a model whose answers padding
    might change answers rows of one length at a time. ``temperature`` 0 is greedy.
    ``prepare_batch`` is called with the row numbers of each batch before it runs. ``plan`` says
    what rows share. Progress counts tokens.

    A batch that runs out of memory is split in half and tried again.

    Raises:
        UserError: A prompt and its answer pass the model's context window, a single row does not
            fit into memory, its logits are NaN or infinite, or rows that are steered apart without
            ``prepare_batch``.
    """
    if not conversations:
        raise UserError("there are no conversations to answer; the list of questions is empty")
    if not (isinstance(max_new_tokens, Integral) and max_new_tokens >= 1):
        raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens!r}")
    if batch_size != "auto" and not (isinstance(batch_size, Integral) and batch_size >= 1):
        raise UserError(f"batch_size must be at least 1 or auto, got {batch_size!r}")
    if not (isinstance(temperature, Real) and 0 <= temperature <= sys.float_info.max):
        raise UserError(f"temperature must be 0 (greedy) or positive, got {temperature!r}")
    if not isinstance(seed, Integral):
        raise UserError(f"seed must be a whole number, got {seed!r}")
    if prepare_batch is None:
        refuse_untold_rows(chat_model.model)
    prompts = [chat_model.render(conversation) for conversation in conversations]
    tokens = chat_model.tokenize(prompts)
    longest = max(map(len, tokens)) + max_new_tokens
    chat_model.check_length(longest, f"a prompt and {max_new_tokens} new ones")
    size = _affordable_rows(chat_model, longest) if batch_size == "auto" else batch_size
    how = max_new_tokens, temperature, int(seed)
    job = _Job(chat_model, prompts, tokens, *how, prepare_batch, plan)
    answers: dict[int, Generated] = {}
    for rows, batch in job.batches(size):
        answers.update(zip(rows, batch, strict=True))
        if plan.on_batch is not None:
            plan.on_batch(rows, batch)
    return [answers[row] for row in range(len(tokens))]


def _smaller_batch(size: int, error: RuntimeError) -> int:
    """Return half of a batch size that ran out of memory; raise any other error."""
    known = isinstance(error, torch.OutOfMemoryError)
    if not known and not any(each in str(error).lower() for each in OUT_OF_MEMORY):
        raise error
    if size == 1:
        raise UserError(
            "one row alone runs out of memory; use fewer new tokens, a shorter prompt, or a "
            "smaller dtype"
        ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    logger.warning("out of memory with %d rows; going on with %d", size, size // 2)
    return size // 2


class _PaddingMayMatter(Exception):
    """A padded batch was answered by a model of which nobody has shown that it ignores padding."""


@dataclass(frozen=True)
class _Job:
    """What all batches of one call share."""

    chat_model: ChatModel
    prompts: list[str]
    tokens: list[list[int]]
    max_new_tokens: int
    temperature: float
    seed: int
    prepare_batch: Callable[[Sequence[int]], None] | None
    plan: RowPlan

    def batches(self, size: int) -> Iterator[tuple[list[int], list[Generated]]]:
        """Yield row numbers and answers, the longest prompts first, in batches of ``size``.

        Fewer rows where memory does not suffice, or where padding might change answers.
        """
        order = sorted(range(len(self.tokens)), key=lambda row: -len(self.tokens[row]))
        done, one_length = 0, False
        while done < len(order):
            rows = order[done : done + size]
            if one_length:
                first = len(self.tokens[rows[0]])
                rows = [row for row in rows if len(self.tokens[row]) == first]
            rows = self._alike_together(rows)
            try:
                with self.chat_model.turn():
                    batch = self.run(rows, done_rows=done)
            except _PaddingMayMatter:
                one_length = True
                continue
            except RuntimeError as error:
                size = _smaller_batch(len(rows), error)
                continue
            done += len(rows)
            yield rows, batch

    def _alike_together(self, rows: list[int]) -> list[int]:
        """Put rows that are steered alike side by side: one product may then serve them all."""
        alike = self.plan.alike
        if alike is None:
            return rows
        places = {kind: at for at, kind in enumerate(dict.fromkeys(alike[row] for row in rows))}
        return sorted(rows, key=lambda row: places[alike[row]])

    @torch.inference_mode()
    def run(self, rows: Sequence[int], *, done_rows: int) -> list[Generated]:
        """Answer the rows as one batch; _PaddingMayMatter where padding might change answers."""
        model = self.chat_model.model
        prefix, kept = self._shared_prefix(rows)
        if self.prepare_batch is not None:
            self.prepare_batch(rows)
        batch = self._padded(rows, prefix)
        answer = self._decode if decodes(model) else self._generate
        ends = self.ends()
        return [
            read_answer(self.prompts[row], ids, ends, self.chat_model)
            for row, ids in zip(rows, answer(rows, done_rows, batch, kept), strict=True)
        ]

    def ends(self) -> set[int]:
        """Return the tokens that end an answer; none of endless rows."""
        return set() if self.plan.endless else ending_tokens(self.chat_model)

    def _decode(
        self, rows: Sequence[int], done_rows: int, batch: _Padded, kept: KeptCache | None
    ) -> list[list[int]]:
        """Return the new tokens of every row; rows whose answer has ended leave the batch."""
        decoding = Decoding(self.chat_model.model, *batch, kept, self.max_new_tokens)
        sampler, ends = self._sampler(rows), self.ends()
        new: list[list[int]] = [[] for _ in rows]
        going = list(range(len(rows)))  # places in ``rows`` of those in the batch
        left, open_rows = 0, set(going)
        logits = decoding.begin()
        for step in range(self.max_new_tokens):
            self._check_finite(logits, [rows[place] for place in going])
            tokens = logits.argmax(dim=-1) if sampler is None else sampler.draw(logits, going)
            for place, token in zip(going, tokens.tolist(), strict=True):
                new[place].append(token)
                if token in ends:
                    open_rows.discard(place)
            self._count(done_rows * self.max_new_tokens, left, (step + 1) * len(going))
            if not open_rows or step + 1 == self.max_new_tokens:
                break
            leaving = self.prepare_batch is None or self.plan.keep_rows is not None
            if leaving and len(open_rows) <= (1 - LEAVING) * len(going):
                left += (len(going) - len(open_rows)) * self.max_new_tokens
                places = [at for at, row in enumerate(going) if row in open_rows]
                going, tokens = [going[at] for at in places], tokens[places]
                decoding.keep(places)
                if self.plan.keep_rows is not None:
                    self.plan.keep_rows(places)
            logits = decoding.step(tokens)
        return new

    def _generate(
        self, rows: Sequence[int], done_rows: int, batch: _Padded, kept: KeptCache | None
    ) -> list[list[int]]:
        """Return the new tokens of every row, by transformers; a model that is not decoded here.

        _PaddingMayMatter where padding might change answers.
        """
        model, ends = self.chat_model.model, self.ends()
        with _nothing_beside(model), contiguous_input(model):
            output = model.generate(
                input_ids=batch.tokens,
                attention_mask=batch.mask,
                **({} if kept is None else {kept.name: kept.cache}),
                logits_processor=LogitsProcessorList([_Each(self, rows, done_rows)]),
                generation_config=GenerationConfig(
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    pad_token_id=self.chat_model.tokenizer.pad_token_id,
                    eos_token_id=sorted(ends) or None,
                    use_cache=True,
                    return_dict_in_generate=True,
                ),
            )
        used = kept_cache(output)
        if not self._of_one_length(rows) and (
            used is None or not ignores_padding(used.cache, model)
        ):
            raise _PaddingMayMatter
        return output.sequences[:, batch.tokens.shape[1] :].tolist()

    def _sampler(self, rows: Sequence[int]) -> SeededSampler | None:
        if self.temperature == 0:
            return None
        given = self.plan.streams
        streams = rows if given is None else [given[row] for row in rows]
        return SeededSampler(streams, self.seed, self.temperature, self.max_new_tokens)

    def _check_finite(self, logits: Tensor, rows: Sequence[int]) -> None:
        """Refuse rows of logits with NaN or without a largest value: no token is an answer."""
        finite = logits.amax(dim=-1).isfinite()  # the maximum of a row with NaN is NaN
        if not bool(finite.all()):
            row = rows[int((~finite).nonzero()[0])]
            raise self.chat_model.not_finite(f"row {row} (…{self.prompts[row][-60:]!r})")

    def _count(self, *tokens: int) -> None:
        progress.report(sum(tokens), len(self.tokens) * self.max_new_tokens)
        if self.plan.on_step is not None:
            self.plan.on_step()

    def _of_one_length(self, rows: Sequence[int]) -> bool:
        return len({len(self.tokens[row]) for row in rows}) == 1

    def _shared_prefix(self, rows: Sequence[int]) -> tuple[list[int], KeptCache | None]:
        """Return what all prompts begin with and its cache, a row each; nothing if not worth it."""
        alike = self.plan.alike
        if alike is None:
            return [], None
        first = {alike[row]: row for row in reversed(rows)}
        prefix = common_prefix([self.tokens[row] for row in rows])
        model, padded = self.chat_model.model, not self._of_one_length(rows)
        if (
            len(prefix) < SHORTEST_PREFIX
            or len(first) == len(rows)
            or not plans_sharing(model, padded=padded)
        ):
            return [], None
        if self.plan.prepare_prefix is not None:
            self.plan.prepare_prefix(list(first.values()), len(prefix))
        ids = torch.tensor([prefix] * len(first), device=model.device)
        kept = kept_cache(text_decoder(model).module(input_ids=ids, use_cache=True))
        if kept is None or not shares_prefix(kept.cache, padded=padded):
            return [], None
        places = {kind: place for place, kind in enumerate(first)}
        chosen = torch.tensor([places[alike[row]] for row in rows], device=model.device)
        kept.cache.batch_select_indices(chosen)
        return prefix, kept

    def _padded(self, rows: Sequence[int], prefix: list[int]) -> _Padded:
        """Return token ids and mask of the rows, with the padding after the shared prefix."""
        device = self.chat_model.model.device
        padded = self.chat_model.tokenizer.pad(
            {"input_ids": [self.tokens[row][len(prefix) :] for row in rows]},
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(device)
        begin = torch.tensor([prefix] * len(rows), dtype=torch.long, device=device)
        return _Padded(
            torch.cat([begin, padded["input_ids"]], dim=1),
            torch.cat([torch.ones_like(begin), padded["attention_mask"]], dim=1),
        )


class _Padded(NamedTuple):
    """Token ids and mask of a batch, ``[rows, length]``."""

    tokens: Tensor
    mask: Tensor


@contextmanager
def _nothing_beside(model: PreTrainedModel) -> Iterator[None]:
    """Leave out what a model's authors would have generation do beside: penalties, beams, bans."""
    owners = dict.fromkeys([model, unwrapped(model)])
    own = {owner: owner.generation_config for owner in owners}
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, configured in own.items():
            owner.generation_config = configured


def common_prefix(rows: Sequence[list[int]]) -> list[int]:
    """Return the tokens that all rows begin with, leaving each at least one of its own."""
    low, high = min(rows), max(rows)  # in dictionary order: what these two share, all do
    shortest = min(map(len, rows)) - 1
    length = next((at for at in range(shortest) if low[at] != high[at]), max(shortest, 0))
    return low[:length]


def ending_tokens(chat_model: ChatModel) -> set[int]:
    """Return the tokens that end an answer: the tokenizer's, the model's, the chat template's."""
    configured = chat_model.model.generation_config.eos_token_id
    ends = {chat_model.tokenizer.eos_token_id, *chat_model.template.end_of_turn}
    ends |= set(configured) if isinstance(configured, list) else {configured}
    return {end for end in ends if end is not None}


def row_seed(seed: int, stream: int) -> int:
    """Return the seed of the random numbers of rows of one stream."""
    return (seed * 1_000_003 + stream) % 2**63


def uniform_numbers(seed: int, stream: int, number: int) -> Tensor:
    """Return the random numbers of a row, ``[number]``: they depend on seed and stream alone."""
    generator = torch.Generator().manual_seed(row_seed(seed, stream))
    return torch.rand(number, generator=generator)


def drawn_tokens(scores: Tensor, uniform: Tensor, temperature: float | Tensor) -> Tensor:
    """Return the token that each row draws, ``[rows]``, by inverse transform.

    ``scores`` are ``[rows, vocabulary]``; ``uniform``, and ``temperature`` where rows have their
    own, ``[rows, 1]``.
    """
    weights = torch.softmax(scores.float() / temperature, dim=-1).cumsum(dim=-1)
    token = torch.searchsorted(weights, uniform * weights[:, -1:], right=True)
    return token[:, 0].clamp(max=scores.shape[-1] - 1)


class SeededSampler:
    """Samples by inverse transform with one uniform number per row and step, drawn beforehand.

    A row's numbers depend on ``seed`` and its stream alone.
    """

    def __init__(
        self, streams: Sequence[int], seed: int, temperature: float, num_steps: int
    ) -> None:
        self.temperature = temperature
        self.step = 0
        drawn = {stream: uniform_numbers(seed, stream, num_steps) for stream in set(streams)}
        self.uniform = torch.stack([drawn[stream] for stream in streams])  # [rows, steps]

    def draw(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the next token ``[rows]`` of some rows, by their scores ``[rows, vocabulary]``."""
        uniform = self.uniform[list(rows), self.step, None].to(scores.device)
        self.step += 1
        return drawn_tokens(scores, uniform, self.temperature)


class _Each(LogitsProcessor):
    """What happens at each step inside transformers' loop: checked, drawn and counted.

    A drawn token is left as the only possible one, so that greedy decoding takes it.
    """

    def __init__(self, job: _Job, rows: Sequence[int], done_rows: int) -> None:
        self.job = job
        self.rows = rows
        self.done = done_rows * job.max_new_tokens
        self.sampler = job._sampler(rows)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.job._check_finite(scores, self.rows)
        self.done += len(self.rows)
        self.job._count(self.done)
        if self.sampler is None:
            return scores
        token = self.sampler.draw(scores, range(len(self.rows)))
        return torch.full_like(scores, float("-inf")).scatter(1, token[:, None], 0.0)


def read_answer(prompt: str, ids: list[int], ends: set[int], chat_model: ChatModel) -> Generated:
    """Return the answer that new tokens are, up to the first that ends it."""
    length = next((index for index, token in enumerate(ids) if token in ends), None)
    text = chat_model.tokenizer.decode(ids[:length], skip_special_tokens=True)
    return Generated(
        prompt=prompt,
        text=text.strip(),
        num_tokens=len(ids) if length is None else length,
        finished=length is not None,
    )


def _affordable_rows(chat_model: ChatModel, length: int) -> int:
    """Return how many rows of ``length`` tokens fit into half of the free memory."""
    model = chat_model.model
    config = model.config.get_text_config(decoder=True)
    width = hidden_size(model)
    item = model.dtype.itemsize
    cache = 2 * config.num_hidden_layers * _cached_width(config, width) * length * item
    logits = 4 * 4 * config.vocab_size
    widest = max(
        (max(features(each)) for each in decoder_linear_modules(model).values()), default=0
    )
    activations = 8 * max(width, widest) * length * item
    free = free_memory(model.device) // 2
    return max(1, min(LARGEST_BATCH, free // (cache + logits + activations)))


def _cached_width(config: PreTrainedConfig, width: int) -> int:
    """Return how many numbers a layer keeps of a token's keys; a model without heads, its width."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return width
    kept = getattr(config, "num_key_value_heads", None)
    head_size = getattr(config, "head_dim", None) or width // heads
    return (kept if isinstance(kept, int) else heads) * head_size
