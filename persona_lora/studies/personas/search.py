"""Ask and tell: CMA-ES (or TPE, or random search) over coefficient vectors, resumable at any point.

The loop knows candidates and their values, neither models nor LoRA: every method is searched
through the same objective. Constraints come first (Deb 2000): candidates that keep them are ordered
by value, those that break them stand below all of these, by how far they break them. pycma turns an
unscored candidate (NaN) into the generation's median; here it stands last, and is flagged.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import cma
import numpy as np
from numpy.typing import NDArray

from persona_lora.core.errors import UserError
from persona_lora.core.options import SearchOptions
from persona_lora.core.personas import Coefficients
from persona_lora.core.runs import Run
from persona_lora.models.processes import Processes
from persona_lora.report.scores import grouped
from persona_lora.studies.personas.read_goals import undominated

logger = logging.getLogger(__name__)

Vector = NDArray[np.float64]  # [K], one number a trait
GENERATIONS = "generations"
PARTS = "parts"  # in a candidate's details: its values by objective, where there are several
STARTUP = 10  # candidates drawn before TPE has learnt anything: Optuna's own default
HISTORY = 10  # generations after which CMA-ES may take equal values for convergence


@dataclass(frozen=True)
class Value:
    """What the objective says of one candidate: higher is better, None where unscored.

    ``violation`` is by how much it breaks the constraints, 0 where it keeps them; ``details`` are
    plain values kept with the candidate (mean score, coverage …; ``PARTS``: several objectives).
    """

    value: float | None
    details: Mapping[str, Any] = field(default_factory=dict)
    violation: float = 0.0

    @property
    def standing(self) -> Standing:
        """Where the candidate stands among others."""
        if self.value is None:
            return Standing(-math.inf, -math.inf)
        return Standing(-self.violation, self.value, tuple(self.details.get(PARTS, {}).values()))


class Standing(NamedTuple):
    """What candidates are compared by: first the constraints (0: kept), then the value.

    ``parts`` are the values of the objectives, where there are several.
    """

    kept: float
    value: float
    parts: tuple[float, ...] = ()


Objective = Callable[[Sequence[Coefficients], int], Sequence[Value]]
"""Takes the candidates of a generation and its number; returns their values."""


@dataclass(frozen=True, kw_only=True)
class Candidate(Value):
    """One candidate of one generation, with its value."""

    iteration: int
    coefficients: Coefficients


@dataclass(frozen=True)
class SearchResult:
    """Where a search ended: its best candidate, the distribution's mean, and why it stopped."""

    best: Candidate
    mean: Coefficients
    iterations: int
    evaluations: int
    reason: str
    candidates: tuple[Candidate, ...]


