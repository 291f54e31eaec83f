"""The coefficients at which different directions do the same to the model.

Coefficients of different methods have nothing in common, and two diffs differ in length. What can
be compared is the divergence KL(p₀ ‖ p) of the model's next tokens from the unsteered ones, on a
text. A search over mixes needs a common scale, so that its σ means the same along each
direction: the coefficient that diverges by ``EQUAL_EFFECT`` nats per token on the unsteered model's
answers to ordinary prompts. A comparison needs, for every method, the coefficient that diverges as
a given one of the diff; a secant search finds it, on the same answers or, where the effect is
measured, on what each method itself answers to the trait's questions: what does the same to
ordinary prompts may do more, or less, to these.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from persona_lora.core import progress
from persona_lora.core.chat import COHERENCE, Condition, Exchange
from persona_lora.core.content import digest_of, numbered
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff, finite_coefficient
from persona_lora.core.options import GenerationOptions
from persona_lora.core.protocol import LEAST_SCORED
from persona_lora.core.steering_vector import SteeringVector, length_of
from persona_lora.core.strength import Moved, Strengths
from persona_lora.judges.judging import Judge
from persona_lora.models.likelihood import TokenizedExchange
from persona_lora.models.loading import ChatModel
from persona_lora.projections.inputs import kept_inputs
from persona_lora.report import wording
from persona_lora.report.resampling import bootstrap_mean
from persona_lora.report.scores import control_name, method_of
from persona_lora.report.sections import Table
from persona_lora.report.summary import floor_under
from persona_lora.steering.activations import Positions
from persona_lora.steering.bank import Bank, Coefficients
from persona_lora.studies.steering.divergence import (
    ordinary_texts,
    own_answers,
    own_texts,
    row_divergences,
)
from persona_lora.studies.steering.read_comparison import (
    ACTIVATION,
    LORA,
    METHODS,
    RANDOM,
    RANDOM_LORA,
)

logger = logging.getLogger(__name__)

EQUAL_EFFECT = 0.03  # nats per token
CLOSE_ENOUGH, TOO_FAR = 0.05, 0.25  # of the effect asked for
DOUBLINGS = range(-2, 5)  # of that coefficient

Statistic = Literal["mean", "p95"]
ALONE = "the direction"  # in a bank of its own
ROUNDS = 8
TOLERANCE = 0.03  # of the divergence asked for
OWN_TOLERANCE = 0.1  # where each method answers for itself
STEEPEST, FLATTEST = 4.0, 0.5  # of log KL over log c; the slope is 2 where steering is weak


@dataclass(frozen=True)
class Scale:
    """The coefficient of one direction at which its effect is ``kl`` nats per token (mean of ±)."""

    trait: str
    coefficient: float
    kl: float


def equal_effect_scales(
    chat_model: ChatModel,
    bank: Bank,
    prompts: Sequence[str],
    *,
    effect: float = EQUAL_EFFECT,
) -> list[Scale]:
    """Return for every direction the coefficient at which its effect is ``effect`` nats per token.

    The effect is the mean over +c and −c of the mean KL(p₀ ‖ p_c) over the tokens of the model's
    own answers to ``prompts``, each direction's to within 5%; they run in the same batches. Raises
    UserError for a direction without effect, and for one that does not come near to it.
    """
    texts = ordinary_texts(chat_model, prompts)
    searches = [
        _Search(Level(0, trait, 1.0, effect, effect, math.nan, matched=True), trait, "mean")
        for trait in bank.names
    ]
    for done in range(ROUNDS):
        pending = [each for each in searches if not each.done]
        progress.report(done, ROUNDS)
        if not pending:
            break
        rows = [{e.method: sign * e.coefficient} for e in pending for sign in (1.0, -1.0)]
        divergences = row_divergences(chat_model, bank, rows, texts)
        effects = divergences.mean(dim=1).view(len(pending), 2).mean(dim=1).tolist()
        for each, kl in zip(pending, effects, strict=True):
            each.take(Nats(kl, math.nan), CLOSE_ENOUGH)
    progress.report(ROUNDS, ROUNDS)
    scales = [
        Scale(e.method, e.coefficient, e.kl_mean) for e in (each.result() for each in searches)
    ]
    for scale in scales:
        if abs(scale.kl / effect - 1) > TOO_FAR:
            raise UserError(
                f"no coefficient of {scale.trait} was found at which it diverges by {effect:g} "
                f"nats a token; the nearest one tried, {scale.coefficient:.3g}, diverges by "
                f"{scale.kl:.3g}: leave it out"
            )
        logger.info("%s: %.4g nats at coefficient %.3g", scale.trait, scale.kl, scale.coefficient)
    return scales


def measure_strengths(
    chat_model: ChatModel,
    direction: LoRADiff | SteeringVector,
    prompts: Sequence[str],
    positions: Positions = "response",
) -> list[Moved]:
    """Return what a direction does at ``DOUBLINGS`` of its coefficient of equal effect, both signs.

    KL(p₀ ‖ p) a token, on the unsteered model's own answers to ``prompts``, and the 95% interval of
    the mean over these. A multiple of a direction is measured at the same places. Raises UserError
    for a direction without effect.
    """
    norm = length_of(direction, ALONE)
    bank = _alone(direction * (1 / norm), positions)
    (scale,) = equal_effect_scales(chat_model, bank, prompts)
    coefficients = [
        sign * scale.coefficient * 2.0**power for sign in (-1.0, 1.0) for power in DOUBLINGS
    ]
    texts = ordinary_texts(chat_model, prompts)
    with progress.stage("nats"):
        rows = row_divergences(
            chat_model,
            bank,
            [{ALONE: each} for each in coefficients],
            texts,
            before_text=lambda at: progress.report(at + 1, len(texts)),
        )
    lengths = [len(text.answer) for text in texts]
    return [
        Moved(each / norm, float(row.mean()), float(row.quantile(0.95)), *_bounds(row, lengths))
        for each, row in zip(coefficients, rows, strict=True)
    ]


def _bounds(row: Tensor, lengths: Sequence[int]) -> tuple[float | None, float | None]:
    """Return the 95% interval of the mean of all tokens over texts; None of a single text.

    The mean is a ratio, of a text's sum and its length: its interval is that of the mean of the
    texts' shares in it, to first order.
    """
    whole, mean_length = float(row.mean()), statistics.fmean(lengths)
    sums = [float(each.sum()) for each in row.split(lengths)]
    shares = {
        at: [whole + (total - whole * length) / mean_length]
        for at, (total, length) in enumerate(zip(sums, lengths, strict=True))
    }
    found = bootstrap_mean(shares)
    return (None if found.low is None else max(0.0, found.low)), found.high


def strengths_of(
    chat_model: ChatModel,
    direction: LoRADiff | SteeringVector,
    prompts: Sequence[str],
    judge: Judge,
    *,
    content: str,
    acting: str = "",
    positions: Positions = "response",
) -> Strengths:
    """Return what a direction does, with the coherence of answers there and of unsteered ones.

    The mean over greedy answers to ``prompts``, as long as those of a sweep; none where ``judge``
    leaves more than a fifth of them without a score, as it does what is unlike any answer.
    ``content`` is the digest of the whole direction, ``acting`` where this part of it acts. Of a
    diff the length is told too, weighted by what flows through its modules over ``prompts``.
    """
    norm = _weighted_norm(chat_model, direction, prompts)
    points = measure_strengths(chat_model, direction, prompts, positions)
    every = [Moved(0.0, 0.0, 0.0), *points]
    rows = [{ALONE: each.coefficient} for each in every]
    bank, options = _alone(direction, positions), GenerationOptions()  # shorter loops are unseen
    answers = own_answers(chat_model, bank, rows, prompts, options)
    found = []
    for point, own in zip(every, answers, strict=True):
        said = [Exchange(asked, each.text) for asked, each in zip(prompts, own, strict=True)]
        verdicts = judge.judge(said, COHERENCE)
        scores = [each.score for each in verdicts if each.score is not None]
        told = len(scores) >= LEAST_SCORED * len(verdicts)
        found.append(point._replace(coherence=statistics.fmean(scores) if told else None))
    floor = floor_under(found[0].coherence)
    return Strengths(content, acting, digest_of(prompts), tuple(found), floor, norm)


def _weighted_norm(
    chat_model: ChatModel, direction: LoRADiff | SteeringVector, prompts: Sequence[str]
) -> float | None:
    """Return the weighted length of a diff; None for a vector, and where an input is not known."""
    if not isinstance(direction, LoRADiff):
        return None
    with progress.stage("inputs of modules"):
        inputs = kept_inputs(chat_model, prompts)
    unknown = [name for name in direction.factors if name not in inputs.roots]
    if unknown:
        logger.warning("no weighted norm: what flows into %s was not measured", unknown[0])
        return None
    return inputs.weigh(direction, allow_other_base=True).norm()


def _alone(direction: LoRADiff | SteeringVector, positions: Positions) -> Bank:
    if isinstance(direction, LoRADiff):
        return Bank(diffs={ALONE: direction})
    return Bank(vectors={ALONE: direction}, positions=positions)


def strengths_table(found: Strengths, name: str) -> Table:
    """Return what each coefficient does, from the most negative to the most positive."""
    norm = found.weighted_norm
    rows = (
        [wording.coefficient(each.coefficient), _nats(each), f"{each.nats_p95:.3f}"]
        + ([] if norm is None else [f"{abs(each.coefficient) * norm:.3g}"])
        + [wording.number(each.coherence)]
        for each in sorted(found.points, key=lambda point: point.coefficient)
    )
    length = "" if norm is None else "weighted norm | "
    columns = f"coefficient | nats a token [95%] | 95% of tokens under | {length}coherence"
    return Table.of(columns, rows, name)


def _nats(point: Moved) -> str:
    if point.low is None or point.high is None:
        return f"{point.nats:.4f}"
    return f"{point.nats:.4f} [{point.low:.4f}, {point.high:.4f}]"


def bank_of_methods(
    diff: LoRADiff,
    vector: SteeringVector,
    random_diffs: Sequence[LoRADiff],
    random_vectors: Sequence[SteeringVector],
    positions: Positions = "response",
) -> Bank:
    """Return a diff, a steering vector at its layers, and random controls of each.

    All but the diff steer the model in this process, whoever else answers.
    """
    diffs = {control_name(RANDOM_LORA, at): each for at, each in enumerate(random_diffs)}
    vectors = {control_name(RANDOM, at): each for at, each in enumerate(random_vectors)}
    return Bank(
        diffs={LORA: diff, **diffs},
        vectors={ACTIVATION: vector, **vectors},
        positions=positions,
        here=(*diffs, ACTIVATION, *vectors),
        record={
            "diff_norm": diff.norm(),
            "vector_norms": list(vector.norms().values()),
            "layers": list(vector.layers),
            "positions": positions,
            "controls": [
                *(dict(each.sources) for each in random_diffs),
                *(dict(each.sources) for each in random_vectors),
            ],
        },
        inputs={
            **diff.inputs("the diff"),
            "the vector": vector.content(),
            **numbered("random diff", [each.content() for each in random_diffs]),
            **numbered("random vector", [each.content() for each in random_vectors]),
        },
    )


@dataclass(frozen=True)
class Level:
    """One divergence, and the coefficient of a method that reaches it.

    ``kl_mean`` and ``kl_p95`` are per token, in nats, on what was calibrated on; ``ordinary_mean``
    and ``ordinary_p95`` on ordinary prompts, None where that is the same. ``matched`` is False
    where the search did not come near enough to ``target``.
    """

    level: int
    method: str
    coefficient: float
    target: float
    kl_mean: float
    kl_p95: float
    matched: bool
    ordinary_mean: float | None = None
    ordinary_p95: float | None = None

    @property
    def condition(self) -> Condition:
        """The condition in which questions are asked at this level."""
        return Condition(self.method, self.coefficient)


def highest_level(levels: Sequence[Level]) -> list[Level]:
    """Return every method at the level that diverges most, whatever its number and sign."""
    top = max(levels, key=lambda each: each.target).level
    return [each for each in levels if each.level == top]


class Nats(NamedTuple):
    """The mean and the 95th percentile of a divergence over tokens; NaN without a token."""

    mean: float
    p95: float


class Divergences(NamedTuple):
    """How KL(p₀ ‖ p) of rows is measured, and how near to one another they can be brought.

    ``at`` returns the divergence at every token, a tensor a row; ``names`` are the directions.
    """

    at: Callable[[Sequence[Coefficients]], Sequence[Tensor]]
    names: tuple[str, ...]
    tolerance: float = TOLERANCE

    def of(self, rows: Sequence[Coefficients]) -> list[Nats]:
        """Return the divergence of every row."""
        return [
            Nats(float(each.mean()), float(each.quantile(0.95)))
            if len(each)
            else Nats(math.nan, math.nan)
            for each in self.at(rows)
        ]


def on_prompts(
    chat_model: ChatModel, bank: Bank, texts: Sequence[TokenizedExchange]
) -> Divergences:
    """Measure on texts that are the same for all rows: the unsteered model's answers."""
    return Divergences(
        lambda rows: list(row_divergences(chat_model, bank, rows, texts)), bank.names
    )


