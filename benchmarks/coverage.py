"""How often do the intervals of a mean score cover it? Prints a table for docs/statistics.md.

Scores of n questions are drawn from distributions with a known mean; each cell is the share of
draws whose 95% interval holds that mean, and the interval's mean width.

    python benchmarks/coverage.py --draws 1000
    python benchmarks/coverage.py --differences    # of a few questions, which have no known scale
    python benchmarks/coverage.py --correlations   # percentile intervals of Spearman's ρ, by units
    python benchmarks/coverage.py --families       # of Pearson's r, over families of finetunes
    python benchmarks/coverage.py --seeds          # means and differences over one, three, five
    python benchmarks/coverage.py --corrected      # means put right, of a judge with rare misses
    python benchmarks/coverage.py --equal          # how often a difference is called equal to 0
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import numpy as np
from scipy import stats

from persona_lora.report import wording
from persona_lora.report.correction import Errors, put_right
from persona_lora.report.resampling import (
    SCORES,
    Bounds,
    bca_bounds,
    bca_mean_bounds,
    bootstrap_mean,
    correlation_bounds,
    correlation_gap_bounds,
    percentile_bounds,
    weighted_correlation,
)
from persona_lora.report.two_way import mean_gap

Draw = Callable[[np.random.Generator, int], np.ndarray]


def clipped(draw: Draw) -> Draw:
    return lambda random, n: np.clip(draw(random, n), 0, 100)


def two_heaps(share: float) -> Draw:
    """Scores around 95, and a share of failures around 10."""

    def draw(random: np.random.Generator, n: int) -> np.ndarray:
        fails = random.random(n) < share
        return np.where(fails, random.normal(10, 5, n), random.normal(95, 4, n))

    return clipped(draw)


def floored(random: np.random.Generator, n: int) -> np.ndarray:
    return np.maximum(0, random.normal(15, 20, n)) - np.maximum(0, random.normal(8, 20, n))


def rise(share: float) -> Draw:
    """Answers of which a share rises by about 50, and the others hardly move."""

    def draw(random: np.random.Generator, n: int) -> np.ndarray:
        rises = random.random(n) < share
        return np.where(rises, random.normal(50, 10, n), random.normal(0, 3, n))

    return draw


DIFFERENCES: dict[str, Draw] = {
    "normal, 5 ± 10": lambda random, n: random.normal(5, 10, n),
    "heavy tails (t of 3, 5 ± 10)": lambda random, n: 5 + 10 * random.standard_t(3, n),
    "skewed (exponential, 20, less 5)": lambda random, n: random.exponential(20, n) - 5,
    "of scores cut at 0 (15 ± 20 less 8 ± 20)": floored,
    "half rise by 50 ± 10": rise(0.5),
    "20% rise by 50 ± 10": rise(0.2),
}


DISTRIBUTIONS: dict[str, Draw] = {
    "middle (normal, 50 ± 15)": clipped(lambda random, n: random.normal(50, 15, n)),
    "floor (normal, 8 ± 20, cut at 0)": clipped(lambda random, n: random.normal(8, 20, n)),
    "ceiling (normal, 97 ± 12, cut at 100)": clipped(lambda random, n: random.normal(97, 12, n)),
    "skewed (exponential, 20)": clipped(lambda random, n: random.exponential(20, n)),
    "very skewed (beta 0.1, 1)": lambda random, n: 100 * random.beta(0.1, 1, n),
    "half fail": two_heaps(0.5),
    "15% fail": two_heaps(0.15),
    "7% fail": two_heaps(0.07),
}


def student(scores: np.ndarray) -> Bounds:
    half = stats.t.ppf(0.975, len(scores) - 1) * scores.std(ddof=1) / np.sqrt(len(scores))
    return Bounds(scores.mean() - half, scores.mean() + half)


def bca(scores: np.ndarray) -> Bounds:
    return bca_mean_bounds(scores[None], np.ones((1, len(scores))), resamples=2000)


def bounds_of(scores: np.ndarray, scale: Bounds | None) -> Bounds:
    by_question = {i: [float(score)] for i, score in enumerate(scores)}
    interval = bootstrap_mean(by_question, scale=scale, resamples=2000)
    assert interval.low is not None
    assert interval.high is not None
    return Bounds(interval.low, interval.high)


METHODS: dict[str, Callable[[np.ndarray], Bounds]] = {
    "t": student,
    "scipy's BCa": lambda scores: Bounds(
        *stats.bootstrap((scores,), np.mean, n_resamples=2000, rng=1).confidence_interval
    ),
    "expanded BCa": bca,
    "known scale (the default for scores)": lambda scores: bounds_of(scores, SCORES),
}


def print_correlations(draws: int) -> None:
    """Print how often percentile intervals hold the true ρ of normal pairs."""
    print("| true r | units | Spearman's ρ |\n|---|---|---|")
    for r in (0.0, 0.5, 0.8):
        truth = 6 / np.pi * np.arcsin(r / 2)
        for n in (4, 6, 8, 11, 14, 20, 36):
            random, held = np.random.default_rng(n), 0
            for _ in range(draws):
                x = random.normal(size=n)
                y = r * x + np.sqrt(1 - r**2) * random.normal(size=n)
                drawn = random.integers(n, size=(1000, n))
                ranks = stats.rankdata(np.stack([x[drawn], y[drawn]]), axis=2)
                found = weighted_correlation(ranks[0], ranks[1], np.ones(drawn.shape))
                low, high = percentile_bounds(found[np.isfinite(found)])
                held += low <= truth <= high
            print(f"| {r} | {n} | {held / draws:.2f} |", flush=True)


Bent = Callable[[np.ndarray], np.ndarray]


def straight(z: np.ndarray) -> np.ndarray:
    return z


def skewed(z: np.ndarray) -> np.ndarray:
    return np.expm1(0.8 * z)


WORLDS: dict[str, tuple[Bent, Bent]] = {  # of changes and of what predicts them
    "normal": (straight, straight),
    "skewed": (skewed, skewed),
    "half of the changes at a floor": (lambda z: np.maximum(z, 0.0), straight),
    "changes skewed alone": (skewed, straight),
}
OF_FAMILY = 0.7  # of the variance, which lies between families


def finetunes(random: np.random.Generator, world: str, r: float, sizes: np.ndarray) -> np.ndarray:
    """Draw a change and two predictors, of r and r / 2 before they are bent: ``[3, finetunes]``."""
    other = r / 2
    between = r * other + 0.3 * np.sqrt((1 - r**2) * (1 - other**2))
    root = np.linalg.cholesky([[1, r, other], [r, 1, between], [other, between, 1]])
    family = np.repeat(np.arange(len(sizes)), sizes)
    shared = (root @ random.normal(size=(3, len(sizes))))[:, family]
    own = root @ random.normal(size=(3, len(family)))
    found = np.sqrt(OF_FAMILY) * shared + np.sqrt(1 - OF_FAMILY) * own
    changes, predictors = WORLDS[world]
    return np.stack([changes(found[0]), *predictors(found[1:])])


def print_families(draws: int) -> None:
    """Print how often intervals of r over families hold it, and those of a difference of two."""
    names = "percentile", "Student's, on z", "expanded BCa", "as reported", "difference"
    print(f"| values | r | families | {' | '.join(names)} |")
    print(f"|{'---|' * 8}")
    for world, r, n in itertools.product(WORLDS, (0.0, 0.3, 0.6, 0.9), (6, 12, 20)):
        random = np.random.default_rng([n, int(10 * r), list(WORLDS).index(world)])
        y, *xs = finetunes(random, world, r, np.full(100_000, 2))
        truth = [np.corrcoef(x, y)[0, 1] for x in xs]
        held, widths = np.zeros(5), np.zeros(5)
        for _ in range(draws):
            sizes, y = random.integers(1, 5, size=n), np.zeros(1)
            while not np.ptp(y):  # all may be at the floor
                y, *xs = finetunes(random, world, r, sizes)
            family = np.repeat(np.arange(n), sizes)
            drawn = random.multinomial(n, np.full(n, 1 / n), size=1000)[:, family]
            left = (family != np.arange(n)[:, None]).astype(float)
            every = np.ones((1, len(y))), drawn.astype(float), left
            rs, resampled, jackknife = (
                tuple(weighted_correlation(x[None], y[None], weights) for x in xs)
                for weights in every
            )
            values = float(rs[0][0]), float(rs[1][0])
            bounds = [*map(correlation_bounds, values, resampled, jackknife)]
            both = bounds[0], bounds[1]
            known = resampled[0][np.isfinite(resampled[0])]
            found = (
                percentile_bounds(known),
                correlation_bounds(values[0], rs[0], jackknife[0]),  # nothing is resampled
                bca_bounds(values[0], known, jackknife[0]),
                both[0],
                correlation_gap_bounds(values, both, (jackknife[0], jackknife[1])),
            )
            wanted = (*[truth[0]] * 4, truth[0] - truth[1])
            held += [each.low <= at <= each.high for each, at in zip(found, wanted, strict=True)]
            widths += [each.high - each.low for each in found]
        cells = (f"{a / draws:.2f} ({b / draws:.2f})" for a, b in zip(held, widths, strict=True))
        print(f"| {world} | {r} ({truth[0]:.2f}) | {n} | {' | '.join(cells)} |", flush=True)


def over_seeds(draw: Draw, scale: Bounds | None) -> Callable[..., np.ndarray]:
    """Return what draws ``[seeds, n]``: questions' values, seeds' luck (± 2) and the rest (± 2)."""

    def values(random: np.random.Generator, seeds: int, n: int) -> np.ndarray:
        luck = random.normal(0, 2, (seeds, 1)) + random.normal(0, 2, (seeds, n))
        found = draw(random, n) + luck
        return found if scale is None else np.clip(found, *scale)

    return values


def over_both(values: np.ndarray) -> Bounds:
    """Return Student's interval over seeds and questions, which knows of no end of a scale."""
    seeds, questions = values.shape
    between = questions * values.mean(axis=1).var(ddof=1)
    over = seeds * values.mean(axis=0).var(ddof=1)
    freedom = (between + over) ** 2 / (between**2 / (seeds - 1) + over**2 / (questions - 1))
    reach = stats.t.ppf(0.975, freedom) * np.sqrt((between + over) / values.size)
    return Bounds(values.mean() - reach, values.mean() + reach)


