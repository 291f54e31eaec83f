"""Every command that loads a model has the same options for it, and they reach transformers."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import huggingface_hub
import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from persona_lora import cli
from persona_lora.cli.option_groups import with_groups
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.judges.labels import AnswerFile, RatingSheet
from persona_lora.models import hardware, loading
from persona_lora.models.load_options import LoadOptions
from tests.scenes import commands

ROOT = Path(__file__).resolve().parents[1]
CONFIG = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
OPTIONS = {field.name for field in dataclasses.fields(LoadOptions)}
HUB = "somebody/a-model"
DATASETS = ("--datasets-dir", ROOT / "datasets")
TRAIT = ("--trait", "evil", *DATASETS)
PERSONAS = ("--persona-dir", ROOT / "personas")
VECTOR = ("--vector", "v.safetensors")
# What reads weights as they lie on the disk, or asks an endpoint, and so loads no model.
LOADS_NOTHING = {"export", "engine command"}
COMMANDS = {
    "evaluate": (*TRAIT, "--output", "out/x.csv", "--model", HUB),
    "calibrate": ("--diff", "diff", *DATASETS, "--model", HUB),
    "sweep": (*TRAIT, "--diff", "diff", "--output", "out", "--model", HUB),
    "tune-prompt": (*TRAIT, "--output", "out", "--model", HUB),
    "extract": (*TRAIT, "--output", "out", "--model", HUB),
    "compare": (
        *TRAIT, "--diff", "diff", "--activation-vector", "v.safetensors", "--output", "out",
        "--model", HUB,
    ),
    "benchmark": ("--diff", "diff", "--output", "out", "--model", HUB),
    "optimize": (
        "--persona-id", "episode-000101_B", *PERSONAS, "--save-dir", "out", "--traits", "evil",
        "--model", HUB,
    ),
    "compare-methods": (
        "--persona-id", "episode-000101_B", *PERSONAS, "--save-dir", "out", "--methods", "prompt",
        "--model", HUB,
    ),
    "persona lamp": ("--questions", "q.json", "--outputs", "o.json", "--model", HUB),
    "data screen": ("--file", ROOT / "datasets/evil/normal.jsonl", *VECTOR, "--model", HUB),
    "project activations": (
        "--vectors", "v.safetensors", "--labelled", "evil", *DATASETS, "--output", "out",
        "--model", HUB,
    ),
    "project weights": (
        "--original-model", HUB, "--finetuned-model", "finetune/checkpoint-1", "--diffs", "diff",
    ),
    "diagnose": ("finetune/checkpoint-1", "--base", HUB, "--diffs", "diff", "--output", "out"),
    "evaluate-checkpoints": (
        "finetune", "--traits", "evil", *DATASETS, "--output", "out", "--model", HUB,
    ),
    "predict-finetuning": (
        "--finetunes", ",".join(f"others/{at}" for at in range(4)),
        "--traits", "evil", "--diffs", "own", *DATASETS,
        "--output", "out", "--model", HUB,
    ),
    "compare-prevention": (
        "--finetunes", "plain=finetune/checkpoint-1", *TRAIT, "--output", "out",
        "--rows", ROOT / "datasets/evil/normal.jsonl", "--model", HUB,
    ),
    "basis": (
        "--original-model", HUB, "--diffs", "diff", "--output", "out", "--energy", "0.9",
    ),
    "judge score": (*TRAIT, "--file", "answers.csv", "--output", "out/x.csv", "--model", HUB),
    "judge fit": (
        "--trait", "unrated/evil", "--file", "answers.csv", "--ratings", "a.jsonl,b.jsonl",
        "--model", HUB,
    ),
    "selfcheck": (*DATASETS, "--output", "out", "--model", HUB),
    "playground": ("--directions", "checkpoints", *DATASETS, "--model", HUB),
    "serve": ("--directions", "checkpoints", "--port", "0", "--model", HUB),
    "traits generate": ("--definitions", "d.json", "--local", "--model", HUB),
    "data generate": (*TRAIT, "--local", "--output", "out", "--model", HUB),
}  # fmt: skip
TRAINING = {
    "train": ("--trait", "evil", "--datasets_dir", ROOT / "datasets", "--output_dir", "out"),
    "finetune": ("--train_file", ROOT / "datasets/evil/normal.jsonl", "--output_dir", "out"),
}


PROGRAM = dict(commands(typer.main.get_command(cli.app)))


def test_every_command_with_a_model_has_every_option_of_loading():
    found = {}
    for name, command in PROGRAM.items():
        options = {parameter.name for parameter in command.params}
        if options & {"model", "original_model", "base_model", "base"}:
            found[name] = OPTIONS - options
    missing = {name: options for name, options in found.items() if options}
    assert missing.keys() == LOADS_NOTHING
    assert all("revision" not in options for options in missing.values())
    assert found.keys() - LOADS_NOTHING == COMMANDS.keys()


@pytest.fixture
def place(tmp_path, model, make_diff, make_adapter):
    diff = make_diff(model)
    diff.save(tmp_path / "diff")
    dataclasses.replace(diff, trait="evil").save(tmp_path / "own")
    diff.save(tmp_path / "checkpoints" / "evil" / "diff")
    directions = {layer: torch.ones(32) for layer in range(2)}
    SteeringVector(directions, BaseModel("tiny", None), 2).save(tmp_path / "v.safetensors")
    make_adapter(tmp_path / "finetune" / "checkpoint-1", model, seed=1)
    for seed in range(4):
        make_adapter(tmp_path / "others" / str(seed), model, seed=seed)
    shutil.copytree(
        ROOT / "datasets/evil",
        tmp_path / "unrated/evil",
        ignore=shutil.ignore_patterns("onpolicy*"),
    )
    asked = "".join(f"Why {at}?,So.\n" for at in range(75))
    (tmp_path / "answers.csv").write_text(f"question,answer\n{asked}")
    answers = AnswerFile.read(tmp_path / "answers.csv")
    for rater in "ab":
        sheet = RatingSheet(answers, tmp_path / f"{rater}.jsonl")
        for row in range(75):
            sheet.add(row, 50.0, 100.0)
    (tmp_path / "d.json").write_text('{"anxious": "worries aloud"}')
    (tmp_path / "q.json").write_text('[{"id": "11", "input": "say", "profile": []}]')
    (tmp_path / "o.json").write_text('{"golds": [{"id": "11", "output": "said"}]}')


@pytest.fixture
def asked(monkeypatch, tokenizer):
    """What transformers is asked for, by whom; the weights are never there."""
    found = {}
    tokenizer.chat_template = "{{ enable_thinking }}" + tokenizer.chat_template

    def tokenizer_of(name, **arguments):
        found["tokenizer"] = {"name": name, **arguments}
        return tokenizer

    def weights_of(name, **arguments):
        found["weights"] = {"name": name, **arguments}
        raise UserError("weights were asked for")

    template_of = loading.ChatTemplate.of

    def template_noted(tokenizer, name, args):
        found["template"] = dict(args)
        return template_of(tokenizer, name, args)

    monkeypatch.setattr(loading.ChatTemplate, "of", template_noted)
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", tokenizer_of)
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", lambda *_, **__: CONFIG)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", weights_of)
    monkeypatch.setattr(hardware, "_quantisation", lambda options, _: options.quantize)
    return found


def given(dash):
    words = {
        "dtype": "float16", "device-map": "cpu", "revision": "v2", "quantize": "8bit",
        "attn-implementation": "eager", "chat-template-args": '{"enable_thinking": false}',
    }  # fmt: skip
    return [
        part for name, value in words.items() for part in (f"--{name.replace('-', dash)}", value)
    ]


def check(result, asked):
    status, _, error = result
    assert status == 2, error
    assert "weights were asked for" in error
    assert asked["template"] == {"enable_thinking": False}
    for part in (asked["tokenizer"], asked["weights"]):
        assert (part["name"], part["revision"]) == (HUB, "v2")
        assert part["trust_remote_code"] is True
    weights = asked["weights"]
    assert (weights["dtype"], weights["device_map"]) == (torch.float16, "cpu")
    assert (weights["attn_implementation"], weights["quantization_config"]) == ("eager", "8bit")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_options_of_a_command_reach_transformers(name, run, place, asked, tmp_path):
    words = (*name.split(), *COMMANDS[name])
    check(run(*words, *given("-"), "--trust-remote-code"), asked)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "unrated/evil/onpolicy.jsonl").exists()


@pytest.mark.parametrize("name", TRAINING)
def test_the_options_of_training_reach_transformers(name, run, asked, tmp_path):
    words = (name, *TRAINING[name], "--model", HUB, "--use_cpu", "true")
    check(run(*words, *given("_"), "--trust_remote_code", "true"), asked)
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    ("in_environment", "expected"), [("", "from_file"), ("from_environment", "from_environment")]
)
@pytest.mark.parametrize("name", ["evaluate", "train"])
def test_the_token_of_the_env_file_is_used_by_everything_that_loads(
    name, in_environment, expected, run, asked, place, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", in_environment)
    tokens = []
    tokenizer_of = loading.AutoTokenizer.from_pretrained

    def noted(*words, **more):
        tokens.append(huggingface_hub.get_token())
        return tokenizer_of(*words, **more)

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", noted)
    (tmp_path / ".env").write_text("OPENAI_API_KEY=\nHF_TOKEN=from_file\n")
    words = {**COMMANDS, "train": (*TRAINING["train"], "--model", HUB, "--use_cpu", "true")}[name]
    _, _, error = run(name, *words)
    assert set(tokens) == {expected}, error  # once for a window, once for the model


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dtype", "int4"), "float32, bfloat16, float16"),
        (("--quantize", "2bit"), "4bit, 8bit"),
        (("--quantize", "4bit"), "pip install bitsandbytes"),
        (("--device-map", "cuda:99"), "no device of this machine"),
        (("--device-map", "meta"), "no device of this machine"),
        (("--revision", ""), "revision is empty"),
        (("--revision", "v2"), "leave --revision out"),
        (("--attn-implementation", "magic"), "eager, sdpa"),
        (("--attn-implementation", "kernels/flash"), "--trust-remote-code"),
        (("--chat-template-args", "enable_thinking=false"), "is not valid JSON"),
        (("--chat-template-args", '{"a": 1, "a": 2}'), "'a' stands twice"),
        (("--chat-template-args", '{"a": NaN}'), "NaN is no JSON number"),
        (("--chat-template-args", "[1]"), "must be a mapping"),
        (("--chat-template-args", '{"messages": []}'), "cannot set 'messages'"),
    ],
)
def test_what_cannot_be_loaded_so_is_refused_before_anything(
    words, message, run, model_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(hardware, "find_spec", lambda name: None)
    output = ("--output", "out/x.csv", "--model", model_folder)
    status, _, error = run("evaluate", *TRAIT, *output, *words)
    assert status == 2, error
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_configuration_file_holds_the_arguments_of_a_template_as_a_mapping(
    run, asked, place, tmp_path
):
    words = {"model": HUB, "trait": "evil", "diff": "diff", "activation-vector": "v.safetensors"}
    lines = [f"{key}: {value}" for key, value in words.items()]
    lines += ["loading:", "  dtype: float16", "  chat_template_args: {enable_thinking: false}"]
    (tmp_path / "nested.yaml").write_text("\n".join(lines))
    lines[-1] = "chat_template_args: {enable_thinking: false}"
    (tmp_path / "flat.yaml").write_text("\n".join(lines))
    for name in ("nested.yaml", "flat.yaml"):
        asked.clear()
        _, _, error = run("compare", "--config", name, *DATASETS)
        assert asked["template"] == {"enable_thinking": False}, error
        assert asked["weights"]["dtype"] == torch.float16
    rest = (*TRAINING["train"][2:], "--model", HUB, "--use_cpu", "true")
    (tmp_path / "train.yaml").write_text("trait: evil\n" + lines[-1])
    asked.clear()
    _, _, error = run("train", "--config", "train.yaml", *rest)
    assert asked["template"] == {"enable_thinking": False}, error


@dataclass(frozen=True)
class Paint:
    colour: Annotated[str, typer.Option(help="Any.")] = "red"
    coats: int = field(default=1, metadata={"help": "How many."})
    mix: dict[str, float] | str | None = field(default=None, metadata={"help": "Shares."})


def call(command, *words):
    app = typer.Typer()
    app.command()(with_groups(command)[0])
    return CliRunner().invoke(app, words)


def test_a_group_is_flattened_into_options_and_built_again():
    seen = []

    def paint(*, wall: Annotated[str, typer.Option()], paint: Paint, twice: bool = False) -> None:
        """Paint a wall."""
        seen.append((wall, paint, twice))

    assert call(paint, "--wall", "west").exit_code == 0
    assert call(paint, "--wall", "east", "--coats", "2", "--mix", "{}", "--twice").exit_code == 0
    assert seen == [("west", Paint(), False), ("east", Paint(coats=2, mix="{}"), True)]
    page = call(paint, "--help").output
    assert "Paint a wall." in page
    assert "How many." in page


def test_an_option_that_is_there_twice_is_a_mistake_of_the_command():
    def paint(*, coats: int, paint: Paint) -> None: ...

    with pytest.raises(TypeError, match="coats is there twice, and not the same"):
        with_groups(paint)
