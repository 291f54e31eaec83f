"""What a loaded model is, whatever it is called: digests of its weights and of its tokenizer.

Knows where a model holds what decides its answers; refuses to know where it came from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_lora.core.content import digest_of, tensor_digest

UNRELATED = ("transformers_version", "torch_dtype", "dtype")


@torch.no_grad()
def weights_content(model: PreTrainedModel) -> str:
    """Return a digest of every weight of a model, adapters included, and of its configuration.

    It does not depend on the device; weights that are kept elsewhere are fetched module by module.
    """
    tensors = {name: tensor_digest(tensor) for name, tensor in _weights(model)}
    generation = model.generation_config
    settings = [model.config.to_dict(), None if generation is None else generation.to_dict()]
    return digest_of([tensors, [_related(each or {}) for each in settings]])


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of a tokenizer: its vocabulary, its rules and its chat template."""
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else type(tokenizer).__name__
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest_of([tokenizer.chat_template, rules, tokenizer.get_vocab(), special])


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    stored = set(model.state_dict())
    for prefix, module in model.named_modules():
        with align_module_device(module):
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in own:
                whole = f"{prefix}.{name}" if prefix else name
                if whole in stored:
                    yield whole, tensor


def _related(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: each
        for key, each in settings.items()
        if not key.startswith("_") and key not in UNRELATED
    }
