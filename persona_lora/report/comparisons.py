"""One paired comparison: groups of rows beside a reference group, on the same units.

``paired`` pairs rows of two groups by what they share (a question, an item, a persona's prompt),
takes the difference of a value, and resamples and tests it over units. Runs of evaluate, tasks of a
benchmark and conditions of a persona are compared by it. Refuses to know what made them differ.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from persona_lora.core.chat import COHERENCE
from persona_lora.core.errors import UserError
from persona_lora.core.files import write_csv
from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.correction import (
    corrected_columns,
    errors_of,
    kind_of_model,
    less,
    put_right,
)
from persona_lora.report.curve import corrected
from persona_lora.report.resampling import (
    FITS,
    SCORES,
    SHARES,
    Bounds,
    Interval,
    bootstrap_mean,
    sign_flip_p,
)
from persona_lora.report.scores import JUDGE, SECOND_SUFFIX, judges_of, minus
from persona_lora.report.sections import Table
from persona_lora.report.summary import trait_of
from persona_lora.report.two_way import mean_gap

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Paired:
    """A group minus the reference: the mean difference with its interval over units.

    ``p`` is a two-sided sign-flip test on the units' means, ``effect_size`` their mean over their
    standard deviation (Cohen's d_z). All are None where nothing could be paired, and these two for
    one unit.
    """

    difference: Interval | None = None
    p: float | None = None
    effect_size: float | None = None


def paired(
    rows: pd.DataFrame,
    *,
    by: str,
    value: str,
    unit: str,
    reference: Hashable,
    within: Sequence[str] = (),
    scale: Bounds | None = None,
) -> dict[Hashable, Paired]:
    """Return every group of ``by`` against the reference group, which is paired with nothing.

    Rows are paired where ``unit`` and the columns of ``within`` are equal; of several rows at one
    place the mean counts, and rows without a value do not. ``scale`` is that of differences.
    """
    place = [by, *within, unit]
    known = rows.dropna(subset=[value])
    scores = known.groupby(place, sort=False)[value].agg(lambda x: np.mean(x.to_numpy()))
    groups = {name: own.droplevel(0) for name, own in scores.groupby(level=0, sort=False)}
    theirs = groups.get(reference)
    return {
        name: Paired()
        if theirs is None or name == reference or name not in groups
        else over_units((groups[name] - theirs.reindex(groups[name].index)).dropna(), unit, scale)
        for name in rows[by].unique()
    }


def over_units(gaps: pd.Series, unit: str, scale: Bounds | None = None) -> Paired:
    """Return the mean of units' mean differences, resampled and tested over the units."""
    if gaps.empty:
        return Paired()
    by_unit = {name: list(map(float, own)) for name, own in gaps.groupby(level=unit, sort=False)}
    means = np.array([np.mean(each) for each in by_unit.values()])
    spread = float(means.std(ddof=1)) if len(means) > 1 else 0.0
    size = float(means.mean()) / spread if spread > 0 else None
    p = sign_flip_p(means) if len(means) > 1 else None
    return Paired(bootstrap_mean(by_unit, scale=scale), p, size)


def means(
    rows: pd.DataFrame, *, by: str, value: str, unit: str, scale: Bounds | None
) -> dict[Hashable, Interval]:
    """Return the mean of units' mean values of every group, with its interval over units."""
    return {
        name: bootstrap_mean(
            {
                at: [None if np.isnan(score) else float(score) for score in each]
                for at, each in own.groupby(unit, sort=False)[value]
            },
            scale=scale,
        )
        for name, own in rows.groupby(by, sort=False)
    }


def frame(rows: Sequence[Row], values: Sequence[str]) -> pd.DataFrame:
    """Return rows as a table; None among ``values`` is a missing number."""
    table = pd.DataFrame(list(rows))
    return table.astype(dict.fromkeys(values, float))


# -- what was found, as rows of a table ----------------------------------------------------------


def columns_of(*paths: str) -> dict[str, str]:
    """Return the columns of a table by name: "low=trait.low" shows that, "p" what has its name."""
    return {name: path or name for name, _, path in (each.partition("=") for each in paths)}


def cells_of(found: Any, columns: Mapping[str, str]) -> dict[str, Any]:
    """Return what was found as a row under ``columns``; None where a step of a path is None."""

    def at(value: Any, path: str) -> Any:
        for step in path.split("."):
            value = None if value is None else getattr(value, step)
        return value

    return {name: at(found, path) for name, path in columns.items()}


def write_found(
    path: Path,
    columns: Mapping[str, str],
    found: Sequence[Any],
    second: Sequence[Any] = (),
    of_the_trait: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write what was found as a table, a row each.

    What was found by a ``second`` judge, where there is one, stands under ``of_the_trait`` beside.
    """
    rows = [cells_of(each, columns) for each in found]
    for row, other in zip(rows, second, strict=True) if second else ():
        own = cells_of(other, of_the_trait)
        row.update({f"{name}{SECOND_SUFFIX}": cell for name, cell in own.items()})
    names = list(rows[0]) if rows else list(columns)
    # Who judged stands last, so that what is read by its place stays there.
    write_csv(path, sorted(names, key=lambda name: name.removesuffix(SECOND_SUFFIX) == JUDGE), rows)


GAP_COLUMNS = (
    *("difference=difference.mean", "difference_low=difference.low"),
    *("difference_high=difference.high", "pairs=difference.n_questions", "p", "p_holm"),
)

# -- runs of evaluate --------------------------------------------------------------------------

RUN_COLUMNS = columns_of(
    *("run=name", "trait=trait.mean", "low=trait.low", "high=trait.high", "n=trait.n_questions"),
    *("coverage=trait.coverage", "coherence=coherence.mean", *GAP_COLUMNS, JUDGE),
) | corrected_columns("trait", "difference")


@dataclass(frozen=True)
class PairedRun:
    """One run: mean trait score and coherence, and the difference from the reference.

    ``difference`` is over questions that both runs have, ``p`` a two-sided sign-flip test on the
    questions' means, ``p_holm`` corrected over the runs compared; None for the reference itself.
    ``judge`` names who judged, with what the run says of its fitness; what ends in ``_corrected``
    is corrected for its error, None where nothing corrects it (a difference also where both runs
    are of one kind, misjudged alike, or of models with other errors).
    """

    name: str
    trait: Interval
    coherence: Interval
    difference: Interval | None
    p: float | None
    p_holm: float | None = None
    judge: str = ""
    trait_corrected: Interval | None = None
    difference_corrected: Interval | None = None


def compare_runs(runs: Sequence[Run], reference: Run) -> list[PairedRun]:
    """Return the reference and every run, compared with it.

    UserError for runs of different traits or judges, without a question in common, and for the
    reference itself among them.
    """
    every = (reference, *runs)
    if reference.folder.resolve() in (each.folder.resolve() for each in runs):
        raise UserError(
            f"{reference.folder} would be compared with itself; name it once, as the reference"
        )
    traits = {trait_of(run) for run in every}
    if len(traits) > 1:
        raise UserError(f"the runs are of different traits: {', '.join(sorted(traits))}")
    trait = traits.pop()
    numbers: dict[str, int] = {}  # of questions, which each run numbers for itself
    scores, coherence = (
        pd.concat([_scored(run, criterion, at, numbers) for at, run in enumerate(every)])
        for criterion in (trait, COHERENCE)
    )
    judges = sorted({judges_of(run.read("verdicts"), trait, bare=True) for run in every})
    if len(judges) > 1:
        raise UserError(
            f"the runs were judged by different judges: {' and by '.join(judges)}; evaluate all "
            "with the same --judge"
        )
    place: dict[str, Any] = {"by": "run", "value": "score", "unit": "question"}
    gaps = paired(scores.sort_values("question", kind="stable"), **place, reference=0)
    for at, run in enumerate(every[1:], start=1):
        if gaps[at].difference is None:
            raise UserError(f"{run.folder} and the reference have no scored question in common")
    scored, coherent = (means(table, **place, scale=SCORES) for table in (scores, coherence))
    found = [
        PairedRun(
            *(run.folder.name, scored[at], coherent[at], gaps[at].difference, gaps[at].p),
            judge=judges_of(run.read("verdicts"), trait, COHERENCE),
        )
        for at, run in enumerate(every)
    ]
    return _put_right(corrected(found), every, trait)


def _put_right(found: Sequence[PairedRun], runs: Sequence[Run], trait: str) -> list[PairedRun]:
    """Return runs, the first of which is the reference, corrected for the error of their judge."""
    kinds = [
        {kind_of_model(run, finetuned=bool(run.record["config"].get("adapter"))): 1.0}
        for run in runs
    ]
    errors = [errors_of(run, trait) for run in runs]
    return [
        replace(
            each,
            trait_corrected=put_right(each.trait, own, kind, SCORES),
            difference_corrected=put_right(each.difference, own, less(kind, kinds[0]))
            if own == errors[0]
            else None,
        )
        for each, own, kind in zip(found, errors, kinds, strict=True)
    ]


def run_table(found: Sequence[PairedRun]) -> Table:
    """Return runs beside their reference."""
    rows = (
        [each.name, wording.interval(each.trait, 1), wording.interval(each.trait_corrected, 1)]
        + [str(each.trait.n_questions), f"{100 * each.trait.coverage:.0f}%"]
        + [*wording.gap(each.difference, each.p_holm, 1)]
        + [wording.interval(each.difference_corrected, 1), wording.interval(each.coherence)]
        for each in found
    )
    return Table.of(
        "run | trait | corrected for judge error | n | scored | difference | pairs | p (Holm) | "
        "difference corrected | coherence",
        rows,
    )


def _scored(run: Run, criterion: str, at: int, numbers: dict[str, int]) -> pd.DataFrame:
    answers = sorted(run.read("answers"), key=lambda row: row["question_id"])
    question_of = {row["row"]: numbers.setdefault(row["question"], len(numbers)) for row in answers}
    rows = [
        {"run": at, "question": question_of[verdict["row"]], "score": verdict["score"]}
        for verdict in run.read("verdicts")
        if verdict["criterion"] == criterion
    ]
    if not rows:
        raise UserError(f"{run.folder} holds no verdicts on {criterion}; is it a run of evaluate?")
    return frame(rows, ["score"])


# -- tasks, item by item -----------------------------------------------------------------------

TASK_COLUMNS = columns_of(
    *("condition", "task", "metric", "score=score.mean", "low=score.low", "high=score.high"),
    *("n=score.n", *GAP_COLUMNS, JUDGE),
)
PROBE = ", "  # between a behaviour and what it is probed with, in the name of a task
TOLD_BY_TASK = ("score", "nats")  # metrics that a task's name says


@dataclass(frozen=True)
class TaskScore:
    """One task under one condition, with the paired difference from the unsteered model.

    Scores are means over items: accuracies, or for "perplexity" the mean log-probability of a
    token (nats; larger is better, and e^−score is the perplexity). ``judge`` names who gave them;
    "" for what no judge did. What ends in ``_corrected`` is corrected for its error, None where
    nothing corrects it.
    """

    condition: str
    task: str
    metric: str
    score: Interval
    difference: Interval | None
    p: float | None
    p_holm: float | None = None
    judge: str = ""
    score_corrected: Interval | None = None
    difference_corrected: Interval | None = None

    @property
    def measure(self) -> str:
        """The task, and its metric where the task's name does not say it."""
        return self.task if self.metric in TOLD_BY_TASK else f"{self.task}: {self.metric}"


def score_items(rows: Sequence[Row], reference: str) -> list[TaskScore]:
    """Return every task's score under every condition, paired by item with the reference.

    A row is one item of one task: ``condition``, ``task``, ``metric``, ``item`` and ``score``; and
    ``seed`` where conditions were trained several times: then seeds are paired with one another and
    drawn as items are, and what has no seed, the base model, is paired with each of the other's.
    What has one seed beside several has no difference: how others of its seeds would lie is open.
    """
    table = frame([{"seed": "", **row} for row in rows], ["score"])
    several = table.groupby("condition")["seed"].nunique().max() > 1
    by_task = {}
    for (task, metric), own in table.groupby(["task", "metric"], sort=False):
        known = own["score"].dropna()
        scale = SCORES if metric == "score" else SHARES
        told = known.isin(tuple(scale)).all()
        ends = scale if told or (metric == "score" and known.between(*scale).all()) else None
        place: dict[str, Any] = {"by": "condition", "value": "score", "unit": "item"}
        # What a rule tells is often the same of every item: differences reach their ends, too.
        apart = Bounds(-scale.high, scale.high) if told else None
        if several:
            scores, gaps = _over_seeds(own, reference, ends, apart)
        else:
            gaps = paired(own, **place, reference=reference, scale=apart)
            scores = means(own, **place, scale=ends)
        for name, score in scores.items():
            gap = gaps[name]
            by_task[name, task, metric] = TaskScore(
                *(str(name), task, metric, score, gap.difference, gap.p)
            )
    order = table[["condition", "task", "metric"]].drop_duplicates()
    return corrected([by_task[place] for place in order.itertuples(index=False, name=None)])


def _over_seeds(
    rows: pd.DataFrame, reference: str, ends: Bounds | None, apart: Bounds | None
) -> tuple[dict[Hashable, Interval], dict[Hashable, Paired]]:
    """Return scores, and differences from the reference, over seeds and items."""
    by_seed: dict[Hashable, dict[str, dict[Any, float]]] = {}
    for (name, seed), own in rows.groupby(["condition", "seed"], sort=False):
        by_item = own.dropna(subset=["score"]).groupby("item")["score"]
        by_seed.setdefault(name, {})[seed] = by_item.mean().to_dict()
    theirs = by_seed.get(reference, {})
    gaps = {name: Paired() for name in by_seed}
    for name, seeds in by_seed.items() if len(theirs) > 1 or "" in theirs else ():
        if name != reference:
            plain = theirs if len(theirs) > 1 else dict.fromkeys(seeds, theirs[""])
            own = [minus(seeds.get(at, seeds.get("", {})), each) for at, each in plain.items()]
            gaps[name] = Paired(*mean_gap(own, apart))
    scores = {name: mean_gap([*each.values()], ends).interval for name, each in by_seed.items()}
    return scores, gaps


def task_table(scores: Sequence[TaskScore]) -> Table:
    """Return tasks under every condition."""
    rows = (
        [each.task, each.metric, each.condition, wording.interval(each.score, 3)]
        + [str(each.score.n), *wording.gap(each.difference, each.p_holm, 3)]
        for each in sorted(scores, key=lambda score: (score.task, score.metric))
    )
    return Table.of("task | metric | condition | score | n | difference | pairs | p (Holm)", rows)


def probed(task: str, among: Collection[str]) -> str:
    """Return the behaviour that a task measures, where it is measured under probes; or nothing.

    The tasks "trait" and "trait, negated" are one behaviour, plainly and under a probe.
    """
    behaviour = task.partition(PROBE)[0]
    return behaviour if any(each.startswith(f"{behaviour}{PROBE}") for each in among) else ""


def measure_tables(scores: Sequence[TaskScore]) -> list[Table]:
    """Return measures of several kinds, and conditions × probes of each behaviour that has them."""
    tasks = dict.fromkeys(each.task for each in scores)
    behaviours = {task: probed(task, tasks) for task in tasks}
    plain = [each for each in scores if not behaviours[each.task]]
    crossed = [
        _probes_table(behaviour, [e for e in scores if behaviours[e.task] == behaviour])
        for behaviour in dict.fromkeys(filter(None, behaviours.values()))
    ]
    return [*crossed, *([_measure_table(plain)] if plain else [])]


def _probes_table(behaviour: str, scores: Sequence[TaskScore]) -> Table:
    tasks = list(dict.fromkeys(each.task for each in scores))
    by = {(each.condition, each.task): each for each in scores}
    rows = []
    for name in dict.fromkeys(each.condition for each in scores):
        found = [by.get((name, task)) for task in tasks]
        rows.append((name, *("" if each is None else _probe_cell(each) for each in found)))
    columns = ("model", *(task.partition(PROBE)[2] or "plain" for task in tasks))
    note = (
        "Difference from the first model, paired by question (and seed); * p < 0.05 (Holm, all "
        "measures). Where the answers of all seeds are equal, the interval is over questions alone."
        " Raw: answers under probes are of no kind that was rated."
    )
    return Table(columns, tuple(rows), behaviour.replace("_", " "), note)


def _probe_cell(each: TaskScore) -> str:
    said = wording.interval(each.score)
    if each.difference is None:
        return said
    clear = each.p_holm is not None and each.p_holm < wording.CLEAR
    of = wording.pairs(each.difference, each.score.n_questions)
    return f"{said}; {wording.interval(each.difference)}{'*' * clear}{of}"


def _measure_table(scores: Sequence[TaskScore]) -> Table:
    rows = []
    for each in scores:
        digits = 0 if each.metric == "score" else 2
        gap = wording.gap(each.difference, each.p_holm, digits)
        said = wording.interval(each.score, digits)
        rows.append([each.measure, each.condition, said, str(each.score.n), *gap])
    return Table.of("measure | model | score | n | difference | pairs | p (Holm)", rows)


# -- conditions of a persona -------------------------------------------------------------------


@dataclass(frozen=True)
class ConditionFit:
    """The mean fit, coherence and relevance of a condition; intervals over prompts or personas.

    ``difference`` is its fit minus that of the reference on the same prompts, ``p`` a two-sided
    sign-flip test on the units' means, ``p_holm`` corrected over the conditions compared, and
    ``effect_size`` the mean of the units' differences over their standard deviation (Cohen's d_z).
    All four are None for the reference itself. ``counted`` is the share of its answers that count,
    ``feasible`` that of its searches that keep their constraints; None where there is none. ``kl``
    is its mean divergence, nats a token, ``choice`` the percentage of multiple choice that it
    keeps, where they were measured.
    """

    condition: str
    fit: Interval
    coherence: Interval
    relevance: Interval
    difference: Interval | None
    p: float | None
    effect_size: float | None = None
    p_holm: float | None = None
    counted: float | None = None
    feasible: float | None = None
    kl: float | None = None
    choice: float | None = None


def fits_over_prompts(
    rows: Sequence[Row], reference: str, *, scale: Bounds | None = FITS
) -> list[ConditionFit]:
    """Return the fit of every condition of one persona; the units are prompts.

    A row is one answer to one held-out prompt: ``persona``, ``condition``, ``prompt_id``, ``score``
    (on ``scale``, 1–5 unless told, or None), ``coherence`` and ``relevance`` (0–100 or None).
    """
    return _fits(rows, reference, "prompt_id", "persona", scale)


def fits_over_personas(
    rows: Sequence[Row], reference: str, *, scale: Bounds = FITS
) -> list[ConditionFit]:
    """Return the fit of every condition over personas: whole personas are drawn, not prompts."""
    return _fits(rows, reference, "persona", "prompt_id", scale)


def fit_table(fits: Sequence[ConditionFit], title: str) -> Table:
    """Return the fits of conditions."""
    rows = (
        [each.condition, wording.interval(each.fit, 2), str(each.fit.n_questions)]
        + [f"{100 * each.fit.coverage:.0f}%", wording.percent(each.counted)]
        + [*wording.gap(each.difference, each.p_holm, 2)]
        + [wording.number(each.coherence.mean), wording.number(each.relevance.mean)]
        + [wording.percent(each.feasible)]
        for each in fits
    )
    columns = (
        "condition | fit (1–5) | n | scored | counts | gain | pairs | p (Holm) | coherence | "
        "relevance | keeps constraints"
    )
    return Table.of(columns, rows, title)


def _fits(
    rows: Sequence[Row], reference: str, unit: str, within: str, scale: Bounds | None = FITS
) -> list[ConditionFit]:
    measures = {"score": scale, "coherence": SCORES, "relevance": SCORES}
    columns = ("condition", unit, within, *measures)
    table = frame([{name: row[name] for name in columns} for row in rows], list(measures))
    of = [
        means(table, by="condition", value=name, unit=unit, scale=bounds)
        for name, bounds in measures.items()
    ]
    gaps = paired(
        table, by="condition", value="score", unit=unit, reference=reference, within=[within]
    )
    fit, coherence, relevance = of
    return corrected(
        [
            ConditionFit(
                str(name), fit[name], coherence[name], relevance[name],
                gap.difference, gap.p, gap.effect_size,
            )
            for name, gap in gaps.items()
        ]
    )  # fmt: skip
