"""y += Σₖ c[token, k]·ΔBₖ·(A·x): two dense products for all requests of a batch together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class SharedBasis(PunicaWrapperCPU):
    """What every LoRA layer calls: plain torch, the same on every device.

    ``table`` ``[slots + 1, K]`` holds the coefficients of each slot; its last row stays 0, and -1,
    the slot of a request without a mix, finds it.
    """

    def __init__(
        self, num_tokens: int, num_rows: int, device: torch.device, slots: int, num_diffs: int
    ) -> None:
        super().__init__(num_tokens, num_rows, device)
        self._token_lora_indices.fill_(-1)
        self.table = torch.zeros(slots + 1, num_diffs, device=device)

    def set_mix(self, slot: int, values: list[float]) -> None:
        """Put the coefficients of a mix into a slot."""
        self.table[slot].copy_(torch.tensor(values))

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        """Take which slot each token of the next batch has."""
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Add to y ``[tokens, out]`` in place; slice i has A ``[1, 1, r, in]``, B ``[…, out, Kr]``.

        Without ``add_inputs`` y is written instead.
        """
        mixes = self.table[self._token_lora_indices[: len(x)]]  # [tokens, K]
        offset = 0
        for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            product = functional.linear(x, a[0, 0])  # [tokens, r]
            scaled = (mixes[:, :, None] * product[:, None, :]).flatten(1).to(b.dtype)
            part = y[:, offset : offset + size]
            change = functional.linear(scaled, b[0, 0])
            part.add_(change) if add_inputs else part.copy_(change)
            offset += size