def on_own_answers(chat_model: ChatModel, bank: Bank, questions: Sequence[str]) -> Divergences:
    """Measure on what each row itself answers to the questions.

    Answers change by whole words with a coefficient, and the divergence in steps with them.
    """

    def at(rows: Sequence[Coefficients]) -> list[Tensor]:
        texts = own_texts(chat_model, bank, rows, questions)
        return [
            row_divergences(chat_model, bank, [row], own)[0] if own else torch.zeros(0)
            for row, own in zip(rows, texts, strict=True)
        ]

    return Divergences(at, bank.names, OWN_TOLERANCE)


def beside_prompts(levels: Sequence[Level], ordinary: Divergences) -> list[Level]:
    """Return the levels with what they do to ordinary prompts."""
    found = ordinary.of([each.condition.coefficients for each in levels])
    return [
        replace(level, ordinary_mean=each.mean, ordinary_p95=each.p95)
        for level, each in zip(levels, found, strict=True)
    ]


def acting_coefficients(coefficients: Sequence[float]) -> list[float]:
    """Return the coefficients other than 0; UserError where there is none."""
    asked = [finite_coefficient(value) for value in coefficients if value]
    if not asked:
        raise UserError("a comparison needs at least one coefficient other than 0")
    return asked


def match_divergence(
    measured: Divergences, coefficients: Sequence[float], *, statistic: Statistic = "mean"
) -> list[Level]:
    """Return a level for every coefficient of the diff (0 left out) and every method.

    The target of level k is the ``statistic`` of KL(p₀ ‖ p) at ``coefficients[k]`` of the diff; the
    other methods take its sign. All open searches run in the same batches. Raises UserError for a
    method that does nothing to the model, or without a coefficient.
    """
    asked = acting_coefficients(coefficients)
    divergences = measured.of([{LORA: value} for value in asked])
    found = []
    for number, (value, nats) in enumerate(zip(asked, divergences, strict=True)):
        target = _moved(LORA, value, getattr(nats, statistic))
        found.append(Level(number, LORA, value, target, *nats, matched=True))
    others = [method for method in measured.names if method != LORA]
    searches = [_Search(level, method, statistic) for level in found for method in others]
    for done in range(ROUNDS):
        pending = [search for search in searches if not search.done]
        progress.report(done, ROUNDS)
        if not pending:
            break
        divergences = measured.of([{each.method: each.coefficient} for each in pending])
        for search, nats in zip(pending, divergences, strict=True):
            search.take(nats, measured.tolerance)
    progress.report(ROUNDS, ROUNDS)
    found += [each.result() for each in searches]
    places = {name: METHODS.index(method_of(name)) for name in measured.names}
    return sorted(found, key=lambda each: (each.level, places[each.method]))


