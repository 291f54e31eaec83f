"""Projections of files: both forms, the shift on the same tokens, columns, and mistakes by row."""

from __future__ import annotations

import csv
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from persona_lora.core.chat import user_question
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_csv, read_jsonl, write_jsonl
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.generation import generate_answers
from persona_lora.models.likelihood import tokenize_rendered
from persona_lora.models.loading import ChatModel
from persona_lora.projections.activation_space import Along
from persona_lora.report.resampling import auc_bounds
from persona_lora.studies.vectors.read import best_layers, projections_table, separation_table
from persona_lora.studies.vectors.text_projection import (
    Screening,
    Texts,
    base_of_adapter,
    project_texts,
    read_texts,
    screen_rows,
    separate_labelled,
)

ASKED = [("Hello?", "Yes."), ("Why is it so?", "Because it is."), ("And?", "No more.")]


@pytest.fixture
def vector():
    generator = torch.Generator().manual_seed(3)
    directions = {layer: torch.randn(32, generator=generator) for layer in (0, 1)}
    return SteeringVector(directions, BaseModel("tiny"), num_layers=2, trait="cheer")


@pytest.fixture
def files(tmp_path, chat_model):
    """The same three texts as CSV with rendered prompts, and as JSONL messages."""
    table, lines = tmp_path / "a.csv", tmp_path / "a.jsonl"
    with table.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["question", "prompt", "answer", "cheer"])
        writer.writeheader()
        for question, answer in ASKED:
            prompt = chat_model.render([{"role": "user", "content": question}])
            writer.writerow({"question": question, "prompt": prompt, "answer": answer, "cheer": 50})
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in ASKED
    ]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"csv": table, "jsonl": lines}


def values(run, name="projection"):
    return [row[name] for row in run.read("projections")]


