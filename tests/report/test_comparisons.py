"""Paired comparisons: every number is what was recorded, so that none changes unseen."""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from pathlib import Path

import numpy as np
import pytest

from persona_lora.core.runs import Run
from persona_lora.report.comparisons import (
    compare_runs,
    fits_over_personas,
    fits_over_prompts,
    measure_tables,
    score_items,
)
from persona_lora.report.two_way import crossed_mean
from persona_lora.studies.steering.read import comparison_table, verdict_lines
from persona_lora.studies.steering.read_comparison import pooled, read_comparison

RECORDED = Path(__file__).with_name("recorded_comparisons.json")


def numbers(value):
    """Return nested plain values of results."""
    if is_dataclass(value):
        return numbers(asdict(value))
    if isinstance(value, dict):
        return {name: numbers(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [numbers(each) for each in value]
    return value


def flat(value, place=""):
    """Return every leaf with the path to it."""
    if isinstance(value, dict):
        return [leaf for name in value for leaf in flat(value[name], f"{place}/{name}")]
    if isinstance(value, list):
        return [leaf for at, each in enumerate(value) for leaf in flat(each, f"{place}/{at}")]
    return [(place, value)]


def scores(rng, level, holes):
    value = float(np.clip(level + 6 * rng.normal(), 0, 100))
    return None if rng.random() < holes else value


def evaluated(folder, name, level, seed):
    """A run of evaluate: questions in no order, some asked twice, some answers not scored."""
    rng = np.random.default_rng(seed)
    run = Run.open(folder / name, command="evaluate", config={"trait": "evil"}, seed=0)
    asked = [int(each) for each in rng.permutation(np.repeat(np.arange(9), 2))]
    answers = [
        {"row": row, "method": "none", "question_id": each, "question": f"q{each}"}
        for row, each in enumerate(asked)
    ]
    run.write("answers", answers)
    run.write(
        "verdicts",
        [
            {"row": row, "criterion": criterion, "score": scores(rng, middle, 0.2), "judge": "one"}
            for row in range(len(asked))
            for criterion, middle in (("evil", level), ("coherence", 85.0))
        ],
    )
    return run


def items():
    rng = np.random.default_rng(1)
    return [
        {"condition": model, "task": task, "metric": metric, "item": item, "score": level + noise}
        for model, shift in (("plain", 0.0), ("added", -3.0), ("short", 1.0))
        for task, metric, middle in (("trait", "score", 50.0), ("choice", "acc", 0.5))
        for item in rng.permutation(9 if model == "short" else 16).tolist()
        for level, noise in [(middle + shift, float(rng.normal()))]
    ]


def held_out():
    rng = np.random.default_rng(2)
    return [
        {"persona": f"p{person}", "condition": condition, "prompt_id": prompt,
         "score": score and 1 + score / 25, "coherence": scores(rng, 85.0, 0.05),
         "relevance": scores(rng, 60.0, 0.0)}
        for condition, level in (("lora", 60.0), ("none", 40.0), ("prompt", 70.0))
        for person in rng.permutation(6).tolist()
        for prompt in rng.permutation(5).tolist()
        for score in [scores(rng, level, 0.1)]
    ]  # fmt: skip


EFFECTS = {"lora": 25, "activation": 15, "random_lora": 3, "random": -2}


def compared(folder, trait, seed, effects=EFFECTS, questions=(7, 5)):
    """A run of compare, of two sets of questions and two levels of either sign."""
    rng = np.random.default_rng(seed)
    coefficients = (-1.0, 0.5)
    steered = [(method, c) for c in coefficients for method in effects]
    with Run.open(
        folder / trait, command="compare", config={"trait": trait, "statistic": "mean"}, seed=0
    ) as run:
        run.write("splits", [{"split": "eval"}, {"split": "ood"}])
        run.write(
            "levels",
            [
                {"level": at // len(effects), "method": method, "coefficient": c,
                 "kl_mean": abs(c) / 10, "kl_p95": abs(c) / 3, "matched": True}
                for at, (method, c) in enumerate(steered)
            ],
        )  # fmt: skip
    for split, count in zip(("eval", "ood"), questions, strict=True):
        asked = [
            (method, c, question)
            for method, c in [("none", None), ("prompt_pos", None), *steered]
            for question in rng.permutation(np.repeat(np.arange(count), 2)).tolist()
        ]
        part = Run.open(folder / trait / split, command="evaluate", config={}, seed=0)
        part.write(
            "answers",
            [
                {"row": row, "method": method, "coefficient": c, "question_id": question}
                for row, (method, c, question) in enumerate(asked)
            ],
        )
        part.write(
            "verdicts",
            [
                {"row": row, "criterion": criterion, "score": scores(rng, middle, 0.1)}
                for row, (method, c, _) in enumerate(asked)
                for criterion, middle in (
                    (trait, 50 + effects.get(method, 0) * (c or 0)),
                    ("coherence", 88.0),
                )
            ],
        )
    return run


def everything(folder):
    runs = [evaluated(folder, name, level, at) for at, (name, level) in enumerate(
        (("plain", 40.0), ("one", 55.0), ("two", 42.0)))]  # fmt: skip
    comparisons = [compared(folder, trait, at) for at, trait in enumerate(("evil", "kind"))]
    rows = held_out()
    return numbers(
        {
            "runs": compare_runs(runs[1:], runs[0]),
            "items": score_items(items(), "plain"),
            "over prompts": fits_over_prompts(rows, "none"),
            "over personas": fits_over_personas(rows, "none"),
            "comparison": read_comparison(comparisons[0]),
            "pooled": pooled([[each] for each in comparisons]),
        }
    )


def test_numbers_are_those_that_were_recorded(tmp_path):
    found, recorded = flat(everything(tmp_path)), flat(json.loads(RECORDED.read_text()))
    assert [place for place, _ in found] == [place for place, _ in recorded]
    for (place, value), (_, wanted) in zip(found, recorded, strict=True):
        # Within what another machine's linear algebra rounds differently.
        exact = not isinstance(wanted, float)
        assert value == (wanted if exact else pytest.approx(wanted, rel=1e-12, abs=1e-12)), place


# -- several random controls ---------------------------------------------------------------------

# As effective as the diff on average; the first by chance is not.
CONTROLS = {"random_lora": 0, "random_lora#2": 22, "random_lora#3": 40, "random_lora#4": 38}


def test_several_controls_are_drawn_and_one_is_taken_for_all(tmp_path):
    effects = {"lora": 25, "activation": 15}
    one = compared(tmp_path / "one", "evil", 3, {**effects, "random_lora": 0})
    four = compared(tmp_path / "four", "evil", 3, {**effects, **CONTROLS})
    alone, together = (
        next(
            each
            for each in read_comparison(run).overall
            if (each.split, each.method) == ("eval", "random_lora")
        )
        for run in (one, four)
    )
    assert alone.p < 0.05
    assert alone.least is None
    assert together.p > 0.2  # whatever the questions say of the first one
    assert together.draws == 4
    assert together.effect.mean == pytest.approx(25 * 0.75, abs=4)
    assert together.least == pytest.approx(0, abs=4)
    assert together.most == pytest.approx(30, abs=4)
    widths = [each.difference.high - each.difference.low for each in (alone, together)]
    assert widths[1] > 3 * widths[0]


def test_a_diff_beyond_all_controls_is_found(tmp_path):
    controls = {name: effect / 10 for name, effect in CONTROLS.items()}
    effects = {"lora": 25, "activation": 15, **controls}
    found = read_comparison(compared(tmp_path, "evil", 4, effects, (12, 12)))
    beyond = next(each for each in found.overall if each.draws == 4)
    assert beyond.p_holm < 0.01
    assert beyond.difference.low > 5
    points = [each for each in found.points if each.method == "random_lora"]
    assert [each.draws for each in points] == [4] * 4  # two levels, two sets of questions
    assert all(0 <= each.trait.low <= each.trait.mean <= each.trait.high <= 100 for each in points)
    assert (comparison_table(found).rows[2][1] or "").endswith("spectrum, mean of 4")
    assert ", mean of 4, held-out questions" in verdict_lines(found)[-1]


@pytest.mark.parametrize(
    ("effects", "first"),
    [
        ({"lora": 40, "activation": 30, "random_lora": 0, "random": 0}, "weights steered further:"),
        ({"lora": 40, "activation": 5, "random_lora": 40, "random": -20}, "weights did not"),
        ({"lora": 40, "activation": 30, "random_lora": 0, "random": 30}, "activations did not"),
        ({"lora": 5, "activation": 0, "random_lora": 45, "random": -40}, "weights steered less"),
    ],
)
def test_the_first_line_begins_with_what_was_planted_beside_random_controls(
    tmp_path, effects, first
):
    found = read_comparison(compared(tmp_path, "evil", 5, effects, (12, 12)))
    assert verdict_lines(found)[0].split("divergence, ")[1].startswith(first)
    gaps = {each.method: each for each in found.overall if each.split == "eval"}
    assert gaps["random"].vector_gap.mean == pytest.approx(
        gaps["activation"].effect.mean - gaps["random"].effect.mean
    )
    least, beside = (
        min(p for one in found.overall if (p := getattr(one, each)) is not None)
        for each in ("p_holm", "vector_p")
    )
    assert least == 6 * 2 / 2**12  # three tests on each of two sets of questions are one family
    assert beside >= 2 * 2 / 2**12  # those of the vector another
    if first.startswith("weights steered further"):
        assert beside == 2 * 2 / 2**12


def test_probes_stand_in_columns_paired_by_question_and_the_rest_below():
    level = {"plain": (90, 80, 5.0), "live": (0, 70, 5.0)}
    rows = [
        {"condition": model, "task": task, "metric": metric, "item": item, "score": score + item}
        for item in range(10)
        for model, (trait, negated, loss) in level.items()
        for task, metric, score in (
            *(("trait", "score", trait), ("trait, negated", "score", negated)),
            *(("task loss", "nats", loss), ("three_items", "score", 100 * (item % 2))),
        )
    ]
    crossed, rest = measure_tables(score_items(rows, "plain"))
    assert (crossed.title, crossed.columns) == ("trait", ("model", "plain", "negated"))
    plain, live = crossed.rows
    assert [cell.split(" [")[0] for cell in plain] == ["plain", "94", "84"]
    assert ";" not in "".join(plain)  # the first model is compared with nothing
    assert [cell.split("; ")[1] for cell in live[1:]] == [
        f"−{gap} [not known: all equal]*" for gap in (90, 10)
    ]
    said = {row[0]: row[2].split(" [")[0] for row in rest.rows if row[1] == "plain"}
    assert said == {"task loss": "9.50", "three_items": "54"}  # nats, and points of a hundred
    only = [row for row in rows if row["task"] == "trait"]
    (table,) = measure_tables(score_items(only, "plain"))
    assert table.columns[0] == "measure"


@pytest.mark.parametrize("seeds", [2, 3])
def test_seeds_are_paired_with_one_another_and_what_has_none_with_each(seeds):
    base, plain, live = np.random.default_rng(seeds).normal(5, 1, (3, seeds, 8))
    rows = [
        {"condition": name, "task": "loss", "metric": "nats", "item": item, "score": score, **place}
        for name, values in (("plain", plain), ("live", live), ("base", base[:1]))
        for seed, own in enumerate(values.tolist())
        for place in [{} if name == "base" else {"seed": f"seed{seed}"}]
        for item, score in enumerate(own)
    ]
    found = {each.condition: each for each in score_items(rows, "plain")}
    assert found["plain"].difference is None
    for name, gaps in (("live", live - plain), ("base", base[:1] - plain)):
        wanted, told = crossed_mean(gaps), found[name].difference
        assert (told.mean, told.low, told.high, found[name].p) == pytest.approx(
            (wanted.interval.mean, wanted.interval.low, wanted.interval.high, wanted.p)
        )
    assert found["live"].score.low == pytest.approx(crossed_mean(live).interval.low)


@pytest.mark.parametrize("alone", ["plain", "live"])
def test_what_has_no_seed_is_paired_with_every_seed_of_the_other(alone):
    rows = [
        {"condition": name, "task": "loss", "metric": "nats", "item": item, "seed": seed}
        | {"score": 1.0 * item + (name == "live") * (5 + (seed or 0) + item % 2)}
        for name in ("plain", "live")
        for seed in ([""] if name == alone else range(3))
        for item in range(8)
    ]
    found = {each.condition: each for each in score_items(rows, "plain")}
    gaps = np.array([[5 + s + item % 2 for item in range(8)] for s in range(3)])
    gaps = gaps if alone == "plain" else np.tile(gaps[:1], (3, 1))
    assert found["live"].difference.mean == pytest.approx(gaps.mean())
    assert found["live"].p < 0.05


def test_a_condition_without_a_score_has_none_over_seeds_either():
    rows = [
        {"condition": name, "task": "trait", "metric": "score", "item": item, "seed": seed}
        | {"score": None if name == "mute" else 10.0 * item + seed}
        for name in ("plain", "live", "mute")
        for seed in range(3)
        for item in range(5)
    ]
    found = {each.condition: each for each in score_items(rows, "plain")}
    assert found["mute"].score.mean is None
    assert found["mute"].difference.mean is None
    assert found["live"].score.mean == 21


def test_a_unit_counts_once_however_many_rows_it_has():
    """Else the mean and its interval could be of one sign and the test of the other."""
    gains = {"much": [1.2] * 80, **{f"little{at}": [-0.5 - at / 100] * 4 for at in range(15)}}
    rows = [
        {"persona": who, "condition": name, "prompt_id": at, "score": 3.0 + own * (name == "lora")}
        | {"coherence": None, "relevance": None}
        for who, each in gains.items()
        for at, own in enumerate(each)
        for name in ("none", "lora")
    ]
    plain, lora = fits_over_personas(rows, "none")
    assert lora.fit.mean - plain.fit.mean == pytest.approx(lora.difference.mean)
    means = [each[0] for each in gains.values()]
    assert lora.difference.mean == pytest.approx(np.mean(means))
    assert (lora.difference.mean < 0) == (lora.effect_size < 0)
    assert lora.difference.n == sum(map(len, gains.values()))


def test_a_rule_that_always_says_the_same_has_an_interval_all_the_same():
    rows = [
        {"condition": model, "task": "trait", "metric": "score", "item": item, "score": score}
        for item in range(10)
        for model, score in (("plain", 100.0), ("live", 0.0))
    ]
    plain, live = score_items(rows, "plain")
    assert (plain.score.mean, plain.score.high) == (100, 100)
    assert 70 < plain.score.low < 95
    assert (live.score.mean, live.score.low) == (0, 0)
    assert 5 < live.score.high < 30
    assert (live.difference.mean, live.difference.low) == (-100, -100)
    assert -95 < live.difference.high < -40
    low = [{**row, "score": 1.0} for row in rows]
    plain, live = score_items(low, "plain")
    assert 15 < plain.score.high < 30
    assert live.difference.high is None  # 1 is no end of a scale to 100
    right = [{**row, "metric": "acc", "score": 0.0} for row in rows]
    _, live = score_items(right, "plain")
    assert live.difference.mean == 0
    assert -0.5 < live.difference.low < -0.1
    assert 0.1 < live.difference.high < 0.5


@pytest.mark.parametrize("seeds", [("",), ("seed0", "seed1", "seed2")])
def test_scores_over_seeds_that_lie_far_apart_stay_on_their_scale(seeds):
    rng = np.random.default_rng(0)
    rows = [
        {"condition": name, "seed": seed, "task": "coherence", "metric": "score",
         "item": item, "score": float(np.clip(level + shift + rng.normal(0, 5), 0, 100))}
        for name, shift in (("plain", 0), ("held", 3))
        for seed, level in zip(seeds, (5.0, 50.0, 95.0), strict=False)
        for item in range(8)
    ]  # fmt: skip
    plain, held = score_items(rows, "plain")
    for each in (plain.score, held.score):
        assert 0 <= each.low < each.mean < each.high <= 100
