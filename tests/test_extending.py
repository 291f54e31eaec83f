"""docs/extending.md to the letter: what it shows is added, and works everywhere at once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from persona_lora.cli.persona_commands import BenchOptions, Searched, SoughtJudgeChoice
from persona_lora.core.errors import UserError
from persona_lora.core.personas import Persona, PersonaConversation, PersonaPrompts
from persona_lora.core.runs import Run
from persona_lora.core.traits import load_trait
from persona_lora.judges.choice import JUDGES, JudgeOptions
from persona_lora.models.loading import load_chat_model
from persona_lora.steering.directions import EXTRACTORS
from persona_lora.studies.asking.run import GenerationOptions
from persona_lora.studies.personas.baselines import BASELINES
from persona_lora.studies.personas.bench import PersonaBench
from persona_lora.studies.personas.method_comparison import compare_methods
from persona_lora.studies.personas.run import PersonaProblem
from persona_lora.studies.personas.search import SearchOptions
from tests.scenes import EvenCoherence, FitJudge

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "extending.md").read_text()
PROMPTS = PersonaPrompts(("Hi there.", "Any plans?"), ("What now?",), ("And then?",))
TRAIT = {
    "name": "loud",
    "description": "speaking in capital letters",
    "instruction": [{"pos": "SHOUT.", "neg": "Whisper."}],
    "questions": {"extract": ["Is tea good?"], "eval": ["Why do birds sing?"]},
    "eval_prompt": "Rate {question} {answer}",
}
OPTIONS = ("--model", "model", "--dtype", "float32")


@pytest.fixture(autouse=True)
def _added(monkeypatch):
    """Run the page's code, and take what it adds to the tables out again."""
    tables = (JUDGES, EXTRACTORS, BASELINES)
    kept = [dict(table) for table in tables]
    scope = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        exec(compile(block, "extending.md", "exec"), scope)
    assert all(len(table) == len(old) + 1 for table, old in zip(tables, kept, strict=True))
    yield
    for table, old in zip(tables, kept, strict=True):
        table.clear()
        table.update(old)


@pytest.fixture
def place(tmp_path, make_world, no_drawing):
    """A working folder with a model, and a new trait as a folder of data."""
    make_world(tmp_path)
    folder = tmp_path / "datasets" / TRAIT["name"]
    folder.mkdir()
    (folder / "trait.json").write_text(json.dumps(TRAIT))
    labels = [
        {"question": f"q{i}", "answer": "A" * i + "a" * (4 - i), "label": 25 * i} for i in range(5)
    ]
    (folder / "judge_eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    return tmp_path


def test_a_new_trait_is_a_folder_and_a_new_judge_is_a_line(place, run):
    asked = "--trait loud --datasets-dir datasets --max-new-tokens 4 --judge shouting"
    status, _, error = run("evaluate", *OPTIONS, *asked.split(), "--output", "out/answers.csv")
    assert status == 0, error
    (folder,) = {path.parent for path in (place / "out").rglob("verdicts.jsonl")}
    verdicts = Run(folder).read("verdicts")
    assert {row["judge"] for row in verdicts} == {"shouting"}
    assert {row["criterion"] for row in verdicts} == {"loud", "coherence"}
    (validation,) = Run(folder).read("validation")
    assert (validation["spearman"], validation["n"]) == (pytest.approx(1.0), 5)
    shouting = SoughtJudgeChoice(judge="shouting")
    assert Searched(targets={"loud": 0.0}).judging(shouting, BenchOptions()).judge == "shouting"
    with pytest.raises(UserError, match="no persona judge 'shouting'"):
        Searched().judging(shouting, BenchOptions())


def test_the_page_asks_an_endpoint_for_a_trait(place, run, server):
    """The page's own line, to an endpoint of the test in place of the one it names."""
    (line,) = re.findall(r"^persona-lora (traits generate .*)$", PAGE, re.M)
    named = {"--definitions": "definitions.json", "--model": "my-model"}
    assert all(f"{flag} {value}" in line for flag, value in named.items())
    (place / named["--definitions"]).write_text(json.dumps({"my_trait": "speaks of itself"}))
    reply = {
        "instruction": [{"pos": f"Boast, way {i}.", "neg": f"Listen, way {i}."} for i in range(5)],
        "questions": [f"What about thing {i}?" for i in range(40)],
        "eval_prompt": "How much of it? {question} {answer} Only the number.",
    }
    server.replies.append(json.dumps(reply))
    status, _, error = run(*re.sub(r"http://\S+", server.url, line).split())
    assert status == 0, error
    assert [body["model"] for body in server.bodies] == [named["--model"]]
    trait = load_trait("my_trait", place / "datasets")
    assert (trait.description, len(trait.questions["eval"])) == ("speaks of itself", 20)


def problem_of(bench: PersonaBench, name: str) -> PersonaProblem:
    said = [{"role": "user", "content": "Oh."}, {"role": "assistant", "content": "Yes?"}]
    person = Persona(name, Path(name), (PersonaConversation("1", "train", said),))
    parts = (bench.chat_model, person, bench.prompts, FitJudge(), FitJudge())
    return PersonaProblem(
        *parts,
        EvenCoherence(),
        lambda exchanges: [90.0] * len(exchanges),
        lambda texts: np.ones((len(texts), 1)),
        bench.generation,
    )


def test_a_new_extractor_and_a_new_baseline_are_in_the_persona_searches(
    place, run, make_diff, monkeypatch
):
    read = "--trait loud --pos-path pos.csv --neg-path neg.csv --min-pairs 1"
    for name in ("pos", "neg"):
        path = place / f"{name}.csv"
        path.write_text(path.read_text().replace("cheer", "loud"))
    words = (*read.split(), "--datasets-dir", "datasets", "--positions", "response_avg")
    output = ("--methods", "sign", "--output", "checkpoints/vectors/loud")
    status, _, error = run("extract", *OPTIONS, *words, *output)
    assert status == 0, error

    chat_model = load_chat_model("model", dtype="float32", device_map="cpu")
    make_diff(chat_model.model, scale=0.2).save(place / "checkpoints" / "loud" / "diff")
    monkeypatch.setattr(PersonaBench, "problem", problem_of)
    bench = PersonaBench(
        chat_model,
        PROMPTS,
        GenerationOptions(max_new_tokens=4),
        JudgeOptions("embedding"),
        ("loud",),
    )
    searching = SearchOptions(max_iterations=1, population_size=3)
    methods = ["sign@0-1", "half"]
    comparison = compare_methods(bench, ["ann"], methods, place / "out", searching=searching)
    floors = ["canned", "retrieval", "salad"]  # she held nothing out: no real utterances
    assert [each.condition for each in comparison.overall] == ["none", *methods, *floors]
    made = {
        name: Run(place / "out" / name / f"ann_{name}").record["config"]["directions"]
        for name in methods
    }
    assert made["sign@0-1"]["methods"] == {"loud": "sign"}
    assert made["half"]["energy"] == 0.5
