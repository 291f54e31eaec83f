"""The options of training: dataclasses, and the one parser over them.

Names are TRL's and PEFT's own. A flat YAML file by ``--config``, flags win over it, unknown keys
fail. Knows options; refuses to know what is done with them.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from trl import SFTConfig, TrlParser

from persona_lora.core.errors import UserError, nearest_names
from persona_lora.core.resources import resource_path
from persona_lora.models.hardware import training_hardware
from persona_lora.models.load_options import DEFAULT_MODEL, LoadOptions
from persona_lora.training.launch import launch_of_process
from persona_lora.training.lora import LoRAArguments

CHECKPOINTS = Path("checkpoints")


@dataclass(frozen=True, kw_only=True)
class TrainedModel(LoadOptions):
    """The model that is trained, and how it is loaded: the options of every command."""

    model_name_or_path: str = field(
        default=DEFAULT_MODEL,
        metadata={
            "help": "The packaged model, a local model folder, or a hub id.",
            "aliases": ["--model"],
        },
    )

    def model_record(self) -> dict[str, Any]:
        """Return what a run records of its model."""
        return {"model": self.model_name_or_path, "dtype": self.dtype, **self.alone().record()}


@dataclass(frozen=True, kw_only=True)
class ContrastiveArguments(TrainedModel):
    """What is trained: the trait, and the model it is put into."""

    trait: str = field(metadata={"help": "A trait folder of datasets_dir, or the path of one."})
    system_prompt: str | None = field(
        default=None, metadata={"help": "Goes before every training conversation without one."}
    )
    datasets_dir: str | None = field(
        default=None, metadata={"help": "Where the trait folders lie; default: datasets/."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Delete a run in output_dir and train again."}
    )


@dataclass
class ContrastiveConfig(SFTConfig):
    """TRL's SFTConfig with defaults for contrastive LoRAs; every other field is TRL's own."""

    output_dir: str | None = field(
        default=None,
        metadata={"help": "Default: checkpoints/<trait>, or checkpoints/<model>/<trait>."},
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "Highest learning rate."})
    per_device_train_batch_size: int = field(
        default=8, metadata={"help": "Rows of one process in one forward pass."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the pairs."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Steps of rising learning rate; below 1: share of all."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Longer rows are cut, with a warning."}
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "group_by_length makes batches of rows of one length, the same for both signs.",
            "choices": ["random", "sequential", "group_by_length"],
        },
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Mixed precision; default: where the hardware computes in bf16."},
    )
    fp16: bool = field(
        default=False, metadata={"help": "Mixed precision in fp16, for GPUs without bf16."}
    )
    use_cpu: bool | None = field(
        default=None, metadata={"help": "Train on the CPU; default: where there is no GPU."}
    )
    activation_checkpointing: bool | None = field(
        default=False,
        metadata={
            "help": "Recompute activations: less memory, more time.",
            "nargs": "?",
            "const": True,
        },
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "No need: every LoRA factor takes part in every step."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Steps between two rows of the log."})
    save_steps: float = field(
        default=0.2, metadata={"help": "Steps between two checkpoints; below 1: share of all."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints kept while a sign trains."}
    )
    # An option of loading, in the group that every command has; the parser takes a name once.
    trust_remote_code: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._refuse_what_does_not_fit()
        hardware = training_hardware(
            use_cpu=self.use_cpu, bf16=self.bf16, fp16=self.fp16, launch=launch_of_process()
        )
        self.use_cpu, self.bf16, self.fp16 = hardware
        # A loss of NaN must be seen, not replaced by the mean of the others.
        self.logging_nan_inf_filter = False
        self.completion_only_loss = True
        asked_for = self.output_dir
        super().__post_init__()
        if asked_for is None:  # transformers would put every run into one folder
            self.output_dir = None

    def _refuse_what_does_not_fit(self) -> None:
        if self.per_device_train_batch_size < 1:
            raise UserError(
                "per_device_train_batch_size must be at least 1, got "
                f"{self.per_device_train_batch_size}"
            )
        if self.gradient_accumulation_steps < 1:
            raise UserError(
                "gradient_accumulation_steps must be at least 1, got "
                f"{self.gradient_accumulation_steps}"
            )
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise UserError(f"num_train_epochs must be positive, got {self.num_train_epochs}")
        unfit = {
            "packing": (self.packing, "pairs are short; batches are grouped by length instead"),
            "padding_free": (self.padding_free, "batches are grouped by length instead"),
            "assistant_only_loss": (self.assistant_only_loss, "the loss is on completions only"),
            "completion_only_loss: false": (
                self.completion_only_loss is False,
                "the loss is on completions only",
            ),
            "resume_from_checkpoint": (
                self.resume_from_checkpoint is not None,
                "running the same command again resumes",
            ),
            "push_to_hub": (self.push_to_hub, "upload the finished folder yourself"),
            "hub_token": (
                self.hub_token is not None,  # every checkpoint would hold it
                "HF_TOKEN in the environment or in .env is used for what is loaded",
            ),
            "eval_strategy": (str(self.eval_strategy) not in _NO, "use persona-lora sweep"),
            "model_init_kwargs": (
                bool(self.model_init_kwargs),
                "dtype, revision, quantize and attn_implementation have options of their own",
            ),
            "chat_template_path": (
                self.chat_template_path is not None,
                "put the template into the tokenizer's folder",
            ),
        }
        for name, (is_set, instead) in unfit.items():
            if is_set:
                raise UserError(f"{name} is not for LoRA training here; {instead}")


_NO = ("no", "IntervalStrategy.NO")


class ContrastiveOptions(NamedTuple):
    """All options of one run."""

    arguments: ContrastiveArguments
    lora: LoRAArguments
    config: ContrastiveConfig


class HelpPage(NamedTuple):
    """What ``--help`` says before the options: the program, what it does, an example."""

    program: str
    summary: str
    example: str


CONTRASTIVE_PAGE = HelpPage(
    "train_lora.py",
    "Train a positive and a negative LoRA for a trait, and take their difference.",
    "python train_lora.py --config train_configs/sycophancy.yaml --num_train_epochs 1",
)


def parse_arguments(arguments: Sequence[str]) -> ContrastiveOptions:
    """Parse the command line of contrastive training; UserError for what cannot be used."""
    groups = (ContrastiveArguments, LoRAArguments, ContrastiveConfig)
    return ContrastiveOptions(*parse_groups(arguments, groups, CONTRASTIVE_PAGE))


def parse_groups(
    arguments: Sequence[str], groups: tuple[type, ...], page: HelpPage
) -> tuple[Any, ...]:
    """Parse arguments into one instance of each dataclass; UserError, on one line, for mistakes."""
    parser = _Parser(dataclass_types=groups, prog=page.program, allow_abbrev=False)
    parser.page = page
    given = _joined_config(arguments)
    _check_config_file(parser, given)
    try:
        *options, _, unknown = parser.parse_args_and_config(
            given, return_remaining_strings=True, separate_remaining_strings=True
        )
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{_one_line(error)}; see --help") from error
    if unknown:
        raise UserError(_unknown_flag(parser, unknown))
    return tuple(options)


class _Parser(TrlParser):
    """TrlParser whose mistakes are UserErrors and whose help fits on a page."""

    page: HelpPage

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{_one_line(message)}; see --help")

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
            lines += [_help_line(each) for each in _own_fields(group)]
        lines += ["", "Every other field of trl.SFTConfig is an option under its own name."]
        return "\n".join(lines) + "\n"


def _own_fields(group: type) -> list[dataclasses.Field[Any]]:
    """Return the options of a group that are not TRL's."""
    fields = [each for each in dataclasses.fields(group) if each.init]
    if not issubclass(group, SFTConfig):
        return fields
    own = inspect.get_annotations(group)
    return [each for each in fields if each.name in own]


