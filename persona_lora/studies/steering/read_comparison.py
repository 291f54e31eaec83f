"""Methods at equal divergence: how far each moved the trait, and what it did to coherence.

Reads the rows of a comparison: ``levels`` (method, coefficient, divergence) and, a run a split, the
answers and verdicts. An effect is signed by what was asked for: with a negative coefficient less of
the trait is more effect. Differences are paired by question. What steering costs in time is read
here too: timings against the plain model, paired within rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import t as student

from persona_lora.core.chat import COHERENCE, Condition
from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.comparisons import GAP_COLUMNS, columns_of, write_found
from persona_lora.report.correction import (
    UNSTEERED,
    Errors,
    corrected_columns,
    errors_of,
    kind_of,
    less,
    put_right,
)
from persona_lora.report.correction_tables import effects_table
from persona_lora.report.curve import PairedDifference, corrected, gaps_between
from persona_lora.report.resampling import SCORES, Bounds, Interval, bootstrap_mean, holm
from persona_lora.report.scores import (
    JUDGE,
    NEUTRAL,
    PROMPTS,
    SECOND,
    Cluster,
    Row,
    grouped,
    judges_of,
    method_of,
    minus,
    question_means,
)
from persona_lora.report.sections import Table
from persona_lora.report.two_way import mean_gap, mean_over_draws

LORA, ACTIVATION, RANDOM_LORA, RANDOM = "lora", "activation", "random_lora", "random"
METHODS = (LORA, ACTIVATION, RANDOM_LORA, RANDOM)
EFFECT = "effect"
OF_THE_TRAIT = columns_of(
    *("trait=trait.mean", "trait_low=trait.low", "trait_high=trait.high", "n=trait.n"),
    *("coverage=trait.coverage", *GAP_COLUMNS),
    *("over_neutral=over_neutral.interval.mean", "over_neutral_low=over_neutral.interval.low"),
    *("over_neutral_high=over_neutral.interval.high", "over_neutral_p=over_neutral.p"),
    *("over_neutral_p_holm=over_neutral.p_holm", JUDGE),
) | corrected_columns("trait", "difference")
COLUMNS = {
    **columns_of(
        *("split", "level", "method", "coefficient", "kl_mean", "kl_p95", "matched"),
        *("ordinary_mean", "ordinary_p95", "coherence=coherence.mean"),
        *("coherence_low=coherence.low", "coherence_high=coherence.high"),
    ),
    **OF_THE_TRAIT,
}
Place = tuple[str, float | None]


@dataclass(frozen=True)
class Point:
    """One method at one level, on the questions of one split.

    Of several random controls, ``draws``, everything is a mean over them, its interval over
    controls and questions, both drawn. ``difference`` is the effect of the diff minus the effect
    of this method, paired by question; ``p`` a two-sided test (``two_way.mean_gap``), ``p_holm``
    corrected over all points. None for the diff itself, for the unsteered
    model and for prompts, which are at no level. ``ordinary_mean`` and ``ordinary_p95`` are on
    ordinary prompts, where the divergence elsewhere was made equal. ``over_neutral`` is a trait's
    own system prompt minus neutral ones, a family of tests of its own. ``judge`` names who judged,
    and what ends in ``_corrected`` is corrected for its error, None where nothing corrects it.
    """

    split: str
    level: int | None
    method: str
    coefficient: float | None
    kl_mean: float | None
    kl_p95: float | None
    matched: bool | None
    trait: Interval
    coherence: Interval
    difference: Interval | None = None
    p: float | None = None
    p_holm: float | None = None
    ordinary_mean: float | None = None
    ordinary_p95: float | None = None
    draws: int = 1
    over_neutral: PairedDifference | None = None
    judge: str = ""
    trait_corrected: Interval | None = None
    difference_corrected: Interval | None = None


@dataclass(frozen=True)
class Overall:
    """A method's effect over all levels of a split, and what the diff has over it.

    ``effect`` is the change from the unsteered model in the direction asked for, ``effect_p`` its
    test, ``difference`` the diff's effect minus it, ``coherence`` the diff's coherence minus its:
    means over levels, paired by question. ``p`` is a two-sided test of the difference
    (``two_way.mean_gap``), ``p_holm`` corrected over methods and splits. Of several random
    controls, ``draws``, all are over controls and questions, both drawn; ``least`` and ``most``
    are the effects of the weakest and the strongest. Of random vectors, ``vector_gap`` is the
    vector's effect minus theirs, ``vector_p`` its test, corrected over splits.
    """

    split: str
    method: str
    effect: Interval
    difference: Interval | None
    coherence: Interval | None
    p: float | None
    p_holm: float | None = None
    draws: int = 1
    least: float | None = None
    most: float | None = None
    vector_gap: Interval | None = None
    vector_p: float | None = None
    effect_p: float | None = None


@dataclass(frozen=True)
class MethodEffect:
    """A method's effect over all levels, of one training seed or of several; as ``Overall``.

    ``most`` is the effect of the strongest of all random controls, ``judge`` who judged the trait.
    ``effect_p`` is corrected over whichever effects are read together, where it decides on one.
    """

    effect: Interval
    difference: Interval | None
    p_holm: float | None
    most: float | None = None
    effect_p: float | None = None
    judge: str = ""


@dataclass(frozen=True)
class Pooled:
    """Weights minus activations over several traits: in ``EFFECT``, or in coherence."""

    split: str
    what: str
    difference: Interval | None
    p_holm: float | None


@dataclass(frozen=True)
class Comparison:
    """All points of a comparison, and the methods over all levels.

    ``calibrated_on``: "questions" where the divergence of each method's own answers to the trait's
    questions was made equal, "prompts" where that on ordinary prompts was.
    """

    trait: str
    statistic: str
    points: tuple[Point, ...]
    overall: tuple[Overall, ...]
    calibrated_on: str = "prompts"


def read_comparison(run: Run, *, by: str = "verdicts") -> Comparison:
    """Return the statistics of a comparison's folder; raises UserError where nothing was asked.

    ``by`` is the file of the verdicts on the trait; coherence is always the first judge's.
    """
    config, splits = run.record["config"], [*_splits(run, by)]
    if not splits or not splits[0].levels:
        raise UserError(f"{run.folder} holds no finished comparison; run compare again")
    points = corrected([point for each in splits for point in _points(each)])
    beyond = corrected([each.over_neutral for each in points if each.over_neutral is not None])
    tests = iter(beyond)
    points = [
        each if each.over_neutral is None else replace(each, over_neutral=next(tests))
        for each in points
    ]
    overall = [one for each in splits for one in _overall(each)]
    # The tests of the vector beside its controls are a family of their own.
    beside = holm([each.vector_p for each in overall])
    pairs = zip(corrected(overall), beside, strict=True)
    tested = tuple(points), tuple(replace(each, vector_p=p) for each, p in pairs)
    on = config.get("calibrate_on", "prompts")
    return Comparison(config["trait"], config["statistic"], *tested, on)


def write_points(run: Run, found: Comparison) -> None:
    """Write ``comparison.csv``: every point, with what a second judge says of the trait there."""
    both = any(Run(run.folder / row["split"]).read(SECOND) for row in run.read("splits"))
    second = read_comparison(run, by=SECOND).points if both else ()
    write_found(run.folder / "comparison.csv", COLUMNS, found.points, second, OF_THE_TRAIT)


@dataclass(frozen=True)
class _Split:
    """The levels of a comparison, and the scores of one split by place and question."""

    name: str
    levels: Sequence[Row]
    traits: Mapping[Place, Cluster]
    coherences: Mapping[Place, Cluster]
    judge: str
    errors: Errors

    @property
    def by_method(self) -> dict[str, list[Row]]:
        """The levels of every method, each random control one of its own."""
        return grouped(self.levels, lambda row: row["method"])

    def effects(self) -> dict[str, dict[int, float]]:
        """Return every method's mean effect over its levels, by question."""
        plain = self.traits["none", None]
        return {
            method: _mean_over([_gaps(self.traits[_place(row)], plain, row) for row in own])
            for method, own in self.by_method.items()
        }

    def coherence(self) -> dict[str, dict[int, float]]:
        """Return every method's mean coherence over its levels, by question."""
        return {
            method: _mean_over([question_means(self.coherences[_place(row)]) for row in own])
            for method, own in self.by_method.items()
        }


