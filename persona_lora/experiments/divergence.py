"""What a coefficient costs the model: relative weight norm, and divergence on ordinary prompts.

Raw coefficients do not travel between models and training recipes; these two do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from persona_lora.core.chat import Exchange, user_question
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_jsonl
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.traits import default_datasets_folder
from persona_lora.models.generation import Progress, generate_answers
from persona_lora.models.likelihood import token_divergences, tokenize_exchange
from persona_lora.models.loading import ChatModel
from persona_lora.models.structure import linear_modules, weight_of
from persona_lora.steering.live import LiveLoRA

ANSWER_TOKENS = 40


@dataclass(frozen=True)
class Cost:
    """What one coefficient does to the model.

    ``relative_weight_norm`` is ‖cΔW‖ / ‖W‖ over the touched modules. ``kl_mean`` and ``kl_p95``
    are the mean and the 95th percentile over tokens of KL(p_base ‖ p_steered) in nats, on the
    base model's own greedy answers to ordinary prompts; ``num_tokens`` is how many there were.
    """

    coefficient: float
    relative_weight_norm: float
    kl_mean: float
    kl_p95: float
    num_tokens: int


def load_ordinary_prompts(datasets: Path | None = None) -> list[str]:
    """Load the ordinary prompts that divergence is measured on."""
    root = datasets if datasets is not None else default_datasets_folder()
    path = root / "ordinary" / "prompts.jsonl"
    prompts = [str(row.get("prompt", "")) for row in read_jsonl(path)]
    if not prompts or not all(prompts):
        raise UserError(f"{path} must hold rows with a prompt, one a line")
    return prompts


def measure_costs(
    chat_model: ChatModel,
    diff: LoRADiff,
    coefficients: Sequence[float],
    prompts: Sequence[str],
    *,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> list[Cost]:
    """Measure the cost of every coefficient; one forward pass a prompt serves all of them."""
    norm = relative_weight_norm(chat_model, diff)
    answers = generate_answers(
        chat_model, [user_question(prompt) for prompt in prompts], max_new_tokens=ANSWER_TOKENS
    )
    exchanges = [
        Exchange(prompt, answer.text)
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer.text
    ]
    if not exchanges:
        raise UserError(f"{chat_model.name} answers none of the ordinary prompts")
    divergences = []
    live = LiveLoRA(
        chat_model.model,
        [diff],
        [[0.0], *([value] for value in coefficients)],
        allow_other_base=allow_other_base,
    )
    with live:
        live.select_rows(range(len(coefficients) + 1))
        for done, exchange in enumerate(exchanges, start=1):
            tokenized = tokenize_exchange(chat_model, exchange)
            divergences.append(
                token_divergences(chat_model, tokenized, num_rows=len(coefficients) + 1)
            )
            if progress is not None:
                progress(done, len(exchanges))
    by_token = torch.cat(divergences, dim=1).double().cpu()  # [coefficients, tokens]
    return [
        Cost(
            coefficient=float(value),
            relative_weight_norm=abs(value) * norm,
            kl_mean=float(row.mean()),
            kl_p95=float(row.quantile(0.95)),
            num_tokens=by_token.shape[1],
        )
        for value, row in zip(coefficients, by_token, strict=True)
    ]


@torch.no_grad()
def relative_weight_norm(chat_model: ChatModel, diff: LoRADiff) -> float:
    """Return ‖ΔW‖ / ‖W‖ (Frobenius, over the modules that the diff touches)."""
    modules = linear_modules(chat_model.model)
    squares = [
        float(weight_of(modules[name]).float().square().sum())
        for name in diff.factors
        if name in modules
    ]
    if not squares:
        raise UserError("no module of the diff is in this model")
    return diff.norm() / math.sqrt(math.fsum(squares))
