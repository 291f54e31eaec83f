"""The page of answers: what it says follows the numbers, and what is missing is named."""

from __future__ import annotations

import re

import numpy as np
import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.studies.read_seeds import SEED, effects_over
from persona_lora.studies.research_questions import write_research_questions

PLAIN = 50.0


@pytest.fixture
def write(tmp_path):
    """Write a run with rows by name below ``results``."""

    def make(place, config=None, command="made", inputs=None, **rows):
        with Run.open(
            tmp_path / "results" / place,
            command=command,
            config=config or {},
            seed=0,
            inputs=inputs or {},
        ) as run:
            for name, each in rows.items():
                run.write(name, each)

    return make


def answer(tmp_path):
    missing = write_research_questions(tmp_path / "results", tmp_path / "docs" / "results.md")
    return missing, (tmp_path / "docs" / "results.md").read_text()


def behaviour(write, trait, effects, seed=None, name=None):
    """A comparison at one level, with the effect of each method and a little noise by question."""
    rng = np.random.default_rng(seed or 0)
    made = {} if seed is None else {SEED: str(seed)}
    place = f"compare/{name or trait}" if seed is None else f"compare/{trait}/seed{seed}"
    places = [("none", None), *((method, 1.0) for method in effects)]
    answers, verdicts = [], []
    for method, coefficient in places:
        for question in range(12):
            row = len(answers)
            answers.append(
                {"row": row, "method": method, "coefficient": coefficient, "question_id": question}
            )
            score = PLAIN + effects.get(method, 0.0) + rng.normal()
            for criterion, value in ((trait, score), ("coherence", 90.0)):
                verdicts.append(
                    {"row": row, "criterion": criterion, "score": value, "judge": "planted"}
                )
    levels = [
        {"level": 0, "method": method, "coefficient": 1.0, "kl_mean": 0.1, "kl_p95": 0.3,
         "matched": method != "random"}
        for method in effects
    ]  # fmt: skip
    config = {"trait": trait, "statistic": "mean"}
    write(place, config, "compare", made, levels=levels, splits=[{"split": "eval"}])
    write(f"{place}/eval", answers=answers, verdicts=verdicts)


def test_an_empty_folder_has_no_answers(tmp_path):
    with pytest.raises(UserError, match=r"scripts/reproduce\.sh"):
        answer(tmp_path)


def test_who_steers_further_follows_the_effects(write, tmp_path):
    behaviour(write, "evil", {"lora": 30, "activation": 5, "random_lora": 0, "random": 0})
    behaviour(write, "kind", {"lora": 5, "activation": 30, "random_lora": 0, "random": 0})
    missing, page = answer(tmp_path)
    assert missing == ["prediction", "prevention", "latency", "personas", "sums", "spaces"]
    assert page.count("Not measured yet.") == 6
    text = " ".join(page.split())
    assert "**Yes.** At equal divergence" in text
    assert "in 2 of 2 comparisons (a trait, a set of questions) with weights, and in 2" in text
    assert "further in 1, activations in 1; 0 are equal within 5 points, 0 undecided" in text
    assert "2 of 8 coefficients missed theirs" in text
    assert (tmp_path / "docs" / "figures" / "same_traits.png").stat().st_size > 1000


def test_training_seeds_are_read_together_and_the_strongest_control_is_named(write, tmp_path):
    # The vector is ahead in two of three seeds; one of all random differences is as far as weights.
    for seed, weights in enumerate((30, 12, 14)):
        strays = {"random_lora": 0, "random_lora#2": 29 if seed == 1 else 1}
        planted = {"lora": weights, "activation": 16, **strays, "random": 0}
        behaviour(write, "evil", planted, seed)
    _, page = answer(tmp_path)
    text = " ".join(page.split())
    assert "Training seeds of each difference: 3." in text
    row = next(line for line in page.split("\n") if line.startswith("| Evil | held-out"))
    assert re.match(r"\| Evil \| held-out questions \| 1[89] \[", row)  # (30 + 12 + 14) / 3
    assert "(29)" in row.split(" | ")[4]
    further = "Weights steered clearly further in 0, activations in 0"
    assert f"{further}; 0 are equal within 5 points, 1 undecided" in text
    assert "- **Evil.** Exploratory, 3 seeds." in page
    assert "over 3 seeds (Holm)" in text.split("**Evil.**")[1]


