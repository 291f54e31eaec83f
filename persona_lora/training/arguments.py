"""The options of training: dataclasses, and the one parser over them.

Names are TRL's and PEFT's own. A flat YAML file by ``--config``, flags win over it, unknown keys
fail. Knows options; refuses to know what is done with them.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, NoReturn, TypeVar

import torch
from torch.optim import SGD
from transformers import SchedulerType, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig, TrlParser

from persona_lora.core.errors import UserError, nearest_names
from persona_lora.core.resources import resource_path
from persona_lora.core.settings import read_yaml, typed_fields
from persona_lora.models.hardware import launch_of_process, training_hardware
from persona_lora.models.load_options import DEFAULT_MODEL, LoadOptions, option
from persona_lora.training.lora import LoRAArguments

CHECKPOINTS = Path("checkpoints")


@dataclass(frozen=True, kw_only=True)
class TrainedModel(LoadOptions):
    """The model that is trained, and how it is loaded: the options of every command."""

    model_name_or_path: str = field(
        default=DEFAULT_MODEL,
        metadata={
            "help": "The packaged model, a folder, a .gguf file, or a hub id.",
            "aliases": ["--model"],
        },
    )
    use_peft: bool = option(
        True,
        "Train LoRAs; false trains weights in full, in fp32 unless dtype says so, and train then "
        "cuts their difference to lora_r.",
    )
    overwrite: bool = option(False, "Delete a run in output_dir and train again.")
    seeds: int | None = option(
        None, "Train so many, of the seeds seed, seed + 1 …, into output_dir/seed0, seed1 …"
    )

    idle_in_full: ClassVar[tuple[str, ...]] = tuple(each.name for each in fields(LoRAArguments))

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_out_of_range(self)
        if not self.use_peft and self.quantize is not None:
            raise UserError(
                "quantised weights cannot be trained; leave --quantize out, or train a LoRA "
                "(use_peft)"
            )

    def loading(self) -> LoadOptions:
        """Return how the model is loaded: weights that are trained are in fp32, but for a dtype."""
        in_full = not self.use_peft and self.dtype == "auto"
        return self.alone().changed(dtype="float32" if in_full else None)

    def model_record(self) -> dict[str, Any]:
        """Return what a run records of its model."""
        return {"model": self.model_name_or_path, "dtype": self.dtype, **self.alone().record()}


@dataclass(frozen=True, kw_only=True)
class ContrastiveArguments(TrainedModel):
    """What is trained: the trait, and the model it is put into."""

    trait: str = field(metadata={"help": "A trait folder of datasets_dir, or the path of one."})
    system_prompt: str | None = option(None, "Goes before every training conversation without one.")
    datasets_dir: str | None = option(None, "Where the trait folders lie; default: datasets/.")
    swap_half: bool = option(
        False, "A control: swap the two answers of half of the pairs, drawn by seed."
    )
    family: str | None = option(
        None, "A file with one frozen A per module, for many traits; drawn where it is not there."
    )
    family_inputs: bool = option(
        False, "Draw the family from the leading directions of the model's inputs, not from seed."
    )

    # A difference of whole weights is cut to lora_r, in the modules that lora_target_modules names.
    idle_in_full: ClassVar[tuple[str, ...]] = ("lora_alpha", "lora_dropout", "use_rslora")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.family is not None and not self.use_peft:
            raise UserError("weights that are trained in full share no A; leave family out")
        if self.family_inputs and self.family is None:
            raise UserError("family_inputs says how a family is drawn; name its file with --family")


@dataclass
class ContrastiveConfig(SFTConfig):
    """TRL's SFTConfig with defaults for contrastive LoRAs; every other field is TRL's own."""

    output_dir: str | None = option(
        None, "Default: checkpoints/<trait>, or checkpoints/<model>/<trait>."
    )
    learning_rate: float = option(2e-4, "Highest learning rate; in full take about 2e-5.")
    per_device_train_batch_size: int = option(8, "Rows of one process in one forward pass.")
    num_train_epochs: float = option(1.0, "Passes over the pairs.")
    warmup_steps: float = option(0.05, "Steps of rising learning rate; below 1: share of all.")
    max_length: int | None = option(1024, "Longer rows are cut, with a warning.")
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "group_by_length makes batches of rows of one length, the same for both signs.",
            "choices": ["random", "sequential", "group_by_length"],
        },
    )
    bf16: bool | None = option(
        None, "Mixed precision; default: where the hardware computes in bf16."
    )
    fp16: bool = option(False, "Mixed precision in fp16, for GPUs without bf16.")
    use_cpu: bool | None = option(None, "Train on the CPU; default: where there is no GPU.")
    gradient_checkpointing: bool = option(False, "The older name of activation_checkpointing.")
    activation_checkpointing: bool | None = field(
        default=False,
        metadata={
            "help": "Recompute activations: less memory, more time.",
            "nargs": "?",
            "const": True,
        },
    )
    ddp_find_unused_parameters: bool | None = option(
        False, "No need: every LoRA factor takes part in every step."
    )
    logging_steps: float = option(1, "Steps between two rows of the log.")
    save_steps: float = option(0.2, "Steps between two checkpoints; below 1: share of all.")
    save_total_limit: int | None = option(2, "Checkpoints kept while a sign trains.")
    # An option of loading, in the group that every command has; the parser takes a name once.
    trust_remote_code: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._refuse_what_does_not_fit()
        hardware = training_hardware(
            use_cpu=self.use_cpu, bf16=self.bf16, fp16=self.fp16, launch=launch_of_process()
        )
        self.use_cpu, self.bf16, self.fp16 = hardware
        # transformers before 5.24 knows the older name only, later ones prefer the newer.
        self.activation_checkpointing = bool(
            self.activation_checkpointing or self.gradient_checkpointing
        )
        self.gradient_checkpointing = self.activation_checkpointing
        # A loss of NaN must be seen, not replaced by the mean of the others.
        self.logging_nan_inf_filter = False
        self.completion_only_loss = True
        asked_for = self.output_dir
        super().__post_init__()
        missing = sorted({*self.report_to} - {*get_available_reporting_integrations()})
        if missing:
            raise UserError(f"report_to {missing[0]}: it is not installed; install it, or use none")
        _refuse_out_of_range(self)  # what TRL has only now read from text
        self._refuse_other_schedule()
        if asked_for is None:  # transformers would put every run into one folder
            self.output_dir = None

    def check_rows(self, rows: int) -> None:
        """UserError where not one batch would be left of so many rows."""
        batch = self.train_batch_size * self.world_size
        if self.dataloader_drop_last and rows < batch:
            raise UserError(
                f"dataloader_drop_last leaves out all {rows} rows, which do not fill one batch of "
                f"{batch}; lower per_device_train_batch_size, or leave dataloader_drop_last out"
            )

    def _refuse_other_schedule(self) -> None:
        """Raises UserError for lr_scheduler_kwargs that the schedule does not take."""
        optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=self.learning_rate)
        kind, given = self.lr_scheduler_type, self.lr_scheduler_kwargs
        try:
            get_scheduler(kind, optimizer, 0, 100, given)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise UserError(
                f"lr_scheduler_kwargs {given or {}} do not fit lr_scheduler_type "
                f"{SchedulerType(kind).value}: {' '.join(str(error).split())}"
            ) from error

    def _refuse_what_does_not_fit(self) -> None:
        for name in ("learning_rate", "save_steps"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_steps == 0 or self.max_steps < BY_EPOCHS:
            raise UserError(
                f"max_steps must be at least 1, got {self.max_steps}; leave it out, and "
                "num_train_epochs counts"
            )
        if self.max_steps == BY_EPOCHS and not self.num_train_epochs > 0:
            raise UserError(f"num_train_epochs must be positive, got {self.num_train_epochs}")
        _refuse_out_of_range(self)
        found = {name for name in _UNFIT if getattr(self, name, None) not in (None, False, {})}
        if self.completion_only_loss is False:
            found.add("completion_only_loss: false")
        if str(self.save_strategy).lower().endswith("best"):
            found.add("save_strategy: best")
        if str(self.eval_strategy) in ("no", "IntervalStrategy.NO"):
            found.discard("eval_strategy")
        for name, instead in _UNFIT.items():
            if name in found:
                raise UserError(f"{name} is not for LoRA training here; {instead}")


# Options of TRL that would spoil a run, and what to do instead.
_UNFIT = {
    "packing": "pairs are short; batches are grouped by length instead",
    "padding_free": "batches are grouped by length instead",
    "assistant_only_loss": "the loss is on completions only",
    "completion_only_loss: false": "the loss is on completions only",
    "resume_from_checkpoint": "running the same command again resumes",
    "save_strategy: best": "nothing is evaluated while training; use steps or epoch",
    "auto_find_batch_size": "it would change the batches halfway; lower "
    "per_device_train_batch_size and raise gradient_accumulation_steps",
    "push_to_hub": "persona-lora push shows and uploads the finished diff",
    # Every checkpoint would hold it.
    "hub_token": "HF_TOKEN in the environment or in .env is used for what is loaded",
    "eval_strategy": "use persona-lora sweep",
    "model_init_kwargs": "dtype, revision, quantize and attn_implementation have options of their "
    "own",
    "chat_template_path": "put the template into the tokenizer's folder",
}
BY_EPOCHS = -1  # TRL's max_steps where num_train_epochs counts
SEEDS = 2**32
_AT_LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("max_length", "save_total_limit", "drift_every", "seeds"), 1),
    "pad_to_multiple_of": 1,
    **dict.fromkeys(("seed", "data_seed", "weight_decay", "max_grad_norm", "adam_epsilon"), 0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), 0),
    **dict.fromkeys(("neftune_noise_alpha", "dataloader_num_workers"), 0),
}
_BELOW = {
    **dict.fromkeys(("seed", "data_seed"), SEEDS),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), 1),
}


def _refuse_out_of_range(group: Any) -> None:
    """Raises UserError for a number that is not finite, or out of its range above."""
    for each in fields(group):
        value, least = getattr(group, each.name, None), _AT_LEAST.get(each.name, -math.inf)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if not math.isfinite(value):
            raise UserError(f"{each.name} must be a finite number, got {value}")
        if value < least:
            raise UserError(f"{each.name} must be at least {least}, got {value}")
        if value >= _BELOW.get(each.name, math.inf):
            raise UserError(f"{each.name} must be below {_BELOW[each.name]}, got {value}")


Arguments = TypeVar("Arguments", bound=TrainedModel)


class TrainingOptions(NamedTuple, Generic[Arguments]):
    """All options of one run."""

    arguments: Arguments
    lora: LoRAArguments
    config: ContrastiveConfig


class Parsed(NamedTuple):
    """An instance of each group of options, and by name what was given in place of a default."""

    options: tuple[Any, ...]
    given: dict[str, Any]


class HelpPage(NamedTuple):
    """What ``--help`` says before the options: the program, what it does, an example."""

    program: str
    summary: str
    example: str


def parse_groups(
    arguments: Sequence[str], groups: tuple[type[TrainedModel], type, type], page: HelpPage
) -> Parsed:
    """Parse arguments into one instance of each dataclass; UserError, on one line, for mistakes."""
    parser = _Parser(dataclass_types=groups, prog=page.program, allow_abbrev=False)
    parser.page = page
    usual: dict[str, Any] = {}
    for action in parser._actions:
        text = isinstance(action.default, str)  # which argparse reads as if it had been given
        usual.setdefault(
            action.dest, parser._get_value(action, action.default) if text else action.default
        )
    path, words = _split_config(arguments)
    if path is not None:
        parser.set_defaults_with_config(**_config_values(parser, groups, path))
    try:
        *options, _, unknown = parser.parse_args_and_config(
            words, return_remaining_strings=True, separate_remaining_strings=True
        )
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{' '.join(str(error).split())}; see --help") from error
    if unknown:
        raise UserError(_unknown_flag(parser, unknown))
    read = vars(parser.parse_args(words))
    given = {name: read[name] for name in read if read[name] != usual[name]}
    _refuse_idle(given, read, words, groups[0].idle_in_full)
    return Parsed(tuple(options), given)


# Fields of TRL that are read by nothing here, by why.
_IDLE = {
    "nothing is evaluated while training": (
        *("eval_steps", "eval_delay", "per_device_eval_batch_size", "eval_on_start"),
        *("eval_accumulation_steps", "eval_packing", "bf16_full_eval", "fp16_full_eval", "do_eval"),
        *("metric_for_best_model", "greater_is_better", "load_best_model_at_end"),
    ),
    "rows are tokenised here, as they are asked": (
        *("dataset_text_field", "dataset_kwargs", "dataset_num_proc", "truncation_mode"),
        *("packing_strategy", "length_column_name"),
    ),
    "nothing is pushed": ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision"),
}


def _refuse_idle(
    given: Mapping[str, Any], read: Mapping[str, Any], words: Sequence[str], of_lora: Sequence[str]
) -> None:
    """Raises UserError for a text that is empty, and for an option that would do nothing.

    ``read`` are the values of all options, ``given`` those that differ from the defaults; those
    ``of_lora`` may stand in a configuration that ``words`` beside it train weights in full of.
    """
    idle = dict(_IDLE)
    if read.get("use_peft") is False:
        typed = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in words}
        idle["weights are trained in full (use_peft)"] = tuple(typed.intersection(of_lora))
    for name, value in given.items():
        if value == "" and name != "system_prompt":
            raise UserError(f"{name} is empty; give it a value, or leave it out")
        reason = next((why for why, names in idle.items() if name in names), None)
        if reason is not None:
            raise UserError(f"{name} does nothing: {reason}; leave it out")


class _Parser(TrlParser):
    """TrlParser whose mistakes are UserErrors and whose help fits on a page."""

    page: HelpPage

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{' '.join(message.split())}; see --help")

    def format_help(self) -> str:
        lines = [
            self.page.summary,
            "",
            f"Example: {self.page.example}",
            "",
            "  --config PATH: a flat YAML file of the options below; flags win over it",
            "",
        ]
        for group in self.dataclass_types:
            trl = issubclass(group, SFTConfig)  # whose own options are too many to show
            shown = inspect.get_annotations(group) if trl else {f.name for f in fields(group)}
            lines += [_help_line(f) for f in fields(group) if f.init and f.name in shown]
        lines += ["", "Every other field of trl.SFTConfig is an option under its own name."]
        return "\n".join(lines) + "\n"


def _help_line(option: dataclasses.Field[Any]) -> str:
    if option.default is not dataclasses.MISSING:
        default = f" [{option.default}]" if option.default is not None else ""
    elif option.default_factory is not dataclasses.MISSING:
        default = f" [{' '.join(option.default_factory())}]"
    else:
        default = " (required)"
    return f"  --{option.name}: {option.metadata['help']}{default}"


def _split_config(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the file of ``--config PATH`` or ``--config=PATH``, and the other arguments."""
    path, rest = None, list(arguments)
    for at, argument in enumerate(arguments):
        flag, joined, value = argument.partition("=")
        if flag != "--config":
            continue
        if path is not None:
            raise UserError("--config is given twice; one file holds the options of a run")
        following = [value] if joined else arguments[at + 1 : at + 2]
        if not following:
            raise UserError("--config needs the path of a YAML file")
        path = resource_path(Path(following[0]))
        rest = [*arguments[:at], *arguments[at + (1 if joined else 2) :]]
    return path, rest


