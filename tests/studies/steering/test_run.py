from __future__ import annotations

import csv
import dataclasses
import json

import pytest
import torch

from persona_lora.core.chat import Exchange, user_question
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel, LoRAFactors, random_diff_like
from persona_lora.core.options import ComparisonOptions
from persona_lora.core.runs import Output, Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.traits import NEUTRAL_PROMPTS
from persona_lora.models.generation import generate_answers
from persona_lora.models.likelihood import tokenize_exchange, tokenize_rendered
from persona_lora.steering.activations import ActivationSteerer
from persona_lora.steering.bank import Bank
from persona_lora.steering.directions import random_like
from persona_lora.steering.weights import LoRASteerer
from persona_lora.studies.asking.run import GenerationOptions
from persona_lora.studies.steering import run as study
from persona_lora.studies.steering.calibration import (
    bank_of_methods,
    beside_prompts,
    match_divergence,
    on_own_answers,
    on_prompts,
)
from persona_lora.studies.steering.divergence import (
    ANSWER_TOKENS,
    ordinary_texts,
    row_divergences,
)
from persona_lora.studies.steering.read_comparison import METHODS
from persona_lora.studies.steering.run import (
    SweepOptions,
    compare,
    diff_population,
    prompt_population,
    sweep,
    vector_population,
)

OPTIONS = GenerationOptions(max_new_tokens=8)


@pytest.fixture
def run_sweep(chat_model, trait, datasets, judge, make_diff, tmp_path):
    diff = make_diff(chat_model.model, scale=0.3)

    def run(coefficients=(-1, 1), *, overwrite=False, **options):
        return sweep(
            chat_model,
            trait,
            diff_population(diff, tuple(coefficients)),
            lambda: judge,
            Output(tmp_path / "sweep", overwrite),
            options=OPTIONS,
            datasets=datasets,
            **options,
        )

    run.diff = diff
    return run


def test_a_sweep_is_one_generation_and_equals_merged_answers(
    run_sweep, chat_model, trait, tmp_path
):
    """Token for token, in fp32: the rows of one batch against merged weights, one at a time."""
    result = run_sweep()
    answers = [json.loads(line) for line in (result.run / "answers.jsonl").open()]
    assert len(answers) == (3 + 3) * 3  # −1, 0, 1 and three prompts, three questions
    for coefficient in (-1.0, 0.0, 1.0):
        with LoRASteerer(chat_model.model, run_sweep.diff, coefficient):
            alone = generate_answers(
                chat_model,
                [[{"role": "user", "content": text}] for text in trait.questions["eval"]],
                max_new_tokens=8,
            )
        steered = [row["answer"] for row in answers if row["coefficient"] == coefficient]
        assert steered == [each.text for each in alone]


def test_a_sweep_writes_rows_tables_plot_and_report(run_sweep):
    result = run_sweep()
    names = {path.name for path in result.run.iterdir()}
    assert names == {
        "run.json",
        "answers.jsonl",
        "verdicts.jsonl",
        "validation.jsonl",
        "canaries.jsonl",
        "judging.jsonl",
        "divergence.jsonl",
        "sweep.csv",
        "sweep.png",
        "summary.json",
        "summary.csv",
        "report.html",
    }
    assert [each.coefficient for each in result.summary.steered] == [-1.0, 0.0, 1.0]
    assert json.loads((result.run / "summary.json").read_text())["trait"] == "cheer"


def test_a_second_run_reuses_the_first(run_sweep, judge):
    first = run_sweep()
    before = (first.run / "answers.jsonl").stat().st_mtime_ns
    asked = [count for _, count in judge.asked if count == 15]
    second = run_sweep()
    assert second.summary == first.summary
    assert [count for _, count in judge.asked if count == 15] == asked
    assert (second.run / "answers.jsonl").stat().st_mtime_ns >= before
    with pytest.raises(UserError, match="another configuration"):
        run_sweep((-2, 2))
    assert [each.coefficient for each in run_sweep((-2, 2), overwrite=True).summary.steered] == [
        -2.0,
        0.0,
        2.0,
    ]


@pytest.mark.parametrize("coefficients", [(), (0,), (float("nan"),)])
def test_senseless_coefficients_are_refused(run_sweep, coefficients, tmp_path):
    with pytest.raises(UserError):
        run_sweep(coefficients)
    assert not (tmp_path / "sweep").exists()


