"""Mistakes with vectors, layers, files and checkpoints: one line, status 2, nothing written."""

from __future__ import annotations

import dataclasses
import json
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from persona_lora.cli.option_groups import options_of
from persona_lora.cli.shared_options import RunOptions
from persona_lora.cli.steering_commands import PairOptions, VariedOptions
from persona_lora.core.files import write_jsonl
from persona_lora.core.lora_diff import BaseModel, LoRADiff
from persona_lora.core.runs import Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.vector_files import load_vector
from persona_lora.judges import choice
from persona_lora.models import embeddings
from persona_lora.models.structure import weight_fingerprint
from tests.scenes import LetterJudge, assert_fails, evaluation


@pytest.fixture
def vector(model):
    generator = torch.Generator().manual_seed(0)
    directions = {layer: torch.randn(32, generator=generator) for layer in (0, 1)}
    base = BaseModel("tiny", weight_fingerprint(model))
    return SteeringVector(directions, base, num_layers=2, trait="sycophancy")


@pytest.fixture
def vector_file(vector, tmp_path):
    return vector.save(tmp_path / "v.safetensors")


def test_a_vector_of_another_width_or_depth_is_named(run, model_folder, vector, tmp_path):
    wide = dataclasses.replace(vector, directions={0: torch.ones(48)})
    path = wide.save(tmp_path / "wide.safetensors")
    words = evaluation(model_folder, "--vector", path, "--layers", 0)
    assert_fails(run(*words), "width 48", "width 32")
    deep = dataclasses.replace(vector, num_layers=30).save(tmp_path / "deep.safetensors")
    assert_fails(run(*evaluation(model_folder, "--vector", deep, "--layers", 1)), "30 layers")
    assert not (tmp_path / "out").exists()


def test_a_vector_of_other_weights_is_refused_unless_meant(run, model_folder, vector, tmp_path):
    other = dataclasses.replace(vector, base_model=BaseModel("other", "0" * 32))
    path = other.save(tmp_path / "other.safetensors")
    assert_fails(run(*evaluation(model_folder, "--vector", path)), "--allow-other-base", "'other'")
    assert not (tmp_path / "out").exists()


def test_nan_in_a_vector_is_named(run, model_folder, vector_file, tmp_path):
    tensors = load_file(vector_file)
    with open(vector_file, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        metadata = json.loads(stream.read(size))["__metadata__"]
    tensors["layer.1"][3] = float("nan")
    save_file(tensors, vector_file, metadata=metadata)
    words = evaluation(model_folder, "--vector", vector_file)
    assert_fails(run(*words), "layer 1", "NaN")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--layers", "2"), ("out of range", "0–1")),
        (("--layers", "0-5"), ("out of range", "0–1")),
        (("--layers", "one"), ("--layers must be like", "'one'")),
        (("--layers", "0+2"), ("out of range", "0–1")),
        (("--layers", "0+"), ("--layers 0+", "as in 10+14+18")),
        (("--layers", "0+1,0"), ("--layers 0+1,0", "goes into another run")),
        (("--positions", "answer"), ("response, prompt, all", "'answer'")),
        (("--coefficient", "nan"), ("finite",)),
        (("--coefficient", "1", "--coefficient", "2"), ("1 --vector and 2 --coefficient",)),
        (("--method", "lora"), ("--method lora needs --diff",)),
        (("--method", "weights"), ("--method must be one of lora, activation, prompt, none",)),
        (("--method", "none"), ("--vector has no part in --method none",)),
    ],
)
def test_what_cannot_be_meant_is_refused(run, model_folder, vector_file, words, expected, tmp_path):
    assert_fails(run(*evaluation(model_folder, "--vector", vector_file, *words)), *expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("layers", "control", "number", "drawn"),
    [
        ("1", None, 3, 3),
        ("1", None, 1, 1),
        ("1", True, 4, 4),
        ("1", False, 3, 0),
        ("0,1", None, 3, 0),
        ("0,1", True, 3, 3),
        ("0,1", False, 3, 0),
        ("0+1", None, 3, 3),
        ("0+1", False, 3, 0),
    ],
)
def test_random_directions_stand_beside_a_vector_where_they_are_wanted(
    vector_file, vector, monkeypatch, layers, control, number, drawn
):
    monkeypatch.setattr("persona_lora.cli.steering_commands.refuse_useless", lambda *_, **__: None)
    varied = VariedOptions(
        vector=vector_file, layers=layers, control=control, random_controls=number,
        coefficients=(1.0,),
    )  # fmt: skip
    found = varied.load("activation", seed=5)
    methods = [each.method for each in found.conditions if each.coefficient]
    names = ["random", *(f"random#{at}" for at in range(2, drawn + 1))][:drawn]
    assert sorted(methods) == sorted(["activation", *names] * len(layers.split(",")))
    lengths = {
        float(each.directions[1].norm())
        for each in found.bank.vectors.values()
        if 1 in each.directions
    }
    assert all(each == pytest.approx(float(vector.directions[1].norm())) for each in lengths)
    directions = {tuple(each.directions[at].tolist()) for each in found.bank.vectors.values()
                  for at in each.directions}  # fmt: skip
    at_once = layers.count("+") + 1
    assert len(directions) == len(methods) * at_once  # every one drawn for itself


