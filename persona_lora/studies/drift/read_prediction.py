"""How well projections predict judged drift, over finetunes: correlations and held-out errors.

Knows rows of two kinds: ``judged`` (finetune, trait, score) and ``predictors`` (finetune,
direction, kind, value). The units are data sets: finetunes of one are drawn, shuffled and left out
together, as ``judged`` names them (``data``). One whose data cannot be told is a unit of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr

from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.curve import corrected
from persona_lora.report.resampling import (
    Array,
    Bounds,
    correlation_bounds,
    correlation_gap_bounds,
    weighted_correlation,
)
from persona_lora.report.scores import JUDGE, Row, grouped, judges_of, marked, unfit_mark
from persona_lora.report.sections import Table
from persona_lora.report.trust import fitness_tables
from persona_lora.report.two_judges import across_runs, lead_of

BASE = "base"
WEIGHTS, NULL = "weights", "random"
TEXT, DOSE = TOLD_BY_RECORDS = "training text", "dose"
DISTANCE, FROM_CONTROL = "distance", "distance from control"
SHARED = "shared component"
POOLED = "all traits"
RESAMPLES = 2000
PERMUTATIONS = 5000  # at least, and so many a prediction that Holm's correction can find one
PERMUTATIONS_EACH = 100
FEWEST = 4
FEWEST_DATA_SETS = 3


@dataclass(frozen=True)
class Prediction:
    """One predictor against the change of one judged trait, over ``n`` finetunes.

    ``r`` is Pearson's with a 95% interval over ``data_sets`` (``correlation_bounds``; −1 to 1 for
    fewer than three), ``rho`` Spearman's, ``p`` a permutation test of r that shuffles the data
    sets' means, ``p_holm`` corrected over all predictions. ``error`` is the root mean square error
    of a line fitted without the finetune that it predicts, ``data_error`` without all of its data
    set; ``plain_error`` and ``plain_data_error`` are those of the mean of the others. ``own``:
    direction and judged trait have one name. Pooled predictions standardise predictor and change
    within each trait first, for errors by those that a line is fitted on: these are in standard
    deviations of
    the change, the others in its points. A data set is drawn, shuffled or left out with all its
    traits.
    """

    judged: str
    direction: str
    kind: str
    own: bool
    n: int
    data_sets: int
    r: float
    r_low: float
    r_high: float
    rho: float
    p: float
    error: float
    plain_error: float
    data_error: float
    plain_data_error: float
    p_holm: float | None = None

    @property
    def said(self) -> str:
        """r with its interval."""
        return wording.between(self.r, self.r_low, self.r_high, 2)


@dataclass(frozen=True)
class Contrast:
    """The difference of two kinds' pooled r, with a paired interval over data sets."""

    first: str
    second: str
    difference: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Null:
    """A trait's own r in weight space among those of random directions of the same spectrum.

    ``p`` is the share of the ``n`` random directions, the own one counted among them, whose |r| is
    at least as large; ``high`` their 95% quantile of |r|. ``shuffled_p`` and ``shuffled_high`` are
    the same of the own direction, with the scores shuffled over data sets.
    """

    judged: str
    r: float
    high: float
    p: float
    n: int
    shuffled_high: float
    shuffled_p: float


def answers_place(finetune: str) -> Path:
    """Return where below a study's folder the answers of a finetune lie, a run a trait."""
    return Path("answers") / finetune.replace("/", "_")