@pytest.fixture
def vector():
    generator = torch.Generator().manual_seed(3)
    directions = {layer: 3 * torch.randn(32, generator=generator) for layer in (0, 1)}
    return SteeringVector(directions, BaseModel("tiny"), num_layers=2)


@pytest.fixture
def run_population(chat_model, trait, datasets, judge, tmp_path):
    def run(population, *, output=tmp_path / "sweep", **options):
        return sweep(
            chat_model,
            trait,
            population,
            lambda: judge,
            output,
            options=OPTIONS,
            datasets=datasets,
            **options,
        )

    return run


def rows_of(run, name):
    return [json.loads(line) for line in (run / f"{name}.jsonl").open()]


def test_a_grid_of_layers_and_coefficients_equals_answers_steered_one_by_one(
    run_population, chat_model, trait, vector
):
    population = vector_population(vector, (0, 1), (-1.0, 2.0))
    result = run_population(population, sweeping=SweepOptions(divergence=False))
    answers = rows_of(result.run, "answers")
    assert len(answers) == (1 + 2 * 2 + 3) * 3  # unsteered, the grid, three prompts; 3 questions
    for layer in (0, 1):
        for coefficient in (-1.0, 2.0):
            with ActivationSteerer(chat_model.model, vector, coefficient, layer):
                alone = generate_answers(
                    chat_model,
                    [[{"role": "user", "content": text}] for text in trait.questions["eval"]],
                    max_new_tokens=8,
                )
            cell = ("activation", layer, coefficient)
            steered = [
                row["answer"]
                for row in answers
                if (row["method"], row["layer"], row["coefficient"]) == cell
            ]
            assert steered == [each.text for each in alone]
    names = {path.name for path in result.run.iterdir()}
    assert {"grid.json", "grid.csv", "layers.png", "report.html", "sweep.csv"} <= names
    assert "divergence.jsonl" not in names


def test_several_layers_at_once_equal_hooks_made_by_hand(run_population, chat_model, trait, vector):
    population = vector_population(vector, (1, 0), (-1.0, 2.0), at_once=True)
    result = run_population(population, sweeping=SweepOptions(references=False))
    answers = rows_of(result.run, "answers")
    assert {row["layer"] for row in answers} == {None, "0+1"}
    for coefficient in (-1.0, 2.0):
        steered = [row["answer"] for row in answers if row["coefficient"] == coefficient]
        assert steered == [
            _added_by_hand(chat_model, vector, coefficient, text)
            for text in trait.questions["eval"]
        ]