def _splits(run: Run, by: str = "verdicts") -> Iterator[_Split]:
    levels, trait = run.read("levels"), run.record["config"]["trait"]
    for row in run.read("splits"):
        part = Run(run.folder / row["split"])
        answers = {row["row"]: row for row in part.read("answers")}
        found: dict[str, dict[Place, Cluster]] = {trait: {}, COHERENCE: {}}
        for criterion, file in ((trait, by), (COHERENCE, "verdicts")):
            for verdict in part.read(file):
                if verdict["criterion"] == criterion:
                    answer = answers[verdict["row"]]
                    scores = found[criterion].setdefault(_place(answer), {})
                    scores.setdefault(answer["question_id"], []).append(verdict["score"])
        judge = judges_of(part.read(by), trait, COHERENCE)
        errors = errors_of(part, trait, by=by)
        yield _Split(row["split"], levels, found[trait], found[COHERENCE], judge, errors)


def _place(row: Row) -> Place:
    return row["method"], row["coefficient"]


def _points(split: _Split) -> list[Point]:
    traits, coherences = split.traits, split.coherences
    points = [
        Point(split.name, None, method, None, None, None, None,
              bootstrap_mean(traits[method, None], scale=SCORES),
              bootstrap_mean(coherences[method, None], scale=SCORES),
              over_neutral=_over_neutral(split, method), judge=split.judge)
        for method in ("none", *PROMPTS)
        if (method, None) in traits
    ]  # fmt: skip
    diffs = {row["level"]: row for row in split.levels if row["method"] == LORA}
    for own in grouped(split.levels, lambda row: (row["level"], method_of(row["method"]))).values():
        first = own[0]
        difference, p = None, None
        if first["method"] != LORA:
            diff = traits[_place(diffs[first["level"]])]
            difference, p = over_draws([_gaps(diff, traits[_place(row)], first) for row in own])
        points.append(
            Point(
                split.name, first["level"], method_of(first["method"]),
                _average(own, "coefficient"), _average(own, "kl_mean"), _average(own, "kl_p95"),
                all(row["matched"] for row in own),
                mean_over_draws([traits[_place(row)] for row in own]),
                mean_over_draws([coherences[_place(row)] for row in own]),
                difference, p,
                ordinary_mean=_average(own, "ordinary_mean"),
                ordinary_p95=_average(own, "ordinary_p95"), draws=len(own), judge=split.judge,
            )
        )  # fmt: skip
    return [_put_right(each, split) for each in points]


