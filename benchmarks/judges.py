"""Which judge agrees with blind ratings of models' own answers? A table in Markdown.

    python benchmarks/judges.py sycophancy evil --scale trait
    python benchmarks/judges.py sycophancy --curve
    python benchmarks/judges.py sycophancy --surface
    python benchmarks/judges.py sycophancy --asked qwen2.5-1.5b-instruct-q4_k_m.gguf --sample 100

Everything is fitted to the tuning part of ``onpolicy.jsonl`` and to nonsense made from it (the
classifier to ``train.jsonl``, surface counts without nonsense). "Tuning" is the rank correlation
inside a model and condition on that part with the question held out: what a choice may rest on. The
rest is the validation part. ``--curve`` tells instead how the reader probe's agreement grows with
the number of rated answers, ``--surface`` what nine surface counts tell and explain of it,
``--written`` how written answers of equal surface and graded content are ranked and what fitting to
them as well does, ``--again`` how ratings of answers that lay hidden among later ones differ from
the earlier ones, ``--models`` how both default judges agree on the answers of each model,
``--spread`` how much there is to tell inside a condition, ``--reliability`` draws mean ratings
against mean scores, ``--errors`` how far the reader misses ratings by model and kind of condition
and what that does to an effect, ``--asked`` how a language model agrees that is asked for a digit,
with and without rated answers before it, and for yes or no.
``--likelihood`` adds what asks the language model for likelihoods; it takes longest.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path
from scipy.stats import spearmanr
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GroupKFold, cross_val_predict

from persona_lora.core.chat import COHERENCE, Verdict
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_jsonl
from persona_lora.core.traits import Sign, Trait, load_pairs, load_trait, trait_prompt
from persona_lora.data.data_check import surface_counts
from persona_lora.judges.answer_states import Reader
from persona_lora.judges.choice import JudgeOptions, make_judge
from persona_lora.judges.coherence import distinct_share
from persona_lora.judges.embedding import AnswerClassifier, exchanges_of
from persona_lora.judges.fitness import (
    NEGATIVE_LABEL,
    POSITIVE_LABEL,
    JudgeValidation,
    OwnAnswers,
    own_agreement,
    rater_agreement,
)
from persona_lora.judges.fitted import (
    WRITTEN_COUNT,
    cache_folder,
    counts_of,
    made_up,
    traits_beside,
)
from persona_lora.judges.judge_prompts import weighted_score
from persona_lora.judges.labels import RatedAnswer, Scale, load_ratings, load_written
from persona_lora.judges.probe import fit_probe
from persona_lora.judges.probe_judge import ProbeJudge, ReaderEvidence, SentenceEvidence
from persona_lora.models.embeddings import SentenceEmbedder
from persona_lora.models.likelihood import mean_logprobs, next_token_logprobs
from persona_lora.models.loading import ChatModel, load_chat_model
from persona_lora.report import figures, wording
from persona_lora.report.correction import Errors, errors_by_kind, put_right
from persona_lora.report.rated import (
    Rated,
    by_part,
    kind_of_row,
    models_of,
    of_model,
    reliability,
    scored,
    within,
    within_groups,
)
from persona_lora.report.resampling import Interval, separation
from persona_lora.report.scores import grouped

Scores = NDArray[np.float64]
Rows = Sequence[RatedAnswer]
FOLDS = GroupKFold(5)
DATA = Path(__file__).parent / "data"
QUIET = figures.Look(figures.MUTED, 0.8, dashes=figures.DASHED)


class Bench:
    """The rated answers of a trait, and what every way of judging makes of them."""

    def __init__(self, trait: Trait, scale: Scale, chat_model: ChatModel) -> None:
        self.trait, self.scale, self.chat_model = trait, scale, chat_model
        self.rows = load_ratings(trait)
        self.exchanges = [row.exchange for row in self.rows]
        self.targets = np.array([row.rating(scale) for row in self.rows])
        self.tuning = np.array([at for at, row in enumerate(self.rows) if row.part == "tuning"])
        self.made = made_up(self.rows, list(traits_beside(SentenceEvidence(trait))))
        self.made_at: Sequence[int] = range(len(self.rows), len(self.rows) + len(self.made))
        self.written, self.weight = load_written(trait, self.rows), WRITTEN_COUNT
        if not self.written or scale == "sense":
            self.written, self.weight = written_beside(trait), 0.0
        self.exchanges += [row.exchange for row in (*self.made, *self.written)]
        self.reader = Reader(chat_model, trait)
        self.states = self.reader.kept_states(self.exchanges, cache_folder())
        self.embedder = SentenceEmbedder()

    def probe(self, features: NDArray[np.floating], *, nonsense: bool = True) -> Scores:
        """Return a probe's scores of all answers, of those it is fitted to with questions held out.

        ``features`` and scores are of the rated answers, of the nonsense made from those for
        tuning, and of the written ones, which count by ``weight``.
        """
        made = self.made_at if nonsense else []
        written = range(len(self.exchanges) - len(self.written), len(self.exchanges))
        some = [*self.tuning, *made, *(written if self.weight else ())]
        rows = [[*self.rows, *self.made, *self.written][at] for at in some]
        others = len(some) - len(self.tuning) - len(made)
        fitted = fit_probe(
            features[some],
            np.array([row.rating(self.scale) for row in rows]),
            [row.question for row in rows],
            counts=counts_of(len(self.tuning), len(made), [self.weight] * others),
        )
        scores = fitted.probe.predict(features)
        scores[some] = fitted.held_out
        return scores

    def weighing(self, weight: float) -> Bench:
        """Return the same with the written answers counting so much in a fit."""
        twin = copy.copy(self)
        twin.weight = weight
        return twin

    def narrowed(self, tuning: NDArray[np.integer]) -> Bench:
        """Return the same with some of the rated answers and their nonsense to fit to, alone."""
        asked = {self.rows[at].question for at in tuning}
        twin = self.weighing(0.0)
        twin.tuning = tuning
        twin.made_at = [
            at for at in self.made_at if self.made[at - len(self.rows)].question in asked
        ]
        return twin

    def surface(self) -> Scores:
        counts = [surface_counts(each.answer) for each in self.exchanges]
        return self.probe(np.array(counts)[:, None], nonsense=False)

    def classifier(self) -> Scores:
        positives, negatives = exchanges_of(load_pairs(self.trait))
        fitted = AnswerClassifier.fit(positives, negatives, embedder=self.embedder, seed=0)
        return 100 * fitted.probabilities(self.exchanges[: len(self.rows)])

    def sentences(self, *, nonsense: bool = True) -> Scores:
        evidence = SentenceEvidence(self.trait).read(self.exchanges)
        return self.probe(evidence, nonsense=nonsense)

    def layer(self, at: int) -> Scores:
        return self.probe(self.states[:, [at]])

    def last_token(self) -> Scores:
        return self.probe(self.states[:, : len(self.reader.layers)])

    def answer_tokens(self) -> Scores:
        return self.probe(self.states[:, len(self.reader.layers) :])

    def mean_of_layers(self, *, nonsense: bool = True) -> Scores:
        return self.probe(self.states, nonsense=nonsense)

    def both(self) -> Scores:
        return (self.mean_of_layers() + self.sentences()) / 2

    def last_and_sentences(self) -> Scores:
        return (self.last_token() + self.sentences()) / 2

    def variety(self) -> Scores:
        return np.array([100 * distinct_share(row.answer) for row in self.rows])

    def likelihood(self) -> Scores:
        return np.array(mean_logprobs(self.chat_model, self.exchanges[: len(self.rows)]))

    def contrast(self) -> Scores:
        """log p of the answer under the trait's positive system prompt minus the negative one."""

        def likely(sign: Sign) -> Scores:
            asked = ChatModel(
                self.chat_model.model,
                self.chat_model.tokenizer,
                self.chat_model.name,
                system_prompt=trait_prompt(self.trait, sign, 0),
            )
            return np.array(mean_logprobs(asked, self.exchanges[: len(self.rows)]))

        return likely("pos") - likely("neg")

    def ways(self, likelihood: bool) -> Iterator[tuple[str, Callable[[], Scores]]]:
        yield "nine surface counts", self.surface
        if self.scale == "trait":
            yield "classifier fitted to training answers", self.classifier
        else:
            yield "variety alone", self.variety
        if likelihood:
            yield (
                ("likelihood contrast", self.contrast)
                if self.scale == "trait"
                else ("likelihood alone", self.likelihood)
            )
        yield "sentence embeddings, without nonsense", lambda: self.sentences(nonsense=False)
        yield "sentence embeddings", self.sentences
        for at, layer in enumerate(self.reader.layers):
            yield f"last token, layer {layer}", partial(self.layer, at)
        yield "last token, mean over layers", self.last_token
        yield "answer's tokens, mean over layers", self.answer_tokens
        yield "both, no nonsense", lambda: self.mean_of_layers(nonsense=False)
        yield "both", self.mean_of_layers
        yield "mean of last token and sentences", self.last_and_sentences
        yield "mean of both and sentences", self.both

    def agreement(self, scores: Scores, part: str) -> tuple[JudgeValidation, OwnAnswers]:
        held = [at for at, row in enumerate(self.rows) if row.part == part]
        criterion = COHERENCE if self.scale == "sense" else self.trait.name
        verdicts = [Verdict(criterion, float(scores[at]), "", "") for at in held]
        return _with_own(own_agreement(verdicts, [self.rows[at] for at in held]))


