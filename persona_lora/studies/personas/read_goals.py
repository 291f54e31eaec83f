"""What a search for a goal found, in numbers and words.

Values are those of the goal (``goals``), higher is better; beside the mixes stand the unsteered
model and random mixes as long as the best. Reads rows; refuses to generate and to judge.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from persona_lora.core.chat import Condition
from persona_lora.core.options import ObjectiveOptions
from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.comparisons import ConditionFit, Row, frame, means
from persona_lora.report.correction import errors_of, kind_of, of_condition
from persona_lora.report.resampling import SCORES, Bounds, Interval
from persona_lora.report.scores import unfit_for, with_mark
from persona_lora.report.sections import Table
from persona_lora.studies.personas.read_fits import UNSTEERED, condition_fits, over_prompts

DISTANCE = Bounds(-100.0, 0.0)  # the scale of minus a distance between scores
RANDOM_MIX = "random_mix"
Config = Mapping[str, Any]  # of a run
RAW = (
    "Corrected for the judge’s error are answers of kinds that were rated: without steering, and "
    "under a trait’s own diff alone. How far other mixes are misjudged is not known; and a mean "
    "distance from a target is not put right by a mean error. Both are raw."
)


def targets_of(config: Config) -> dict[str, float]:
    """Return the targets that a run sought, by trait; {} where it sought something else."""
    return config["goal"].get("targets", {})


def is_front(config: Config) -> bool:
    """Return whether each target was an objective of its own."""
    return bool(config.get("goal", {}).get("pareto"))


def sought(config: Config) -> str:
    """Return in words what a run sought."""
    targets = ", ".join(f"{trait} {target:g}" for trait, target in targets_of(config).items())
    return targets or f"the highest {config['goal']['scorer']}"


def undominated(points: Sequence[Sequence[float]]) -> list[bool]:
    """Return which points ``[N, K]`` no other is at least as high as, and higher than in one."""
    own = np.asarray(points, dtype=float)
    return [not ((own >= each).all(axis=1) & (own > each).any(axis=1)).any() for each in own]


def goal_fits(
    rows: Sequence[Row],
    config: Config,
    limits: ObjectiveOptions,
    *,
    reference: str = UNSTEERED,
    value: str = "score",
) -> tuple[ConditionFit, ...]:
    """Return the mean value of every condition; ``value`` "second" is that by the second judge."""
    scale = DISTANCE if targets_of(config) else None
    told = [{**row, "score": row[value]} for row in rows]
    over = partial(over_prompts, scale=scale)
    return condition_fits(told, limits, reference=reference, over=over)


def trait_means(
    rows: Sequence[Row], parts: str = "parts", targets: Mapping[str, float] | None = None
) -> dict[str, dict[str, Interval]]:
    """Return the mean score of each trait under each condition; intervals over prompts.

    With ``targets`` the mean distance from them.
    """
    flat = [
        {
            "trait": trait,
            "condition": row["condition"],
            "prompt": row["prompt_id"],
            "score": score if targets is None or score is None else abs(score - targets[trait]),
        }
        for row in rows
        for trait, score in row[parts].items()
    ]
    found: dict[str, dict[str, Interval]] = {}
    for trait in sorted({row["trait"] for row in flat}):
        own = frame([row for row in flat if row["trait"] == trait], ["score"])
        by = means(own, by="condition", value="score", unit="prompt", scale=SCORES)
        found[trait] = {str(name): each for name, each in by.items()}
    return found


def judge_of(run: Run, traits: Collection[str], *, second: bool = False) -> str:
    """Return the name of a run's judge, or of its second one, and what of these it is unfit for."""
    name, file = ("second_judge", "second_validation") if second else ("judge", "validation")
    return with_mark(run.record["config"][name], traits, unfit_for(run.read(file)))


def goal_tables(rows: Sequence[Row], run: Run, limits: ObjectiveOptions) -> list[Table]:
    """Return every condition with its value and constraints; each trait's scores, where it has any.

    Of the second judge, which searched nothing, stand rows of its own. ``run`` tells what was
    sought, and how fit its judges are.
    """
    config = run.record["config"]
    digits = _digits(config)
    fits = goal_fits(rows, config, limits)
    columns = "condition | value [95%] | n | scored | change [95%] | pairs | p (Holm) | "
    cells = (
        [each.condition.replace("_", " "), wording.interval(each.fit, digits)]
        + [str(each.fit.n_questions), wording.percent(each.fit.coverage)]
        + [*wording.gap(each.difference, each.p_holm, digits)]
        + [wording.number(each.coherence.mean), wording.number(each.relevance.mean)]
        + [wording.number(each.kl, 3)]
        + ([] if limits.min_choice is None else [wording.number(each.choice)])
        + [wording.percent(each.feasible)]
        for each in fits
    )
    choice = "" if limits.min_choice is None else "choice, % | "
    columns += f"coherence | relevance | KL | {choice}keeps constraints"
    found = [Table.of(columns, cells, "held-out prompts")]
    traits = [
        [trait, f"{targets_of(config)[trait]:g}", judge_of(run, [trait], second=second)]
        + [wording.interval(scores.get(each.condition), 1) for each in fits]
        for parts, second in (("parts", False), ("second_parts", True))
        for trait, scores in trait_means(rows, parts).items()
    ]
    traits += [
        [trait, f"{targets_of(config)[trait]:g}", f"{judge_of(run, [trait])}, corrected"]
        + [wording.interval(right.get(each.condition), 1) for each in fits]
        for trait, right in corrected_means(rows, run).items()
    ]
    names = " | ".join(each.condition.replace("_", " ") for each in fits)
    title = "scores on held-out prompts"
    found += [_front_table(rows, config, limits)] if is_front(config) else []
    return [
        *found,
        *([Table.of(f"trait | target | judge | {names}", traits, title, RAW)] * bool(traits)),
    ]