def test_pooled_over_traits_takes_seeds_as_drawn(write, tmp_path):
    # Every question says that weights are ahead by 5; the seeds say by −5, 5 and 15.
    for seed, more in enumerate((-5, 5, 15)):
        for trait in ("evil", "kind"):
            both = {"lora": 20 + more, "activation": 20, "random_lora": 0, "random": 0}
            behaviour(write, trait, both, seed)
    _, page = answer(tmp_path)
    pooled = next(line for line in page.split("\n") if "| held-out questions | effect |" in line)
    assert "| 5 [" in pooled
    assert "undecided" in pooled


def test_traits_together_say_what_each_alone_cannot(write, tmp_path):
    behaviour(write, "evil", {"lora": 31, "activation": 30, "random_lora": 0, "random": 0})
    _, page = answer(tmp_path)
    assert "together" not in page  # one trait has nothing to be pooled with
    behaviour(write, "kind", {"lora": 33, "activation": 30, "random_lora": 0, "random": 0})
    _, page = answer(tmp_path)
    pooled = next(line for line in page.split("\n") if "| held-out questions | effect |" in line)
    assert "| 2 [" in pooled  # (1 + 3) / 2
    assert "more with weights" in pooled
    assert (
        "| held-out questions | coherence | 0 [not known: all equal] | 1.000 | undecided |" in page
    )


def test_another_comparison_of_a_trait_is_a_row_of_its_own_and_no_trait_more(write, tmp_path):
    none = {"random_lora": 0, "random": 0}
    behaviour(write, "evil", {"lora": 30, "activation": 30, **none}, name="evil_layer28")
    _, page = answer(tmp_path)  # alone, too
    behaviour(write, "evil", {"lora": 30, "activation": 10, **none})
    behaviour(write, "kind", {"lora": 31, "activation": 30, **none})
    _, page = answer(tmp_path)
    rows = [line.split(" | ")[3] for line in page.split("\n") if "| held-out questions |" in line]
    assert [row.split(" ")[0] for row in rows[:2]] == ["10", "30"]
    assert "| Evil layer28 | held-out questions |" in page
    assert "all 2 traits together" in page
    pooled = next(line for line in page.split("\n") if "| held-out questions | effect |" in line)
    assert re.search(r"\| 1[01] \[", pooled)  # (20 + 1) / 2: the 0 of the other layer is not in it


def test_an_effect_of_nothing_is_no_yes(write, tmp_path):
    behaviour(write, "evil", {"lora": 30, "activation": 0, "random_lora": 0, "random": 0})
    _, page = answer(tmp_path)
    assert "**Not in every case.**" in page


@pytest.mark.parametrize(("seeds", "slight"), [((None,), 1.0), ((0, 1, 2), 0.8)])
def test_whether_a_trait_was_moved_is_decided_by_the_test_corrected_over_all_comparisons(
    write, tmp_path, seeds, slight
):
    # Each interval of the vector's effects excludes 0, and each p alone is under 0.05. Holm's
    # correction over both traits takes the smaller of the two, which are equal, times two.
    for trait in ("evil", "kind"):
        for seed in seeds:
            planted = {"lora": 30, "activation": slight, "random_lora": 0, "random": 0}
            behaviour(write, trait, planted, seed)
    runs = [Run(each.parent) for each in (tmp_path / "results/compare/evil").rglob("splits.jsonl")]
    effect = effects_over(sorted(runs, key=lambda run: run.folder))["eval", "activation"]
    assert effect.effect.low > 0
    assert 0.025 < effect.effect_p < 0.05
    _, page = answer(tmp_path)
    text = " ".join(page.split())
    assert "**Not in every case.**" in text
    assert "in 2 of 2 comparisons (a trait, a set of questions) with weights, and in 0 with" in text
    assert "Holm over these 4 tests" in text
    rows = [line.split(" | ") for line in page.split("\n") if "| held-out questions |" in line]
    assert {row[3].rpartition(" ")[2] for row in rows[:2]} == {f"{2 * effect.effect_p:.3f}"}


def test_effects_without_a_test_are_not_counted_as_tests(write, tmp_path):
    # Two seeds of evil are too few for a test over both; kind has one.
    planted = {"lora": 30, "activation": 20, "random_lora": 0, "random": 0}
    for seed in (0, 1):
        behaviour(write, "evil", planted, seed)
    behaviour(write, "kind", planted)
    _, page = answer(tmp_path)
    text = " ".join(page.split())
    assert "in 1 of 2 comparisons" in text
    assert "Holm over these 2 tests; 2 effects have no test, and count as not above 0" in text