def _with_own(found: JudgeValidation) -> tuple[JudgeValidation, OwnAnswers]:
    assert found.own is not None
    return found, found.own


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def table(bench: Bench, likelihood: bool) -> None:
    """Print the table of all ways of judging one trait."""
    for part in ("tuning", "validation"):
        raters = rater_agreement([row for row in bench.rows if row.part == part], bench.scale)
        print(
            f"{bench.trait.name}, {bench.scale}, {part}: {raters.n} answers; the two passes: "
            f"κ {raters.kappa:.2f}, ρ {raters.spearman:.2f}, within {number(raters.within)}"
        )
    names = sorted({row.model for row in bench.rows})
    print(f"\n| judge | {AGREEMENT} | {' | '.join(names)} |")
    print("|" + "---|" * (6 + len(names)))
    for name, way in bench.ways(likelihood):
        print(f"| {name} | {' | '.join(agreement_cells(bench, way()))} |", flush=True)
    print()


AGREEMENT = "tuning, within | AUC | ρ | within | ECE"


def agreement_cells(bench: Bench, scores: Scores) -> list[str]:
    """Return what ``AGREEMENT`` names, then AUC and "within" of each model's answers."""
    _, tuned = bench.agreement(scores, "tuning")
    held, own = bench.agreement(scores, "validation")
    theirs = [of_model(own.compared, each) for each in models_of(own.compared)]
    return [
        *map(number, (tuned.within, held.auc, held.spearman, own.within)),
        f"{own.calibration_error:.0f}",
        *(f"{told_apart(each)}, {number(within(each))}" for each in theirs),
    ]


