"""Files made to break readers: a few hundred, each read or refused in one line, none waited for.

Every reader gets every file under the name that it looks for. What is guarded: an exception other
than UserError would be a traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import save

from persona_lora.core import adapter_config
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.personas import Coefficients, load_persona, load_persona_prompts
from persona_lora.core.traits import load_labelled_answers, load_pairs, load_trait
from persona_lora.core.vector_files import load_vector
from persona_lora.models.weight_files import StoredWeights
from persona_lora.profiles.conversations import load_conversations
from persona_lora.profiles.judge_prompt import checked_judge_prompt

QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
VALUES = [
    *(None, True, 0, -1, 10**30, 1.5, "", "x", "\0", "../../x", "a" * 5000, [], [[]], {}, {"": 1}),
    *([None], ["x"], [{}], [{"a": []}], [[["x"]]], {"x": "y"}),
]


class Runs:
    """A pickle that would run a command."""

    def __reduce__(self):
        return os.system, ("true",)


def texts():
    """Yield JSON texts: of every kind of value, at every place of the forms that are read."""
    yield from map(json.dumps, VALUES)
    forms = {
        "messages": ("role", "content"),
        "sessions": ("session_text", "split"),
        "turns": ("input", "ground_truth"),
        "samples": ("text",),
        "utterances": ("history", "candidates"),
        "dialog": ("text", "id"),
        "profile": ("text",),
        "first_session_dialogue": ("x",),
    }
    for key, inner in forms.items():
        for value in VALUES:
            yield json.dumps({key: value})
            yield json.dumps({key: [dict.fromkeys(inner, value)]})
    for key in ("name", "instruction", "questions", "eval_prompt"):
        for value in VALUES:
            yield json.dumps({**TRAIT, key: value})
    for key in ("prompt", "positive", "negative", "question", "answer", "label", "id", "split"):
        for value in VALUES[:12]:
            yield json.dumps({"messages": [{"role": "user", "content": "x"}], key: value})
    yield from ("", " ", "\ufeff{}", "NaN", "[1e999]", "1" * 9999, "[" * 9999, '{"a":1,"a":2}')
    yield from ('"\\ud83d"', "{'a': 1}", "\0", "[1,]", "{}{}", '{"\\ud83d": 1}', "\u2028")


TRAIT = {
    "name": "calm",
    "instruction": [{"pos": "Be calm.", "neg": "Be wild."}],
    "questions": {"extract": ["Why?"], "eval": ["How?"]},
    "eval_prompt": "{question} {answer}",
}
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}


def configs():
    """Yield adapter configurations with every kind of value in every field that is looked at."""
    for field in (*sorted(adapter_config.FREE | adapter_config.REFUSED.keys()), "bias", "odd"):
        for value in VALUES[::2]:
            yield json.dumps({**ADAPTER, field: value})
    for pattern in ("(", "(a+)+$", "[", "\\"):
        yield json.dumps({**ADAPTER, "alpha_pattern": {pattern: 3}})


def blobs():
    """Yield bytes for files of tensors: cut, empty, absurd, or of something else."""
    ones = torch.ones(2, 4)
    good = {f"{QUERY}.lora_A.weight": ones, f"{QUERY}.lora_B.weight": torch.ones(4, 2)}
    whole = save(good)
    header = json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]])
    yield from (whole[:n] for n in (0, 1, 8, 9, 40, len(whole) - 1))
    yield from (b"\xff" * 200, b"\0" * 200, b"GGUF" + b"\xff" * 200, b"PK\x03\x04" + b"x" * 99)
    for change in (
        {"shape": [2**62, 2**62]}, {"shape": [-1]}, {"data_offsets": [0, 2**60]}, {"dtype": "X"},
        {"dtype": "I8"}, {"shape": "x"}, {"data_offsets": [9, 1]},
    ):  # fmt: skip
        name = f"{QUERY}.lora_A.weight"
        text = json.dumps({**header, name: {**header[name], **change}}).encode()
        yield struct.pack("<Q", len(text)) + text + whole[-64:]
    yield from (struct.pack("<Q", n) + b"{}" for n in (2, 2**40, 2**63))
    yield save({"layer.0": ones[0]}, {"steering_vector": "[" * 9999})
    for value in VALUES:
        yield save({"layer.0": ones[0]}, {"steering_vector": json.dumps(value)})
        record = {"base_model": value, "num_layers": value, "trait": value, "method": value}
        yield save({"layer.0": ones[0]}, {"steering_vector": json.dumps(record)})


def pickles():
    """Yield what ``torch.save`` and worse can put into a ``.pt`` file."""
    within: dict = {}
    within["x"] = within
    ones = torch.ones(3, 4)
    yield from (within, {"x": Runs()}, {"x": ones.expand(2, 3, 4)}, {"x": torch.zeros(0)})
    yield from ({"w": torch.ones(1).expand(10**6, 10**6)}, torch.ones(1).expand(10**6, 10**6))
    yield from ({"w": ones * float("nan")}, {"w": ones.int()}, {"w": ones.bool()}, {"w": 3})
    yield from ({"w": ones.to_sparse()}, {"w": ones.to("meta")}, {"w": ones.cfloat()}, [ones])
    yield from (ones, ones[0], torch.zeros(3, 0), torch.zeros(0, 4), {1: {2: ones}}, {}, None)
    yield from ({"A": ones, "lora_A": ones}, {"m.lora_A": ones, "m.lora_B": ones})
    yield from ({"m.lora_A": ones, "m.lora_B": ones.T, "m.alpha": 8}, {"layers.0": {"x": "y"}})


def read_or_refused(read, *arguments):
    with contextlib.suppress(UserError):
        read(*arguments)


@pytest.mark.filterwarnings("ignore")
def test_no_text_breaks_a_reader(tmp_path):
    (tmp_path / "ann").mkdir()
    (tmp_path / "calm").mkdir()
    (tmp_path / "calm" / "trait.json").write_text(json.dumps(TRAIT))
    calm = load_trait("calm", tmp_path)
    readers = {
        "ann/conversations.jsonl": lambda path: load_persona("ann", tmp_path),
        "x.json": load_conversations,
        "x.jsonl": load_conversations,
        "mix.json": Coefficients.read,
        "prompts.json": load_persona_prompts,
        "odd.txt": lambda path: checked_judge_prompt(path.read_text(), path),
        "calm/train.jsonl": lambda path: load_pairs(calm),
        "calm/judge_eval.jsonl": lambda path: load_labelled_answers(calm),
        "calm/trait.json": lambda path: load_trait("calm", tmp_path),
        "trait_data_eval/x.json": load_trait,
        "ann/persona_samples.json": lambda path: load_conversations(path),
    }
    (tmp_path / "trait_data_eval").mkdir()
    for text in texts():
        for name, read in readers.items():
            (tmp_path / name).write_text(text)
            read_or_refused(read, tmp_path / name)


@pytest.mark.filterwarnings("ignore")
def test_no_configuration_breaks_the_reader_of_adapters(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_config, "PATTERN_SECONDS", 0.02)
    tensors = {f"{QUERY}.lora_{s}.weight": torch.ones(2, 2) for s in "AB"}
    (tmp_path / "adapter_model.safetensors").write_bytes(save(tensors))
    for text in [*configs(), *map(json.dumps, VALUES)]:
        (tmp_path / "adapter_config.json").write_text(text)
        read_or_refused(LoRADiff.load, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    LoRADiff.load(tmp_path)
    for value in VALUES:
        for record in (value, {"base_model": value}, {"trait": value}, {"format_version": value}):
            (tmp_path / "diff.json").write_text(json.dumps(record))
            read_or_refused(LoRADiff.load, tmp_path)
    (tmp_path / "model").mkdir()
    for value in VALUES:
        (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(value))
        read_or_refused(StoredWeights, tmp_path / "model")
        index = {"weight_map": value}
        (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
        read_or_refused(StoredWeights, tmp_path / "model")


@pytest.mark.filterwarnings("ignore")
def test_no_file_of_tensors_breaks_a_reader(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(ADAPTER))
    for blob in blobs():
        for name in ("x.safetensors", "x.pt", "a/adapter_model.safetensors", "a/adapter_model.bin"):
            (tmp_path / name).write_bytes(blob)
            read_or_refused(LoRADiff.load, tmp_path / name)
        read_or_refused(LoRADiff.load, tmp_path / "a")
        read_or_refused(load_vector, tmp_path / "x.safetensors")
        read_or_refused(load_vector, tmp_path / "x.pt")
    for value in pickles():
        torch.save(value, tmp_path / "x.pt")
        read_or_refused(LoRADiff.load, tmp_path / "x.pt")
        read_or_refused(load_vector, tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"x": Runs()}))
    with pytest.raises(UserError, match="no file of tensors only"):
        load_vector(tmp_path / "x.pt")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)])
def test_pipes_folders_and_rings_are_not_waited_for(tmp_path, make):
    for name in ("x.safetensors", "x.pt", "x.json", "x.jsonl", "x.txt"):
        make(tmp_path / name)
        for read in (LoRADiff.load, load_vector, load_conversations, Coefficients.read):
            with pytest.raises(UserError):
                read(tmp_path / name)


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "..", "a/b", "\0", ""])
def test_a_trait_s_name_leads_nowhere_else(tmp_path, name):
    (tmp_path / "calm").mkdir()
    (tmp_path / "calm" / "trait.json").write_text(json.dumps({**TRAIT, "name": name}))
    with pytest.raises(UserError, match="must be like a file's name"):
        load_trait("calm", tmp_path)
