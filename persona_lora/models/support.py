"""Whether a model is of a shape that everything here knows: asked once, when it is loaded.

Models are known by what they do, not by their names: a text decoder with numbered blocks, each of
which runs once and in order and hands on hidden states of one width. docs/models.md has the table
of families that were tried, and how to try another.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import layer_number
from persona_lora.models.hooks import Hook, Hooks
from persona_lora.models.structure import hidden_size, text_decoder

PROBE = "a b c"
ROWS = 2


@torch.inference_mode()
def check_support(model: PreTrainedModel, tokens: list[int], name: str) -> None:
    """Run two rows of ``tokens`` through the model; UserError where anything is not as expected.

    The message says what was found. Numbers that are not finite are refused too: an answer made of
    them would look like one.
    """
    decoder = text_decoder(model)
    if layer_number(f"{decoder.blocks_name}.0.") != 0:
        raise _unknown(name, f"its blocks are called {decoder.blocks_name}.N")
    expected = (ROWS, len(tokens), hidden_size(model))
    seen: list[int] = []

    def note(number: int, module: nn.Module, arguments: object, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if not isinstance(states, Tensor) or tuple(states.shape) != expected:
            raise _unknown(name, f"block {number} gives no hidden states of shape {expected}")
        seen.append(number)

    hooks = [
        Hook(block, partial(note, number), f"block {number}")
        for number, block in enumerate(decoder.blocks)
    ]
    with Hooks(hooks):
        device = model.get_input_embeddings().weight.device
        if device.type == "meta":  # offloaded: accelerate brings the weights in, and the tokens
            device = torch.device("cpu")
        ids = torch.tensor([tokens] * ROWS, device=device)
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    if seen != list(range(len(decoder.blocks))):
        raise _unknown(name, f"its {len(decoder.blocks)} blocks ran {len(seen)} times")
    if not bool(torch.isfinite(logits).all()):
        raise UserError(
            f"{name} gives NaN or infinity for three tokens; load it in float32 or bfloat16, or "
            "fetch its weights again"
        )


def _unknown(name: str, found: str) -> UserError:
    return UserError(f"{name} is of a shape that is not known here: {found}; see docs/models.md")
