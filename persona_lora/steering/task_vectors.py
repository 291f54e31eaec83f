"""A trait as a rank-1 LoRADiff without training, from what flows through modules on answers.

A linear module W reads inputs x. With x̄ their mean over the tokens of all answers, and Δx the mean
over positive answers less that over negative ones,

    ΔW = W Δx x̄ᵀ / ‖x̄‖²

gives an average input what the module's outputs differ by, ΔW x̄ = W Δx: a diff of rank 1 in every
module, with the algebra and the files of any other. It writes one wanted output for one input, as
the rank-one edit does with an identity covariance (Meng et al. 2022, "ROME", arXiv:2202.05262);
pairs of answers as in contrastive weight steering (Fierro and Roger 2025, arXiv:2511.05408), which
trains for its ΔW. A module's outputs differ also by what the modules before it do, so that a
coefficient of 1 in all of them at once has no meaning of its own: take nats. Refuses to know where
answers come from.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from persona_lora.core import progress
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel, LoRADiff, LoRAFactors
from persona_lora.models.hidden_states import averaging_weights
from persona_lora.models.hooks import Hook, Hooked
from persona_lora.models.likelihood import TokenizedExchange, batches_by_length, right_padded
from persona_lora.models.loading import ChatModel
from persona_lora.models.structure import (
    decoder_linear_modules,
    in_memory,
    text_decoder,
    weight_fingerprint,
    weight_of,
)
from persona_lora.models.turns import refuse_untold_rows

Texts = Sequence[TokenizedExchange]


def task_vector(
    chat_model: ChatModel,
    positive: Texts,
    negative: Texts,
    *,
    trait: str | None = None,
    sources: Mapping[str, Any] | None = None,
) -> LoRADiff:
    """Return the diff of rank 1 that the answers of both sides give, in all modules they differ in.

    Progress counts texts. Raises UserError for a side without texts, an answer without tokens, and
    for inputs that do not differ at all.
    """
    if not positive or not negative:
        raise UserError("a task vector needs answers of both sides; got none of one")
    yes, no = (mean_inputs(chat_model, texts) for texts in (positive, negative))
    factors = {}
    for name, module in decoder_linear_modules(chat_model.model).items():
        if name not in yes or name not in no:  # an expert that no answer was sent to
            continue
        mean, difference = (yes[name] + no[name]) / 2, yes[name] - no[name]
        if not (mean.norm() > 0 and difference.norm() > 0):
            continue
        with in_memory(module, name):
            output = weight_of(module).detach().float().cpu() @ difference
        factors[name] = LoRAFactors(A=(mean / mean.square().sum())[None], B=output[:, None])
    if not factors:
        raise UserError("both sides have the same inputs everywhere; are the answers the same?")
    base = BaseModel(chat_model.name, weight_fingerprint(chat_model.model))
    return LoRADiff(factors, base, trait, {"task_vector": dict(sources or {})})


@torch.no_grad()
def mean_inputs(chat_model: ChatModel, texts: Texts) -> dict[str, Tensor]:
    """Return the mean input ``[in]`` of every linear module of the decoder, by canonical name.

    The mean over texts of their means over the tokens of the answer, in fp32.
    """
    refuse_untold_rows(chat_model.model)
    empty = [at for at, each in enumerate(texts) if not each.answer]
    if empty:
        raise UserError(f"answer {empty[0]} has no token; leave it out")
    model, done = chat_model.model, 0
    modules, sums = decoder_linear_modules(model), defaultdict[str, Tensor | float](float)
    for rows in batches_by_length([len(each.prompt) + len(each.answer) for each in texts]):
        batch = [texts[row] for row in rows]
        ids = right_padded(chat_model, [each.prompt + each.answer for each in batch])
        weights = averaging_weights(batch, ["response_avg"], ids.shape[1])[:, 0]

        def add(name: str, module: nn.Module, weights: Tensor = weights) -> Hook:
            def take(_: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
                x: Tensor = given[0] if given else next(iter(named.values()))
                if x.shape[:-1] != weights.shape:
                    raise UserError(
                        f"{name} reads tokens that a router chose; no task vector is made of it"
                    )
                sums[name] = (
                    sums[name] + torch.einsum("bl,bli->i", weights.to(x.device), x.float()).cpu()
                )

            return Hook(module, take, name, before=True)

        hooks = [add(name, module) for name, module in modules.items()]
        with chat_model.turn(), Hooked(hooks):
            text_decoder(model).module(input_ids=ids, use_cache=False)
        done += len(rows)
        progress.report(done, len(texts))
    return {name: each / len(texts) for name, each in sums.items() if isinstance(each, Tensor)}