def _added_by_hand(chat_model, vector, coefficient, question):
    """Add c·v to the last token of every pass at every layer: that of the prompt, then each new."""

    def add(layer, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[:, -1] += coefficient * vector.directions[layer]

    blocks = chat_model.model.model.layers
    hooks = [
        blocks[layer].register_forward_hook(lambda block, given, output, at=layer: add(at, output))
        for layer in vector.layers
    ]
    try:
        (answer,) = generate_answers(chat_model, [user_question(question)], max_new_tokens=8)
    finally:
        for hook in hooks:
            hook.remove()
    return answer.text


def test_several_layers_of_which_one_alone_has_a_direction_are_that_layer(
    run_population, vector, tmp_path
):
    alone = dataclasses.replace(vector, directions={**vector.directions, 0: torch.zeros(32)})
    found = []
    for layers, at_once in (((1,), False), ((0, 1), True)):
        population = vector_population(alone, layers, (-1.0, 1.0), at_once=at_once)
        run = run_population(population, output=tmp_path / f"{at_once}").run
        answers = [(row["coefficient"], row["answer"]) for row in rows_of(run, "answers")]
        divergences = [(row["kl_mean"], row["kl_p95"]) for row in rows_of(run, "divergence")]
        found.append((answers, divergences))
    assert found[0] == found[1]


def test_a_sweep_of_several_layers_at_once_is_one_curve_that_names_them(
    run_population, trait, vector, judge
):
    controls = [random_like(vector, 0)]
    population = vector_population(vector, (0, 1), (-1.0, 1.0), controls=controls, at_once=True)
    planned = study.planned_sweep(trait, population, SweepOptions(), OPTIONS)
    assert set(planned.design.family) == {"layers 0+1, -1", "layers 0+1, +1"}
    result = run_population(population)
    assert result.summary.layer == "0+1"
    assert result.summary.control.draws == 1
    table = list(csv.DictReader((result.run / "sweep.csv").open()))
    assert {row["layer"] for row in table if row["method"] in ("activation", "random")} == {"0+1"}
    assert "layers 0+1" in (result.run / "report.html").read_text()
    rows = (1 + 2 * 2 + 3) * 3  # unsteered, vector and control, three prompts; three questions
    asked = [count for _, count in judge.asked if count == rows]
    assert run_population(population).summary == result.summary
    assert [count for _, count in judge.asked if count == rows] == asked != []
    one_by_one = vector_population(vector, (0, 1), (-1.0, 1.0), controls=controls)
    with pytest.raises(UserError, match="another configuration"):
        run_population(one_by_one)


def test_one_layer_with_its_random_control_is_a_curve_with_costs(run_population, vector):
    controls = [random_like(vector, seed) for seed in range(3)]
    result = run_population(vector_population(vector, (1,), (-1.0, 1.0), controls=controls))
    assert [each.coefficient for each in result.summary.steered] == [-1.0, 0.0, 1.0]
    divergences = rows_of(result.run, "divergence")
    assert {(row["method"], row["layer"], row["coefficient"]) for row in divergences} == {
        (method, 1, value)
        for method in ("activation", "random", "random#2", "random#3")
        for value in (-1.0, 1.0)
    }
    assert result.summary.control.draws == 3
    table = list(csv.DictReader((result.run / "sweep.csv").open()))
    assert {"random", "random#2", "random#3"} < {row["method"] for row in table}
    assert {"sweep.png", "summary.json"} <= {path.name for path in result.run.iterdir()}


def test_a_prompt_sweep_is_the_references_alone(run_population):
    result = run_population(prompt_population(), sweeping=SweepOptions(divergence=False))
    rows = rows_of(result.run, "answers")
    methods = {row["method"] for row in rows}
    assert methods == {"none", "prompt_pos", "prompt_neg", "prompt_neutral"}
    told = [row["system_prompt"] for row in rows if row["method"] == "prompt_neutral"]
    assert told == list(NEUTRAL_PROMPTS[:3])


def test_max_questions_takes_the_first(run_population, vector, trait):
    options = SweepOptions(split="extract", references=False, divergence=False, max_questions=1)
    result = run_population(vector_population(vector, (0, 1), (1.0,)), sweeping=options)
    asked = {row["question"] for row in rows_of(result.run, "answers")}
    assert asked == {trait.questions["extract"][0]}


def test_a_population_that_cannot_be_is_refused(vector):
    with pytest.raises(UserError, match="at least one layer"):
        vector_population(vector, (), (1.0,))
    with pytest.raises(UserError, match="no layer 7"):
        vector_population(vector, (7,), (1.0,))
    with pytest.raises(UserError, match="other than 0"):
        vector_population(vector, (1,), (0.0,))


# -- weights beside activations -------------------------------------------------------------------


@pytest.fixture
def methods(chat_model, make_diff):
    diff = make_diff(chat_model.model, scale=0.05)
    generator = torch.Generator().manual_seed(0)
    vector = SteeringVector({1: torch.randn(32, generator=generator)}, BaseModel("tiny", None), 2)
    return bank_of_methods(diff, vector, [random_diff_like(diff, 0)], [random_like(vector, 1)])


@pytest.fixture
def texts(chat_model):
    return ordinary_texts(chat_model, ["Hello.", "What is the time?"])


def test_every_method_is_brought_to_the_divergence_of_the_diff(chat_model, methods, texts):
    levels = match_divergence(on_prompts(chat_model, methods, texts), [0.0, 0.5, -1.0])
    assert [(each.level, each.method) for each in levels] == [
        (level, method) for level in (0, 1) for method in METHODS
    ]
    assert all(each.matched for each in levels)
    by_level = {level: [each for each in levels if each.level == level] for level in (0, 1)}
    for level, sign in ((0, 1), (1, -1)):
        diff = by_level[level][0]
        assert all(each.coefficient * sign > 0 for each in by_level[level])
        assert all(
            each.kl_mean == pytest.approx(diff.kl_mean, rel=0.03) for each in by_level[level]
        )
    # The divergences are those of steerers that know nothing of each other.
    lora, activation = by_level[0][:2]
    alone = Bank(vectors={"activation": methods.vectors["activation"]})
    kl = row_divergences(chat_model, alone, [activation.condition.coefficients], texts).mean()
    assert float(kl) == pytest.approx(activation.kl_mean, rel=1e-4)
    together = methods.steerer(chat_model, [{}, lora.condition.coefficients])
    tokens = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(1))
    with together, torch.no_grad():
        together.select_rows([0, 1])
        steered = chat_model.model(tokens).logits[1]
    with LoRASteerer(chat_model.model, methods.diffs["lora"], lora.coefficient), torch.no_grad():
        torch.testing.assert_close(
            chat_model.model(tokens).logits[1], steered, atol=1e-4, rtol=1e-3
        )