def _help_line(option: dataclasses.Field[Any]) -> str:
    if option.default is not dataclasses.MISSING:
        default = f" [{option.default}]" if option.default is not None else ""
    elif option.default_factory is not dataclasses.MISSING:
        default = f" [{' '.join(option.default_factory())}]"
    else:
        default = " (required)"
    return f"  --{option.name}: {option.metadata['help']}{default}"


def _joined_config(arguments: Sequence[str]) -> list[str]:
    """Split ``--config=PATH``, as TrlParser wants it, and find the file where it came along."""
    given: list[str] = []
    for argument in arguments:
        if argument.startswith("--config="):
            given += ["--config", argument.removeprefix("--config=")]
        else:
            given.append(argument)
    if "--config" in given[:-1]:
        at = given.index("--config") + 1
        given[at] = str(resource_path(Path(given[at])))
    return given


def _check_config_file(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Name the first mistake of the YAML file: TrlParser would name none or all of them."""
    if "--config" not in arguments:
        return
    following = arguments[arguments.index("--config") + 1 :]
    if not following:
        raise UserError("--config needs the path of a YAML file")
    path = Path(following[0])
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold one YAML mapping of options, one a line")
    actions = {action.dest: action for action in parser._actions}
    for key, value in values.items():
        if key == "env":
            continue
        if key not in actions:
            known = sorted(actions.keys() - {"help"})
            raise UserError(f"{path}: unknown option {key!r}; {_nearest(str(key), known)}")
        _check_value(parser, actions[key], value, path)


def _check_value(
    parser: argparse.ArgumentParser, action: argparse.Action, value: Any, path: Path
) -> None:
    """Hold a value of the YAML file to the type of its option, as a flag's would be."""
    if value is None or isinstance(value, (dict, bool)):
        return
    for each in value if isinstance(value, list) else [value]:
        try:
            parser._get_value(action, str(each))
        except argparse.ArgumentError as error:
            raise UserError(f"{path}: {action.dest}: {error.message}") from error
    if action.choices is not None and value not in action.choices:
        choices = ", ".join(map(str, action.choices))
        raise UserError(f"{path}: {action.dest} must be one of {choices}, got {value!r}")


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


def _one_line(error: object) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()
