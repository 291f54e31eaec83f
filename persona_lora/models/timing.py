"""How long a generation takes to its first token, and how fast it goes on.

Knows the clock and the device; refuses to know what is compared.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from persona_lora.core import progress
from persona_lora.core.chat import user_question
from persona_lora.models.generation import RowPlan, generate_answers
from persona_lora.models.loading import ChatModel


def timed_generation(
    chat_model: ChatModel, prompts: Sequence[str], new_tokens: int, *, system: str | None = None
) -> tuple[float, float]:
    """Answer all prompts as one batch, greedily and with exactly ``new_tokens`` tokens each.

    Returns the seconds to the first token, and the tokens per second (of the batch) after it.
    """
    times: list[float] = []

    def note() -> None:
        if len(times) < 2:
            wait_for_device()
            times.append(time.perf_counter())

    wait_for_device()
    times.append(time.perf_counter())
    with progress.silent():
        generate_answers(
            chat_model,
            [user_question(prompt, system) for prompt in prompts],
            max_new_tokens=new_tokens,
            batch_size=len(prompts),
            plan=RowPlan(on_step=note, endless=True),
        )
    wait_for_device()
    end = time.perf_counter()
    start, first = times
    return first - start, len(prompts) * (new_tokens - 1) / (end - first)


def wait_for_device() -> None:
    """Wait until a GPU has done what it was asked for; a CPU has."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