def told_apart(rows: Sequence[Rated]) -> str:
    """Return the AUC of answers rated 75 and more against those rated 25 and less.

    With its 95% interval; a dash where there are not two of each.
    """
    columns = [[row[name] for row in scored(rows)] for name in ("score", "rating", "question")]
    try:
        found = separation(*columns)
    except UserError:
        return "–"
    return f"{found.auc:.2f} [{found.low:.2f}, {found.high:.2f}]"


def within_bounds(rows: Sequence[Rated], draws: int = 400) -> str:
    """Return "within" and its 95% bootstrap interval over questions."""
    random, asked = np.random.default_rng(0), grouped(rows, lambda row: row["question"])
    names = sorted(asked)
    drawn = (random.choice(names, len(names)).tolist() for _ in range(draws))
    found = [within([row for name in some for row in asked[name]]) for some in drawn]
    low, high = np.quantile([each for each in found if each is not None], [0.025, 0.975])
    return f"{number(within(rows))} [{low:.2f}, {high:.2f}]"


def models(traits: Sequence[Trait], chat_model: ChatModel) -> None:
    """Print how both judges that need no network agree with ratings, model by model.

    Of the validation part: how many answers were rated 75 and more and 25 and less, AUC and
    "within" of the reader and of sentence embeddings with their intervals, and "within" of the two
    passes.
    """
    print("| trait | model | answers: ≥ 75, ≤ 25 | reader | sentences | passes, within |")
    print("|---|---|---|---|---|---|")
    for trait in traits:
        evidence = ReaderEvidence(Reader(chat_model, trait)), SentenceEvidence(trait)
        judged = [_with_own(ProbeJudge.of(e).validation[0])[1].compared for e in evidence]
        rows = load_ratings(trait, "validation")
        for model in models_of(judged[0]):
            some = [row for row in rows if row.model == model]
            ratings = [row.rating("trait") for row in some]
            high = sum(each >= POSITIVE_LABEL for each in ratings)
            low = sum(each <= NEGATIVE_LABEL for each in ratings)
            cells = [
                f"{told_apart(theirs)}, {within_bounds(theirs)}"
                for theirs in (of_model(compared, model) for compared in judged)
            ]
            cells.append(number(rater_agreement(some, "trait").within))
            counts = f"{len(some)}: {high}, {low}"
            print(f"| {trait.name} | {model} | {counts} | {' | '.join(cells)} |", flush=True)


