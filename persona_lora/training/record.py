"""What decides the numbers of a training run, as JSON: compared on resume, kept as provenance.

Knows which options matter; refuses to know what they do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from enum import Enum
from typing import Any

from accelerate import PartialState
from trl import SFTConfig

from persona_lora.core.traits import ContrastivePair
from persona_lora.training.arguments import ContrastiveOptions

# Options that change where a run writes and what it shows, but no number of its adapters.
FREE_OPTIONS = {
    "output_dir",
    "run_name",
    "project",
    "logging_strategy",
    "logging_steps",
    "logging_first_step",
    "logging_nan_inf_filter",
    "log_level",
    "log_level_replica",
    "report_to",
    "disable_tqdm",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "dataloader_pin_memory",
    "dataloader_num_workers",
    "ddp_backend",
    "ddp_timeout",
    "ddp_find_unused_parameters",
    "hub_token",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
}


def run_record(
    options: ContrastiveOptions, trait: str, pairs: Sequence[ContrastivePair]
) -> dict[str, Any]:
    """Return all that decides the numbers of a run, as JSON values."""
    content = json.dumps([dataclasses.asdict(pair) for pair in pairs], sort_keys=True)
    record = {
        "trait": trait,
        "num_pairs": len(pairs),
        "pairs_sha256": hashlib.sha256(content.encode()).hexdigest(),
        **options.arguments.model_record(),
        "system_prompt": options.arguments.system_prompt,
        "num_processes": PartialState().num_processes,
        "lora": dataclasses.asdict(options.lora),
        "training": changed_options(options.config),
    }
    value: dict[str, Any] = json.loads(json.dumps(record, default=str))
    return value


def changed_options(config: SFTConfig) -> dict[str, Any]:
    """Return the options that differ from TRL's defaults and change numbers."""
    defaults = {
        each.name: each.default_factory()
        if each.default_factory is not dataclasses.MISSING
        else each.default
        for each in dataclasses.fields(SFTConfig)
        if each.init
    }
    values = {name: _plain(getattr(config, name)) for name in defaults}
    return {
        name: value
        for name, value in values.items()
        if name not in FREE_OPTIONS and value != defaults[name]
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value
