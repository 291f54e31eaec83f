"""Capability through the evaluation harness, on the tiny model; pairing, resume and faults."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml

from persona_lora.core.errors import UserError
from persona_lora.core.options import TaskOptions
from persona_lora.models.loading import ChatModel
from persona_lora.report.comparisons import score_items
from persona_lora.steering.weights import LoRASteerer
from persona_lora.studies.asking import capability
from persona_lora.studies.asking.capability import run_benchmarks
from tests.models.architectures import tiny_model

ROOT = Path(__file__).resolve().parents[3]
CAPABILITY = ROOT / "datasets" / "capability"


@pytest.fixture
def conditions(chat_model, make_diff):
    diff = make_diff(chat_model.model, scale=0.5)
    return {"plain": nullcontext(), "changed": LoRASteerer(chat_model.model, diff, 1.0)}


def dense_choice(chat_model, item):
    """The harness's acc_norm by hand: the choice whose text is likeliest a byte."""
    prompt = f"Question: {item['question']}\nAnswer:"
    scores = []
    for choice in item["choices"]:
        start = len(chat_model.tokenizer(prompt)["input_ids"])
        ids = torch.tensor([chat_model.tokenizer(f"{prompt} {choice}")["input_ids"]])
        with torch.no_grad():
            logp = chat_model.model(ids).logits.log_softmax(-1)[0, :-1]
        picked = logp.gather(1, ids[0, 1:, None])[start - 1 :]
        scores.append(float(picked.sum()) / len(choice))
    return float(scores.index(max(scores)) == item["answer"])


def test_choices_are_scored_as_by_hand_and_paired_by_item(chat_model, conditions, tmp_path):
    scores = run_benchmarks(
        chat_model, conditions, TaskOptions(("choice",), limit=10), tmp_path / "run"
    )
    items = [json.loads(line) for line in (CAPABILITY / "multiple_choice.jsonl").open()][:10]
    expected = [dense_choice(chat_model, item) for item in items]
    rows = [json.loads(line) for line in (tmp_path / "run" / "items.jsonl").open()]
    plain = {
        row["item"]: row["score"]
        for row in rows
        if row["condition"] == "plain" and row["metric"] == "acc_norm"
    }
    assert [plain[at] for at in range(10)] == expected
    (changed,) = (s for s in scores if s.condition == "changed" and s.metric == "acc_norm")
    assert changed.difference.n == 10
    assert (tmp_path / "run" / "scores.csv").is_file()


def test_rows_that_are_no_chat_are_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "cheer").mkdir()
    (tmp_path / "cheer" / "normal.jsonl").write_text('{"conversations": []}\n')
    with pytest.raises(UserError, match=r"normal\.jsonl:1 has no 'messages'"):
        capability.check_tasks(TaskOptions(("perplexity",), datasets_dir=tmp_path))


def test_steps_are_generated_and_perplexity_is_measured(chat_model, conditions, tmp_path):
    datasets = tmp_path / "datasets"
    (datasets / "cheer").mkdir(parents=True)
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes, hello."}]
    (datasets / "cheer" / "normal.jsonl").write_text(3 * (json.dumps({"messages": turns}) + "\n"))
    scores = run_benchmarks(
        chat_model,
        conditions,
        TaskOptions(("steps", "perplexity"), CAPABILITY, 2, datasets_dir=datasets),
        tmp_path / "run",
    )
    found = {(each.condition, each.task): each.score for each in scores}
    assert found["plain", "steps"].mean == 0.0  # random weights add nothing up
    assert found["plain", "perplexity"].mean != found["changed", "perplexity"].mean
    assert found["plain", "steps"].n == found["plain", "perplexity"].n == 2  # the limit


