"""How well projections predict judged drift, over finetunes: correlations and held-out errors.

Knows rows of two kinds: ``judged`` (finetune, trait, score) and ``predictors`` (finetune,
direction, kind, value). The units are finetunes: they are what is resampled and left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr

from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.curve import corrected
from persona_lora.report.resampling import Array
from persona_lora.report.sections import Table
from persona_lora.report.two_judges import across_runs, lead_of

Row = Mapping[str, Any]

BASE = "base"
WEIGHTS, NULL = "weights", "random"
TEXT, DOSE = TOLD_BY_RECORDS = "training text", "dose"
POOLED = "all traits"
RESAMPLES = 2000
PERMUTATIONS = 5000
FEWEST = 4


@dataclass(frozen=True)
class Prediction:
    """One predictor against the change of one judged trait, over ``n`` finetunes.

    ``r`` and ``rho`` are Pearson's and Spearman's with 95% bootstrap intervals over finetunes,
    ``p`` a permutation test of r, ``p_holm`` corrected over all predictions. ``error`` is the
    root mean square error of a line fitted without the finetune that it predicts, ``plain_error``
    that of the mean of the others. ``own``: direction and judged trait have one name. Pooled
    predictions standardise predictor and change within each trait first; their units are
    finetunes too: one is drawn, shuffled or left out with all its traits.
    """

    judged: str
    direction: str
    kind: str
    own: bool
    n: int
    r: float
    r_low: float
    r_high: float
    rho: float
    p: float
    error: float
    plain_error: float
    p_holm: float | None = None


@dataclass(frozen=True)
class Contrast:
    """The difference of two kinds' pooled r, with a paired bootstrap interval over finetunes."""

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
    at least as large; ``high`` their 95% quantile of |r|.
    """

    judged: str
    r: float
    high: float
    p: float
    n: int


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


def predict(judged: Sequence[Row], predictors: Sequence[Row], *, seed: int = 0) -> list[Prediction]:
    """Return every trait × direction × kind, and the pooled prediction of each kind.

    UserError for fewer than four finetunes.
    """
    drift = changes(judged)
    values = _by_place(predictors)
    found = [
        _prediction(trait, direction, kind, [_aligned(by_finetune, drift[trait])], seed)
        for (kind, direction), by_finetune in values.items()
        for trait in drift
    ]
    names = sorted({name for by in values.values() for name in by})
    for kind in dict.fromkeys(kind for kind, _ in values):
        parts = _pooled_by_finetune(kind, values, drift, names)
        if not parts:
            raise UserError(
                f"no trait has a direction of its own name among {kind}; nothing to pool"
            )
        found.append(_prediction(POOLED, POOLED, kind, parts, seed))
    return corrected(found)


def contrasts(judged: Sequence[Row], predictors: Sequence[Row], *, seed: int = 0) -> list[Contrast]:
    """Compare the pooled correlations of all pairs of kinds, resampling the same finetunes."""
    drift, values = changes(judged), _by_place(predictors)
    kinds = list(dict.fromkeys(kind for kind, _ in values))
    names = sorted({name for by in values.values() for name in by})
    pooled = {kind: _pooled_by_finetune(kind, values, drift, names) for kind in kinds}
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(names), size=(RESAMPLES, len(names)))
    found = []
    for at, first in enumerate(kinds):
        for second in kinds[at + 1 :]:
            gaps = [
                _r(*_stacked(pooled[first], d)) - _r(*_stacked(pooled[second], d)) for d in draws
            ]
            known = np.array([gap for gap in gaps if np.isfinite(gap)])
            everything = np.arange(len(names))
            difference = _r(*_stacked(pooled[first], everything)) - _r(
                *_stacked(pooled[second], everything)
            )
            low, high = np.quantile(known, [0.025, 0.975])
            found.append(
                Contrast(first, second, float(difference), float(low), float(high), len(names))
            )
    return found


def nulls(judged: Sequence[Row], predictors: Sequence[Row]) -> list[Null]:
    """Compare every trait's own direction with random ones, named "trait#k"."""
    drift = changes(judged)
    random: dict[str, dict[str, dict[str, float]]] = {}
    for row in predictors:
        if row["kind"] == NULL:
            trait, _, _ = row["direction"].partition("#")
            by_direction = random.setdefault(trait, {})
            by_direction.setdefault(row["direction"], {})[row["finetune"]] = row["value"]
    own = _by_place(predictors)
    found = []
    for trait, directions in random.items():
        if trait not in drift or (WEIGHTS, trait) not in own:
            continue
        r = _r(*_aligned(own[WEIGHTS, trait], drift[trait]))
        others = np.array([abs(_r(*_aligned(x, drift[trait]))) for x in directions.values()])
        as_far = int(np.sum(others >= abs(r) - 1e-12))
        p = (as_far + 1) / (len(others) + 1)
        found.append(Null(trait, r, float(np.quantile(others, 0.95)), p, len(others)))
    return found