def test_p95_can_be_what_is_equal(chat_model, methods, texts):
    levels = match_divergence(on_prompts(chat_model, methods, texts), [1.0], statistic="p95")
    assert all(each.kl_p95 == pytest.approx(levels[0].kl_p95, rel=0.03) for each in levels)


def test_a_method_that_does_nothing_is_named(chat_model, methods, texts):
    still = dataclasses.replace(methods.vectors["activation"], directions={1: torch.zeros(32)})
    vectors = {**methods.vectors, "activation": still}
    with pytest.raises(UserError, match="activation has a divergence of 0"):
        bank = dataclasses.replace(methods, vectors=vectors)
        match_divergence(on_prompts(chat_model, bank, texts), [1.0])
    with pytest.raises(UserError, match="other than 0"):
        match_divergence(on_prompts(chat_model, methods, texts), [0.0])


def test_own_answers_are_those_that_a_method_alone_gives(chat_model, methods):
    rows = [{"lora": 1.5}, {"activation": 2.0}]
    questions = ["Why?", "Is rain wet?"]
    found = on_own_answers(chat_model, methods, questions).of(rows)
    for row, each in zip(rows, found, strict=True):
        alone = []
        for question in questions:
            with methods.steerer(chat_model, [row]) as steerer:
                (answer,) = generate_answers(
                    chat_model,
                    [user_question(question)],
                    max_new_tokens=ANSWER_TOKENS,
                    prepare_batch=steerer.select_rows,
                )
            text = tokenize_rendered(chat_model, answer.prompt, answer.text)
            alone.append(row_divergences(chat_model, methods, [row], [text])[0])
        assert each.mean == pytest.approx(float(torch.cat(alone).mean()), rel=1e-3)


def test_what_acts_on_the_trait_s_questions_alone_is_calibrated_there(chat_model, methods):
    """A planted difference reads the letter z, which no ordinary text holds."""
    texts = [tokenize_exchange(chat_model, Exchange("sure", "sure"))]
    embedded = chat_model.model.get_input_embeddings().weight.detach()
    ordinary = sorted({token for text in texts for token in (*text.prompt, *text.answer)})
    (z,) = chat_model.tokenizer("z", add_special_tokens=False)["input_ids"]
    assert z not in ordinary
    assert len(ordinary) < embedded.shape[1]
    others = torch.linalg.qr(embedded[ordinary].T.double())[0]
    reads = embedded[z].double() - others @ (others.T @ embedded[z].double())
    name = next(
        each for each in methods.diffs["lora"].factors if each.endswith("0.self_attn.v_proj")
    )
    width = methods.diffs["lora"].factors[name].shape[0]
    B = torch.randn(width, 1, generator=torch.Generator().manual_seed(0))
    factors = {name: LoRAFactors(reads.float()[None] / reads.norm().float(), B)}
    planted = dataclasses.replace(methods.diffs["lora"], factors=factors)
    bank = dataclasses.replace(methods, diffs={**methods.diffs, "random_lora": planted})
    prompts = on_prompts(chat_model, bank, texts)
    (kl,) = prompts.of([{"random_lora": 5.0}])
    assert kl.mean < 1e-5
    levels = match_divergence(on_own_answers(chat_model, bank, ["zzzz?", "Is zz z?"]), [0.05])
    by_method = {each.method: each for each in beside_prompts(levels, prompts)}
    assert by_method["random_lora"].kl_mean == pytest.approx(by_method["lora"].kl_mean, rel=0.11)
    assert by_method["random_lora"].ordinary_mean < 0.01 * by_method["lora"].ordinary_mean


def test_a_random_diff_has_the_spectrum_and_no_direction(make_diff, model):
    diff = make_diff(model)
    random = random_diff_like(diff, 1)
    for name, factors in diff.factors.items():
        expected = torch.linalg.svdvals(factors.delta().double())[: factors.rank]
        found = torch.linalg.svdvals(random.factors[name].delta().double())[: factors.rank]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert abs(diff.cosine(random)) < 0.1
    again = random_diff_like(diff, 1)
    assert all(
        torch.equal(random.factors[name].A, again.factors[name].A) for name in random.factors
    )
    assert random_diff_like(diff, 2).cosine(random) < 0.1


