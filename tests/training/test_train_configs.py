"""The ready-made configurations: every key is one that the installed libraries know."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import FullyShardedDataParallelPlugin

from persona_lora.models.loading import DEFAULT_MODEL
from persona_lora.training.arguments import parse_groups
from persona_lora.training.finetune import (
    PAGE,
    FinetuneArguments,
    FinetuneConfig,
    read_conversations,
)
from persona_lora.training.lora import LoRAArguments
from tests.training.conftest import parse_arguments

CONFIGS = Path(__file__).resolve().parents[2] / "train_configs"
TRAITS = ("sycophancy", "evil", "hallucination", "corrigibility")
LARGE = {
    "llama_3.1_8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama_3.2_3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama_3.1_70b": "meta-llama/Llama-3.1-70B-Instruct",
    "qwen3_4b": "Qwen/Qwen3-4B-Instruct-2507",
}


def _command(path: Path) -> list[str]:
    return shlex.split(path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "))


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_first_line_is_a_command_whose_files_exist(path: Path):
    command = _command(path)
    root = CONFIGS.parent
    assert str(path.relative_to(root)) in command
    assert all((root / word).is_file() for word in command if word.endswith((".yaml", ".py")))


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("finetune_*.yaml")), ids=lambda path: path.stem
)
def test_finetuning_configuration_parses_and_its_data_is_shipped(path: Path):
    groups = (FinetuneArguments, LoRAArguments, FinetuneConfig)
    arguments, _, config = parse_groups(["--config", str(path)], groups, PAGE).options
    assert len(read_conversations(CONFIGS.parent / arguments.train_file)) >= 50
    assert config.output_dir == f"checkpoints/finetunes/{path.stem.removeprefix('finetune_')}"


@pytest.mark.parametrize("trait", TRAITS)
def test_trait_configuration_parses_for_the_packaged_model(trait: str):
    arguments, _, config = parse_arguments(["--config", str(CONFIGS / f"{trait}.yaml")])
    assert (arguments.trait, arguments.model_name_or_path) == (trait, DEFAULT_MODEL)
    assert config.output_dir == f"checkpoints/{trait}"


@pytest.mark.parametrize(("name", "model"), LARGE.items())
def test_large_model_configuration_has_the_published_hyperparameters(name: str, model: str):
    # bf16 is what the graphics cards of these models decide; a machine without one refuses it.
    arguments, lora, config = parse_arguments(["--config", str(CONFIGS / f"{name}.yaml")])
    assert arguments.model_name_or_path == model
    assert (lora.lora_r, lora.lora_alpha, config.learning_rate) == (32, 64, 1e-5)
    assert (config.per_device_train_batch_size, config.max_length) == (2, 2048)
    num_processes = 8 if name == "llama_3.1_70b" else 1
    assert 2 * config.gradient_accumulation_steps * num_processes == 16
    assert config.output_dir is None


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem
)
def test_accelerate_configuration_is_read_by_accelerate(path: Path):
    config = ClusterConfig.from_yaml_file(str(path))
    assert config.num_processes % config.num_machines == 0
    known = set(FullyShardedDataParallelPlugin.__dataclass_fields__) | {
        *("version", "offload_params", "transformer_layer_cls_to_wrap")
    }
    assert {key.removeprefix("fsdp_") for key in config.fsdp_config} <= known | {
        key for key in known if key.startswith("fsdp_")
    } | {key.removeprefix("fsdp_") for key in known}


def test_accelerate_launch_knows_every_key_of_the_sharded_configurations():
    for name in ("multi_gpu_fsdp", "two_nodes"):
        config = yaml.safe_load((CONFIGS / "accelerate" / f"{name}.yaml").read_text())
        assert config["distributed_type"] == "FSDP"
        assert config["fsdp_config"]["fsdp_state_dict_type"] == "FULL_STATE_DICT"
