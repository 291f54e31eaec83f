"""Which measure of coherence knows the answers of a persona search? All beside blind ratings.

    python benchmarks/coherence.py
    python benchmarks/coherence.py --traits

``data/search_answers.jsonl`` holds answers of candidates, finalists and the unsteered model,
``data/conversation_sense.jsonl`` what persons of the conversations said, the same under questions
that others were asked, with words in any order, as halves of two lines and looped, and answers of
the unsteered and of a prompted model to what persons were asked; each with the sense that two
passes of a language model gave it (0-100) without seeing condition or score. Half of the persons
(whole episodes) are for fitting and for the choice of bars ("tuning"); the other half and all
answers of the search only tell how good it is.

"The reader, corrected" adds to the reader's sense, as it is, a ridge regression of what it gets
wrong of the tuning half and of its own ratings. ``--traits`` adds how well sense is ranked on the
validation parts of the reader's own ratings. Three minutes on one core, ten with ``--traits``;
what was read is kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import spearmanr

from persona_lora.core.chat import COHERENCE, Exchange
from persona_lora.core.files import read_jsonl
from persona_lora.core.traits import list_traits, load_trait
from persona_lora.judges.answer_gates import BROKEN
from persona_lora.judges.answer_states import Reader
from persona_lora.judges.choice import SENSE_OF
from persona_lora.judges.fitness import rater_agreement
from persona_lora.judges.fitted import fitted_probes
from persona_lora.judges.labels import RatedAnswer, has_ratings, load_ratings
from persona_lora.judges.persona_judges import fit_coherence
from persona_lora.judges.probe import Probe, fit_probe
from persona_lora.judges.probe_judge import ReaderEvidence
from persona_lora.models.loading import load_chat_model
from persona_lora.report.rated import within_groups
from persona_lora.report.resampling import auc_of
from persona_lora.studies.personas.bench import STYLE_TRAITS

DATA = Path(__file__).parent / "data"
SAID = "said"
SENSELESS, SENSIBLE = 30, 70  # ratings of what a bar should stop, and of what it should not
DRAWS = 1000
Scores = NDArray[np.float64]
REPETITION, READER, WITH = "repetition and likelihood", "the reader", "the reader, corrected"
LOWER = "the lower of first and last"
MEASURES = (REPETITION, READER, WITH, LOWER)


def rated(name: str) -> pd.DataFrame:
    """Return a file of rated exchanges with the mean of both passes, and say how far they agree."""
    rows = pd.DataFrame(read_jsonl(DATA / name))
    rows["rated"] = [np.mean(each) for each in rows["sense"]]
    answers = [
        RatedAnswer(row.question, row.answer, "", row.condition, "tuning", row.sense, row.sense)
        for row in rows.itertuples()
    ]
    agreement = rater_agreement(answers, "sense")
    print(
        f"{name}: {len(rows)} answers; of the two passes rho {agreement.spearman:.2f}, "
        f"within a condition {agreement.within:.2f}, kappa {agreement.kappa:.2f}"
    )
    return rows


def exchanges_of(rows: pd.DataFrame) -> list[Exchange]:
    return [*map(Exchange, rows["question"], rows["answer"])]


class Corrected(NamedTuple):
    """The reader's probe of sense, and one of what it gets wrong of answers and of lines alike.

    ``own``: the tuning part of the reader's ratings, by both with the question held out.
    ``lines``: of the lines fitted to, with their episode held out.
    """

    sense: Probe
    error: Probe
    own: pd.DataFrame
    lines: Scores

    def read(self, states: NDArray[np.floating]) -> tuple[Scores, Scores]:
        """Return the reader's sense of states, and the corrected one."""
        before = self.sense.predict(states)
        return before, added(before, self.error.predict(states))


def added(sense: Scores, error: Scores) -> Scores:
    """Return corrected sense; a probe says 0-100, so an error is halved and stands around 50."""
    return np.clip(sense + 2 * (error - 50), 0, 100)


