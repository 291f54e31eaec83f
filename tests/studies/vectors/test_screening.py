"""Screening of training rows: against a naive loop, and who gets flagged."""

from __future__ import annotations

import pytest
import torch

from persona_lora.core.chat import user_question
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_csv
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.generation import generate_answers
from persona_lora.models.likelihood import tokenize_rendered
from persona_lora.studies.vectors.screening import screen_rows
from persona_lora.studies.vectors.text_projection import Texts

QUESTIONS = ["Is tea good?", "What is a hill?", "Why?", "Where is it?"]
ANSWERS = ["Yes, very.", "A small mountain.", "Because!", "There."]


@pytest.fixture
def vector():
    generator = torch.Generator().manual_seed(0)
    directions = {layer: torch.randn(32, generator=generator) for layer in range(2)}
    return SteeringVector(directions, BaseModel("tiny", None), 2)


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
