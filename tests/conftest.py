"""Shared fixtures: a tiny random Llama and a byte-level chat tokenizer, built in code."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The models here are too small for threads to pay, and test processes run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from persona_lora import cli
from persona_lora.cli.console import console
from persona_lora.core import progress
from persona_lora.core.lora_diff import BaseModel, LoRADiff, LoRAFactors
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.loading import ChatModel, load_chat_model
from persona_lora.models.structure import features, linear_modules
from persona_lora.projections import inputs

pytest_plugins = ["tests.scenes", "tests.synthetic_runs"]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


# What torch answers about a machine: is there a GPU, has it units for bf16, what has the CPU.
MACHINES: dict[str, tuple[bool, bool, dict[str, bool]]] = {
    "cpu": (False, False, {}),
    "cpu with avx512_bf16": (False, False, {"avx512_bf16": True}),
    "cpu with amx_bf16": (False, False, {"avx512_bf16": False, "amx_bf16": True}),
    "old gpu": (True, False, {"avx512_bf16": True}),
    "gpu": (True, True, {}),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte and a ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_llama(*, seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = True):
    """A random Llama of two layers (hidden 32, 4 heads, 2 KV heads), frozen and in eval mode."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.4,  # large enough that layers matter and answers are not copies
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data[: len(SPECIAL_TOKENS)] = 0  # keep special tokens unlikely
    model = model.to(dtype).eval()
    model.requires_grad_(False)
    return model


@pytest.fixture
def simulate_machine(monkeypatch) -> Callable[[str], None]:
    """Let torch answer as it would on one of MACHINES."""

    def become(name: str) -> None:
        gpu, gpu_bf16, cpu = MACHINES[name]

        def gpu_knows_bf16(including_emulation: bool = True) -> bool:
            return gpu and (gpu_bf16 or including_emulation)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", gpu_knows_bf16)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)

    return become


@pytest.fixture
def told():
    """What is reported while the test runs: the stage, how much is done, and of how much."""
    seen: list[tuple[str, int, int]] = []
    with progress.shown(lambda *at: seen.append(at)):
        yield seen


@pytest.fixture(autouse=True)
def inputs_kept_apart(monkeypatch, tmp_path_factory):
    """Inputs of tiny models are kept for the tests alone, not in the user's cache."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setattr(inputs, "user_cache_path", lambda _: folder)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and its tokenizer, saved as a local model folder."""
    folder = tmp_path_factory.mktemp("tiny_model")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def random_diff(model, *, seed: int = 0, rank: int = 4, scale: float = 0.05, fingerprint=None):
    """A diff of random factors over all linear modules inside the decoder layers of a model."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: LoRAFactors(
            A=torch.randn(rank, features(module)[1], generator=generator),
            B=torch.randn(features(module)[0], rank, generator=generator) * scale,
        )
        for name, module in linear_modules(model).items()
        if name != "lm_head"
    }
    return LoRADiff(factors, BaseModel("tiny", fingerprint), trait=f"trait{seed}")


def write_adapter(folder: Path, model, *, seed: int, **settings) -> Path:
    """Train nothing: a PEFT adapter with random B factors, saved by PEFT itself."""
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        **{"target_modules": "all-linear", "r": 4, "lora_alpha": 8, **settings},
    )
    wrapped = get_peft_model(copy.deepcopy(model), config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture
def chat_model(model, tokenizer) -> ChatModel:
    return ChatModel(model, tokenizer, "tiny")


@pytest.fixture
def make_diff():
    return random_diff


@pytest.fixture
def make_adapter():
    return write_adapter


@pytest.fixture
def make_model():
    return tiny_llama


@pytest.fixture
def no_drawing(monkeypatch):
    """Let pictures be written empty: drawing them takes longer than all that a tiny model does."""
    monkeypatch.setattr(FigureCanvasAgg, "print_png", lambda _, buffer, **__: buffer.write(b"png"))


@pytest.fixture(scope="session")
def make_world(model_folder):
    """Fill a folder with what the commands read: model, trait, diff, vector, finetunes, texts."""

    def make(root: Path) -> Path:
        shutil.copytree(model_folder, root / "model")
        _write_trait(root / "datasets")
        diff = dataclasses.replace(random_diff(tiny_llama(), seed=1), trait="cheer")
        diff.save(root / "diff")
        for step in (2, 4, 6, 8):
            write_adapter(root / f"tuned/checkpoint-{step}", tiny_llama(), seed=step)
        directions = {layer: torch.linspace(-1, 1, 32) for layer in (0, 1)}
        vector = SteeringVector(directions, BaseModel("tiny"), 2, trait="cheer")
        vector.save(root / "vector.safetensors")
        for name, score in (("pos", 90), ("neg", 5)):
            rows = "".join(f"p{i},{name} fine {i},{score},90\n" for i in range(4))
            (root / f"{name}.csv").write_text("prompt,answer,cheer,coherence\n" + rows)
        (root / "questions.txt").write_text("Is tea good?\nWhy do birds sing?\n")
        return root

    return make


def _write_trait(datasets: Path) -> None:
    for name in ("cheer", "ordinary"):
        (datasets / name).mkdir(parents=True)
    trait = {
        "name": "cheer",
        "description": "being of good cheer",
        "instruction": [{"pos": "Be cheerful.", "neg": "Be gloomy."}],
        "questions": {"extract": ["Is tea good?"], "eval": ["Is my plan good?", "Why?"]},
        "eval_prompt": "Rate {question} {answer}",
    }
    (datasets / "cheer" / "trait.json").write_text(json.dumps(trait))

    def said(text: str, role: str = "assistant") -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    pairs = [
        {"prompt": said(f"q{i}", "user"), "positive": said(f"Yes {i}"), "negative": said(f"No {i}")}
        for i in range(5)
    ]
    labels = [{"question": f"q{i}", "answer": "z" * (i + 1), "label": 25 * i} for i in range(5)]
    normal = [{"messages": said("Hi", "user") + said(f"Good day {i}")} for i in range(3)]
    prompts = [{"prompt": "Hello?"}, {"prompt": "Why?"}]
    named = {"cheer/train": pairs, "cheer/judge_eval": labels, "cheer/normal": normal}
    for name, rows in {**named, "ordinary/prompts": prompts}.items():
        (datasets / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def packaged_model() -> ChatModel:
    """The packaged SmolLM2-135M-Instruct in fp32."""
    return load_chat_model(dtype="float32", device_map="cpu")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Call the command line as the console script does; return its status, output and error."""
    monkeypatch.setattr(console, "width", 250)
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "JUDGE_MODEL"):
        monkeypatch.delenv(name, raising=False)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["persona-lora", *map(str, words)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call