class CMAES:
    """pycma behind ask and tell, with random numbers of its own (pycma's are global)."""

    def __init__(self, traits: Sequence[str], options: SearchOptions) -> None:
        check_traits(traits, options)
        start = [float(options.initial.get(trait, 0.0)) for trait in traits]
        held = options.fixed
        fixed = {index: held[trait] for index, trait in enumerate(traits) if trait in held}
        random = np.random.RandomState(options.seed)
        settings: dict[str, Any] = {
            "seed": math.nan,  # pycma would seed numpy's global generator
            "randn": random.randn,
            "popsize": _population(traits, options),
            "tolx": options.tolx,
            "tolfun": options.tolfun,
            "tolflatfitness": math.inf,
            "maxiter": options.max_iterations,
            "verbose": -9,
        }
        if options.bound is not None:
            settings["bounds"] = [-options.bound, options.bound]
        if fixed:
            settings["fixed_variables"] = fixed
        if len(traits) - len(fixed) == 1:
            settings["maxstd"] = math.inf  # pycma cannot limit the σ of a single dimension
        self._strategy = cma.CMAEvolutionStrategy(start, options.sigma0, settings)
        unbounded = partial(
            self._strategy.gp.geno, from_bounds=self._strategy.boundary_handler.inverse
        )
        free = [0.0 if trait in held else 1.0 for trait in traits]  # pycma puts in what is held
        self._given = [
            unbounded(np.array([point.get(trait, 0.0) for trait in traits]) * free)
            for point in options.inject
        ]

    def ask(self) -> list[Vector]:
        """Return the next generation; injected points come first, beside one draw at least."""
        room = self._strategy.popsize - 1 - len(self._strategy.pop_injection_directions)
        given, self._given = self._given[:room], self._given[room:]
        self._strategy.inject(given, force=True)
        return [np.asarray(each, dtype=float) for each in self._strategy.ask()]

    def tell(self, candidates: Sequence[Vector], standings: Sequence[Standing]) -> None:
        """Take how the generation asked for last stands; pycma minimises."""
        self._strategy.tell(list(candidates), _costs(standings))

    def mean(self) -> Vector:
        """Return the mean of the distribution, inside the bounds."""
        return np.asarray(self._strategy.result.xfavorite, dtype=float)

    def sigma(self) -> float:
        """Return the overall step size σ."""
        return float(self._strategy.sigma)

    def stopped(self) -> str | None:
        """Return why CMA-ES has stopped, or None.

        Equal values are convergence where the best of ``HISTORY`` generations hardly differ: a
        judge that tells no candidates apart gives values that do not differ at all.
        """
        reasons, best = set(self._strategy.stop()), self._strategy.fit.hist
        if len(best) < HISTORY or max(best) == min(best):
            reasons -= {"tolfun", "tolfunhist"}
        return ", ".join(sorted(reasons)) if reasons else None


def _population(traits: Sequence[str], options: SearchOptions) -> int:
    """Return how many candidates every searcher asks for: by default 4 + 3·ln K, of K free."""
    free = [trait for trait in traits if trait not in options.fixed]
    return options.population_size or 4 + int(3 * math.log(len(free)))


class RandomSearch:
    """Candidates from one Gaussian that never moves: the control of equal budget.

    Injected points come before its own, as they do for every searcher.
    """

    def __init__(self, traits: Sequence[str], options: SearchOptions) -> None:
        check_traits(traits, options)
        self._options, self._traits = options, tuple(traits)
        self._start = np.array([options.initial.get(trait, 0.0) for trait in traits])
        self._random = np.random.RandomState(options.seed)
        self._size = _population(traits, options)
        self._bound = options.bound or math.inf
        self._given = [self._vector({**dict.fromkeys(traits, 0.0), **at}) for at in options.inject]
        self._best: tuple[Standing, Vector] | None = None

    def ask(self) -> list[Vector]:
        """Return as many candidates as CMA-ES would ask for."""
        given, self._given = self._given[: self._size], self._given[self._size :]
        steps = self._options.sigma0 * self._random.randn(self._size, len(self._start))
        drawn = [dict(zip(self._traits, each, strict=True)) for each in self._start + steps]
        return given + [self._vector(each) for each in drawn[len(given) :]]

    def tell(self, candidates: Sequence[Vector], standings: Sequence[Standing]) -> None:
        """Remember the best."""
        for candidate, standing in zip(candidates, standings, strict=True):
            if self._best is None or standing > self._best[0]:
                self._best = (standing, candidate)

    def mean(self) -> Vector:
        """Return the best so far: there is no distribution that learns."""
        if self._best is None:
            raise UserError("the search was told nothing yet")
        return self._best[1]

    def sigma(self) -> float:
        """Return the fixed standard deviation."""
        return self._options.sigma0

    def stopped(self) -> str | None:
        """Never stop before the budget is spent."""
        return None

    def _vector(self, point: Mapping[str, float]) -> Vector:
        free = {trait: np.clip(value, -self._bound, self._bound) for trait, value in point.items()}
        return np.array([{**free, **self._options.fixed}[trait] for trait in self._traits])


