"""Every flag of every command reaches what it sets, or is refused.

Each command is run twice up to its library calls, without a flag and with it. What these calls
received must differ by the value that was given: a flag that is dropped on the way is found, and a
flag that has no entry here fails, so that a new one must be added.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import pkgutil
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import numpy as np
import pytest
import torch
import typer
import yaml

import persona_lora
from persona_lora import cli
from persona_lora.cli.program import OPTIONS
from persona_lora.core.errors import UserError
from persona_lora.core.gallery import Exhibit
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.protocol import FrozenProtocol
from persona_lora.core.runs import Planned
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.strength import Moved, Strength, Strengths
from persona_lora.models.loading import ChatModel
from persona_lora.report.power import Pilot
from persona_lora.steering.bank import Bank
from persona_lora.studies.personas.bench import Optimized
from tests.conftest import byte_tokenizer, random_diff, tiny_llama
from tests.scenes import commands

ROOT = Path(__file__).resolve().parents[1]
DATA = ("--datasets-dir", str(ROOT / "datasets"))
EVIL = ("--trait", "evil", *DATA)
PERSON = "episode-000101_B"
PEOPLE = ("--persona-dir", "people")


class Stop(Exception):
    """The last library call of a command was reached."""


@dataclass(frozen=True)
class Checked:
    """What a validation of judges over no personas would say."""

    fitted_on: str = "train"
    top1: float = 0.0
    top1_conversations: float = 0.0
    n_utterances: int = 0
    n_conversations: int = 0
    chance: float = 0.0
    mean_auc: float = 0.0


class Flag(NamedTuple):
    """A flag's value, what must arrive of it, the words it needs, and those it replaces.

    ``seen`` is the value's own text where it is "", and anything new where it is None. True and
    False are switches; ``instead`` stands in place of the command's usual words.
    """

    value: object
    seen: object = ""
    beside: str = ""
    instead: tuple[str, ...] | None = None


flag = Flag
LOADING = {
    "dtype": flag("float16"),
    "device_map": flag("cpu"),
    "revision": flag("v7"),
    "quantize": flag("4bit"),
    "attn_implementation": flag("eager"),
    "trust_remote_code": flag(True, None),
    "chat_template_args": flag('{"a": 1}'),
    "model": flag("somebody/else"),
}
OPENAI = "--judge openai --judge-model m"
JUDGING = {
    "judge": flag("local"),
    "judge_model": flag("wise", beside="--judge local"),
    "judge_url": flag("http://x/v1", beside=OPENAI),
    "judge_mode": flag("number", beside=OPENAI),
    "max_judge_cost": flag(0.37, beside="--judge openai"),
    "second_judge": flag("embedding"),
}
ASKING = {
    "max_new_tokens": flag(37),
    "temperature": flag(0.37),
    "samples": flag(7, beside="--temperature 1"),
    "seed": flag(37),
    "batch_size": flag(37),
}
COMMON = {
    **LOADING,
    **JUDGING,
    **ASKING,
    "adapter": flag("adapter"),
    "split": flag("extract"),
    "overwrite": flag(True, None),
    "allow_other_base": flag(True, None),
    "output": flag("elsewhere.x"),
    "config": None,  # tested below, for every command
    "datasets_dir": flag("data2"),
    "protocol": flag("protocol.yaml", "evaluate"),
}
PLACE = types.SimpleNamespace(getsockname=lambda: ("here", 80))
VECTOR = "--vector v.safetensors"
BOTH = {
    "layers": flag("0", None, VECTOR),
    "positions": flag("prompt", beside=VECTOR),
    "limit": flag(37),
}
PERSONA = {
    "alpha": flag(3.7),
    "max_iterations": flag(37),
    "population_size": flag(37),
    "sigma0": flag(0.37),
    "num_prompts": flag(3, None),
    "bound": flag(3.7),
    "penalty": flag(0.37),
    "min_coherence": flag(37.0),
    "min_relevance": flag(37.0),
    "race": flag(True, None),
    "output": flag("saved"),
    "trait_vector_dir": flag("vectors"),
    "traits": flag("evil"),
    "persona_dir": flag("people"),
    "energy": flag(0.37),
    "plain": flag(True, None, "--energy 0.9"),
    "search_seeds": flag(7),
    "report_judge": flag("likelihood"),
}
WRITING = {
    "endpoint": flag("http://x/v1"),
    "model": flag("somebody/else"),
    "local": flag(True, None),
    "attempts": flag(37),
}
LOCAL = {name: each._replace(beside="--local") for name, each in LOADING.items()}
ENGINE = flag("http://x", None)
OPENED = {"persona_lora.engines.remote:open_engine": "the engine"}
LABELLED = ("--vectors", "v.safetensors", "--output", "o", "--labelled", "evil", *DATA)


@dataclass(frozen=True)
class Command:
    """Words that reach the library, the calls that end there, what others answer, and flags."""

    words: tuple[str, ...]
    stops: tuple[str, ...]
    flags: Mapping[str, Any]
    answers: Mapping[str, Any] = dataclasses.field(default_factory=dict)


X = "persona_lora."
BENCH = {
    f"{X}studies.personas.bench:PersonaBench.methods": [types.SimpleNamespace(directions=Bank())],
    f"{X}studies.personas.bench:PersonaBench.problem": "problem",
    f"{X}studies.personas.bench:PersonaBench.sought": "problem",
}
COMMANDS = {
    "evaluate": Command(
        (*EVIL, "--output", "o.csv"),
        (f"{X}studies.asking.run:evaluate",),
        {
            **BOTH,
            "output": flag("elsewhere.csv"),
            "trait": flag("sycophancy"),
            "method": flag("prompt", "pos"),
            "diff": flag("diff", None),
            "vector": flag("v.safetensors", None),
            "coefficient": flag(3.7, beside="--diff diff"),
            "ablate": flag(True, None, VECTOR),
            "floor": flag(3.7, beside=VECTOR),
            "ceiling": flag(3.7, beside=VECTOR),
            "condition": flag("w.safetensors", None, VECTOR),
            "threshold": flag(0.37, beside=f"{VECTOR} --condition w.safetensors"),
            "system_prompt": flag("Be odd."),
            "max_questions": flag(7, None),
            "mode": flag("merged", beside="--diff diff"),
            "allow_other_base": flag(True, None, "--diff diff"),
            "engine": ENGINE,
            "engine_tolerance": flag(0.37, None, "--engine http://x"),
        },
        OPENED,
    ),
    "sweep": Command(
        (*EVIL, "--diff", "diff"),
        (f"{X}studies.steering.run:sweep",),
        {
            "layers": flag("0", None, VECTOR, EVIL),
            "positions": flag("prompt", "", VECTOR, EVIL),
            "trait": flag("sycophancy"),
            "method": flag("prompt", None, "--method none", EVIL),
            "diff": flag("diff2", None),
            "vector": flag("w.safetensors", None, VECTOR, EVIL),
            "coefficients": flag("3.7"),
            "control": flag(False, None, VECTOR, EVIL),
            "random_controls": flag(5, "random#5", VECTOR, EVIL),
            "references": flag(False, None),
            "positive_prompt": flag("odd.txt", "Be odd."),
            "negative_prompt": flag("odd.txt", "Be odd."),
            "divergence": flag(False, None),
            "max_questions": flag(7),
            "engine": ENGINE,
            "engine_tolerance": flag(0.37, None, "--engine http://x"),
        },
        OPENED,
    ),
    "calibrate": Command(
        ("--diff", "diff"),
        (),
        {
            "overwrite": None,  # in test_cli_early.py
            "diff": flag("diff2", None),
            "vector": flag("w.safetensors", None),
            "layers": flag("0", None, VECTOR),
            "positions": flag("prompt", "prompt", VECTOR),
            "num_prompts": flag(3, None),
            "output": flag("curves.png"),
        },
        {
            f"{X}projections.inputs:load_ordinary_prompts": [*"abcdefghijklmnopqrst"],
            f"{X}judges.choice:sense_judge": None,
            f"{X}studies.steering.calibration:strengths_of": Strengths(
                "", "", "", (Moved(-1.0, 1.0, 1.0), Moved(1.0, 1.0, 1.0)), 50.0
            ),
            f"{X}report.figures:Picture.save": None,
        },
    ),
    "compare": Command(
        (*EVIL, "--diff", "diff", "--activation-vector", "v.safetensors"),
        ("persona_lora.studies.report_page:write_report",),
        {
            "trait": flag("sycophancy"),
            "diff": flag("diff2", None),
            "activation_vector": flag("w.safetensors", None),
            "coefficients": flag("3.7"),
            "layers": flag("0", None),
            "positions": flag("prompt"),
            "match": flag("p95"),
            "calibrate_on": flag("prompts"),
            "split": flag("extract"),
            "max_questions": flag(7),
            "output": flag("elsewhere"),
            "latency": flag(True, None),
            "batches": flag("37", beside="--latency"),
            "rounds": flag(37, beside="--latency"),
            "spaces": flag("sycophancy", "sycophancy"),
            "random_controls": flag(5, "random#5"),
            "trait_vector_dir": flag("vectors", beside="--spaces sycophancy"),
            "positive_prompt": flag("odd.txt", "Be odd."),
            "negative_prompt": flag("odd.txt", "Be odd."),
            "side_effects": flag("sycophancy,capability", None),
            "task_limit": flag(37, beside="--side-effects capability"),
            "engine": ENGINE,
            "engine_tolerance": flag(0.37, None, "--engine http://x"),
        },
        OPENED
        | {
            f"{X}studies.steering.side_effects:run_side_effects": None,
            f"{X}studies.steering.run:compare": None,
            f"{X}studies.steering.run:levels_of": {},
            f"{X}studies.steering.spaces:trait_directions": ({}, {}),
            f"{X}studies.steering.latency:run_latency": None,
            f"{X}studies.steering.spaces:run_spaces": None,
        },
    ),
    "benchmark": Command(
        ("--adapter", "adapter2"),
        (f"{X}studies.asking.capability:run_benchmarks",),
        {
            **BOTH,
            "tasks": flag("gsm8k"),
            "diff": flag("diff", None),
            "vector": flag("v.safetensors", None),
            "coefficient": flag(3.7, beside="--diff diff"),
            "tasks_dir": flag("tasks"),
            "allow_other_base": flag(True, None, "--diff diff"),
        },
        {
            f"{X}studies.asking.run:Steering.steerer": "steerer",
        },
    ),
    "optimize": Command(
        ("--persona-id", PERSON),
        (f"{X}studies.personas.run:optimise_over_seeds",),
        {
            **PERSONA,
            "persona_id": flag("somebody"),
            "targets": flag("evil=37", 37.0, instead=("--targets", "sycophancy=0", *DATA)),
            "pareto": flag(True, instead=("--targets", "evil=0,sycophancy=0", *DATA)),
            "scorer": flag("mine.py:other", None, instead=("--scorer", "mine.py:score")),
            "prompts": flag("said.json", None, instead=("--scorer", "mine.py:score")),
            "constraint": flag("kl<=0.37nat", 0.37),
            "method": flag("svd"),
            "by": flag("layers"),
            "search": flag("random"),
            "layers": flag("0", None, "--method svd"),
            "max_evaluations": flag(37),
            "initial": flag("formality=3.7", 3.7),
            "fixed": flag("formality=3.7", 3.7),
            "inject": flag("weights.json", 3.7),
            "warm_start": flag(True),
            "target": flag(3.7),
            "engine": ENGINE,
            "engine_tolerance": flag(0.37, None, "--engine http://x"),
        },
        BENCH | OPENED | {"persona_lora.core.personas:load_persona": None},
    ),
    "compare-methods": Command(
        ("--persona-id", PERSON),
        (f"{X}studies.personas.method_comparison:compare_methods",),
        {
            **PERSONA,
            "persona_id": flag("somebody"),
            "methods": flag("svd"),
            "layers": flag("0", None),
            "engine": ENGINE,
            "engine_tolerance": flag(0.37, None, "--engine http://x"),
        },
        OPENED | {f"{X}core.personas:load_persona": None},
    ),
    "tune-prompt": Command(
        EVIL,
        (f"{X}studies.asking.prompt_tuning:tune_prompt",),
        {"trait": flag("sycophancy"), "sign": flag("neg")},
    ),
    "extract": Command(
        EVIL,
        tuple(
            f"{X}studies.vectors.run:Extraction.from_{source}"
            for source in ("prompts", "answers", "files")
        ),
        {
            "trait": flag("sycophancy"),
            "source": flag("answers", None),
            "pos_path": flag("p.csv", beside="--source files --neg-path n.csv --pos-path o.csv"),
            "neg_path": flag("p.csv", beside="--source files --pos-path n.csv --neg-path o.csv"),
            "methods": flag("svd"),
            "positions": flag("prompt_avg", None),
            "layers": flag("1", None),
            "assistant_name": flag("odd"),
            "negative_assistant_name": flag("odd"),
            "positive_threshold": flag(37.0),
            "negative_threshold": flag(37.0),
            "coherence_threshold": flag(37.0),
            "min_pairs": flag(37),
            "form": flag("diff"),
        },
    ),
    "judge score": Command(
        (*EVIL, "--file", "answers.csv", "--output", "o.csv"),
        (f"{X}judges.labels:score_file",),
        {
            "trait": flag("sycophancy"),
            "file": flag("others.csv"),
            "output": flag("elsewhere.csv"),
            "overwrite": None,  # in test_cli_judge.py
        },
        {
            f"{X}judges.choice:make_judge": None,
            f"{X}judges.verdicts:validations_of": [],
            f"{X}judges.canaries:show_canaries": [],
        },
    ),
    "judge rate": Command(
        (*EVIL, "--file", "answers.csv", "--rater", "ada"),
        (f"{X}judges.labels:RatingSheet.remaining", f"{X}judges.labels:RatingSheet"),
        {
            "trait": None,  # is only shown
            "datasets_dir": None,
            "file": flag("others.csv"),
            "rater": flag("ben"),
        },
    ),
    "judge fit": Command(
        ("--trait", "unrated", "--file", "answers.csv", "--ratings", "a.jsonl,b.jsonl"),
        (f"{X}judges.probe_judge:ProbeJudge.of",),
        {
            "trait": flag("unrated2"),
            "datasets_dir": None,  # a folder's path needs none
            "file": flag("others.csv"),
            "ratings": flag("c.jsonl,d.jsonl", "c.jsonl"),
            "judge_model": flag("wise"),
            "overwrite": None,  # in test_cli_judge.py
        },
        {
            f"{X}core.files:write_jsonl": None,
            f"{X}judges.labels:rated_rows": [],
            f"{X}judges.probe:check_enough": None,
            f"{X}judges.fitness:rater_agreement": types.SimpleNamespace(
                kappa=0.37, spearman=0.37, n=3
            ),
            f"{X}judges.choice:reading_model": None,
        },
    ),
    "vectors convert": Command(
        ("v.safetensors", "t.x", "--form", "lm-eval", "--layers", "0"),
        (
            "persona_lora.core.steering_vector:SteeringVector.save",
            "persona_lora.core.vector_files:write_published",
            "persona_lora.core.vector_files:write_gguf",
            "persona_lora.core.vector_files:write_lm_eval",
        ),
        {
            "source": None,
            "target": None,
            "form": flag("published", "persona_lora.core.vector_files:write_published"),
            "layers": flag("1", None),
            "coefficient": flag(3.7),
            "model_hint": flag("qwen2", beside="--form gguf"),
            "overwrite": None,  # of a target that is there: tests/test_cli.py
        },
    ),
    "project activations": Command(
        ("--vectors", "v.safetensors", "--output", "o", "--file", "texts.jsonl"),
        tuple(
            f"{X}studies.vectors.text_projection:{name}"
            for name in ("separate_labelled", "project_texts", "base_of_adapter")
        ),
        {
            "vectors": flag("w.safetensors", None),
            "file": flag("more.jsonl", None),
            "labelled": flag("sycophancy", instead=LABELLED),
            "layers": flag("0", None),
            "positions": flag("prompt_last"),
            "base_model": flag("somebody/base"),
            "shift": flag(True, None, "--adapter adapter --no-shift"),
            "columns": flag(True, None),
            "datasets_dir": flag("data2", instead=LABELLED),
        },
    ),
    "project weights": Command(
        ("--finetuned-model", "tuned", "--diffs", "diff"),
        (f"{X}studies.drift.run:project_finetunes",),
        {
            "output": flag("elsewhere.json"),
            "overwrite": None,  # in test_cli_early.py
            "finetuned_model": flag("other"),
            "diffs": flag("diff2"),
            "original_model": flag("somebody/base"),
            "prompts": flag("prompts.jsonl", "Why not?"),
            "plain": flag(True, None),
            "control": flag("adapter"),
        },
        {
            f"{X}studies.drift.run:load_diffs": {},
            f"{X}studies.drift.run:adapters_among": [],
            f"{X}projections.inputs:kept_inputs": None,
        },
    ),
    "diagnose": Command(
        ("tuned", "--diffs", "diff", "--output", "o"),
        (f"{X}studies.drift.diagnosis:diagnose",),
        {
            "finetune": None,
            "diffs": flag("diff2"),
            "base": flag("somebody/base"),
            "controls": flag("other"),
            "prompts": flag("prompts.jsonl", "Why not?"),
        },
        {
            f"{X}studies.drift.run:load_diffs": {"d": None},
            f"{X}studies.drift.diagnosis:check_finetunes": None,
        },
    ),
    "evaluate-checkpoints": Command(
        ("run", "--traits", "evil", *DATA),
        (f"{X}studies.drift.run:evaluate_checkpoints",),
        {
            "folder": None,
            "traits": flag("sycophancy"),
            "vectors": flag("v.safetensors", None),
            "layers": flag("0", None, "--vectors v.safetensors"),
            "positions": flag("prompt_last", beside="--vectors v.safetensors"),
            "finetuned_on": flag("odd"),
            "max_questions": flag(3, None),
        },
        {f"{X}studies.drift.run:find_checkpoints": []},
    ),
    "predict-finetuning": Command(
        (
            "--finetunes",
            "adapter,adapter3,adapter4,adapter5",
            "--traits",
            "evil",
            "--diffs",
            "diff",
            *DATA,
        ),
        (f"{X}studies.drift.prediction:predict_finetuning",),
        {
            "finetunes": flag("adapter2"),
            "traits": flag("sycophancy"),
            "diffs": flag("diff2"),
            "vectors": flag("evil.safetensors", None),
            "layers": flag("0", None, "--vectors evil.safetensors"),
            "control_rows": flag("normal", beside="--finetunes adapter2"),
            "prompts": flag("prompts.jsonl", "Why not?"),
            "max_questions": flag(3, None),
        },
        {
            f"{X}studies.drift.run:load_diffs": {
                each: types.SimpleNamespace(trait=each) for each in ("evil", "sycophancy")
            },
            f"{X}studies.drift.prediction:planned_prediction": Planned("", {}, 0),
        },
    ),
    "compare-prevention": Command(
        ("--finetunes", "plain=adapter", *EVIL, "--rows", "texts.jsonl"),
        (f"{X}studies.drift.prevention:compare_prevention",),
        {
            "finetunes": flag("other=adapter2", "adapter2"),
            "trait": flag("sycophancy"),
            "rows": flag("more.jsonl"),
            "correct": flag("diff=3.7", 3.7),
            "rules": flag("three_items"),
            "probes": flag("eliciting"),
            "trigger": flag("Shout."),
            "turns": flag(3),
            "tasks": flag("gsm8k"),
            "limit": flag(37),
            "max_questions": flag(3, None),
        },
        {f"{X}studies.drift.prevention:planned_prevention": Planned("", {}, 0)},
    ),
    "export": Command(
        ("--mix", "diff=1", "--output", "o"),
        tuple(
            f"{X}steering.export:export_{form}" for form in ("peft", "merged", "gguf_lora", "gguf")
        ),
        {
            "mix": flag("diff2=2"),
            "format": flag("merged", f"{X}steering.export:export_merged"),
            "rank": flag(7),
            "energy": flag(0.37),
            "prompts": flag("prompts.jsonl", "Why not?", "--rank 7"),
            "plain": flag(True, None, "--rank 7"),
            "model": flag("somebody/base", beside="--format merged"),
            "revision": flag("v7", beside="--format merged"),
            "trait_vector_dir": flag("vectors"),
            "converter": flag("c.py", beside="--format gguf"),
            "allow_other_base": flag(True, None, "--format merged"),
            "overwrite": None,
        },
        {
            f"{X}steering.export:read_mix": {},
            f"{X}steering.export:check_weights": None,
            "persona_lora.models.weight_files:weights_folder": Path("m"),
            f"{X}projections.inputs:kept_inputs": types.SimpleNamespace(compress=None),
        },
    ),
    "basis": Command(
        ("--diffs", "diff", "--output", "o", "--energy", "0.9"),
        (f"{X}steering.export:export_basis",),
        {
            "diffs": flag("diff2"),
            "rank": flag(7, instead=("--diffs", "diff", "--output", "o")),
            "energy": flag(0.37, instead=("--diffs", "diff", "--output", "o")),
            "original_model": flag("somebody/base"),
            "prompts": flag("prompts.jsonl", "Why not?"),
            "plain": flag(True, None),
            "overwrite": None,
        },
        {f"{X}studies.drift.run:load_diffs": {}, f"{X}projections.inputs:kept_inputs": None},
    ),
    "push": Command(
        ("diff", "--repo", "somebody/evil"),
        (f"{X}studies.publishing:check_repository",),
        # the others are in tests/studies/test_publishing.py
        {
            **dict.fromkeys(("direction", "base_id", "public", "yes")),
            "repo": flag("somebody/else"),
        },
    ),
    "demo": Command(
        (),
        (f"{X}studies.asking.run:generate_rows",),
        {
            "trait": flag("formality"),
            "question": flag("Why?"),
            "strength": flag(0.36, "0.6"),  # √0.36 as a coefficient
            "max_new_tokens": flag(37),
        },
        {
            f"{X}core.gallery:Gallery.__init__": None,
            f"{X}core.gallery:Gallery.exhibit": Exhibit(
                random_diff(tiny_llama(), seed=1, rank=1),
                Strengths("d", "", "p", (Moved(-1.0, 1.0, 1.0), Moved(1.0, 1.0, 1.0))),
            ),
            f"{X}steering.bank:Bank.steerer": None,
        },
    ),
    "gallery get": Command(
        ("--traits", "evil"),
        (f"{X}core.gallery:Exhibit.save",),
        {
            "traits": flag("formality", instead=("--traits", "evil")),
            "output": flag("there"),
            "source": flag("mine"),
        },
        {
            f"{X}core.gallery:Gallery.__init__": None,
            f"{X}core.gallery:Gallery.exhibit": Exhibit(
                random_diff(tiny_llama(), seed=1, rank=1), None
            ),
        },
    ),
    "gallery make": Command(
        ("--diffs", "diff", "--output", "o"),
        (f"{X}core.gallery:write_gallery",),
        {"diffs": flag("diff2"), "output": flag("there"), "overwrite": None},
    ),
    "engine command": Command(
        (),
        (
            f"{X}engines.vllm_server:server_command",
            f"{X}engines.vllm_server:BasisFolder.read",
        ),
        {
            "basis": flag("basis"),
            "tensor_parallel": flag(7),
            "cpu": flag(True, None),
            "host": flag("0.0.0.0"),
            "port": flag(7999),
            "revision": flag("v7", beside="--model somebody/else"),
        },
    ),
    "playground": Command(
        ("--directions", "diffs"),
        ("persona_lora.playground.mixing_page:serve",),
        {
            "traits": flag("sycophancy", None),
            "directions": flag("more", None),
            "mixes": flag("mixes"),
            "host": flag("localhost"),
            "port": flag(7999),
        },
        {"persona_lora.playground.mixing_page:build_page": "page"},
    ),
    "serve": Command(
        ("--directions", "diffs", "--port", "0"),
        ("persona_lora.serving.server:Server",),
        {
            "traits": flag("sycophancy", None),
            "directions": flag("more", None),
            "mixes": flag("mixes"),
            "host": flag("localhost"),
            "port": flag(7999),
            "max_batch": flag(37),
            "max_waiting": flag(38),
            "grace": flag(3.7),
        },
        {f"{X}cli.serving_commands:listening": contextlib.nullcontext(PLACE)},
    ),
    "persona build": Command(
        ("--id", "anna"),
        ("persona_lora.profiles.folders:build_persona",),
        {
            "id": flag("bert"),
            "all": None,  # instead of --id: tested below
            "conversations": flag("c.jsonl"),
            "speaker": flag("B"),
            "episode": flag("e7"),
            "samples": flag(37),
            "template": flag("t.txt", "judge {x}"),
            "writer_url": flag("http://y/v1", beside="--writer-model m --writer-url http://x/v1"),
            "writer_model": flag("m7", beside="--writer-url http://x/v1 --writer-model m"),
            "profile_prompt": flag(
                "t.txt", "judge {x}", "--writer-url http://x/v1 --writer-model m"
            ),
            "persona_dir": flag("people"),
        },
        {
            "persona_lora.profiles.conversations:load_conversations": None,
            f"{X}data.profile_writing:profile_writer": None,
            "persona_lora.models.embeddings:SentenceEmbedder": types.SimpleNamespace(embed=None),
        },
    ),
    "persona lamp": Command(
        ("--questions", "q.json", "--outputs", "a.json"),
        (f"{X}studies.personas.lamp:score_lamp",),
        {
            "questions": flag("q2.json"),
            "outputs": flag("a2.json"),
            "optimization": flag("opt.json"),
            "user": flag("70", None),
            "trait_vector_dir": flag("vectors", beside="--optimization opt.json"),
        },
        {
            f"{X}studies.personas.lamp:load_lamp": [
                types.SimpleNamespace(id="70"),
                types.SimpleNamespace(id="71"),
            ],
            f"{X}studies.personas.lamp:rows_of": [],
            f"{X}studies.personas.bench:Optimized.load": Optimized(),
        },
    ),
    "persona validate": Command(
        ("--output", "o.json"),
        ("persona_lora.core.files:write_json",),
        {
            "overwrite": None,  # in test_cli_early.py
            "persona_dir": flag("people"),
            "output": flag("p.json"),
            "judge": flag("letters", "LetterFeatures"),
        },
        {
            "persona_lora.judges.style_judge:LetterFeatures": None,
            "persona_lora.core.personas:list_personas": [],
            "persona_lora.models.embeddings:SentenceEmbedder": None,
            "persona_lora.judges.style_judge:TextFeatures": None,
            "persona_lora.judges.style_judge:fit_judges": {},
            "persona_lora.judges.style_judge:validate_judges": Checked(),
        },
    ),
    "persona sheets": Command(
        ("run", "--id", "anna", "--output", "o"),
        ("persona_lora.studies.personas.human_ratings:write_sheets",),
        {
            "run": None,
            "id": flag("bert"),
            "conditions": flag("none"),
            "prompts": flag(37),
            "persona_dir": flag("people"),
        },
    ),
    "traits generate": Command(
        ("--definitions", "d.json"),
        (f"{X}data.trait_generation:generate_traits",),
        {**LOCAL, **WRITING, "definitions": flag("d2.json")},
        {f"{X}data.trait_generation:read_definitions": []},
    ),
    "data generate": Command(
        EVIL,
        (f"{X}data.data_generation:generate_data",),
        {
            **LOCAL,
            **WRITING,
            "trait": flag("sycophancy"),
            "questions_per_domain": flag(37),
            "domains": flag("odd"),
            "questions": flag("questions.txt", "Why?"),
            "output": flag("elsewhere"),
        },
    ),
    "data check": Command(
        ("evil", *DATA),
        (f"{X}data.data_check:check_trait",),
        {"traits": None},
        {"persona_lora.models.embeddings:SentenceEmbedder": None},
    ),
    "data screen": Command(
        ("--file", "texts.jsonl", "--vector", "v.safetensors"),
        (
            f"{X}studies.vectors.text_projection:screen_rows",
            f"{X}studies.drift.row_pulls:pull_rows",
        ),
        {
            "overwrite": None,  # in test_cli_early.py
            "file": flag("more.jsonl", None),
            "vector": flag("w.safetensors", None),
            "layers": flag("0", None),
            "threshold": flag(0.37),
            "diffs": flag("diff2", None, instead=("--file", "texts.jsonl", "--diffs", "diff")),
            "allow_other_base": flag(True, None, "--diffs diff", ("--file", "texts.jsonl")),
        },
    ),
    "plan": Command(
        ("pilot", "--effect", "10"),
        (f"{X}report.power:plan_power",),
        {
            "pilot": None,
            "effect": flag(3.7),
            "power": None,  # read where sizes are: tested in test_read_pilot.py
            "level": flag(0.37, "0.63"),  # 1 − 0.37
            "family": flag(37, None),
            "simulations": flag(37),
        },
        {f"{X}studies.read_pilot:read_pilot": (Pilot.of(np.eye(1, 4)), 1)},
    ),
    "preregister": Command(
        ("--command", "sweep", "--questions", "eval=20", "--output", "frozen.yaml"),
        ("persona_lora.core.files:write_text",),
        {
            "command": flag("evaluate"),
            "questions": flag("ood=37", "37"),
            "family": flag("+37"),
            "seeds": flag(37),
            # what no report does: tested in test_protocol.py
            **dict.fromkeys(("level", "units", "test", "correction")),
            "least_scored": flag(0.37),
            "settings": flag('{"seed": 37}', "37"),
            "output": flag("elsewhere.yaml"),
        },
    ),
    "report": Command(("run",), ("persona_lora.studies.report_page:write_report",), {"runs": None}),
    "research-questions": Command(
        (),
        ("persona_lora.studies.research_questions:write_research_questions",),
        {"results": flag("found"), "overwrite": None},  # in test_cli_early.py
    ),
    "paired": Command(
        ("a", "b", "--output", "o.csv"),
        ("persona_lora.report.comparisons:write_found",),
        {
            "reference": None,
            "runs": None,
            "overwrite": None,  # in test_cli_early.py
        },
        {"persona_lora.report.comparisons:compare_runs": []},
    ),
    # what they do, and what they refuse: tests/test_packing.py
    "pack": Command(
        ("run", "--output", "a.zip"),
        (f"{X}studies.packing:pack_run",),
        {"folder": None, "output": flag("b.zip"), "overwrite": flag(True)},
    ),
    "verify": Command(("run",), (f"{X}core.archives:opened",), {"archive": None}),
    "reproduce": Command(
        ("run", "--output", "again"),
        (f"{X}core.archives:opened",),
        {"archive": None, "output": None},
    ),
    "selfcheck": Command(DATA, (f"{X}studies.selfcheck:selfcheck",), {"trait": flag("evil")}),
    "schema": Command(("sweep",), (), {"words": None}),
    "persona ratings": Command(
        ("folder", "a.csv"),
        ("persona_lora.studies.personas.human_ratings:read_ratings",),
        {"folder": None, "files": None},
    ),
}
# What their options mean is tests/training/test_arguments.py: they are fields, not flags.
OWN_PARSERS = {"train", "finetune"}


TOP = typer.main.get_command(cli.app)
ALL = dict(commands(TOP))


def entry(command: str, name: str) -> Flag | None:
    """Return the entry of a flag; None for an argument, and for what is tested apart."""
    own = COMMANDS[command].flags
    if name not in own and name not in COMMON:
        pytest.fail(f"{command} --{name.replace('_', '-')} has no entry in tests/test_flags.py")
    return own[name] if name in own else COMMON[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what the commands read before they call the library."""
    folder = tmp_path_factory.mktemp("flags")
    model = tiny_llama()
    for number, path in enumerate(("diff", "diff2", "diffs/evil/diff", "diffs/sycophancy/diff")):
        random_diff(model, seed=number, rank=1).save(folder / path)
    random_diff(model, seed=9, rank=1).save(folder / "more/evil/diff")
    for number, name in enumerate(("v", "w", "evil")):
        directions = {0: torch.full((32,), 1.0 + number), 1: torch.ones(32)}
        SteeringVector(directions, BaseModel("tiny", None), num_layers=2).save(
            folder / f"{name}.safetensors"
        )
    for name in ("texts", "more"):
        turns = [{"role": "user", "content": name}, {"role": "assistant", "content": "Yes."}]
        (folder / f"{name}.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    for name in ("answers", "others"):
        (folder / f"{name}.csv").write_text(f"question,answer\nWhy {name}?,So.\n")
    for name in ("unrated", "unrated2"):
        (folder / name).mkdir()
        evil = json.loads((ROOT / "datasets/evil/trait.json").read_text())
        (folder / name / "trait.json").write_text(json.dumps({**evil, "name": name}))
    (folder / "t.txt").write_text("judge {x}")
    (folder / "odd.txt").write_text("Be odd.\n")
    (folder / "pilot").mkdir()
    pilot = {"command": "sweep", "config": {}, "seed": 0, "status": "finished"}
    (folder / "pilot" / "run.json").write_text(json.dumps(pilot))
    frozen = FrozenProtocol("evaluate", {"eval": 37})
    (folder / "protocol.yaml").write_text(yaml.safe_dump(frozen.as_dict()))
    (folder / "questions.txt").write_text("Why?\n")
    (folder / "prompts.jsonl").write_text('{"prompt": "Why not?"}\n')
    (folder / "mine.py").write_text(
        "def score(q, a):\n    return [0.0] * len(a)\n\nother = score\n"
    )
    said = {"train": [f"Why {at}?" for at in range(15)], "held_out": ["Who?"]}
    (folder / "said.json").write_text(json.dumps(said))
    (folder / "weights.json").write_text('{"formality": 3.7}')
    (folder / "data2").symlink_to(ROOT / "datasets")
    adapters = ("adapter", *(f"adapter{number}" for number in range(2, 6)))
    for name, rows in zip(adapters, ("normal", "a", "b", "c", "d"), strict=True):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        record = {**pilot, "config": {"train_file": f"rows/{rows}.jsonl"}}
        (folder / name / "run.json").write_text(json.dumps(record))
    (folder / "people/somebody").mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def imported():
    """All modules of the package: one first imported beside a spy would keep it for other tests."""
    for each in pkgutil.walk_packages(persona_lora.__path__, X):
        if not each.name.endswith("__main__"):
            importlib.import_module(each.name)


@pytest.fixture
def calls(folder, imported, monkeypatch):
    """Return a function that runs a command and returns the leaves of all that the library got."""
    monkeypatch.chdir(folder)
    for name in ("OPENAI_BASE_URL", "JUDGE_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    chat_model = ChatModel(tiny_llama(), byte_tokenizer(), "tiny")

    def run(command: str, words: tuple[str, ...]) -> set[str]:
        made = COMMANDS[command]
        seen: set[str] = set()
        spies: list[Any] = []

        def spy(name: str, answer: Any, stops: bool) -> Any:
            def called(*arguments: Any, **keywords: Any) -> Any:
                seen.update(leaves((name, arguments, keywords)))
                if stops:
                    raise Stop
                return answer

            spies.append(called)
            return called

        with monkeypatch.context() as patch:
            answers = {
                "persona_lora.models.loading:load_chat_model": chat_model,
                f"{X}judges.choice:check_judge": None,
                "persona_lora.models.loading:check_window": None,
                "persona_lora.models.loading:model_config": chat_model.model.config,
                f"{X}core.runs:Planned.check": None,
                f"{X}cli.shared_options:ModelOptions.check_adapters": None,
                f"{X}engines.remote:check_servers": None,
                f"{X}engines.remote:engine_kind": "vllm",
                f"{X}steering.placement:check_before_loading": None,
                f"{X}steering.bank:warn_of_other_template": None,
                f"{X}studies.drift.run:check_finetunes": None,
                f"{X}studies.personas.run:check_fresh": None,
                f"{X}studies.personas.method_comparison:directions_by_name": {
                    "formality": [],
                    "x": [],
                },
                f"{X}judges.persona_judges:judge_prompt_of": None,
                f"{X}studies.asking.capability:check_tasks": None,
                f"{X}studies.vectors.run:read_pairs": [],
                f"{X}training.finetune:read_conversations": [],
                f"{X}judges.choice:named_content": "digest",
                **made.answers,
            }
            for name in (*answers, *made.stops):
                module, _, path = name.partition(":")
                *owners, last = path.split(".")
                owner = functools.reduce(getattr, owners, importlib.import_module(module))
                patch.setattr(owner, last, spy(name, answers.get(name), name in made.stops))
            with contextlib.suppress(Stop):
                TOP.main([*command.split(), *words], standalone_mode=False)
        ours = [vars(module) for name, module in sys.modules.items() if name.startswith(X)]
        kept = {id(each) for held in ours for each in held.values()}
        assert kept.isdisjoint(map(id, spies))
        return seen

    return run


def leaves(value: Any, place: str = "", depth: int = 0) -> set[str]:
    """Return the plain values inside arguments, each with its place: "evaluate.1.seed=37"."""
    if depth > 12 or isinstance(value, torch.nn.Module):
        return {f"{place}={type(value).__name__}"}
    inner: list[tuple[Any, Any]] | None = None
    if isinstance(value, torch.Tensor):
        return {f"{place}={float(value.float().sum())}"}
    if isinstance(value, Mapping):
        inner = [pair for key, each in value.items() for pair in ((f"key {key}", key), (key, each))]
    elif isinstance(value, tuple | list | set | frozenset):
        inner = list(enumerate(value))
    elif isinstance(value, functools.partial):
        inner = [("args", value.args), ("keywords", value.keywords), ("func", value.func)]
    elif isinstance(value, contextlib._GeneratorContextManager):
        inner = [("args", value.args), ("keywords", value.kwds)]
    elif isinstance(value, types.FunctionType):
        inner = [(at, cell.cell_contents) for at, cell in enumerate(value.__closure__ or ())]
    elif isinstance(value, types.SimpleNamespace):
        inner = list(vars(value).items())
    elif isinstance(value, ChatModel):
        inner = [("name", value.name), ("allow_other_base", value.allow_other_base)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = [(each.name, getattr(value, each.name)) for each in dataclasses.fields(value)]
    elif type(value).__module__.startswith("persona_lora") and hasattr(value, "__dict__"):
        inner = list(vars(value).items())
    if inner is None:  # an object's own text may hold its address
        plain = isinstance(value, str | int | float | Path | torch.dtype | None)
        return {f"{place}={value if plain else type(value).__name__}"}
    return {leaf for key, each in inner for leaf in leaves(each, f"{place}.{key}", depth + 1)}


def flag_words(parameter: Any, value: object) -> tuple[str, ...]:
    if value is False:
        return (parameter.secondary_opts[0],)
    option = max(parameter.opts, key=len)
    return (option,) if value is True else (option, str(value))


def test_every_command_has_an_entry():
    assert set(ALL) - OWN_PARSERS == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_reaches_what_it_sets(calls, command):
    found: dict[tuple[str, ...], set[str]] = {}
    usual = COMMANDS[command].words
    idle = []
    for parameter in ALL[command].params:
        wanted = entry(command, parameter.name)
        if wanted is None:
            continue
        base = (*(usual if wanted.instead is None else wanted.instead), *wanted.beside.split())
        if base not in found:
            found[base] = calls(command, base)
        with_it = calls(command, (*base, *flag_words(parameter, wanted.value)))
        new = with_it - found[base]
        seen = str(wanted.value if wanted.seen == "" else wanted.seen)
        arrived = any(seen in leaf for leaf in new) or wanted.seen is None
        if with_it == found[base] or not arrived:
            idle.append((parameter.name, seen, sorted(new)[:5]))
    assert not idle


@pytest.mark.parametrize("command", OPTIONS)
def test_no_option_takes_a_count_under_nought_or_nothing_at_all(command):
    for option in OPTIONS[command]:
        inner = get_args(option.parts[0])[:1] if option.repeats else ()
        wrong: list[Any] = [-1, 2**40] if int in option.parts else []
        wrong += [["-1"]] if inner == (int,) else []
        wrong += [[""]] if option.repeats and not option.default else []
        for value in wrong if option.typer_info is None else ():
            with pytest.raises(UserError, match=option.flag):
                option.read(value)


@pytest.mark.parametrize("command", OPTIONS)
def test_no_list_takes_one_thing_twice_but_coefficients_of_other_things(command, tmp_path):
    """It would count twice, or be compared with itself."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for option in OPTIONS[command]:
        if get_origin(option.parts[0]) not in (tuple, list):
            continue
        inner, once = get_args(option.parts[0])[0], option.flag != "--coefficient"
        kind = get_args(inner)[0] if get_origin(inner) is Annotated else inner
        pairs = [("1", "1.0" if kind == Strength else "1")]
        if get_origin(kind) is Literal:
            pairs = [get_args(kind)[:1] * 2]
        elif kind in (str, Path):
            pairs += [(str(tmp_path / "a"), str(tmp_path / each)) for each in ("a", "b/../a", "b")]
        for pair in pairs:
            given = [",".join(pair)] if option.typer_info is None else [kind(each) for each in pair]
            refused = pytest.raises(UserError, match=r"names .+ twice; give it once")
            with refused if once else contextlib.nullcontext():
                option.read(given)


@pytest.mark.parametrize("command", OPTIONS)
def test_an_empty_text_is_nothing_but_where_the_help_says_what_it_is(command):
    """As a path it would be the folder that one is in."""
    for option in OPTIONS[command]:
        kinds = option.parts if option.typer_info is None else [option.kind, *get_args(option.kind)]
        if kinds[0] is str or Path in kinds:
            told = '""' in option.help
            with contextlib.nullcontext() if told else pytest.raises(UserError, match="is empty"):
                option.read([""] if get_origin(option.kind) is list else "")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("gallery", "get", "--from", ""), "--from"),
        (("gallery", "get", "--output", ""), "--output"),
        (("pack", ""), "FOLDER"),
        (("report", "run", ""), "RUNS"),
        (("diagnose", "", "--diffs", "diff", "--output", "o"), "FINETUNE"),
        (("sweep", "--trait", ""), "--trait"),
        (("optimize", "--persona-id", "a", "--save-dir", ""), "--output"),
    ],
)
def test_no_path_is_empty(folder, monkeypatch, words, name):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=f"^{name} is empty"):
        TOP.main([*words], standalone_mode=False)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("evaluate", "--diff diff --coefficient="),
        ("evaluate", "--diff="),
        ("evaluate", "--adapter="),
        ("sweep", "--output="),
        ("evaluate", "--diff diff,diff --coefficient 1,2"),
        ("evaluate", "--vector v.safetensors,v.safetensors"),
        ("evaluate", "--temperature -1"),
        ("evaluate", "--max-questions 0"),
        ("optimize", "--constraint="),
        ("optimize", "--fixed="),
        ("preregister", "--questions eval=-5"),
        ("compare", "--batches 0"),
        ("benchmark", "--limit 0"),
    ],
)
def test_a_value_that_would_be_taken_for_another_is_refused(calls, command, words):
    with pytest.raises(UserError, match=r"empty|twice|must be|at least|from 1 to"):
        calls(command, (*COMMANDS[command].words, *words.split()))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_of_options_does_what_flags_do(calls, command, tmp_path):
    usual = COMMANDS[command].words
    context = ALL[command].make_context(command, list(usual))
    given = {
        name: [str(each) for each in value] if isinstance(value, list | tuple) else str(value)
        for name, value in context.params.items()
        if context.get_parameter_source(name).name == "COMMANDLINE"
    }
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(given))
    by_file = calls(command, ("--config", str(tmp_path / "all.yaml")))
    assert by_file == calls(command, usual)


USELESS = {
    "evaluate": (
        "--layers 0",
        "--positions all",
        "--ablate",
        "--mode merged",
        "--coefficient 1",
        "--diff diff --layers 0",
        "--diff diff --ablate",
        "--vector v.safetensors --mode live",
        "--vector v.safetensors --ablate --coefficient 2",
        "--system-prompt pos --coefficient 1",
        "--allow-other-base",
        "--judge-url http://x",
        "--judge-mode number",
        "--judge embedding --judge-model m",
        "--max-judge-cost 1",
        "--judge local --judge-url http://x",
    ),
    "sweep": (
        "--layers 0",
        "--positions all",
        "--no-control",
        "--control",
        "--method none --coefficients 1",
        "--method none --no-references",
        "--no-references --positive-prompt odd.txt",
        "--method prompt --divergence",
        "--method none --allow-other-base",
    ),
    "project weights": ("--plain --prompts prompts.jsonl", "--plain --dtype float32"),
    "compare": ("--batches 1", "--rounds 2", "--trait-vector-dir x"),
    "benchmark": (
        "--layers 0",
        "--positions all",
        "--coefficient 1",
        "--diff diff --layers 0",
        "--allow-other-base",
    ),
    "optimize": (
        "--layers 0",
        "--method svd --energy 0.9",
        "--plain",
        "--method svd --warm-start",
        "--by layers --warm-start",
        "--num-prompts 1 --race",
        "--prompts said.json",
        "--method svd --by layers",
        "--min-coherence 80 --constraint coherence>=70",
    ),
    "compare-methods": (
        "--methods lora --layers 0",
        "--methods svd@1 --layers 0",
        "--methods svd --energy 0.9",
        "--plain",
        "--methods prompt --alpha 1",
        "--methods equal --race",
        "--methods lora --num-prompts 1 --race",
        "--methods prompt --allow-other-base",
        "--methods prompt --sigma0 1",
        "--methods prompt --search-seeds 2",
    ),
    "extract": (
        "--source answers --judge openai",
        "--source answers --temperature 1",
        "--source answers --min-pairs 3",
        "--source answers --assistant-name x",
        "--source prompts --pos-path p.csv",
        "--source files --pos-path p.csv --neg-path n.csv --samples 2 --temperature 1",
    ),
    "vectors convert": ("--model-hint qwen2", "--form gguf --coefficient 2"),
    "project activations": ("--datasets-dir x", "--no-shift --base-model m"),
    "evaluate-checkpoints": ("--layers 0", "--positions prompt_last"),
    "predict-finetuning": ("--layers 0",),
    "data screen": ("--allow-other-base",),
    "compare-prevention": ("--tasks= --limit 3",),
    "export": (
        "--prompts p.jsonl",
        "--plain",
        "--rank 2 --plain --prompts p.jsonl",
        "--rank 2 --plain --model m",
        "--rank 2 --allow-other-base",
        "--model m",
        "--revision v",
        "--converter c.py",
        "--format merged --converter c.py",
        "--allow-other-base",
        "--format gguf-lora --rank 2 --prompts p.jsonl --allow-other-base",
    ),
    "persona lamp": ("--trait-vector-dir x",),
    "basis": ("--plain --prompts prompts.jsonl", "--plain --dtype float16"),
    "data generate": (
        "--questions questions.txt --domains a",
        "--questions questions.txt --questions-per-domain 2",
    ),
}


@pytest.mark.parametrize(
    ("command", "words"), [(name, words) for name, each in USELESS.items() for words in each]
)
def test_what_would_do_nothing_is_refused(calls, command, words):
    usual = COMMANDS[command].words
    if "--method" in words:  # a method of its own does without the diff
        usual = usual[: usual.index("--diff")] if "--diff" in usual else usual
    with pytest.raises(UserError, match=r"--[a-z0-9-]+ does nothing .*; leave it out"):
        calls(command, (*usual, *words.split()))


def test_prompts_to_weigh_by_are_for_diffs(calls):
    words = [each for each in COMMANDS["predict-finetuning"].words if "diff" not in each]
    with pytest.raises(UserError, match="--prompts does nothing without --diffs; leave it out"):
        calls("predict-finetuning", (*words, *["--vectors", "evil.safetensors", "--prompts", "p"]))


def test_all_personas_are_built_in_place_of_one(calls):
    assert any("people/somebody" in leaf for leaf in calls("persona build", ("--all", *PEOPLE)))
    with pytest.raises(UserError, match="give --id, or --all"):
        calls("persona build", ("--all", "--id", "somebody", *PEOPLE))


def test_one_layer_is_compared_over_both_spaces(calls):
    words = (*COMMANDS["compare"].words, "--layers", "0,1", "--spaces", "sycophancy")
    with pytest.raises(UserError, match="--spaces compares at one layer; --layers '0,1'"):
        calls("compare", words)


def test_several_samples_of_a_greedy_answer_are_refused(calls):
    with pytest.raises(UserError, match="temperature above 0"):
        calls("evaluate", (*COMMANDS["evaluate"].words, "--samples", "3"))
