"""What two judges of a run say, side by side: agreement over answers, and the sign of each effect.

Reads ``verdicts`` and ``second_verdicts``; never averages them. Over all answers that both scored
the agreement is Spearman's ρ with its interval over questions. An effect is a difference from a
reference. The judges are **opposed** on it where the interval of one of them excludes 0 and the
mean of the other lies on the other side: where neither interval excludes 0 nothing was claimed,
and signs of what is near 0 differ by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Any, NamedTuple

import numpy as np

from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.curve import gaps_between
from persona_lora.report.resampling import Estimate, Interval, row_rank_correlation
from persona_lora.report.scores import SECOND, Condition, condition_of, judges_of, score_answers
from persona_lora.report.sections import Table
from persona_lora.report.two_way import mean_gap, mean_over_draws

MOST_NAMED = 3  # of the changes that the judges disagree on, in a line
VALIDATIONS = ("validation", "second_validation")


class Pair(NamedTuple):
    """What two judges gave to one answer; ``place`` is what produced it, as a report calls it.

    ``draw`` tells several random controls of one place apart, or training seeds.
    """

    place: str
    question: Hashable
    first: float | None
    second: float | None
    draw: str = ""


Both = tuple[dict[Any, Any], dict[Any, Any]]  # the scores of either judge, by question
Draws = dict[str, Both]  # by the name of the draw


@dataclass(frozen=True)
class Beside:
    """One mean, or one effect, by both judges."""

    place: str
    first: Interval
    second: Interval

    @property
    def opposed(self) -> bool:
        """Whether one judge's interval excludes 0 and the other's mean is of the other sign."""
        return any(
            _told(one) * (other.mean or 0.0) < 0
            for one, other in ((self.first, self.second), (self.second, self.first))
        )

    @property
    def alike(self) -> bool:
        """Whether both means are of one sign."""
        return (self.first.mean or 0.0) * (self.second.mean or 0.0) > 0


@dataclass(frozen=True)
class TwoJudges:
    """The judges' names, how they agree over answers, and their means and effects.

    The effect that a report leads with is the first one. ``within``: how each judge ranks answers
    inside a condition beside blind ratings (``judges.fitness``); None where that is not known.
    """

    trait: str
    judge: str
    second: str
    within: tuple[float | None, ...]
    rho: Estimate
    means: tuple[Beside, ...]
    effects: tuple[Beside, ...]


def pairs_of(
    run: Run, trait: str, place: Callable[[Condition], str], *, within: str = ""
) -> list[Pair]:
    """Return both scores of a run's answers; ``within`` sets the questions of runs apart."""
    answers, second = run.read("answers"), run.read(SECOND)
    if not second:
        return []
    both = (score_answers(answers, each, trait) for each in (run.read("verdicts"), second))
    return [
        Pair(
            place(one.condition),
            (within, one.answer["question_id"]),
            *(one.trait, two.trait, one.answer["method"].partition("#")[2]),
        )
        for one, two in zip(*both, strict=True)
    ]


def two_judges(run: Run, trait: str) -> TwoJudges | None:
    """Return what both judges say of a run's conditions; None where one judged alone.

    Effects are changes from the unsteered answers.
    """
    pairs = pairs_of(run, trait, _place)
    if not pairs:
        return None
    conditions = {_place(each): each for each in map(condition_of, run.read("answers"))}
    zero = next((name for name, each in conditions.items() if each.coefficient == 0), None)
    effects = [] if zero is None else effects_from(pairs, zero)
    return of_pairs(trait, [run], pairs, effects)


def of_pairs(
    trait: str,
    runs: Sequence[Run],
    pairs: Sequence[Pair],
    effects: Sequence[Beside],
    *,
    by_place: bool = True,
) -> TwoJudges | None:
    """Return what both judges say of pairs and of the effects that were made of them.

    Without ``by_place`` a place holds several conditions (both signs, say), and has no mean.
    """
    if not pairs:
        return None
    first, second = (
        wording.judges_line(*(judges_of(run.read(file), trait) for run in runs))
        for file in ("verdicts", SECOND)
    )
    within = tuple(_within(runs[0].read(file), trait) for file in VALIDATIONS)
    means = tuple(
        Beside(place, *map(mean_over_draws, zip(*draws.values(), strict=True)))
        for place, draws in (_clusters(pairs) if by_place else {}).items()
    )
    return TwoJudges(trait, first, second, within, _agreement(pairs), means, tuple(effects))


def across_runs(
    trait: str, runs: Mapping[str, Run | Sequence[Run]], reference: str
) -> TwoJudges | None:
    """Return what both judges say of runs on the same questions, by name, beside one of them.

    Several runs of a name are its training seeds, in the order of the others'; one of a name that
    was trained once is beside each of them.
    """
    by_name = {name: [own] if isinstance(own, Run) else own for name, own in runs.items()}
    pairs = [
        pair._replace(place=name, draw=f"{pair.draw} {seed}")
        for name, own in by_name.items()
        for seed, run in enumerate(own)
        for pair in pairs_of(run, trait, _place)
    ]
    judged = {pair.place for pair in pairs}
    effects = effects_from(pairs, reference) if reference in judged else []
    return of_pairs(trait, list(chain(*by_name.values())), pairs, effects)


def effects_from(pairs: Sequence[Pair], reference: str) -> list[Beside]:
    """Return every place minus the reference, paired by question, the largest first.

    Draws are paired by their names; the only one of either side with each of the other's.
    """
    clusters = _clusters(pairs)
    plain = clusters[reference]
    found = []
    for place, own in clusters.items():
        if place != reference:
            gaps = [
                [gaps_between(one, zero) for one, zero in zip(both, beside, strict=True)]
                for both, beside in _paired_draws(own, plain)
            ]
            found.append(
                Beside(place, *(mean_gap(own).interval for own in zip(*gaps, strict=True)))
            )
    return sorted(found, key=lambda each: -abs(each.first.mean or 0.0))