def prediction_rows(found: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Return predictions as plain rows."""
    return [asdict(each) for each in found]


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


def _aligned(x: Mapping[str, float], y: Mapping[str, float]) -> tuple[Array, Array]:
    names = sorted(set(x) & set(y))
    if len(names) < FEWEST:
        raise UserError(f"{len(names)} finetunes are too few to correlate; at least {FEWEST}")
    return np.array([x[name] for name in names]), np.array([y[name] for name in names])


def _pooled_by_finetune(
    kind: str,
    values: Mapping[tuple[str, str], Mapping[str, float]],
    drift: Mapping[str, Mapping[str, float]],
    names: Sequence[str],
) -> list[tuple[Array, Array]]:
    """Return for each trait with a direction of its own the standardised (x, y) by finetune."""
    parts = []
    for trait, by_finetune in drift.items():
        own = values.get((kind, trait))
        if own is not None:
            x = np.array([own.get(name, np.nan) for name in names])
            y = np.array([by_finetune.get(name, np.nan) for name in names])
            parts.append((_standard(x), _standard(y)))
    return parts


def _stacked(parts: Sequence[tuple[Array, Array]], chosen: Any) -> tuple[Array, Array]:
    x = np.concatenate([x[chosen] for x, _ in parts]) if parts else np.zeros(0)
    y = np.concatenate([y[chosen] for _, y in parts]) if parts else np.zeros(0)
    known = np.isfinite(x) & np.isfinite(y)
    return x[known], y[known]


def _standard(values: Array) -> Array:
    spread = np.nanstd(values)
    return (values - np.nanmean(values)) / spread if spread else np.zeros_like(values)


def _r(x: Array, y: Array) -> float:
    if len(x) < 3 or not np.ptp(x) or not np.ptp(y):
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def _prediction(
    judged: str, direction: str, kind: str, parts: Sequence[tuple[Array, Array]], seed: int
) -> Prediction:
    """Correlate the (x, y) of one or several traits; entry i of every part is finetune i."""
    rng = np.random.default_rng(seed)
    n = len(parts[0][0])
    x, y = _stacked(parts, np.arange(n))
    r = float(pearsonr(x, y).statistic) if np.ptp(x) and np.ptp(y) else 0.0
    resampled = np.array(
        [_r(*_stacked(parts, each)) for each in rng.integers(n, size=(RESAMPLES, n))]
    )
    known = resampled[np.isfinite(resampled)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (float("nan"),) * 2
    shuffled = np.array([_shuffled_r(parts, rng.permutation(n)) for _ in range(PERMUTATIONS)])
    as_far = int(np.sum(np.abs(shuffled) >= abs(r) - 1e-12))
    return Prediction(
        judged=judged,
        direction=direction,
        kind=kind,
        own=judged == direction,
        n=n,
        r=r,
        r_low=float(low),
        r_high=float(high),
        rho=float(spearmanr(x, y).statistic) if np.ptp(x) and np.ptp(y) else 0.0,
        p=(as_far + 1) / (PERMUTATIONS + 1),
        error=_left_out_error(parts, line=True),
        plain_error=_left_out_error(parts, line=False),
    )


def _shuffled_r(parts: Sequence[tuple[Array, Array]], order: Any) -> float:
    return _r(*_stacked([(x, y[order]) for x, y in parts], np.arange(len(order))))


def _left_out_error(parts: Sequence[tuple[Array, Array]], *, line: bool) -> float:
    n = len(parts[0][0])
    errors: list[float] = []
    for at in range(n):
        x, y = _stacked(parts, np.arange(n) != at)
        out_x, out_y = _stacked(parts, np.array([at]))
        if line and np.ptp(x):
            slope, intercept = np.polyfit(x, y, 1)
            guess = slope * out_x + intercept
        else:
            guess = np.full_like(out_y, y.mean())
        errors += [float(each) for each in (out_y - guess) ** 2]
    return float(np.sqrt(np.mean(errors)))


# -- in words ----------------------------------------------------------------------------------


def prediction_table(run: Run) -> Table:
    """Return what every direction predicts of every judged trait."""
    rows = (
        [each.kind, each.judged, each.direction, str(each.n)]
        + [_interval(each.r, each.r_low, each.r_high), wording.number(each.rho, 2)]
        + [wording.p_value(each.p_holm), f"{each.error:.1f} / {each.plain_error:.1f}"]
        for each in predict(run.read("judged"), run.read("predictors"))
    )
    return Table.of("predictor | judged | direction | n | r | ρ | p (Holm) | error", rows)


def prediction_lines(run: Run) -> Iterator[str]:
    """Say how the judges agree, how predictors differ, and what random differences reach."""
    for trait in dict.fromkeys(row["trait"] for row in run.read("judged")):
        names = dict.fromkeys(row["finetune"] for row in run.read("judged"))
        asked = {name: Run(run.folder / answers_place(name) / trait) for name in names}
        said = lead_of("", across_runs(trait, asked, BASE), asked, trait)
        if said:
            yield f"{trait}: {said}"
    rows = run.read("judged"), run.read("predictors")
    for each in contrasts(*rows):
        gap = _interval(each.difference, each.low, each.high)
        yield f"pooled r, {each.first} minus {each.second}: {gap} over {each.n} finetunes"
    for null in nulls(*rows):
        yield (
            f"{null.judged}: r {wording.number(null.r, 2)} with its own difference; random ones of "
            f"the same spectrum reach |r| {wording.number(null.high, 2)} in 95 of 100 (n {null.n}, "
            f"p {wording.p_value(null.p)})"
        )


def _interval(centre: float | None, low: float | None, high: float | None) -> str:
    return f"{wording.number(centre, 2)} [{wording.number(low, 2)}, {wording.number(high, 2)}]"
