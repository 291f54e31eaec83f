"""Weights and activations in one population, and the coefficients at which they cost the same.

Coefficients of different methods have nothing in common. What they cost does: the divergence of the
model's next tokens from the unsteered ones on ordinary prompts. A secant search finds for every
method the coefficient that costs what a given one of the diff does, and there they are compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from persona_lora.core import progress
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff, finite_coefficient
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.likelihood import TokenizedExchange
from persona_lora.models.loading import ChatModel
from persona_lora.steering.activations import ActivationSteerer, Positions
from persona_lora.steering.live import LiveLoRA
from persona_lora.steering.steerer import Steerer, Together
from persona_lora.studies.asking.populations import UNSTEERED
from persona_lora.studies.asking.run import Condition
from persona_lora.studies.steering.divergence import row_divergences

LORA, ACTIVATION, RANDOM_LORA, RANDOM = "lora", "activation", "random_lora", "random"
METHODS = (LORA, ACTIVATION, RANDOM_LORA, RANDOM)
Statistic = Literal["mean", "p95"]
ROUNDS = 8
TOLERANCE = 0.03  # of the divergence asked for
STEEPEST, FLATTEST = 4.0, 0.5  # of log KL over log c; the slope is 2 where steering is weak


@dataclass(frozen=True, eq=False)
class Methods:
    """A diff, a steering vector at its layers, and a random control of each."""

    diff: LoRADiff
    vector: SteeringVector
    random_diff: LoRADiff
    random_vector: SteeringVector
    positions: Positions = "response"

    def steerer(self, chat_model: ChatModel, rows: Sequence[Condition]) -> Steerer:
        """Return a steerer whose row i is steered by the method and coefficient of ``rows[i]``."""

        def terms(first: str, second: str) -> list[list[float]]:
            return [
                [
                    (row.coefficient or 0.0) if row.method == name else 0.0
                    for name in (first, second)
                ]
                for row in rows
            ]

        weights = LiveLoRA(
            chat_model.model,
            [self.diff, self.random_diff],
            terms(LORA, RANDOM_LORA),
            allow_other_base=chat_model.allow_other_base,
        )
        activations = ActivationSteerer(
            chat_model.model,
            [self.vector, self.random_vector],
            terms(ACTIVATION, RANDOM),
            positions=self.positions,
            allow_other_base=chat_model.allow_other_base,
        )
        return Together([weights, activations])

    def record(self) -> dict[str, Any]:
        """Return what a run's configuration keeps of the methods."""
        return {
            "diff_norm": self.diff.norm(),
            "vector_norms": list(self.vector.norms().values()),
            "layers": list(self.vector.layers),
            "positions": self.positions,
            "controls": [dict(self.random_diff.sources), dict(self.random_vector.sources)],
        }

    def inputs(self) -> dict[str, str]:
        """Return digests of the diff, of the vector and of their controls."""
        return {
            "the diff": self.diff.content(),
            "the vector": self.vector.content(),
            "the random diff": self.random_diff.content(),
            "the random vector": self.random_vector.content(),
        }


@dataclass(frozen=True)
class Level:
    """One divergence, and the coefficient of a method that costs it.

    ``kl_mean`` and ``kl_p95`` are per token on ordinary prompts, in nats; ``matched`` is False
    where the search did not come within ``TOLERANCE`` of ``target``.
    """

    level: int
    method: str
    coefficient: float
    target: float
    kl_mean: float
    kl_p95: float
    matched: bool

    @property
    def condition(self) -> Condition:
        """The condition in which questions are asked at this level."""
        return Condition(self.method, self.coefficient)