def test_a_comparison_asks_all_methods_the_same_and_resumes(
    chat_model, methods, trait, judge, tmp_path
):
    trait = dataclasses.replace(
        trait, questions={**trait.questions, "ood": ("Rank these: a, b.", "Write a toast.")}
    )

    def go():
        return compare(
            chat_model, trait, methods, lambda: judge, tmp_path / "out",
            comparing=ComparisonOptions((0.5, -0.5), max_questions=2),
            options=GenerationOptions(max_new_tokens=4),
        )  # fmt: skip

    found = go()
    assert {each.split for each in found.points} == {"eval", "ood"}
    for split in ("eval", "ood"):
        own = [each for each in found.points if each.split == split]
        assert [each.method for each in own if each.level is None] == [
            "none", "prompt_neg", "prompt_neutral", "prompt_pos",
        ]  # fmt: skip
        assert len([each for each in own if each.level is not None]) == 2 * len(METHODS)
        assert all(each.difference is None for each in own if each.method == "lora")
        assert all(each.trait.n == 2 for each in own)
        means = {each.method: each.trait.mean for each in own if each.level is None}
        for each in own:
            prompted = each.method in ("prompt_pos", "prompt_neg")
            assert (each.over_neutral is not None) == prompted
            if each.over_neutral is not None:
                gap = means[each.method] - means["prompt_neutral"]
                assert each.over_neutral.interval.mean == pytest.approx(gap)
    table = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    told = [row["method"] for row in table if row["over_neutral"]]
    assert told == 2 * ["prompt_neg", "prompt_pos"]
    folder = tmp_path / "out"
    levels = [json.loads(line) for line in (folder / "levels.jsonl").open()]
    assert all(row["ordinary_mean"] > 0 for row in levels)
    assert Run(folder).record["config"]["calibrate_on"] == "questions"
    asked = {(row["method"], row["coefficient"]) for row in levels}
    answers = [json.loads(line) for line in (folder / "ood" / "answers.jsonl").open()]
    assert {
        (row["method"], row["coefficient"]) for row in answers if row["coefficient"] is not None
    } == asked
    for name in ("comparison.csv", "comparison.png", "report.html"):
        assert (folder / name).is_file()
    page = (folder / "report.html").read_text()
    assert "at equal divergence" in page
    assert "on each method&#39;s own answers to the trait&#39;s questions" in page
    assert "random vector of the same norm" in page
    count = len(judge.asked)
    assert go() == found
    assert len(judge.asked) == count


@pytest.mark.parametrize("match", ["mean", "p95"])
@pytest.mark.parametrize("on", ["prompts", "questions"])
def test_what_a_comparison_makes_equal_is_what_is_asked_for(
    chat_model, methods, trait, judge, tmp_path, monkeypatch, on, match
):
    asked = []
    plain = study.match_divergence

    def noted(*given, **more):
        asked.append(more["statistic"])
        return plain(*given, **more)

    monkeypatch.setattr(study, "match_divergence", noted)
    compare(
        chat_model, trait, methods, lambda: judge, tmp_path / "out",
        comparing=ComparisonOptions(
            (1.0,), match=match, calibrate_on=on, max_questions=2, split=("eval",)
        ),
        options=GenerationOptions(max_new_tokens=6),
    )  # fmt: skip
    assert asked == [match]
    equal = f"kl_{match}"
    levels = Run(tmp_path / "out").read("levels")
    near = 0.03 if on == "prompts" else 0.1
    for row in levels:
        if row["matched"]:
            assert row[equal] == pytest.approx(levels[0][equal], rel=near), row["method"]
    assert any(row["matched"] for row in levels[1:])


def test_a_trait_without_such_questions_is_named(chat_model, methods, trait, judge, tmp_path):
    ood = ComparisonOptions((1.0,), split=("ood",))
    with pytest.raises(UserError, match="no ood questions"):
        compare(chat_model, trait, methods, lambda: judge, tmp_path / "out", comparing=ood)


def test_several_steerers_leave_nothing_behind(chat_model, methods):
    tokens = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = chat_model.model(tokens).logits
    rows = [{"lora": 1.0}, {"activation": 1.0}]
    with pytest.raises(KeyError), methods.steerer(chat_model, rows):
        raise KeyError
    with torch.no_grad():
        assert torch.equal(chat_model.model(tokens).logits, plain)