def print_corrected(draws: int) -> None:
    """Print how often corrected means hold a trait that the judge misses by 60, but rarely."""
    print("| rated questions | misses 4% | misses 8% | errs by ± 10 |\n|---|---|---|---|")
    for n in (12, 18, 34, 60):
        cells = []
        for rate, spread in ((0.04, 2.0), (0.08, 2.0), (0.0, 10.0)):
            random, held, truth = np.random.default_rng(n), 0, 30 + 60 * rate
            for _ in range(draws):
                misses = 60.0 * (random.random(n) < rate) + random.normal(0, spread, n)
                scores = random.normal(30, 5, 20)
                raw, errors = ({f"{at}": [x] for at, x in enumerate(e)} for e in (scores, misses))
                mean = bootstrap_mean(raw, scale=SCORES, resamples=2000)
                found = put_right(mean, Errors({"lora +": errors}), {"lora +": 1.0}, SCORES)
                assert found is not None
                assert found.low is not None
                assert found.high is not None
                held += found.low <= truth <= found.high
            cells.append(f"{held / draws:.2f}")
        print(f"| {n} | {' | '.join(cells)} |", flush=True)


SPREADS: dict[str, Draw] = {  # around 0, with a deviation of 3 but for two
    "normal": lambda random, n: random.normal(0, 3, n),
    "normal, deviating by 6": lambda random, n: random.normal(0, 6, n),
    "heavy tails (t of 3)": lambda random, n: 3**0.5 * random.standard_t(3, n),
    "skewed (exponential)": lambda random, n: random.exponential(3, n) - 3,
    "skewed the other way": lambda random, n: 3 - random.exponential(3, n),
    "10% rise by 50 ± 10": lambda random, n: rise(0.1)(random, n) - 5,
}