def corrected(evidence: ReaderEvidence, lines: pd.DataFrame) -> Corrected:
    """Fit what the reader, as it is, gets wrong of its own ratings (out of fold) and of lines."""
    labels = load_ratings(evidence.trait)
    fitted = fitted_probes(evidence, labels)
    at = [place for place, row in enumerate(labels) if row.part == "tuning"]
    states = [
        evidence.read([labels[place].exchange for place in at], keep=True),
        evidence.read(exchanges_of(lines), keep=True),
    ]
    before = [fitted.scores["sense"][at], fitted.probes["sense"].predict(states[1])]
    targets = [np.array([labels[place].rating("sense") for place in at]), lines["rated"].to_numpy()]
    groups = [labels[place].question for place in at]
    groups += [person.rpartition("_")[0] for person in lines["person"]]
    sense = np.concatenate(before)
    wrong = fit_probe(np.concatenate(states), 50 + (np.concatenate(targets) - sense) / 2, groups)
    after = added(sense, wrong.held_out)
    conditions = [f"{labels[place].model}: {labels[place].condition}" for place in at]
    own = pd.DataFrame({"condition": conditions, "rated": targets[0], READER: before[0]})
    own[WITH] = after[: len(at)]
    return Corrected(fitted.probes["sense"], wrong.probe, own, after[len(at) :])


def measure(search: pd.DataFrame, lines: pd.DataFrame, evidence: ReaderEvidence) -> Corrected:
    """Add a column for each measure, out of fold for lines that it is fitted to."""
    tuning = lines["part"] == "tuning"
    reader = corrected(evidence, lines[tuning])
    scorer = fit_coherence(load_chat_model(), STYLE_TRAITS, seed=0)
    for rows in (search, lines):
        exchanges = exchanges_of(rows)
        rows[REPETITION] = [each.score for each in scorer.verdicts(exchanges, COHERENCE)]
        rows[READER], rows[WITH] = reader.read(evidence.read(exchanges, keep=True))
    lines.loc[tuning, WITH] = reader.lines
    for rows in (search, lines):
        rows[LOWER] = rows[[REPETITION, WITH]].min(axis=1)
    return reader


def rho(rows: pd.DataFrame, name: str) -> float:
    return float(spearmanr(rows[name], rows["rated"]).statistic)


def within(rows: pd.DataFrame, name: str) -> float:
    conditions = rows["condition"].tolist()
    return within_groups(rows[name].tolist(), rows["rated"].tolist(), conditions) or 0.0


