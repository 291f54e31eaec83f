"""What steering changed besides its trait, method by method, beside the unsteered model.

Reads the rows of a run of side effects: a score an answer, and the items of tasks. Everything is a
difference from the unsteered model on the same question, prompt or item, but for the share of
questions on which steering goes the wrong way: there is no such share without steering, and a
method's is compared with that of the weights. Tests are corrected within a group (Holm); random
controls stand beside with their intervals, and are not tested.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from persona_lora.core.chat import COHERENCE
from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.comparisons import columns_of, score_items
from persona_lora.report.curve import corrected
from persona_lora.report.resampling import Bounds, Interval
from persona_lora.report.scores import (
    JUDGE,
    UNSTEERED,
    Row,
    grouped,
    marked,
    method_of,
    minus,
    unfit_mark,
)
from persona_lora.report.sections import Table
from persona_lora.report.two_way import mean_over_draws
from persona_lora.studies.steering.read_comparison import (
    ACTIVATION,
    LORA,
    RANDOM,
    RANDOM_LORA,
    over_draws,
)

SCORES = "scores"
CONTROLS = (RANDOM_LORA, RANDOM)
# Kinds of rows, and groups of changes.
OWN, OTHER, REFUSAL, TURNS, CAPABILITY = "own", "other", "refusal", "turns", "capability"
REFUSES = {"decline": "refuses what it should", "harmless": "refuses what is harmless"}
WRONG_WAY = "wrong way"
NOTICED = 5.0  # points: judges tell answers apart that differ by less, and mean nothing by it
SHORT = {
    LORA: "weights",
    ACTIVATION: "activations",
    "prompt_pos": "positive prompt",
    "prompt_neg": "negative prompt",
    RANDOM_LORA: "random differences",
    RANDOM: "random vectors",
}
COLUMNS = columns_of(
    *("group", "measure", "method", "unsteered", "value=value.mean", "low=value.low"),
    *("high=value.high", "n=value.n_questions", "p", "p_holm", "draws", JUDGE),
)
ByUnit = Mapping[int, float]


@dataclass(frozen=True)
class Change:
    """What one method did to one measure, with its interval over questions, prompts or items.

    ``value`` is the change from ``unsteered``, the mean without steering; of the group
    ``WRONG_WAY`` it is a share in percent, and ``p`` tests it against that of the weights. Of
    several random controls, ``draws``, it is over controls and questions, both drawn. ``p_holm`` is
    corrected over the group; ``digits`` are those worth showing. ``judge`` names who judged: ""
    where nobody did, or an older run does not say it.
    """

    group: str
    measure: str
    method: str
    unsteered: float | None
    value: Interval | None
    p: float | None
    p_holm: float | None = None
    draws: int = 1
    digits: int = 0
    judge: str = ""

    @property
    def clear(self) -> bool:
        """Whether the corrected test excludes chance."""
        return wording.clear_sign(self.value, self.p_holm) != 0


def read_side_effects(run: Run, judge: str = "first") -> list[Change]:
    """Return all changes of a run, group by group; ``judge`` is "first" or "second"."""
    rows = [row for row in run.read(SCORES) if row["judge"] == judge]
    kinds = grouped(rows, lambda row: row["kind"])
    found = [
        _others(kinds.get(OTHER, [])),
        _wrong_way(kinds.get(OWN, []), run.record["config"]["sign"]),
        _refusals(kinds.get(REFUSAL, [])),
        _turns(kinds.get(TURNS, [])),
        _capability(run) if judge == "first" else [],
    ]
    return [change for group in found for change in corrected(_tested(group))]


def _tested(group: Sequence[Change]) -> list[Change]:
    """Return changes with those of random controls, which stand beside, as not tested."""
    return [replace(each, p=None) if each.method in CONTROLS else each for each in group]


def _others(rows: Sequence[Row]) -> list[Change]:
    """Return what happened to each other trait, and to the coherence of all these answers."""
    by_trait = grouped((r for r in rows if r["criterion"] != COHERENCE), lambda r: r["asked"])
    measures = {name.replace("_", " "): own for name, own in by_trait.items()}
    coherent = [row for row in rows if row["criterion"] == COHERENCE]
    measures |= {COHERENCE: coherent} if coherent else {}
    return [
        each
        for name, own in measures.items()
        for each in _judged(own, _changes(OTHER, name, _by_unit(own)))
    ]


def _wrong_way(rows: Sequence[Row], sign: float) -> list[Change]:
    """Return the share of the steered trait's questions that moved against what was asked for.

    Tan et al. 2024, arXiv:2407.12404, call these questions anti-steerable.
    """
    scores = _by_unit(rows)
    effects = {
        method: {at: sign * gap for at, gap in minus(own, scores[UNSTEERED]).items()}
        for method, own in scores.items()
        if method != UNSTEERED
    }
    found = []
    for least, name in ((0.0, "wrong way"), (NOTICED, f"wrong way by over {NOTICED:g}")):
        shares = {
            method: {at: 100.0 * (effect < -least) for at, effect in own.items()}
            for method, own in effects.items()
        }
        for method, names in grouped(shares, method_of).items():
            own = [shares[each] for each in names]
            value = mean_over_draws([{at: [share] for at, share in each.items()} for each in own])
            p = None
            if method != LORA:
                _, p = over_draws([minus(shares[LORA], each) for each in own])
            found.append(Change(WRONG_WAY, name, method, None, value, p, draws=len(own)))
    return _judged(rows, found)


def _judged(rows: Iterable[Row], changes: Iterable[Change]) -> list[Change]:
    """Return changes with the names of those who judged the rows that they are of."""
    judge = marked(*(row.get("by", "") for row in rows))
    return [replace(each, judge=judge) for each in changes]


def _refusals(rows: Sequence[Row]) -> list[Change]:
    """Return what happened to the percentage that is refused, of either kind of prompts."""
    by_kind = grouped(rows, lambda row: row["asked"])
    return [
        each
        for kind, name in REFUSES.items()
        if kind in by_kind
        for each in _changes(REFUSAL, name, _by_unit(by_kind[kind]), scale=Bounds(-100.0, 100.0))
    ]


def _turns(rows: Sequence[Row]) -> list[Change]:
    """Return by how much a method's effect grows with every turn of a conversation."""
    found = []
    for criterion, own in grouped(rows, lambda row: row["criterion"]).items():
        by_conversation = grouped(
            (row for row in own if row["score"] is not None),
            lambda row: (row["method"], row["unit"]),
        )
        slopes: dict[str, dict[int, float]] = {}
        for (method, unit), said in by_conversation.items():
            if len(said) > 1:
                turns, scores = ([row[key] for row in said] for key in ("turn", "score"))
                slopes.setdefault(method, {})[unit] = float(np.polyfit(turns, scores, 1)[0])
        name = f"{criterion.replace('_', ' ')}, every turn"
        found += _judged(own, _changes(TURNS, name, slopes, digits=1))
    return found