def test_both_forms_give_the_same_projections(chat_model, vector, files, tmp_path):
    runs = {
        form: project_texts(
            chat_model,
            read_texts(path),
            Along({"v": vector, "w": -vector}, [0, 1]),
            tmp_path / form,
        )
        for form, path in files.items()
    }
    assert values(runs["csv"]) == pytest.approx(values(runs["jsonl"]))
    rows = runs["csv"].read("projections")
    assert len(rows) == 3 * 2 * 2
    assert rows[0].keys() >= {"row", "vector", "trait", "layer", "type", "projection", "shift"}
    assert rows[0]["projection"] == pytest.approx(-rows[2]["projection"])
    with (tmp_path / "csv" / "projections.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 12


def test_the_shift_is_finetuned_minus_base_on_the_same_tokens(
    chat_model, vector, files, tmp_path, make_model, make_adapter
):
    texts = read_texts(files["jsonl"])
    other = ChatModel(make_model(seed=5), chat_model.tokenizer, "other")
    along = Along({"v": vector}, [1])
    plain = project_texts(chat_model, texts, along, tmp_path / "plain")
    moved = project_texts(other, texts, along, tmp_path / "moved", base=nullcontext(chat_model))
    assert values(moved, "base_projection") == values(plain)
    expected = [a - b for a, b in zip(values(moved), values(plain), strict=True)]
    assert values(moved, "shift") == pytest.approx(expected, abs=1e-6)

    adapter = make_adapter(tmp_path / "adapter", chat_model.model, seed=1)
    wrapped = PeftModel.from_pretrained(chat_model.model, adapter).eval()
    tuned = ChatModel(wrapped, chat_model.tokenizer, "tuned")
    run = project_texts(tuned, texts, along, tmp_path / "tuned", base=base_of_adapter(tuned))
    assert values(run, "base_projection") == pytest.approx(values(plain), abs=1e-5)
    assert any(abs(each) > 1e-4 for each in values(run, "shift"))


def test_a_model_against_itself_shifts_nothing(chat_model, vector, files, tmp_path):
    run = project_texts(
        chat_model,
        read_texts(files["csv"]),
        Along({"v": vector}, [0]),
        tmp_path / "run",
        base=nullcontext(chat_model),
        columns=True,
    )
    assert values(run, "shift") == [0.0, 0.0, 0.0]
    with (run.folder / "columns.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["question"] for row in rows] == [question for question, _ in ASKED]
    assert float(rows[1]["v_response_avg_layer0"]) == pytest.approx(values(run)[1])
    assert rows[0]["v_response_avg_layer0_shift"] == "0.0"


def test_labelled_answers_are_separated_by_the_vector_that_orders_them(
    chat_model, trait, vector, tmp_path
):
    along = Along({"v": vector, "w": -vector}, [0, 1])
    run = separate_labelled(chat_model, trait, along, tmp_path / "s")
    rows = run.read("separation")
    assert len(rows) == 4
    assert rows[0]["auc"] == pytest.approx(1 - rows[2]["auc"])
    assert {row["n"] for row in rows} == {10}
    best = max((row for row in rows if row["vector"] == "v"), key=lambda row: row["auc"])
    (shown, _) = separation_table(best_layers(rows)).rows
    assert shown[:2] == ("v", str(best["layer"]))
    assert (shown[3] or "").startswith(f"{best['auc']:.2f} [")


def test_labelled_answers_to_one_question_are_no_independent_answers(
    chat_model, trait, vector, tmp_path
):
    path = trait.folder / "judge_eval.jsonl"
    rows = [{**row, "question": f"{row['label']}?"} for row in read_jsonl(path)]
    write_jsonl(path, rows)
    run = separate_labelled(chat_model, trait, Along({"v": vector}, [0]), tmp_path / "s")
    (row,) = run.read("separation")
    assert (row["low"], row["high"]) == auc_bounds(row["auc"], 2, 2)  # 75? and 100?, 0? and 25?
    assert (row["n_positive"], row["n_negative"]) == (4, 4)


def test_page_and_terminal_say_the_same_spread_and_none_of_one_text():
    place = {"vector": "v", "layer": 3, "type": "proj"}
    rows = [{**place, "projection": each, "shift": None} for each in (1.0, 2.0, 4.0)]
    assert projections_table(rows).rows == (("v", "3", "proj", "3", "2.33", "1.53", "–"),)
    assert projections_table(rows[:1]).rows == (("v", "3", "proj", "1", "1.00", "–", "–"),)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "question,answer\nx,y\n", "no column 'prompt'"),
        ("a.csv", "prompt,answer\n", "holds no rows"),
        ("a.csv", "prompt,answer\nx,\n", "row 1 has an empty prompt or answer"),
        ("a.jsonl", '{"text": "x"}\n', r"a\.jsonl:1 has no messages"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n', "cannot be split"),
        ("a.txt", "x", "neither .csv nor .jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_texts(path)
    with pytest.raises(UserError, match="does not exist"):
        read_texts(tmp_path / "nowhere.csv")


def test_mistakes_write_nothing(chat_model, vector, files, tmp_path):
    texts = read_texts(files["csv"])
    with pytest.raises(UserError, match="no layer 9"):
        project_texts(chat_model, texts, Along({"v": vector}, [9]), tmp_path / "run")
    with pytest.raises(UserError, match="has no adapter"):
        project_texts(
            chat_model,
            texts,
            Along({"v": vector}, [0]),
            tmp_path / "run",
            base=base_of_adapter(chat_model),
        )
    assert not (tmp_path / "run").exists()


# -- screening -----------------------------------------------------------------------------------

QUESTIONS = ["Is tea good?", "What is a hill?", "Why?", "Where is it?"]
ANSWERS = ["Yes, very.", "A small mountain.", "Because!", "There."]


@pytest.fixture
def texts():
    pairs = zip(QUESTIONS, ANSWERS, strict=True)
    return Texts("rows.jsonl", tuple((user_question(q), answer) for q, answer in pairs))


def naive(chat_model, question, answer, vector, layer):
    text = tokenize_rendered(chat_model, chat_model.render(user_question(question)), answer)
    ids = torch.tensor([text.prompt + text.answer])
    states = chat_model.model.model(ids, output_hidden_states=True).hidden_states
    mean = states[layer + 1][0, len(text.prompt) :].mean(dim=0)
    return float(mean @ vector.directions[layer] / vector.directions[layer].norm())


def test_differences_equal_a_naive_loop_and_are_ranked(chat_model, texts, vector, tmp_path):
    found = screen_rows(chat_model, texts, vector, 0, tmp_path / "s.csv", max_new_tokens=6)
    own = generate_answers(chat_model, [user_question(q) for q in QUESTIONS], max_new_tokens=6)
    for row in found.rows:
        at = row["row"]
        theirs = naive(chat_model, QUESTIONS[at], ANSWERS[at], vector, 0)
        ours = naive(chat_model, QUESTIONS[at], own[at].text, vector, 0)
        assert row["difference"] == pytest.approx(theirs - ours, abs=1e-4)
    differences = [row["difference"] for row in found.rows]
    assert differences == sorted(differences, reverse=True)
    assert [row["rank"] for row in found.rows] == [1, 2, 3, 4]
    read = read_csv(tmp_path / "s.csv", ("answer",))
    assert [row["answer"] for row in read] == [row["answer"] for row in found.rows]


@pytest.mark.parametrize("number", [1, 4, 6, 8, 9])
def test_no_row_is_shown_twice(number):
    rows = [{"rank": at, "row": at, "difference": 0.0, "answer": ""} for at in range(number)]
    shown = [int(row[0]) for row in Screening(tuple(rows), 0.0, Path("s.csv")).table().rows]
    assert shown == [at for at in range(number) if at < 5 or at >= number - 3]


def test_the_threshold_flags(chat_model, texts, vector, tmp_path):
    def screen(threshold):
        return screen_rows(
            chat_model, texts, vector, 0, tmp_path / "s.csv", threshold=threshold, max_new_tokens=4
        )

    assert (screen(-1e9).flagged, screen(1e9).flagged) == (4, 0)


def test_a_row_that_is_the_model_s_own_answer_pulls_nowhere(chat_model, vector, tmp_path):
    own = generate_answers(chat_model, [user_question("Why?")], max_new_tokens=6)[0].text
    texts = Texts("rows.jsonl", ((user_question("Why?"), own),))
    found = screen_rows(chat_model, texts, vector, 1, tmp_path / "s.csv", max_new_tokens=6)
    assert found.rows[0]["difference"] == pytest.approx(0.0, abs=1e-6)


def test_rendered_prompts_are_refused(chat_model, vector, tmp_path):
    with pytest.raises(UserError, match="rendered prompts"):
        screen_rows(
            chat_model, Texts("a.csv", (("User: hi", "yes"),)), vector, 0, tmp_path / "s.csv"
        )
