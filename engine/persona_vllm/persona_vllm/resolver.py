"""The model name of a request that means a mix: no call has to load it first."""

from __future__ import annotations

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from persona_vllm.basis import MIX, Basis


class MixResolver(LoRAResolver):
    """Turns ``mix:…`` into a request for an adapter of that name; vLLM numbers them itself."""

    def __init__(self, basis: Basis) -> None:
        self.basis = basis

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return the adapter of a mix, None for any other name.

        ValueError, which the client gets as HTTP 400, for a mix that is none: no worker meets it.
        """
        if not lora_name.startswith(MIX):
            return None
        self.basis.coefficients(lora_name)
        # A name of its own, so that blocks of the prefix cache are of this mix alone.
        return LoRARequest(lora_name, 1, lora_name)
