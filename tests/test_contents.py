"""A run is its inputs' content: what is changed under the same path is named and refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from persona_lora import cli
from persona_lora.judges import choice
from persona_lora.studies.drift import prediction
from tests.scenes import LetterJudge

TRAIT, LABELS, PAIRS = (f"datasets/cheer/{name}.json{end}" for name, end in (
    ("trait", ""), ("judge_eval", "l"), ("train", "l"),
))  # fmt: skip
ORDINARY, NORMAL = "datasets/ordinary/prompts.jsonl", "datasets/cheer/normal.jsonl"
WEIGHTS, TEMPLATE = "model/model.safetensors", "model/chat_template.jinja"
DIFF, VECTOR = "diff/adapter_model.safetensors", "vector.safetensors"
TUNED = "tuned/checkpoint-2"
ADAPTER = f"{TUNED}/adapter_model.safetensors"
ASKED = "--trait cheer --max-new-tokens 3"
AT_ONE = "--vector vector.safetensors --layers 1"
COMMANDS = {
    "evaluate": f"evaluate {ASKED} --diff diff --output out/a.csv",
    "evaluate vector": f"evaluate {ASKED} {AT_ONE} --output out/b.csv",
    "sweep": f"sweep {ASKED} --diff diff --coefficients 1 --output out/sweep",
    "compare": f"compare {ASKED} --diff diff --activation-{AT_ONE[2:]} --coefficients 1 "
    "--output out/compare",
    "extract": "extract --trait cheer --source answers --output out/answers",
    "extract files": "extract --trait cheer --pos-path pos.csv --neg-path neg.csv --min-pairs 1 "
    "--positions response_avg --output out/files",
    "project": "project activations --file pos.csv --vectors vector.safetensors --layers 1 "
    "--output out/projected",
    "labelled": "project activations --labelled cheer --vectors vector.safetensors --layers 1 "
    "--output out/labelled",
    "checkpoints": "evaluate-checkpoints tuned --traits cheer --vectors vector.safetensors "
    "--layers 1 --max-new-tokens 3 --output out/checkpoints",
    "prediction": f"predict-finetuning --finetunes {TUNED} --finetunes tuned/checkpoint-4 "
    "--finetunes tuned/checkpoint-6 --finetunes tuned/checkpoint-8 --traits cheer "
    "--diffs diff --output out/prediction --max-new-tokens 3",
    "prevention": f"compare-prevention --trait cheer --finetunes plain={TUNED} --rows {NORMAL} "
    "--tasks perplexity --output out/prevention --max-new-tokens 3",
    "benchmark": "benchmark --diff diff --tasks perplexity --output out/benchmark",
}
CASES = [
    ("evaluate", TRAIT, "Is my plan good?", "the trait cheer"),
    ("evaluate", TRAIT, "Rate", "the trait cheer"),
    ("evaluate", LABELS, '"label": 25', "judge_eval.jsonl of cheer"),
    ("evaluate", PAIRS, "Yes", "train.jsonl of cheer"),
    ("evaluate", WEIGHTS, None, "the model's weights"),
    ("evaluate", "model/generation_config.json", '"eos_token_id": 2', "the model's weights"),
    ("evaluate", TEMPLATE, "assistant", "the model's tokenizer"),
    ("evaluate", DIFF, None, "the diff"),
    ("evaluate vector", VECTOR, None, "the vector"),
    ("evaluate vector", WEIGHTS, None, "the model's weights"),
    ("sweep", DIFF, None, "the diff"),
    ("sweep", ORDINARY, "Hello?", "the ordinary prompts"),
    ("sweep", TRAIT, "Be cheerful.", "the trait cheer"),
    ("compare", DIFF, None, "the diff"),
    ("compare", VECTOR, None, "the vector"),
    ("compare", ORDINARY, "Hello?", "the ordinary prompts"),
    ("extract", PAIRS, "Yes", "train.jsonl of cheer"),
    ("extract files", "pos.csv", "fine", "pos.csv"),
    ("extract files", WEIGHTS, None, "the model's weights"),
    ("project", "pos.csv", "fine", "pos.csv"),
    ("project", VECTOR, None, "the vector vector"),
    ("labelled", LABELS, "zzz", "judge_eval.jsonl of cheer"),
    ("checkpoints", ADAPTER, None, "checkpoint-2"),
    ("checkpoints", VECTOR, None, "the vector vector"),
    ("checkpoints", TRAIT, "Is my plan good?", "the trait cheer"),
    ("prediction", ADAPTER, None, "the finetune"),
    ("prediction", DIFF, None, "the diff"),
    ("prevention", ADAPTER, None, "the adapter of"),
    ("prevention", NORMAL, "Good", "the rows that were finetuned on"),
    ("prevention", LABELS, '"label": 25', "judge_eval.jsonl of cheer"),
    ("benchmark", DIFF, None, "diff"),
    ("benchmark", NORMAL, "Good", "the normal.jsonl files"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_world):
    """A folder with all that the commands read, and a note of those that were run in it."""
    return make_world(tmp_path_factory.mktemp("world")), set()


def change(path: Path, text: str | None) -> None:
    """Change a word of a text, or the sign of one tensor: no name, size or norm tells of it."""
    if text is not None:
        whole = path.read_text()
        assert text in whole
        other = text[:-2] + "50" if text[-1].isdigit() else text[:-1] + "x"
        path.write_text(whole.replace(text, other, 1))
        return
    with safe_open(path, framework="pt") as stream:
        metadata = stream.metadata()
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name] = -tensors[name]
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(("command", "path", "text", "named"), CASES)
def test_a_changed_input_is_named_and_refused(
    world, no_drawing, monkeypatch, capsys, command, path, text, named
):
    root, done = world
    monkeypatch.chdir(root)
    monkeypatch.setitem(choice.JUDGES, "embedding", lambda *_: LetterJudge())
    monkeypatch.setattr(prediction, "RANDOM_DIRECTIONS", 1)

    def call():
        words = [*COMMANDS[command].split(), "--model", "model", "--dtype", "float32"]
        if command not in ("extract files", "project"):
            words += ["--datasets-dir", "datasets"]
        monkeypatch.setattr(sys, "argv", ["persona-lora", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capsys.readouterr().err

    if command not in done:
        status, said = call()
        assert status == 0, said
        done.add(command)
    kept = (root / path).read_bytes()
    change(root / path, text)
    try:
        status, said = call()
    finally:
        (root / path).write_bytes(kept)
    assert status == 2, said
    assert "holds a run of other inputs" in said, said
    assert named in said, said


def test_the_table_covers_every_kind_of_input():
    assert len(CASES) >= 21
    assert {command for command, *_ in CASES} == set(COMMANDS)