def _put_right(each: Point, split: _Split) -> Point:
    """Return a point with its trait, and what the diff has over it, corrected."""
    kinds = {
        method_of(row["method"]): _kind(row) for row in split.levels if row["level"] == each.level
    }
    own = kinds.get(each.method) or kind_of(Condition(each.method))
    weights: dict[str | None, float] = {}
    if each.difference is not None:  # in the direction that the level asks for
        sign = math.copysign(1.0, each.coefficient or 1.0)
        weights = less({kinds[LORA]: sign}, {own: sign})
    return replace(
        each,
        trait_corrected=put_right(each.trait, split.errors, {own: 1.0}, SCORES),
        difference_corrected=put_right(each.difference, split.errors, weights),
    )


def _kind(level: Row) -> str:
    """Return the kind of a level's condition; what is not rated has a name, so as not to cancel."""
    kind = kind_of(Condition(level["method"], level["coefficient"]))
    return kind or f"{level['method']} {level['coefficient']:+g}"


def _over_neutral(split: _Split, method: str) -> PairedDifference | None:
    neutral = split.traits.get((NEUTRAL, None))
    if neutral is None or method not in PROMPTS or method == NEUTRAL:
        return None
    gap, p = over_draws([gaps_between(split.traits[method, None], neutral)])
    return None if gap is None else PairedDifference(gap, p)


