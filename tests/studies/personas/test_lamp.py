"""LaMP files: what is read, what is scored, and the overlap by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest

from persona_lora.core.chat import Exchange
from persona_lora.core.errors import UserError
from persona_lora.core.personas import Coefficients
from persona_lora.models.processes import Processes
from persona_lora.models.structure import weight_fingerprint
from persona_lora.profiles.conversations import load_conversations
from persona_lora.steering.bank import bank_of_diffs
from persona_lora.studies.asking.run import GenerationOptions
from persona_lora.studies.personas.bench import Optimized
from persona_lora.studies.personas.lamp import load_lamp, profile_prompt, score_lamp
from persona_lora.studies.personas.objective import Speaker

TASK = "Paraphrase the following tweet without any explanation before or after it: "
QUESTIONS = [
    {
        "id": "70",
        "input": TASK + "the 8:14 is late, as ever",
        "profile": [{"id": f"70{n}", "text": f"late again, train no. {n}"} for n in range(23)],
    },
    {
        "id": "71",
        "input": TASK + "I saw a heron by the canal today",
        "profile": [{"id": "711", "text": "Such a lovely walk!"}],
    },
]
GOLDS = {
    "task": "LaMP_7",
    "golds": [
        {"id": "71", "output": "a heron stood by the canal"},
        {"id": "70", "output": "8:14 late. obviously."},
    ],
}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "questions.json").write_text(json.dumps(QUESTIONS))
    (tmp_path / "outputs.json").write_text(json.dumps(GOLDS))
    return tmp_path / "questions.json", tmp_path / "outputs.json"


def test_questions_meet_their_golds_and_profiles_become_conversations(files):
    first, second = load_lamp(*files)
    assert (first.id, first.gold) == ("70", "8:14 late. obviously.")
    assert second.profile == ("Such a lovely walk!",)
    assert profile_prompt(first, 2).endswith("- late again, train no. 0\n- late again, train no. 1")
    conversations = load_conversations(files[0], episode="70")
    assert [len(each.utterances) for each in conversations] == [10, 10, 3]
    assert [each.split for each in conversations] == ["train", "train", "test"]


def test_overlap_is_that_of_the_words(files, chat_model, make_diff, tmp_path, monkeypatch):
    diff = make_diff(chat_model.model, fingerprint=weight_fingerprint(chat_model.model))
    speaker = Speaker(
        chat_model, bank_of_diffs({"calm": diff}), {"calm": 1.0}, 2.0,
        GenerationOptions(max_new_tokens=4), Processes(),
    )  # fmt: skip
    said = ["late", "a heron", "8:14 late. obviously.", "", "the canal by", "by the canal"]
    asked = []

    def answers(self, rows):
        asked.extend(rows)
        return [Exchange(row.question, answer) for row, answer in zip(rows, said, strict=True)]

    monkeypatch.setattr(Speaker, "answers", answers)
    mix = Coefficients.of({"calm": 0.5})
    questions = load_lamp(*files)
    found = score_lamp(speaker, questions, mix, tmp_path / "out")
    # Words are runs of letters and digits: "8:14 late. obviously." has four.
    rouge1 = {each.condition: each.fit.mean for each in found.fits["rouge1"]}
    first, second = 2 * 1 * 0.25 / 1.25, 2 * 1 * (2 / 6) / (1 + 2 / 6)
    assert rouge1["none"] == pytest.approx((first + second) / 2)
    assert rouge1["profile"] == pytest.approx(0.5)
    last = {each.condition: each for each in found.fits["rougeL"]}["mix"]
    assert last.fit.mean == pytest.approx((0 + 2 * 1 * 0.5 / 1.5) / 2)
    assert last.fit.n_questions == 2
    assert [row.condition for row in asked] == [None] * 4 + [mix] * 2
    assert [row.system_prompt is None for row in asked] == [True] * 2 + [False] * 2 + [True] * 2
    again = score_lamp(speaker, questions, mix, tmp_path / "out")
    assert again == found
    assert len(asked) == 6  # nothing was answered twice
    assert len((tmp_path / "out" / "scores.csv").read_text().splitlines()) == 1 + 2 * 3
    warm = GenerationOptions(max_new_tokens=4, temperature=1.0)
    with pytest.raises(UserError, match=r"generation.*--overwrite"):
        score_lamp(dataclasses.replace(speaker, options=warm), questions, mix, tmp_path / "out")


@pytest.mark.parametrize(
    ("questions", "outputs", "words"),
    [
        ({}, GOLDS, "list of questions"),
        ([], GOLDS, "no questions"),
        (QUESTIONS, {"golds": GOLDS["golds"][:1]}, "no gold for the question '70'"),
        ([{"id": "70", "input": "x"}], GOLDS, "question 1 has no 'profile'"),
        (["70"], GOLDS, "question 1 has no text under 'id': '70'; give a LaMP-7 file"),
        ([{**QUESTIONS[0], "input": None}], GOLDS, "question 1 has no text under 'input'"),
        (
            [{**QUESTIONS[0], "profile": ["late again"]}],
            GOLDS,
            "question 1, in its profile, has no text under 'text': 'late again'",
        ),
        (QUESTIONS, {"golds": {"70": "8:14 late."}}, "hold a list of 'golds'"),
        (QUESTIONS, {"golds": [{"id": "70"}]}, "gold 1 has no text under 'output'"),
        (QUESTIONS, {"golds": [{"id": "70", "output": None}]}, "no text under 'output'"),
        (QUESTIONS, {"golds": [{"id": "70", "output": 5}]}, "no text under 'output'"),
        (QUESTIONS, {"golds": GOLDS["golds"] * 2}, "several golds of one id"),
    ],
)
def test_files_of_another_form_are_named(tmp_path, questions, outputs, words):
    (tmp_path / "q.json").write_text(json.dumps(questions))
    (tmp_path / "o.json").write_text(json.dumps(outputs))
    with pytest.raises(UserError, match=words):
        load_lamp(tmp_path / "q.json", tmp_path / "o.json")


def test_a_result_of_a_search_is_read_back(chat_model, make_diff, tmp_path):
    diff = make_diff(chat_model.model, fingerprint=weight_fingerprint(chat_model.model))
    diff.save(tmp_path / "calm" / "diff")
    record = {
        "method": "random", "alpha": 2.0, "scales": {"calm": 0.25}, "layer": None,
        "best_weights": {"calm": 1.5},
    }  # fmt: skip
    path = tmp_path / "ann_optimization.json"
    path.write_text(json.dumps(record))
    options = GenerationOptions(max_new_tokens=4)
    found = Optimized.load(path, tmp_path)
    said = found.speaker(chat_model, options).coefficients(found.mix)
    assert said == {"calm": 2.0 * 1.5 * 0.25}
    assert Optimized.load(None, tmp_path).mix is None
    path.write_text("{}")
    with pytest.raises(UserError, match="'method'"):
        Optimized.load(path, tmp_path)
