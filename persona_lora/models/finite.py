"""NaN is never an answer, a log-probability or a hidden state."""

from __future__ import annotations

from persona_lora.core.errors import UserError
from persona_lora.models.loading import ChatModel


def not_finite(chat_model: ChatModel, what: str) -> UserError:
    """Return the refusal of a model that gives NaN or infinity for what is named."""
    dtype = str(chat_model.model.dtype).removeprefix("torch.")
    return UserError(
        f"{chat_model.name} in {dtype} gives NaN or infinity for {what}: use --dtype float32 or "
        "bfloat16, steer with a smaller coefficient, or check its weights"
    )