def gap_by_turn(run: Run, criterion: str) -> dict[str, tuple[list[int], list[float]]]:
    """Return the turns of conversations, and every method's mean effect in each, by method."""
    rows = [
        row
        for row in run.read(SCORES)
        if (row["kind"], row["criterion"], row["judge"]) == (TURNS, criterion, "first")
    ]
    by_turn = grouped(rows, lambda row: row["turn"])
    found: dict[str, tuple[list[int], list[float]]] = {}
    for turn, own in sorted(by_turn.items()):
        for each in _changes(TURNS, criterion, _by_unit(own)):
            if each.value is not None and each.value.mean is not None:
                turns, means = found.setdefault(each.method, ([], []))
                turns.append(turn)
                means.append(each.value.mean)
    return found


def _capability(run: Run) -> list[Change]:
    """Return what happened to the tasks, item by item."""
    items = Run(run.folder / CAPABILITY).read("items")
    if not items:
        return []
    scores = score_items(items, UNSTEERED)
    plain = {each.measure: each.score.mean for each in scores if each.condition == UNSTEERED}
    return [
        Change(
            CAPABILITY, each.measure, each.condition, plain[each.measure], each.difference, each.p,
            digits=2,
        )
        for each in scores
        if each.condition != UNSTEERED
    ]  # fmt: skip