def test_a_missing_vector_and_no_vector_are_named(run, model_folder):
    assert_fails(run(*evaluation(model_folder, "--vector", "nowhere.pt")), "nowhere.pt")
    assert_fails(run(*evaluation(model_folder, "--vector", "v.txt")), "v.txt", ".safetensors")
    assert_fails(
        run(*evaluation(model_folder, "--method", "activation")),
        "--method activation needs --vector",
    )


def test_a_sweep_of_nothing_says_what_it_needs(run, model_folder):
    words = ("sweep", "--trait", "sycophancy", "--model", model_folder)
    assert_fails(run(*words), "--diff or --vector")
    assert_fails(run(*words, "--method", "lora"), "--method lora needs --diff")


def test_conversion_round_trips_and_refuses_unknown_forms(run, vector_file, vector, tmp_path):
    status, out, _ = run("vectors", "convert", vector_file, "v.pt", "--form", "published")
    assert status == 0
    assert "v.pt" in out
    back = load_vector(tmp_path / "v.pt")
    assert torch.equal(back.directions[1], vector.directions[1])
    status, out, _ = run("vectors", "convert", vector_file, "v.gguf", "--form", "gguf")
    assert status == 0
    assert "layer 0 was left out" in out
    convert = ("vectors", "convert", vector_file)
    assert_fails(run(*convert, "v.onnx", "--form", "onnx"), "'onnx'")
    assert_fails(run(*convert, "v.pt", "--form", "lm-eval"), "--layers")
    assert_fails(run(*convert, "v.npz", "--form", "published"), ".pt")
    assert not (tmp_path / "v.onnx").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--source", "dreams"), ("'dreams'",)),
        (("--source", "files"), ("--pos-path and --neg-path",)),
        (("--source", "answers", "--methods", "median"), ("'median'", "mean_diff")),
        (("--source", "answers", "--positions", "middle"), ("'middle'",)),
        (("--source", "answers", "--layers", "7"), ("out of range", "0–1")),
        (("--source", "prompts", "--samples", "3"), ("temperature above 0",)),
    ],
)
def test_extraction_refuses_what_it_cannot_do(run, model_folder, words, expected, tmp_path):
    result = run(
        "extract", "--trait", "sycophancy", "--model", model_folder, "--output", "v", *words
    )
    assert_fails(result, *expected)
    assert not list(tmp_path.glob("v/*.safetensors"))


def test_help_says_where_vectors_go_and_come_from():
    groups = (RunOptions, PairOptions)
    said = {option.name: option.help for each in groups for _, option in options_of(each)}
    assert "checkpoints/vectors/" in said["output"]
    assert "default" in said["source"]


def test_extraction_from_files_names_a_missing_column_and_an_empty_filter(
    run, model_folder, tmp_path
):
    words = (
        "extract", "--trait", "sycophancy", "--model", model_folder, "--output", "v",
        "--pos-path", "a.csv", "--neg-path", "a.csv",
    )  # fmt: skip
    (tmp_path / "a.csv").write_text("prompt,answer,coherence\np,a,90\n")
    assert_fails(run(*words), "a.csv", "'sycophancy'")
    (tmp_path / "a.csv").write_text("prompt,answer,sycophancy,coherence\np,a,90,90\n")
    assert_fails(run(*words), "0 of 1 pairs pass", "negative ones at or over 50: 1")
    assert not (tmp_path / "v").exists()


def test_projection_names_what_it_cannot_split(run, model_folder, vector_file, tmp_path):
    words = ("project", "activations", "--model", model_folder, "--output", "p")
    with_vector = (*words, "--vectors", vector_file)
    assert_fails(run(*with_vector), "--file", "--labelled")
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    assert_fails(run(*with_vector, "--file", "a.jsonl"), "a.jsonl:1", "cannot be split")
    (tmp_path / "a.csv").write_text("question,answer\nx,y\n")
    assert_fails(run(*with_vector, "--file", "a.csv"), "'prompt'")
    assert_fails(run(*with_vector, "--file", "a.csv", "--positions", "mean"), "'mean'")
    (tmp_path / "a.csv").write_text("prompt,answer\nx,y\n")
    assert_fails(run(*with_vector, "--file", "a.csv", "--layers", "9"), "out of range")
    assert_fails(run(*with_vector, "--vectors", vector_file, "--file", "a.csv"), "twice")
    assert_fails(run(*with_vector, "--file", "a.csv", "--shift"), "--base-model")
    assert not (tmp_path / "p").exists()