@pytest.mark.parametrize(("noise", "said"), [(0.01, "**Yes.**"), (100.0, "**Not shown here.**")])
def test_prediction_is_judged_by_its_interval(write, tmp_path, noise, said):
    rng = np.random.default_rng(1)
    judged = [{"finetune": "base", "trait": trait, "score": 10.0} for trait in ("evil", "kind")]
    predictors = []
    for trait in ("evil", "kind"):
        for number, x in enumerate(rng.normal(size=12)):
            name, score = f"f{number}", 10 + x + noise * rng.normal()
            judged.append({"finetune": name, "trait": trait, "score": score})
            for kind, direction, value in (
                ("weights", trait, x), ("activations", trait, rng.normal()),
                ("random", f"{trait}#0", rng.normal()),
            ):  # fmt: skip
                predictors.append(
                    {"finetune": name, "direction": direction, "kind": kind, "value": value}
                )
    write("prediction", judged=judged, predictors=predictors)
    _, page = answer(tmp_path)
    assert said in page
    assert "Over 12 finetunes of 12 data sets" in " ".join(page.split())


@pytest.mark.parametrize(
    ("noise", "said"),
    [(0.05, "worse than"), (1.0, "no better than"), (20.0, "better than")],
)
def test_weights_are_held_against_the_training_text(write, tmp_path, noise, said):
    rng = np.random.default_rng(2)
    judged = [{"finetune": "base", "trait": "evil", "score": 10.0}]
    predictors = []
    for number, x in enumerate(rng.normal(size=30)):
        name, score = f"f{number}", 10 + x + rng.normal()
        judged.append({"finetune": name, "trait": "evil", "score": score})
        for kind, value in (("weights", x), ("training text", score + noise * rng.normal())):
            predictors.append({"finetune": name, "direction": "evil", "kind": kind, "value": value})
    write("prediction", judged=judged, predictors=predictors)
    _, page = answer(tmp_path)
    assert f"By this measure weights are {said} the mean score" in " ".join(page.split())


def test_prevention_names_what_is_clearly_lower(write, tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"condition": model, "task": task, "metric": metric, "item": item, "score": value}
        for model, trait in (("plain", 80.0), ("weights1", 20.0), ("ablated", 80.5))
        for task, metric, mean in (
            ("trait", "score", trait),
            ("task loss", "nats", 3.0),
            ("choice", "acc", 0.6),
            ("choice", "acc_norm", 0.7),
        )
        for item, value in enumerate(mean + rng.normal(size=14))
    ]
    for model in ("plain", "weights1", "ablated"):
        write(f"prevention/evil/answers/{model}", {"model": "m"})
    write("prevention/evil", {"trait": "evil"}, measures=rows)
    _, page = answer(tmp_path)
    assert "interval and corrected p:\nweights1." in page
    assert "**Prevented?** (Evil) Exploratory" in page
    assert "| choice: acc_norm | ablated | " in page
    assert "| trait | weights1 | 20 [" in page
    assert "corrected for the judge" not in page  # nothing was rated
    # The judge gives finetunes 10 too little, so that prevention left 10 more than it seems.
    for model, score in (("base", 20.0), ("plain", 80.0), ("weights1", 20.0)):
        rated = [
            {"model": "m", "condition": kind, "question": f"q{at}", "rating": 50.0,
             "score": 50.0 - error + at % 2}
            for kind, error in (("unsteered", 0), ("finetuned", 10))
            for at in range(6)
        ]  # fmt: skip
        answers = [
            {"row": at, "method": "none", "coefficient": None, "question_id": at}
            for at in range(14)
        ]
        verdicts = [
            {"row": at, "criterion": "evil", "score": score + rng.normal(), "judge": "j"}
            for at in range(14)
        ]
        write(
            f"prevention/evil/answers/{model}", {"model": "m"}, answers=answers, verdicts=verdicts,
            validation=[{"criterion": "evil", "judge": "j", "own": {"compared": rated}}],
        )  # fmt: skip
    rows.extend({**row, "condition": "base", "score": 20.0} for row in rows[:14])
    write("prevention/evil", {"trait": "evil"}, measures=rows)
    _, page = answer(tmp_path)
    assert re.search(r"\| plain − base \| \+60 \[.*\] \| \+70 \[", page)
    assert re.search(r"\| weights1 − base \| 0 \[.*\] \| \+10 \[", page)
    assert "weights1 − plain" not in page  # the same error on both sides