def test_a_task_with_two_filters_has_the_scores_that_the_harness_says(
    chat_model, tmp_path, monkeypatch
):
    """The answers are canned: a half holds the number, a third of these with the strict words."""
    simple_evaluate, HFLM = capability.harness()
    said = {}

    class Canned(HFLM):
        def generate_until(self, requests, *args, **kwargs):
            numbers = [request.doc["answer"] for request in requests]
            strict = [f"The answer is {number}." for number in numbers]
            return [
                strict[at] if at % 6 == 0 else f"{numbers[at]} it is" if at % 2 == 0 else "no"
                for at in range(len(numbers))
            ]

    def evaluate(**options):
        found = simple_evaluate(**options)
        said.update(found["results"]["steps"])
        return found

    monkeypatch.setattr(capability, "harness", lambda: (evaluate, Canned))
    task = yaml.safe_load((CAPABILITY / "steps.yaml").read_text())
    patterns = {"strict": r"The answer is (\-?[0-9]+)", "flexible": r"(\-?[0-9]+)"}
    task["filter_list"] = [
        {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern},
                                  {"function": "take_first"}]}
        for name, pattern in patterns.items()
    ]  # fmt: skip
    (tmp_path / "steps.yaml").write_text(yaml.safe_dump(task))
    shutil.copy(CAPABILITY / "steps.jsonl", tmp_path)
    options = TaskOptions(("steps",), tmp_path, 12)
    scores = run_benchmarks(chat_model, {"base": nullcontext()}, options, tmp_path / "run")
    found = {each.metric: (each.score.mean, each.score.n) for each in scores}
    names = [f"exact_match,{name}" for name in patterns]
    assert found == {name: (pytest.approx(said[name]), 12) for name in names}
    assert [found[name][0] for name in names] == pytest.approx([1 / 6, 1 / 2])


def test_a_finished_condition_is_not_run_again(chat_model, conditions, tmp_path):
    first = run_benchmarks(
        chat_model, conditions, TaskOptions(("choice",), limit=4), tmp_path / "run"
    )

    class Refused(nullcontext):
        def __enter__(self):
            pytest.fail("it was run again")

    again = {name: Refused() for name in conditions}
    assert (
        run_benchmarks(chat_model, again, TaskOptions(("choice",), limit=4), tmp_path / "run")
        == first
    )


def test_unknown_tasks_are_named(chat_model, conditions, tmp_path):
    with pytest.raises(UserError, match="'chioce'"):
        run_benchmarks(chat_model, conditions, TaskOptions(("chioce",)), tmp_path / "run")


def test_items_are_paired_and_corrected():
    rows = [
        {"condition": name, "task": "t", "metric": "acc", "item": at, "score": score}
        for name, scores in (("plain", [1, 1, 0, 1]), ("changed", [0, 0, 0, 1]))
        for at, score in enumerate(scores)
    ]
    plain, changed = score_items(rows, "plain")
    assert plain.difference is None
    assert changed.difference.mean == -0.5
    assert changed.p == 0.5


# -- the shipped sets ---------------------------------------------------------------------------


def test_the_choice_set_is_balanced_and_without_repeats():
    items = [json.loads(line) for line in (CAPABILITY / "multiple_choice.jsonl").open()]
    assert len(items) >= 150
    keys = [item["answer"] for item in items]
    assert [keys.count(key) for key in range(4)] == [len(items) / 4] * 4
    assert len({item["question"] for item in items}) == len(items)
    assert all(len(set(item["choices"])) == 4 for item in items)
    assert len({item["subject"] for item in items}) >= 5


def test_the_steps_end_with_their_answer():
    items = [json.loads(line) for line in (CAPABILITY / "steps.jsonl").open()]
    assert len(items) >= 50
    for item in items:
        assert item["steps"].endswith(f"The answer is {item['answer']}."), item["id"]
    shown = yaml.safe_load((CAPABILITY / "steps.yaml").read_text())["doc_to_text"]
    assert not any(item["question"] in shown for item in items)


@pytest.mark.parametrize(("family", "window"), [("Phi-3 longrope", 128), ("Phi-3", None)])
def test_the_harness_cuts_the_texts_of_a_longrope_model(
    tokenizer, tmp_path, monkeypatch, family, window
):
    asked = []
    monkeypatch.setattr(
        capability,
        "harness",
        lambda: (lambda **_: {"samples": {}}, lambda **given: asked.append(given["max_length"])),
    )
    chat_model = ChatModel(tiny_model(family), tokenizer, "tiny")
    capability._harness_items(chat_model, ["choice"], TaskOptions(("choice",)), None)
    assert asked == [window]
