"""What an ``adapter_config.json`` may say for its adapter to be a plain low-rank change.

An allow-list: of every field it is known either that any value leaves the change W + s·BA, or
which values do. Another value, and a field that a later PEFT brings, is refused by its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex  # type: ignore[import-untyped]

from persona_lora.core.errors import UserError

# Said of a saved adapter, these do not change what its factors are.
FREE = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode"),
        *("base_model_name_or_path", "revision", "lora_dropout", "megatron_core"),
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("init_lora_weights", "eva_config", "loftq_config", "corda_config", "lora_ga_config"),
        *("runtime_config", "qalora_group_size", "fan_in_fan_out"),
    }
)
# What it is called, and what to do instead; anything but None, false and empty is refused.
REFUSED = {
    "use_dora": ("DoRA", "train with use_dora: false"),
    "modules_to_save": ("modules_to_save", "train without modules_to_save"),
    "trainable_token_indices": ("trainable tokens", "train without trainable_token_indices"),
    "target_parameters": ("LoRA on bare parameters", "target linear modules instead"),
    "lora_bias": ("LoRA bias", "train with lora_bias: false"),
    "alora_invocation_tokens": (
        "activated LoRA, which acts only after its invocation tokens",
        "train without alora_invocation_tokens",
    ),
    "layer_replication": ("replicated layers", "train on the model as it is"),
}
# These draw the first A and B, and leave the base weights where they are.
UNMOVED = (True, False, "gaussian", "orthogonal", "eva")
PATTERN_SECONDS = 1.0
_DEFAULTS = {"r": 8, "lora_alpha": 8}  # PEFT's


def checked_config(config: Any, where: Path | str) -> dict[str, Any]:
    """Return the configuration of a plain LoRA; UserError names the field that is none."""
    if not isinstance(config, dict):
        raise UserError(f"{where} holds a {type(config).__name__}, expected a JSON object")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{where} is a {config.get('peft_type')} adapter; only LoRA has a diff")
    for key in config.keys() - FREE - {"bias"}:
        if config[key] not in (None, False, "", [], {}):
            what, remedy = REFUSED.get(key, (f"{key}, unknown here", f"train without {key}"))
            raise UserError(f"{where} uses {what}: not a plain low-rank change; {remedy}")
    if config.get("bias", "none") != "none":
        raise UserError(f"{where} trains biases (bias={config['bias']!r}); train with bias: none")
    start = config.get("init_lora_weights", True)
    if start not in UNMOVED:
        raise UserError(
            f"{where} was initialised with init_lora_weights={start!r}, which moves the base "
            "weights, so that BA is not the change; convert it to a plain LoRA with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=<the initial adapter>)"
        )
    return {**_DEFAULTS, **config, **_numbers(config, where), **_targets(config, where)}


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return PEFT's scaling of one module: lora_alpha / r, or lora_alpha / √r with rsLoRA."""
    return alpha_of(config, module) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def alpha_of(config: Mapping[str, Any], module: str) -> float:
    """Return the lora_alpha of one module."""
    return float(_by_pattern(config, "alpha_pattern", module, config["lora_alpha"]))


def check_module(config: Mapping[str, Any], module: str, rank: int, where: Path) -> None:
    """Raise UserError for a module that the configuration does not list, or of another rank."""
    configured = _by_pattern(config, "rank_pattern", module, config["r"])
    if rank != configured:
        raise UserError(
            f"{where}: {module} has rank {rank}, and {configured} by its configuration; weights "
            "and configuration belong to different adapters"
        )
    if lists(config, module) is False:
        raise UserError(
            f"{where} holds factors of {module}, which its configuration leaves out (target or "
            "exclude_modules, layers_to_transform), so that PEFT drops them; save it again"
        )


def lists(config: Mapping[str, Any], module: str) -> bool | None:
    """Tell whether a configuration means a module; None where only the model would tell."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    layers = config.get("layers_to_transform")
    numbers = {int(number) for number in re.findall(r"\.(\d+)\.", f"{module}.")}
    if (excluded and _listed(excluded, module)) or (layers and not numbers & set(layers)):
        return False
    return None if not targets or targets == "all-linear" else _listed(targets, module)


def _numbers(config: Mapping[str, Any], where: Path | str) -> dict[str, Any]:
    """Check rank and alpha, of the adapter and of single modules, and the flag of rsLoRA."""
    found: dict[str, Any] = {}
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        found[pattern] = config.get(pattern) or {}
        if not isinstance(found[pattern], dict):
            raise UserError(f"{where}: {pattern} must map modules to numbers")
        kinds = int if key == "r" else int | float
        for value in (config.get(key, _DEFAULTS[key]), *found[pattern].values()):
            if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
                raise UserError(
                    f"{where}: {key} and {pattern} must hold positive numbers, got {value!r}"
                )
    if not isinstance(config.get("use_rslora", False), bool | None):
        raise UserError(f"{where}: use_rslora must be true or false")
    return found


def _targets(config: Mapping[str, Any], where: Path | str) -> dict[str, Any]:
    for key in ("target_modules", "exclude_modules"):
        value = config.get(key)
        names = value if isinstance(value, list) else [value or ""]
        if not all(isinstance(each, str) for each in names):
            raise UserError(f"{where}: {key} must be names of modules, got {str(value)[:60]}")
    name = config.get("base_model_name_or_path") or ""
    if not isinstance(name, str):
        raise UserError(f"{where}: base_model_name_or_path must be a name, got {str(name)[:60]}")
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if layers is not None and not (
        isinstance(layers, list) and all(isinstance(each, int) for each in layers)
    ):
        raise UserError(f"{where}: layers_to_transform must be layer numbers")
    return {"base_model_name_or_path": name, "layers_to_transform": layers}


def _by_pattern(config: Mapping[str, Any], key: str, module: str, otherwise: Any) -> Any:
    """Return what the first pattern that matches as PEFT matches says of a module.

    A pattern is a regular expression for the whole name or a dotted ending of it.
    """
    for pattern, value in config[key].items():
        plain = re.fullmatch(r"[\w.]+", pattern)  # most are names, and our own diffs have hundreds
        if _ends_with(module, pattern) or (
            not plain and _matches(rf"(?:.*\.)?(?:{pattern})", module)
        ):
            return value
    return otherwise


def _listed(targets: Any, module: str) -> bool:
    if isinstance(targets, str):
        return _matches(targets, module)
    return any(_ends_with(module, each) for each in targets)


def _ends_with(module: str, ending: str) -> bool:
    return module == ending or module.endswith(f".{ending}")


def _matches(pattern: str, text: str) -> bool:
    """Match a whole text with a stranger's pattern, which may be made to never end."""
    try:
        return regex.fullmatch(pattern, text, timeout=PATTERN_SECONDS) is not None
    except (regex.error, TimeoutError, RecursionError) as error:
        raise UserError(
            f"the pattern {pattern[:60]!r} of an adapter's configuration cannot be matched "
            f"({error or 'it takes too long'}); name the modules instead"
        ) from error