def changes(judged: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return score − base score by trait and finetune; UserError without the base's scores."""
    base = {row["trait"]: row["score"] for row in judged if row["finetune"] == BASE}
    found: dict[str, dict[str, float]] = {}
    for row in judged:
        if row["finetune"] == BASE or row["score"] is None:
            continue
        if base.get(row["trait"]) is None:
            raise UserError(f"the base model was not judged on {row['trait']}; judge it first")
        found.setdefault(row["trait"], {})[row["finetune"]] = row["score"] - base[row["trait"]]
    return found


def data_sets(judged: Sequence[Row]) -> dict[str, str]:
    """Return the data set of every finetune; one that cannot be told is a data set of its own."""
    return {row["finetune"]: row.get("data") or f"finetune {row['finetune']}" for row in judged}


def rows_of(run: Run) -> tuple[Sequence[Row], Sequence[Row]]:
    """Return what was judged, and by whom, and what predicts it.

    Less the controls, where the run has them.
    """
    by, predictors = judges_by_trait(run), run.read("predictors")
    judged = [{**row, JUDGE: by[row["trait"]]} for row in run.read("judged")]
    if any(row.get("control") for row in judged):
        return less_controls(judged, predictors)
    return judged, predictors


def less_controls(judged: Sequence[Row], predictors: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Take from every finetune its control (``control``), from scores and predictors alike.

    The controls go, and with them the dose, which is theirs too; scores are what a finetune has
    above its control. How far a finetune is from its control has the control off already, and
    stands in place of how far it moved. Finetunes whose controls were trained on the same data are
    one unit.
    """
    control = {row["finetune"]: row["control"] for row in judged if row.get("control")}
    data, drift = data_sets(judged), changes(judged)
    scored: list[Row] = [{**row, "score": 0.0} for row in judged if row["finetune"] == BASE]
    for row in judged:
        trait, own = drift.get(row["trait"], {}), row["finetune"]
        if own in control and {own, control[own]} <= trait.keys():
            score = trait[own] - trait[control[own]]
            scored.append({**row, "score": score, "data": data[control[own]]})
    values = {_place(row): row["value"] for row in predictors}
    taken: list[Row] = []
    for row in predictors:
        if row["kind"] == FROM_CONTROL:
            taken.append(row)
        elif row["finetune"] in control and row["kind"] not in (DOSE, DISTANCE):
            of_control = values.get(_place({**row, "finetune": control[row["finetune"]]}))
            if of_control is not None:
                taken.append({**row, "value": row["value"] - of_control})
    return scored, taken


def _place(row: Row) -> tuple[str, str, str]:
    return row["kind"], row["direction"], row["finetune"]


def predict(judged: Sequence[Row], predictors: Sequence[Row], *, seed: int = 0) -> list[Prediction]:
    """Return every trait × direction × kind, and the pooled prediction of each kind.

    The shuffles behind p grow with the number of predictions. UserError for fewer than four
    finetunes.
    """
    drift, data = changes(judged), data_sets(judged)
    values = _by_place(predictors)
    kinds = list(dict.fromkeys(kind for kind, _ in values))
    tested = len(values) * len(drift) + len(kinds)
    draws = seed, max(PERMUTATIONS, PERMUTATIONS_EACH * tested)
    found = []
    for (kind, direction), by_finetune in values.items():
        for trait in drift:
            both, x, y = _aligned(by_finetune, drift[trait])
            units = _numbered(both, data)
            found.append(_prediction(trait, direction, kind, [(x, y)], units, draws))
    names = sorted({name for by in values.values() for name in by})
    for kind in kinds:
        parts = _pooled_by_finetune(kind, values, drift, names)
        if not parts:
            raise UserError(
                f"no trait has a direction of its own name among {kind}; nothing to pool"
            )
        found.append(_prediction(POOLED, POOLED, kind, parts, _numbered(names, data), draws))
    return corrected(found)


def contrasts(judged: Sequence[Row], predictors: Sequence[Row], *, seed: int = 0) -> list[Contrast]:
    """Compare the pooled correlations of all pairs of kinds, resampling the same data sets."""
    drift, values = changes(judged), _by_place(predictors)
    kinds = list(dict.fromkeys(kind for kind, _ in values))
    names = sorted({name for by in values.values() for name in by})
    pooled = {kind: _pooled_by_finetune(kind, values, drift, names) for kind in kinds}
    units = _numbered(names, data_sets(judged))
    over = {kind: _over_units(parts, units, seed) for kind, parts in pooled.items()}
    found = []
    for first, second in combinations(kinds, 2):
        one, other = over[first], over[second]
        low, high = correlation_gap_bounds(
            (one.r, other.r), (one.bounds, other.bounds), (one.left_out, other.left_out)
        )
        found.append(Contrast(first, second, one.r - other.r, low, high, len(names)))
    return found


def nulls(judged: Sequence[Row], predictors: Sequence[Row], *, seed: int = 0) -> list[Null]:
    """Compare every trait's own direction with random ones, named "trait#k", and with chance."""
    drift, data = changes(judged), data_sets(judged)
    turned = grouped((r for r in predictors if r["kind"] == NULL), lambda row: row["direction"])
    random = {name: {r["finetune"]: r["value"] for r in rows} for name, rows in turned.items()}
    own = _by_place(predictors)
    found = []
    for trait, directions in grouped(random, lambda name: name.partition("#")[0]).items():
        if trait not in drift or (WEIGHTS, trait) not in own:
            continue
        names, x, y = _aligned(own[WEIGHTS, trait], drift[trait])
        r = _r(x, y)
        others = np.array([_r(*_aligned(random[each], drift[trait])[1:]) for each in directions])
        shuffled = _shuffled([(x, y)], _numbered(names, data), (seed, PERMUTATIONS))
        chance = _high(others), _share_beyond(others, r), len(others)
        found.append(Null(trait, r, *chance, _high(shuffled), _share_beyond(shuffled, r)))
    return found


class _OverUnits(NamedTuple):
    """r, its interval over data sets, and r without each of these."""

    r: float
    bounds: Bounds
    left_out: Array


def _over_units(
    parts: Sequence[tuple[Array, Array]], units: NDArray[np.intp], seed: int
) -> _OverUnits:
    each_out = (units != np.arange(units.max() + 1)[:, None]).astype(np.float64)
    weights = np.ones((1, len(units))), _drawn(units, np.random.default_rng(seed)), each_out
    (r,), resampled, left_out = (_r_of(parts, each) for each in weights)
    return _OverUnits(float(r), correlation_bounds(r, resampled, left_out), left_out)


def _high(values: Array) -> float:
    """Return the 95% quantile of |r|; NaN where there is none."""
    known = np.abs(values[np.isfinite(values)])
    return float(np.quantile(known, 0.95)) if len(known) else float("nan")


def _share_beyond(values: Array, r: float) -> float:
    """Return the share with as large an |r|, the observed one counted among them: never 0.

    What has no r counts as far, so that values that do not vary are no finding.
    """
    as_far = int(np.sum(~(np.abs(values) < abs(r) - 1e-12)))
    return (as_far + 1) / (len(values) + 1)


def _numbered(names: Sequence[str], data: Mapping[str, str]) -> NDArray[np.intp]:
    """Return the number of every finetune's data set."""
    return np.unique([data[name] for name in names], return_inverse=True)[1]


def _drawn(units: NDArray[np.intp], rng: np.random.Generator) -> Array:
    """Draw whole data sets: how often each finetune is drawn, ``[resamples, finetunes]``.

    No resamples of fewer than three data sets: they say nothing of others.
    """
    count = int(units.max()) + 1
    resamples = RESAMPLES if count >= FEWEST_DATA_SETS else 0
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
    return drawn[:, units].astype(np.float64)


def _r_of(parts: Sequence[tuple[Array, Array]], weights: Array) -> Array:
    """Return Pearson's r of finetunes drawn ``weights [resamples, finetunes]`` times."""
    x, y = (np.concatenate([part[side] for part in parts])[None, :] for side in (0, 1))
    return _rows_r(x, y, np.tile(weights, (1, len(parts))))


def _rows_r(x: Array, y: Array, weights: Array) -> Array:
    """Return the weighted r of each row; NaN for fewer than three values, or of constants."""
    known = np.isfinite(x) & np.isfinite(y)
    weights = weights * known
    r, enough = np.full(len(weights), np.nan), (weights > 0).sum(axis=1) >= FEWEST - 1
    x, y = (np.broadcast_to(np.nan_to_num(each), weights.shape)[enough] for each in (x, y))
    r[enough] = weighted_correlation(x, y, weights[enough])
    return r


def _shuffled(
    parts: Sequence[tuple[Array, Array]], units: NDArray[np.intp], draws: tuple[int, int]
) -> Array:
    """Return r with the data sets' mean changes shuffled among them, ``[permutations]``.

    What a finetune differs from the others of its data set stays with it. ``draws`` are a seed and
    the number of permutations. NaN for fewer than three values, or of constants.
    """
    orders = _orders(int(units.max()) + 1, *draws)
    middle = [np.nan_to_num(np.concatenate(side)).mean() for side in zip(*parts, strict=True)]
    sums = [_shuffled_sums(x - middle[0], y - middle[1], units, orders) for x, y in parts]
    n, x, y, xx, yy, xy = np.sum(sums, axis=0)
    n = np.where(n < FEWEST - 1, np.nan, n)
    scale = np.sqrt((xx - x * x / n).clip(0) * (yy - y * y / n).clip(0))
    r = np.divide(xy - x * y / n, scale, out=np.full_like(scale, np.nan), where=scale > 1e-9)
    return np.clip(r, -1.0, 1.0)


def _shuffled_sums(x: Array, y: Array, units: NDArray[np.intp], orders: NDArray[np.intp]) -> Array:
    """Return how many there are, and Σx, Σy, Σx², Σy² and Σxy, of a part: ``[6, permutations]``.

    Finetune i of data set u gets the mean m of another and keeps its rest, eᵢ = yᵢ − mᵤ: each is a
    sum over data sets, of m or m² times what is summed over their finetunes once.
    """
    count, known = len(orders), np.isfinite(x) & np.isfinite(y)
    scored = np.bincount(units, np.isfinite(y), count)
    means = np.bincount(units, np.nan_to_num(y), count)
    means = np.divide(means, scored, out=np.full(count, np.nan), where=scored > 0)
    e = y - means[units]
    one, x1, e1, xx, ee, xe = (
        np.bincount(units, np.where(known, each, 0.0), count)
        for each in (1.0, x, e, x * x, e * e, x * e)
    )
    there = np.isfinite(means).astype(np.float64)[orders]  # [data sets, permutations]
    m = np.nan_to_num(means)[orders]
    sums = np.stack([each @ there for each in (one, x1, e1, xx, ee, xe)])  # one matmul is slower
    sums[2] += one @ m
    sums[4] += 2 * e1 @ m + one @ m**2
    sums[5] += x1 @ m
    return sums


@lru_cache(maxsize=4)
def _orders(count: int, seed: int, permutations: int) -> NDArray[np.intp]:
    """Return orders of data sets, ``[data sets, permutations]``; read-only, and kept for all."""
    columns = np.tile(np.arange(count)[:, None], permutations)
    orders = np.random.default_rng(seed).permuted(columns, axis=0)
    orders.flags.writeable = False
    return orders


def _by_place(predictors: Sequence[Row]) -> dict[tuple[str, str], dict[str, float]]:
    values: dict[tuple[str, str], dict[str, float]] = {}
    for row in predictors:
        if row["kind"] != NULL:
            values.setdefault((row["kind"], row["direction"]), {})[row["finetune"]] = row["value"]
    # What only some finetunes' records tell is no predictor of all of them.
    finetunes = {row["finetune"] for row in predictors}
    return {
        place: known
        for place, known in values.items()
        if place[0] not in TOLD_BY_RECORDS or known.keys() == finetunes
    }


def _aligned(x: Mapping[str, float], y: Mapping[str, float]) -> tuple[list[str], Array, Array]:
    names = sorted(set(x) & set(y))
    if len(names) < FEWEST:
        raise UserError(f"{len(names)} finetunes are too few to correlate; at least {FEWEST}")
    return names, np.array([x[name] for name in names]), np.array([y[name] for name in names])


def _pooled_by_finetune(
    kind: str,
    values: Mapping[tuple[str, str], Mapping[str, float]],
    drift: Mapping[str, Mapping[str, float]],
    names: Sequence[str],
) -> list[tuple[Array, Array]]:
    """Return for each trait with a direction of its own the standardised (x, y) by finetune."""

    def column(by_finetune: Mapping[str, float]) -> Array:
        return _standard(np.array([by_finetune.get(name, np.nan) for name in names]))

    return [
        (column(values[kind, trait]), column(by_finetune))
        for trait, by_finetune in drift.items()
        if (kind, trait) in values
    ]


def _stacked(parts: Sequence[tuple[Array, Array]], chosen: Any) -> tuple[Array, Array]:
    x, y = (np.concatenate([part[side][chosen] for part in parts]) for side in (0, 1))
    known = np.isfinite(x) & np.isfinite(y)
    return x[known], y[known]


def _standard(values: Array, kept: Any = slice(None)) -> Array:
    """Return values less the mean of those kept, in their standard deviations where they differ."""
    known = values[kept][np.isfinite(values[kept])]
    if not len(known):
        return np.full_like(values, np.nan)
    return (values - known.mean()) / (known.std() if np.ptp(known) else 1.0)


def _r(x: Array, y: Array) -> float:
    if len(x) < 3 or not np.ptp(x) or not np.ptp(y):
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def _prediction(
    judged: str,
    direction: str,
    kind: str,
    parts: Sequence[tuple[Array, Array]],
    units: NDArray[np.intp],
    draws: tuple[int, int],
) -> Prediction:
    """Correlate the (x, y) of one or several traits; entry i of every part is finetune i.

    ``draws`` are a seed and the number of permutations.
    """
    alone = np.arange(len(units))
    error = partial(_left_out_error, parts, pooled=judged == POOLED)
    x, y = _stacked(parts, alone)
    varies = np.ptp(x) and np.ptp(y)
    r = float(pearsonr(x, y).statistic) if varies else 0.0
    low, high = _over_units(parts, units, draws[0]).bounds
    return Prediction(
        judged=judged,
        direction=direction,
        kind=kind,
        own=judged == direction,
        n=len(units),
        data_sets=int(units.max()) + 1,
        r=r,
        r_low=low,
        r_high=high,
        rho=float(spearmanr(x, y).statistic) if varies else 0.0,
        p=_share_beyond(_shuffled(parts, units, draws), r),
        error=error(alone, line=True),
        plain_error=error(alone, line=False),
        data_error=error(units, line=True),
        plain_data_error=error(units, line=False),
    )


def _left_out_error(
    parts: Sequence[tuple[Array, Array]], units: NDArray[np.intp], *, line: bool, pooled: bool
) -> float:
    """Return the error on units that a line (or the mean) was fitted without; NaN for one unit.

    Pooled parts are standardised by what is fitted on, and so is the error.
    """
    errors: list[float] = []
    for unit in np.unique(units):
        kept = units != unit
        own = [(_standard(x, kept), _standard(y, kept)) for x, y in parts] if pooled else parts
        x, y = _stacked(own, kept)
        out_x, out_y = _stacked(own, ~kept)
        if not len(y):
            continue
        if line and np.ptp(x):
            slope, intercept = np.polyfit(x, y, 1)
            guess = slope * out_x + intercept
        else:
            guess = np.full_like(out_y, y.mean())
        errors += [float(each) for each in (out_y - guess) ** 2]
    return float(np.sqrt(np.mean(errors))) if errors else float("nan")


# -- in words ----------------------------------------------------------------------------------


def prediction_table(run: Run) -> Table:
    """Return what every direction predicts of every judged trait."""
    marks = unfit_marks(run)
    rows = (
        [
            each.kind,
            each.judged + marks.get(each.judged, ""),
            each.direction,
            f"{each.n} / {each.data_sets}",
        ]
        + [each.said, wording.number(each.rho, 2)]
        + [wording.p_value(each.p_holm), _errors(each, each.error, each.plain_error)]
        + [_errors(each, each.data_error, each.plain_data_error)]
        for each in predict(*rows_of(run))
    )
    return Table.of(
        "predictor | judged | direction | finetunes / data sets | r | ρ | p (Holm) | error | "
        "error, data set left out",
        rows,
    )


def _errors(each: Prediction, *errors: float) -> str:
    """Say the error of the line and that of the mean, with their unit where it is not points."""
    digits, unit = (2, " sd") if each.judged == POOLED else (1, "")
    return " / ".join(wording.number(error, digits) for error in errors) + unit


def unfit_marks(run: Run) -> dict[str, str]:
    """Return what stands behind each trait's name whose judge is unfit."""
    marks = {trait: unfit_mark(judge) for trait, judge in judges_by_trait(run).items()}
    return {trait: mark for trait, mark in marks.items() if mark}


def judges_by_trait(run: Run) -> dict[str, str]:
    """Return who judged the finetunes on each trait."""
    return {
        trait: marked(*(judges_of(each.read("verdicts"), trait) for each in asked.values()))
        for trait, asked in _asked(run).items()
    }


def _asked(run: Run) -> dict[str, dict[str, Run]]:
    """Return the run of every finetune's answers, by trait and by finetune."""
    judged = run.read("judged")
    names, traits = (dict.fromkeys(row[each] for row in judged) for each in ("finetune", "trait"))
    return {
        trait: {name: Run(run.folder / answers_place(name) / trait) for name in names}
        for trait in traits
    }


def judge_tables(run: Run) -> tuple[Table, ...]:
    """Return how the judges of the traits agree with labels, and what they made of nonsense.

    As it is kept with the base's answers: a row for each judge and trait.
    """
    asked = _asked(run)
    return fitness_tables([own[BASE] for own in asked.values() if BASE in own], asked)


def prediction_lines(run: Run) -> Iterator[str]:
    """Say how the judges agree, how predictors differ, and what random differences reach."""
    for trait, asked in _asked(run).items():
        said = lead_of("", across_runs(trait, asked, BASE), asked, trait)
        if said:
            yield f"{trait}: {said}"
    rows = rows_of(run)
    yield _units_line(run, rows[0])
    for each in contrasts(*rows):
        gap = wording.between(each.difference, each.low, each.high, 2)
        yield f"pooled r, {each.first} minus {each.second}: {gap} over {each.n} finetunes"
    for null in nulls(*rows):
        yield (
            f"{null.judged}: r {wording.number(null.r, 2)} with its own difference; random ones of "
            f"the same spectrum reach |r| {wording.number(null.high, 2)} in 95 of 100 (n {null.n}, "
            f"p {wording.p_value(null.p)}), scores shuffled over data sets "
            f"{wording.number(null.shuffled_high, 2)} (p {wording.p_value(null.shuffled_p)})"
        )


def _units_line(run: Run, judged: Sequence[Row]) -> str:
    """Say of how many data sets the finetunes are, what is taken off, and what is not known."""
    rows = [row for row in judged if row["finetune"] != BASE]
    known = {row["finetune"]: row["data"] for row in rows if row.get("data")}
    finetunes = {row["finetune"] for row in rows}
    unknown = len(finetunes) - len(known)
    own = f"; the data of {unknown} cannot be told, each counts as its own" if unknown else ""
    rows_file = run.record["config"].get("control_rows")
    less = f", each less the finetune on {rows_file} that is its control" if rows_file else ""
    return (
        f"{len(finetunes)} finetunes of {len(set(known.values())) + unknown} data sets{less}; data "
        f"sets are what is resampled, shuffled and left out{own}"
    )


def seeds_of(run: Run) -> int:
    """Return how many training seeds the finetunes have, those that are recorded."""
    return max(1, len({row["seed"] for row in run.read("judged") if row.get("seed") is not None}))