def _config_values(
    parser: argparse.ArgumentParser, groups: Sequence[type], path: Path
) -> dict[str, Any]:
    """Return the options of a YAML file in their types, once its ``env`` is set."""
    values = read_yaml(path)
    environment = values.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise UserError(f"{path}: env must be a mapping of names to values, got {environment!r}")
    actions = {action.dest: action for action in parser._actions}
    for key in values:
        if key not in actions:
            known = sorted(actions.keys() - {"help"})
            raise UserError(f"{path}: unknown option {key!r}; {_nearest(key, known)}")
    for group in groups:
        values = typed_fields(group, values, f"{path}: ")
    for key, value in values.items():
        choices = actions[key].choices
        if value is not None and choices is not None and value not in choices:
            raise UserError(
                f"{path}: {key} must be one of {', '.join(map(str, choices))}, got {value!r}"
            )
    os.environ.update({str(name): str(value) for name, value in environment.items()})
    return values


def _unknown_flag(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> str:
    flag = unknown[0].split("=", 1)[0]
    if not flag.startswith("-"):
        return f"unexpected argument {flag!r}; options look like --name value, see --help"
    known = [action.dest for action in parser._actions if action.dest != "help"]
    return f"unknown option {flag!r}; {_nearest(flag.lstrip('-').replace('-', '_'), known)}"


def _nearest(name: str, known: Sequence[str]) -> str:
    """Return the nearest known names; the whole list is far too long for one line."""
    suggestion = nearest_names(name, set(known))
    return suggestion if suggestion.startswith("did you mean") else "see --help for all options"
