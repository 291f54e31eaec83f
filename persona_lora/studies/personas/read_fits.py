"""The fits of a persona's conditions as every table has them, and what may be said of them.

Floors and ceiling (``bounds``) stand beside the conditions that were tested. Reads rows; refuses to
generate and to judge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np
from scipy.stats import spearmanr

from persona_lora.core.options import ObjectiveOptions
from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.comparisons import ConditionFit, Row, fits_over_personas, fits_over_prompts
from persona_lora.report.curve import corrected
from persona_lora.report.resampling import FITS, Bounds
from persona_lora.report.scores import grouped, minus
from persona_lora.report.two_judges import Pair, effects_from
from persona_lora.report.two_way import mean_gap

UNSTEERED, WARNING = "none", "WARNING"
CANNED, RETRIEVAL, SALAD, REAL = "canned", "retrieval", "salad", "real"
BOUNDS = (CANNED, RETRIEVAL, SALAD, REAL)
Over = Callable[[Sequence[Row], str], list[ConditionFit]]
NO_LIMITS = ObjectiveOptions()


def rows_of(run: Run) -> list[Row]:
    """Return the held-out rows of a search or of a comparison, with those of the bounds."""
    return [*run.read("held_out"), *run.read("bounds")]


def limits_of(run: Run) -> ObjectiveOptions:
    """Return the constraints that the searches of a run had."""
    kept = run.record["config"].get("objective", {})
    names = ("min_coherence", "min_relevance", "max_kl", "min_choice")
    return ObjectiveOptions(**{name: kept[name] for name in names if name in kept})


def over_prompts(
    rows: Sequence[Row], reference: str, *, scale: Bounds | None = FITS
) -> list[ConditionFit]:
    """Return the fits of one person: over prompts, and over seeds where a search was repeated."""
    fits = fits_over_prompts(rows, reference, scale=scale)
    return corrected([_over_seeds(each, rows, reference) for each in fits])


def _over_seeds(fit: ConditionFit, rows: Sequence[Row], reference: str) -> ConditionFit:
    """Take the gain of a mix that several searches found over searches and prompts, both drawn.

    Without an interval, and a test, for two searches: they do not show how far others would lie.
    """
    own: dict[int, dict[int, float | None]] = {}
    for row in rows:
        if row["condition"] == fit.condition and row.get("seed") is not None:
            own.setdefault(row["seed"], {})[row["prompt_id"]] = row["score"]
    theirs = [row for row in rows if row["condition"] == reference]  # of several, their mean
    by_prompt = grouped(theirs, lambda row: row["prompt_id"])
    plain = {at: _mean(each, "score") for at, each in by_prompt.items()}
    known = {at: each for at, each in plain.items() if each is not None}
    gaps = [
        {at: each - known[at] for at, each in seed.items() if each is not None and at in known}
        for seed in own.values()
    ]
    if fit.difference is None or len(own) < 2 or not set.intersection(*map(set, gaps)):
        return fit
    gain, p = mean_gap(gaps)
    return replace(fit, difference=gain, p=p, effect_size=None)


def over_personas(rows: Sequence[Row], reference: str) -> list[ConditionFit]:
    """Return the fits over persons: over persons and training seeds where there are several.

    All persons share a training, so that its luck does not average out over them; seeds of a search
    are each person's own, and belong to the person.
    """
    fits = fits_over_personas(rows, reference)
    return corrected([_over_trainings(each, rows, reference) for each in fits])


def _over_trainings(fit: ConditionFit, rows: Sequence[Row], reference: str) -> ConditionFit:
    own, theirs = (_by_training(rows, name) for name in (fit.condition, reference))
    if fit.difference is None or len(own) < 2:
        return fit
    plain = theirs.get("", {})
    gaps = [minus(scores, theirs.get(trained, plain)) for trained, scores in own.items()]
    gain, p = mean_gap(gaps)
    return replace(fit, difference=gain, p=p, effect_size=None)


def _by_training(rows: Sequence[Row], condition: str) -> dict[str, dict[str, float]]:
    """Return a condition's mean fit of every person, by training seed ("" where it has none)."""
    told = [each for each in rows if each["condition"] == condition]
    found: dict[str, dict[str, float]] = {}
    for trained, of_training in grouped(told, lambda row: row.get("trained") or "").items():
        by_persona = grouped(of_training, lambda row: row["persona"])
        means = {persona: _mean(each, "score") for persona, each in by_persona.items()}
        found[trained] = {persona: each for persona, each in means.items() if each is not None}
    return found


def condition_fits(
    rows: Sequence[Row],
    limits: ObjectiveOptions = NO_LIMITS,
    *,
    reference: str = UNSTEERED,
    over: Over = over_prompts,
) -> tuple[ConditionFit, ...]:
    """Return the fit of every condition, the bounds last: what is not tested is not corrected for.

    ``over`` takes the intervals over prompts or over personas.
    """
    tested = over([row for row in rows if row["condition"] not in BOUNDS], reference)
    beside = over([row for row in rows if row["condition"] in (*BOUNDS, reference)], reference)
    bounds = [replace(each, p=None, p_holm=None) for each in beside if each.condition in BOUNDS]
    return tuple(_checked(each, rows, limits) for each in (*tested, *bounds))