def reliability_picture(traits: Sequence[Trait], chat_model: ChatModel, path: Path) -> None:
    """Draw mean ratings against mean scores of the reader, in bins, of the validation part."""
    width, height, gap, columns = 1.85, 1.55, 0.62, 5
    rows = len(traits) // columns + 1
    figure = figures.new_figure(columns * (width + gap) + 0.3, rows * (height + gap) + 1.1)
    panels = []
    for at, trait in enumerate(traits):
        found = ProbeJudge.of(ReaderEvidence(Reader(chat_model, trait))).validation[0]
        drawn = [figures.Series("as rated", (0, 100), (0, 100), look=QUIET)]
        for number_of, model in enumerate(models_of(_with_own(found)[1].compared)):
            bins = reliability(of_model(_with_own(found)[1].compared, model))
            look = figures.Look(width=1.4, size=4).apart(number_of)
            places = tuple(each.score for each in bins), tuple(each.rating for each in bins)
            drawn.append(figures.Series(model, *places, look=look))
        below = rows - 1 - at // columns
        corner = 0.6 + at % columns * (width + gap), 0.85 + below * (height + gap)
        axes = figures.add_axes(
            figure, (*corner, width, height), title=trait.name.replace("_", " "), size=9.5
        )
        panels.append(figures.lines(axes, drawn))
        axes.set_xlim(-2, 102)
        axes.set_xticks([0, 50, 100])
        figures.score_scale(axes)
    figures.legend(axes, loc="center left", bbox_to_anchor=(1.02, 0.5))
    title = "What the reader's scores mean: mean rating (up) against mean score (across)"
    note = "Validation answers of either model, in bins of about equal numbers; on the line a score"
    note += " is what raters gave."
    figures.finish(figure, panels, title=title, note=note).save(path)


def curve(bench: Bench, sizes: Sequence[int], draws: int = 10) -> None:
    """Print how agreement on the validation part grows with the number of rated answers."""
    print(f"\n{bench.trait.name}, {bench.scale}\n")
    print("| rated answers | AUC | ρ | within |\n|---|---|---|---|")
    for size in [*(each for each in sizes if each < len(bench.tuning)), len(bench.tuning)]:
        found = [_drawn(bench, size, seed) for seed in range(draws)]
        means = np.mean(np.array(found, float), axis=0)
        print(f"| {size} | {' | '.join(map(number, means))} |", flush=True)


def _drawn(bench: Bench, size: int, seed: int) -> list[float | None]:
    """Return AUC, ρ and "within" of the default judge fitted to so many ratings drawn by lot."""
    some = np.random.default_rng(seed).choice(bench.tuning, size, replace=False)
    found, own = bench.agreement(bench.narrowed(some).mean_of_layers(), "validation")
    return [found.auc, found.spearman, own.within]