class TPE(RandomSearch):
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), between −bound and bound.

    Its first generations are those of random search. Constraints come first for it too (Watanabe
    and Hutter 2023), and what has no score stands below all that has. Several objectives are
    searched at once (Ozaki et al. 2020), not by the library's NSGA-II, which comes less near to
    planted fronts with the few candidates that answers allow.
    """

    def __init__(self, traits: Sequence[str], options: SearchOptions) -> None:
        super().__init__(traits, options)
        optuna = optuna_for(options)
        free = [trait for trait in traits if trait not in options.fixed]
        width = optuna.distributions.FloatDistribution(-self._bound, self._bound)
        self._space = dict.fromkeys(free, width)
        sampler = optuna.samplers.TPESampler(
            seed=options.seed, multivariate=True, n_startup_trials=STARTUP
        )
        self._studying = partial(optuna.create_study, sampler=sampler)
        self._study: Any = None  # until the number of objectives is known
        self._trials: list[Any] = []
        self._spread = options.sigma0

    def ask(self) -> list[Vector]:
        """Return the next generation; those of it that are not told yet keep others away."""
        if self._given or self._study is None or len(self._study.trials) < STARTUP:
            return super().ask()
        self._trials = [self._study.ask(self._space) for _ in range(self._size)]
        return [self._vector(trial.params) for trial in self._trials]

    def tell(self, candidates: Sequence[Vector], standings: Sequence[Standing]) -> None:
        """Take how the generation asked for last stands."""
        super().tell(candidates, standings)
        objectives = max(len(each.parts) for each in standings) or 1
        if self._study is None:
            self._study = self._studying(directions=["maximize"] * objectives)
        trials, self._trials = self._trials or list(map(self._tried, candidates)), []
        for trial, standing in zip(trials, standings, strict=True):
            trial.set_constraint("kept", -standing.kept)
            scored = standing.parts or (standing.value,)
            self._study.tell(trial, scored if math.isfinite(standing.kept) else [0.0] * objectives)
        self._spread = float(np.std(candidates, axis=0).mean())

    def sigma(self) -> float:
        """Return the mean standard deviation of the generation told last."""
        return self._spread

    def _tried(self, candidate: Vector) -> Any:
        point = dict(zip(self._traits, map(float, candidate), strict=True))
        self._study.enqueue_trial({trait: point[trait] for trait in self._space})
        return self._study.ask(self._space)


def front_of(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates of several objectives that no other dominates, by the first objective.

    Those that keep the constraints, where any does; else those that break them least. Empty of one
    objective.
    """
    least = max(each.standing.kept for each in candidates)
    own = {
        each.coefficients: each
        for each in candidates
        if each.standing.parts and each.standing.kept == least
    }
    points = [each.standing.parts for each in own.values()]
    found = [each for each, free in zip(own.values(), undominated(points), strict=True) if free]
    return sorted(found, key=lambda each: each.standing.parts, reverse=True)


def optuna_for(options: SearchOptions) -> Any:
    """Return the library; UserError where it is not installed, or nothing bounds its draws."""
    if options.bound is None:
        raise UserError("--search tpe draws inside a bound, and there is none; give --bound 4")
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            '--search tpe needs Optuna; run: pip install "persona-lora[search]"'
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


Searcher = CMAES | RandomSearch
"""Asks for candidates ``[P, K]`` and is told how they stand."""

SEARCHERS: dict[str, Callable[[Sequence[str], SearchOptions], Searcher]] = {
    "cmaes": CMAES,
    "tpe": TPE,
    "random": RandomSearch,
}


@dataclass(frozen=True)
class Generation:
    """What a generation showed, for whoever watches the search.

    ``best`` is the best value so far of candidates that keep the constraints, ``mean`` that of all
    in this generation; ``seconds`` is 0 for one that was read from the disk.
    """

    iteration: int
    max_iterations: int
    best: float | None
    mean: float | None
    sigma: float
    evaluations: int
    size: int
    seconds: float


