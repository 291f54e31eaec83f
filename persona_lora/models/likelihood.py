"""What a model gives for text that is already there: log-probabilities and divergences.

Knows teacher forcing; refuses to know who wrote the text or what the numbers are used for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from persona_lora.core import progress
from persona_lora.core.chat import Exchange, user_question
from persona_lora.core.errors import UserError
from persona_lora.models.hooks import Hook, Hooked
from persona_lora.models.loading import ChatModel
from persona_lora.models.turns import refuse_untold_rows

TOKENS_PER_BATCH = 4096


class TokenizedExchange(NamedTuple):
    """Token ids of a rendered question and of the answer to it."""

    prompt: list[int]
    answer: list[int]


class TokenLogprob(NamedTuple):
    """A token's log-probability (nats), and those of the likeliest in its place, best first."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


def tokenize_exchange(
    chat_model: ChatModel, exchange: Exchange, system_prompt: str | None = None
) -> TokenizedExchange:
    """Return the token ids of a question as the model is asked it, and of the answer."""
    prompt = chat_model.render(user_question(exchange.question, system_prompt))
    return tokenize_rendered(chat_model, prompt, exchange.answer)


def tokenize_rendered(chat_model: ChatModel, prompt: str, answer: str) -> TokenizedExchange:
    """Return the token ids of a prompt that is rendered already, and of the answer to it.

    UserError for more of both than the model has positions for.
    """
    tokenized = TokenizedExchange(*chat_model.tokenize([prompt, answer]))
    chat_model.check_length(sum(map(len, tokenized)))
    return tokenized


def mean_logprobs(
    chat_model: ChatModel, exchanges: Sequence[Exchange], system_prompt: str | None = None
) -> list[float]:
    """Return the mean log-probability (nats) of a token of each answer, given its question.

    An answer without tokens has none: UserError.
    """
    tokenized = [tokenize_exchange(chat_model, each, system_prompt) for each in exchanges]
    if any(not each.answer for each in tokenized):
        raise UserError("an empty answer has no log-probability; leave it out")
    return answer_logprobs(chat_model, tokenized)


def answer_logprobs(
    chat_model: ChatModel,
    tokenized: Sequence[TokenizedExchange],
    prepare_batch: Callable[[Sequence[int]], None] | None = None,
) -> list[float]:
    """Return the mean log-probability (nats) of a token of each answer; none may be empty.

    ``prepare_batch`` is called with the row numbers of each batch before it runs. UserError for
    rows that are steered apart without it.
    """
    if prepare_batch is None:
        refuse_untold_rows(chat_model.model)
    means = [0.0] * len(tokenized)
    done = 0
    for rows in batches_by_length([len(each.prompt) + len(each.answer) for each in tokenized]):
        batch = [tokenized[row] for row in rows]
        if prepare_batch is not None:
            prepare_batch(rows)
        spans = [range(len(asked) - 1, len(asked) + len(said) - 1) for asked, said in batch]
        logits = _logits_at(chat_model, [prompt + answer for prompt, answer in batch], spans)
        tokens = [token for each in batch for token in each.answer]
        targets = torch.tensor(tokens, device=logits.device)
        log_p = -nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        by_answer = log_p.split([len(each.answer) for each in batch])
        for row, own in zip(rows, by_answer, strict=True):
            means[row] = float(own.mean())
        done += len(rows)
        progress.report(done, len(tokenized))
    return means


def next_token_logprobs(
    chat_model: ChatModel, replies: Sequence[tuple[str, str]], *, top: int = 200
) -> list[Mapping[str, float]]:
    """Return log-probabilities of the likeliest next tokens of a reply, by token text.

    ``replies`` are pairs of a user message and the beginning of the reply to it ("" for none).
    """
    refuse_untold_rows(chat_model.model)
    rendered = [
        chat_model.render(user_question(message)) + beginning for message, beginning in replies
    ]
    ids = chat_model.tokenize(rendered)
    chat_model.check_length(max(map(len, ids), default=0))
    found: list[Mapping[str, float]] = [{} for _ in ids]
    for rows in batches_by_length([len(each) for each in ids]):
        asked = [ids[row] for row in rows]
        logits = _logits_at(chat_model, asked, [range(len(row) - 1, len(row)) for row in asked])
        best = torch.log_softmax(logits.float(), dim=-1).topk(min(top, logits.shape[-1]))
        for row, values, tokens in zip(
            rows, best.values.tolist(), best.indices.tolist(), strict=True
        ):
            texts = chat_model.tokenizer.batch_decode([[token] for token in tokens])
            by_text: dict[str, float] = {}  # tokens of equal text keep the likeliest
            for text, value in zip(texts, values, strict=True):
                by_text.setdefault(text, value)
            found[row] = by_text
    return found


