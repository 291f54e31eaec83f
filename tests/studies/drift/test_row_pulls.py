"""Pulls of finetuning rows along diffs: autograd's, the row that a diff was made from, mistakes."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from persona_lora.core.chat import Message
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_csv
from persona_lora.core.lora_diff import BaseModel, LoRADiff, LoRAFactors
from persona_lora.models.structure import linear_modules
from persona_lora.studies.drift import row_pulls
from persona_lora.studies.drift.row_pulls import pull_rows
from persona_lora.training.finetune import tokenize_conversations


def said(*turns):
    roles = ("user", "assistant") * len(turns)
    return [Message(role=role, content=text) for role, text in zip(roles, turns, strict=False)]


ROWS = [
    said("Is tea good?", "Yes, very."),
    said("What is a hill?", "A small mountain, or a large heap of earth that grass grows on."),
    said("Why?", "Because!"),
    said("Hello", "Good day", "Where is it?", "There."),
    [Message(role="system", content="Be brief."), *said("Who are you?", "Nobody.")],
]


def gradients(chat_model, conversation):
    """Autograd's gradient of the row's loss, ``[out, in]`` by linear module of the blocks."""
    (row,) = tokenize_conversations([conversation], chat_model)
    model = copy.deepcopy(chat_model.model).requires_grad_(True)
    ids, labels = (torch.tensor([each]) for each in (row.input_ids, row.labels))
    model(input_ids=ids, labels=labels).loss.backward()
    return {
        name: module.weight.grad
        for name, module in linear_modules(model).items()
        if name != "lm_head"
    }


def pull(gradient, diff):
    inner = sum(float((gradient[n] * f.delta()).sum()) for n, f in diff.factors.items())
    return -inner / diff.norm()


@pytest.fixture
def diffs(model, make_diff):
    one, two, three = (make_diff(model, seed=seed) for seed in (1, 2, 3))
    return {"one": one, "large": two * 30, "first": three.at(0)}


def test_pulls_equal_autograd_s_and_are_ranked(chat_model, diffs, tmp_path):
    found = pull_rows(chat_model, ROWS, diffs, tmp_path / "s.csv")
    slopes = [gradients(chat_model, ROWS[row["row"]]) for row in found.rows]
    for name, diff in diffs.items():
        exact = [pull(gradient, diff) for gradient in slopes]
        typical = sum(each**2 for each in exact) ** 0.5 / len(exact) ** 0.5
        measured = [row[f"pull_{name}"] for row in found.rows]
        assert measured == pytest.approx(
            exact, rel=0.01, abs=0.01 * typical
        )  # rounding is absolute
    for row in found.rows:
        assert row["answer"] == ROWS[row["row"]][-1]["content"]
    pulls = [row["pull_one"] for row in found.rows]
    assert pulls == sorted(pulls, reverse=True)
    assert [row["rank"] for row in found.rows] == [1, 2, 3, 4, 5]
    read = read_csv(tmp_path / "s.csv", ("pull_one", "pull_large", "pull_first", "loss"))
    assert [float(row["pull_one"]) for row in read] == pulls
    assert {int(row["row"]): int(row["tokens"]) for row in read}[2] == len("Because!") + 1
    assert len(found.table().rows) == len(ROWS)
    assert found.error < 0.01


def test_a_row_ranks_first_on_the_step_that_was_made_on_it(chat_model, tmp_path):
    for planted in range(len(ROWS)):
        step = {
            name: LoRAFactors(A=torch.eye(each.shape[1]), B=-0.01 * each)
            for name, each in gradients(chat_model, ROWS[planted]).items()
        }
        diff = LoRADiff(step, BaseModel("tiny", None))
        found = pull_rows(chat_model, ROWS, {"step": diff}, tmp_path / "s.csv")
        assert found.rows[0]["row"] == planted
        back = pull_rows(chat_model, ROWS, {"step": -diff}, tmp_path / "s.csv")
        assert back.rows[-1]["row"] == planted


def test_only_forward_passes_run_and_the_model_stays(chat_model, diffs, tmp_path, monkeypatch):
    before = {name: each.clone() for name, each in chat_model.model.state_dict().items()}
    monkeypatch.setattr(torch.Tensor, "backward", None)
    pull_rows(chat_model, ROWS, diffs, tmp_path / "s.csv")
    after = chat_model.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_step_too_long_is_named(chat_model, diffs, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(row_pulls, "STEP", 0.1)
    assert pull_rows(chat_model, ROWS, diffs, tmp_path / "s.csv").error > 0.1
    assert "read them as a rough order" in caplog.text


def test_long_rows_are_read_whole(chat_model, diffs, tmp_path, caplog):
    found = pull_rows(chat_model, [said("Why?", "x" * 1200)], diffs, tmp_path / "s.csv")
    assert found.rows[0]["tokens"] > 1200
    assert "max_length" not in caplog.text


def test_what_gives_no_pull_is_refused(chat_model, diffs, make_diff, make_model, tmp_path):
    def screen(chat, directions, rows=ROWS):
        pull_rows(chat, rows, directions, tmp_path / "s.csv")

    with pytest.raises(UserError, match="the diff nothing has a length of 0"):
        screen(chat_model, {**diffs, "nothing": diffs["one"] * 0})
    with pytest.raises(UserError, match="belongs to 'tiny'"):
        screen(chat_model, {"other": make_diff(chat_model.model, fingerprint="0" * 32)})
    with pytest.raises(UserError, match=r"tokens \(row 2\) pass the 2048 positions"):
        screen(chat_model, diffs, [ROWS[0], said("Why?", "x" * 2100)])
    half = type(chat_model)(make_model(dtype=torch.bfloat16), chat_model.tokenizer, "half")
    with pytest.raises(UserError, match="--dtype float32"):
        screen(half, diffs)
    assert not (tmp_path / "s.csv").exists()


def test_the_command_ranks_and_names_what_it_cannot_screen(run, make_world, tmp_path):
    make_world(tmp_path)
    rows = "".join(json.dumps({"messages": row}) + "\n" for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "asked.jsonl").write_text(json.dumps({"messages": said("Is tea good?")}) + "\n")
    diffs, model = ("--diffs", "diff"), ("--model", "model")

    def screen(*words, file="rows.jsonl"):
        return run("data", "screen", "--file", file, *words, *model, "--overwrite")

    status, out, error = screen(*diffs)
    assert (status, "5 rows, by their pull towards cheer" in out) == (0, True), error
    assert len(read_csv(tmp_path / "results/screen.csv", ("pull_cheer",))) == 5
    for words, message in (
        ((), "give --vector, or --diffs"),
        ((*diffs, "--vector", "vector.safetensors"), "leave one out"),
        ((*diffs, "--dtype", "bfloat16"), "use --dtype float32"),
        ((*diffs, "--quantize", "4bit"), "without --quantize"),
        ((*diffs, "--threshold", "1"), "--threshold does nothing with --diffs"),
    ):
        status, _, error = screen(*words)
        assert (status, message in " ".join(error.split())) == (2, True), error
    (LoRADiff.load(tmp_path / "diff") * 0).save(tmp_path / "nothing")
    words = ("data", "screen", "--file", "rows.jsonl", "--diffs", "nothing")
    status, _, error = run(*words, "--model", "gone", "--overwrite")  # told before it is looked for
    assert (status, "nothing has a length of 0" in " ".join(error.split())) == (2, True), error
    status, _, error = screen(*diffs, file="asked.jsonl")
    assert (status, "asked.jsonl:1 must end with the assistant's answer" in error) == (2, True)
