"""Weight-space LoRA steering: train, merge, measure and undo the character of language models.

Public names are resolved on first use, so that importing the package, or asking the command line
for help, never imports torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "ChatModel": "persona_lora.models.loading",
    "load_chat_model": "persona_lora.models.loading",
    "generate_answers": "persona_lora.models.generation",
    "LoRADiff": "persona_lora.core.lora_diff",
    "SteeringVector": "persona_lora.core.steering_vector",
    "LoRAFactors": "persona_lora.core.lora_diff",
    "mix": "persona_lora.core.lora_diff",
    "Trait": "persona_lora.core.traits",
    "load_trait": "persona_lora.core.traits",
    "Run": "persona_lora.core.runs",
    "UserError": "persona_lora.core.errors",
    "LoRAMerger": "persona_lora.steering.weights",
    "LoRASteerer": "persona_lora.steering.weights",
    "LiveLoRA": "persona_lora.steering.live",
    "ActivationSteerer": "persona_lora.steering.activations",
    "DirectionAblation": "persona_lora.steering.activations",
    "load_vector": "persona_lora.core.vector_files",
    "train_contrastive": "persona_lora.training.contrastive",
    "finetune": "persona_lora.training.finetune",
    "DriftMonitor": "persona_lora.training.drift",
    "WeightProjector": "persona_lora.projections.weight_space",
    "CMAESPersonaOptimizer": "persona_lora.studies.personas.bench",
    "Coefficients": "persona_lora.core.personas",
    "load_persona": "persona_lora.core.personas",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