def test_projection_takes_lists_in_one_string_and_writes_both_forms(
    run, model_folder, vector, vector_file, tmp_path
):
    other = (-vector).save(tmp_path / "w.safetensors")
    (tmp_path / "a.csv").write_text("prompt,answer\nHello,yes\nAnd,no\n")
    status, out, error = run(
        "project", "activations", "--model", model_folder, "--dtype", "float32",
        "--vectors", f"{vector_file},{other}", "--layers", "0,1", "--file", "a.csv",
        "--output", "p", "--columns",
    )  # fmt: skip
    assert status == 0, error
    assert len((tmp_path / "p" / "projections.csv").read_text().splitlines()) == 1 + 2 * 2 * 2
    header = (tmp_path / "p" / "columns.csv").read_text().splitlines()[0]
    assert "w_response_avg_layer1" in header
    assert "p" in out


def test_a_folder_without_checkpoints_is_named(run, model_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    words = ("evaluate-checkpoints", "empty", "--traits", "sycophancy", "--model", model_folder)
    assert_fails(run(*words), "empty", "checkpoint-N")
    assert not (tmp_path / "results").exists()


def test_generation_names_its_mistakes(run, tmp_path):
    words = ("traits", "generate", "--definitions", "d.json")
    assert_fails(run(*words), "d.json")
    (tmp_path / "d.json").write_text('{"odd": "is odd"}')
    assert_fails(run(*words, "--local", "--endpoint", "http://x"), "exclude each other")
    assert_fails(run(*words, "--endpoint", "nowhere"), "base URL")
    data = ("data", "generate", "--trait", "sycophancy", "--local")
    assert_fails(run(*data, "--questions-per-domain", "0"), "at least 1")
    assert_fails(run(*data, "--questions", "nowhere.txt"), "nowhere.txt")


def test_personas_name_their_mistakes(run, tmp_path):
    words = ("persona", "build", "--id", "ann", "--persona-dir", tmp_path)
    assert_fails(run(*words), "ann", "does not exist")
    assert_fails(run(*words, "--speaker", "C"), "'C'")
    (tmp_path / "few.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "Hello there"}]}) + "\n"
    )
    assert_fails(run(*words, "--conversations", "few.jsonl"), "1 utterances", "at least 5")
    assert not (tmp_path / "ann").exists()


def test_personas_are_built_and_the_rest_is_named(run, tmp_path, monkeypatch):
    said = types.SimpleNamespace(embed=lambda texts: np.eye(len(texts), 99, dtype=np.float32))
    monkeypatch.setattr(embeddings, "SentenceEmbedder", lambda: said)
    for name, number in (("ann", 6), ("bob", 2)):
        talk = [
            {"role": role, "content": f"I went to the harbour {at} times with {who}"}
            for at in range(number)
            for role, who in (("user", "my sister"), ("assistant", "nobody"))
        ]
        rows = [
            {"id": split, "split": split, "messages": part}
            for split, part in (("train", talk), ("test", talk[:2]))
        ]
        (tmp_path / "people" / name).mkdir(parents=True)
        write_jsonl(tmp_path / "people" / name / "conversations.jsonl", rows)
    words = ("persona", "build", "--persona-dir", "people")
    assert_fails(run(*words, "--all"), "1 of 2 personas", "bob")
    (tmp_path / "people/ann/persona_profile.txt").write_text("Ann is Ann.\n")
    status, out, error = run(*words, "--id", "ann", "--overwrite")
    assert status == 0, error
    profile = (tmp_path / "people/ann/persona_profile.txt").read_text()
    assert "Ann is Ann." not in profile
    assert " ".join(profile.split()) in " ".join(out.split())
    assert "6 training and 1 held-out utterances in people/ann" in out


def test_a_diff_without_training_is_taken_by_commands_that_take_diffs(run, make_world, tmp_path):
    make_world(tmp_path)
    model = ("--model", "model", "--dtype", "float32")
    words = ("extract", "--trait", "cheer", "--datasets-dir", "datasets", *model)
    status, out, error = run(*words, "--source", "answers", "--form", "diff", "--output", "out")
    assert (status, "out/diff" in out) == (0, True), error
    diff = LoRADiff.load(tmp_path / "out/diff")
    assert (diff.trait, diff.rank) == ("cheer", 1)
    layer = ("--form", "diff", "--layers", 1, "--source", "answers", "--output", "one")
    assert run(*words, *layer)[0] == 0
    assert (LoRADiff.load(tmp_path / "one/diff") - diff.at(1)).norm() == 0
    assert_fails(
        run(*words, "--form", "diff", "--source", "answers", "--methods", "svd"),
        "--methods",
        "--form diff",
    )
    assert not (tmp_path / "checkpoints").exists()
    status, _, error = run("export", "--mix", "out/diff=1", "--output", "mixed")
    assert status == 0, error


def test_layers_with_plus_signs_act_at_once_in_every_command(
    run, make_world, tmp_path, monkeypatch
):
    make_world(tmp_path)
    monkeypatch.setitem(choice.JUDGES, "embedding", lambda *_: LetterJudge())
    monkeypatch.setattr(choice, "sense_judge", lambda *_: LetterJudge())
    model = ("--datasets-dir", "datasets", "--model", "model", "--dtype", "float32")
    asked = ("--trait", "cheer", *model, "--judge", "embedding", "--max-new-tokens", 8)
    vector = ("--vector", "vector.safetensors", "--layers")

    def done(*words):
        status, _, error = run(*words)
        assert status == 0, error

    done("calibrate", *vector, "1+0", *model, "--num-prompts", 3)
    nats = ("--coefficients", "0.05nat", "--no-references", "--output")
    assert_fails(run("sweep", *asked, *vector, "0,1", *nats, "out"), "one layer", "10+20")
    done("sweep", *asked, *vector, "0+1", *nats, "swept")
    config = Run(tmp_path / "swept").record["config"]
    assert config["layers"] == ["0+1"]
    ((coefficient, _),) = config["nats"]
    steered = [row for row in Run(tmp_path / "swept").read("answers") if row["coefficient"]]
    assert {row["layer"] for row in steered} == {"0+1"}
    said = [row["answer"] for row in steered if row["method"] == "activation"]
    for name, layers in (("plus", "0+1"), ("comma", "0,1")):
        one = ("--coefficient", coefficient, "--output", f"{name}.csv")
        done("evaluate", *asked, *vector, layers, *one)
        assert [row["answer"] for row in Run(tmp_path / name).read("answers")] == said
    compared = ("--diff", "diff", "--activation-vector", *vector[1:], "0+1", "--split", "eval")
    more = ("--coefficients", 1, "--calibrate-on", "prompts", "--random-controls", 1)
    done("compare", *asked, *compared, *more, "--output", "compared")
    assert Run(tmp_path / "compared").record["config"]["layers"] == [0, 1]
    assert "The vector acts at layers 0+1" in (tmp_path / "compared/report.html").read_text()
    project = ("project", "activations", "--labelled", "cheer", "--output", "x", *model)
    read = ("--vectors", "vector.safetensors", "--layers", "0+1")
    assert_fails(run(*project, *read), "--layers must be like", "0+1")


def test_vectors_with_a_condition_or_bounds_are_evaluated(run, make_world, tmp_path, monkeypatch):
    make_world(tmp_path)
    judge = lambda *_: LetterJudge()  # noqa: E731
    monkeypatch.setitem(choice.JUDGES, "embedding", judge)
    words = ("evaluate", "--trait", "cheer", "--datasets-dir", "datasets", "--model", "model",
             "--dtype", "float32", "--max-new-tokens", 8, "--vector", "vector.safetensors",
             "--layers", "0,1", "--coefficient")  # fmt: skip
    ways = {
        "plain": (3,),
        "floor": ("--floor", 9),
        "never": (3, "--condition", "vector.safetensors", "--threshold", 0.99),
        "always": (3, "--condition", "vector.safetensors", "--threshold", -1),
        "unsteered": (0,),
    }
    said = {}
    for name, more in ways.items():
        own = words[:-1] if name == "floor" else words
        status, _, error = run(*own, *more, "--output", f"{name}.csv")
        assert status == 0, error
        said[name] = [row["answer"] for row in Run(tmp_path / name).read("answers")]
    assert said["never"] == said["unsteered"]
    assert said["always"] == said["plain"] != said["unsteered"]
    assert said["floor"] != said["unsteered"]
    record = Run(tmp_path / "always").record
    assert record["config"]["threshold"] == -1
    assert "the condition" in record["inputs"]
    assert Run(tmp_path / "floor").read("answers")[0]["method"] == "bounded"
    both = ("--ablate", "--floor", 1, "--output", "x.csv")
    assert_fails(run(*words[:-1], *both), "--ablate and --floor or --ceiling", "choose one")
    assert_fails(run(*words, 3, "--threshold", 0.3, "--output", "x.csv"), "without --condition")
    assert_fails(run(*words, 3, "--ceiling", 0.3, "--output", "x.csv"), "--coefficient")