def _checked(fit: ConditionFit, rows: Sequence[Row], limits: ObjectiveOptions) -> ConditionFit:
    """Add the share of answers that count, and of searches' means that keep the constraints.

    The latter is unknown where what was measured is kept and a limit is on what was not.
    """
    own = [row for row in rows if row["condition"] == fit.condition]
    failed = [row.get("failed") for row in own]
    searches = grouped(own, lambda row: (row["persona"], row.get("seed")))
    choice = _mean(own, "choice")
    measures = ("coherence", "relevance", "choice")
    means = [{name: _mean(each, name) for name in measures} for each in searches.values()]
    asked = limits if choice is not None else replace(limits, min_choice=None)
    kept = [
        not asked.violation(**mean, kl=_kl(each) or 0.0)  # empty answers diverge nowhere
        for mean, each in zip(means, searches.values(), strict=True)
    ]
    counted = None if None in failed else fmean(not each for each in failed)
    known = (
        limits.limited
        and (limits.min_choice is None or choice is not None)
        and (limits.max_kl is None or all(_mean(e, "kl") is not None for e in searches.values()))
    )
    feasible = fmean(kept) if limits.limited and (known or not all(kept)) else None
    return replace(fit, counted=counted, feasible=feasible, kl=_kl(own), choice=choice)


def _mean(rows: Sequence[Row], name: str) -> float | None:
    known = [row[name] for row in rows if row.get(name) is not None]
    return fmean(known) if known else None


def _kl(rows: Sequence[Row]) -> float | None:
    """Return the mean divergence over the tokens of all answers, which is what a search limits.

    Over the answers of rows that do not say how many tokens they have.
    """
    known = [(row["kl"], row.get("kl_tokens", 1)) for row in rows if row.get("kl") is not None]
    tokens = sum(number for _, number in known)
    return sum(kl * number for kl, number in known) / tokens if tokens else None


def order_line(fits: Sequence[ConditionFit]) -> str:
    """Say whether the fit puts canned and salad below the unsteered model, and real ones on top.

    A warning where it does not, and where that was not measured.
    """
    known = {each.condition: each.fit.mean for each in fits if each.fit.mean is not None}
    if not {UNSTEERED, CANNED, SALAD, REAL} <= set(known):
        return f"{WARNING}: without floors and ceiling, what this fit is worth is not known."
    plain, real = known[UNSTEERED], known[REAL]
    wrong = [f"{name} is not below unsteered" for name in (CANNED, SALAD) if known[name] >= plain]
    wrong += [f"{name} is above real utterances" for name, fit in known.items() if fit > real]
    said = ", ".join(f"{name} {known[name]:.2f}" for name in (*BOUNDS, UNSTEERED) if name in known)
    if wrong:
        return f"{WARNING}: do not trust this fit: {'; '.join(wrong)} ({said})."
    return f"Canned and salad stand below the unsteered model, real utterances on top ({said})."


def constraints_line(fit: ConditionFit) -> str:
    """Say whether a mix keeps the constraints on the prompts that it is reported on."""
    if fit.feasible is None:
        return "Not every constraint was measured on held-out prompts."
    if fit.feasible == 1:
        return "It keeps the constraints on held-out prompts."
    share = f" in {100 * fit.feasible:.0f}% of searches" if fit.feasible else ""
    kl = "" if fit.kl is None else f", {fit.kl:.2g} nats a token"
    choice = "" if fit.choice is None else f", {fit.choice:.0f}% of multiple choice"
    coherence, relevance = (wording.number(each.mean) for each in (fit.coherence, fit.relevance))
    return (
        f"{WARNING}: on held-out prompts it keeps the constraints{share or ' nowhere'} (coherence "
        f"{coherence}, relevance {relevance}{kl}{choice})."
    )


def seeds_line(rows: Sequence[Row]) -> str:
    """Say on how many seeds the searches rest, and the training of what they mix."""
    seeds, trained = (
        {row.get(name) for row in rows if row["condition"] not in BOUNDS} - {None, ""}
        for name in ("seed", "trained")
    )
    if len(seeds) < 2:
        return "One seed."
    if len(trained) < 2:
        return f"{len(seeds)} seeds of the search; the directions are of one training."
    return f"{len(seeds)} seeds, of the search and of the differences' training."


def agreement_line(rows: Sequence[Row]) -> str:
    """Say how a report's judge of another family and the search's agree on answers that count.

    ρ is Spearman's within a condition, averaged; a warning of the conditions on whose change from
    unsteered they are opposed (``report.two_judges``), over prompts or, of several, over personas.
    """
    both = [
        row
        for row in rows
        if row.get("searched_by") is not None and row["score"] is not None and not row["failed"]
    ]
    if all(row.get("searched_by") is None for row in rows):
        return "Search and report are judged by one family."
    unit = "prompt_id" if len({row["persona"] for row in both}) == 1 else "persona"
    pairs = [Pair(row["condition"], row[unit], row["score"], row["searched_by"]) for row in both]
    rho = _rho_within(pairs)
    if rho is None or not any(each.place == UNSTEERED for each in pairs):
        return "Of the two judges' agreement nothing can be said."
    said = f"Within a condition the judge that reports and the one that searched have ρ {rho:.2f}."
    opposed = [each for each in effects_from(pairs, UNSTEERED) if each.opposed]
    if not opposed:
        return f"{said} They disagree on the sign of no gain."
    told = "; ".join(
        f"{each.place}: {wording.interval(each.first, 2)} as reported, "
        f"{wording.interval(each.second, 2)} as searched"
        for each in opposed
    )
    return f"{WARNING}: the two judges disagree on the sign of a gain ({told}). {said}"


def _rho_within(pairs: Sequence[Pair]) -> float | None:
    """Return Spearman's rho inside a condition, averaged; None where no condition varies."""
    values = [
        np.array([(each.first, each.second) for each in own], dtype=float)
        for own in grouped(pairs, lambda pair: pair.place).values()
    ]
    varied = [own for own in values if np.ptp(own, axis=0).min() > 0]
    return fmean(float(spearmanr(own).statistic) for own in varied) if varied else None