class _Search:
    """A secant search for log c on log KL; the slope starts at 2, where KL grows as c²."""

    def __init__(self, like: Level, method: str, statistic: Statistic) -> None:
        self.like, self.method, self.statistic = like, method, statistic
        self.points: list[tuple[float, float, Nats]] = []  # log |c|, log KL, and all that was told
        self.log_c = 0.0
        self.done = False

    @property
    def coefficient(self) -> float:
        return math.copysign(math.exp(self.log_c), self.like.coefficient)

    def take(self, nats: Nats, near: float) -> None:
        """Note how far the coefficient diverges; go on to a better one unless it is good enough."""
        kl = _moved(self.method, self.coefficient, getattr(nats, self.statistic))
        self.done = abs(kl / self.like.target - 1) <= near
        self.points.append((self.log_c, math.log(kl), nats))
        if not self.done:
            self.log_c += (math.log(self.like.target) - math.log(kl)) / self._slope()

    def _slope(self) -> float:
        if len(self.points) < 2 or self.points[-1][0] == self.points[-2][0]:
            return 2.0
        (c0, first, _), (c1, second, _) = self.points[-2:]
        return min(max((second - first) / (c1 - c0), FLATTEST), STEEPEST)

    def result(self) -> Level:
        """Return the nearest coefficient that was tried."""
        target = self.like.target
        self.log_c, _, nats = min(self.points, key=lambda each: abs(each[1] - math.log(target)))
        return Level(self.like.level, self.method, self.coefficient, target, *nats, self.done)


def _moved(method: str, coefficient: float, kl: float) -> float:
    """Return a divergence; UserError where it is none."""
    if not (math.isfinite(kl) and kl > 0):
        raise UserError(
            f"{method} has a divergence of {kl} at coefficient {coefficient:g}: it does nothing to "
            "this model, or breaks it; leave it out"
        )
    return kl