def corrected_means(rows: Sequence[Row], run: Run) -> dict[str, dict[str, Interval]]:
    """Return the mean score of each trait under each condition, corrected for the judge's error.

    Of a trait whose kind of answers was rated: without steering, and under mixes of its own diff
    alone, all of one sign.
    """
    found: dict[str, dict[str, Interval]] = {}
    for trait, by in trait_means(rows).items():
        for condition, mean in by.items():
            kinds = {
                _kind(row["weights"], trait, run.record["config"]["directions"]["kind"])
                for row in rows
                if row["condition"] == condition
            }
            kind = kinds.pop() if len(kinds) == 1 else None
            right, _ = of_condition(kind, mean, None, errors_of(run, trait))
            if right is not None:
                found.setdefault(trait, {})[condition] = right
    return found


def _kind(weights: Mapping[str, float] | None, trait: str, directions: str) -> str | None:
    """Return what rated answers call a mix, asked about a trait; None where none is of it."""
    used = {name: weight for name, weight in (weights or {}).items() if weight}
    if used.keys() <= {trait}:
        method = {"lora": "lora", "vectors": "activation"}[directions]
        return kind_of(Condition(method, used.get(trait, 0.0)))
    return None


def front_means(rows: Sequence[Row], config: Config) -> dict[str, dict[str, Interval]]:
    """Return the mean distance from each target, by condition: the front, unsteered, random."""
    by = trait_means(rows, targets=targets_of(config))
    conditions = dict.fromkeys(row["condition"] for row in rows)
    return {name: {trait: by[trait][name] for trait in by} for name in conditions}


def front_held(rows: Sequence[Row], config: Config, limits: ObjectiveOptions) -> dict[str, bool]:
    """Return which mixes of a front no other mix and no control dominates on these rows' means.

    What breaks the constraints on them is in no front.
    """
    found = front_means(rows, config)
    broken = {each.condition for each in goal_fits(rows, config, limits) if each.feasible == 0}
    points = {
        name: [-math.inf if each.mean is None else -each.mean for each in by.values()]
        for name, by in found.items()
        if name not in broken
    }
    kept = dict(zip(points, undominated(list(points.values())), strict=True))
    return {n: kept.get(n, False) for n in found if n not in (UNSTEERED, RANDOM_MIX)}


def _front_table(rows: Sequence[Row], config: Config, limits: ObjectiveOptions) -> Table:
    """Return every mix of the front: its weights, and how far from each target it is."""
    found, held = front_means(rows, config), front_held(rows, config, limits)
    weights = {row["condition"]: row["weights"] for row in rows if row["condition"] in held}
    cells = (
        [name.replace("_", " "), *(wording.signed(value, 2) for value in weights[name].values())]
        + [wording.interval(each, 1) for each in found[name].values()]
        + ["yes" if held[name] else "no"]
        for name in held
    )
    mixed = " | ".join(f"weight of {trait}" for trait in next(iter(weights.values())))
    away = " | ".join(f"from {trait} {to:g} [95%]" for trait, to in targets_of(config).items())
    return Table.of(
        f"mix | {mixed} | {away} | still in the front", cells, "front, held-out prompts"
    )


def front_line(rows: Sequence[Row], config: Config, limits: ObjectiveOptions) -> str:
    """Say how much of a front is left on held-out prompts."""
    held = front_held(rows, config, limits)
    return (
        f"{len(held)} mixes stood in the front on training and on fresh prompts; "
        f"{sum(held.values())} of them still do on held-out ones, by their means."
    )


def goal_line(rows: Sequence[Row], run: Run, condition: str) -> str:
    """Say what a mix gains over the unsteered model and over random mixes, by both judges."""
    config = run.record["config"]
    traits = targets_of(config)

    def gain(reference: str, value: str = "score") -> str:
        fits = goal_fits(rows, config, ObjectiveOptions(), reference=reference, value=value)
        (found,) = (each.difference for each in fits if each.condition == condition)
        return wording.interval(found, _digits(config))

    mix = condition.replace("_", " ")
    said = f"On held-out prompts the {mix} gains {gain(UNSTEERED)} over the unsteered model"
    said += f" and {gain(RANDOM_MIX)} over random mixes of its length, by {judge_of(run, traits)}"
    if config["second_judge"] is None:
        return f"{said}."
    second = judge_of(run, traits, second=True)
    return f"{said}; by {second} {gain(UNSTEERED, 'second')} over the unsteered one."


def _digits(config: Config) -> int:
    return 1 if targets_of(config) else 3