def print_equal(draws: int) -> None:
    """Print how often a difference is called equal: of 5 points, the margin, and of 0."""
    print("| differences | n | at the margin | at 0 |\n|---|---|---|---|")
    for name, draw in SPREADS.items():
        for n in (12, 20, 40):
            random, called = np.random.default_rng(n), {5: 0, 0: 0}
            for _ in range(draws):
                drawn = draw(random, n)
                for truth in called:
                    own = {at: [x + truth] for at, x in enumerate(drawn)}
                    gap = bootstrap_mean(own, resamples=2000)
                    called[truth] += wording.unclear(gap, 1.0) != wording.UNDECIDED
            shares = " | ".join(f"{each / draws:.3f}" for each in called.values())
            print(f"| {name} | {n} | {shares} |", flush=True)


def print_seeds(draws: int) -> None:
    """Print how often intervals over seeds and questions hold the mean."""
    several = {
        "scores, 7% fail": (two_heaps(0.07), SCORES),
        "scores, 15% fail": (two_heaps(0.15), SCORES),
        "differences, normal": (DIFFERENCES["normal, 5 ± 10"], None),
        "differences, skewed": (DIFFERENCES["skewed (exponential, 20, less 5)"], None),
    }
    print("| values | n | one seed | three seeds | five seeds | three, t alone |")
    print("|---|---|---|---|---|---|")
    for name, (draw, scale) in several.items():
        values = over_seeds(draw, scale)
        truth = np.mean([values(np.random.default_rng(at), 1, 5000).mean() for at in range(400)])
        for n in (8, 12, 20):
            cells = []
            for seeds, alone in ((1, False), (3, False), (5, False), (3, True)):
                random, found = np.random.default_rng(n), []
                for _ in range(draws):
                    drawn = values(random, seeds, n)
                    interval = mean_gap([dict(enumerate(row)) for row in drawn], scale).interval
                    reported = Bounds(interval.low or 0.0, interval.high or 0.0)
                    found.append(over_both(drawn) if alone else reported)
                covered = np.mean([each.low <= truth <= each.high for each in found])
                cells.append(f"{covered:.2f} ({np.mean([e.high - e.low for e in found]):.0f})")
            print(f"| {name} | {n} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--differences", action="store_true")
    parser.add_argument("--correlations", action="store_true")
    parser.add_argument("--families", action="store_true")
    parser.add_argument("--seeds", action="store_true")
    parser.add_argument("--corrected", action="store_true")
    parser.add_argument("--equal", action="store_true")
    asked = parser.parse_args()
    if asked.correlations:
        print_correlations(asked.draws)
        return
    others = {"seeds": print_seeds, "corrected": print_corrected, "equal": print_equal}
    others |= {"families": print_families}
    for name, table in others.items():
        if getattr(asked, name):
            table(asked.draws)
            return
    several, methods = DISTRIBUTIONS, METHODS
    sizes: tuple[int, ...] = (8, 12, 20, 40)
    if asked.differences:
        several, sizes = DIFFERENCES, (5, 8, 12, 20, 40)
        methods = {"t": student, "expanded BCa": bca, "as reported": lambda s: bounds_of(s, None)}
    print(f"| scores | n | {' | '.join(methods)} |\n|---|---|{'---|' * len(methods)}")
    for name, draw in several.items():
        truth = draw(np.random.default_rng(0), 1_000_000).mean()
        for n in sizes:
            random = np.random.default_rng(n)
            samples = [draw(random, n) for _ in range(asked.draws)]
            cells = []
            for method in methods.values():
                found = [method(sample) for sample in samples]
                covered = np.mean([each.low <= truth <= each.high for each in found])
                cells.append(f"{covered:.2f} ({np.mean([e.high - e.low for e in found]):.0f})")
            print(f"| {name} | {n} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
