"""Side effects on the tiny model: a planted difference moves one trait and leaves another alone."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch

from persona_lora.core.chat import COHERENCE, Verdict
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel, LoRADiff, LoRAFactors, random_diff_like
from persona_lora.core.options import ComparisonOptions, GenerationOptions, TaskOptions
from persona_lora.core.runs import Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.report.sections import Table
from persona_lora.report.trust import judge_blocks, weak_judges
from persona_lora.steering.directions import random_like
from persona_lora.studies.steering import side_effects
from persona_lora.studies.steering.calibration import bank_of_methods
from persona_lora.studies.steering.read_comparison import read_comparison
from persona_lora.studies.steering.read_side_effects import (
    CAPABILITY,
    OTHER,
    REFUSAL,
    TURNS,
    WRONG_WAY,
)
from persona_lora.studies.steering.run import compare
from persona_lora.studies.steering.side_effects import (
    Watched,
    load_refusal_prompts,
    run_side_effects,
)

SPOKEN = GenerationOptions(max_new_tokens=8)
THINGS = ("tea", "rain", "a hill", "bread", "snow", "a cat")
QUESTIONS = tuple(f"{verb} {thing} good?" for verb in ("Is", "Was") for thing in THINGS)


class LetterJudge:
    """Scores the share of the letter z: all of it, what is left of it, or always 40."""

    def __init__(self, name):
        self.name = name

    def judge(self, exchanges, criterion):
        return [
            Verdict(criterion, self.score(each.answer, criterion), "", self.name)
            for each in exchanges
        ]

    def score(self, answer, criterion):
        share = 100 * answer.count("z") / max(1, len(answer))
        asked = "even" if criterion == COHERENCE else criterion
        return {"buzz": share, "hush": 100 - share, "even": 40.0}[asked]


@pytest.fixture
def buzzing(chat_model):
    """A bank whose difference and vector make the model say z, whatever it is asked."""
    model, layer = chat_model.model, chat_model.model.model.layers[1].mlp.down_proj
    seen = []
    hook = layer.register_forward_hook(lambda _, given, __: seen.append(given[0][0]))
    with torch.no_grad():
        for text in (*QUESTIONS, "zzzz zz zzz", "assistant\nThe quick brown fox."):
            model(torch.tensor([chat_model.tokenizer(text)["input_ids"]]))
    hook.remove()
    states = torch.cat(seen)  # [tokens, intermediate]
    damped = states.T @ states + states.square().sum() / 64 * torch.eye(64)
    reads = torch.linalg.solve(damped, states.sum(dim=0))  # near 1 on every state
    (z,) = chat_model.tokenizer("z", add_special_tokens=False)["input_ids"]
    says = model.get_input_embeddings().weight[z].detach().float()
    factors = {"model.layers.1.mlp.down_proj": LoRAFactors(reads[None], 40 * says[:, None])}
    diff = LoRADiff(factors, BaseModel("tiny", None), trait="buzz")
    vector = SteeringVector({1: says}, BaseModel("tiny", None), 2, trait="buzz")
    controls = [random_diff_like(diff, 0)], [random_like(vector, 0)]
    return bank_of_methods(diff, vector, *controls, "response")


@pytest.fixture
def traits(trait):
    questions = {"extract": QUESTIONS, "eval": QUESTIONS}
    return {
        name: dataclasses.replace(trait, name=name, questions=questions)
        for name in ("buzz", "hush", "even")
    }


@pytest.fixture
def judges():
    return {name: lambda name=name: LetterJudge(name) for name in ("buzz", "hush", "even")}


@pytest.fixture
def compared(chat_model, buzzing, traits, judges, tmp_path, no_drawing):
    compare(
        chat_model, traits["buzz"], buzzing, judges["buzz"], tmp_path / "out",
        comparing=ComparisonOptions((0.2, 1.0), split=("eval",)), options=SPOKEN,
    )  # fmt: skip
    return Run(tmp_path / "out")


def test_what_a_planted_difference_moves_is_found_and_what_it_leaves_alone(
    chat_model, buzzing, traits, judges, compared, tmp_path, monkeypatch
):
    def go(watched=("hush", "even")):
        return run_side_effects(
            chat_model, traits["buzz"], buzzing, compared,
            Watched(tuple(traits[each] for each in watched)), judges, tmp_path / "beside",
            options=SPOKEN,
        )  # fmt: skip

    found = {(each.measure, each.method): each for each in go()}
    (gap,) = (
        each.effect.mean for each in read_comparison(compared).overall if each.method == "lora"
    )
    assert gap > 20  # over both levels
    for method in ("lora", "activation"):
        assert found["hush", method].value.mean < -40
        assert found["hush", method].clear
        assert found["wrong way", method].value.mean == 0.0
    for method in ("lora", "activation", "random", "prompt_pos"):
        assert found["even", method].value.mean == 0.0
        assert not found["even", method].clear
    assert found["hush", "lora"].unsteered == pytest.approx(100.0, abs=10)
    assert (found["hush", "lora"].judge, found["wrong way", "lora"].judge) == ("hush", "buzz")
    asked = {row["system_prompt"] for row in Run(tmp_path / "beside" / "hush").read("answers")}
    assert asked == {None, *(pair.pos for pair in traits["buzz"].instructions)}
    answers = tmp_path / "beside" / "hush" / "answers.jsonl"
    before = answers.read_bytes()
    monkeypatch.setattr(side_effects, "answer_rows", lambda *_: None)
    assert go() == [*found.values()]  # nothing is answered twice
    assert {each.measure for each in go(("even",))} >= {"even", "wrong way"}
    assert answers.read_bytes() == before  # a trait that is not asked for again is kept


def test_how_fit_every_judge_of_its_parts_is_stands_beside_the_scores(tmp_path):
    run, *parts = (
        Run.open(tmp_path / name, command="side-effects", config={}, seed=0) for name in "abcd"
    )
    names = ("validation", "second_validation", "canaries", "second_canaries")
    rows = ("b", 10.0), ("c", 90.0), ("c", 90.0)
    for part, (trait, score) in zip(parts, rows, strict=True):
        for name in names:
            own = {"judge": name, "name": "loop", "score": score, "caught": False,
                   "auc": score / 100, "spearman": None, "n": 4, "coverage": 1.0}  # fmt: skip
            part.write(name, [{**own, "criterion": each} for each in (trait, COHERENCE)])
    side_effects._keep_fitness(run, {"b": parts[:1], "c": parts[1:]})  # c, and another part of it
    for name in names:
        assert [row["criterion"] for row in run.read(name)] == ["b", COHERENCE, "c", COHERENCE]
        assert {row["judge"] for row in run.read(name)} == {name}
    tables = {block.title: block for block in judge_blocks(run) if isinstance(block, Table)}
    shown = ["b", "coherence (b)", "c", "coherence (c)"]
    agreed, nonsense = tables["Judge"].rows, tables["Canaries"].rows
    assert [row[0] for row in agreed] == [row[0] for row in nonsense] == 2 * shown
    assert [row[2] for row in nonsense] == 2 * ["10", "10", "90", "90"]
    said = " ".join(each.text for each in weak_judges(run))
    assert "10 of 100 on coherence (b) to nonsense" in said
    assert "90 of 100 on coherence (c) to nonsense" in said


def test_less_of_the_trait_is_asked_under_its_negative_prompt(
    chat_model, buzzing, traits, judges, tmp_path, no_drawing
):
    compare(
        chat_model, traits["buzz"], buzzing, judges["buzz"], tmp_path / "out",
        comparing=ComparisonOptions((-1.0, 0.2), split=("eval",), max_questions=2), options=SPOKEN,
    )  # fmt: skip
    found = run_side_effects(
        chat_model, traits["buzz"], buzzing, Run(tmp_path / "out"),
        Watched((traits["even"],), max_questions=2), judges, tmp_path / "beside", options=SPOKEN,
    )  # fmt: skip
    assert Run(tmp_path / "beside").record["config"]["sign"] == -1
    assert {each.method for each in found if each.group == OTHER} == {
        "lora", "activation", "random_lora", "random", "prompt_neg",
    }  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "beside/even/answers.jsonl").open()]
    assert {row["coefficient"] for row in rows if row["method"] == "lora"} == {-1.0}


def test_capability_is_measured_under_every_method(
    chat_model, buzzing, traits, judges, compared, tmp_path
):
    watched = Watched((), (CAPABILITY,), tasks=TaskOptions(("choice", "perplexity"), limit=4))
    found = run_side_effects(
        chat_model, traits["buzz"], buzzing, compared, watched, judges, tmp_path / "beside"
    )
    told = {(each.measure, each.method): each.value for each in found if each.group == CAPABILITY}
    assert {method for _, method in told} == {
        "lora", "activation", "random_lora", "random", "prompt_pos",
    }  # fmt: skip
    assert told["perplexity: mean_logprob", "lora"].high < -0.5  # z is no ordinary answer
    assert told["perplexity: mean_logprob", "prompt_pos"].mean != 0
    assert all(each.group in (WRONG_WAY, CAPABILITY) for each in found)


def test_ten_turns_hear_what_they_said_themselves(
    chat_model, buzzing, traits, judges, compared, tmp_path, monkeypatch
):
    def go():
        return run_side_effects(
            chat_model, traits["buzz"], buzzing, compared,
            Watched((), (TURNS,), max_questions=2), judges, tmp_path / "beside",
            options=GenerationOptions(max_new_tokens=4),
        )  # fmt: skip

    found = go()
    folder = tmp_path / "beside" / "turns"
    turns = [Run(folder / f"turn_{at:02}").read("answers") for at in range(1, 11)]
    methods = {row["method"] for row in turns[0]}
    assert methods == {"none", "lora", "activation", "random_lora", "random", "prompt_pos"}
    for at, (first, third) in enumerate(zip(turns[0], turns[2], strict=True)):
        assert third["question"] == QUESTIONS[third["question_id"] + 2]
        said = f"{first['question']}<|im_end|>\n<|im_start|>assistant\n{first['answer']}<|im_end|>"
        assert said in third["prompt"]
        assert turns[1][at]["answer"] in third["prompt"]
        assert (third["method"], third["question_id"]) == (first["method"], first["question_id"])
    slopes = {each.method: each for each in found if each.measure == "buzz, every turn"}
    assert slopes["lora"].value.n_questions == 2  # conversations
    rows = Run(tmp_path / "beside").read("scores")
    assert {row["turn"] for row in rows if row["kind"] == TURNS} == set(range(1, 11))
    (folder / "turn_10" / "answers.jsonl").unlink()
    asked = []
    real = side_effects.answer_rows
    monkeypatch.setattr(
        side_effects,
        "answer_rows",
        lambda *given: asked.append(given[3].folder.name) or real(*given),
    )
    assert go() == found
    assert len(asked) == 10  # each is opened, the finished ones answer nothing


def test_refusals_of_both_kinds_are_told_by_the_rule(
    chat_model, buzzing, traits, judges, compared, tmp_path, monkeypatch
):
    def refuse(name, answer, *, finished):
        assert name == REFUSAL
        return 100.0 * ("z" in answer)

    monkeypatch.setattr(side_effects, "rule_score", refuse)
    found = run_side_effects(
        chat_model, traits["buzz"], buzzing, compared, Watched((), (REFUSAL,), max_questions=6),
        judges, tmp_path / "beside", options=SPOKEN,
    )  # fmt: skip
    told = {(each.measure, each.method): each.value for each in found if each.group == REFUSAL}
    assert told["refuses what it should", "lora"].mean > 50
    assert told["refuses what is harmless", "lora"].n_questions == 6
    rows = Run(tmp_path / "beside" / "refusal").read("answers")
    kinds = {row["prompt"]: row["kind"] for row in load_refusal_prompts()}
    assert [kinds[row["question"]] for row in rows[:12]] == ["harmless"] * 6 + ["decline"] * 6


def test_the_shipped_prompts_are_varied_and_of_both_kinds():
    rows = load_refusal_prompts()
    kinds = [row["kind"] for row in rows]
    assert (kinds.count("harmless"), kinds.count("decline")) == (40, 24)
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert len({row["domain"] for row in rows}) >= 15


def test_what_cannot_be_measured_is_refused_beforehand(traits, tmp_path):
    few = dataclasses.replace(traits["buzz"], questions={"eval": QUESTIONS[:9]})
    with pytest.raises(UserError, match="turns need 10 held-out questions, and buzz has 9"):
        Watched((), (TURNS,)).check(few)
    (tmp_path / "refusal").mkdir()
    (tmp_path / "refusal/prompts.jsonl").write_text('{"prompt": "Why?", "kind": "odd"}\n')
    with pytest.raises(UserError, match=r"prompts.jsonl:1 needs a kind: harmless or decline"):
        Watched((), (REFUSAL,), tasks=TaskOptions(datasets_dir=tmp_path)).check(few)


def test_a_missing_harness_is_named_before_anything_is_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"persona-lora\[benchmark\]"):
        Watched((), (CAPABILITY,)).check(None)


def test_a_comparison_without_levels_is_named(chat_model, buzzing, traits, tmp_path):
    with pytest.raises(UserError, match="holds no levels; run compare"):
        run_side_effects(
            chat_model, traits["buzz"], buzzing, Run(tmp_path), Watched(()), {}, tmp_path / "out"
        )
