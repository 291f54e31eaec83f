"""Goals other than a person: planted optima are found, constraints hold, bad files are named."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from persona_lora.core.chat import Exchange, Verdict
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel, LoRADiff, LoRAFactors, mix, part_of, parts_of
from persona_lora.core.personas import Coefficients, PersonaPrompts
from persona_lora.core.runs import Output, Run
from persona_lora.core.traits import Trait
from persona_lora.judges.budget import COST_CAP
from persona_lora.judges.choice import JudgeOptions
from persona_lora.judges.labels import load_ratings
from persona_lora.models.processes import Processes
from persona_lora.steering.bank import bank_of_diffs
from persona_lora.studies.asking.run import GenerationOptions
from persona_lora.studies.personas import climbing
from persona_lora.studies.personas.baselines import Wanted, load_directions
from persona_lora.studies.personas.bench import PersonaBench
from persona_lora.studies.personas.climbing import LENGTHS, value_slopes
from persona_lora.studies.personas.figure import render_goal
from persona_lora.studies.personas.goals import (
    VALUE,
    GoalProblem,
    Scorer,
    Targets,
    checked_targets,
    prompts_of,
)
from persona_lora.studies.personas.objective import ObjectiveOptions
from persona_lora.studies.personas.read_goals import (
    corrected_means,
    front_held,
    front_means,
    goal_line,
    goal_tables,
    undominated,
)
from persona_lora.studies.personas.run import (
    Method,
    objective_of,
    optimise_over_seeds,
    optimise_persona,
    speaker_of,
)
from persona_lora.studies.personas.search import SearchOptions
from persona_lora.studies.report_page import write_report
from persona_lora.studies.steering.calibration import on_own_answers
from tests.judges.rated import rated_rows, write_ratings

PROMPTS = PersonaPrompts(
    train=("Hi there.", "Any plans?", "What now?"),
    fresh=("And then?", "Why?", "Who is it?"),
    held_out=(
        *("Who's there?", "Since when?", "Is it far?", "What for?"),
        *("How come?", "Will it rain?", "Where to?", "Whose is it?"),
    ),
)
LETTERS = ("e", "o")
SEARCH = SearchOptions(max_iterations=8, population_size=8, bound=4.0)


class Even:
    """Coherence of 90, and less for every "e" in an answer."""

    def __init__(self, loss=0.0):
        self.loss = loss

    def verdicts(self, exchanges, name):
        lost = [self.loss * each.answer.count("e") for each in exchanges]
        return [Verdict("coherence", 90.0 - each, "", name) for each in lost]


class LetterShare:
    """The share of a letter in an answer, 0–100."""

    def __init__(self, letter):
        self.name, self.letter, self.asked = "letters", letter, []

    def judge(self, exchanges, criterion):
        self.asked += exchanges
        scores = [self._score(each.answer) for each in exchanges]
        return [Verdict(criterion, s, "empty" * (s is None), self.name) for s in scores]

    def _score(self, answer):
        return 100 * answer.count(self.letter) / len(answer) if answer else None


class Paid(LetterShare):
    """Has a budget for so many answers to questions of one part."""

    def __init__(self, letter, part, budget):
        super().__init__(letter)
        self.name, self.part, self.left = "openai", part, budget

    def judge(self, exchanges, criterion):
        return [
            Verdict(criterion, None, COST_CAP, self.name) if self._is_spent(exchange) else verdict
            for exchange, verdict in zip(
                exchanges, super().judge(exchanges, criterion), strict=True
            )
        ]

    def _is_spent(self, exchange):
        self.left -= exchange.question in self.part
        return exchange.question in self.part and self.left < 0


def planted(chat_model, letter):
    """A diff along whose positive side answers are made of that letter."""
    module, seen = "model.layers.1.self_attn.o_proj", []
    taken = chat_model.model.get_submodule(module).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].flatten(0, 1))
    )
    ids = chat_model.tokenizer("Any plans at all? Why", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        chat_model.model(input_ids=ids)
    taken.remove()
    at = chat_model.tokenizer(letter)["input_ids"][0]
    states = torch.cat(seen).mean(dim=0, keepdim=True)
    out = chat_model.model.get_output_embeddings().weight[at][:, None]
    A, B = states / states.norm() ** 2, out / out.norm() * 200
    return LoRADiff({module: LoRAFactors(A, B)}, BaseModel("tiny", None), trait=letter)


@pytest.fixture
def method(chat_model):
    diffs = {letter: planted(chat_model, letter) for letter in LETTERS}
    return Method("lora", bank_of_diffs(diffs), dict.fromkeys(LETTERS, 1.0), alpha=1.0)


@pytest.fixture
def scorer(tmp_path):
    """More "e" and less "o" is better."""
    (tmp_path / "mine.py").write_text(
        "def score(questions, answers):\n"
        "    return [a.count('e') - a.count('o') for a in answers]\n"
    )
    return Scorer.load(f"{tmp_path}/mine.py:score")


def problem_of(chat_model, goal, name="mine", coherence=None, second=None):
    return GoalProblem(
        chat_model,
        name,
        goal,
        PROMPTS,
        coherence or Even(),
        lambda exchanges: [90.0] * len(exchanges),
        GenerationOptions(max_new_tokens=8),
        Processes(),
        {"the scorer": getattr(goal, "content", "")},
        second,
    )


def test_a_planted_optimum_is_found_and_reported_on_held_out_prompts(
    chat_model, method, scorer, tmp_path
):
    problem = problem_of(chat_model, scorer)
    result = optimise_persona(problem, method, tmp_path / "out" / "run", searching=SEARCH)
    found = result.weights.as_dict()
    assert found["e"] > 1 > found["o"]
    plain, best, random = map(result.fit_of, ("none", result.best, "random_mix"))
    assert best.fit.mean > random.fit.mean
    points = [Coefficients(LETTERS, (e, o)) for e in (-3.0, 0.0, 3.0) for o in (-3.0, 0.0, 3.0)]
    grid = objective_of(problem, speaker_of(problem, method), "train", ObjectiveOptions())
    values = [each.value for each in grid(points, 1)]
    assert max(values) == max(values[-3:]) <= result.search.best.value
    assert best.difference.low > 0
    assert plain.kl == 0 < best.kl
    rows = Run(tmp_path / "out" / "run").read("held_out")
    assert {row["prompt"] for row in rows} == set(PROMPTS.held_out)
    assert all((row["kl_tokens"] > 0) == bool(row["answer"]) for row in rows)
    mixes = [row["weights"] for row in rows if row["condition"] == "random_mix"]
    assert len({mix["e"] for mix in mixes}) == len(PROMPTS.held_out)
    length = sum(value**2 for value in found.values())
    assert [sum(v**2 for v in mix.values()) for mix in mixes] == pytest.approx([length] * 8)
    kept = json.loads((tmp_path / "out" / "mine_optimization.json").read_text())
    assert (kept["goal"], kept["best_weights"]) == ("mine", found)
    assert kept["best_coefficients"] == found  # alpha and scales are 1
    page = write_report([tmp_path / "out" / "run"], tmp_path / "page.html").read_text()
    assert "the highest mine:score" in page
    assert "over random mixes of its length, by mine:score." in page
    assert "labelled answers" not in page  # a function is no judge of a trait


@pytest.mark.parametrize(
    ("best", "fixed", "bound"),
    [
        ({"a": 3.5, "b": 0.2, "c": -0.1}, {"a": 3.5}, 4.0),
        ({"a": 4.0, "b": -4.0, "c": 4.0, "d": 3.9}, {}, 4.0),
        ({"a": 4.0, "b": -4.0, "c": 1.0, "d": 0.0}, {}, 4.0),
        ({"a": 9.0, "b": 2.0, "c": 2.0}, {"a": 9.0}, 2.0),
        ({"a": 9.0, "b": 3.0, "c": 0.0}, {}, 0.0),
        ({"a": 0.0, "b": 0.0, "c": 1.0}, {"c": 1.0}, 4.0),
    ],
)
def test_random_mixes_are_such_as_the_search_could_have_found(chat_model, best, fixed, bound):
    problem = problem_of(chat_model, Targets({}, {}, {}))
    searching = SearchOptions(fixed=fixed, bound=bound)
    mixes = problem.beside(Coefficients.of(best), searching)["random_mix"]
    assert len(mixes) == len(PROMPTS.held_out)
    for drawn in (each.as_dict() for each in mixes):
        assert {name: drawn[name] for name in fixed} == fixed
        assert np.linalg.norm([*drawn.values()]) == pytest.approx(np.linalg.norm([*best.values()]))
        free = [abs(value) for name, value in drawn.items() if name not in fixed]
        assert max(free) <= (bound or np.inf)
    again = problem.beside(Coefficients.of(best), dataclasses.replace(searching, seed=1))
    assert (again["random_mix"] == mixes) == (best["a"] == 0.0)


def test_a_warm_start_tries_first_where_the_value_climbs(
    chat_model, method, scorer, tmp_path, monkeypatch
):
    monkeypatch.setattr(climbing, "DRAWS", 100)  # the two letters are rare in what it says
    problem = problem_of(chat_model, scorer)
    output = Output(tmp_path / "out" / "run")
    few = dataclasses.replace(SEARCH, max_iterations=1)
    (warm,) = optimise_over_seeds(problem, [method], output, searching=few, warm_start=True)
    slopes = value_slopes(speaker_of(problem, method), PROMPTS.train, scorer, VALUE, few.seed)
    assert all(slopes.values)
    first = [each.coefficients for each in warm.search.candidates[: len(LENGTHS)]]
    assert first == list(slopes.mixes(few.bound))
    (kept,) = output.path.parent.glob("climbing_*.json")
    written = kept.stat().st_mtime_ns
    optimise_over_seeds(problem, [method], output, searching=few, warm_start=True)
    assert kept.stat().st_mtime_ns == written


def test_a_search_that_was_cut_goes_on_as_if_it_had_not_been(chat_model, method, scorer, tmp_path):
    problem = problem_of(chat_model, scorer)
    whole = optimise_persona(problem, method, tmp_path / "whole", searching=SEARCH)
    short = dataclasses.replace(SEARCH, max_iterations=2)
    optimise_persona(problem, method, tmp_path / "cut", searching=short)
    cut = optimise_persona(problem, method, tmp_path / "cut", searching=SEARCH)
    assert cut.search == whole.search
    assert cut.fits == whole.fits
    other = dataclasses.replace(problem, judged_by={"the scorer": "another text"})
    with pytest.raises(UserError, match="the scorer"):
        optimise_persona(other, method, tmp_path / "cut", searching=SEARCH)


def test_targets_between_the_ends_are_met(chat_model, method, tmp_path):
    judges = {f"much_{letter}": LetterShare(letter) for letter in LETTERS}
    targets = Targets({"much_e": 100.0, "much_o": 0.0}, judges, {})
    problem = problem_of(chat_model, targets, "both", second=targets)
    result = optimise_persona(problem, method, tmp_path / "out" / "run", searching=SEARCH)
    assert result.fit_of(result.best).fit.mean > -30
    assert result.fit_of("none").fit.mean == -50
    page = write_report([tmp_path / "out" / "run"], tmp_path / "page.html").read_text()
    assert page.count("<td>much_e</td>") == 2  # by both judges
    assert "over the unsteered model" in page
    assert "by letters " in page


def test_how_fit_its_judges_are_is_asked_once_and_marks_table_line_and_page(
    chat_model, method, trait, tmp_path
):
    write_ratings(trait, rated_rows())
    rated = {row.exchange for row in load_ratings(trait, "validation")}
    first, second = LetterShare("q"), LetterShare("w")  # there is no q in what was rated
    goal, other = (
        Targets({"cheer": 90.0}, {"cheer": j}, {}, traits=(trait,)) for j in (first, second)
    )
    second.name = "others"
    problem = problem_of(chat_model, goal, "cheer90", second=other)
    few = dataclasses.replace(SEARCH, max_iterations=1, seeds=2)
    output = Output(tmp_path / "out" / "run")
    results = optimise_over_seeds(problem, [method], output, searching=few)
    assert sum(each in rated for each in first.asked) == len(rated)  # and not in either search
    for result in results:
        run = Run(result.folder)
        for file, name in (("", "letters"), ("second_", "others")):
            (row,) = run.read(f"{file}validation")
            assert (row["judge"], row["criterion"], row["fit"]) == (name, "cheer", False)
            shown = {each["name"] for each in run.read(f"{file}canaries")}
            assert shown >= {"filler", "echo", "loop"}
        rows = run.read("held_out")
        marked = ["letters (unfit for cheer)", "others (unfit for cheer)"]
        said = [row[2] for row in goal_tables(rows, run, ObjectiveOptions())[1].rows]
        assert said == [*marked, f"{marked[0]}, corrected"]
        assert all(name in goal_line(rows, run, result.best) for name in marked)
        texts = render_goal(run).figure.findobj(Text)
        assert any(marked[0] in " ".join(each.get_text().split()) for each in texts)
        page = (run.folder / "report.html").read_text()
        assert page.index("On cheer the judge “letters” is unfit") < page.index("<table")
        assert all(each in page for each in (*marked, "Agreement with labels", "Canaries"))
    for made in run.folder.glob("*validation.jsonl"):  # as runs of before have none
        made.unlink()
    assert "This run holds no validation" in write_report([run.folder], tmp_path / "p").read_text()
    again = dataclasses.replace(few, seeds=1, seed=1)
    for kept in ([], [{**row, "coverage": 0.0, "fit": None}]):  # and of judges out of reach
        run.write("validation", kept)
        optimise_persona(problem, method, run.folder, searching=again)
        assert run.read("validation")[0]["fit"] is False


def test_a_front_of_two_targets_that_exclude_each_other(chat_model, method, tmp_path):
    """No answer is all "e" and all "o": distances of 0 and 100, and of 100 and 0, are the ends."""
    judges = {f"much_{letter}": LetterShare(letter) for letter in LETTERS}
    targets = Targets({"much_o": 100.0, "much_e": 100.0}, judges, {}, pareto=True)
    problem = problem_of(chat_model, targets, "both")
    way = dataclasses.replace(method, searcher="tpe")
    result = optimise_persona(problem, way, tmp_path / "out" / "run", searching=SEARCH)
    assert list(result.finalists) == [f"front_{at}" for at in range(1, len(result.finalists) + 1)]
    (first, *_), (*_, last) = ([*each.standing.parts] for each in ends(result))
    assert min(first, last) > -45  # "e" first: a half each would be −50
    asked = len(judges["much_e"].asked)
    assert asked == len(judges["much_o"].asked)
    run = Run(tmp_path / "out" / "run")
    rows = run.read("held_out")
    shown = list(dict.fromkeys(row["condition"] for row in rows))
    assert shown == ["none", *result.finalists, "random_mix"]
    config = run.record["config"]
    assert config["goal"]["pareto"] is True
    means = front_means(rows, config)
    for name in result.finalists:
        own = [row for row in rows if row["condition"] == name]
        away = np.mean([100 - 100 * row["answer"].count("e") / len(row["answer"]) for row in own])
        assert means[name]["much_e"].mean == pytest.approx(away)
    page = write_report([run.folder], tmp_path / "page.html").read_text()
    assert "front, held-out prompts" in page
    assert f"{len(result.finalists)} mixes stood in the front" in page
    picture = render_goal(run)
    drawn, first = picture.panels[0], picture.figure.axes[0]
    picture.png()  # which places the names
    names, beside = (each.get_tightbbox() for each in (first.get_legend(), picture.figure.axes[1]))
    assert first.get_window_extent().x1 <= names.x0 < names.x1 < beside.x0
    kept = [row for row in run.read("generations") if row["value"] is not None]
    assert len(drawn.of("candidates").x) == len(kept)
    edge = drawn.of("front")
    assert list(edge.x) == sorted(edge.x)
    assert list(edge.y) == sorted(edge.y, reverse=True)
    known = json.loads((tmp_path / "out" / "both_optimization.json").read_text())
    assert known["best"] == result.best
    assert {row["best"] for row in run.read("finalists")} == {result.best}
    assert known["finalists"]["front_1"]["weights"] == known["finalists"]["front_1"]["coefficients"]
    again = optimise_persona(problem, way, tmp_path / "out" / "run", searching=SEARCH)
    assert (again.search, again.finalists, again.fits) == (
        result.search,
        result.finalists,
        result.fits,
    )
    assert len(judges["much_e"].asked) == asked  # read from the disk


def ends(result):
    first, *_, last = result.finalists.values()
    return first, last


def test_what_a_front_cannot_be_searched_with_is_named(chat_model, method, tmp_path):
    judges = {f"much_{letter}": LetterShare(letter) for letter in LETTERS}
    targets = Targets({"much_e": 100.0, "much_o": 100.0}, judges, {}, pareto=True)
    problem = problem_of(chat_model, targets, "both")
    way = dataclasses.replace(method, searcher="tpe")
    with pytest.raises(UserError, match="a front has none"):
        race = ObjectiveOptions(race=True)
        optimise_persona(problem, way, tmp_path / "run", searching=SEARCH, objective=race)
    with pytest.raises(UserError, match="a front is of one search"):
        optimise_over_seeds(problem, [way, way], Output(tmp_path / "two"), searching=SEARCH)
    with pytest.raises(UserError, match="cmaes"):
        optimise_persona(problem, method, tmp_path / "cma", searching=SEARCH)


def test_a_mix_is_in_a_front_where_no_other_is_better_in_all():
    assert undominated([(1, 0), (0, 1), (0, 0), (1, 0), (0.5, 0.5)]) == [
        *(True, True, False, True, True)
    ]
    assert undominated([]) == []


def test_a_mix_without_scores_or_that_breaks_a_constraint_is_in_no_front():
    """What could not be scored is not near to anything."""
    measured = (
        *(("none", 9.0, 95.0), ("front_1", None, 95.0), ("front_2", 1.0, 95.0)),
        *(("front_3", 0.0, 70.0), ("random_mix", 9.0, 95.0)),
    )
    rows = [
        {"persona": "p", "condition": name, "prompt_id": at, "score": calm and -calm, "kl": 0.0,
         "parts": {"calm": calm, "loud": 5.0}, "coherence": coherence, "relevance": 90.0}
        for name, calm, coherence in measured
        for at in range(3)
    ]  # fmt: skip
    config = {"goal": {"targets": {"calm": 0.0, "loud": 0.0}, "pareto": True}}
    held = front_held(rows, config, ObjectiveOptions(min_coherence=80.0))
    assert held == {"front_1": False, "front_2": True, "front_3": False}


def test_a_trait_is_scored_on_its_own_questions():
    judges = {letter: LetterShare(letter) for letter in LETTERS}
    asked = {"e": frozenset(["E?", "both?"]), "o": frozenset(["O?", "both?"])}
    targets = Targets({"e": 50.0, "o": 25.0}, judges, asked)
    said = [Exchange(question, "eeoo") for question in ("E?", "O?", "both?", "neither?")]
    scores = [each.score for each in targets.judge(said, "value")]
    assert scores == [0.0, -25.0, -12.5, -12.5]
    assert [each.question for each in judges["e"].asked] == ["E?", "both?", "neither?"]
    (unscored,) = targets.judge([Exchange("both?", "")], "value")
    assert (unscored.score, unscored.reason) == (None, "no score of e: empty; no score of o: empty")
    with pytest.raises(UserError, match=r"target of e .* got 130"):
        checked_targets({"e": 130.0})


def test_constraints_come_before_the_value(chat_model, method, scorer, tmp_path):
    """Every "e" costs coherence, and strength costs divergence: the best keeps both limits."""
    free = objective_of(
        problem_of(chat_model, scorer),
        speaker_of(problem_of(chat_model, scorer), method),
        "train",
        ObjectiveOptions(max_kl=100.0),
    )
    mixes = [Coefficients(LETTERS, values) for values in ((3.0, -2.0), (0.25, 0.0), (0.0, 0.0))]
    loud, quiet, off = free(mixes, 1)
    assert loud.value > quiet.value
    bank = method.directions
    same = on_own_answers(chat_model, bank, PROMPTS.train)
    for each in mixes[:2]:
        generation = GenerationOptions(max_new_tokens=40)
        problem = dataclasses.replace(problem_of(chat_model, scorer), generation=generation)
        goal = objective_of(
            problem, speaker_of(problem, method), "train", ObjectiveOptions(max_kl=100.0)
        )
        (measured,) = goal([each], 1)
        (expected,) = same.of([each.as_dict()])
        assert measured.details["kl"] == pytest.approx(expected.mean, rel=1e-4)
    assert off.details["kl"] == 0
    limits = ObjectiveOptions().constrained(
        [f"kl<={loud.details['kl'] / 4:.4f}nat", "coherence >= 80"]
    )
    assert limits.violation(80.0, None, 1.1 * limits.max_kl) == pytest.approx(10.0)
    problem = problem_of(chat_model, scorer, coherence=Even(loss=2.0))
    result = optimise_persona(
        problem, method, tmp_path / "out" / "run", searching=SEARCH, objective=limits
    )
    best = result.search.best
    assert best.value > 0
    assert best.violation == 0
    assert best.details["kl"] <= limits.max_kl
    assert best.details["coherence"] >= 80
    assert result.fit_of("none").feasible == 1.0
    held_out = result.fit_of(result.best)
    assert held_out.feasible == float(held_out.kl <= limits.max_kl)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("coherence<=80", "coherence>=80"),
        ("kl<=0.1", "kl<=0.1nat"),
        ("kl>=0.1nat", "kl<=0.1nat"),
        ("humour>=3", "humour>=3"),
        ("coherence", "there are coherence"),
        ("kl<=0nat", "above 0"),
        ("coherence>=180", "between 0 and 100"),
    ],
)
def test_a_constraint_that_there_is_not_is_named(text, words):
    with pytest.raises(UserError, match=words):
        ObjectiveOptions().constrained([text])
    with pytest.raises(UserError, match="twice"):
        ObjectiveOptions().constrained(["kl<=1nat", "kl<=2nat"])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return [len(a) for a in answers][:-1]", "gave 1 scores for 2 answers"),
        ("return 3", "gave 3 for 2 answers"),
        ("return 'ab'", "gave 'ab' for 2 answers"),
        ("return [1.0, float('nan')]", "gave nan to the answer 'B'"),
        ("return [1.0, '7']", "gave '7' to the answer"),
        ("return [1 / len(q) for q in ('', '')]", r"ZeroDivisionError.*\(line 2\)"),
    ],
)
def test_a_function_that_fails_is_named(tmp_path, body, words):
    (tmp_path / "mine.py").write_text(f"def score(questions, answers):\n    {body}\n")
    scorer = Scorer.load(f"{tmp_path}/mine.py:score")
    with pytest.raises(UserError, match=rf"mine.py:score.*{words}"):
        scorer.judge([Exchange("a", "A"), Exchange("b", "B")])


def test_a_search_is_of_what_coherence_was_learnt_from(chat_model, scorer, tmp_path):
    """With a function of one's own, too: constraints come before its values."""
    bench = PersonaBench(
        *(chat_model, PROMPTS, GenerationOptions(), JudgeOptions("embedding"), ("e",)),
        datasets=tmp_path,
    )
    bench.coherence = Even()
    (tmp_path / "e").mkdir()
    read = []
    for text in ("one", "other"):
        (tmp_path / "e" / "train.jsonl").write_text(text)
        read.append(bench.sought({}, scorer, on_questions=False).inputs())
    changed = {name for name in read[0] if read[0][name] != read[1][name]}
    assert changed == {"train.jsonl of the traits"}
    assert "the sentence embedder" in read[0]