def _overall(split: _Split) -> list[Overall]:
    found = []
    effects, coherence = split.effects(), split.coherence()
    for method, names in grouped(effects, method_of).items():
        own = [effects[name] for name in names]
        gap, p, lost, vector_gap, vector_p = None, None, None, None, None
        if method != LORA:
            gap, p = over_draws([minus(effects[LORA], each) for each in own])
            lost, _ = over_draws([minus(coherence[LORA], coherence[name]) for name in names])
        if method == RANDOM:
            vector_gap, vector_p = over_draws([minus(effects[ACTIVATION], each) for each in own])
        effect, effect_p = mean_gap(own)
        each = sorted(float(np.mean(list(one.values()))) for one in own if one)
        least, most = (each[0], each[-1]) if len(each) > 1 else (None, None)
        tests = (gap, lost, p, None, len(own), least, most, vector_gap, vector_p)
        found.append(Overall(split.name, method, effect, *tests, effect_p))
    return found


def pooled(compared: Sequence[Sequence[Run]]) -> list[Pooled]:
    """Return the differences over comparisons of several traits, by set of questions.

    Each trait has one run, or one for every training seed. The units are the questions of all
    traits, and the seeds; that the traits are drawn is not allowed for.
    """
    gaps: dict[tuple[str, str], list[dict[Any, float]]] = {}
    seeds = min(map(len, compared))
    for trait, runs in enumerate(compared):
        for seed, run in enumerate(runs[:seeds]):
            for split in _splits(run):
                for what, by_method in ((EFFECT, split.effects()), (COHERENCE, split.coherence())):
                    each = gaps.setdefault((split.name, what), [{} for _ in range(seeds)])
                    gap = minus(by_method[LORA], by_method[ACTIVATION])
                    each[seed].update({(trait, question): own for question, own in gap.items()})
    tested = {place: over_draws(each) for place, each in gaps.items()}
    adjusted = holm([p for _, p in tested.values()])
    return [
        Pooled(split, what, difference, p)
        for ((split, what), (difference, _)), p in zip(tested.items(), adjusted, strict=True)
    ]


def effects_of(run: Run, *, by: str = "verdicts") -> dict[tuple[str, str], Mapping[int, float]]:
    """Return the effect of every method by question, by split and method.

    Of several random controls it is their mean. ``by`` is the file of the verdicts.
    """
    found: dict[tuple[str, str], Mapping[int, float]] = {}
    for split in _splits(run, by):
        effects = split.effects()
        for method, names in grouped(effects, method_of).items():
            found[split.name, method] = _mean_over([effects[name] for name in names])
    return found


def corrected_effects(
    run: Run, effects: Mapping[tuple[str, str], Overall | MethodEffect]
) -> tuple[Table, ...]:
    """Return the effects and what the diff has over the vector, corrected for the judge's error.

    ``effects`` are by split and method, of ``run`` or over seeds of which it is one. Nothing where
    no answers were rated; random controls are of no rated kind.
    """
    rows: list[tuple[str, ...]] = []
    models: tuple[str, ...] = ()
    for split in dict.fromkeys(split for split, _ in effects):
        errors = errors_of(Run(run.folder / split), run.record["config"]["trait"])
        models = errors.models
        both = effects[split, LORA], effects[split, ACTIVATION]
        weights = [kinds_of_effect(run, method) for method in (LORA, ACTIVATION)]
        changes = {
            "weights": (both[0].effect, weights[0]),
            "activations": (both[1].effect, weights[1]),
            "weights − activations": (both[1].difference, less(*weights)),
        }
        for name, (change, parts) in changes.items():
            right = put_right(change, errors, parts)
            if right is not None:
                rows.append((split, name, wording.change(change), wording.change(right)))
    return (effects_table(rows, models),) if rows else ()


def kinds_of_effect(run: Run, method: str) -> dict[str | None, float]:
    """Return by how much each kind of condition stands in a method's effect."""
    found: dict[str | None, float] = {}
    own = [row for row in run.read("levels") if method_of(row["method"]) == method]
    for row in own:
        sign = math.copysign(1 / len(own), row["coefficient"])
        found = less(found, less({UNSTEERED: sign}, {_kind(row): sign}))
    return found


