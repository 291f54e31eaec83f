"""Answers joined with their verdicts: the rows that every reading of a run starts from.

Knows the rows of ``answers.jsonl`` and ``verdicts.jsonl``; refuses to know how they were made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from persona_lora.core.chat import COHERENCE, Condition, Series
from persona_lora.core.errors import UserError

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
Row = Mapping[str, Any]
Cluster = dict[int, list[float | None]]

SECOND = "second_verdicts"  # the rows of the judge that is asked beside the first
SECOND_SUFFIX = "_second"  # of a column or a statistic that is its
UNSTEERED = "none"
CONTROL = "random"
NEUTRAL = "prompt_neutral"
PROMPTS = ("prompt_neg", NEUTRAL, "prompt_pos")


UNSTEERED_CONDITION = Condition(UNSTEERED, 0.0)


def control_name(method: str, number: int) -> str:
    """Return the name of one of several random controls of a method: "random", "random#2" …"""
    return f"{method}#{number + 1}" if number else method


def method_of(name: str) -> str:
    """Return the method that a control is one of."""
    return name.partition("#")[0]


class ScoredAnswer(NamedTuple):
    """One answer row with its scores, 0–100; None is an answer without a score."""

    condition: Condition
    answer: Row
    trait: float | None
    coherence: float | None


def score_answers(
    answers: Iterable[Row], verdicts: Iterable[Row], trait: str
) -> list[ScoredAnswer]:
    """Join every answer with its scores for the trait and for coherence, in the answers' order.

    Of several verdicts on one row and criterion the last counts. Rows of the method "none" are
    ``UNSTEERED_CONDITION``: coefficient 0 of every series. Raises UserError for a verdict on a row
    that does not exist, and for a score that is no number from 0 to 100.
    """
    answers = list(answers)
    known = {answer["row"] for answer in answers}
    scores: dict[tuple[int, str], float | None] = {}
    for verdict in verdicts:
        if verdict["row"] not in known:
            raise UserError(
                f"verdicts.jsonl judges row {verdict['row']!r}, which answers.jsonl does not hold; "
                "the files belong to different runs, judge this run again"
            )
        scores[verdict["row"], verdict["criterion"]] = _checked(verdict)
    return [
        ScoredAnswer(
            condition_of(answer),
            answer,
            scores.get((answer["row"], trait)),
            scores.get((answer["row"], COHERENCE)),
        )
        for answer in answers
    ]


def condition_of(answer: Row) -> Condition:
    """Return what produced an answer row; rows without a ``layer`` steer at none.

    Several random controls are draws of one condition: the row's own method tells which it is of.
    """
    if answer["method"] == UNSTEERED:
        return UNSTEERED_CONDITION
    coefficient = answer["coefficient"]
    # Adding 0.0 turns -0.0 into 0.0, which would print as another coefficient.
    value = None if coefficient is None else float(coefficient) + 0.0
    return Condition(method_of(answer["method"]), value, answer.get("layer"))


def steered_series(conditions: Iterable[Condition]) -> list[Series]:
    """Return the steered series in the order of their layers, those of the random control last.

    Raises UserError where coefficients belong to more than one method besides the control.
    """
    found = {each.series for each in conditions if each.method != UNSTEERED} - {None}
    series = [each for each in found if each is not None]
    methods = sorted({each.method for each in series} - {CONTROL})
    if len(methods) > 1:
        raise UserError(
            f"the run has coefficients of several methods ({', '.join(methods)}); "
            "summarise one method at a time"
        )
    return sorted(series, key=lambda each: (each.method == CONTROL, each.layer or 0))


def rows_of_series(scored: Iterable[ScoredAnswer], series: Series) -> list[ScoredAnswer]:
    """Return the rows of one series, the unsteered ones among them as its coefficient 0."""
    zero = Condition(series.method, 0.0, series.layer)
    return [
        row._replace(condition=zero) if row.condition == UNSTEERED_CONDITION else row
        for row in scored
        if row.condition == UNSTEERED_CONDITION or row.condition.series == series
    ]


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Return items by their key, in the order in which keys are first seen."""
    found: dict[K, list[T]] = {}
    for each in items:
        found.setdefault(key(each), []).append(each)
    return found


def minus(first: Mapping[K, float], second: Mapping[K, float]) -> dict[K, float]:
    """Return first minus second wherever both have a value."""
    return {each: first[each] - second[each] for each in first if each in second}


def clusters(scored: Iterable[ScoredAnswer], criterion: str) -> Cluster:
    """Return the scores on one criterion by question id; ``criterion`` "coherence" or the trait."""
    by_question = grouped(scored, lambda row: row.answer["question_id"])
    judged = "coherence" if criterion == COHERENCE else "trait"
    return {at: [getattr(row, judged) for row in by_question[at]] for at in sorted(by_question)}