def drawn(rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Yield the rows drawn anew with replacement, the same draws for every measure."""
    for places in np.random.default_rng(0).integers(len(rows), size=(DRAWS, len(rows))):
        yield rows.iloc[places]


def interval(values: Sequence[float], form: str = ".2f") -> str:
    low, high = np.quantile(values, [0.025, 0.975])
    return f"[{low:{form}}, {high:{form}}]"


def best_bar(rows: pd.DataFrame, name: str) -> int:
    """Return the bar that stops senseless and lets sensible answers pass, both shares alike."""
    bad, good = (rows[name][rows["rated"] < SENSELESS], rows[name][rows["rated"] > SENSIBLE])
    return max(range(101), key=lambda bar: float((bad < bar).mean() + (good >= bar).mean()))


def mistakes(rows: pd.DataFrame, name: str, bar: float) -> str:
    """Return how many senseless answers pass a bar, and how many sensible ones fail it."""
    bad, good = (rows[name][rows["rated"] < SENSELESS], rows[name][rows["rated"] > SENSIBLE])
    return f"{(bad >= bar).sum()} of {len(bad)} | {(good < bar).sum()} of {len(good)}"


def print_search(search: pd.DataFrame, bars: Sequence[tuple[str, float]]) -> None:
    """Print how each measure ranks the answers of the search, and what its bar does with them."""
    means = search.groupby("condition")[[*MEASURES, "rated"]].mean()
    print("\n| the search | rho | within | within, beside the reader | of means | bar |", end="")
    print(" under 30 pass | over 70 fail |\n|---|" + "---|" * 7)
    inside = {name: [within(each, name) for each in drawn(search)] for name in MEASURES}
    for name, bar in bars:
        more = (np.array(inside[name]) - inside[READER]).tolist()
        cells = [
            f"{rho(search, name):.2f} {interval([rho(each, name) for each in drawn(search)])}",
            f"{within(search, name):.2f} {interval(inside[name])}",
            f"{within(search, name) - within(search, READER):+.2f} {interval(more, '+.2f')}",
            f"{rho(means, name):.2f}",
            f"{bar:g}",
            mistakes(search, name, bar),
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def print_lines(lines: pd.DataFrame, bars: Sequence[tuple[str, float]]) -> None:
    """Print the mean of each kind of line, and the chance that a real one stands above it."""
    kinds = [SAID, *sorted(set(lines["condition"]) - {SAID})]
    counts = " | ".join(f"{kind} ({(lines['condition'] == kind).sum()})" for kind in kinds)
    print(f"\n| lines of held-out persons: mean; AUC | {counts} | under 30 pass | over 70 fail |")
    print("|---|" + "---|" * (len(kinds) + 2))
    for name, bar in [("rated", np.nan), *bars]:
        cells = []
        said = lines[lines["condition"] == SAID][name].to_numpy()
        for kind in kinds:
            own = lines[lines["condition"] == kind][name].to_numpy()
            chance = np.random.default_rng(0)
            pairs = [
                (chance.choice(said, len(said)), chance.choice(own, len(own))) for _ in range(DRAWS)
            ]
            cell = f"{own.mean():.0f} {interval([each.mean() for _, each in pairs], '.0f')}"
            if kind != SAID:
                areas = [auc_of(above, below) for above, below in pairs]
                cell += f"; {auc_of(said, own):.2f} {interval(areas)}"
            cells.append(cell)
        both = " | " if name == "rated" else mistakes(lines, name, bar)
        print(f"| {name} | {' | '.join(cells)} | {both} |")


def print_own(evidence: ReaderEvidence, reader: Corrected, traits: bool) -> None:
    """Print how sense is ranked within a condition on answers like those the reader was fitted to.

    Of its own ratings the tuning part, questions held out; of ``traits`` the validation parts.
    """
    print("\n| sense, within a condition | answers | the reader | corrected | change |")
    print("|---|---|---|---|---|")
    parts = {f"{SENSE_OF}, tuning, questions held out": reader.own}
    for trait in map(load_trait, list_traits() if traits else ()):
        if has_ratings(trait):
            labels = load_ratings(trait, "validation")
            states = evidence.beside(trait).read([row.exchange for row in labels], keep=True)
            rows = pd.DataFrame({"rated": [row.rating("sense") for row in labels]})
            rows["condition"] = [f"{row.model}: {row.condition}" for row in labels]
            rows[READER], rows[WITH] = reader.read(states)
            parts[f"{trait.name}, validation"] = rows
    for name, rows in parts.items():
        before, after = within(rows, READER), within(rows, WITH)
        more = [within(each, WITH) - within(each, READER) for each in drawn(rows)]
        cells = f"{before:.2f} | {after:.2f} | {after - before:+.2f} {interval(more, '+.2f')}"
        print(f"| {name} | {len(rows)} | {cells} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--traits", action="store_true", help="sense of rated answers of all traits"
    )
    arguments = parser.parse_args()
    search, lines = rated("search_answers.jsonl"), rated("conversation_sense.jsonl")
    evidence = ReaderEvidence(Reader(load_chat_model(dtype="float32"), load_trait(SENSE_OF)))
    reader = measure(search, lines, evidence)
    chosen = [(name, best_bar(lines[lines["part"] == "tuning"], name)) for name in MEASURES]
    bars = [(REPETITION, BROKEN), *chosen]
    print_search(search, bars)
    print_lines(lines[lines["part"] == "validation"], bars)
    print_own(evidence, reader, arguments.traits)


if __name__ == "__main__":
    main()
