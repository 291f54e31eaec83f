"""What a mix keeps of multiple choice, against merged models; a search that is limited by it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from persona_lora.core.chat import Exchange
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import mix as sum_of
from persona_lora.core.options import ObjectiveOptions
from persona_lora.core.personas import Coefficients
from persona_lora.models.likelihood import mean_logprobs
from persona_lora.models.processes import Processes
from persona_lora.steering.weights import LoRAMerger
from persona_lora.studies.personas.choices import QUARTERS, Choice, choices_of, kept_choices
from persona_lora.studies.personas.goals import GoalProblem, Scorer
from persona_lora.studies.personas.run import Method, optimise_persona
from persona_lora.studies.personas.search import SearchOptions
from persona_lora.studies.report_page import write_report
from tests.studies.personas.test_goals import PROMPTS, Even

SCALES = {"calm": 1.0, "loud": 0.5}
ASKED = [
    Choice("What is hot?", ("Ice", "Fire", "A cold drink"), 1),
    Choice("Who barks?", ("A dog", "A tree"), 0),
]


@pytest.fixture
def speaker(make_speaker):
    return make_speaker(SCALES, size=0.2, tokens=8)


def right_by_hand(chat_model):
    """The mean share of the right choice, one question at a time."""
    found = []
    for each in ASKED:
        said = [Exchange(each.question, choice) for choice in each.choices]
        p = np.exp(mean_logprobs(chat_model, said))
        found.append(p[each.right] / p.sum())
    return np.mean(found)


def test_what_is_kept_is_that_of_the_merged_model(speaker):
    mixes = [
        Coefficients.of({"calm": 1.0, "loud": -0.5}),
        None,
        Coefficients.of({"calm": 0.0, "loud": 2.0}),
    ]
    found = kept_choices(speaker, mixes, ASKED)
    plain = right_by_hand(speaker.chat_model)
    assert found[1] == pytest.approx(100.0)
    for each in (0, 2):
        merger = LoRAMerger(speaker.chat_model.model)
        coefficients, diffs = speaker.coefficients(mixes[each]), speaker.directions.diffs
        merger.merge_lora_diff(sum_of({diffs[at]: value for at, value in coefficients.items()}))
        kept = 100 * right_by_hand(speaker.chat_model) / plain
        merger.restore_original_weights()
        assert found[each] == pytest.approx(kept, rel=1e-3)
        assert abs(found[each] - 100) > 1


def test_no_question_is_of_two_parts_and_none_is_left_out():
    parts = [choices_of(part) for part in QUARTERS]
    assert [len(each) for each in parts] == [40, 40, 80]
    assert len({each.question for part in parts for each in part}) == 160
    assert {each.right for each in parts[0]} == {0, 1, 2, 3}


def test_a_search_keeps_what_is_asked_and_says_so_on_other_questions(
    chat_model, speaker, tmp_path, monkeypatch
):
    (tmp_path / "mine.py").write_text(
        "def score(asked, said):\n    return [len(a) for a in said]\n"
    )
    scorer = Scorer.load(f"{tmp_path}/mine.py:score")
    read = ("persona_lora.studies.personas.run.choices_of", lambda part: choices_of(part)[:3])
    monkeypatch.setattr(*read)
    problem = GoalProblem(
        chat_model, "mine", scorer, PROMPTS, Even(), lambda asked: [90.0] * len(asked),
        speaker.options, Processes(), {},
    )  # fmt: skip
    method = Method("lora", speaker.directions, SCALES)
    limits = ObjectiveOptions().constrained(["choice >= 97"])
    searching = SearchOptions(max_iterations=2, population_size=6, bound=4.0)
    out = tmp_path / "out" / "run"
    result = optimise_persona(problem, method, out, searching=searching, objective=limits)
    kept = [each.details["choice"] for each in result.search.candidates]
    assert min(kept) < 97 <= max(kept)
    for each in result.search.candidates:
        assert each.violation == pytest.approx(max(0.0, 97 - each.details["choice"]))
    best = result.search.best
    assert best.details["choice"] == pytest.approx(
        kept_choices(speaker, [best.coefficients], choices_of("train")[:3])[0], rel=1e-4
    )
    assert result.fit_of("none").choice == 100.0
    found = result.fit_of(result.best)
    expected = kept_choices(speaker, [result.weights], choices_of("held_out")[:3])
    assert found.choice == pytest.approx(expected[0], rel=1e-4)
    assert found.feasible == float(found.choice >= 97)
    assert result.fit_of("random_mix").feasible is None  # a mix for each prompt: not read
    record = json.loads((out / "run.json").read_text())
    assert record["config"]["objective"]["min_choice"] == 97.0
    assert "the multiple choice" in record["inputs"]
    assert "choice, %" in write_report([out], tmp_path / "page.html").read_text()


def test_a_limit_without_its_measure_and_nonsense_are_refused():
    for text in ("choice<=95", "choice>=0", "choice>=95%", "choices>=95"):
        with pytest.raises(UserError, match=r"choice>=95 \(percent\)"):
            ObjectiveOptions().constrained([text])
