"""A vLLM server for a population: one LoRA basis, and a coefficient vector for every request.

The K diffs of a basis share one A in every module, so that a mix of them changes its output by

    y += Σₖ c[token, k]·ΔBₖ·(A·x).

A request names its mix as its model, ``mix:<sha>:c1,…,cK``; a slot of vLLM's LoRA table holds K
numbers, not weights. The basis is the folder that the environment's ``PERSONA_LORA_BASIS`` names;
without it nothing of vLLM is changed. Never imported by ``persona_lora``, nor imports it.
"""

from __future__ import annotations

import os
from importlib.metadata import version

from persona_vllm.basis import Basis

BASIS = "PERSONA_LORA_BASIS"
RELEASE = "0.32."  # the release of vLLM whose classes are taken the place of


def register() -> None:
    """Let vLLM serve mixes of the basis; vLLM calls this once in each of its processes.

    Raises:
        ValueError: A folder that holds no basis.
        RuntimeError: Another release of vLLM.
    """
    folder = os.environ.get(BASIS)
    if not folder:
        return
    import vllm
    from vllm.config.lora import LoRAConfig
    from vllm.lora.resolver import LoRAResolverRegistry
    from vllm.v1.worker import lora_model_runner_mixin

    from persona_vllm.managers import salted, worker_manager
    from persona_vllm.resolver import MixResolver

    if not vllm.__version__.startswith(RELEASE):
        raise RuntimeError(f"persona_vllm is for vLLM {RELEASE}*, this is {vllm.__version__}")
    basis = Basis.read(folder)
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = worker_manager(basis)
    # Compiled graphs are kept by what they were compiled from, which now has this in it.
    salt = f"{version('persona-vllm')}, {len(basis.diffs)} diffs"
    LoRAConfig.compute_hash = salted(LoRAConfig.compute_hash, salt)
    LoRAResolverRegistry.register_resolver("persona_vllm", MixResolver(basis))
