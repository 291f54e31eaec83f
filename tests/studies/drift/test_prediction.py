"""A small study on the tiny model: every finetune judged and projected, and resumed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter

import pytest
import torch

from persona_lora.core.chat import Exchange
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel, LoRADiff
from persona_lora.core.runs import Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.loading import load_chat_model
from persona_lora.projections.inputs import load_ordinary_prompts, measure_inputs
from persona_lora.projections.weight_space import project_adapter
from persona_lora.studies.asking.run import GenerationOptions
from persona_lora.studies.drift.prediction import (
    RANDOM_DIRECTIONS,
    DriftStudy,
    planned_prediction,
    predict_finetuning,
)
from persona_lora.studies.drift.read_prediction import nulls, prediction_lines, rows_of

OPTIONS = GenerationOptions(max_new_tokens=5)


@pytest.fixture
def base(model_folder):
    return load_chat_model(str(model_folder), dtype="float32")


@pytest.fixture
def study(base, trait, make_diff, tmp_path):
    for number in range(4):
        make_diff(base.model, seed=number, scale=0.1 * (number + 1)).save(tmp_path / f"f{number}")
    generator = torch.Generator().manual_seed(0)
    directions = {layer: torch.randn(32, generator=generator) for layer in range(2)}
    return DriftStudy(
        {f"f{number}": tmp_path / f"f{number}" for number in range(4)},
        [trait],
        {"cheer": make_diff(base.model, seed=9), "other": make_diff(base.model, seed=8)},
        {"cheer": SteeringVector(directions, BaseModel("tiny", None), 2, trait="cheer")},
        1,
    )


def rows(run, name):
    return [json.loads(line) for line in (run.folder / f"{name}.jsonl").open()]


def test_every_finetune_is_judged_and_projected(base, study, judge, tmp_path):
    run = predict_finetuning(
        base, study, lambda *_: lambda: judge, tmp_path / "out", options=OPTIONS
    )
    judged, predictors = rows(run, "judged"), rows(run, "predictors")
    assert {row["finetune"] for row in judged} == {"base", "f0", "f1", "f2", "f3"}
    random = [row for row in predictors if row["kind"] == "random"]
    assert len(random) == 4 * 2 * RANDOM_DIRECTIONS
    kinds = Counter(row["kind"] for row in predictors if row["kind"] != "random")
    by_weights = ("weights", "weights, corrected", "weights, plain", "distance")
    by_weights += ("shared component",)
    assert kinds == {**dict.fromkeys(by_weights, 4 * 2), "activations": 4}
    (null,) = nulls(judged, predictors)
    assert (null.judged, null.n) == ("cheer", RANDOM_DIRECTIONS)
    assert 1 / (RANDOM_DIRECTIONS + 1) <= null.p <= 1
    adapter = LoRADiff.load(study.finetunes["f2"])
    inputs = measure_inputs(base, load_ordinary_prompts())
    for kind, weights in (("weights", inputs), ("weights, plain", None)):
        total = project_adapter(adapter, study.diffs, inputs=weights).total
        mine = {
            row["direction"]: row["value"]
            for row in predictors
            if (row["finetune"], row["kind"]) == ("f2", kind)
        }
        assert mine == pytest.approx({name: total[name].coordinate for name in study.diffs})
    weighed = [inputs.weigh(each) for each in study.diffs.values()]
    first, second = (each / each.norm() for each in weighed)
    (common,) = {
        row["value"]
        for row in predictors
        if (row["finetune"], row["kind"]) == ("f2", "shared component")
    }
    assert common == pytest.approx(inputs.weigh(adapter).inner(first + second) / 2)
    assert (run.folder / "prediction.png").is_file()
    table = (run.folder / "prediction.csv").read_text().splitlines()
    assert len(table) == 1 + (5 * 2 + 1) + 6  # directions of each kind, and its pooled row
    assert {line.rpartition(",")[2] for line in table} == {"judge", judge.name}


def test_inputs_are_taken_on_prompts_of_ones_own(base, study, judge, tmp_path):
    own = dataclasses.replace(study, prompts=("Why not?", "Is rain wet?"))
    contents = [planned_prediction(each, OPTIONS).inputs for each in (study, own)]
    assert {at for at in contents[0] if contents[0][at] != contents[1][at]} == {
        "the ordinary prompts"
    }
    run = predict_finetuning(base, own, lambda *_: lambda: judge, tmp_path / "out", options=OPTIONS)
    adapter, inputs = LoRADiff.load(own.finetunes["f2"]), measure_inputs(base, own.prompts)
    wanted = project_adapter(adapter, own.diffs, inputs=inputs).total
    found = {
        row["direction"]: row["value"]
        for row in rows(run, "predictors")
        if (row["finetune"], row["kind"]) == ("f2", "weights")
    }
    assert found == pytest.approx({name: wanted[name].coordinate for name in own.diffs})


def test_what_the_training_data_say_stands_beside(base, study, judge, make_diff, tmp_path):
    data = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Lovely rain!"}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    rows_sha256 = digest_of([turns])
    for name, folder in study.finetunes.items():
        config = {"train_file": str(data), "num_rows": 12, "rows_sha256": rows_sha256}
        if name == "f1":  # a prompt stood before its rows
            config |= {"rows_sha256": "with a prompt", "data_sha256": rows_sha256}
        with Run.open(folder / "run", command="finetune", config=config, seed=1) as run:
            run.extend("loss", [{"step": at, "epoch": at / 2} for at in (1, 2, int(name[1:]) + 3)])
        for each in ("run.json", "loss.jsonl"):
            shutil.move(folder / "run" / each, folder / each)
    late = tmp_path / "late"  # a checkpoint at a step that was not logged
    late.mkdir()
    for each in ("run.json", "loss.jsonl"):
        shutil.move(study.finetunes["f3"] / each, late / each)
    shutil.move(study.finetunes["f3"], late / "checkpoint-4")
    study = dataclasses.replace(study, finetunes={**study.finetunes, "f3": late / "checkpoint-4"})
    run = predict_finetuning(
        base, study, lambda *_: lambda: judge, tmp_path / "out", options=OPTIONS
    )
    origins = {row["finetune"]: (row.get("data"), row.get("seed")) for row in rows(run, "judged")}
    assert origins == {"base": (None, None)} | {f"f{at}": (rows_sha256, 1) for at in range(4)}
    told = {(row["finetune"], row["kind"]): row["value"] for row in rows(run, "predictors")}
    assert [told[f"f{at}", "dose"] for at in range(4)] == [12 * at / 2 for at in (3, 4, 5, 4)]
    (verdict,) = judge.judge([Exchange("Rain?", "Lovely rain!")], "cheer")
    assert told["f0", "training text"] == told["f3", "training text"] == verdict.score
    assert judge.asked.count(("cheer", 1)) == 2  # once for all four finetunes, and above
    table = (run.folder / "prediction.csv").read_text()
    assert "training text" in table
    assert "dose" in table


def test_rows_that_have_changed_since_and_what_only_some_finetunes_tell_are_left_out(
    base, study, judge, tmp_path
):
    data = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Lovely rain!"}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    for name, rows_sha256 in (("f0", digest_of([turns])), ("f1", "of other rows")):
        folder = study.finetunes[name]
        config = {"train_file": str(data), "num_rows": 12, "rows_sha256": rows_sha256}
        with Run.open(folder / "run", command="finetune", config=config, seed=1) as run:
            run.extend("loss", [{"step": 1, "epoch": 0.5}])
        for each in ("run.json", "loss.jsonl"):
            shutil.move(folder / "run" / each, folder / each)
    run = predict_finetuning(
        base, study, lambda *_: lambda: judge, tmp_path / "out", options=OPTIONS
    )
    told = {row["finetune"] for row in rows(run, "predictors") if row["kind"] == "training text"}
    assert told == {"f0"}
    assert "training text" not in (run.folder / "prediction.csv").read_text()


def test_a_second_run_judges_only_what_is_new(base, study, judge, make_diff, tmp_path):
    def go(wanted):
        return predict_finetuning(
            base, wanted, lambda *_: lambda: judge, tmp_path / "out", options=OPTIONS,
        )  # fmt: skip

    first = rows(go(study), "judged")
    asked = len(judge.asked)
    make_diff(base.model, seed=5, scale=0.3).save(tmp_path / "f9")
    more = dataclasses.replace(study, finetunes={**study.finetunes, "f9": tmp_path / "f9"})
    second = rows(go(more), "judged")
    assert second[: len(first)] == first
    assert {row["finetune"] for row in second[len(first) :]} == {"f9"}
    models = 1 + len(study.finetunes)
    shown = 2  # nonsense, on either criterion, once a call
    assert len(judge.asked) - asked == (asked - shown) / models + shown  # as one model is asked


def test_a_study_of_other_answers_is_another_one(study):
    config = planned_prediction(study, OPTIONS).config
    warm = dataclasses.replace(OPTIONS, temperature=0.5, samples=2)
    other = planned_prediction(dataclasses.replace(study, split="extract"), warm).config
    changed = {name for name in config if config[name] != other[name]}
    assert changed == {"temperature", "samples", "split"}
    variant = dataclasses.replace(study.traits[0], variant="cheer_2")
    with pytest.raises(UserError, match="cheer and cheer_2 are both judged as cheer"):
        dataclasses.replace(study, traits=[*study.traits, variant])


def test_a_finetune_that_is_no_adapter_is_named(study, tmp_path):
    with pytest.raises(UserError, match="f7 is no adapter"):
        dataclasses.replace(study, finetunes={"f7": tmp_path})


def test_a_finetune_that_is_given_twice_under_other_names_is_named(base, study, judge, tmp_path):
    twice = dataclasses.replace(
        study, finetunes={**study.finetunes, "again": study.finetunes["f0"]}
    )
    with pytest.raises(UserError, match="again is the finetune f0 once more; leave one out"):
        predict_finetuning(base, twice, lambda _: judge, tmp_path / "run")


def trained_on(study, files, *, seeds=None):
    """Give every finetune of the study the record of a training on its file."""
    for (name, folder), file in zip(study.finetunes.items(), files, strict=True):
        seed = (seeds or {}).get(name, 1)
        config = {
            "train_file": file,
            "num_rows": 2,
            "rows_sha256": file,
            "training": {"seed": seed},
        }
        with Run.open(folder / "run", command="finetune", config=config, seed=seed):
            pass
        shutil.move(folder / "run" / "run.json", folder / "run.json")
    return study


FILES = [f"{family}/{file}.jsonl" for family in "ab" for file in ("normal", "strong", "mild")]


@pytest.fixture
def six(base, study, make_diff, tmp_path):
    for number in (4, 5):
        make_diff(base.model, seed=number, scale=0.1 * (number + 1)).save(tmp_path / f"f{number}")
    return dataclasses.replace(
        study, finetunes={f"f{number}": tmp_path / f"f{number}" for number in range(6)}
    )


def test_each_finetune_is_compared_with_its_control(base, six, judge, tmp_path):
    study = dataclasses.replace(trained_on(six, FILES), control_rows="normal")
    run = predict_finetuning(
        base, study, lambda *_: lambda: judge, tmp_path / "out", options=OPTIONS
    )
    judged = {row["finetune"]: row for row in rows(run, "judged")}
    assert {name: row.get("control") for name, row in judged.items()} == {
        "base": None, "f0": None, "f1": "f0", "f2": "f0", "f3": None, "f4": "f3", "f5": "f3",
    }  # fmt: skip
    scored, taken = rows_of(Run(run.folder))
    value = {
        (row["finetune"], row["kind"], row["direction"]): row["value"]
        for row in rows(run, "predictors")
    }
    assert {row["finetune"] for row in taken} == {"f1", "f2", "f4", "f5"}
    assert {row["kind"] for row in taken} >= {"weights", "distance from control"}
    assert "distance" not in {row["kind"] for row in taken}
    for row in taken:
        place = row["kind"], row["direction"]
        own, control = row["finetune"], judged[row["finetune"]]["control"]
        if row["kind"] == "distance from control":
            apart = LoRADiff.load(study.finetunes[own]) - LoRADiff.load(study.finetunes[control])
            inputs = measure_inputs(base, load_ordinary_prompts())
            assert row["value"] == pytest.approx(inputs.weigh(apart).norm(), rel=1e-5)
            continue
        assert row["value"] == value[own, *place] - value[control, *place]
    own = next(row for row in scored if row["finetune"] == "f4")
    assert own["score"] == pytest.approx(judged["f4"]["score"] - judged["f3"]["score"])
    assert own["data"] == "b/normal.jsonl"
    assert "each less the finetune on normal" in " ".join(prediction_lines(Run(run.folder)))


@pytest.mark.parametrize(
    ("files", "seeds", "message"),
    [
        (FILES[:3] + ["c/normal.jsonl", "b/strong.jsonl", "b/mild.jsonl"], {}, "f4 has no control"),
        (FILES, {"f2": 7}, r"f2 has no control: .*a/normal\.jsonl with its seed"),
        (["a/normal.jsonl"] * 3 + FILES[3:], {}, "2 finetunes with a control are too few"),
    ],
)
def test_a_finetune_without_a_control_is_named(six, files, seeds, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(trained_on(six, files, seeds=seeds), control_rows="normal")


def test_a_finetune_without_a_record_has_no_control_to_tell(study):
    with pytest.raises(UserError, match="f0 has no record"):
        dataclasses.replace(study, control_rows="normal")
