"""What a pilot varied: its differences by seed and question, and the power that follows from them.

A pilot is a sweep or a comparison; several are the same one with other training seeds. One of
``predict-finetuning`` says what data sets and finetunes a correlation needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import fmean, variance

from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.curve import gaps_between
from persona_lora.report.power import Pilot, Planned, cheapest
from persona_lora.report.scores import CONTROL, clusters, grouped, score_answers
from persona_lora.report.sections import Table
from persona_lora.report.summary import trait_of
from persona_lora.report.two_way import SAME, Gaps, shared_questions
from persona_lora.studies.drift.read_prediction import changes, data_sets, predict, rows_of
from persona_lora.studies.read_seeds import apart
from persona_lora.studies.steering.read_comparison import effect_gaps


def read_pilot(runs: Sequence[Run]) -> tuple[Pilot, int]:
    """Return what varied most among the pilot's comparisons, and how many these are.

    UserError for runs of another kind, and for runs that are no seeds of one training or do not
    make the same comparisons.
    """
    why = apart(runs) if len(runs) > 1 else None
    if why is not None:
        raise UserError(f"{why}; several pilots are training seeds of one")
    by_run = [_comparisons(run) for run in runs]
    for run, found in zip(runs, by_run, strict=True):
        if found.keys() != by_run[0].keys():
            raise UserError(f"{run.folder} compares other things than {runs[0].folder}")
    values = [shared_questions([found[name] for found in by_run]) for name in by_run[0]]
    if not values:
        raise UserError(f"{runs[0].folder} compares nothing; give a sweep with coefficients")
    return Pilot.of(max(values, key=lambda each: float(each.std()))), len(values)


def _comparisons(run: Run) -> dict[str, Gaps]:
    """Return the differences by question that the run's report tests, by name."""
    command = run.record["command"]
    if command == "compare":
        return effect_gaps(run)
    if command != "sweep":
        raise UserError(
            f"{run.folder} is a run of {command!r}; a pilot is one of sweep, compare or "
            "predict-finetuning"
        )
    trait = trait_of(run)
    rows = score_answers(run.read("answers"), run.read("verdicts"), trait)
    scores = {
        condition: clusters(own, trait)
        for condition, own in grouped(rows, lambda row: row.condition).items()
    }
    plain = next((own for condition, own in scores.items() if condition.coefficient == 0), None)
    if plain is None:
        raise UserError(f"{run.folder} did not ask the unsteered model; nothing can be compared")
    return {
        f"{condition.layer} {condition.coefficient}": gaps_between(own, plain)
        for condition, own in scores.items()
        if condition.coefficient and condition.method != CONTROL
    }


def read_finetunes(run: Run) -> tuple[float, int]:
    """Return how much finetunes of one data set vary, and how many predictions the pilot tests.

    The first is the variance of scores inside data sets over that between their means, the mean
    over traits. UserError where no data set has two finetunes, or fewer than two sets are known.
    """
    judged, predictors = rows_of(run)
    tested = len(predict(judged, predictors))
    data, shares = data_sets(judged), []
    for by_finetune in changes(judged).values():
        named = grouped(by_finetune, lambda name: data[name])
        groups = [[by_finetune[name] for name in own] for own in named.values()]
        several = [each for each in groups if len(each) > 1]
        if not several or len(groups) < 2:
            raise UserError(
                f"{run.folder} has no data set with two finetunes (of other seeds), or only one "
                "data set: how they vary cannot be told; train such with finetune --seeds"
            )
        inside = fmean(variance(each) for each in several)
        total = variance([fmean(each) for each in groups])
        if total < SAME:
            raise UserError(
                f"all data sets of {run.folder} changed a trait alike, which does not show how "
                "they vary; give a pilot whose data sets differ"
            )
        size = len(by_finetune) / len(groups)
        shares.append(inside / max(total - inside / size, total / len(groups)))
    return fmean(shares), tested


def power_table(found: Sequence[Planned], rows_of: str = "questions", of: str = "seed") -> Table:
    """Return the power by questions and seeds (or data sets, and finetunes of each)."""
    seeds = list(dict.fromkeys(each.seeds for each in found))
    by_size = {(each.questions, each.seeds): each.power for each in found}
    rows = (
        [str(number), *(f"{100 * by_size[number, each]:.0f}%" for each in seeds)]
        for number in dict.fromkeys(each.questions for each in found)
    )
    return Table.of(" | ".join([rows_of, *(_counted(each, of) for each in seeds)]), rows)


def finetunes_line(found: Sequence[Planned], r: float, power: float) -> str:
    """Say how many data sets and finetunes are needed."""
    least = cheapest(found, power)
    if least is None:
        return (
            f"None of these sizes finds a correlation of {r:g} in {100 * power:g} of 100 studies."
        )
    return (
        f"A correlation of {r:g} needs {least.questions} data sets with "
        f"{_counted(least.seeds, 'finetune')} each: it is then found in {100 * least.power:.0f} of "
        "100 studies."
    )


def power_line(found: Sequence[Planned], effect: float, power: float) -> str:
    """Say what is needed."""
    least, wanted = cheapest(found, power), wording.number(effect, 1)
    if least is None:
        return (
            f"None of these sizes finds a difference of {wanted} points in {100 * power:g} of 100 "
            "experiments; plan for a larger effect, or for more of both."
        )
    only = " This pilot has one seed: nothing is known of others." if least.seeds == 1 else ""
    return (
        f"A difference of {wanted} points needs {least.questions} questions with "
        f"{_counted(least.seeds, 'seed')}: it is then found in {100 * least.power:.0f} of 100 "
        f"experiments.{only}"
    )


def wider_line(
    pilot: Pilot, found: Sequence[Planned], wider: Sequence[Planned], power: float
) -> str:
    """Say what is needed where the spread is as large as so small a pilot allows."""
    seeds, questions = pilot.size
    of = f"{questions} questions" + (f" and {seeds} seeds" if seeds > 1 else "")
    least, other = cheapest(found, power), cheapest(wider, power)
    if other is None:
        needs = f"none of these sizes finds it in {100 * power:g} of 100"
    elif least == dataclasses.replace(other, power=least.power if least else 0.0):
        needs = "it needs no more"
    else:
        needs = f"it needs {other.questions} questions with {_counted(other.seeds, 'seed')}"
    return f"{of} tell how they vary only roughly: at the upper limit of that (80%), {needs}."


def _counted(number: int, what: str) -> str:
    return f"one {what}" if number == 1 else f"{number} {what}s"
