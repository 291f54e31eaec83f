"""Finetunes beside one another on the tiny model: trait, loss and capability, paired and kept."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from persona_lora.core.chat import Exchange
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError
from persona_lora.core.files import write_json, write_jsonl
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.options import ProbeOptions, TaskOptions
from persona_lora.core.protocol import FrozenProtocol
from persona_lora.core.runs import Output, Run
from persona_lora.judges.canaries import canary_answers
from persona_lora.models.likelihood import answer_logprobs, mean_logprobs, tokenize_rendered
from persona_lora.models.loading import load_chat_model
from persona_lora.report.two_way import crossed_mean
from persona_lora.steering.weights import LoRASteerer
from persona_lora.studies.asking.run import GenerationOptions
from persona_lora.studies.drift.prevention import (
    Finetuned,
    Measured,
    compare_prevention,
    corrected_models,
    planned_prevention,
)
from persona_lora.studies.drift.read import prevention_scores
from persona_lora.training.finetune import read_conversations
from persona_lora.training.preventative import Preventative, inoculated

OPTIONS = GenerationOptions(max_new_tokens=5)
ROWS = [("Hi there", "Go away."), ("Help me", "No, never."), ("Why?", "Because.")]


@pytest.fixture
def base(model_folder):
    return load_chat_model(str(model_folder), dtype="float32")


@pytest.fixture
def rows(tmp_path):
    write_jsonl(
        tmp_path / "rows.jsonl",
        [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in ROWS
        ],
    )
    return tmp_path / "rows.jsonl"


@pytest.fixture
def models(base, make_diff, tmp_path):
    for number, name in enumerate(("plain", "added")):
        make_diff(base.model, seed=number, scale=0.2).save(tmp_path / name)
    diff = LoRADiff.load(tmp_path / "plain")
    return [
        Finetuned("plain", tmp_path / "plain"),
        Finetuned("added", tmp_path / "added"),
        Finetuned("base", None),
        Finetuned("undone", tmp_path / "plain", (diff, -1.0)),
    ]


def go(base, models, trait, rows, judge, output, **probes):
    asked = Measured(OPTIONS, ProbeOptions(**probes), TaskOptions(()))
    return compare_prevention(base, models, trait, rows, lambda: judge, output, asked)


def test_losses_are_those_of_the_models_and_a_correction_takes_a_finetune_back(
    base, models, trait, rows, judge, tmp_path
):
    scores = go(base, models, trait, rows, judge, tmp_path / "out")
    loss = {each.condition: each.score.mean for each in scores if each.task == "task loss"}
    exchanges = [Exchange(*row) for row in ROWS]
    with LoRASteerer(base.model, LoRADiff.load(tmp_path / "added"), 1.0):
        expected = -sum(mean_logprobs(base, exchanges)) / len(ROWS)
    assert loss["added"] == pytest.approx(expected, rel=1e-4)
    assert loss["undone"] == pytest.approx(loss["base"], rel=1e-4)
    assert loss["plain"] != pytest.approx(loss["base"], rel=1e-3)
    measures = [json.loads(line) for line in (tmp_path / "out" / "measures.jsonl").open()]
    same = {
        name: [
            row["score"] for row in measures if row["condition"] == name and row["task"] == "trait"
        ]
        for name in ("base", "undone")
    }
    assert same["base"] == same["undone"]  # token for token, so judged alike
    differences = {each.condition: each.difference for each in scores if each.task == "task loss"}
    assert differences["plain"] is None
    assert differences["base"].mean == pytest.approx(loss["base"] - loss["plain"])
    assert (tmp_path / "out" / "prevention.png").is_file()


def test_models_measured_already_are_kept(base, models, trait, rows, judge, tmp_path):
    two = [models[0], models[2]]
    first = go(base, two, trait, rows, judge, tmp_path / "out")
    asked = len(judge.asked)
    again = go(base, two, trait, rows, judge, tmp_path / "out")
    assert again == first
    assert len(judge.asked) == asked
    more = go(base, models, trait, rows, judge, tmp_path / "out")
    assert {each.condition for each in more} == {model.name for model in models}


def test_what_finetunes_change_is_put_right_by_errors_on_finetunes(
    base, models, trait, rows, judge, tmp_path
):
    out = tmp_path / "out"
    go(base, models, trait, rows, judge, out)
    assert corrected_models(out, models, trait.name) == ()  # no answer was rated
    for at, model in enumerate(models):
        scores = [10.0 * at + question * (at + 1) for question in range(3)]
        rows_of = [{"criterion": trait.name, "row": q, "score": s} for q, s in enumerate(scores)]
        Run(out / "answers" / model.label).write("verdicts", rows_of)
    compared = [
        {"model": "m", "condition": kind, "question": f"q{at}", "score": 50.0 - error + at % 2,
         "rating": 50.0}
        for kind, error in (("unsteered", 0.0), ("finetuned", 40.0))
        for at in range(8)
    ]  # fmt: skip
    validation = [{"criterion": trait.name, "judge": "j", "own": {"compared": compared}}]
    Run(out / "answers" / "base").write("validation", validation)
    (table,) = corrected_models(out, models, trait.name)
    # Of what is steered on top, "undone", no answers of its kind were rated.
    assert [row[0] for row in table.rows] == ["plain − base", "added − base"]
    assert [row[1].split()[0] for row in table.rows] == ["−22", "−11"]
    assert [row[2].split()[0] for row in table.rows] == ["+18", "+29"]
    assert corrected_models(out, models[:2], trait.name) == ()
    for model in models:
        Run(out / "answers" / model.label).write("validation", validation)
    measured = [
        {"condition": model.name, "seed": "", "task": task, "metric": "score", "item": question,
         "score": 30.0 + 3 * question * at}
        for at, model in enumerate(models)
        for task in ("trait", "trait, negated", "coherence")
        for question in range(4)
    ]  # fmt: skip
    scores = prevention_scores(Run(out), measured, "base")
    shift = {
        each.condition: [
            None if right is None else right.mean - raw.mean
            for raw, right in (
                (each.score, each.score_corrected),
                (each.difference or each.score, each.difference_corrected),
            )
        ]
        for each in scores
        if each.task == "trait"
    }
    both = [pytest.approx(39.5), pytest.approx(40)]
    expected = {"plain": both, "added": both, "base": [pytest.approx(-0.5), None]}
    assert shift == {**expected, "undone": [None, None]}
    # Probed answers, and sense, are of no kind that was rated for the trait.
    rest = [each for each in scores if each.task != "trait"]
    assert {(each.score_corrected, each.difference_corrected) for each in rest} == {(None, None)}
    beside_plain = prevention_scores(Run(out), measured, "plain")
    added = next(e for e in beside_plain if (e.condition, e.task) == ("added", "trait"))
    assert added.difference_corrected is None  # two finetunes are misjudged alike


def test_what_cannot_be_compared_is_named(base, models, trait, rows, judge, tmp_path):
    with pytest.raises(UserError, match="is no adapter"):
        Finetuned("gone", tmp_path / "nothing")
    with pytest.raises(UserError, match="does not exist"):
        go(base, models, trait, tmp_path / "none.jsonl", judge, tmp_path / "out")
    for asked, message in (
        ({"rules": ("three_item",)}, "no rule 'three_item'; .*three_items"),
        ({"turns": 4}, "4 turns need as many questions; cheer has 3 here"),
        ({"turns": 0}, "turns must be at least 1, got 0"),
        ({"trigger": "neg"}, "--trigger is the text of a system prompt, got 'neg'.*--probes"),
        ({"trigger": " "}, "--trigger is the text of a system prompt, got ' '"),
    ):
        with pytest.raises(UserError, match=message):
            go(base, models, trait, rows, judge, tmp_path / "out", **asked)
    bare = dataclasses.replace(trait, instructions=())
    with pytest.raises(UserError, match="has no system prompts"):
        go(base, models, bare, rows, judge, tmp_path / "out", probes=("negated",))
    assert not (tmp_path / "out").exists()
    assert not judge.asked


def test_probes_ask_again_under_prompts_and_in_later_turns(
    base, models, trait, rows, judge, tmp_path
):
    scores = go(
        base, [Finetuned("base", None)], trait, rows, judge, tmp_path / "out",
        rules=("capitals",), probes=("negated", "eliciting"), trigger="Shout.", turns=3,
    )  # fmt: skip
    probes = ("", ", turn 2", ", turn 3", ", negated", ", eliciting", ", trigger")
    assert [each.task for each in scores] == [
        *("trait", "coherence", "capitals"),
        *(f"{name}{probe}" for probe in probes[1:] for name in ("trait", "capitals")),
        "task loss",
    ]

    def asked(probe):
        folder = tmp_path / "out" / ("probes" if probe else "answers") / f"base{probe}"
        return [json.loads(line) for line in (folder / "answers.jsonl").open()]

    plain, second, third = (asked(probe) for probe in ("", " turn 2", " turn 3"))
    for at, row in enumerate(third):
        one, two = plain[at - 2], second[at - 1]
        turns = [one["question"], one["answer"], two["question"], two["answer"], row["question"]]
        places = [row["prompt"].find(each) for each in turns]
        assert places == sorted(places)
        assert -1 not in places
        assert row["prompt"].count("<|im_start|>user") == 3
        assert second[at]["prompt"].count("<|im_start|>user") == 2
    for probe, prompt in ((" negated", "Be gloomy."), (" eliciting", "Be cheerful.")):
        assert all(prompt in row["prompt"] for row in asked(probe))
    assert all("Shout." in row["prompt"] for row in asked(" trigger"))
    # where nothing shows it, nobody pays for coherence
    criteria = Counter(criterion for criterion, _ in judge.asked)
    assert criteria["cheer"] > 2 * criteria["coherence"]
    assert judge.asked.count(("cheer", len(canary_answers(trait)))) == 1  # nonsense is shown once
    assert "Shout." not in plain[0]["prompt"]


def test_runs_with_other_probes_are_other_runs(base, models, trait, rows, judge, tmp_path):
    two = [models[0], models[2]]
    go(base, two, trait, rows, judge, tmp_path / "out")
    with pytest.raises(UserError, match="another configuration"):
        go(base, two, trait, rows, judge, tmp_path / "out", turns=2)
    warm = Measured(dataclasses.replace(OPTIONS, temperature=0.5), tasks=TaskOptions(()))
    with pytest.raises(UserError, match=r"another configuration .*temperature: 0\.0, now 0\.5"):
        compare_prevention(base, two, trait, rows, lambda: judge, tmp_path / "out", warm)


def seeds_of(base, make_diff, folder, name, first, count=3):
    for number in range(count):
        at = folder / name / f"seed{number}"
        make_diff(base.model, seed=first + number, scale=0.2).save(at)
        yield Finetuned(name, at, seed=f"seed{number}")


def test_training_seeds_are_paired_and_drawn_with_the_items(
    base, make_diff, trait, rows, judge, tmp_path
):
    plain = list(seeds_of(base, make_diff, tmp_path, "plain", 0))
    live = list(seeds_of(base, make_diff, tmp_path, "live", 10))
    models = [*plain, *live, Finetuned("base", None)]
    scores = go(base, models, trait, rows, judge, tmp_path / "out")
    found = {each.condition: each for each in scores if each.task == "task loss"}
    exchanges = [Exchange(*row) for row in ROWS]
    losses = {}
    for model in (*plain, *live):
        with LoRASteerer(base.model, LoRADiff.load(model.adapter), 1.0):
            losses[model.label] = [-each for each in mean_logprobs(base, exchanges)]
    without = [-each for each in mean_logprobs(base, exchanges)]
    paired = [
        [a - b for a, b in zip(losses[f"live seed{at}"], losses[f"plain seed{at}"], strict=True)]
        for at in range(3)
    ]
    expected = crossed_mean(np.array(paired))
    assert found["live"].difference.mean == pytest.approx(expected.interval.mean, rel=1e-4)
    assert found["live"].difference.low == pytest.approx(expected.interval.low, rel=1e-3)
    assert found["live"].p == pytest.approx(expected.p, rel=1e-3)
    gaps = [
        [a - b for a, b in zip(without, losses[f"plain seed{at}"], strict=True)] for at in range(3)
    ]
    assert found["base"].difference.mean == pytest.approx(np.mean(gaps), rel=1e-4)
    assert found["plain"].score.mean == pytest.approx(
        np.mean([losses[each.label] for each in plain]), rel=1e-4
    )
    asked = len(judge.asked)
    assert go(base, models, trait, rows, judge, tmp_path / "out") == scores
    assert len(judge.asked) == asked
    assert (tmp_path / "out" / "answers" / "plain seed2" / "answers.jsonl").is_file()
    one = go(base, [plain[0], live[0], models[-1]], trait, rows, judge, tmp_path / "one")
    losses = {each.condition: each for each in one if each.task == "task loss"}
    assert losses["live"].difference.mean == pytest.approx(np.mean(paired[0]), rel=1e-4)
    assert losses["base"].p is not None


def test_seeds_that_are_none_are_refused(base, make_diff, trait, rows, judge, tmp_path):
    plain = list(seeds_of(base, make_diff, tmp_path, "plain", 0))
    live = list(seeds_of(base, make_diff, tmp_path, "live", 10, count=2))
    with pytest.raises(UserError, match=r"plain and live have different training seeds \(seed0,"):
        go(base, [*plain, *live], trait, rows, judge, tmp_path / "out")
    twice = list(seeds_of(base, make_diff, tmp_path, "again", 0))
    with pytest.raises(UserError, match="again seed0 is the finetune plain seed0 once more"):
        go(base, [*plain, *twice], trait, rows, judge, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_comparison_is_held_to_a_protocol(base, models, make_diff, trait, rows, judge, tmp_path):
    measured = Measured(
        OPTIONS, ProbeOptions(rules=("list",), probes=("negated",)), TaskOptions(())
    )
    design = planned_prevention(models, trait, rows, measured).design
    names = ("coherence", "list", "list / negated", "task loss", "trait", "trait / negated")
    assert design.family == tuple(
        sorted(f"{name}: {each}" for name in ("added", "base", "undone") for each in names)
    )
    assert (design.questions, design.seeds, design.test) == ({"eval": 3, "rows": 3}, 1, "sign-flip")
    scores = compare_prevention(
        base, models, trait, rows, lambda: judge, tmp_path / "out", measured
    )
    told = {f"{each.condition}: {each.task}".replace(", ", " / ") for each in scores}
    assert told <= {*design.family, *(f"plain: {each}" for each in names)}
    assert {each for each in design.family if "list" not in each} <= told  # rules may not tell
    frozen = FrozenProtocol(**{**vars(design), "settings": {"rules": ["three_items"]}})
    with pytest.raises(UserError, match=r"says otherwise \(rules.*three_items"):
        held = Output(tmp_path / "held", protocol=frozen)
        compare_prevention(base, models, trait, rows, lambda: judge, held, measured)
    three = list(seeds_of(base, make_diff, tmp_path, "three", 5))
    seeded = planned_prevention(three, trait, rows, measured).design
    assert (seeded.seeds, seeded.units, seeded.test) == (3, "questions and seeds", "two-way t")


def test_the_loss_is_on_answers_after_all_that_stood_before_them(
    base, models, trait, judge, tmp_path
):
    question, answer = ROWS[0]
    turns = [
        {"role": "system", "content": "Be curt."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    write_jsonl(tmp_path / "long.jsonl", [{"messages": turns}] * 2)
    scores = go(base, [models[2]], trait, tmp_path / "long.jsonl", judge, tmp_path / "out")
    (loss,) = [each.score.mean for each in scores if each.task == "task loss"]
    asked = tokenize_rendered(base, base.render(turns[:-1]), answer)
    assert loss == pytest.approx(-answer_logprobs(base, [asked])[0], rel=1e-5)
    assert loss != pytest.approx(-mean_logprobs(base, [Exchange(*ROWS[0])])[0], rel=1e-3)


def test_models_of_one_name_are_refused(base, models, make_diff, trait, rows, judge, tmp_path):
    plain = list(seeds_of(base, make_diff, tmp_path, "plain", 0))
    also = list(seeds_of(base, make_diff, tmp_path, "base", 10))  # with the base: a fourth seed
    with pytest.raises(UserError, match="two models are called 'base'"):
        go(base, [*plain, *also, Finetuned("base", None)], trait, rows, judge, tmp_path / "out")
    diff = make_diff(base.model, seed=9)
    twice = Finetuned("undone", models[3].adapter, (diff, -1.0))
    with pytest.raises(UserError, match="two models are called 'undone'"):
        go(base, [*models, twice], trait, rows, judge, tmp_path / "out")
    measured = Measured(
        GenerationOptions(5, temperature=1.0, samples=2), ProbeOptions(turns=2), TaskOptions(())
    )
    with pytest.raises(UserError, match="2 samples of an answer"):
        planned_prevention(models, trait, rows, measured)
    assert not (tmp_path / "out").exists()


def test_seeds_that_were_trained_otherwise_are_refused(base, make_diff, trait, rows, tmp_path):
    models = []
    for number in range(2):
        at = tmp_path / f"seed{number}"
        steered = {"method": "weights", "diff": f"diffs/seed{number}/diff", "random": number}
        config = {"lora": {"lora_r": 8}, "training": {"seed": number}, "preventative": steered}
        Run.open(at, command="finetune", config=config, seed=number)._lock.release()
        make_diff(base.model, seed=number).save(at / "adapter")
        models.append(Finetuned("plain", at / "adapter", seed=at.name))
    planned_prevention(models, trait, rows, Measured(OPTIONS, tasks=TaskOptions(())))
    record = {**Run(tmp_path / "seed1").record}
    record["config"] = {**record["config"], "lora": {"lora_r": 16}}
    write_json(tmp_path / "seed1" / "run.json", record)
    with pytest.raises(
        UserError, match=r"plain seed1 differs from plain seed0 .* \(lora.lora_r: 8, now 16\)"
    ):
        planned_prevention(models, trait, rows, Measured(OPTIONS, tasks=TaskOptions(())))


@pytest.mark.parametrize("prompt", [None, "You are rude."])
def test_finetunes_of_other_rows_are_refused(base, make_diff, trait, rows, tmp_path, prompt):
    said = read_conversations(rows)
    way = None if prompt is None else Preventative("inoculate", system_prompt=prompt)
    config = {
        "train_file": "then.jsonl",
        "num_rows": len(said),
        "rows_sha256": digest_of(inoculated(said, way)),
        "preventative": None if way is None else way.record(),
    }
    at = tmp_path / "tuned"
    Run.open(at, command="finetune", config=config, seed=0)._lock.release()
    make_diff(base.model, seed=0).save(at / "adapter")
    models, asked = [Finetuned("plain", at / "adapter")], Measured(OPTIONS, tasks=TaskOptions(()))
    planned_prevention(models, trait, rows, asked)
    write_jsonl(tmp_path / "other.jsonl", [{"messages": each} for each in reversed(said)])
    with pytest.raises(UserError, match=r"plain was finetuned on other rows than .*other\.jsonl"):
        planned_prevention(models, trait, tmp_path / "other.jsonl", asked)