def match_divergence(
    chat_model: ChatModel,
    methods: Methods,
    coefficients: Sequence[float],
    texts: Sequence[TokenizedExchange],
    *,
    statistic: Statistic = "mean",
) -> list[Level]:
    """Return a level for every coefficient of the diff (0 left out) and every method.

    The target of level k is the ``statistic`` of KL(p₀ ‖ p) at ``coefficients[k]`` of the diff; the
    other methods take its sign. All open searches run in the same batches. UserError for a method
    that does nothing to the model, or without a coefficient.
    """
    asked = [finite_coefficient(value) for value in coefficients if value]
    if not asked:
        raise UserError("a comparison needs at least one coefficient other than 0")
    conditions = [Condition(LORA, value) for value in asked]
    costs = _costs(chat_model, methods, conditions, texts)
    targets = [cost[statistic] for cost in costs]
    found = [
        _level(number, LORA, value, target, cost, statistic)
        for number, (value, target, cost) in enumerate(zip(asked, targets, costs, strict=True))
    ]
    searches = [
        _Search(level, method, math.copysign(1.0, level.coefficient), level.target)
        for level in found
        for method in METHODS[1:]
    ]
    for done in range(ROUNDS):
        pending = [search for search in searches if not search.done]
        progress.report(done, ROUNDS)
        if not pending:
            break
        conditions = [Condition(each.method, each.coefficient) for each in pending]
        for search, cost in zip(
            pending, _costs(chat_model, methods, conditions, texts), strict=True
        ):
            search.take(cost, statistic)
    progress.report(ROUNDS, ROUNDS)
    found += [each.result(statistic) for each in searches]
    return sorted(found, key=lambda each: (each.level, METHODS.index(each.method)))


class _Search:
    """A secant search for log c on log KL; the slope starts at 2, where KL grows as c²."""

    def __init__(self, like: Level, method: str, sign: float, target: float) -> None:
        self.like, self.method, self.sign, self.target = like, method, sign, target
        self.points: list[tuple[float, dict[str, float]]] = []  # log |c|, its costs
        self.log_c = 0.0

    @property
    def coefficient(self) -> float:
        return self.sign * math.exp(self.log_c)

    @property
    def done(self) -> bool:
        return bool(self.points) and self.points[-1][1].get("done", 0.0) > 0

    def take(self, cost: Mapping[str, float], statistic: Statistic) -> None:
        """Note what the coefficient cost, and go on to a better one unless it is good enough."""
        kl = cost[statistic]
        if not (math.isfinite(kl) and kl > 0):
            raise UserError(
                f"{self.method} has a divergence of {kl} at coefficient {self.coefficient:g}: it "
                "does nothing to this model, or breaks it"
            )
        good = abs(kl / self.target - 1) <= TOLERANCE
        self.points.append((self.log_c, {**cost, "done": float(good)}))
        if not good:
            self.log_c += (math.log(self.target) - math.log(kl)) / self._slope(statistic)

    def _slope(self, statistic: Statistic) -> float:
        if len(self.points) < 2:
            return 2.0
        (c0, first), (c1, second) = self.points[-2:]
        if c1 == c0:
            return 2.0
        slope = (math.log(second[statistic]) - math.log(first[statistic])) / (c1 - c0)
        return min(max(slope, FLATTEST), STEEPEST)

    def result(self, statistic: Statistic) -> Level:
        """Return the nearest coefficient that was tried."""
        log_c, cost = min(
            self.points, key=lambda each: abs(math.log(each[1][statistic] / self.target))
        )
        coefficient = self.sign * math.exp(log_c)
        return _level(self.like.level, self.method, coefficient, self.target, cost, statistic)


def _level(
    number: int,
    method: str,
    coefficient: float,
    target: float,
    cost: Mapping[str, float],
    statistic: Statistic,
) -> Level:
    matched = abs(cost[statistic] / target - 1) <= TOLERANCE if target > 0 else False
    return Level(number, method, coefficient, target, cost["mean"], cost["p95"], matched)


def _costs(
    chat_model: ChatModel,
    methods: Methods,
    conditions: Sequence[Condition],
    texts: Sequence[TokenizedExchange],
) -> list[dict[str, float]]:
    rows = [UNSTEERED, *conditions]
    steerer = methods.steerer(chat_model, rows)
    divergences = row_divergences(chat_model, steerer, texts, num_rows=len(rows))
    return [{"mean": float(row.mean()), "p95": float(row.quantile(0.95))} for row in divergences]