def test_a_function_may_leave_an_answer_unscored(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n\n@dataclass\nclass N:\n    n: 'int'\n\n"
        "def score(questions, answers):\n    return [None, len(questions[1])]\n"
    )
    scorer = Scorer.load(f"{tmp_path}/mine.py:score")
    first, second = scorer.judge([Exchange("a", "A"), Exchange("bb", "B")])
    assert (first.score, first.reason) == (None, "mine:score gave no score")
    assert second.score == 2.0


@pytest.mark.parametrize(
    ("text", "source", "words"),
    [
        ("mine.py", "", 'as in "my.py:score"'),
        ("other.py:score", "", "other.py does not exist"),
        ("mine.py:score", "x = 1", "no function 'score'"),
        ("mine.py:x", "x = 1", "no function 'x'"),
        ("mine.py:score", "import nothing_of_that_name", r"ModuleNotFoundError.*\(line 1\)"),
        ("mine.py:score", "def score(:", "mine.py cannot be run: SyntaxError"),
    ],
)
def test_a_file_without_a_function_is_named(tmp_path, monkeypatch, text, source, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(UserError, match=words):
        Scorer.load(text)


def test_questions_of_traits_stand_in_turn(tmp_path):
    def trait(name, train, held_out):
        questions = {"extract": train, "eval": held_out, "ood": ()}
        return Trait(name, "", (), questions, "", tmp_path)

    found = prompts_of([trait("a", ("1", "2", "3"), ("7", "2")), trait("b", ("4", "1"), ("8",))])
    assert (found.train, found.held_out) == (("1", "4", "2", "3"), ("7", "8"))
    with pytest.raises(UserError, match="c has no eval questions"):
        prompts_of([trait("c", ("1",), ())])


def test_a_diff_is_searched_by_parts_that_make_up_the_whole(chat_model, make_diff, tmp_path):
    whole = make_diff(chat_model.model, seed=3)
    whole.save(tmp_path / "calm" / "diff")
    for by, names in (("layers", {"0-0", "1-1"}), ("modules", {"mlp", "self_attn"})):
        bank = load_directions("lora", Wanted(["calm"], tmp_path, by=by))
        assert set(bank.names) == {f"calm@{name}" for name in names}
        summed = mix(dict.fromkeys(bank.diffs.values(), 1.0))
        assert (summed - whole).norm() == 0
        again = load_directions("lora", Wanted(bank.names, tmp_path))  # as a result names them
        assert again.inputs == bank.inputs
    assert parts_of(deep(10), "layers") == ["0-2", "3-6", "7-9"]
    with pytest.raises(UserError, match="nothing in layer 7"):
        part_of(whole, "0-7")
    with pytest.raises(UserError, match=r"'attn'.*self_attn"):
        part_of(whole, "attn")


def deep(layers):
    one = LoRAFactors(torch.ones(1, 2), torch.ones(2, 1))
    factors = {f"model.layers.{at}.mlp.up_proj": one for at in range(layers)}
    return LoRADiff(factors, BaseModel("tiny", None))


def test_where_a_trait_must_act_is_found_by_parts(chat_model, scorer, tmp_path):
    """The letter is planted in attention alone: its coefficient there is what counts."""
    diff = planted(chat_model, "e")
    idle = LoRAFactors(torch.ones(1, 32) * 1e-3, torch.ones(64, 1) * 1e-3)
    factors = {**diff.factors, "model.layers.1.mlp.up_proj": idle}
    dataclasses.replace(diff, factors=factors).save(tmp_path / "e" / "diff")
    bank = load_directions("lora", Wanted(["e"], tmp_path, by="modules"))
    method = Method("lora", bank, dict.fromkeys(bank.names, 1.0), alpha=1.0)
    problem = problem_of(chat_model, scorer)
    result = optimise_persona(problem, method, tmp_path / "out" / "run", searching=SEARCH)
    assert result.weights.as_dict()["e@self_attn"] > 0.5
    assert result.fit_of(result.best).difference.mean > 1


SHORT = SearchOptions(max_iterations=3, population_size=4)


@pytest.mark.parametrize(("part", "budget", "kept"), [("train", 16, 1), ("fresh", 4, 3)])
def test_a_spent_budget_ends_a_search_which_goes_on_with_another(
    chat_model, method, tmp_path, part, budget, kept
):
    def found(place, left):
        paid = Paid("e", getattr(PROMPTS, part), left)
        problem = problem_of(chat_model, Targets({"e": 70.0}, {"e": paid}, {}))
        return optimise_persona(problem, method, tmp_path / place / "run", searching=SHORT)

    with pytest.raises(UserError, match=r"cost cap reached.*--max-judge-cost"):
        found("out", budget)
    run = Run(tmp_path / "out" / "run")
    assert (run.record["status"], len(run.read("generations"))) == ("failed", 4 * kept)
    assert not run.read("finalists")
    again, whole = found("out", 10**6), found("whole", 10**6)
    assert (again.search, again.finalists, again.rows) == (
        whole.search,
        whole.finalists,
        whole.rows,
    )


@pytest.mark.parametrize("spent", ["goal", "second"])
def test_held_out_answers_that_a_spent_budget_left_unscored_are_judged_later(
    chat_model, method, tmp_path, caplog, spent
):
    def found(place, left):
        paid = Targets({"e": 70.0}, {"e": Paid("e", PROMPTS.held_out, left)}, {})
        free = Targets({"e": 70.0}, {"e": LetterShare("e")}, {})
        judges = (paid, free) if spent == "goal" else (free, paid)
        problem = problem_of(chat_model, judges[0], second=judges[1])
        optimise_persona(problem, method, tmp_path / place / "run", searching=SHORT)
        return Run(tmp_path / place / "run").read("held_out")

    column = "score" if spent == "goal" else "second"
    waiting = [row for row in found("out", 18) if row[column] is None and row["answer"]]
    assert waiting
    assert f"{len(waiting)} answers in held_out.jsonl lack a judge's score (cost" in caplog.text
    assert found("out", 10**6) == found("whole", 10**6)


def test_a_shorter_search_leaves_what_a_longer_one_found(chat_model, method, scorer, tmp_path):
    problem, folder = problem_of(chat_model, scorer), tmp_path / "out"
    long = optimise_persona(problem, method, folder / "run", searching=SHORT)
    known = (folder / "mine_optimization.json").read_text()
    shorter = dataclasses.replace(SHORT, max_iterations=1)
    with pytest.raises(UserError, match="on disk it went on to 3; ask for at least that"):
        optimise_persona(problem, method, folder / "run", searching=shorter)
    assert (folder / "mine_optimization.json").read_text() == known
    assert optimise_persona(problem, method, folder / "run", searching=SHORT).rows == long.rows
    anew = Output(folder / "run", overwrite=True)
    optimise_persona(problem, method, anew, searching=shorter)
    assert len(Run(folder / "run").read("generations")) == 4


def test_a_front_is_reported_whatever_left_it_on_fresh_prompts(chat_model, method, tmp_path):
    """What left it may have the higher value, where some answers lack one of their scores."""

    class Some(LetterShare):
        def _score(self, answer):
            return super()._score(answer) if sum(map(ord, answer)) % 5 else None

    judges = {"e": LetterShare("e"), "o": Some("o")}
    problem = problem_of(chat_model, Targets({"e": 70.0, "o": 30.0}, judges, {}, pareto=True))
    way = dataclasses.replace(method, searcher="random")
    searching = SearchOptions(max_iterations=3, population_size=6, seed=7)
    result = optimise_persona(problem, way, tmp_path / "run", searching=searching)
    rows = Run(tmp_path / "run").read("finalists")
    highest = max(rows, key=lambda row: row["value"])
    assert tuple(highest["values"]) not in {each.values for each in mixes_of(result)}
    assert {row["best"] for row in rows} == {result.best}
    assert (tmp_path / "run" / "report.html").is_file()


def mixes_of(result):
    return [each.coefficients for each in result.finalists.values()]


@pytest.mark.parametrize(("kind", "by"), [("lora", 9), ("vectors", 4)])
def test_scores_without_steering_and_under_a_trait_s_own_diff_alone_are_corrected(
    tmp_path, kind, by
):
    """What mixes several diffs is of no rated kind, and stays raw."""
    config = {"goal": {"targets": {"e": 80.0, "o": 20.0}}, "judge": "j", "second_judge": None}
    config["directions"] = {"kind": kind}
    run = Run.open(tmp_path / "run", command="optimize", config=config, seed=0)
    compared = [
        {"model": "m", "condition": kind, "question": f"q{at}", "score": 50.0, "rating": 50.0 + by}
        for kind, by in (  # as rated
            *(("unsteered", 1.0), ("lora +1", 9.0), ("lora -1", -7.0)),
            *(("vector +1", 4.0), ("vector -1", -7.0)),
        )
        for at in range(4)
    ]
    run.write("validation", [{"criterion": "e", "own": {"compared": compared}, "fit": True}])
    mixes = {"none": [None], "own": [{"e": 2.0, "o": 0.0}], "mean": [{"e": 2.0, "o": 0.5}]}
    mixes |= {"down": [{"e": -1.0}], "random_mix": [{"e": 2.0}, {"e": -2.0}]}
    rows = [
        {"condition": name, "prompt_id": at, "weights": own[at % len(own)],
         "parts": {"e": 40.0 + at, "o": 30.0 + at}, "second_parts": {}}
        for name, own in mixes.items()
        for at in range(8)
    ]  # fmt: skip
    found = corrected_means(rows, run)
    assert found.keys() == {"e"}  # the other trait has no rated answers
    shift = {name: each.mean - 43.5 for name, each in found["e"].items()}
    expected = {"none": 1, "own": by, "down": -7}
    assert shift == {name: pytest.approx(by) for name, by in expected.items()}