def search(
    objective: Objective,
    traits: Sequence[str],
    options: SearchOptions,
    run: Run,
    *,
    searcher: str = "cmaes",
    processes: Processes = Processes(),
    watch: Callable[[Generation], None] | None = None,
) -> SearchResult:
    """Maximise the objective; every generation is on disk before the next one is asked for.

    A run that was killed goes on: its generations are told again to a searcher of the same seed,
    which then asks for what it would have asked. Of several processes the first one writes.
    Raises UserError when the rows on disk do not agree (other options) or go on past the end that
    is asked for, when not one candidate of a generation could be scored, or when no generation
    fits into ``max_evaluations``; what the objective raises leaves the generations before it there.
    """
    if searcher not in SEARCHERS:
        raise UserError(f"no search {searcher!r}; there are {', '.join(SEARCHERS)}")
    names = tuple(sorted(traits))
    strategy = SEARCHERS[searcher](names, options)
    told = processes.from_main(lambda: _told(run))
    candidates: list[Candidate] = []
    reason, flat = "maxiter", False
    for iteration in range(1, options.max_iterations + 1):
        started = time.monotonic()
        asked = strategy.ask()
        mixes = [Coefficients(names, tuple(map(float, vector))) for vector in asked]
        if options.max_evaluations and len(candidates) + len(mixes) > options.max_evaluations:
            reason = "maxevals"
            break
        replayed = iteration in told
        generation = (
            _replayed(told[iteration], mixes, iteration)
            if replayed
            else _evaluated(objective, mixes, iteration)
        )
        if processes.index == 0 and not replayed:
            run.append(GENERATIONS, [_row(each, len(mixes)) for each in generation])
        candidates += generation
        flat = flat or _flat(generation)
        strategy.tell(asked, _standings(generation))
        if watch is not None:
            seconds = 0.0 if replayed else time.monotonic() - started
            watch(_summary(generation, candidates, options, strategy.sigma(), seconds))
        best = _best_value(candidates)
        reached = best is not None and options.target is not None and best >= options.target
        stopped = "target" if reached else strategy.stopped()
        if stopped is not None:
            reason = stopped
            break
    if not candidates:
        raise UserError(f"the search ended before its first generation did ({reason}); allow more")
    _check_whole(candidates, told, reason)
    return _result(candidates, strategy, names, reason)


def evaluate_once(
    objective: Objective,
    mixes: Sequence[Coefficients],
    run: Run,
    name: str,
    processes: Processes = Processes(),
) -> list[Candidate]:
    """Return mixes with their values outside of the search; read where the run holds them all.

    Raises UserError when not one of them could be scored.
    """
    kept = processes.from_main(lambda: run.resume_rows(name))
    whole = all(row["value"] is not None for row in kept)
    if whole and [row["values"] for row in kept] == [list(mix.values) for mix in mixes]:
        return _replayed(kept, mixes, 0)
    found = _evaluated(objective, mixes, 0)
    _standings(found)
    if processes.index == 0:
        run.write(name, [_row(each, len(mixes)) for each in found])
    return found


def _best_value(candidates: Sequence[Candidate]) -> float | None:
    kept = (each.value for each in candidates if each.value is not None and not each.violation)
    return max(kept, default=None)


def _evaluated(
    objective: Objective, mixes: Sequence[Coefficients], iteration: int
) -> list[Candidate]:
    values = objective(mixes, iteration)
    if len(values) != len(mixes):
        raise UserError(f"the objective gave {len(values)} values for {len(mixes)} candidates")
    return [
        Candidate(
            each.value, dict(each.details), each.violation, iteration=iteration, coefficients=mix
        )
        for mix, each in zip(mixes, values, strict=True)
    ]


def _replayed(
    rows: Sequence[Mapping[str, Any]], mixes: Sequence[Coefficients], iteration: int
) -> list[Candidate]:
    asked = [list(mix.values) for mix in mixes]
    if len(rows) != len(mixes) or not np.allclose(
        [row["values"] for row in rows], asked, rtol=0, atol=1e-9
    ):
        raise UserError(
            f"generation {iteration} on disk was asked for with other options or another version "
            "of pycma or Optuna; choose another --save-dir, or pass --overwrite"
        )
    return [
        Candidate(
            row["value"], row["details"], row["violation"], iteration=iteration, coefficients=mix
        )
        for row, mix in zip(rows, mixes, strict=True)
    ]