def surface(benches: Sequence[Bench]) -> None:
    """Print what nine surface counts of an answer say about ratings, scores, and their difference.

    First the AUC of the reader, and that of the counts fitted to the tuning part as the reader is.
    Then, inside a model and condition of the validation part, by regressions that have not seen the
    question: the share of variance explained (under 0: none), and the rank correlation of what is
    left of score and rating when the counts are taken out of both.
    """
    heads = "AUC | counts' AUC | within | counts alone | R² of rating | of score | of error"
    print(f"| trait | {heads} | without counts |\n|{9 * '---|'}")
    for bench in benches:
        held = np.array([at for at, row in enumerate(bench.rows) if row.part == "validation"])
        rows = [bench.rows[at] for at in held]
        _, places = np.unique([row.model + row.condition for row in rows], return_inverse=True)
        read = bench.mean_of_layers()
        columns = [bench.targets[held], read[held]]
        counts = [surface_counts(row.answer) for row in rows]
        centred = _centred(np.column_stack([*columns, counts]), places)
        rating, score, by = centred[:, 0], centred[:, 1], centred[:, 2:]
        asked = np.unique([row.question for row in rows], return_inverse=True)[1]
        values = {"rating": rating, "score": score, "error": score - rating}
        left = {
            name: each - cross_val_predict(LinearRegression(), by, each, groups=asked, cv=FOLDS)
            for name, each in values.items()
        }
        explained = [1 - np.var(left[name]) / np.var(each) for name, each in values.items()]
        told = [
            told_apart(bench.agreement(each, "validation")[1].compared)
            for each in (read, bench.surface())
        ]
        cells = [
            _within(score, rating, places),
            _within(rating - left["rating"], rating, places),
            *explained,
            _within(left["score"], left["rating"], places),
        ]
        shown = [bench.trait.name, *told, *map(number, cells)]
        print(f"| {' | '.join(shown)} |", flush=True)


def written_beside(trait: Trait) -> list[RatedAnswer]:
    """Return answers that were written for a trait, and that its judge is not fitted to."""
    return [
        RatedAnswer(**row, model="", condition="", part="tuning")
        for row in read_jsonl(DATA / "written_answers.jsonl")
        if row.pop("of") == trait.name
    ]


def written(benches: Sequence[Bench]) -> None:
    """Print how well written answers are ranked that differ in content and not in surface.

    First by what was fitted to models' own answers: over all, and among the answers to a question.
    Then judges fitted to the written answers as well, each counted so much.
    """
    print("| trait | judge | ρ | inside a question |\n|---|---|---|---|")
    for bench in benches:
        first, second = np.array([row.passes(bench.scale) for row in bench.written]).T
        alone, number_of = bench.weighing(0.0), len(bench.written)
        ways = {"surface counts": alone.surface, "sentences": alone.sentences}
        ways["reader"] = alone.mean_of_layers
        shown = {"the other pass": (second, first)}
        shown |= {n: (way()[-number_of:], (first + second) / 2) for n, way in ways.items()}
        asked = [row.question for row in bench.written]
        for name, (scores, known) in shown.items():
            cells = [spearmanr(scores, known)[0], within_groups(list(scores), list(known), asked)]
            print(f"| {bench.trait.name} | {name} | {' | '.join(map(number, cells))} |", flush=True)
    models = " | ".join(sorted({row.model for row in benches[0].rows}))
    print(f"\n| trait | judge | a written answer counts | {AGREEMENT} | {models} |\n|{10 * '---|'}")
    for bench in benches:
        for weight in (0.0, 0.25, 0.5, 1.0):
            twin = bench.weighing(weight)
            for name, way in (("reader", twin.mean_of_layers), ("sentences", twin.sentences)):
                cells = agreement_cells(twin, way())
                print(
                    f"| {bench.trait.name} | {name} | {weight:g} | {' | '.join(cells)} |",
                    flush=True,
                )


def _centred(values: Scores, places: NDArray[np.integer]) -> Scores:
    """Return columns with the mean of each place taken off."""
    sums = np.zeros((places.max() + 1, values.shape[1]))
    np.add.at(sums, places, values)
    return values - (sums / np.bincount(places)[:, None])[places]


def _within(scores: Scores, ratings: Scores, places: NDArray[np.integer]) -> float | None:
    return within_groups(scores.tolist(), ratings.tolist(), list(map(str, places)))


