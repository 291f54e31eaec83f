"""Putting a fresh LoRA on a frozen model, taking it off again, and writing it as a PEFT adapter.

Knows PEFT's configuration and file format; refuses to know what the LoRA is trained on.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from persona_lora.core.adapter_files import ADAPTER_WEIGHTS
from persona_lora.core.errors import UserError
from persona_lora.models.loading import ChatModel
from persona_lora.models.peft_calls import quiet_peft
from persona_lora.models.structure import linear_modules
from persona_lora.training.targets import lora_targets

EMBEDDING_MODULES = ("lm_head", "embed_tokens", "embed_out", "wte")


@dataclass
class LoRAArguments:
    """The LoRA options, under the names that TRL's ModelConfig gives to PEFT's."""

    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA factors."})
    lora_alpha: int = field(
        default=32, metadata={"help": "Numerator of the scaling lora_alpha / lora_r."}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout on the input of the LoRA factors."}
    )
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Module names, or all-linear: every linear module of the decoder."},
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale by lora_alpha / √lora_r instead."}
    )

    def __post_init__(self) -> None:
        targets = self.lora_target_modules
        self.lora_target_modules = [targets] if isinstance(targets, str) else targets
        if self.lora_r < 1:
            raise UserError(f"lora_r must be at least 1, got {self.lora_r}")
        if self.lora_alpha <= 0:
            raise UserError(f"lora_alpha must be positive, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout}")
        if not self.lora_target_modules:
            raise UserError("lora_target_modules is empty; use all-linear, or name linear modules")
        refused = sorted(
            target
            for target in self.lora_target_modules
            if target.rsplit(".", 1)[-1] in EMBEDDING_MODULES
        )
        if refused:
            raise UserError(
                f"lora_target_modules names {', '.join(refused)}: a LoRA on embeddings or on the "
                "output head has no plain difference and corrupts tied weights; use all-linear"
            )


def attach_lora(chat_model: ChatModel, arguments: LoRAArguments, seed: int) -> PeftModel:
    """Wrap the model in a fresh LoRA of which only the factors train.

    The same ``seed`` draws the same A on every call; B starts at zero.
    """
    targets = lora_targets(chat_model, arguments.lora_target_modules or [])
    modules = linear_modules(chat_model.model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets,
        use_rslora=arguments.use_rslora,
        fan_in_fan_out=any(isinstance(modules[name], Conv1D) for name in targets),
    )
    set_seed(seed)
    with quiet_peft():
        model = get_peft_model(chat_model.model, config)
    # PEFT notes the path that the weights came from; the packaged model's lies in a user's cache.
    config.base_model_name_or_path = chat_model.name
    config.revision = chat_model.options.revision
    return model


def all_weights(chat_model: ChatModel, seed: int) -> PreTrainedModel:
    """Return the model itself with every weight to be trained, and the random numbers seeded."""
    set_seed(seed)
    return chat_model.model.requires_grad_(True)


def detach_lora(model: PeftModel) -> PreTrainedModel:
    """Take the LoRA off and return the base model, whose weights were never touched."""
    base = model.unload()
    # TRL puts a forward of its own on the instance; a second trainer would wrap it once more.
    vars(base).pop("forward", None)
    return base.requires_grad_(False).eval()


def write_lora(
    model: PeftModel, folder: Path, *, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, and nothing else.

    PEFT's own ``save_pretrained`` asks the model hub whether the vocabulary grew; nothing here
    leaves the machine. ``state_dict`` replaces the model's own where it is sharded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Any] = get_peft_model_state_dict(
        model, state_dict=state_dict, save_embedding_layers=False
    )
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(folder)