def _paired_draws(own: Draws, plain: Draws) -> list[tuple[Both, Both]]:
    if len(plain) == 1 or len(own) == 1:
        return [*product(own.values(), plain.values())]
    return [(own[draw], plain[draw]) for draw in own if draw in plain]


def _within(validation: Sequence[Mapping[str, Any]], trait: str) -> float | None:
    own = next((row.get("own") for row in validation if row["criterion"] == trait), None)
    return None if own is None else own["within"]


def _place(condition: Condition) -> str:
    said = wording.condition_label(condition.method, condition.coefficient)
    if condition.coefficient == 0:
        return "unsteered"
    return said if condition.layer is None else f"{said} at {wording.layers(condition.layer)}"


def _clusters(pairs: Sequence[Pair]) -> dict[str, Draws]:
    """Return both judges' scores by place, for each draw of the place, by question."""
    found: dict[str, Draws] = {}
    for pair in pairs:
        both = found.setdefault(pair.place, {}).setdefault(pair.draw, ({}, {}))
        for cluster, score in zip(both, (pair.first, pair.second), strict=True):
            cluster.setdefault(pair.question, []).append(score)
    return found


def _agreement(pairs: Sequence[Pair]) -> Estimate:
    scored = [each for each in pairs if each.first is not None and each.second is not None]
    asked = dict.fromkeys(each.question for each in scored)
    questions = {question: at for at, question in enumerate(asked)}
    return row_rank_correlation(
        np.array([each.first for each in scored], dtype=float),
        np.array([each.second for each in scored], dtype=float),
        np.array([questions[each.question] for each in scored], dtype=np.intp),
    )


def _told(effect: Interval) -> int:
    """Return the sign that an interval tells; 0 where it holds 0."""
    if effect.low is None or effect.high is None:
        return 0
    return 1 if effect.low > 0 else -1 if effect.high < 0 else 0


# -- in words --------------------------------------------------------------------------------------


def opposed_line(found: TwoJudges | None) -> str:
    """Return a warning of the effects whose sign the judges disagree on; "" for none."""
    opposed = [] if found is None else [each for each in found.effects if each.opposed]
    if found is None or not opposed:
        return ""
    told = "; ".join(
        f"{each.place}: {wording.change(each.first)} by {found.judge}, "
        f"{wording.change(each.second)} by {found.second}"
        for each in opposed[:MOST_NAMED]
    )
    more = f"; and {len(opposed) - MOST_NAMED} more" if len(opposed) > MOST_NAMED else ""
    return f"The two judges disagree on the sign of a change of {found.trait} ({told}{more})."


def agreement_line(found: TwoJudges | None, judge: str) -> str:
    """Return how both judges agree, and how fit they are; or that ``judge`` judged alone."""
    if found is None:
        return f"One judge: {judge}." if judge else ""
    rho = wording.interval(found.rho, 2) if found.rho.value is not None else found.rho.reason
    if found.effects:
        led, share = found.effects[0], sum(each.alike for each in found.effects)
        what = f"{led.place} changes it by"
        told = [wording.change(led.first), wording.change(led.second)]
        alike = f"; one sign in {share} of {len(found.effects)} changes"
    else:
        what, alike = "the mean is", ""
        told = [wording.interval(found.means[0].first), wording.interval(found.means[0].second)]
    return (
        f"Two judges: {what} {told[0]} by {found.judge} and {told[1]} by {found.second}; ρ {rho} "
        f"over {found.rho.n} answers{alike}.{_fitness(found)}"
    )


def _fitness(found: TwoJudges) -> str:
    if None in found.within:
        return ""
    ours, theirs = (wording.number(each, 2) for each in found.within)
    return f" Inside a condition their ρ with blind ratings is {ours} and {theirs}."


def lead_of(lead: str, found: TwoJudges | None, run: Run | Mapping[str, Run], trait: str) -> str:
    """Return a finding with what the other judge says: in front of it where they are opposed.

    ``run`` is the one that holds the verdicts, or several of one judge by name.
    """
    runs = [run] if isinstance(run, Run) else list(run.values())
    judge = judges_of(runs[0].read("verdicts") if runs else [], trait)
    parts = (opposed_line(found), lead, agreement_line(found, judge))
    return " ".join(each for each in parts if each)


def judges_table(found: TwoJudges | None) -> tuple[Table, ...]:
    """Return the means and the changes by both judges; nothing where one judged alone."""
    if found is None:
        return ()
    means = {each.place: each for each in found.means}
    changes = {each.place: each for each in found.effects}
    rows = []
    for place in {**means, **changes}:
        cells = [place, "", "", "", "", "", ""]
        if place in means:
            cells[1:3] = map(wording.interval, (means[place].first, means[place].second))
        if place in changes:
            change = changes[place]
            cells[3:5] = map(wording.change, (change.first, change.second))
            cells[5] = " / ".join(str(each.n_questions) for each in (change.first, change.second))
            cells[6] = "opposed" if change.opposed else "one" if change.alike else "not told"
        rows.append(tuple(cells))
    columns = (
        *("", f"{found.judge}\n[95%]", f"{found.second}\n[95%]"),
        *("Change, first\njudge [95%]", "Change, second\njudge [95%]", "Pairs,\neither", "Sign"),
    )
    title = f"Two judges on {found.trait}"
    return (Table(columns, tuple(rows), title, NOTE, narrow=True),)


NOTE = (
    "Both judged the same answers; the scores are never averaged. Changes are paired by question. "
    "Opposed: the interval of one judge excludes 0, and the mean of the other has the other sign."
)