def question_means(cluster: Cluster) -> dict[int, float]:
    """Return the mean score of each question that has a scored answer."""
    scored = {q: [score for score in scores if score is not None] for q, scores in cluster.items()}
    return {question: sum(values) / len(values) for question, values in scored.items() if values}


_BETWEEN_JUDGES = re.compile(r", (?![^(]*\))")  # the commas outside parentheses
UNFIT = "unfit for"  # behind a judge's name, before that of a criterion
JUDGE = "judge"  # the column that says who judged, the last one of a table
JUDGE_UNFIT = " (judge unfit)"  # behind a trait's name, where no judge is named


def unfit_for(validation: Iterable[Row]) -> frozenset[str]:
    """Return the criteria that rows of a judge's validation call it unfit for."""
    return frozenset(str(row["criterion"]) for row in validation if row.get("fit") is False)


def with_mark(judge: str, criteria: Iterable[str], unfit: Collection[str]) -> str:
    """Return a judge's name with what of these it is unfit for, as in "reader (unfit for evil)"."""
    found = [each for each in criteria if each in unfit]
    return f"{judge} ({UNFIT} {', '.join(found)})" if found else judge


def judges_of(verdicts: Iterable[Row], *criteria: str, bare: bool = False) -> str:
    """Return the names of the judges that gave verdicts on criteria, as ``marked`` has them.

    ``bare`` leaves out what a run says of their fitness on its own model.
    """
    said = {str(v.get(JUDGE, "")) for v in verdicts if v["criterion"] in criteria}
    names = _unfit_by_name(*sorted(said))
    return ", ".join(names) if bare else marked(*sorted(said))


def marked(*judges: str) -> str:
    """Return the names of judges, each once, with all that one of them is unfit for.

    "reader (unfit for evil)", "reader, words" and "reader (unfit for coherence)" are together
    "reader (unfit for evil, coherence), words".
    """
    return ", ".join(with_mark(name, own, own) for name, own in _unfit_by_name(*judges).items())


def _unfit_by_name(*judges: str) -> dict[str, list[str]]:
    """Return what each judge is unfit for, coherence last; ``judges`` are as ``marked`` has them.

    A string may name several judges.
    """
    found: dict[str, dict[str, None]] = {}
    for said in judges:
        for each in filter(None, _BETWEEN_JUDGES.split(said)):
            name, _, criteria = each.partition(f" ({UNFIT} ")
            own = filter(None, criteria.removesuffix(")").split(", "))
            found.setdefault(name, {}).update(dict.fromkeys(own))
    return {name: sorted(own, key=COHERENCE.__eq__) for name, own in found.items()}


def unfit_mark(judge: str) -> str:
    """Return what stands behind a trait's name: nothing where its judge is fit."""
    return JUDGE_UNFIT if UNFIT in judge else ""


def answers_columns(
    trait: str, answers: Iterable[Row] = (), *, sweep: bool = True, second: bool = False
) -> list[str]:
    """Return the columns of the answers table, with those of a ``second`` judge; last, who judged.

    A sweep names method and coefficient first, and the layer where any of its ``answers`` has one.
    """
    names = trait, JUDGE
    beside, by = ([f"{each}{SECOND_SUFFIX}"] if second else [] for each in names)
    columns = ["question", "prompt", "answer", trait, COHERENCE, *beside, JUDGE, *by]
    if not sweep:
        return columns
    layered = any(answer.get("layer") is not None for answer in answers)
    return ["method", *(["layer"] if layered else []), "coefficient", *columns]


def answers_table(
    answers: Sequence[Row], verdicts: Sequence[Row], trait: str, second: Sequence[Row] = ()
) -> list[dict[str, Any]]:
    """Return one row per answer for ``write_csv``; an unscored cell is None.

    ``second`` are the verdicts of a second judge on the same answers.
    """
    beside = score_answers(answers, second, trait)
    judge, other_judge = (judges_of(each, trait, COHERENCE) for each in (verdicts, second))
    return [
        {
            "method": row.answer["method"],
            "layer": row.condition.layer,
            "coefficient": row.condition.coefficient,
            "question": row.answer["question"],
            "prompt": row.answer["prompt"],
            "answer": row.answer["answer"],
            trait: row.trait,
            COHERENCE: row.coherence,
            f"{trait}{SECOND_SUFFIX}": other.trait,
            JUDGE: judge,
            f"{JUDGE}{SECOND_SUFFIX}": other_judge,
        }
        for row, other in zip(score_answers(answers, verdicts, trait), beside, strict=True)
    ]


def _checked(verdict: Row) -> float | None:
    score = verdict["score"]
    if score is None:
        return None
    if not isinstance(score, int | float) or not math.isfinite(score) or not 0 <= score <= 100:
        raise UserError(
            f"verdicts.jsonl scores row {verdict['row']} {score!r} on {verdict['criterion']}; "
            "expected a number from 0 to 100 or null, judge that row again"
        )
    return float(score)
