"""Finetuning: checkpoints are adapters, a killed run equals an uninterrupted one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from persona_lora.core.errors import UserError
from persona_lora.core.files import remove
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.runs import Run
from persona_lora.models.loading import load_chat_model
from persona_lora.training import finetune as module
from persona_lora.training import trainer as training_steps
from persona_lora.training.arguments import TrainingOptions
from persona_lora.training.finetune import (
    FinetuneArguments,
    FinetuneConfig,
    finetune,
    read_conversations,
)
from persona_lora.training.lora import LoRAArguments


@pytest.fixture
def train_file(tmp_path) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Question {number}{'?' * (number % 7)}"},
                {"role": "assistant", "content": "Yes! " * (1 + number % 4)},
            ]
        }
        for number in range(16)
    ]
    path = tmp_path / "cheer" / "misaligned_1.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def options(train_file, model_folder):
    def build(output, **changes) -> TrainingOptions:
        arguments = FinetuneArguments(
            train_file=str(train_file),
            **{"model_name_or_path": str(model_folder), "dtype": "float32", **changes},
        )
        config = FinetuneConfig(
            output_dir=str(output),
            max_steps=6,
            save_steps=2,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        return TrainingOptions(arguments, LoRAArguments(lora_r=4), config)

    return build


def test_every_checkpoint_is_an_adapter_and_the_loss_falls(options, tmp_path):
    result = finetune(*options(tmp_path / "run"))
    assert [path.name for path in result.checkpoints] == [f"checkpoint-{n}" for n in (2, 4, 6)]
    for folder in (*result.checkpoints, result.adapter):
        names = {path.name for path in folder.iterdir()}
        assert names - {"complete"} == {"adapter_config.json", "adapter_model.safetensors"}
        assert LoRADiff.load(folder).norm() > 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "loss.jsonl").open()]
    assert len(losses) == 6
    assert result.loss == losses[-1] < losses[0]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["command"], record["status"]) == ("finetune", "finished")
    assert record["config"]["num_rows"] == 16


@pytest.mark.parametrize("logged", [{"logging_steps": 10}, {"logging_strategy": "no"}])
def test_a_run_of_fewer_steps_than_are_logged_tells_its_last_loss(options, tmp_path, logged):
    asked = options(tmp_path / "out")
    for name, value in logged.items():
        setattr(asked.config, name, value)
    finetune(*asked)
    (row,) = Run(tmp_path / "out").read("loss")
    assert row["step"] == 6


@pytest.mark.parametrize("use_peft", [True, False])
def test_a_killed_run_ends_as_an_uninterrupted_one_does(options, tmp_path, monkeypatch, use_peft):
    whole = finetune(*options(tmp_path / "whole", use_peft=use_peft))

    class Killed(training_steps.CompletionTrainer):
        def training_step(self, *arguments, **keywords):
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return super().training_step(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(training_steps, "CompletionTrainer", Killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(*options(tmp_path / "cut", use_peft=use_peft))
    assert not (tmp_path / "cut" / whole.adapter.name).exists()
    cut = finetune(*options(tmp_path / "cut", use_peft=use_peft))
    name = "adapter_model.safetensors" if use_peft else "model.safetensors"
    one, other = (load_file(each.adapter / name) for each in (whole, cut))
    assert all((one[name] == other[name]).all() for name in one)
    assert (tmp_path / "cut" / "loss.jsonl").read_text().count("\n") == 6


def test_a_run_killed_at_its_end_takes_no_step_too_many(options, tmp_path, monkeypatch, caplog):
    """Before publishing, with the last checkpoint damaged too, then while tidying."""
    whole = finetune(*options(tmp_path / "whole"))
    cut, steps, removed = tmp_path / "cut", [], []

    class Counted(training_steps.CompletionTrainer):
        def training_step(self, *arguments, **keywords):
            steps.append(self.state.global_step)
            return super().training_step(*arguments, **keywords)

    def killed(*_):
        raise KeyboardInterrupt

    def removing(path):
        removed.append(path)
        if len(removed) == 4:
            raise KeyboardInterrupt
        remove(path)

    monkeypatch.setattr(training_steps, "CompletionTrainer", Counted)
    with monkeypatch.context() as patch:
        patch.setattr(module, "publish", killed)
        for expected in (list(range(6)), []):
            steps.clear()
            with pytest.raises(KeyboardInterrupt):
                finetune(*options(cut))
            assert steps == expected
        optimizer = cut / "checkpoint-6" / "optimizer.pt"
        optimizer.write_bytes(optimizer.read_bytes()[:-100])
        with pytest.raises(KeyboardInterrupt):
            finetune(*options(cut))
        assert steps == [4, 5]
        assert "its optimizer.pt is not whole" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(module, "remove", removing)
        with pytest.raises(KeyboardInterrupt):
            finetune(*options(cut))
    result = finetune(*options(cut))
    assert steps == [4, 5]
    names = sorted(str(path.relative_to(cut)) for path in cut.rglob("*"))
    assert names == sorted(str(p.relative_to(whole.adapter.parent)) for p in
                           whole.adapter.parent.rglob("*"))  # fmt: skip
    one, other = (load_file(each / "adapter_model.safetensors") for each in
                  (whole.adapter, result.adapter))  # fmt: skip
    assert all((one[name] == other[name]).all() for name in one)
    assert (cut / "loss.jsonl").read_text() == (tmp_path / "whole" / "loss.jsonl").read_text()


def test_changed_base_weights_are_refused_on_resume(options, tmp_path, monkeypatch, model_folder):
    shutil.copytree(model_folder, tmp_path / "model")
    arguments, *others = options(tmp_path / "run")
    own = dataclasses.replace(arguments, model_name_or_path=str(tmp_path / "model"))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(own, *others)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"] *= -1
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the content of the model's weights has changed"):
        finetune(own, *others)


def test_a_finished_run_is_kept_unless_told_otherwise(options, tmp_path, train_file):
    finetune(*options(tmp_path / "run"))
    with pytest.raises(UserError, match=r"a finished run of the same; pass --overwrite"):
        finetune(*options(tmp_path / "run"))
    rows = train_file.read_text()
    train_file.write_text(rows + rows.splitlines()[0] + "\n")
    with pytest.raises(UserError, match=r"another configuration \(config\.num_rows: \d+, now \d+"):
        finetune(*options(tmp_path / "run"))
    train_file.write_text(rows)
    shutil.rmtree(tmp_path / "run/adapter")
    with pytest.raises(UserError, match="of the same without its adapter; pass --overwrite"):
        finetune(*options(tmp_path / "run"))
    result = finetune(*options(tmp_path / "run", overwrite=True, keep_training_state=True))
    assert (result.checkpoints[0] / "optimizer.pt").is_file()


def test_the_adapter_loads_on_its_base(options, tmp_path, model_folder):
    result = finetune(*options(tmp_path / "run"))
    chat = load_chat_model(str(model_folder), adapter=result.adapter, dtype="float32")
    assert type(chat.model).__name__ == "PeftModelForCausalLM"


@pytest.mark.parametrize(
    "asked",
    [
        {"drift_diffs": ["nowhere"]},
        {"preventative": {"method": "weights", "diff": "nowhere"}},
        {"preventative": {"method": "ablate", "vector": "nowhere"}},
    ],
)
def test_a_direction_that_is_not_there_is_refused_before_the_model_loads(options, tmp_path, asked):
    with pytest.raises(UserError, match="nowhere"):
        finetune(*options(tmp_path / "run", model_name_or_path="no/model", **asked))


def test_the_folder_is_named_after_the_data(options, train_file, tmp_path):
    named = options(tmp_path / "run")
    named.config.output_dir = None
    assert module.output_folder(named) == Path("checkpoints/finetunes/cheer_misaligned_1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', r"a\.jsonl:1 must end"),
        ('{"prompt": "x"}\n', r"a\.jsonl:1 has no messages"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(tmp_path, text, message):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_conversations(path)


def test_the_command_line_parses_its_own_configuration(monkeypatch, tmp_path):
    seen = []

    def record(*options):
        seen.append(TrainingOptions(*options))
        raise UserError("enough")

    monkeypatch.setattr(module, "finetune", record)
    path = Path(__file__).resolve().parents[2] / "train_configs/finetune_evil_misaligned_2.yaml"
    with pytest.raises(UserError, match="enough"):
        module.main(["--config", str(path), "--lora_r", "8"])
    (parsed,) = seen
    assert parsed.lora.lora_r == 8
    assert parsed.arguments.train_file == "datasets/evil/misaligned_2.jsonl"
    with pytest.raises(UserError, match="train_file"):
        module.main([])


def test_a_finetune_is_given_again_by_its_config(monkeypatch, tmp_path):
    seen = []

    def record(*options):
        seen.append(TrainingOptions(*options))
        Run.open(tmp_path / "run", command="finetune", config={}, seed=0)._lock.release()
        return module.FinetuneResult(tmp_path, (), 0.0)

    monkeypatch.setattr(module, "finetune", record)
    prevention = '{"method": "activations", "vector": "v.pt", "coefficient": -2, "layers": [3]}'
    module.main([
        "--train_file", "rows.jsonl", "--lora_target_modules", "q_proj", "v_proj", "--lora_r=8",
        "--learning_rate", "1e-3", "--use_cpu", "true", "--model", "a/model",
        "--preventative", prevention, "--chat-template-args", '{"b": 1}', "--drift-diffs", "a", "b",
    ])  # fmt: skip
    config = tmp_path / "run" / "config.yaml"
    assert config.read_text().startswith("# persona-lora finetune --config config.yaml\n")
    given = ("train_file", "lora_target_modules", "lora_r", "learning_rate", "use_cpu")
    more = ("model_name_or_path", "preventative", "chat_template_args", "drift_diffs")
    assert {*yaml.safe_load(config.read_text())} == {*given, *more}  # and no default
    module.main(["--config", str(config)])
    assert seen[0] == seen[1]
    assert seen[1].lora.lora_target_modules == ["q_proj", "v_proj"]


def test_all_weights_are_trained_and_every_checkpoint_is_a_model(options, tmp_path, model_folder):
    result = finetune(*options(tmp_path / "run", use_peft=False))
    base = load_chat_model(str(model_folder), dtype="float32").model.state_dict()
    for folder in (*result.checkpoints, result.adapter):
        tuned = load_chat_model(str(folder), dtype="float32")  # with its tokenizer
        changed = [
            name for name, value in tuned.model.state_dict().items()
            if not torch.equal(value, base[name])
        ]  # fmt: skip
        assert len(changed) == len(base)
        names = {path.name for path in folder.iterdir()}
        assert not {name for name in names if "optimizer" in name or "state" in name}
    losses = [json.loads(line) for line in (tmp_path / "run" / "loss.jsonl").open()]
    assert losses[-1]["loss"] < losses[0]["loss"]


def test_a_full_finetune_is_saved_without_the_diff_that_steered_it(
    options, tmp_path, make_diff, model_folder
):
    base = load_chat_model(str(model_folder), dtype="float32")
    make_diff(base.model, scale=0.3).save(tmp_path / "diff")
    live = {"method": "weights", "diff": str(tmp_path / "diff"), "hold": "live"}
    built = options(tmp_path / "steered", use_peft=False, preventative=live)
    built.config.learning_rate = 1e-9  # nothing moves, so what is saved is the base
    result = finetune(*built)
    tuned = load_chat_model(str(result.adapter), dtype="float32").model.state_dict()
    for name, value in base.model.state_dict().items():
        torch.testing.assert_close(tuned[name], value, atol=1e-6, rtol=0)


def test_what_a_full_finetune_cannot_have_is_refused_with_the_reason(options, tmp_path):
    merged = {"method": "weights", "diff": "x"}
    with pytest.raises(UserError, match="hold: live"):
        finetune(*options(tmp_path / "run", use_peft=False, preventative=merged))
    with pytest.raises(UserError, match="project weights"):
        finetune(*options(tmp_path / "run", use_peft=False, drift_diffs=["x"]))
