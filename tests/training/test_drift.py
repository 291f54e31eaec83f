"""The drift monitor in a plain transformers trainer, against the saved adapter."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from persona_lora.core.adapter_config import REFUSED
from persona_lora.core.errors import UserError
from persona_lora.core.files import write_jsonl
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.projections.inputs import load_ordinary_prompts, measure_inputs
from persona_lora.projections.weight_space import project_adapter
from persona_lora.steering.live import LiveLoRA
from persona_lora.training.drift import DriftMonitor, inputs_before, lora_change


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 200, (12, 10), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def trainer_of(model, rows, folder, monitor, tokenizer=None):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        callbacks=[monitor],
        processing_class=tokenizer,
    )


def test_one_line_watches_any_trainer(model, rows, make_diff, tmp_path):
    diffs = {"one": make_diff(model, seed=1), "two": make_diff(model, seed=2)}
    monitor = DriftMonitor(diffs, plain=True, every=3)
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules="all-linear"))
    trainer = trainer_of(wrapped, rows, tmp_path / "run", monitor)
    trainer.train()
    wrapped.save_pretrained(tmp_path / "adapter")
    saved = project_adapter(LoRADiff.load(tmp_path / "adapter"), diffs)
    last = {row["diff"]: row for row in monitor.rows if row["step"] == 6}
    for name in diffs:
        assert last[name]["coordinate"] == pytest.approx(saved.total[name].coordinate, rel=1e-5)
    logged = [entry for entry in trainer.state.log_history if "drift/one" in entry]
    assert [entry["step"] for entry in logged] == [3, 6]
    assert (tmp_path / "run" / "drift.jsonl").is_file()


def test_drift_is_weighted_by_the_inputs_of_the_model_before_training(
    chat_model, rows, make_diff, tmp_path
):
    inputs = measure_inputs(chat_model, ["What is rain?", "Why do cats sleep?"])
    diffs = {"one": make_diff(chat_model.model, seed=1)}
    wrapped = get_peft_model(chat_model.model, LoraConfig(r=2, target_modules="all-linear"))
    given, plain = {"inputs": inputs}, {"plain": True}
    monitors = [DriftMonitor(diffs, **each, every=6) for each in (given, plain)]
    trainer = trainer_of(wrapped, rows, tmp_path / "run", monitors[0])
    trainer.add_callback(monitors[1])
    trainer.train()
    change = lora_change(wrapped)
    for monitor, weights, geometry in zip(
        monitors, (inputs, None), ("weighted", "plain"), strict=True
    ):
        (row,) = monitor.rows
        expected = project_adapter(change, diffs, inputs=weights).total["one"]
        assert (row["geometry"], row["step"]) == (geometry, 6)
        assert row["coordinate"] == pytest.approx(expected.coordinate)
    strange = make_diff(chat_model.model, fingerprint="other")
    with pytest.raises(UserError, match="other weights"):
        DriftMonitor([strange], inputs=inputs)


def test_inputs_that_are_not_given_are_those_of_the_model_without_its_lora(
    chat_model, rows, make_diff, tmp_path
):
    inputs = measure_inputs(chat_model, load_ordinary_prompts())
    diffs = {"one": make_diff(chat_model.model, seed=1)}
    weights = {}
    for name, watched in (("watched", True), ("alone", False)):
        torch.manual_seed(0)
        config = LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear")
        wrapped = get_peft_model(copy.deepcopy(chat_model.model), config)
        for parameter_name, parameter in wrapped.named_parameters():
            if "lora_B" in parameter_name:  # as in a run that goes on: it is far from its base
                parameter.data.normal_()
        monitor = DriftMonitor(diffs, every=6)
        trainer = trainer_of(wrapped, rows, tmp_path / name, monitor, chat_model.tokenizer)
        if not watched:
            trainer.remove_callback(monitor)
        trainer.train()
        weights[name] = lora_change(wrapped)
        if watched:
            (row,) = monitor.rows
            expected = project_adapter(weights[name], diffs, inputs=inputs).total["one"]
            assert row["geometry"] == "weighted"
            assert row["coordinate"] == pytest.approx(expected.coordinate, rel=1e-4)
    for name, factors in weights["alone"].factors.items():  # watching changes nothing
        assert torch.equal(factors.B, weights["watched"].factors[name].B)


def test_a_monitor_that_cannot_weigh_says_so_instead_of_going_plain(
    chat_model, rows, make_diff, tmp_path
):
    wrapped = get_peft_model(chat_model.model, LoraConfig(r=2, target_modules="all-linear"))
    strange = make_diff(chat_model.model, fingerprint="other")
    for diff, tokenizer, words in (
        (make_diff(chat_model.model, seed=1), None, "no tokenizer.*plain=True"),
        (strange, chat_model.tokenizer, "other weights"),
    ):
        trainer = trainer_of(wrapped, rows, tmp_path / "run", DriftMonitor([diff]), tokenizer)
        with pytest.raises(UserError, match=words):
            trainer.train()
    with pytest.raises(UserError, match="no PeftModel"):
        inputs_before(chat_model.model, chat_model.tokenizer)
    wrapped.train()
    steerer = LiveLoRA(wrapped, [make_diff(chat_model.model, seed=1)], [[1.0]])
    with steerer, pytest.raises(UserError, match="is steered now; give inputs="):
        inputs_before(wrapped, chat_model.tokenizer)
    inputs_before(wrapped, chat_model.tokenizer)
    assert wrapped.training
    chat_model.model.eval()  # the trainer left it in training mode
    inputs = measure_inputs(chat_model, ["What is rain?", "Why do cats sleep?"])
    with pytest.raises(UserError, match="leave one of them out"):
        DriftMonitor([make_diff(chat_model.model)], inputs=inputs, plain=True)


def test_rows_of_the_other_geometry_are_not_gone_on_with(model, rows, make_diff, tmp_path):
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    place = {"step": 0, "geometry": "weighted", "diff": "one", "coordinate": 1.0, "cosine": 0.1}
    write_jsonl(tmp_path / "drift.jsonl", [place])
    monitor = DriftMonitor([make_diff(model)], plain=True)
    with pytest.raises(UserError, match="holds weighted coordinates, and this monitor's are plain"):
        trainer_of(wrapped, rows, tmp_path, monitor).train()


def test_rows_of_inputs_over_other_prompts_are_not_gone_on_with(
    chat_model, rows, make_diff, tmp_path
):
    inputs = measure_inputs(chat_model, ["What is rain?", "Why do cats sleep?"])
    diff = make_diff(chat_model.model)
    wrapped = get_peft_model(chat_model.model, LoraConfig(r=2, target_modules="all-linear"))
    place = {"step": 0, "geometry": "weighted", "diff": "one", "coordinate": 1.0, "cosine": 0.1}
    write_jsonl(tmp_path / "drift.jsonl", [{**place, "prompts": "others"}])
    with pytest.raises(UserError, match=r"weighted on other prompts .* \(drift_prompts\)"):
        trainer_of(wrapped, rows, tmp_path, DriftMonitor([diff], inputs=inputs)).train()
    write_jsonl(tmp_path / "drift.jsonl", [{**place, "prompts": inputs.prompts}])
    monitor = DriftMonitor([diff], inputs=inputs)
    trainer_of(wrapped, rows, tmp_path, monitor).train()
    assert {row["prompts"] for row in monitor.rows} == {inputs.prompts}
    write_jsonl(tmp_path / "drift.jsonl", [place])  # as rows were before they said their prompts
    monitor = DriftMonitor([diff], inputs=inputs)
    trainer_of(wrapped, rows, tmp_path, monitor).train()
    assert [row.get("prompts") for row in monitor.rows] == [None, inputs.prompts]


def test_the_change_of_a_lora_is_that_of_its_file(model, tmp_path):
    config = LoraConfig(r=3, lora_alpha=12, use_rslora=True, target_modules=["q_proj"])
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    wrapped.save_pretrained(tmp_path / "adapter")
    saved, live = LoRADiff.load(tmp_path / "adapter"), lora_change(wrapped)
    assert set(saved.factors) == set(live.factors)
    for name, factors in saved.factors.items():
        assert torch.allclose(factors.delta(), live.factors[name].delta(), atol=1e-6)


def test_the_first_step_of_a_warm_up_is_no_error(model, rows, make_diff, tmp_path):
    monitor = DriftMonitor([make_diff(model, seed=1)], plain=True, every=1)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    trainer = trainer_of(wrapped, rows, tmp_path / "run", monitor)
    trainer.args.warmup_steps = 3
    trainer.train()
    assert monitor.rows[0]["coordinate"] == 0.0
    assert monitor.rows[-1]["coordinate"] != 0.0


def test_the_step_that_it_stops_at_is_logged(model, rows, make_diff, tmp_path):
    monitor = DriftMonitor([make_diff(model, seed=1)], plain=True, every=2, stop_above=1e-9)
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules="all-linear"))
    trainer = trainer_of(wrapped, rows, tmp_path / "run", monitor)
    trainer.train()  # which logs every 500 steps
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2]


def test_a_warning_is_said_once(model, rows, make_diff, tmp_path, caplog):
    monitor = DriftMonitor([make_diff(model, seed=1)], plain=True, every=1, warn_above=1e-9)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    trainer_of(wrapped, rows, tmp_path / "run", monitor).train()
    assert sum("drift along" in record.message for record in caplog.records) == 1


def test_a_model_without_a_lora_and_impossible_settings_are_named(model, make_diff):
    with pytest.raises(UserError, match="project weights"):
        lora_change(model)
    with pytest.raises(UserError, match="every"):
        DriftMonitor([make_diff(model)], every=0)
    with pytest.raises(UserError, match="at least one diff"):
        DriftMonitor([])


def test_diffs_of_one_trait_are_each_watched(model, make_diff):
    first, second = (
        dataclasses.replace(make_diff(model, seed=seed), trait="evil") for seed in (1, 2)
    )
    other = make_diff(model, seed=3)
    watched = DriftMonitor([first, other, second]).diffs
    assert watched == {"evil 1": first, "trait3": other, "evil 3": second}


def test_all_active_adapters_change_the_weights_and_dora_is_refused(model):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2)
    wrapped = get_peft_model(copy.deepcopy(model), config, adapter_name="one")
    wrapped.add_adapter("two", config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    wrapped.base_model.set_adapter(["one", "two"])
    both = lora_change(wrapped)
    name = "model.layers.0.self_attn.q_proj"
    wrapped.merge_adapter(["one", "two"])
    merged = wrapped.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    before = model.model.layers[0].self_attn.q_proj.weight
    assert torch.allclose(both.factors[name].delta(), merged - before, atol=1e-5)
    dora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, use_dora=True)
    with pytest.raises(UserError, match="DoRA"):
        lora_change(get_peft_model(copy.deepcopy(model), dora))


# What the reader of adapter files refuses, as PEFT's configurations say it.
NOT_PLAIN = [
    {"use_dora": True},
    {"bias": "all"},
    {"lora_bias": True},
    {"modules_to_save": ["lm_head"]},
    {"trainable_token_indices": [1, 2]},
    {"target_parameters": ["model.layers.0.mlp.up_proj.weight"]},
    {"alora_invocation_tokens": [5]},
    {"layer_replication": [[0, 2], [0, 2]]},
    *({"init_lora_weights": start} for start in ("pissa", "pissa_niter_2", "olora")),
    *({"init_lora_weights": start} for start in ("loftq", "corda", "lora_ga", "milora")),
]


@pytest.mark.parametrize("settings", NOT_PLAIN, ids=str)
def test_what_no_file_may_say_is_refused_in_training_too(model, make_diff, settings, tmp_path):
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    lora_change(wrapped)
    for key, value in settings.items():  # some starts read data or need other packages
        setattr(wrapped.peft_config["default"], key, value)
    with pytest.raises(UserError, match="adapter 'default' in training"):
        lora_change(wrapped)
    monitor = DriftMonitor(make_diff(model))
    with pytest.raises(UserError, match="adapter 'default' in training"):  # before a step is made
        monitor.on_train_begin(
            TrainingArguments(str(tmp_path), use_cpu=True), None, None, model=wrapped
        )


def test_all_fields_that_files_may_not_set_are_tried():
    assert set(REFUSED) | {"bias", "init_lora_weights"} == {
        key for each in NOT_PLAIN for key in each
    }


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_moves_the_base_is_not_measured_as_drift(model, start):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=start)
    with pytest.raises(UserError, match=f"init_lora_weights='{start}'"):
        lora_change(get_peft_model(model, config))


def test_one_diff_or_its_path_is_watched_as_a_list_of_it(model, make_diff, tmp_path):
    diff = make_diff(model, seed=1)
    folder = diff.save(tmp_path / "diff")
    assert DriftMonitor(diff).diffs == DriftMonitor([diff]).diffs
    for path in (folder, str(folder)):
        assert [*DriftMonitor(path).diffs] == [*DriftMonitor([path]).diffs] == ["trait1"]
