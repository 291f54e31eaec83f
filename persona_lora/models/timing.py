"""How long a generation takes to its first token, and how fast it goes on.

Knows the clock and the device; refuses to know what is compared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from persona_lora.core.chat import user_question
from persona_lora.models.loading import ChatModel


@torch.inference_mode()
def timed_generation(
    chat_model: ChatModel, prompts: Sequence[str], new_tokens: int, *, system: str | None = None
) -> tuple[float, float]:
    """Answer all prompts as one batch, greedily and with exactly ``new_tokens`` tokens each.

    Returns the seconds to the first token, and the tokens per second (of the batch) after it.
    """
    texts = [chat_model.render(user_question(prompt, system)) for prompt in prompts]
    tokenizer = chat_model.tokenizer
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    batch = tokenizer.pad(
        {"input_ids": ids}, padding=True, padding_side="left", return_tensors="pt"
    ).to(chat_model.model.device)
    clock = _Clock()
    wait_for_device()
    start = time.perf_counter()
    chat_model.model.generate(
        **batch,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    wait_for_device()
    end = time.perf_counter()
    first = clock.first_token
    return first - start, len(prompts) * (new_tokens - 1) / (end - first)


def wait_for_device() -> None:
    """Wait until a GPU has done what it was asked for; a CPU has."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class _Clock(StoppingCriteria):
    """Stops nothing, and notes when the first token was there."""

    def __init__(self) -> None:
        self.first_token = math.nan

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if math.isnan(self.first_token):
            wait_for_device()
            self.first_token = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