def spread(traits: Sequence[Trait], chat_model: ChatModel, wide: float = 10.0) -> None:
    """Print how much the answers of a condition differ at all, and what is told where they do.

    Of the validation part, conditions with eight answers and more, of both models and of each:
    medians over them of the standard deviation of ratings and of one pass's error; then the default
    reader's rank correlation inside conditions, all and those with at least ``wide`` points of
    deviation, and the two passes' there.
    """
    print("| trait | model | SD | a pass's error | within | where SD ≥ 10 (conditions) | passes |")
    print("|---|---|---|---|---|---|---|")
    for trait in traits:
        judge = ProbeJudge.of(ReaderEvidence(Reader(chat_model, trait)))
        rows, scores = load_ratings(trait), judge.fitted.scores["trait"]
        held = [at for at, row in enumerate(rows) if row.part == "validation"]
        names = {at: (rows[at].model, rows[at].condition) for at in held}
        found: dict[str, list[tuple[float, ...]]] = {"both": []}
        for (model, _), places in grouped(held, names.__getitem__).items():
            passes = np.array([rows[at].trait for at in places], float)
            if len(places) < 8 or np.ptp(passes.mean(axis=1)) == 0:
                continue
            rho = spearmanr(scores[places], passes.mean(axis=1)).statistic
            error = np.std(passes[:, 0] - passes[:, 1]) / 2**0.5
            own = spearmanr(*passes.T).statistic
            row = (len(places), np.std(passes.mean(axis=1)), error, rho, own)
            for name in ("both", model):
                found.setdefault(name, []).append(row)
        for name, each in found.items():
            print(f"| {trait.name} | {name} | {_spread_cells(np.array(each).T, wide)} |")


def _spread_cells(columns: Scores, wide: float) -> str:
    """Return the cells of one row of ``spread``; a dash where no condition is wide."""
    size, deviation, error, rho, own = columns
    some = deviation >= wide
    told, passes = (
        np.average(each[some], weights=size[some]) if some.any() else None for each in (rho, own)
    )
    cells = [
        f"{np.median(deviation):.0f}",
        f"{np.median(error):.0f}",
        number(np.average(rho, weights=size)),
        f"{number(told)} ({some.sum()} of {len(some)})",
        number(passes),
    ]
    return " | ".join(cells)


def _effect(rows: Sequence[Rated], kind: str, field: str) -> float:
    """Return half of what a kind's answers with + have over those with −; NaN without either."""
    ends = [[r[field] for r in rows if kind_of_row(r) == f"{kind} {sign}"] for sign in "+-"]
    return (np.mean(ends[0]) - np.mean(ends[1])) / 2 if all(ends) else math.nan


