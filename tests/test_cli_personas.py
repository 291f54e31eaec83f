"""Persona, projection and benchmark commands: the documented way through, and mistakes."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from persona_lora.cli.persona_commands import _state
from persona_lora.core.chat import Verdict
from persona_lora.core.lora_diff import BaseModel, LoRADiff
from persona_lora.core.personas import Coefficients, saved_mixes
from persona_lora.core.runs import Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.engines import remote
from persona_lora.judges import choice
from persona_lora.models.loading import load_chat_model
from persona_lora.models.structure import weight_fingerprint
from persona_lora.studies.personas import bench
from persona_lora.studies.personas.search import Generation
from tests.engines.stand_in import StandIn, dies_after, served
from tests.scenes import EvenCoherence, assert_fails

ROOT = Path(__file__).resolve().parents[1]
TRAITS = ("formality", "intimacy")
TWO = ("--targets", "evil=1,sycophancy=0", "--pareto")


@pytest.fixture
def place(model_folder, make_diff, tmp_path, monkeypatch):
    """Three of the shipped personas and two directions for the tiny model."""
    monkeypatch.setattr(bench, "fit_coherence", lambda *_, **__: EvenCoherence())
    for name in ("episode-000101_B", "episode-000117_B", "episode-000142_B"):
        shutil.copytree(ROOT / "personas" / name, tmp_path / "personas" / name)
    prompts = json.loads((ROOT / "personas" / "prompts.json").read_text())
    few = {key: prompts[key][:4] for key in ("train", "held_out")}
    (tmp_path / "personas" / "prompts.json").write_text(json.dumps(few))
    model = load_chat_model(str(model_folder), dtype="float32").model
    for seed, trait in enumerate(TRAITS):
        diff = make_diff(model, seed=seed, scale=0.1, fingerprint=weight_fingerprint(model))
        diff.save(tmp_path / "checkpoints" / trait / "diff")
    return (
        *("--model", model_folder, "--dtype", "float32", "--traits", ",".join(TRAITS)),
        *("--num-prompts", 2, "--max-iterations", 2, "--max-new-tokens", 4),
        *("--persona-dir", "personas"),
    )


def test_a_search_ends_with_weights_and_a_report(run, place, tmp_path):
    words = ("optimize", "--persona-id", "episode-000101_B", "--population-size", 4, *place)
    status, out, error = run(*words, "--save-dir", "out")
    assert status == 0, error
    assert "held-out" in out
    assert "One seed." in out
    assert "salad" in out
    assert "AUC" in out
    weights = json.loads((tmp_path / "out" / "episode-000101_B_best_weights.json").read_text())
    assert sorted(weights) == sorted(TRAITS)
    saved = [name for name in saved_mixes(tmp_path / "out") if name.endswith("_mix")]
    assert saved == ["episode-000101_B_mix"]
    assert sorted(Coefficients.read(tmp_path / "out" / f"{saved[0]}.json").traits) == sorted(TRAITS)
    assert "<html" in (tmp_path / "out" / "episode-000101_B_lora" / "report.html").read_text()
    again = run(
        *words, "--save-dir", "again", "--min-coherence", 0, "--race",
        "--inject", "out/episode-000101_B_best_weights.json", "--fixed", "formality=0.5",
    )  # fmt: skip
    assert again[0] == 0, again[2]
    raced = {
        name: [
            bool(row["details"].get("raced_out"))
            for row in Run(tmp_path / name / "episode-000101_B_lora").read("generations")
        ]
        for name in ("out", "again")
    }
    assert True not in raced["out"]
    assert raced["again"].count(True) == raced["again"].count(False) > 0  # the better half is left
    finalists = Run(tmp_path / "again" / "episode-000101_B_lora").read("finalists")
    asked = {len(row["details"]["scores"]) for row in finalists}
    assert len(asked) == 1  # of these none is raced
    assert not any(row["details"].get("raced_out") for row in finalists)
    fixed = json.loads((tmp_path / "again" / "episode-000101_B_best_weights.json").read_text())
    assert fixed["formality"] == 0.5


@pytest.mark.parametrize(("best", "said"), [(2.5, "best 2.50"), (None, "none keeps the constr")])
def test_the_live_line_tells_whether_a_candidate_keeps_the_constraints(best, said):
    shown = Generation(1, 9, best, mean=2.0, sigma=1.0, evaluations=8, size=8, seconds=2.0)
    assert f"generation 1/9  ·  {said}" in _state(shown, "ann", None)


def test_a_search_runs_on_a_cpu_with_bf16_units(run, place, tmp_path, simulate_machine):
    simulate_machine("cpu with avx512_bf16")
    words = ("optimize", "--persona-id", "episode-000101_B", "--population-size", 4, *place)
    status, _, error = run(*words, "--dtype", "auto", "--max-iterations", 1, "--save-dir", "out")
    assert status == 0, error


def test_a_config_gives_the_defaults_and_flags_override_it(run, place, tmp_path):
    (tmp_path / "search.yaml").write_text(
        "persona-id: episode-000101_B\noptimiser:\n  population_size: 4\n  max_iterations: 9\n"
        "directions:\n  energy: 0.9\noutput: out\nfixed: {formality: 0.5}\nmax_judge_cost:\n"
    )
    status, _, error = run("optimize", "--config", "search.yaml", *place)
    assert status == 0, error
    config = json.loads((tmp_path / "out/episode-000101_B_lora/run.json").read_text())["config"]
    assert config["search"]["population_size"] == 4
    assert config["directions"]["energy"] == 0.9
    assert config["search"]["fixed"] == {"formality": 0.5}
    found = json.loads((tmp_path / "out" / "episode-000101_B_optimization.json").read_text())
    assert found["num_iterations"] == 2  # of the flag, not of the file


def test_lamp_files_are_scored_by_overlap(run, model_folder, tmp_path):
    row = {"id": "70", "input": "Say it again: late", "profile": [{"text": "late again"}]}
    (tmp_path / "q.json").write_text(json.dumps([row]))
    golds = {"task": "LaMP_7", "golds": [{"id": "70", "output": "late, again"}]}
    (tmp_path / "o.json").write_text(json.dumps(golds))
    words = (
        "persona",
        "lamp",
        "--questions",
        "q.json",
        "--outputs",
        "o.json",
        "--dtype",
        "float32",
    )
    more = ("--model", model_folder, "--max-new-tokens", 4)
    status, out, error = run(*words, *more)
    assert status == 0, error
    assert "rougeL" in out
    assert (tmp_path / "results" / "lamp7" / "scores.csv").is_file()
    status, _, error = run(*words, *more, "--user", "72")
    assert status == 2
    assert "'72'" in error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ("none.yaml", "does not exist")),
        ("[1, 2]", ("must hold one YAML mapping",)),
        ("a: [", ("not valid YAML",)),
        ("layers: {from: 1}", ("'from'",)),
        ("race: 3", ("race must be true or false",)),
        ("layers: true", ("layers must be text or a number",)),
        ("max_iteration: 3", ("'max_iteration'", "max_iterations")),
        ("config: other.yaml", ("'config'",)),
        ("alpha: 1\nsection:\n  alpha: 2", ("'alpha' twice",)),
        ("alpha: 0", ("--alpha 0 makes every mix the unsteered model; use another factor",)),
        ("max_iterations: soon", ("--max-iterations", "integer")),
    ],
)
def test_a_config_with_a_mistake_is_one_line(run, tmp_path, text, words):
    if text is not None:
        (tmp_path / "none.yaml").write_text(text)
    status, _, error = run("optimize", "--config", "none.yaml", "--persona-id", "x")
    assert status == 2
    assert all(word in error for word in words), error


def test_methods_are_compared_and_answers_rated(run, place, tmp_path):
    words = ("compare-methods", "--persona-id", "episode-000101_B,episode-000142_B", *place)
    status, out, error = run(*words, "--methods", "lora,random,prompt", "--save-dir", "out")
    assert status == 0, error
    assert "against random search" in out
    assert (tmp_path / "out" / "comparison" / "comparison.png").is_file()
    status, _, error = run(
        "persona", "sheets", "out/comparison", "--id", "episode-000101_B",
        "--output", "sheets", "--persona-dir", "personas", "--conditions", "none,lora",
    )  # fmt: skip
    assert status == 0, error
    key = json.loads((tmp_path / "sheets" / "key.json").read_text())["items"]
    lines = [f"{item},{1 + at % 5}" for at, item in enumerate(key)]
    (tmp_path / "ann.csv").write_text("item,rating\n" + "\n".join(lines) + "\n")
    status, out, error = run("persona", "ratings", "sheets", "ann.csv")
    assert status == 0, error
    assert "people and judge" in out


def test_an_engine_answers_all_methods_but_those_of_vectors(
    run, place, model_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    vectors = tmp_path / "checkpoints" / "vectors"
    for at, trait in enumerate(TRAITS):
        directions = {layer: torch.linspace(-1, 1 + at, 32) for layer in (0, 1)}
        made = SteeringVector(directions, BaseModel("tiny"), 2, trait=trait, method="svd")
        made.save(vectors / trait / f"{trait}_response_avg_svd.safetensors")
    methods = ("lora", "random", "equal", "likelihood", "prompt", "svd")
    words = ("compare-methods", "--persona-id", "episode-000101_B", "--population-size", 3, *place)
    words = (*words, "--methods", ",".join(methods), "--max-iterations", 1, "--save-dir")
    status, _, error = run(*words, "here")
    assert status == 0, error
    diffs = [LoRADiff.load(f"checkpoints/{trait}/diff") for trait in TRAITS]
    server = StandIn(load_chat_model(str(model_folder), dtype="float32"), diffs)
    with served(server) as url:
        server.failing = dies_after(6)
        assert_fails(run(*words, "there", "--engine", url), "no engine is left")
        server.failing = lambda body: None
        status, _, error = run(*words, "there", "--engine", url)
    assert status == 0, error
    both = [Run(tmp_path / name / "comparison").read("held_out") for name in ("here", "there")]
    assert both[0] == both[1]
    assert {row["condition"] for row in both[0]} >= {"none", *methods}
    records = {
        path.parent.relative_to(tmp_path / "there").parts[0]: Run(path.parent).record["config"]
        for path in (tmp_path / "there").rglob("run.json")
    }
    named = {name for name, config in records.items() if config.get("engine") == "vllm"}
    assert named == {"comparison", "plain", *methods} - {"svd"}
    assert set(records) - named == {"svd"}
    assert "tiny" in server.rows
    assert len(set(server.rows)) > 4  # mixes of the searches, and two that are not searched for


class Shout:
    """A score from the letters of an answer."""

    name = "shout"

    def judge(self, exchanges, criterion):
        return [
            Verdict(criterion, float(sum(map(ord, each.answer)) % 101), "", self.name)
            for each in exchanges
        ]


@pytest.fixture
def goal(place, monkeypatch):
    """The same place without people; traits are judged by letters, by both kinds of judge."""
    for name in ("reader", "sentences"):
        monkeypatch.setitem(choice.JUDGES, name, lambda *_: Shout())
    few = ("--population-size", 4, "--datasets-dir", ROOT / "datasets", "--save-dir", "out")
    return (*place[: place.index("--persona-dir")], *few)


def test_scores_of_traits_are_searched_on_their_own_questions(run, goal, tmp_path):
    words = ("optimize", "--targets", "sycophancy=0,formality=70", *goal)
    more = ("--constraint", "kl <= 5nat", "--constraint", "coherence>=70", "--min-relevance", 0)
    status, out, error = run(*words, *more, "--race")
    assert status == 0, error
    assert "scores on held-out prompts" in out
    assert "over random mixes of its length" in " ".join(out.split()), out
    assert "keeps the constraints on held-out prompts" in out
    for trait in ("formality", "sycophancy"):  # which letters do not tell, and both judges read
        assert out.count(f" shout (unfit for {trait}) ") == 2, out
    folder = tmp_path / "out" / "formality70_sycophancy0_lora"
    record = Run(folder).record
    assert record["config"]["goal"] == {"targets": {"formality": 70.0, "sycophancy": 0.0}}
    assert record["config"]["objective"]["max_kl"] == 5.0
    assert "the trait sycophancy" in record["inputs"]
    asked = json.loads((ROOT / "datasets/formality/trait.json").read_text())["questions"]
    rows = Run(folder).read("held_out")
    assert {row["prompt"] for row in rows} >= set(asked["eval"])
    own = [row for row in rows if row["prompt"] in asked["eval"]]
    assert {tuple(row["parts"]) for row in own} == {("formality",)}
    weights = json.loads((tmp_path / "out/formality70_sycophancy0_best_weights.json").read_text())
    assert sorted(weights) == sorted(TRAITS)  # of --traits
    assert run(*words, *more, "--race")[0] == 0  # read from the disk


def test_a_front_of_two_targets_is_searched_and_shown(run, goal, tmp_path):
    words = ("optimize", "--targets", "sycophancy=0,formality=70", "--pareto", *goal)
    status, out, error = run(*words, "--min-relevance", 0, "--min-coherence", 0)
    assert status == 0, error
    assert "front, held-out prompts" in out
    assert "stood in the front on training" in " ".join(out.split())
    folder = tmp_path / "out" / "formality70_sycophancy0_pareto_lora"
    assert Run(folder).record["config"]["searcher"] == "tpe"
    assert (folder / "search.png").is_file()
    assert (tmp_path / "out/formality70_sycophancy0_pareto_best_weights.json").is_file()


def test_any_function_is_searched_and_belongs_to_the_run(run, goal, tmp_path):
    (tmp_path / "mine.py").write_text("def score(q, a):\n    return [float(len(x)) for x in a]\n")
    prompts = {"train": ["A?", "B?", "C?", "D?"], "held_out": ["E?", "F?"]}
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    words = ("optimize", "--scorer", "mine.py:score", "--prompts", "p.json", *goal)
    status, out, error = run(*words)
    assert status == 0, error
    assert "gains" in out
    folder = tmp_path / "out" / "mine_score_lora"
    assert {row["prompt"] for row in Run(folder).read("held_out")} == {"E?", "F?"}
    (tmp_path / "mine.py").write_text("def score(q, a):\n    return [0.0] * len(a)\n")
    assert_fails(run(*words), "the scorer", "has changed")
    (tmp_path / "mine.py").write_text("def score(q, a):\n    return [None] * len(a)\n")
    assert_fails(run(*words, "--overwrite"), "mine:score gave no score")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), ("--persona-id, --targets and --scorer",)),
        (("--targets", "evil=1", "--scorer", "m.py:s"), ("give one of",)),
        (("--targets", "evil=101"), ("evil", "0 to 100", "101")),
        (("--targets", "evill=1"), ("'evill'", "evil")),
        (("--targets", f"{ROOT / 'datasets' / 'evil'}=1"), ("give evil", "--datasets-dir")),
        (("--scorer", "m.py:s"), ("m.py does not exist",)),
        (("--targets", "evil=1", "--report-judge", "letters"), ("--report-judge", "--persona-id")),
        (("--targets", "evil=1", "--persona-dir", "x"), ("--persona-dir",)),
        (("--scorer", "m.py:s", "--judge", "reader"), ("--judge does nothing",)),
        (("--targets", "evil=1", "--constraint", "kl<=3"), ("kl<=0.1nat",)),
        (
            ("--targets", "evil=1", "--method", "svd", "--constraint", "choice>=95"),
            ("LoRA differences alone, got --method svd",),
        ),
        (("--targets", "evil=1", "--pareto"), ("two --targets",)),
        ((*TWO, "--search", "cmaes"), ("tpe or random",)),
        ((*TWO, "--race"), ("--race", "one order")),
        ((*TWO, "--search-seeds", 2), ("--search-seeds", "one search")),
        (("--scorer", "m.py:s", "--pareto"), ("two --targets",)),
        (
            ("--targets", "evil=1,sycophancy=0,formality=3", "--num-prompts", 2),
            ("--num-prompts 3",),
        ),
        (("--targets", "evil=1", "--prompts", "none.json"), ("none.json does not exist",)),
    ],
)
def test_what_cannot_be_sought_is_one_line(run, words, said):
    datasets = ("--datasets-dir", ROOT / "datasets")
    assert_fails(run("optimize", *words, *datasets, "--model", "nowhere"), *said)


def test_a_search_whose_library_is_missing_is_refused_before_anything_is_loaded(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    named = ("--persona-id", "episode-000101_B", "--model", "nowhere")
    commands = (
        ("optimize", "--search", "tpe", *named),
        ("compare-methods", "--methods", "tpe", *named),
    )
    for words in commands:
        assert_fails(run(*words), 'pip install "persona-lora[search]"')
    monkeypatch.undo()
    for words in commands:
        assert_fails(run(*words, "--bound", 0), "--bound 4")
    wrong = ("compare-methods", "--methods", "equal,lore", *named[:2])
    assert_fails(run(*wrong), "no method 'lore'", "lora")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--persona-id", "episode-000101_X"), ("episode-000101_B",)),
        (("--persona-id", "episode-000101_B", "--method", "magic"), ("'magic'", "lora")),
        (("--persona-id", "episode-000101_B", "--search", "luck"), ("cmaes",)),
        (("--persona-id", "episode-000101_B", "--initial", "formality"), ("formality=-1",)),
        (("--persona-id", "episode-000101_B", "--fixed", "humour=1"), ("'humour'",)),
        (("--persona-id", "episode-000101_B", "--num-prompts", 99), ("99",)),
        (
            ("--persona-id", "episode-000101_B", "--method", "svd", "--layer", "top"),
            ("--layers", "'top'"),
        ),
        (("--persona-id", "episode-000101_B", "--judge", "oracle"), ("'oracle'", "embedding")),
        (("--persona-id", "episode-000101_B", "--sigma0", 0), ("sigma0",)),
        (("--persona-id", "episode-000101_B", "--trait-vector-dir", "none"), ("does not exist",)),
    ],
)
def test_mistakes_are_one_line(run, place, more, words):
    assert_fails(run("optimize", *place, "--save-dir", "out", *more), *words)


def test_weights_are_projected_and_drawn(run, place, model_folder, tmp_path):
    mixed = LoRADiff.load("checkpoints/formality/diff") * 0.5
    mixed.save(tmp_path / "tuned")
    status, out, error = run(
        "project", "weights", "--original-model", model_folder,
        "--finetuned-model", f"tuned,{model_folder}", "--output", "out/p.json",
        "--diffs", "checkpoints/formality/diff,checkpoints/intimacy/diff",
    )  # fmt: skip
    assert status == 0, error
    assert "100.00%" in out
    assert out.count("cosine") == 2
    record = json.loads((tmp_path / "out" / "p.json").read_text())
    assert record["inputs"]["tokens"] > 0
    norms = {"weighted": "weighted_norm", "plain": "norm"}
    for geometry, summary in zip(norms, record["finetuned"], strict=False):
        assert summary["geometry"] == geometry
        whole = record["diffs"]["trait0"][norms[geometry]]
        assert summary["delta_norm"] == pytest.approx(0.5 * whole, rel=1e-5)
        assert summary["corrected"]["trait0"] == pytest.approx(0.5, abs=1e-6)
    assert (tmp_path / "out" / "p.png").stat().st_size > 1000


def test_plain_projections_take_off_a_control(run, place, model_folder, tmp_path):
    (LoRADiff.load("checkpoints/formality/diff") * 0.5).save(tmp_path / "tuned")
    words = (
        "project", "weights", "--original-model", model_folder, "--plain", "--diffs",
        "checkpoints/formality/diff", "--output", "out/p.json",
    )  # fmt: skip
    status, out, error = run(*words, "--finetuned-model", "tuned", "--control", "tuned")
    assert status == 0, error
    assert out.count("cosine") == 1
    record = json.loads((tmp_path / "out" / "p.json").read_text())
    assert (record["geometry"], record["inputs"], record["controls"]) == ("plain", None, ["tuned"])
    assert {*record["diffs"]["trait0"]} == {"norm", "trait"}
    assert record["finetuned"][0]["delta_norm"] == pytest.approx(0, abs=1e-6)
    assert_fails(run(*words, "--finetuned-model", "tuned"), "out/p.json exists", "--overwrite")
    again = (*words, "--overwrite", "--finetuned-model")
    assert_fails(run(*again, "nowhere"), "nowhere")
    assert_fails(run(*again, "tuned", "--control", "x"), "x is no adapter")


def test_a_full_control_is_taken_off_full_models(run, place, model_folder, tmp_path):
    for name, mix in (("control", "intimacy=0.5"), ("tuned", "intimacy=0.5,formality=0.25")):
        words = ("export", "--mix", mix, "--format", "merged", "--output", name)
        status, _, error = run(*words, "--model", model_folder)
        assert status == 0, error
    words = (
        "project", "weights", "--original-model", model_folder, "--plain", "--diffs",
        "checkpoints/formality/diff", "--output", "out/p.json", "--control", "control",
    )  # fmt: skip
    status, _, error = run(*words, "--finetuned-model", "tuned")
    assert status == 0, error
    found = json.loads((tmp_path / "out" / "p.json").read_text())["finetuned"][0]
    norm = LoRADiff.load("checkpoints/formality/diff").norm()
    assert found["delta_norm"] == pytest.approx(0.25 * norm, rel=1e-3)
    words = (*words, "--overwrite")
    adapter = run(*words, "--finetuned-model", "checkpoints/formality/diff")
    assert_fails(adapter, "control is no adapter, and checkpoints/formality/diff is one")
    several = run(*words, "--finetuned-model", "tuned", "--control", "tuned")
    assert_fails(several, "control is no adapter, and 2 are given")


def test_runs_are_paired_by_folder_or_csv_whatever_dots_they_hold(run, tmp_path):
    for name, score in (("x_0.0", 10.0), ("x_1.0", 30.0)):
        made = Run.open(tmp_path / name, command="evaluate", config={"trait": "x"}, seed=0)
        made.write(
            "answers",
            [
                {"row": at, "method": "none", "question_id": at, "question": f"{at}?"}
                for at in range(4)
            ],
        )
        made.write(
            "verdicts",
            [
                {
                    "row": at,
                    "criterion": criterion,
                    "score": score + at,
                    "judge": "j (unfit for x)" if criterion == "x" else "j",
                }
                for at in range(4)
                for criterion in ("x", "coherence")
            ],
        )
    for words in (("x_0.0", "x_1.0"), ("x_0.0.csv", "x_1.0.csv")):
        status, out, error = run("paired", *words, "--output", "table.csv", "--overwrite")
        assert status == 0, error
        told = next(line for line in out.splitlines() if "x_1.0" in line)
        assert "Judge: j (unfit for x)." in out
        assert re.match(r"x_1\.0 31\.5 \[\S+ \S+\] – 4 100% \+?20\.0", " ".join(told.split()))
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert (rows[1]["run"], float(rows[1]["trait"]), float(rows[1]["difference"])) == (
        "x_1.0", 31.5, 20.0,
    )  # fmt: skip


def test_there_must_be_something_to_compare_capability_with(run, place, model_folder):
    assert_fails(run("benchmark", "--model", model_folder), "--diff, --vector or --adapter")
