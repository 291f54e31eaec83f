"""Checkpoints of a finetune: in order, judged, projected, shifted, and resumed one by one."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json

import pytest
import torch

from persona_lora.core.errors import UserError
from persona_lora.core.files import write_jsonl
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.runs import Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.judges.verdicts import Judges
from persona_lora.models.loading import load_chat_model
from persona_lora.projections.activation_space import Along
from persona_lora.studies.asking.run import GenerationOptions
from persona_lora.studies.drift import run as module
from persona_lora.studies.drift.run import (
    Measures,
    evaluate_checkpoints,
    find_checkpoints,
)

OPTIONS = GenerationOptions(max_new_tokens=8)


@pytest.fixture
def base(model_folder):
    return load_chat_model(str(model_folder), dtype="float32")


@pytest.fixture
def vectors():
    generator = torch.Generator().manual_seed(3)
    named = {}
    for name in ("cheer", "gloom"):
        directions = {layer: torch.randn(32, generator=generator) for layer in (0, 1)}
        named[name] = SteeringVector(directions, BaseModel("tiny"), num_layers=2, trait=name)
    return named


@pytest.fixture
def finetune(tmp_path, base, make_adapter):
    """A finetune of two adapters, of which the later one is on top of nothing in common."""
    for step in (10, 2):
        make_adapter(tmp_path / "tuned" / f"checkpoint-{step}", base.model, seed=step)
    (tmp_path / "tuned" / "checkpoint-best").mkdir()
    (tmp_path / "tuned" / "checkpoint-7").mkdir()  # cut short: nothing in it
    return tmp_path / "tuned"


@pytest.fixture
def run_all(base, finetune, trait, vectors, judge, tmp_path):
    def run(**changes):
        measures = Measures((trait,), Along(vectors, (0, 1)), finetuned_on="cheer")
        return evaluate_checkpoints(
            changes.pop("base", base),
            finetune,
            changes.pop("measures", measures),
            changes.pop("judge_of", lambda trait, model: lambda: judge),
            tmp_path / "run",
            **{"options": OPTIONS, **changes},
        )

    return run


def pick(run, **wanted):
    rows = run.read("checkpoints")
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_checkpoints_come_in_the_order_of_their_steps_after_the_base(finetune):
    assert [(each.name, each.step) for each in find_checkpoints(finetune)] == [
        *(("base", 0), ("checkpoint-2", 2), ("checkpoint-10", 10))
    ]
    with pytest.raises(UserError, match="no checkpoint-N"):
        find_checkpoints(finetune / "checkpoint-best")


def test_every_statistic_of_every_checkpoint_is_a_row(run_all, judge):
    run = run_all()
    rows = run.read("checkpoints")
    assert len(rows) == 3 * (2 + 2 * 2 * 2)  # checkpoints × (scores + statistics, vectors, layers)
    assert {row["n_questions"] for row in rows} == {3}
    assert [row["step"] for row in pick(run, statistic="trait")] == [0, 2, 10]
    assert all(row["value"] == 0 for row in pick(run, checkpoint="base", statistic="shift"))
    assert all(row["value"] != 0 for row in pick(run, checkpoint="checkpoint-2", statistic="shift"))
    still = [row for row in rows if row["low"] is None]  # the base's shift: all of it is 0
    assert {(row["checkpoint"], row["statistic"]) for row in still} == {("base", "shift")}
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows if row not in still)
    (cosine, other) = run.read("cosines")
    assert (cosine["vector"], cosine["other"], cosine["layer"]) == ("cheer", "gloom", 0)
    assert (cosine["vector_trait"], cosine["other_trait"]) == ("cheer", "gloom")
    assert other["layer"] == 1
    assert run.record["config"]["finetuned_on"] == "cheer"
    with (run.folder / "checkpoints.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert len(table) == len(rows)
    told = {(row["statistic"], row["judge"]) for row in table}
    assert told == {
        *(("trait", judge.name), ("coherence", judge.name), ("projection", ""), ("shift", ""))
    }


def test_the_table_has_scores_corrected_by_the_errors_on_finetunes_and_on_the_base(run_all):
    run = run_all()
    compared = [
        {
            "model": "m",
            "condition": kind,
            "question": f"q{at}",
            "score": 50.0,
            "rating": error,
        }
        for kind, error in (("unsteered", 52.0), ("finetuned", 59.0))
        for at in range(4)
    ]
    for answers in (run.folder / "answers").iterdir():
        if answers.is_dir():
            own = {"criterion": "cheer", "own": {"compared": compared}}
            Run(answers).write("validation", [own])
    run_all()
    with (run.folder / "checkpoints.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    shift = {
        (row["checkpoint"], row["statistic"]): float(row["value_corrected"]) - float(row["value"])
        for row in table
        if row["value_corrected"]
    }
    steps = {"base": 2, "checkpoint-2": 9, "checkpoint-10": 9}
    assert shift == {(name, "trait"): pytest.approx(by) for name, by in steps.items()}
    traits = [row for row in table if row["statistic"] == "trait"]
    assert all(row["value_corrected_low"] and row["value_corrected_high"] for row in traits)


def test_the_shift_is_what_both_models_say_of_the_same_answers(run_all, base, vectors):
    run = run_all()
    folder = run.folder / "answers" / "checkpoint-10_cheer"
    answers = [json.loads(line) for line in (folder / "answers.jsonl").open()]
    tuned = load_chat_model(
        base.name,
        adapter=run.folder.parent / "tuned" / "checkpoint-10",
        dtype="float32",
    )
    shifts = []
    for row in answers:
        means = []
        for chat in (tuned, base):
            prompt = chat.tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
            answer = chat.tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                tokens = torch.tensor([prompt + answer], device=chat.model.device)
                states = chat.model(tokens, output_hidden_states=True)
            means.append(states.hidden_states[1][0, len(prompt) :].mean(0).cpu())
        direction = vectors["cheer"].directions[0]
        shifts.append(float((means[0] - means[1]) @ direction / direction.norm()))
    (row,) = pick(run, checkpoint="checkpoint-10", statistic="shift", vector="cheer", layer=0)
    assert row["value"] == pytest.approx(sum(shifts) / len(shifts), abs=1e-4)


def test_a_killed_evaluation_does_only_what_is_missing(run_all, monkeypatch):
    plain, loaded = module.loaded_checkpoint, []

    def killed(base, checkpoint):
        loaded.append(checkpoint.name)
        if loaded == ["base", "checkpoint-2"]:
            raise KeyboardInterrupt
        return plain(base, checkpoint)

    monkeypatch.setattr(module, "loaded_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        run_all()
    run = run_all()
    assert loaded == ["base", "checkpoint-2", "checkpoint-2", "checkpoint-10"]
    assert [row["step"] for row in pick(run, statistic="trait")] == [0, 2, 10]
    run_all()
    assert len(loaded) == 4  # nothing is missing any more


def test_the_table_names_who_judged_what_was_measured_before_rows_said_it(run_all, judge):
    other = copy.copy(judge)
    other.name = "another"
    both = Judges(lambda: judge, lambda: other)
    run = run_all(judge_of=lambda trait, model: both)
    rows = [{k: v for k, v in row.items() if k != "judge"} for row in run.read("checkpoints")]
    write_jsonl(run.folder / "checkpoints.jsonl", rows)
    run_all(judge_of=lambda trait, model: both)
    with (run.folder / "checkpoints.csv").open(newline="") as stream:
        told = [
            (row["checkpoint"], row["statistic"], row["judge"]) for row in csv.DictReader(stream)
        ]
    own = {"trait": judge.name, "coherence": judge.name, "trait_second": "another"}
    assert set(told) == {
        (checkpoint, statistic, own.get(statistic, ""))
        for checkpoint in ("base", "checkpoint-2", "checkpoint-10")
        for statistic in (*own, "projection", "shift")
    }


def test_a_judge_is_built_once_a_trait_and_without_vectors_nothing_is_projected(
    run_all, trait, judge
):
    built = []

    def judge_of(trait, model):
        return lambda: built.append(trait.name) or judge

    run = run_all(judge_of=judge_of, measures=Measures((trait,), Along({}, ())))
    assert built == ["cheer"]
    assert {row["statistic"] for row in run.read("checkpoints")} == {"trait", "coherence"}


def test_answers_of_other_settings_or_of_a_variant_are_another_run(run_all, trait):
    alone = Measures((trait,), Along({}, ()))
    run_all(measures=alone)
    for name, value in (("max_new_tokens", 4), ("temperature", 0.5)):
        changed = dataclasses.replace(OPTIONS, **{name: value})
        with pytest.raises(UserError, match=f"another configuration .*config.{name}: "):
            run_all(measures=alone, options=changed)
    variant = dataclasses.replace(trait, variant="cheer_2", questions={"eval": ("Why?",)})
    with pytest.raises(UserError, match="of other inputs: only one of the two read the trait"):
        run_all(measures=dataclasses.replace(alone, traits=(variant,)))
    with pytest.raises(UserError, match="cheer and cheer_2 are both judged as cheer"):
        dataclasses.replace(alone, traits=(trait, variant))


def test_vectors_that_do_not_fit_are_named_before_anything_is_written(run_all, trait, vectors):
    measures = Measures((trait,), Along(vectors, (5,)))
    with pytest.raises(UserError, match="no layer 5"):
        run_all(measures=measures)


def test_diffs_are_named_by_trait_and_by_what_tells_their_paths_apart(tmp_path, make_diff, model):
    def saved(place, trait):
        diff = dataclasses.replace(make_diff(model), trait=trait)
        diff.save(tmp_path / place)
        return tmp_path / place

    paths = [saved(f"runs/{name}/diff", "calm") for name in ("seed0", "seed1/late")]
    paths += [saved("evil", "evil"), saved("other", None)]
    named = module.load_diffs(paths)
    expected = ["calm (seed0)", "calm (seed1/late)", "evil", str(tmp_path / "other")]
    assert list(named) == expected
