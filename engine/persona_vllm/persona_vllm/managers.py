"""Adapters that are K numbers: vLLM's managers of LoRA with the weights of one basis in them.

Only linear layers of text models are taken; every module of the basis must find its layer.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.config.lora import LoRAConfig
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY, LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from persona_vllm.arithmetic import SharedBasis
from persona_vllm.basis import Basis

logger = logging.getLogger(__name__)


class Mix(LoRAModel):
    """An adapter without weights: the coefficients of a mix."""

    def __init__(self, number: int, values: list[float]) -> None:
        super().__init__(number, 1, {})
        self.values = values


class MixManager(LRUCacheLoRAModelManager):
    """The LoRA layers of a model, with one slot of weights each, which all mixes share."""

    num_diffs: int

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: VllmConfig) -> None:
        super()._init_punica_wrapper(max_num_batched_tokens, vllm_config)
        if self.supports_mm or self.is_pooling_model or self.lora_config.fully_sharded_loras:
            raise ValueError("mixes of a basis are served for text models, not fully sharded")
        self.shared = SharedBasis(
            max_num_batched_tokens, self.max_num_seqs, self.device, self.lora_slots, self.num_diffs
        )
        self.punica_wrapper_mapping[DEFAULT_LANGUAGE_WRAPPER_KEY] = self.shared

    def _create_lora_modules(self) -> None:
        served = self.lora_config
        self.lora_config = copy.copy(served)
        self.lora_config.max_loras = 1
        super()._create_lora_modules()
        self.lora_config = served
        for name, module in self.modules.items():
            if not isinstance(module, BaseLinearLayerWithLoRA):
                kind = type(module).__name__
                raise ValueError(
                    f"{name} is a {kind}, and mixes act on linear layers alone; name those of the "
                    "basis with --lora-target-modules"
                )
            module.lora_b_stacked = tuple(
                b.new_zeros(*b.shape[:-1], self.num_diffs * b.shape[-1])
                for b in module.lora_b_stacked
            )

    def hold(self, diffs: Sequence[LoRAModel]) -> None:
        """Put the basis into the layers, for good; ValueError for one that does not fit."""
        for diff in diffs:
            self._create_merged_loras_inplace(diff)
        names = sorted({name for diff in diffs for name in diff.loras})
        for name in names:
            if name not in self.modules:
                raise ValueError(
                    f"the basis changes {name}, which has no LoRA layer here; name it with "
                    "--lora-target-modules"
                )
            module = self.modules[name]
            rank = module.lora_a_stacked[0].shape[2]
            a, b = joined([diff.get_lora(name) for diff in diffs], rank, name)
            packed = len(a) > 1
            module.set_lora(0, a if packed else a[0], b if packed else b[0])
        logger.info("a basis of %d diffs in %d modules", len(diffs), len(names))

    def _add_adapter(self, lora: LoRAModel) -> None:
        self._registered_adapters[lora.id] = lora

    def activate_adapter(self, lora_id: int) -> bool:
        """Write the numbers of a mix into a free slot; zeros for the dummies of a warm-up."""
        if lora_id in self._active_adapters:
            self._active_adapters.touch(lora_id)
            return False
        if len(self._active_adapters) >= self.lora_slots:
            self._active_adapters.remove_oldest()
        slot = self.lora_index_to_id.index(None)
        self._active_adapters[lora_id] = None
        self.lora_index_to_id[slot] = lora_id
        adapter = self._registered_adapters[lora_id]
        values = adapter.values if isinstance(adapter, Mix) else [0.0] * self.num_diffs
        self.shared.set_mix(slot, values)
        return True


def worker_manager(basis: Basis) -> type[LRUCacheWorkerLoRAManager]:
    """Return the manager of a worker's adapters, whose adapters are mixes of the basis."""

    class Manager(MixManager):
        num_diffs = len(basis.diffs)

    class Worker(LRUCacheWorkerLoRAManager):
        _manager_cls = Manager

        def create_lora_manager(self, model: nn.Module, vllm_config: VllmConfig) -> Any:
            made = super().create_lora_manager(model, vllm_config)
            requests = [LoRARequest(str(path), 1, str(path)) for path in basis.diffs]
            held = [LRUCacheWorkerLoRAManager._load_adapter(self, each) for each in requests]
            self._adapter_manager.hold(held)
            return made

        def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
            values = basis.coefficients(lora_request.lora_name)
            return Mix(lora_request.lora_int_id, values)

    return Worker


def joined(
    weights: Sequence[LoRALayerWeights | None], rank: int, name: str
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Return the one A and the B of all diffs side by side, for each slice of a module.

    A is ``[r, in]``, B ``[out, K·rank]``; None for a slice that no diff changes. ValueError for
    diffs that do not share their A.
    """
    slices = [_slices(each) for each in weights]
    count = max(len(each) for each in slices)
    found: tuple[list[Tensor | None], list[Tensor | None]] = ([], [])
    for pairs in zip(*(each or [None] * count for each in slices), strict=True):
        present = [each for each in pairs if each is not None]
        if not present:
            found[0].append(None)
            found[1].append(None)
            continue
        a, first = present[0]
        if any(not torch.equal(other, a) for other, _ in present):
            raise ValueError(
                f"the diffs do not share the A of {name}; bring them onto one basis with: "
                "persona-lora basis"
            )
        b = first.new_zeros(len(first), len(pairs), rank)
        for number, each in enumerate(pairs):
            if each is not None:
                b[:, number, : each[1].shape[1]] = each[1]
        found[0].append(a)
        found[1].append(b.flatten(1))
    return found


def _slices(weights: LoRALayerWeights | None) -> list[tuple[Tensor, Tensor] | None]:
    """Return A and B of each slice of a layer; nothing of a layer that is not changed."""
    if weights is None:
        return []
    a, b = weights.lora_a, weights.lora_b
    if isinstance(a, Tensor):
        return [(a, b)]
    return [None if one is None else (one, other) for one, other in zip(a, b, strict=True)]


def salted(own: Callable[[LoRAConfig], str], salt: str) -> Callable[[LoRAConfig], str]:
    """Return a hash of vLLM's configuration that holds ``salt`` beside what it held."""

    def compute_hash(config: LoRAConfig) -> str:
        return hashlib.sha256(f"{own(config)} {salt}".encode()).hexdigest()

    return compute_hash