@pytest.mark.parametrize(
    ("merged", "said"),
    [(1.0, "merged weights is as fast as the base"), (1.5, "differs from the base in speed")],
)
def test_merged_is_called_as_fast_only_where_its_interval_is(write, tmp_path, merged, said):
    slower = {"base": 1.0, "merged": merged, "live": 1.4}
    timings = [
        {"variant": variant, "batch": 8, "round": at, "first_token": factor * noise,
         "tokens_per_second": 100 / (factor * noise)}
        for variant, factor in slower.items()
        for at, noise in enumerate((1.01, 0.99, 1.0) if variant == "base" else (1.0, 1.0, 1.0))
    ]  # fmt: skip
    times = [
        {"what": "merge", "unit": "s", "value": 0.5},
        {"what": "merged", "unit": "bytes", "value": 3 * 2**20},
        {"what": "activations", "unit": "bytes", "value": 2304},
    ]
    write("compare/evil/latency", timings=timings, times=times)
    _, page = answer(tmp_path)
    assert said in page
    assert "| merge | 500 ms |" in page
    assert "| kept beside the model, merged | 3 MiB |" in page
    assert "| kept beside the model, activations | 2.2 KiB |" in page
    assert "over 3 rounds" in page


@pytest.mark.parametrize(("gain", "said"), [(2.0, "**Yes.**"), (0.0, "**Not shown here.**")])
def test_a_mix_that_speaks_like_the_person_also_says_what_it_pays(write, tmp_path, gain, said):
    rng = np.random.default_rng(0)
    rows = [
        {"persona": f"p{person}", "condition": condition, "prompt_id": prompt, "prompt": "Hi?",
         "answer": "Yes.", "score": fit + rng.normal() / 4, "coherence": 90.0,
         "relevance": relevance, "weights": {"calm": 1.0} if condition == "lora" else None}
        for condition, fit, relevance in (
            ("none", 2.0, 94.0), ("lora", 2.0 + gain, 66.0), ("random", 2.0 + gain / 2, 66.0)
        )
        for person in range(12)
        for prompt in range(3)
    ]  # fmt: skip
    write("personas/comparison", held_out=rows)
    _, page = answer(tmp_path)
    assert said in page
    assert re.search(r"It is 66 \[\d+, \d+\] for the mix and\s94 \[\d+, \d+\] unsteered\.", page)
    assert "over\n12 personas. Against random search of the same budget it is " in page
    beyond = re.search(r"the same budget it is (−?[\d.]+) \[", page)[1].replace("−", "-")
    assert float(beyond) == pytest.approx(gain / 2, abs=0.2)
    assert "Exploratory. One seed. WARNING: without floors" in page


@pytest.mark.parametrize(
    ("own", "said"),
    [(0.6, "simpler; but what 3 of 3 differences"), (0.1, "and only what 0 of 3 differences")],
)
def test_spaces_say_whether_vectors_tell_the_traits(write, tmp_path, own, said):
    traits = ("evil", "kind", "wry")
    pairs = [(one, other) for one in traits for other in traits]
    shifts = [
        {"trait": one, "other": other, "layer": 3, "cosine": own if one == other else 0.2}
        for one, other in pairs
    ]
    spectra = [
        {"trait": trait, "module": f"model.layers.3.{part}.{kind}", "layer": 3, "kind": kind,
         "norm": norm, "rank": 8,
         "top_share": 0.5, "effective_rank": 4.0}
        for trait in traits
        for part, kind, norm in (("self_attn", "q_proj", 1.0), ("mlp", "up_proj", 3.0))
    ]  # fmt: skip
    both = [(m, *pair) for m in ("weights", "activations") for pair in pairs]
    write(
        "compare/evil/spaces",
        {"layer": 3},
        shifts=shifts,
        spectra=spectra,
        cosines=[
            {"trait": one, "other": other, "weights": 0.1, "activations": 0.2}
            for one, other in pairs if one < other
        ],
        agreement=[{"rho": 0.5, "p": 0.04, "n": 3}],
        interference=[
            {"method": m, "steered": one, "read": other, "value": 1.0 if one == other else 0.25}
            for m, one, other in both
        ],
        linearity=[{"method": m, "trait": o, "other": p, "residual": 0.3} for m, o, p in both],
    )  # fmt: skip
    missing, page = answer(tmp_path)
    assert "spaces" not in missing
    assert "sums" not in missing
    assert said in page
    assert "| 10%, 90% |" in page
    assert "| weights | 0.30 [0.30, 0.30] | 6 | 0.25 [0.25, 0.25] | 6 |" in page