def logprobs_of(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Return the log-probability of a token, and the ``top`` likeliest, in each row of logits."""
    found = []
    for row, token in zip(logits, tokens, strict=True):
        log_p = torch.log_softmax(row.float(), dim=-1)
        values, places = log_p.topk(top)
        likeliest = tuple(zip(places.tolist(), values.tolist(), strict=True))
        found.append(TokenLogprob(token, float(log_p[token]), likeliest))
    return found


def text_logprobs(chat_model: ChatModel, tokens: list[int], top: int) -> list[TokenLogprob]:
    """Return the same for every token of a text but its first, which nothing stands before."""
    logits = _logits_at(chat_model, [tokens], [range(len(tokens) - 1)])
    return logprobs_of(logits, tokens[1:], top)


class NextTokens(NamedTuple):
    """Of every token as the next one, ``[prompts, vocabulary]``: log-probability and probability.

    Both are means over some places of each prompt.
    """

    logprobs: Tensor
    probabilities: Tensor


def next_tokens(
    chat_model: ChatModel, prompts: Sequence[list[int]], begins: int
) -> tuple[NextTokens, NextTokens]:
    """Return them over the places from ``begins`` on, and at the end, where an answer begins."""
    found = []
    for done, ids in enumerate(prompts, start=1):
        logits = _logits_at(chat_model, [ids], [range(begins, len(ids))])
        log_p = torch.log_softmax(logits.float(), dim=-1)
        places = (log_p, log_p[-1:])
        found.append([each.mean(dim=0).cpu() for at in places for each in (at, at.exp())])
        progress.report(done, len(prompts))
    reading, likely, answer, first = (torch.stack(each) for each in zip(*found, strict=True))
    return NextTokens(reading, likely), NextTokens(answer, first)


def token_divergences(
    chat_model: ChatModel, exchange: TokenizedExchange, *, num_rows: int
) -> Tensor:
    """Return KL(p₀ ‖ pᵣ) in nats at each answer token, ``[num_rows − 1, tokens]``.

    The text runs as ``num_rows`` identical rows of one batch, and row 0 is the reference: a live
    steerer with a coefficient of 0 in row 0 makes the other rows differ from it.
    """
    chat_model.check_length(sum(map(len, exchange)))
    model, length = chat_model.model, len(exchange.answer)
    ids = torch.tensor([exchange.prompt + exchange.answer] * num_rows, device=model.device)
    with torch.inference_mode(), chat_model.turn(), contiguous_input(model):
        logits = model(input_ids=ids, logits_to_keep=length + 1, use_cache=False).logits
    logits = logits[:, -length - 1 : -1]  # some models give all, whatever they are to keep
    log_p = torch.log_softmax(logits.float(), dim=-1)  # [rows, tokens, vocabulary]
    divergences = (log_p[0].exp() * (log_p[0] - log_p[1:])).sum(-1).clamp_min(0)
    if not bool(divergences.isfinite().all()):
        text = chat_model.tokenizer.decode(exchange.answer)
        raise chat_model.not_finite(f"the divergence over {text[-60:]!r}")
    return divergences


@torch.inference_mode()
def _logits_at(
    chat_model: ChatModel, ids: Sequence[list[int]], positions: Sequence[range]
) -> Tensor:
    """Return the logits of each row's positions, flat: ``[positions of all rows, vocabulary]``."""
    model, padded = chat_model.model, right_padded(chat_model, ids)
    chosen = torch.zeros(padded.shape, dtype=torch.bool)
    for row, span in enumerate(positions):
        chosen[row, span.start : span.stop] = True
    with chat_model.turn(), only_positions(model.get_output_embeddings(), chosen):
        logits: Tensor = model(input_ids=padded, use_cache=False).logits
    finite = logits.amax(dim=-1).isfinite()
    if not bool(finite.all()):
        row = int(chosen.nonzero()[int((~finite).nonzero()[0])][0])
        raise chat_model.not_finite(f"{chat_model.tokenizer.decode(ids[row])[-60:]!r}")
    return logits


def right_padded(chat_model: ChatModel, rows: Sequence[list[int]]) -> Tensor:
    """Return token ids ``[rows, longest]``, padded on the right, where the model is.

    No causal model looks back to padding there: positions count from 0 as they should, a row's
    numbers are those that it gives alone, whatever keeps the model's state, and no mask is needed
    (attention kernels are faster without one). UserError for a row over the model's window.
    """
    chat_model.check_length(max(map(len, rows)))
    longest, filler = max(map(len, rows)), [chat_model.tokenizer.pad_token_id]
    padded = [row + filler * (longest - len(row)) for row in rows]
    return torch.tensor(padded, device=chat_model.model.device)


def only_positions(head: nn.Module, positions: Tensor) -> Hooked:
    """Let ``head`` see the chosen positions of ``[rows, length, hidden]`` only, as a flat list.

    ``head`` is the module that projects to the vocabulary; the logits become
    ``[positions, vocabulary]``. Holds inside the block that is entered.
    """

    def choose(module: nn.Module, arguments: tuple[Tensor], keywords: dict[str, Any]) -> Any:
        return (arguments[0][positions.to(arguments[0].device)],), keywords

    return Hooked([Hook(head, choose, "the output head", before=True)])


def contiguous_input(model: PreTrainedModel) -> Hooked:
    """Let the model's output head see its input row after row in memory, inside the block.

    What ``logits_to_keep`` leaves of longer texts is not. PyTorch multiplies such an input with a
    copy of frozen weights for each of its rows, 57 MB a row of the packaged model.
    """
    head = model.get_output_embeddings()

    def lay_out(module: nn.Module, arguments: tuple[Tensor], keywords: dict[str, Any]) -> Any:
        return (arguments[0].contiguous(), *arguments[1:]), keywords

    return Hooked([] if head is None else [Hook(head, lay_out, "the output head", before=True)])


def batches_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Return row numbers in batches of similar length, each of a bounded number of tokens."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= TOKENS_PER_BATCH:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
