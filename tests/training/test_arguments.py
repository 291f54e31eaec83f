from __future__ import annotations

import dataclasses
import math
import os
import re
import typing
from pathlib import Path

import pydantic
import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.settings import typed_fields
from persona_lora.models.loading import DEFAULT_MODEL
from persona_lora.training.arguments import ContrastiveConfig, parse_groups
from persona_lora.training.contrastive import GROUPS, PAGE
from persona_lora.training.finetune import GROUPS as FINETUNE
from persona_lora.training.finetune import FinetuneArguments
from persona_lora.training.lora import LoRAArguments
from persona_lora.training.runner import by_seed
from tests.training.conftest import parse_arguments


def _yaml(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_are_those_of_the_packaged_model():
    arguments, lora, config = parse_arguments(["--trait", "evil"])
    assert (arguments.model_name_or_path, arguments.dtype) == (DEFAULT_MODEL, "auto")
    assert (lora.lora_r, lora.lora_alpha, lora.lora_target_modules) == (16, 32, ["all-linear"])
    assert (config.learning_rate, config.per_device_train_batch_size) == (2e-4, 8)
    assert config.completion_only_loss
    assert not config.activation_checkpointing
    assert not config.gradient_checkpointing
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        config = parse_arguments(["--trait", "evil", f"--{name}", "true"]).config
        assert config.activation_checkpointing
        assert config.gradient_checkpointing
    assert not config.logging_nan_inf_filter
    assert config.report_to == []


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path):
    path = _yaml(tmp_path, "trait: evil\nlora_r: 4\nlearning_rate: 1e-3\nseed: 7\n")
    arguments, lora, config = parse_arguments(["--config", path, "--lora_r", "2"])
    assert (arguments.trait, lora.lora_r, config.learning_rate, config.seed) == ("evil", 2, 1e-3, 7)


def test_config_is_found_with_an_equals_sign_too(tmp_path: Path):
    path = _yaml(tmp_path, "trait: evil\nlora_target_modules: [q_proj, v_proj]\n")
    arguments, lora, _ = parse_arguments([f"--config={path}"])
    assert (arguments.trait, lora.lora_target_modules) == ("evil", ["q_proj", "v_proj"])