def effect_gaps(run: Run) -> dict[str, Mapping[int, float]]:
    """Return the diff's effect minus that of each other method by question, by split and method."""
    effects = effects_of(run)
    return {
        f"{split}: {method}": minus(effects[split, LORA], effect)
        for (split, method), effect in effects.items()
        if method != LORA
    }


def _average(rows: Sequence[Row], name: str) -> float | None:
    """Return the mean of a measure; None where it was not measured."""
    found = [row.get(name) for row in rows]
    known = [each for each in found if each is not None]
    return None if len(known) < len(found) else known[0] if len(known) == 1 else fmean(known)


def over_draws(
    gaps: Sequence[Mapping[Any, float]], scale: Bounds | None = None
) -> tuple[Interval | None, float | None]:
    """Return a mean difference and its p: over questions, and over draws if there are several.

    ``scale`` is that of differences of shares.
    """
    found = mean_gap(gaps, scale)
    return (None, None) if found.interval.mean is None else found


def _mean_over(each: Sequence[Mapping[int, float]]) -> dict[int, float]:
    common = set.intersection(*(set(one) for one in each)) if each else set()
    return {item: float(np.mean([one[item] for one in each])) for item in sorted(common)}


def _gaps(first: Cluster, second: Cluster, level: Row) -> dict[int, float]:
    """Return one minus the other by question, in the direction that a level asks for."""
    sign = math.copysign(1.0, level["coefficient"])
    return {at: sign * gap for at, gap in sorted(gaps_between(first, second).items())}


# -- time -------------------------------------------------------------------------------------

BASE, MERGED, LIVE, ACTIVATIONS, PROMPT = "base", "merged", "live", "activations", "prompt"
VARIANTS = (BASE, MERGED, LIVE, ACTIVATIONS, PROMPT)
FIRST_TOKEN, TOKENS = "first token", "tokens a second"


@dataclass(frozen=True)
class Timing:
    """One measurement: seconds to the first token, and tokens per second after it, in one round."""

    variant: str
    batch: int
    round: int
    first_token: float
    tokens_per_second: float


@dataclass(frozen=True)
class Ratio:
    """A variant's time against the base model's at one batch size: 1.2 is 20% slower.

    ``ratio`` is the geometric mean over rounds with its interval; ``median`` the variant's own
    median, in seconds (to the first token) or tokens per second.
    """

    variant: str
    batch: int
    measure: str
    ratio: Interval
    median: float


def ratios(timings: Sequence[Timing]) -> list[Ratio]:
    """Return every variant against the base model, paired within rounds."""
    found = []
    for measure in (FIRST_TOKEN, TOKENS):
        by_place: dict[tuple[str, int], dict[int, float]] = {}
        for each in timings:
            seconds = each.first_token if measure == FIRST_TOKEN else 1.0 / each.tokens_per_second
            by_place.setdefault((each.variant, each.batch), {})[each.round] = seconds
        for (variant, batch), seconds_of in by_place.items():
            base = by_place[BASE, batch]
            logs = [float(np.log(value / base[at])) for at, value in seconds_of.items()]
            median = float(np.median(list(seconds_of.values())))
            value = median if measure == FIRST_TOKEN else 1.0 / median
            found.append(Ratio(variant, batch, measure, _over_rounds(logs), value))
    return found


def _over_rounds(logs: Sequence[float]) -> Interval:
    """Return the geometric mean with a 95% interval by Student's t: rounds are few."""
    number, mean = len(logs), float(np.mean(logs))
    if number < 2:
        return Interval(float(np.exp(mean)), None, None, number, number, 1.0, "one round")
    half = float(student.ppf(0.975, number - 1) * np.std(logs, ddof=1) / np.sqrt(number))
    low, middle, high = (float(np.exp(mean + side * half)) for side in (-1, 0, 1))
    return Interval(middle, low, high, number, number, 1.0, None)
