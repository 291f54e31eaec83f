"""Which modules a LoRA goes on; putting a fresh one on a frozen model, and taking it off again.

A LoRA has a plain difference where one matrix maps each token: linear modules of the text decoder.
Routers and the stacked experts of a block have none, and PEFT puts names of older releases on them
by rules of its own; so it is tried on a model without weights first. Knows PEFT's configuration and
file format; refuses to know what the LoRA is trained on."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from persona_lora.core.adapter_files import ADAPTER_WEIGHTS
from persona_lora.core.errors import UserError
from persona_lora.models.hooks import Hook, Hooked
from persona_lora.models.load_options import LoadOptions, option
from persona_lora.models.loaded_model import quiet_peft
from persona_lora.models.loading import ChatModel, auto_model, model_config
from persona_lora.models.structure import (
    canonical_name,
    features,
    kind_of,
    linear_modules,
    plain_linear_modules,
    same_kind,
    stacked_weights,
    text_decoder,
    unwrapped,
)

logger = logging.getLogger(__name__)

ALL_LINEAR = ["all-linear"]


def lora_targets(chat_model: ChatModel, asked: Sequence[str]) -> list[str]:
    """Return the names of the modules that a LoRA goes on.

    ``asked`` is ``["all-linear"]``, or module names or dotted endings of them. Raises UserError for
    a name that is no plain linear module of the decoder, or that PEFT would put on stacked experts;
    all-linear leaves those out.
    """
    model = chat_model.model
    known = _called(model, list(plain_linear_modules(model)))
    if list(asked) == ALL_LINEAR:
        taken = _all_taken(model, known)
        if not taken:
            raise UserError(
                f"PEFT puts a LoRA on no linear module of {chat_model.name}; train another model"
            )
        _say_what_stays(model, known, taken)
        return taken
    chosen = _named(chat_model.name, known, asked)
    taken = _taken_by_peft(model, chosen)
    if len(taken) < len(chosen):
        possible = _kinds(_all_taken(model, known))
        raise UserError(
            f"lora_target_modules {', '.join(asked)}: PEFT puts them on the stacked experts of "
            f"{chat_model.name}, whose LoRA has no plain difference, or refuses them; use "
            f"all-linear, or of {', '.join(possible) or 'another model: it takes none of this one'}"
        )
    return taken


def _all_taken(model: nn.Module, known: Sequence[str]) -> list[str]:
    """Return the modules that PEFT takes, without the kinds that it refuses by themselves.

    One that it refuses (the output of Mamba's mixers) makes it refuse all that stand beside it.
    """
    whole = _taken_by_peft(model, known)
    if whole:
        return whole
    fit = [
        kind
        for kind in _kinds(known)
        if _taken_by_peft(model, [name for name in known if kind_of(name) == kind])
    ]
    return _taken_by_peft(model, [name for name in known if kind_of(name) in fit])


def _say_what_stays(model: nn.Module, known: Sequence[str], taken: Sequence[str]) -> None:
    stacked = stacked_weights(model)
    if stacked:
        logger.warning(
            "training goes on %s; stacked experts (%s) have no plain difference and stay as they "
            "are",
            ", ".join(_kinds(taken)),
            ", ".join(_kinds(stacked)),
        )
    elif len(taken) < len(known):
        logger.warning(
            "training goes on %s; PEFT puts none on %s of this model, which stay as they are",
            ", ".join(_kinds(taken)),
            ", ".join(sorted(set(_kinds(known)) - set(_kinds(taken)))),
        )


@torch.no_grad()
def _called(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Return the names without the kinds of modules that a pass reads the weight of, uncalled.

    What is not called (a projection of Jamba's) passes any LoRA by. An expert that a pass leaves
    out is known by another one of its kind. The pass is one of training, where fused kernels read
    more weights than in evaluation.
    """
    if any(not parameter.numel() for parameter in model.parameters()):
        return list(names)  # taken apart already, and not to be run yet
    modules = linear_modules(model)
    called: set[str] = set()
    hooks = [
        Hook(modules[name], lambda *_, kind=kind_of(name): called.add(kind), name) for name in names
    ]
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(3, device="cpu" if device.type == "meta" else device)[None]
    try:
        model.train()
        with Hooked(hooks):
            text_decoder(model).module(input_ids=ids, use_cache=False)
    finally:
        model.eval()
    return [name for name in names if kind_of(name) in called]


def _named(model_name: str, known: Sequence[str], asked: Sequence[str]) -> list[str]:
    unknown = [each for each in asked if not any(_means(each, name) for name in known)]
    if unknown:
        raise UserError(
            f"lora_target_modules {', '.join(unknown)} fit no linear module in the decoder of "
            f"{model_name}; it has {', '.join(_kinds(known))}, or use all-linear"
        )
    return [name for name in known if any(_means(each, name) for each in asked)]


def _means(asked: str, name: str) -> bool:
    """Say whether a target names a module, as PEFT takes it: its name, or a dotted ending."""
    return name == asked or name.endswith(f".{asked}")


ONE_AT_A_TIME = Lock()  # PEFT changes nn.Module for all threads while it makes empty weights


def _taken_by_peft(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return those of the names on which PEFT puts a LoRA of a linear module of their own."""
    empty = same_kind(unwrapped(model))
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=list(names))
    try:
        with ONE_AT_A_TIME, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nobody will use this one
            get_peft_model(empty, config, low_cpu_mem_usage=True)
    except ValueError:  # nothing is left on linear modules, or only half of what it joins
        return []
    wrapped = {
        canonical_name(name)
        for name, module in empty.named_modules()
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear | Conv1D)
    }
    return [name for name in names if name in wrapped]


def _kinds(names: Iterable[str]) -> list[str]:
    return sorted({kind_of(name) for name in names})


EMBEDDING_MODULES = ("lm_head", "embed_tokens", "embed_out", "wte")


@dataclass
class LoRAArguments:
    """The LoRA options, under the names that TRL's ModelConfig gives to PEFT's."""

    lora_r: int = option(16, "Rank of the LoRA factors, or of the cut difference.")
    lora_alpha: int = option(32, "Numerator of the scaling lora_alpha / lora_r.")
    lora_dropout: float = option(0.0, "Dropout on the input of the LoRA factors.")
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Module names (q_proj,v_proj), or all-linear: those of the decoder."},
    )
    use_rslora: bool = option(False, "Scale by lora_alpha / √lora_r instead.")

    def __post_init__(self) -> None:
        targets = self.lora_target_modules
        targets = [targets] if isinstance(targets, str) else targets or []
        named = (name.strip() for each in targets for name in str(each).split(","))
        self.lora_target_modules = [name for name in named if name]
        if self.lora_r < 1:
            raise UserError(f"lora_r must be at least 1, got {self.lora_r}")
        if self.lora_alpha <= 0:
            raise UserError(f"lora_alpha must be positive, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout}")
        if not self.lora_target_modules:
            raise UserError("lora_target_modules is empty; use all-linear, or name linear modules")
        refused = sorted(t for t in self.lora_target_modules if kind_of(t) in EMBEDDING_MODULES)
        if refused:
            raise UserError(
                f"lora_target_modules names {', '.join(refused)}: a LoRA on embeddings or on the "
                "output head has no plain difference and corrupts tied weights; use all-linear"
            )


def check_targets(name: str, options: LoadOptions, asked: Sequence[str]) -> None:
    """Raise UserError, before weights are read, for names that fit no linear module of a model."""
    if list(asked) == ALL_LINEAR:
        return
    config = model_config(name, options)
    code = {"trust_remote_code": options.trust_remote_code}
    with torch.device("meta"):
        model = auto_model(config).from_config(config, **code)
    _named(name, list(plain_linear_modules(model)), asked)


def attach_lora(chat_model: ChatModel, arguments: LoRAArguments, seed: int) -> PeftModel:
    """Wrap the model in a fresh LoRA of which only the factors train.

    The same ``seed`` draws the same A on every call; B starts at zero.
    """
    targets = lora_targets(chat_model, arguments.lora_target_modules or [])
    modules = linear_modules(chat_model.model)
    most = max(min(features(modules[name])) for name in targets)
    if arguments.lora_r > most:
        raise UserError(
            f"lora_r {arguments.lora_r} is more than the rank {most} of the largest matrix of "
            f"{chat_model.name}; lower lora_r"
        )
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