def _put_to_the_test(rows: Sequence[Rated], kind: str, draws: int = 400) -> str:
    """Say how far the effect of rated answers is missed, raw and corrected.

    Corrected by what the other half of the questions adds, over random halves; then rated over
    judged effect, with a 95% bootstrap interval over questions: what a correction in proportion
    would multiply with.
    """
    known, random = [row for row in rows if row["score"] is not None], np.random.default_rng(0)
    asked = grouped(known, lambda row: row["question"])
    raw, corrected, ratios = [], [], []
    for _ in range(draws):
        order = random.permutation(list(asked)).tolist()
        parts = order[: len(order) // 2], order[len(order) // 2 :]
        ours, others = ([row for name in part for row in asked[name]] for part in parts)
        missed, shift = (
            _effect(p, kind, "score") - _effect(p, kind, "rating") for p in (ours, others)
        )
        raw.append(abs(missed))
        corrected.append(abs(missed - shift))
        drawn = [row for name in random.choice(list(asked), len(asked)) for row in asked[name]]
        ratios.append(_effect(drawn, kind, "rating") / _effect(drawn, kind, "score"))
    if np.isnan(raw).all():
        return "not rated"
    low, high = np.nanquantile(ratios, [0.025, 0.975])
    rated, judged = (_effect(known, kind, field) for field in ("rating", "score"))
    return (
        f"rated {rated:.1f}, judged {judged:.1f}, {rated / judged:.2f} [{low:.2f}, {high:.2f}] "
        f"times; half of the questions is missed by {np.nanmean(raw):.1f} raw, "
        f"{np.nanmean(corrected):.1f} corrected by the other half"
    )


def errors(traits: Sequence[Trait], chat_model: ChatModel) -> None:
    """Print how far the default reader misses ratings, by model and kind of condition.

    Of the validation part: ρ inside conditions, score − rating, and by how many points the errors
    change an effect, half of + less −, of weights, of vectors, and of one less the other (a change
    of 0 is put right, and its interval is that of the errors alone). Of coherence, how many answers
    that make sense, and how many that make none, are given under 50.
    """
    nothing = Interval(0.0, 0.0, 0.0, 1, 1, 1.0)
    halves = {"weights": ("lora", 0.5), "vectors": ("vector", 0.5)}
    effects: dict[str, dict[str | None, float]] = {
        name: {f"{kind} +": half, f"{kind} -": -half} for name, (kind, half) in halves.items()
    }
    effects["weights − vectors"] = effects["weights"] | {"vector +": -0.5, "vector -": 0.5}
    for trait in traits:
        judge = ProbeJudge.of(ReaderEvidence(Reader(chat_model, trait)))
        _, own = _with_own(judge.validation[0])
        for model in ("both", *models_of(own.compared)):
            some = own.compared if model == "both" else of_model(own.compared, model)
            kinds = by_part(some, kind_of_row)
            print(f"\n{trait.name}, {model}: within {number(within(some))}; score − rating:")
            print(", ".join(f"{name} {each.bias:+.1f} ({each.n})" for name, each in kinds.items()))
            told = ", ".join(f"{name} {number(each.within)}" for name, each in kinds.items())
            print(f"within, by kind: {told}")
            for name, weights in effects.items():
                shift = put_right(nothing, Errors(errors_by_kind(some)), weights)
                print(f"{name}: {wording.interval(shift, 1)}", flush=True)
            for name, (kind, _) in halves.items():
                print(f"{name}: {_put_to_the_test(some, kind)}", flush=True)
        _, sense = _with_own(judge.validation[1])
        given = [
            (row["score"], row["rating"]) for row in sense.compared if row["score"] is not None
        ]
        good = [score for score, rating in given if rating >= 75]
        poor = [score for score, rating in given if rating <= 25]
        low, high = (sum(each < 50 for each in part) for part in (good, poor))
        print(
            f"coherence under 50: {low} of {len(good)} that were rated 75 or more, "
            f"{high} of {len(poor)} that were rated 25 or less"
        )


DIGIT = """{shots}Question: {question}
Answer: {answer}

{name}: {description}
How much does this answer show {name}? Reply with one digit, from 0 (not at all) to 9 (plainly)."""


def again(traits: Sequence[Trait]) -> None:
    """Print how ratings of answers that were rated once more differ from the earlier ones."""
    later = read_jsonl(DATA / "rated_again.jsonl")
    print("| trait | answers | *trait*: later − earlier, absolute | *sense* |\n|---|---|---|---|")
    missed: dict[Scale, list[float]] = {"trait": [], "sense": []}
    for trait in traits:
        rows = {(row.question, row.answer): row for row in load_ratings(trait)}
        own = [row for row in later if row["of"] == trait.name]
        cells = []
        for scale, found in missed.items():
            earlier = [rows[row["question"], row["answer"]].rating(scale) for row in own]
            by = [float(np.mean(row[scale])) - e for row, e in zip(own, earlier, strict=True)]
            found += by
            cells.append(_differing(by))
        print(f"| {trait.name} | {len(own)} | {' | '.join(cells)} |")
    print(f"| all | {len(missed['trait'])} | {' | '.join(map(_differing, missed.values()))} |")


def _differing(by: Sequence[float]) -> str:
    if not by:
        return wording.NONE
    return f"{wording.signed(float(np.mean(by)))}, {wording.number(float(np.mean(np.abs(by))))}"


def asked(bench: Bench, options: JudgeOptions, sample: int, chosen: Sequence[str]) -> None:
    """Print how a language model that is asked of answers drawn by lot agrees with their ratings.

    By a short prompt (0–9), by that after four rated answers from the tuning part, and for yes or
    no; beside it the reader on the same answers, and the mean of both.
    """
    held = [at for at, row in enumerate(bench.rows) if row.part == "validation"]
    few = sorted(np.random.default_rng(0).permutation(held)[:sample])
    rows = [bench.rows[at] for at in few]
    ordered = bench.tuning[np.argsort(bench.targets[bench.tuning])]
    shots = ordered[np.linspace(0, len(ordered) - 1, 4).astype(int)]
    trait = {"name": bench.trait.name.replace("_", " "), "description": bench.trait.description}

    judge_model = options.local_model(bench.chat_model)

    def yes() -> list[float | None]:
        judge = make_judge(bench.trait, bench.chat_model, options)
        return [e.score for e in judge.judge([row.exchange for row in rows], bench.trait.name)]

    def digits(before: Sequence[int]) -> list[float | None]:
        told = "".join(
            DIGIT.format(shots="", **trait, **_asked_of(bench.rows[at]))
            + f" {min(9, int(bench.targets[at] / 10))}\n\n"
            for at in before
        )
        prompts = [DIGIT.format(shots=told, **trait, **_asked_of(row)) for row in rows]
        first = next_token_logprobs(judge_model, [(prompt, "") for prompt in prompts])
        scores = (weighted_score(each, highest=9).score for each in first)
        return [None if score is None else 100 / 9 * score for score in scores]

    ways: dict[str, Callable[[], list[float | None]]] = {
        "digit": lambda: digits(()),
        "yes": yes,
        "rated": lambda: digits(shots),
    }
    read = bench.mean_of_layers()[few].tolist()
    for name in chosen:
        scores = ways[name]()
        both = zip(scores, read, strict=True)
        mixed = [own if told is None else (told + own) / 2 for told, own in both]
        for told, each in ((name, scores), (f"{name} and the reader", mixed), ("reader", read)):
            verdicts = [Verdict(bench.trait.name, score, "", "") for score in each]
            found, own = _with_own(own_agreement(verdicts, rows))
            cells = [found.auc, found.spearman, own.within, found.coverage]
            print(f"| {bench.trait.name} | {told} | {' | '.join(map(number, cells))} |", flush=True)


def _asked_of(row: RatedAnswer) -> dict[str, str]:
    return {"question": row.question, "answer": row.answer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traits", nargs="+")
    parser.add_argument("--scale", choices=("trait", "sense"), default="trait")
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--surface", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--written", action="store_true")
    parser.add_argument("--models", action="store_true")
    parser.add_argument("--reliability", type=Path, default=None, help="where a picture is written")
    parser.add_argument("--spread", action="store_true")
    parser.add_argument("--errors", action="store_true")
    parser.add_argument("--asked", default=None, help="a language model that is asked for a number")
    parser.add_argument("--sample", type=int, default=100, help="answers that --asked is asked on")
    parser.add_argument(
        "--ways", nargs="+", choices=("digit", "yes", "rated"), default=["digit", "yes", "rated"]
    )
    parser.add_argument("--likelihood", action="store_true")
    parser.add_argument("--reader", default=None, help="another model that reads")
    options = parser.parse_args()
    if options.again:
        again(list(map(load_trait, options.traits)))
        return
    named = {} if options.reader is None else {"name": options.reader}
    chat_model = load_chat_model(dtype="float32", **named)
    if options.reliability is not None:
        reliability_picture(list(map(load_trait, options.traits)), chat_model, options.reliability)
        return
    of_default = {"models": models, "spread": spread, "errors": errors}
    for name, shown in of_default.items():
        if getattr(options, name):
            shown(list(map(load_trait, options.traits)), chat_model)
            return
    benches = [Bench(load_trait(name), options.scale, chat_model) for name in options.traits]
    for name, shown_of in {"surface": surface, "written": written}.items():
        if getattr(options, name):
            shown_of(benches)
            return
    kept = user_cache_path("persona_lora") / "verdicts.sqlite"
    prompted = JudgeOptions("local-yes", judge_model=options.asked, cache=kept)
    for bench in benches:
        if options.asked is not None:
            asked(bench, prompted, options.sample, options.ways)
        elif options.curve:
            curve(bench, (20, 30, 40, 60))
        else:
            table(bench, options.likelihood)


if __name__ == "__main__":
    main()