def _standings(generation: Sequence[Candidate]) -> list[Standing]:
    missing = sum(each.value is None for each in generation)
    if missing == len(generation):
        raise UserError(
            "not one candidate of a generation could be scored; check the judge (its log says why)"
        )
    if missing:
        logger.warning("%d candidates could not be scored and stand last", missing)
    return [each.standing for each in generation]


def _flat(generation: Sequence[Candidate]) -> bool:
    """Return whether nothing tells the candidates apart, and warn of it."""
    flat = len(generation) > 1 and len({each.standing for each in generation}) == 1
    if flat:
        logger.warning(
            "all %d candidates of generation %d stand the same (value %s, constraints broken by "
            "%.3g): nothing tells them apart, and the search learns nothing from them; ask more "
            "prompts (--num-prompts), take larger steps (--sigma0), loosen the constraints, or "
            "choose another judge",
            *(len(generation), generation[0].iteration),
            *(generation[0].value, generation[0].violation),
        )
    return flat


def _costs(standings: Sequence[Standing]) -> list[float]:
    """Return numbers to minimise in the order of the standings, best first.

    −value where the constraints are kept; above the largest of these by the violation where not.
    """
    kept = [each.value for each in standings if each.kept == 0]
    edge = -min(kept, default=0.0)
    known = [
        -each.value if each.kept == 0 else edge - each.kept
        for each in standings
        if math.isfinite(each.kept)
    ]
    found = iter(known)
    return [next(found) if math.isfinite(each.kept) else max(known) for each in standings]


def _told(run: Run) -> dict[int, list[dict[str, Any]]]:
    """Return the rows on disk by generation; one that a kill cut short is dropped there too."""
    groups = grouped(run.resume_rows(GENERATIONS), lambda row: row["iteration"])
    whole = {at: group for at, group in groups.items() if len(group) == group[0]["size"]}
    run.write(GENERATIONS, [row for group in whole.values() for row in group])
    return whole


def _check_whole(candidates: Sequence[Candidate], told: Collection[int], reason: str) -> None:
    """UserError where the disk holds more of a search: another was reported by these."""
    ended, last = candidates[-1].iteration, max(told, default=0)
    if last > ended:
        raise UserError(
            f"the search ends with generation {ended} ({reason}), and on disk it went on to "
            f"{last}; ask for at least that, choose another --save-dir, or pass --overwrite"
        )


def _row(candidate: Candidate, size: int) -> dict[str, Any]:
    return {
        "iteration": candidate.iteration,
        "size": size,
        "values": list(candidate.coefficients.values),
        "value": candidate.value,
        "violation": candidate.violation,
        "details": dict(candidate.details),
    }


def _summary(
    generation: Sequence[Candidate],
    candidates: Sequence[Candidate],
    options: SearchOptions,
    sigma: float,
    seconds: float,
) -> Generation:
    scored = [each.value for each in generation if each.value is not None]
    return Generation(
        iteration=generation[0].iteration,
        max_iterations=options.max_iterations,
        best=_best_value(candidates),
        mean=float(np.mean(scored)) if scored else None,
        sigma=sigma,
        evaluations=len(candidates),
        size=len(generation),
        seconds=seconds,
    )


def _result(
    candidates: Sequence[Candidate], strategy: Searcher, names: tuple[str, ...], reason: str
) -> SearchResult:
    return SearchResult(
        best=max(candidates, key=lambda each: each.standing),
        mean=Coefficients(names, tuple(map(float, strategy.mean()))),
        iterations=candidates[-1].iteration,
        evaluations=len(candidates),
        reason=reason,
        candidates=tuple(candidates),
    )


def check_traits(traits: Sequence[str], options: SearchOptions) -> None:
    """UserError for a search without a free direction, and for one that it has not."""
    named = {*options.initial, *options.fixed, *(t for point in options.inject for t in point)}
    unknown = sorted(named - set(traits))
    if unknown:
        raise UserError(f"no direction {unknown[0]!r} in the search; it has {', '.join(traits)}")
    if not traits:
        raise UserError("a search needs at least one direction")
    if set(traits) <= set(options.fixed):
        raise UserError("every direction of the search is fixed; leave one of them free")