def test_environment_block_is_set(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PERSONA_LORA_TEST", "before")
    parse_arguments(["--config", _yaml(tmp_path, "env:\n  PERSONA_LORA_TEST: after\ntrait: evil")])
    assert os.environ["PERSONA_LORA_TEST"] == "after"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trait: evil\nlearning_rat: 1", r"'learning_rat'; did you mean 'learning_rate'"),
        ("trait: evil\nuse_dora: true", r"'use_dora'; did you mean 'use_rslora'"),
        ("trait: evil\nlora_r: many", "lora_r must be a whole number, got 'many'"),
        ("trait: evil\nlora_r: 2.5", r"lora_r must be a whole number, got 2\.5"),
        ("trait: evil\nlearning_rate: [fast]", r"learning_rate must be a number, got \['fast'\]"),
        ("trait: evil\ndtype: int3", "dtype must be one of auto, float32"),
        ("- trait\n- evil", "must hold one YAML mapping"),
        ("trait: [evil", "is not valid YAML"),
        ("lora_r: 4", "required: --trait"),
    ],
)
def test_mistakes_in_the_file_are_named_on_one_line(tmp_path: Path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_arguments(["--config", _yaml(tmp_path, text)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat", "1"], r"'--learning_rat'; did you mean 'learning_rate'"),
        (["--lora-rank=4"], r"'--lora-rank'; did you mean .*'lora_r'"),
        (["--lora_r", "many"], "invalid"),
        (["stray"], "unexpected argument 'stray'"),
        (["--lora_r", "0"], "lora_r must be at least 1"),
        (["--learning_rate", "-1"], "learning_rate must be positive"),
        (["--learning_rate", "nan"], "learning_rate must be positive"),
        (["--num_train_epochs", "0"], "num_train_epochs must be positive"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps"),
        (["--packing", "true"], "packing"),
        (["--assistant_only_loss", "true"], "assistant_only_loss"),
        (["--completion_only_loss", "false"], "completion_only_loss"),
        (["--resume_from_checkpoint", "x"], "running the same command again"),
        (["--eval_strategy", "steps"], "eval_strategy"),
        (["--push_to_hub", "true"], "push_to_hub"),
        (["--hub_token", "s3cret"], "hub_token is not for LoRA training here; HF_TOKEN"),
        (["--lr_scheduler_type", "zigzag"], "zigzag"),
        (["--output_dir", ""], "output_dir is empty; give it a value, or leave it out"),
        (["--datasets_dir", ""], "datasets_dir is empty; give it a value, or leave it out"),
        (["--trait="], "trait is empty"),
        (["--eval_steps", "5"], "eval_steps does nothing: nothing is evaluated while training"),
        (["--dataset_text_field", "x"], "dataset_text_field does nothing: rows are tokenised"),
        (["--learning_rate", "inf"], "learning_rate must be a finite number, got inf"),
        (["--num_train_epochs", "inf"], "num_train_epochs must be a finite number, got inf"),
        (["--weight_decay", "nan"], "weight_decay must be a finite number, got nan"),
        (["--weight_decay", "-1"], r"weight_decay must be at least 0, got -1\.0"),
        (["--neftune_noise_alpha", "nan"], "neftune_noise_alpha must be a finite number"),
        (["--max_steps", "0"], "max_steps must be at least 1, got 0; leave it out"),
        (["--max_steps", "-5"], "max_steps must be at least 1, got -5; leave it out"),
        (["--save_steps", "0"], r"save_steps must be positive, got 0\.0"),
        (["--save_steps", "nan"], "save_steps must be positive, got nan"),
        (["--save_total_limit", "0"], "save_total_limit must be at least 1, got 0"),
        (["--max_length", "-3"], "max_length must be at least 1, got -3"),
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--data_seed", "4294967296"], "data_seed must be below 4294967296, got 4294967296"),
        (["--adam_beta1", "2"], r"adam_beta1 must be below 1, got 2\.0"),
        (["--dataloader_num_workers", "-1"], "dataloader_num_workers must be at least 0, got -1"),
        (["--save_strategy", "best"], "save_strategy: best .* use steps or epoch"),
        (["--auto_find_batch_size", "true"], "auto_find_batch_size .* per_device_train_batch_size"),
        (["--report_to", "neptune"], "report_to neptune: it is not installed; install it"),
        (["--pad_to_multiple_of", "0"], "pad_to_multiple_of must be at least 1, got 0"),
        (
            ["--lr_scheduler_kwargs", '{"num_cycles": 3}'],
            r"lr_scheduler_kwargs {'num_cycles': 3} do not fit lr_scheduler_type linear: .*num_cyc",
        ),
        (["--lr_scheduler_type", "warmup_stable_decay"], r"{} do not fit .*: .*num_decay_steps"),
        (["--config"], "--config needs"),
        (["--config", "no/such.yaml"], "does not exist"),
    ],
)
def test_mistakes_in_flags_are_named_on_one_line(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_arguments(["--trait", "evil", *flags])
    assert "\n" not in str(caught.value)


def test_rows_that_fill_no_batch_are_refused_where_the_last_one_is_dropped():
    words = ("--per_device_train_batch_size", "16", "--dataloader_drop_last", "true")
    config = parse_arguments(["--trait", "evil", *words]).config
    config.check_rows(16)
    with pytest.raises(UserError, match="leaves out all 15 rows, which do not fill one batch of 1"):
        config.check_rows(15)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stop_above": math.nan, "drift_diffs": ["d"]}, "stop_above must be a finite number"),
        ({"stop_above": -1.0, "drift_diffs": ["d"]}, r"stop_above must be positive, got -1\.0"),
        ({"drift_every": 0, "drift_diffs": ["d"]}, "drift_every must be at least 1, got 0"),
        ({"stop_above": 1.0}, "stop_above does nothing without drift_diffs; name them"),
        ({"drift_plain": True}, "drift_plain does nothing without drift_diffs"),
        ({"drift_prompts": "p"}, "drift_prompts does nothing without drift_diffs"),
        (
            {"drift_prompts": "p", "drift_plain": True, "drift_diffs": ["d"]},
            "drift_prompts does nothing with drift_plain",
        ),
    ],
)
def test_drift_is_watched_as_it_is_asked_for_or_refused(given, message):
    with pytest.raises(UserError, match=message):
        FinetuneArguments(train_file="x", **given)


def test_a_lora_option_is_refused_where_all_weights_are_trained(tmp_path):
    words = ["--train_file", "x.jsonl", "--use_peft", "false"]
    usual = _yaml(tmp_path, "lora_r: 8")  # of a file that others train LoRA with
    assert not parse_groups(["--config", usual, *words], FINETUNE, PAGE).options[0].use_peft
    with pytest.raises(UserError, match=r"lora_r does nothing: weights .* in full .* leave it out"):
        parse_groups([*words, "--lora_r", "4"], FINETUNE, PAGE)


def test_an_empty_system_prompt_is_one():
    given = parse_groups(["--trait", "evil", "--system_prompt", ""], GROUPS, PAGE).given
    assert given["system_prompt"] == ""


def test_the_last_of_several_seeds_is_held_to_the_range_of_seeds():
    options = parse_arguments(["--trait", "evil", "--seeds", "2", "--seed", f"{2**32 - 1}"])
    with pytest.raises(UserError, match=r"the last of the seeds is 4294967296, .* lower seed"):
        by_seed(options, Path("out"))


@pytest.mark.parametrize("group", [ContrastiveConfig, LoRAArguments, FinetuneArguments])
def test_every_field_of_a_file_is_held_to_its_type(tmp_path, group):
    """What is not of the field's type is one line; what is accepted is of it."""
    hints = typing.get_type_hints(group)
    for each in dataclasses.fields(group):
        for value in (True, 5, 0.5, "0.5", "word", [1.5], ["word"], {"a": 1}):
            try:
                found = typed_fields(group, {each.name: value}, "f.yaml: ")[each.name]
            except UserError as error:
                text = str(error)
                assert re.fullmatch(f"f.yaml: {each.name} must be .*, got .*", text)
                continue
            pydantic.TypeAdapter(hints[each.name]).validate_python(found, strict=True)


def test_numbers_are_numbers_however_they_are_written(tmp_path):
    text = (
        "trait: evil\nlearning_rate: 2e-4\nnum_train_epochs: '3'\nlora_r: 1e1\n"
        "lora_target_modules: q_proj\nlr_scheduler_kwargs: {min_lr: 1e-5}\nwarmup_steps: 5E-2"
        "\nlr_scheduler_type: cosine_with_min_lr"
    )
    options = parse_arguments(["--config", _yaml(tmp_path, text)])
    assert options.config.learning_rate == 2e-4
    assert options.config.num_train_epochs == 3.0
    assert (options.lora.lora_r, options.lora.lora_target_modules) == (10, ["q_proj"])
    assert options.config.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert options.config.warmup_steps == 0.05


def test_help_shows_an_example_and_the_defaults_on_one_page(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert PAGE.example in text
    assert "--lora_r: Rank of the LoRA factors, or of the cut difference. [16]" in text
    assert "--learning_rate: Highest learning rate; in full take about 2e-5. [0.0002]" in text
    assert "--trait" in text
    assert len(text.splitlines()) < 50
