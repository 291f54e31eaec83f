"""Watching a finetune drift along persona directions while it trains.

One line for any transformers or TRL trainer: ``callbacks=[DriftMonitor(diffs=[...], every=10)]``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from persona_lora.core.adapter_config import checked_config
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_jsonl, write_jsonl
from persona_lora.core.given import several
from persona_lora.core.lora_diff import BaseModel, LoRADiff, LoRAFactors, as_diff
from persona_lora.models.loading import ChatModel
from persona_lora.models.structure import canonical_name, unwrapped
from persona_lora.models.turns import rows_kept_apart
from persona_lora.projections.inputs import (
    PLAIN,
    WEIGHTED,
    ModuleInputs,
    load_ordinary_prompts,
    measure_inputs,
)
from persona_lora.projections.weight_space import project_adapter

logger = logging.getLogger(__name__)

DRIFT_ROWS = "drift.jsonl"
Diff = LoRADiff | str | Path
Diffs = Diff | Mapping[str, Diff] | Sequence[Diff]


class DriftMonitor(TrainerCallback):
    """Projects the growing ΔW of a LoRA on diffs every ``every`` steps, from the factors alone.

    The projections are weighted by ``inputs`` of the model before training, by default those of the
    trainer's model without its LoRA on the ordinary prompts: forward passes over two dozen prompts
    when training begins, rendered by the trainer's ``processing_class``. ``plain`` leaves them out,
    which says little along diffs of another seed. The coordinates ⟨ΔW, L⟩/‖L‖ go to the trainer's
    log as ``drift/<name>`` and to ``drift.jsonl`` in the output folder, with their geometry and,
    where it is weighted, the digest of the prompts that the inputs are of.
    ``warn_above`` logs a warning once where a coordinate's absolute value passes it; ``stop_above``
    ends the training there; both are in units of the geometry.

    Refuses a model without a LoRA (its ΔW would need a copy of the base), and a LoRA whose factors
    are not its whole change (DoRA, PiSSA, biases); project their checkpoints with
    ``persona-lora project weights``. Refuses rows of the other geometry, or of inputs over other
    prompts, in a run that goes on; rows of before that say no prompts are taken up.
    """

    def __init__(
        self,
        diffs: Diffs,
        *,
        inputs: ModuleInputs | None = None,
        plain: bool = False,
        every: int = 10,
        warn_above: float | None = None,
        stop_above: float | None = None,
    ) -> None:
        if every < 1:
            raise UserError(f"every must be at least 1, got {every}")
        if plain and inputs is not None:
            raise UserError("plain projections are weighted by no inputs; leave one of them out")
        self.diffs = _named(diffs)
        self.inputs = inputs
        self._check_fits()
        self.geometry = PLAIN if plain else WEIGHTED
        self.every = every
        self.warn_above = warn_above
        self.stop_above = stop_above
        self.rows: list[dict[str, Any]] = []
        self._warned: set[str] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the rows of a run that goes on, and measure the inputs that are not given.

        Refuse a model whose change cannot be read.
        """
        lora_change(kwargs["model"])
        path = Path(str(args.output_dir)) / DRIFT_ROWS
        rows = read_jsonl(path) if path.is_file() else []
        self.rows = [row for row in rows if row["step"] <= state.global_step]
        others = {row["geometry"] for row in self.rows} - {self.geometry}
        if others:
            raise UserError(
                f"{path} holds {others.pop()} coordinates, and this monitor's are {self.geometry}; "
                "go on with the same plain=, or train into another folder"
            )
        if self.inputs is None and self.geometry == WEIGHTED:
            self.inputs = inputs_before(kwargs["model"], kwargs["processing_class"])
            self._check_fits()
        if any(row.get("prompts", self._prompts()) != self._prompts() for row in self.rows):
            raise UserError(
                f"{path} holds coordinates weighted on other prompts than this monitor's; go on "
                "with the same inputs= (drift_prompts), or train into another folder"
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure, log, and warn or stop."""
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        total = project_adapter(lora_change(kwargs["model"]), self.diffs, inputs=self.inputs).total
        found = {name: value.coordinate for name, value in total.items()}
        weighting = {} if self.inputs is None else {"prompts": self._prompts()}
        place = {"step": state.global_step, "geometry": self.geometry, **weighting}
        self.rows += [
            {**place, "diff": name, "coordinate": value.coordinate, "cosine": value.cosine}
            for name, value in total.items()
        ]
        state.log_history.append(
            {"step": state.global_step, **{f"drift/{name}": each for name, each in found.items()}}
        )
        if state.is_world_process_zero:
            write_jsonl(Path(str(args.output_dir)) / DRIFT_ROWS, self.rows)
        self._watch(found, state.global_step, control)

    def _prompts(self) -> str | None:
        return None if self.inputs is None else self.inputs.prompts

    def _check_fits(self) -> None:
        if self.inputs is not None:
            for diff in self.diffs.values():
                self.inputs.check_fits(diff)

    def _watch(self, found: Mapping[str, float], step: int, control: TrainerControl) -> None:
        for name, value in found.items():
            over = self.warn_above is not None and abs(value) > self.warn_above
            if over and name not in self._warned:
                self._warned.add(name)
                logger.warning("step %d: drift along %s is %.3g", step, name, value)
            if self.stop_above is not None and abs(value) > self.stop_above:
                logger.warning("step %d: drift along %s is %.3g; stopping", step, name, value)
                control.should_training_stop = control.should_log = True


def inputs_before(model: nn.Module, tokenizer: object) -> ModuleInputs:
    """Measure what flows through a model in training, without its LoRA, on the ordinary prompts.

    UserError without a tokenizer that has a chat template, where the LoRA cannot be taken off, and
    inside a steerer.
    """
    lacks = None
    if not isinstance(model, PeftModel):
        lacks = "a model that is no PeftModel keeps its LoRA on"
    elif not isinstance(tokenizer, PreTrainedTokenizerBase) or tokenizer.chat_template is None:
        lacks = "the trainer has no tokenizer with a chat template (processing_class=)"
    elif rows_kept_apart(model):
        lacks = "the model is steered now"
    if lacks is not None:
        raise UserError(
            f"the drift monitor weighs by the model's inputs before training, and {lacks}; give "
            "inputs= (persona_lora.projections.inputs.kept_inputs), or plain=True"
        )
    chat_model = ChatModel(model, tokenizer, "the model in training")
    training = model.training
    try:
        model.eval()
        with chat_model.base() as before:
            return measure_inputs(before, load_ordinary_prompts())
    finally:
        model.train(training)


@torch.no_grad()
def lora_change(model: nn.Module) -> LoRADiff:
    """Return what a model's active LoRA adds to its weights, as factors; of several, their sum.

    UserError for a model without one, and for what is no plain low-rank change of the weights that
    it began with: DoRA, biases, starts that move the base weights, as on disk.
    """
    factors, adapters = {}, set[str]()
    for name, module in unwrapped(model).named_modules():
        own = _active(module) if isinstance(module, LoraLayer) else []
        adapters.update(own)
        if own:
            factors[canonical_name(name)] = LoRAFactors(
                torch.cat([module.lora_A[each].weight.float().cpu() for each in own]),
                torch.cat(
                    [
                        module.lora_B[each].weight.float().cpu() * module.scaling[each]
                        for each in own
                    ],
                    dim=1,
                ),
            )
    if not factors:
        raise UserError(
            "the drift monitor reads the factors of a LoRA, and this model has none; project the "
            "checkpoints of a full finetune with: persona-lora project weights"
        )
    configs: Any = unwrapped(model).peft_config  # PEFT's, by the names of its adapters
    for name in sorted(adapters):
        _check_plain(configs[name], name)
    return LoRADiff(factors, BaseModel("in training", None))


def _active(module: LoraLayer) -> list[str]:
    return [each for each in module.active_adapters if each in module.lora_A]


def _check_plain(config: Any, name: str) -> None:
    """Raise UserError for an adapter of the model whose factors are not the whole change."""
    said = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    checked_config(said, f"the adapter {name!r} in training")


def _named(diffs: Diffs) -> dict[str, LoRADiff]:
    pairs = (
        diffs.items() if isinstance(diffs, Mapping) else [(None, each) for each in several(diffs)]
    )
    loaded = [(name, as_diff(each)) for name, each in pairs]
    if not loaded:
        raise UserError("the drift monitor needs at least one diff")
    numbered = [*enumerate(loaded, start=1)]
    names = [name or diff.trait or f"diff {number}" for number, (name, diff) in numbered]
    return {  # those of one trait, as of several seeds, are told apart by their places
        name if names.count(name) == 1 else f"{name} {number}": diff
        for name, (number, (_, diff)) in zip(names, numbered, strict=True)
    }