def _by_unit(rows: Iterable[Row]) -> dict[str, dict[int, float]]:
    """Return the scores of every method by what is the same for all, numbered.

    Of several answers to one question the mean.
    """
    known = [row for row in rows if row["score"] is not None]
    places = sorted({(row["asked"], row["unit"]) for row in known})
    number = {place: at for at, place in enumerate(places)}
    found: dict[str, dict[int, float]] = {}
    by = grouped(known, lambda row: (row["method"], (row["asked"], row["unit"])))
    for (method, place), own in by.items():
        found.setdefault(method, {})[number[place]] = fmean(row["score"] for row in own)
    return found


def _changes(
    group: str,
    measure: str,
    scores: Mapping[str, ByUnit],
    digits: int = 0,
    scale: Bounds | None = None,
) -> list[Change]:
    """Return how far every method moved a measure from the unsteered model's."""
    plain = scores.get(UNSTEERED, {})
    gaps = {method: minus(own, plain) for method, own in scores.items() if method != UNSTEERED}
    mean = float(np.mean([*plain.values()])) if plain else None
    found = []
    for method, names in grouped(gaps, method_of).items():
        value, p = over_draws([gaps[name] for name in names], scale)
        found.append(
            Change(group, measure, method, mean, value, p, draws=len(names), digits=digits)
        )
    return found


# -- in words ------------------------------------------------------------------------------------


def side_effects_lines(found: Sequence[Change]) -> tuple[str, ...]:
    """Say how many other traits each method moved, and how often it went the wrong way."""
    lines = []
    told = [each for each in found if each.method not in CONTROLS]
    traits = [each for each in told if each.group == OTHER and each.measure != COHERENCE]
    for method, own in grouped(traits, lambda each: each.method).items():
        clear = [each for each in own if each.clear]
        said = ", ".join(f"{each.measure} {wording.change(each.value)}" for each in clear)
        lines.append(
            f"{SHORT[method]} clearly moved {len(clear)} of {len(own)} other traits"
            + (f" ({said})" if clear else "")
        )
    wrong = [each for each in found if each.group == WRONG_WAY and each.measure == WRONG_WAY]
    clear = [each for each in told if each.group in (REFUSAL, TURNS, CAPABILITY) and each.clear]
    further = "; ".join(
        f"{SHORT[each.method]}, {each.measure}: {wording.interval(each.value, each.digits)}"
        for each in clear
    )
    shares = ", ".join(f"{SHORT[each.method]} {wording.interval(each.value)}%" for each in wrong)
    moved = f"At the highest level: {'; '.join(lines)}." if lines else ""
    beyond = f"Clear changes beyond traits: {further}." if further else ""
    wrong_way = f"Questions that went the wrong way: {shares}."
    return tuple(filter(None, (moved, wrong_way, beyond)))


def side_effects_table(found: Sequence[Change]) -> Table:
    """Return every measure with what each method did to it; a star where that is clear."""
    methods = list(dict.fromkeys(each.method for each in found))
    rows = []
    for measure, own in grouped(found, lambda each: each.measure).items():
        by_method = {each.method: each for each in own}
        first = own[0]
        cells = [_cell(by_method.get(method)) for method in methods]
        name = measure + unfit_mark(first.judge)
        rows.append([name, wording.number(first.unsteered, first.digits), *cells])
    columns = ["measure", "unsteered", *(SHORT[each] for each in methods)]
    return Table.of(" | ".join(columns), rows)


def _cell(each: Change | None) -> str:
    if each is None or each.value is None:
        return wording.NONE
    share = "%" if each.group == WRONG_WAY else ""
    return wording.interval(each.value, each.digits) + share + "*" * each.clear
