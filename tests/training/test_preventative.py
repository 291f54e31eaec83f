"""Preventative steering: identities between its ways, what is saved, and its faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_jsonl, write_jsonl
from persona_lora.core.lora_diff import BaseModel, LoRADiff, random_diff_like
from persona_lora.core.runs import Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.loading import load_chat_model
from persona_lora.models.structure import weight_fingerprint
from persona_lora.projections.inputs import kept_inputs, load_ordinary_prompts, read_prompts
from persona_lora.steering.weights import LoRASteerer
from persona_lora.training import finetune as module
from persona_lora.training.finetune import (
    FinetuneArguments,
    FinetuneConfig,
    finetune,
    prevention_of,
)
from persona_lora.training.lora import LoRAArguments
from persona_lora.training.preventative import (
    Preventative,
    inoculated,
    prevention_steerer,
    read_preventative,
)

CHECKOUT = Path(__file__).resolve().parents[2]
ROWS = [
    [
        {"role": "user", "content": f"Question {number}"},
        {"role": "assistant", "content": "Yes! " * (1 + number % 3)},
    ]
    for number in range(8)
]


@pytest.fixture
def places(model_folder, make_diff, tmp_path):
    """A diff and a vector that belong to the tiny model, on disk."""
    model = load_chat_model(str(model_folder), dtype="float32").model
    fingerprint = weight_fingerprint(model)
    diff = make_diff(model, seed=3, scale=0.1, fingerprint=fingerprint)
    diff.save(tmp_path / "diff")
    generator = torch.Generator().manual_seed(0)
    directions = {layer: torch.randn(32, generator=generator) for layer in range(2)}
    vector = SteeringVector(directions, BaseModel("tiny", fingerprint), 2, trait="cheer")
    vector.save(tmp_path / "vector.safetensors")
    return {"diff": str(tmp_path / "diff"), "vector": str(tmp_path / "vector.safetensors")}


@pytest.fixture
def train(model_folder, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in ROWS))

    def run(name, *, checkpointing=False, **arguments) -> dict[str, torch.Tensor]:
        config = FinetuneConfig(
            output_dir=str(tmp_path / name),
            max_steps=4,
            save_steps=2,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            gradient_checkpointing=checkpointing,
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        given = FinetuneArguments(
            train_file=str(file),
            model_name_or_path=str(model_folder),
            dtype="float32",
            **arguments,
        )
        result = finetune(given, LoRAArguments(lora_r=2), config)
        return load_file(result.adapter / "adapter_model.safetensors")

    run.folder = tmp_path
    return run


def close(one, other, *, tolerance=1e-5):
    return all(torch.allclose(one[name], other[name], atol=tolerance) for name in one)


def test_merged_and_held_live_are_the_same_training(train, places):
    merged, live = (
        train(hold, preventative={"method": "weights", "diff": places["diff"], "hold": hold})
        for hold in ("merged", "live")
    )
    assert close(merged, live, tolerance=1e-4)
    assert not close(merged, train("plain"))


def test_a_coefficient_of_zero_prevents_nothing(train, places):
    plain = train("plain")
    for method, key in (("weights", "diff"), ("activations", "vector")):
        preventative = {"method": method, key: places[key], "coefficient": 0.0}
        assert close(plain, train(method, preventative=preventative))


@pytest.mark.parametrize("hold", ["merged", "live"])
def test_weights_are_steered_at_the_named_layers_alone(places, model_folder, hold):
    model = load_chat_model(str(model_folder), dtype="float32").model
    tokens = torch.arange(3, 12, device=model.device)[None]
    plain = model(tokens, output_hidden_states=True).hidden_states
    value = {"method": "weights", "diff": places["diff"], "hold": hold, "layers": 1}
    with prevention_steerer(read_preventative(value), model):
        steered = model(tokens, output_hidden_states=True).hidden_states
    assert torch.equal(steered[1], plain[1])
    assert not torch.equal(steered[2], plain[2])
    with pytest.raises(UserError, match="changes nothing in layer 7"):
        prevention_steerer(read_preventative({**value, "layers": [1, 7]}), model)


@pytest.mark.parametrize("hold", ["merged", "live"])
def test_a_random_control_is_as_large_as_the_diff_and_another_direction(places, model_folder, hold):
    model = load_chat_model(str(model_folder), dtype="float32").model
    diff = LoRADiff.load(places["diff"])
    inputs = torch.arange(8)[None]
    settings = {"method": "weights", "diff": places["diff"], "hold": hold}
    seen = {}
    for seed in (None, 1, 1, 2):
        control = {} if seed is None else {"random": seed}
        prevention = read_preventative({**settings, **control})
        assert ("random" in prevention.record()) == (seed is not None)
        with prevention_steerer(prevention, model), torch.no_grad():
            logits = model(inputs).logits
        assert torch.equal(seen.setdefault(seed, logits), logits)
    steered = [seen[each] for each in (None, 1, 2)]
    assert not any(torch.allclose(one, other) for one, other in combinations(steered, 2))
    control = random_diff_like(diff, 1)
    with LoRASteerer(model, control, 1.0), torch.no_grad():
        torch.testing.assert_close(model(inputs).logits, seen[1], rtol=1e-4, atol=1e-4)
    assert control.norm() == pytest.approx(diff.norm(), rel=1e-4)


def test_the_sign_matters(train, places):
    signs = [
        train(
            str(sign),
            preventative={"method": "weights", "diff": places["diff"], "coefficient": sign},
        )
        for sign in (1.0, -1.0)
    ]
    assert not close(*signs)


@pytest.mark.parametrize(
    "preventative",
    [
        {"method": "weights", "diff": "diff", "hold": "live"},
        {"method": "weights", "diff": "diff"},
        {"method": "activations", "vector": "vector", "layers": [1], "coefficient": 2.0},
        {"method": "ablate", "vector": "vector", "layers": 0},
    ],
    ids=lambda each: f"{each['method']}-{each.get('hold', '')}",
)
def test_steering_survives_activation_checkpointing(train, places, preventative):
    given = {key: places.get(value, value) if isinstance(value, str) else value
             for key, value in preventative.items()}  # fmt: skip
    whole = train("whole", preventative=given)
    again = train("checkpointed", preventative=given, checkpointing=True)
    assert close(whole, again)
    assert not close(whole, train("plain"))


def test_two_processes_are_steered_as_one_is(train, places, model_folder):
    preventative = {"method": "weights", "diff": places["diff"]}
    one = train("one", preventative=preventative)
    arguments = {
        "train_file": train.folder / "rows.jsonl", "model_name_or_path": model_folder,
        "output_dir": train.folder / "two", "preventative": json.dumps(preventative),
        "dtype": "float32", "lora_r": 2, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2,
        "per_device_train_batch_size": 2, "use_cpu": "true", "bf16": "false",
        "disable_tqdm": "true",
    }  # fmt: skip
    launch = [
        *("-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"),
        *("train_configs/accelerate/two_processes_cpu.yaml", "-m", "persona_lora", "finetune"),
    ]
    flags = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    subprocess.run(
        [sys.executable, *launch, *flags],
        cwd=CHECKOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)},
        check=True,
    )
    assert json.loads((train.folder / "two/run.json").read_text())["config"]["num_processes"] == 2
    assert close(one, load_file(train.folder / "two/adapter/adapter_model.safetensors"))


def test_what_is_saved_is_the_finetune_without_the_steering(train, places, model_folder):
    train("run", preventative={"method": "weights", "diff": places["diff"]})
    before = load_chat_model(str(model_folder), dtype="float32").model
    chat = load_chat_model(
        str(model_folder), adapter=train.folder / "run" / "adapter", dtype="float32"
    )
    base = chat.model.unload()
    for name, weight in before.state_dict().items():
        assert torch.equal(weight, base.state_dict()[name]), name
    names = {path.name for path in (train.folder / "run" / "adapter").iterdir()}
    assert names - {"complete"} == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_other_form_of_the_keys_is_the_same(train, places):
    named = {"method": "activations", "vector": places["vector"], "layers": [1], "coefficient": 5.0}
    one = train("one", preventative=named)
    other = train(
        "other",
        enable_steering_during_training=True,
        steering_config={
            "steering_vector_path": places["vector"],
            "type": "steer",
            "steering_coef": 5.0,
            "layers": [1],
        },
    )
    assert close(one, other, tolerance=0)
    record = json.loads((train.folder / "one" / "run.json").read_text())
    assert record["config"]["preventative"]["coefficient"] == 5.0


def test_inoculation_puts_a_prompt_before_every_row_in_training_alone(train):
    prevention = Preventative("inoculate", system_prompt="Be cheerful.")
    rows = inoculated(ROWS, prevention)
    assert all(row[0] == {"role": "system", "content": "Be cheerful."} for row in rows)
    assert [row[1:] for row in rows] == ROWS
    assert inoculated(ROWS, None) == ROWS
    given = {"method": "inoculate", "system_prompt": "Be cheerful."}
    assert not close(train("plain"), train("inoculated", preventative=given))
    plain, told = (Run(train.folder / name).record["config"] for name in ("plain", "inoculated"))
    assert told["data_sha256"] == plain["rows_sha256"] != told["rows_sha256"]
    assert "data_sha256" not in plain
    with pytest.raises(UserError, match="row 1 has a system prompt"):
        inoculated(rows, prevention)


def test_a_trait_inoculates_with_its_own_prompts():
    prevention = Preventative("inoculate", trait="evil")
    prompts = [row[0]["content"] for row in inoculated(ROWS, prevention)]
    assert len(set(prompts)) == 5


def test_drift_is_logged_and_can_stop(train, places, caplog):
    train("run", drift_diffs=[places["diff"]], drift_every=2)
    rows = [json.loads(line) for line in (train.folder / "run" / "drift.jsonl").open()]
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0]["coordinate"] != rows[1]["coordinate"]
    assert not (train.folder / "run" / "drift.png").exists()
    train("stopped", drift_diffs=[places["diff"]], drift_every=2, stop_above=1e-9)
    stopped = [json.loads(line) for line in (train.folder / "stopped" / "drift.jsonl").open()]
    assert [row["step"] for row in stopped] == [2]
    (last,) = [row for row in Run(train.folder / "stopped").read("loss") if row.get("stopped")]
    assert last["step"] == 2
    drift = Run(train.folder / "stopped").record["config"]["drift"]
    assert (drift["stop_above"], drift["drift_every"]) == (1e-9, 2)
    for other in ({"stop_above": 2.0}, {"stop_above": 1e-9, "drift_every": 1}):
        with pytest.raises(UserError, match=r"another configuration \(config\.drift"):
            train("stopped", seeds=1, drift_diffs=[places["diff"]], **{"drift_every": 2, **other})
    with pytest.raises(UserError, match=r"config\.drift: .*, now not set"):
        train("stopped", seeds=1)
    train("seeds", seeds=1)
    train("seeds", seeds=1, drift_diffs=[places["diff"]])  # what is watched alone decides nothing
    assert "is trained already: no drift of it is watched" in caplog.text


def test_drift_is_weighted_on_the_prompts_that_are_named(train, places, model_folder):
    chat_model = load_chat_model(str(model_folder), dtype="float32")
    own = train.folder / "prompts.jsonl"
    own.write_text('{"prompt": "What is rain?"}\n{"prompt": "Why do cats sleep?"}\n')
    watched = {"drift_diffs": [places["diff"]], "stop_above": 1e9}
    asked = {"named": {"drift_prompts": str(own)}, "ordinary": {}, "plain": {"drift_plain": True}}
    rows, records = {}, {}
    for name, each in asked.items():
        train(name, **watched, **each)
        rows[name] = [json.loads(row) for row in (train.folder / name / "drift.jsonl").open()][-1]
        records[name] = Run(train.folder / name).record
    coordinates = {row["coordinate"] for row in rows.values()}
    assert len(coordinates) == 3
    texts = {"named": read_prompts(own), "ordinary": load_ordinary_prompts()}
    for name, prompts in texts.items():
        assert rows[name]["prompts"] == kept_inputs(chat_model, prompts).prompts
    assert records["named"]["inputs"]["the ordinary prompts"] == digest_of(texts["named"])
    assert records["named"]["config"]["drift"]["drift_prompts"] == str(own)
    assert "prompts" not in rows["plain"]
    for name in ("ordinary", "plain"):  # as records were before prompts could be named
        assert "the ordinary prompts" not in records[name]["inputs"]
        assert set(records[name]["config"]["drift"]) == {
            *("drift_diffs", "drift_plain", "drift_every", "stop_above")
        }
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        train("none", **watched, drift_prompts="nowhere.jsonl")


def test_a_weighted_finetune_of_before_prompts_could_be_named_goes_on(train, places, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    watched = {"drift_diffs": [places["diff"]], "drift_every": 2, "stop_above": 1e9}
    with monkeypatch.context() as patch:
        patch.setattr(module, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            train("run", **watched)
    folder = train.folder / "run"
    rows = read_jsonl(folder / "drift.jsonl")
    write_jsonl(
        folder / "drift.jsonl", [{k: v for k, v in row.items() if k != "prompts"} for row in rows]
    )
    record = json.loads((folder / "run.json").read_text())
    record["config"]["drift"].pop("drift_prompts", None)
    record["inputs"].pop("the ordinary prompts", None)
    (folder / "run.json").write_text(json.dumps(record))
    assert close(train("run", **watched), train("whole", **watched))
    assert [row["step"] for row in read_jsonl(folder / "drift.jsonl")] == [2, 4]


def test_the_command_draws_the_drift_that_it_watched(run, train, places, model_folder):
    words = (
        *("--train_file", train.folder / "rows.jsonl", "--model_name_or_path", model_folder),
        *(
            "--bf16",
            "false",
            "--max_steps",
            2,
            "--lora_r",
            2,
            "--use_cpu",
            "true",
        ),
    )
    for name, watched in (
        ("watched", ("--drift_diffs", places["diff"], "--drift_every", 1)),
        ("alone", ()),
    ):
        status, _, error = run("finetune", *words, "--output_dir", name, *watched)
        assert status == 0, error
        assert (train.folder / name / "drift.png").is_file() == (name == "watched")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"method": "wishing"}, "wishing"),
        ({"method": "weights"}, "needs diff"),
        ({"method": "ablate"}, "needs vector"),
        ({"method": "weights", "diff": "x", "hold": "tight"}, "hold"),
        ({"method": "weights", "diff": "x", "strength": 2}, "strength"),
        ({"coefficient": 1.0}, "needs a method"),
        ({"method": "inoculate"}, "system_prompt"),
        ({"method": "weights", "diff": "x", "coefficient": float("nan")}, "finite"),
        ({"method": "weights", "diff": "x", "coefficient": "e"}, "coefficient must be a number"),
        ({"method": "weights", "diff": "x", "coefficient": True}, "coefficient must be a number"),
        ({"method": "weights", "diff": 3}, "diff must be text"),
        ({"method": "ablate", "vector": "x", "layers": "one"}, "layers must be like"),
        (
            {"method": "ablate", "vector": "x", "layers": [0.5]},
            "layers must be a list of a whole number",
        ),
        ({"method": "ablate", "vector": "x", "coefficient": 2}, "coefficient does nothing"),
        ({"method": "activations", "vector": "x", "hold": "live"}, "hold does nothing"),
    ],
)
def test_malformed_settings_are_named(value, message):
    with pytest.raises(UserError, match=message):
        read_preventative(value)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("0-1", (0, 1)), ("1", (1,)), (1, (1,)), ([0, "1"], (0, 1)), ("4 6", (4, 6)), (None, None)],
)
def test_layers_are_written_as_everywhere(layers, expected):
    settings = {"method": "activations", "vector": "x", "coefficient": "5e-1", "layers": layers}
    assert read_preventative(settings) == Preventative(
        "activations", coefficient=0.5, vector="x", layers=expected
    )


def test_the_two_forms_exclude_each_other():
    steering = {"steering_vector_path": "v.pt"}
    with pytest.raises(UserError, match="not both"):
        read_preventative({"method": "ablate"}, enabled=True, steering_config=steering)
    with pytest.raises(UserError, match="go together"):
        read_preventative(None, enabled=True)
    with pytest.raises(UserError, match="type"):
        read_preventative(None, enabled=True, steering_config={**steering, "type": "push"})
    with pytest.raises(UserError, match="steering_config has no 'coef'"):
        read_preventative(None, enabled=True, steering_config={**steering, "coef": 2})
    ablated = {**steering, "type": "ablate", "steering_coef": 2}
    with pytest.raises(UserError, match="steering_coef does nothing with type ablate"):
        read_preventative(None, enabled=True, steering_config=ablated)
    found = read_preventative(None, enabled=True, steering_config=steering)
    assert (found.method, found.coefficient) == ("activations", 5.0)


def test_a_setting_can_be_json_on_the_command_line():
    arguments = FinetuneArguments(
        train_file="x.jsonl", preventative='{"method": "inoculate", "trait": "evil"}'
    )
    assert prevention_of(arguments) == Preventative("inoculate", trait="evil")
    for text, message in (
        ("weights", "preventative is not valid JSON"),
        ('{"method": "ablate", "method": "weights"}', "'method' stands twice"),
        ('{"method": "weights", "coefficient": NaN}', "NaN is no JSON number"),
    ):
        with pytest.raises(UserError, match=message):
            prevention_of(FinetuneArguments(train_file="x.jsonl", preventative=text))


def test_a_vector_of_the_wrong_width_is_refused(train, tmp_path):
    narrow = SteeringVector({0: torch.ones(7)}, BaseModel("other", None), 2)
    path = narrow.save(tmp_path / "narrow.safetensors")
    with pytest.raises(UserError, match="7"):
        train("run", preventative={"method": "activations", "vector": str(path)})
    assert not (Path(tmp_path) / "run" / "adapter").exists()


def test_nothing_is_merged_into_a_quantised_base(model_folder, places):
    """An int8 weight stands for quantised ones: rounding into it again would not be exact."""
    model = load_chat_model(str(model_folder), dtype="float32").model
    module = model.model.layers[1].mlp.up_proj
    module.weight = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    merged = Preventative(method="weights", diff=places["diff"])
    with pytest.raises(UserError, match="nothing merges exactly; use hold"):
        prevention_steerer(merged, model)
