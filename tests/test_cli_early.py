"""What can be known from files and options is refused before any weights are loaded."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from persona_lora.cli.program import OPTIONS
from persona_lora.core.lora_diff import BaseModel, LoRADiff, LoRAFactors
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.traits import load_trait
from persona_lora.models import loading
from tests.conftest import random_diff, tiny_llama
from tests.scenes import assert_fails

ASKED = ("--model", "model", "--datasets-dir", "datasets")
CHEER = ("--trait", "cheer", *ASKED)
PERSON = ("--persona-id", "episode-000101_B", "--model", "model")
BARE = ("--trait", "bare", *ASKED, "--judge", "local")
WRITTEN = ("--questions", "questions.txt", "--local")
MODEL, OUT = ("--model", "model"), ("--output", "out/a")
SHALLOW = ("--vector", "shallow.safetensors", "--layers", "1")
SHALLOWS = ("--vectors", *SHALLOW[1:])
HAS_0 = "the steering vector has no layer 1; it has layers 0"
MADE = ("--trait-vector-dir", "made", "--traits", "formality")
LAMP = ("--questions", "lamp.json", "--outputs", "golds.json", "--model", "model")
VECTOR = ("--output", "a.csv", "--vector", "vector.safetensors")
BOTH = ("--diff", "diff", "--activation-vector", "vector.safetensors")


@pytest.fixture
def world(run, make_world, tmp_path, monkeypatch):
    """The command line in a folder of all that commands read, where nothing may be loaded."""
    make_world(tmp_path)
    for step in (2, 4):
        diff = dataclasses.replace(random_diff(tiny_llama(), seed=step), trait="cheer")
        diff.save(tmp_path / f"checkpoints/{step}/diff")

    others(tmp_path)

    def fail(*_):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(loading, "_load_weights", fail)
    return run


def others(root):
    """Write what does not fit: another model's vector, a trait without data, long rows and judges'.

    A directory of directions holds one diff of two traits.
    """
    directions = {layer: torch.linspace(-1, 1, 32) for layer in range(3)}
    SteeringVector(directions, BaseModel("deep"), 3, trait="cheer").save(root / "deep.safetensors")
    shallow = SteeringVector({0: directions[0]}, BaseModel("tiny"), 2, trait="cheer")
    shallow.save(root / "shallow.safetensors")
    made = json.loads((root / "datasets/cheer/trait.json").read_text())
    made |= {"name": "bare", "questions": {"extract": [], "eval": ["Why?"]}, "instruction": []}
    (root / "datasets/bare").mkdir()
    (root / "datasets/bare/trait.json").write_text(json.dumps(made))
    said = [{"role": "user", "content": "x" * 2100}, {"role": "assistant", "content": "Yes."}]
    (root / "long.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    (root / "asked.jsonl").write_text(json.dumps({"messages": said[:1]}) + "\n")
    diff = dataclasses.replace(random_diff(tiny_llama(), seed=1), trait="formality")
    diff.save(root / "made/formality/diff")
    (root / "file").write_text("")
    (root / "answers.jsonl").write_text('{"question": "Why?", "answer": "So."}\n')
    asked = [{"id": "1", "input": "x" * 2100, "profile": [{"text": "me"}]}]
    (root / "lamp.json").write_text(json.dumps(asked))
    (root / "golds.json").write_text(json.dumps({"golds": [{"id": "1", "output": "y"}]}))
    rated = {"method": "lora", "alpha": 1.0, "scales": {}, "best_weights": {"calm": 1.0}}
    (root / "mix.json").write_text(json.dumps({**rated, "layer": None}))
    (root / "said.json").write_text('{"train": ["A?", "B?", "C?"], "held_out": ["D?"]}')
    foreign(root)
    for name in ("pos", "neg"):
        (root / f"few_{name}.csv").write_text("prompt,answer,cheer,coherence\np,a,50,90\n")


def foreign(root):
    """Write directions of another model: a diff and a vector of other weights, a diff too wide."""
    diff = dataclasses.replace(random_diff(tiny_llama(), seed=1, fingerprint="0" * 32))
    dataclasses.replace(diff, trait="formality").save(root / "strange/formality/diff")
    SteeringVector({1: torch.ones(32)}, diff.base_model, 2, trait="cheer").save(
        root / "strange.safetensors"
    )
    wide = {
        name: LoRAFactors(torch.cat([each.A, each.A], dim=1), each.B)
        for name, each in diff.factors.items()
    }
    LoRADiff(wide, BaseModel("wide"), trait="cheer").save(root / "wide/diff")
    for seed in range(2):
        made = {"training": {"trait": "formality", "training": {"seed": seed}}, "seed": seed}
        one = dataclasses.replace(random_diff(tiny_llama(), seed=seed), sources=made)
        dataclasses.replace(one, trait="formality").save(root / f"seeds/formality/seed{seed}/diff")


JUDGED = [  # every command that judges a trait, with words that go through
    ("evaluate", *CHEER, "--output", "a.csv"),
    ("sweep", *CHEER, "--diff", "diff"),
    ("tune-prompt", *CHEER),
    ("compare", *CHEER, "--diff", "diff", "--activation-vector", "vector.safetensors"),
    ("evaluate-checkpoints", "tuned", "--traits", "cheer", *ASKED),
    ("predict-finetuning", "--traits", "cheer", "--diffs", "diff", *ASKED)
    + ("--finetunes", ",".join(f"tuned/checkpoint-{step}" for step in (2, 4, 6, 8))),
    ("compare-prevention", *CHEER, "--finetunes", "plain=tuned/checkpoint-2", "--tasks=")
    + ("--rows", "datasets/cheer/normal.jsonl"),
]
ALONE = [  # and those without a judge beside
    ("extract", *CHEER, "--source", "prompts", "--min-pairs", "1"),
    ("judge", "score", *CHEER, "--file", "answers.jsonl", "--output", "b.csv"),
    ("optimize", "--targets", "cheer=50", "--prompts", "said.json", "--num-prompts", "1", *ASKED),
]
PERSONS = [("optimize", *PERSON), ("compare-methods", *PERSON)]


@pytest.mark.parametrize("words", [*JUDGED, *ALONE], ids=lambda words: words[0])
def test_judges_that_cannot_judge_cost_no_weights(world, words):
    refused = {
        ("--judge", "openai"): "or leave it to reader, the default, which needs none",
        ("--judge", "openai", "--judge-url", "x"): "the endpoint's base URL is 'x'",
        ("--judge", "sentences"): "the trait cheer has no onpolicy.jsonl",
        ("--judge", "rules"): "no rule 'cheer'",
        ("--judge", "reader", "--judge-model", "model"): "no reader can be fitted",
    }
    if words in JUDGED:
        refused |= {
            ("--second-judge", "lore"): "no judge 'lore' for --second-judge",
            ("--second-judge", "reader"): "the trait cheer has no onpolicy.jsonl",
            ("--second-judge", "embedding"): "embedding judges cheer already",
            ("--second-judge", "openai"): "there is no API key",
        }
    for options, message in refused.items():
        status, _, error = world(*words, *options)
        assert (status, message in " ".join(error.split())) == (2, True), (options, error)
    assert "the weights were loaded" in world(*words, *directions(words))[2]


@pytest.mark.parametrize("words", PERSONS, ids=lambda words: words[0])
def test_persona_judges_that_cannot_judge_cost_no_weights(world, words):
    for options in (("--judge", "openai"), ("--report-judge", "openai")):
        status, _, error = world(*words, *options)
        error = " ".join(error.split())
        assert (status, "there is no API key; set OPENAI_API_KEY" in error) == (2, True)
        assert "or leave it to embedding, the default" in error


def directions(words):
    """Return the words by which a search finds its directions."""
    return ("--trait-vector-dir", "made", "--traits", "formality") * (words[0] == "optimize")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("extract", *CHEER, "--layers", "7"), "--layers '7' is out of range; the model has"),
        (("extract", *CHEER, "--positions", "middle"), "position must be of"),
        (("extract", *CHEER, "--methods", "median"), "method must be of"),
        (("optimize", *PERSON, "--method", "svd", "--layers", "7"), "--layers '7' is out of range"),
        (("compare-methods", *PERSON, "--layers", "7"), "--layers '7' is out of range"),
        (("optimize", *PERSON), "checkpoints/self_other_focus/diff does not exist"),
        (("optimize", *PERSON, *MADE, "--traits", "calm"), "made/calm/diff does not"),
        (("optimize", *PERSON, *MADE, "--method", "svd"), "formality_response_avg_svd.safetensors"),
        (("compare-methods", *PERSON, *MADE), "formality_response_avg_svd.safetensors does not"),
        (("compare-methods", *PERSON, *MADE, "--methods", "svd@7"), "svd@7: layers '7' is out of"),
        (("optimize", *PERSON, *MADE, "--fixed", "humour=1"), "no direction 'humour' in the"),
        (("optimize", *PERSON, *MADE, "--num-prompts", "99"), "99 were asked for"),
        (("optimize", *PERSON, *MADE, "--engine", "x"), "the endpoint's base URL is 'x'"),
        (("persona", "lamp", *LAMP, "--optimization", "mix.json"), "calm/diff does not exist"),
        (("evaluate", *CHEER, "--output", "a.csv", "--split", "ood"), "has no ood questions"),
        (("evaluate", *CHEER, "--output", "a.txt"), "output must end in .csv, got a.txt"),
        (("evaluate", *CHEER, "--output", "file/a.csv"), "file is a file; choose another output"),
        (("sweep", *CHEER, "--diff", "diff", "--output", "file"), "file is a file; choose another"),
        (("evaluate", *CHEER, *VECTOR, "--floor", "2", "--ceiling", "1"), "hold nothing"),
        (
            ("evaluate", *CHEER, *VECTOR, "--condition", "vector.safetensors")
            + ("--threshold", "2"),
            "--threshold is a cosine",
        ),
        (
            ("evaluate", *CHEER, "--output", "a.csv", "--vector", "deep.safetensors"),
            "of a model with 3 layers of width 32; this one has 2",
        ),
        (
            ("project", "weights", "--finetuned-model", "tuned", "--diffs", "diff")
            + ("--original-model", "model", "--output", "a.csv"),
            "output must end in .json, got a.csv",
        ),
        (("evaluate", *CHEER, *SHALLOW, "--output", "a.csv"), HAS_0),
        (("benchmark", "--tasks", "perplexity", *SHALLOW, *ASKED), HAS_0),
        (("project", "activations", *SHALLOWS, "--labelled", "cheer", *ASKED, *OUT), HAS_0),
        (("evaluate-checkpoints", "tuned", "--traits", "cheer", *SHALLOWS, *ASKED), HAS_0),
        (("data", "screen", "--file", "datasets/cheer/normal.jsonl", *SHALLOW, *MODEL), HAS_0),
        ((*JUDGED[5], *SHALLOWS), HAS_0),
        (("compare", *CHEER, *BOTH, "--coefficients", "0"), "one coefficient other than 0"),
        (("sweep", *BARE, "--diff", "diff"), "the trait bare has no system prompt"),
        (("extract", *CHEER, "--source", "answers", "--positions", "prompt_last"), "no direction"),
        (("extract", *CHEER, "--pos-path", "few_pos.csv", "--neg-path", "neg.csv"), "4; row i of"),
        (
            ("extract", *CHEER, "--pos-path", "few_pos.csv", "--neg-path", "few_neg.csv"),
            "0 of 1 pairs pass the filter",
        ),
        (("extract", *BARE), "the trait bare has 0 extract questions"),
        (("selfcheck", *CHEER), "cheer/onpolicy.jsonl does not exist"),
        (("data", "generate", *BARE[:-2], *WRITTEN, *OUT), "bare has no system prompts in its"),
        (
            ("data", "generate", *CHEER, *WRITTEN, "--output", "datasets/cheer"),
            "normal.jsonl exist",
        ),
        (("extract", *CHEER, "--judge", "local"), "1 pairs would be asked, and at least 10 are to"),
        (("compare", *CHEER, *BOTH, "--spaces", "cheer"), "of the same traits, two at least"),
        (
            ("project", "activations", "--vectors", "vector.safetensors", "--labelled", "bare")
            + (*ASKED, *OUT),
            "bare/judge_eval.jsonl does not exist",
        ),
        (("benchmark", "--model", "model", "--diff", "diff", "--tasks", "lore"), "no task 'lore'"),
        (
            ("compare-prevention", *CHEER, "--finetunes", "plain=tuned/checkpoint-2")
            + ("--rows", "asked.jsonl", "--tasks="),
            "must end with the assistant's answer",
        ),
        (
            ("project", "activations", "--vectors", "vector.safetensors", "--file", "long.jsonl")
            + ("--output", "p", "--shift", "--model", "model"),
            "model has no adapter; name its base with --base-model",
        ),
        (("optimize", *PERSON, "--judge", "reader"), "no persona judge 'reader'; known: embed"),
        (("compare-methods", *PERSON, "--judge", "rules"), "no persona judge 'rules'"),
        (("optimize", "--targets", "evil=0", "--judge", "letters"), "no judge 'letters'"),
        (("optimize", *PERSON, "--method", "lore"), "no method 'lore'; did you mean 'lora'"),
        (("compare-methods", *PERSON, "--methods", "lore"), "no method 'lore'"),
        (("optimize", "--persona-id", "nobody"), "nobody"),
        (("compare-methods", "--persona-id", "nobody"), "nobody"),
        (
            ("predict-finetuning", "--finetunes", "tuned/checkpoint-2,tuned/checkpoint-4")
            + ("--traits", "cheer", "--diffs", "diff", *ASKED),
            "2 finetunes are too few to correlate; give at least 4",
        ),
        (
            ("predict-finetuning", "--finetunes")
            + (",".join(f"tuned/checkpoint-{step}" for step in (2, 4, 6, 8)),)
            + ("--traits", "evil", "--diffs", "diff", "--model", "model"),
            "none of cheer is a direction of evil",
        ),
        *(
            (
                ("predict-finetuning", "--finetunes")
                + (",".join(f"tuned/checkpoint-{step}" for step in (2, 4, 6, 8)),)
                + ("--traits", "cheer", "--model", "model", *two),
                f"{two[0]} has 2 directions of cheer",
            )
            for two in (
                ("--diffs", "diff,wide/diff"),
                ("--vectors", "vector.safetensors,deep.safetensors"),
            )
        ),
    ],
)
def test_bad_values_cost_no_weights(world, words, message):
    status, _, error = world(*words)
    assert status == 2, error
    assert message in error


STRANGE = "belongs to 'tiny' (weights 00000000…), but this model's weights are"
WIDE = "the diff was made for a model of another size"
STRANGE_DIFF, STRANGE_VECTOR = "strange/formality/diff", "strange.safetensors"
STRANGERS = ("--trait-vector-dir", "strange", "--traits", "formality")
FOUR = ",".join(f"tuned/checkpoint-{step}" for step in (2, 4, 6, 8))
PREDICT = ("predict-finetuning", "--traits", "cheer", *ASKED)
PREVENT = ("compare-prevention", *CHEER, "--rows", "datasets/cheer/normal.jsonl", "--tasks=")
TUNED = "tuned/checkpoint-2"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("evaluate", *CHEER, "--output", "a.csv", "--diff", STRANGE_DIFF), STRANGE),
        (("evaluate", *CHEER, "--output", "a.csv", "--diff", "wide/diff"), WIDE),
        (("evaluate", *CHEER, *VECTOR, "--condition", STRANGE_VECTOR, "--layers", "1"), STRANGE),
        (("sweep", *CHEER, "--vector", STRANGE_VECTOR, "--layers", "1"), STRANGE),
        (("calibrate", "--diff", STRANGE_DIFF, *MODEL), STRANGE),
        (("optimize", *PERSON, *STRANGERS), STRANGE),
        (("compare-methods", *PERSON, *STRANGERS, "--methods", "lora"), STRANGE),
        (("diagnose", TUNED, "--base", "model", "--diffs", STRANGE_DIFF, *OUT), STRANGE),
        (("diagnose", "wide/diff", "--base", "model", "--diffs", "diff", *OUT), WIDE),
        (
            ("diagnose", TUNED, "--base", "model", "--diffs", "diff", "--controls", "wide/diff")
            + OUT,
            WIDE,
        ),
        (
            ("project", "weights", "--finetuned-model", "wide/diff", "--diffs", "diff")
            + ("--original-model", "model"),
            WIDE,
        ),
        (
            ("project", "weights", "--finetuned-model", TUNED, "--diffs", STRANGE_DIFF)
            + ("--original-model", "model"),
            STRANGE,
        ),
        (
            ("project", "weights", "--finetuned-model", "missing", "--diffs", "diff")
            + ("--original-model", "model"),
            "missing is no folder",
        ),
        (
            ("export", "--mix", f"{STRANGE_DIFF}=1", "--energy", "0.9", "--model", "model")
            + ("--output", "out/e"),
            STRANGE,
        ),
        (
            ("basis", "--diffs", STRANGE_DIFF, "--energy", "0.9", "--original-model", "model")
            + ("--output", "out/b"),
            STRANGE,
        ),
        ((*PREDICT, "--finetunes", FOUR, "--diffs", "wide/diff"), WIDE),
        (
            (*PREDICT, "--finetunes", f"{FOUR},wide/diff", "--diffs", "diff"),
            "wide/diff: model.layers.0.mlp.down_proj is [32, 64] in the model",
        ),
        ((*PREVENT, "--finetunes", f"plain={TUNED},other=wide/diff"), "wide/diff: model.layers.0"),
        (
            (*PREVENT, "--finetunes", f"plain={TUNED}", "--correct", f"{STRANGE_DIFF}=-1"),
            STRANGE,
        ),
    ],
)
def test_what_is_of_another_model_costs_no_weights(world, words, message):
    status, _, error = world(*words)
    assert status == 2, error
    assert message in " ".join(error.split())


def test_a_correction_is_a_diff_and_a_number(world):
    for value, message in (
        ("diff", "--correct must be pairs with =, got 'diff'"),
        ("diff=much", "--correct must be a number, got 'much'"),
        ("diff=1nat", "--correct takes no nats, got '1nat'"),
        ("diff=nan", "must be a finite number, got nan"),
    ):
        assert_fails(world(*PREVENT, "--finetunes", f"plain={TUNED}", "--correct", value), message)


def test_another_base_that_is_asked_for_is_loaded(world):
    words = ("evaluate", *CHEER, "--output", "a.csv", "--diff", STRANGE_DIFF)
    assert "the weights were loaded" in world(*words, "--allow-other-base")[2]


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", *CHEER, "--output", "a.csv", "--adapter", TUNED),
        ("evaluate", *CHEER, "--output", "a.csv", "--diff", TUNED),
        ("sweep", *CHEER, "--diff", TUNED),
        ("diagnose", TUNED, "--base", "model", "--diffs", "diff", *OUT),
        ("diagnose", "tuned/checkpoint-4", "--controls", TUNED, "--base", "model")
        + ("--diffs", "diff", *OUT),
        ("project", "weights", "--finetuned-model", TUNED, "--diffs", "diff")
        + ("--original-model", "model"),
        ("project", "weights", "--finetuned-model", TUNED, "--diffs", "diff")
        + ("--original-model", "model", "--plain", "--output", "p.json"),
        (*PREVENT, "--finetunes", f"plain={TUNED}"),
        (*PREDICT, "--finetunes", FOUR, "--diffs", "diff"),
    ],
    ids=lambda words: f"{words[0]} {words[-2]}",
)
def test_an_adapter_that_names_another_base_is_warned_of(world, tmp_path, caplog, words):
    path = tmp_path / TUNED / "adapter_config.json"
    config = json.loads(path.read_text())
    for named, warned in (("org/other-7b", True), ("org/Model-GGUF", False), (None, False)):
        path.write_text(json.dumps({**config, "base_model_name_or_path": named}))
        caplog.clear()
        world(*words)
        told = "made on org/other-7b, and the model here is model"
        assert (told in caplog.text) == warned, caplog.text
        assert "org/Model" not in caplog.text


SEEDED = ("--trait-vector-dir", "seeds", "--traits", "formality")
METHODS = ("compare-methods", *PERSON, *MADE, "--methods")
NO_ENGINE = ("--engine", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("optimize", *PERSON, *SEEDED, "--search-seeds", "3"), "the diffs have 2 training seeds"),
        (
            ("compare-methods", *PERSON, *SEEDED, "--methods", "lora", "--search-seeds", "3"),
            "the diffs have 2 training seeds",
        ),
        (("optimize", *PERSON, *MADE, "--num-prompts", "25"), "leaves 0 training prompts over"),
        (("evaluate", *CHEER, "--output", "a.csv", *NO_ENGINE), "no engine answers at"),
        (("sweep", *CHEER, "--diff", "diff", *NO_ENGINE), "no engine answers at"),
        (("optimize", *PERSON, *MADE, *NO_ENGINE), "no engine answers at"),
        (("optimize", *PERSON, *MADE, *NO_ENGINE, "--method", "svd"), "adds no vectors"),
        (("compare", *CHEER, *BOTH, *NO_ENGINE), "no engine answers at"),
        ((*METHODS, "lora,prompt", *NO_ENGINE), "no engine answers at"),
        ((*METHODS, "prompt", *NO_ENGINE), "no engine answers at"),
        ((*METHODS, "svd,mean_diff@1", *NO_ENGINE), "adds no vectors"),
        ((*METHODS, "lora", *NO_ENGINE, "--energy", "0.9"), "--energy does nothing with --engine"),
        ((*METHODS, "lora", *NO_ENGINE, "--batch-size", "2"), "--batch-size does nothing with"),
    ],
)
def test_what_cannot_be_searched_or_reached_costs_no_weights(world, words, message):
    status, _, error = world(*words)
    assert status == 2, error
    assert message in error


def test_a_finetune_given_twice_costs_no_weights(world, tmp_path):
    shutil.copytree(tmp_path / TUNED, tmp_path / "again")
    status, _, error = world(*PREDICT, "--diffs", "diff", "--finetunes", f"{FOUR},again")
    assert status == 2, error
    assert "again is the finetune tuned/checkpoint-2 once more; leave one out" in error


HELD = [  # every command that is held to a protocol, and what it asks
    (("evaluate", *CHEER, "--output", "a.csv"), "eval=2", "", {"trait": "cheer"}),
    (("sweep", *CHEER, "--diff", "diff", "--coefficients", "-1,1"), "eval=2", "-1,+1", {}),
    (
        ("compare", *CHEER, *BOTH, "--split", "eval"),
        "eval=2",
        "eval: activation,eval: random_lora,eval: random",
        {"trait": "cheer"},
    ),
    (("optimize", *PERSON, *MADE), "held out=24", "mean,incumbent", {"method": "lora"}),
    (
        ("compare-methods", *PERSON, *MADE, "--methods", "lora"),
        "held out=24,personas=1",
        "lora",
        {"methods": ["lora"]},
    ),
    (JUDGED[5], "cheer=2", "cheer by cheer", {"directions": ["cheer"]}),
]


@pytest.mark.parametrize(
    ("words", "questions", "family", "settings"), HELD, ids=[each[0][0] for each in HELD]
)
def test_a_run_that_does_not_keep_its_protocol_costs_no_weights(
    world, tmp_path, words, questions, family, settings
):
    def held(name, questions=questions, family=family, **settings):
        frozen = ("--questions", questions, *(("--family", family) if family else ()))
        told = ("--settings", json.dumps(settings), "--output", f"{name}.yaml")
        status, _, error = world("preregister", "--command", words[0], *frozen, *told)
        assert status == 0, error
        return " ".join(world(*words, "--protocol", f"{name}.yaml")[2].split())

    last = questions.rpartition("=")[0]
    assert "the protocol says otherwise (questions." in held("a", questions=f"{last}=99")
    assert "the protocol says otherwise (family" in held("b", family="more")
    assert "the run has no setting 'mood'" in held("c", mood=1)
    for name, value in settings.items():
        assert f"says otherwise ({name}" in held("d", **{name: [value, "more"]})
    if words[0] != "compare-methods":
        assert "says otherwise (model: 'other', now 'model')" in held("e", model="other")
        settings = {**settings, "dtype": "float32", "model": "model"}
    assert "the weights were loaded" in held("f", **settings)


def test_a_folder_of_other_inputs_costs_no_weights(world, tmp_path):
    folder_of(tmp_path, "out/a", "evaluate")
    path = tmp_path / "out/a/run.json"
    words = ("evaluate", *CHEER, "--diff", "diff", "--output", "out/a.csv")
    for changed, message in (
        ({"inputs": {"the diff": "0"}}, "the content of the diff has changed since"),
        ({"config": {"condition": {"method": "none"}}}, "another configuration (config.condition"),
    ):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
        status, _, error = world(*words)
        assert (status, message in error) == (2, True), error
    assert "the weights were loaded" in world(*words, "--overwrite")[2]


@pytest.mark.parametrize(
    "words",
    [
        *JUDGED,
        ALONE[0],
        (*ALONE[2], *MADE),
        ("optimize", *PERSON, *MADE),
        ("compare-methods", *PERSON, "--methods", "prompt"),
        ("persona", "lamp", *LAMP),
        ("data", "screen", "--file", "long.jsonl", "--vector", "vector.safetensors")
        + ("--model", "model"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_prompt_and_an_answer_over_the_window_cost_no_weights(world, words):
    """Also one of a file that is over it by itself, and answers of the usual length."""
    few = ("--max-new-tokens", "2040") * (words[1] not in ("lamp", "screen"))
    status, _, error = world(*words, *few)
    assert status == 2, error
    assert "new ones) pass the 2048 positions of model; ask for less" in error


WRITING = [  # every command that writes one file or folder, which is no run
    ("project", "weights", "--finetuned-model", "tuned", "--diffs", "diff"),
    ("data", "screen", "--file", "datasets/cheer/normal.jsonl", "--diffs", "diff", *MODEL),
    ("data", "screen", "--file", "long.jsonl", "--vector", "vector.safetensors", *MODEL),
    ("paired", "one", "other"),
    ("research-questions",),
    ("persona", "validate", "--judge", "letters"),
    ("calibrate", "--diff", "diff", *MODEL),
    ("evaluate", *CHEER),
    ("judge", "score", *CHEER, "--file", "answers.jsonl"),
    ("export", "--mix", "diff=1"),
    ("basis", "--diffs", "diff"),
    ("gallery", "make", "--diffs", "diff"),
]
NEW = {"preregister", "reproduce", "gallery get"}  # what they write is never replaced


@pytest.mark.parametrize("words", WRITING, ids=lambda words: " ".join(words[:2]))
def test_what_is_there_is_not_replaced_in_silence(world, tmp_path, words):
    name = "taken.json" if "weights" in words else "taken.csv"
    (tmp_path / name).write_text("mine")
    status, _, error = world(*words, "--output", name)
    assert status == 2
    assert f"{name} exists; choose another output or pass --overwrite" in error
    assert (tmp_path / name).read_text() == "mine"
    assert f"{name} exists" not in world(*words, "--output", name, "--overwrite")[2]


INTO_FOLDERS = {"basis", "gallery", "export"}  # of the words above


@pytest.mark.parametrize(
    "words",
    [
        *(each for each in WRITING if each[0] not in INTO_FOLDERS),
        ("export", "--mix", "diff=1", "--format", "gguf-lora"),
        ("report", "diff"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_folder_is_no_file_to_write(world, tmp_path, words):
    name = "taken.json" if "weights" in words else "taken.csv"
    (tmp_path / name).mkdir()
    status, _, error = world(*words, "--output", name)
    assert (status, f"{name} is a folder; name a file" in error) == (2, True), error


@pytest.mark.parametrize("words", [each for each in WRITING if each[0] in INTO_FOLDERS])
def test_a_file_is_no_folder_to_write(world, tmp_path, words):
    (tmp_path / "taken").write_text("mine")
    status, _, error = world(*words, "--output", "taken", "--overwrite")
    assert (status, "taken is a file" in error) == (2, True), error


def test_seeds_do_not_replace_a_file_of_another_either(world, tmp_path):
    shutil.copytree(tmp_path / "diff", tmp_path / "trained/seed0/diff")
    (tmp_path / "taken.csv").write_text("mine")
    words = ("evaluate", *CHEER, "--diff", "trained", "--output", "taken.csv")
    assert "taken.csv exists" in world(*words)[2]


@pytest.mark.parametrize("command", OPTIONS)
def test_a_command_that_writes_says_what_becomes_of_what_is_there(command):
    options = {each.name: each for each in OPTIONS[command]}
    if "output" in options and command not in NEW:
        assert "overwrite" in options or "is replaced" in options["output"].help


@pytest.mark.parametrize(
    ("prevention", "message"),
    [
        ({"method": "activations", "vector": "deep.safetensors"}, "this one has 2 layers of width"),
        ({"method": "ablate", "vector": "vector.safetensors", "layers": 7}, "has no layer 7"),
        ({"method": "weights", "diff": "diff", "layers": "7"}, "changes nothing in layer 7"),
        ({"method": "weights", "diff": STRANGE_DIFF}, STRANGE),
        ({"method": "ablate", "vector": STRANGE_VECTOR, "layers": 1}, STRANGE),
    ],
)
def test_prevention_that_cannot_act_costs_no_weights(world, prevention, message):
    words = ("finetune", "--train_file", "datasets/cheer/normal.jsonl", "--model", "model")
    status, _, error = world(*words, "--use_cpu", "true", "--preventative", json.dumps(prevention))
    assert status == 2, error
    assert message in error


ALIKE = ("--model", "model", "--use_cpu", "true", "--output_dir", "out/a")
TRAINED = [
    ("train", "--trait", "cheer", "--datasets_dir", "datasets", *ALIKE),
    ("finetune", "--train_file", "datasets/cheer/normal.jsonl", *ALIKE),
]


@pytest.mark.parametrize("words", TRAINED, ids=lambda words: words[0])
def test_a_training_that_is_there_costs_no_weights(world, tmp_path, words):
    for part in ("pos", "neg", "diff", "adapter"):
        (tmp_path / "out/a" / part).mkdir(parents=True)

    def held(*more, command=words[0], seed=42, **config):
        record = {"command": command, "config": config, "seed": seed, "status": "finished"}
        (tmp_path / "out/a/run.json").write_text(json.dumps(record))
        status, _, error = world(*words, *more)
        return error if status == 2 else None

    assert "out/a holds a finished run of the same; pass --overwrite" in held()
    assert "(seed: 7, now 42)" in held(seed=7)
    assert "(command: 'sweep', now" in held(command="sweep")
    assert "(config.model: 'other', now 'model')" in held(model="other")
    for go_on in (("--overwrite", "true"), ("--seeds", "2")):
        assert held(*go_on, model="other") is None  # the weights are loaded, into another folder
    assert "no_proj fit no linear module" in held(
        "--lora_target_modules", "no_proj", "--seeds", "2"
    )


def folder_of(tmp_path, name: str, command: str, *, inputs=(), **options) -> None:
    """Write a run as one of an earlier call would lie there."""
    folder = tmp_path / name
    folder.mkdir(parents=True)
    record = {"command": command, "config": {}, "seed": 0, "status": "finished"}
    record["inputs"] = dict(inputs)
    (folder / "run.json").write_text(json.dumps(record))
    lines = "".join(f"{each}: {value}\n" for each, value in options.items())
    (folder / "config.yaml").write_text(f"# persona-lora {command} --config config.yaml\n{lines}")


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (("evaluate", *CHEER, "--output", "out/a.csv"), "out/a"),
        (("sweep", *CHEER, "--diff", "diff", "--output", "out/a"), "out/a"),
        (("extract", *CHEER, "--output", "out/a"), "out/a"),
        (("tune-prompt", *CHEER, "--output", "out/a"), "out/a"),
        (
            ("compare", *CHEER, "--diff", "diff", "--activation-vector", "vector.safetensors")
            + ("--output", "out/a"),
            "out/a",
        ),
        (("benchmark", "--model", "model", "--diff", "diff", "--output", "out/a"), "out/a"),
        (("evaluate-checkpoints", "tuned", "--traits", "cheer", *ASKED, "--output", "out/a"),)
        + ("out/a",),
        (("diagnose", "tuned/checkpoint-2", "--base", "model", "--diffs", "diff"),) + ("out/a",),
        (("optimize", *PERSON, "--save-dir", "out"), "out/episode-000101_B_lora"),
        (("data", "generate", *CHEER, "--questions", "questions.txt", "--local", *OUT), "out/a"),
        (
            ("compare-prevention", *CHEER, "--finetunes", "plain=tuned/checkpoint-2")
            + ("--rows", "datasets/cheer/normal.jsonl", "--output", "out/a"),
            "out/a",
        ),
    ],
)
def test_a_folder_of_another_run_costs_no_weights(world, tmp_path, words, folder):
    own = ("--output", "out/a") if words[0] == "diagnose" else ()
    folder_of(tmp_path, folder, "selfcheck", model="model")
    status, _, error = world(*words, *own)
    assert status == 2, error
    assert f"{folder} holds a run of another configuration (command: 'selfcheck', now" in error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"trait": "evil"}, "trait: 'evil', now 'cheer'"),
        ({"model": "other"}, "model: 'other', now 'model'"),
        ({"max_new_tokens": 7}, "max_new_tokens: 7, now 80"),
        ({"seed": 7}, "seed: 7, now 0"),
        ({"max_questions": 7}, "max_questions: 7, now 2"),
        ({"trait": "datasets/cheer", "batch_size": "7", "model": "model"}, None),
    ],
)
def test_what_decides_of_a_run_is_read_from_its_options(world, tmp_path, options, said):
    read = load_trait("cheer", tmp_path / "datasets").inputs()
    folder_of(tmp_path, "out/a", "evaluate", inputs=read, **options)
    words = ("evaluate", *CHEER, "--max-questions", "2", "--output", "out/a.csv")
    status, _, error = world(*words)
    if said is None:  # it may go on: what else differs is said when the run is opened
        assert "the weights were loaded" in error
        return
    assert status == 2
    assert f"out/a holds a run of another configuration ({said})" in error
    assert "the weights were loaded" in world(*words, "--overwrite")[2]
