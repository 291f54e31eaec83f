"""The objective of a search: how well the answers under a mix of directions are judged, on prompts.

All candidates of a generation answer all prompts as the rows of as few batches as fit; a judge
reads the answers while the next batch is generated. An answer that could not be judged has no
score, and a candidate with too few of them no value: never a middle one.
"""

from __future__ import annotations

import logging
import math
import operator
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import islice
from statistics import fmean
from typing import Any

import numpy as np

from persona_lora.core import progress
from persona_lora.core.chat import Exchange, Verdict
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError
from persona_lora.core.options import GenerationOptions, ObjectiveOptions
from persona_lora.core.personas import Coefficients
from persona_lora.judges.answer_gates import counted, failures
from persona_lora.judges.budget import refuse_spent
from persona_lora.judges.judging import Judge
from persona_lora.judges.style_judge import PERSONA_FIT
from persona_lora.models.generation import Generated
from persona_lora.models.likelihood import tokenize_exchange
from persona_lora.models.loading import ChatModel
from persona_lora.models.processes import Processes
from persona_lora.steering.bank import Bank, Elsewhere
from persona_lora.studies.asking.run import Row, generate_rows
from persona_lora.studies.personas.search import PARTS, Value
from persona_lora.studies.steering.divergence import row_divergences

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 5.0, 60.0
Coherence = Callable[[Sequence[Exchange]], Sequence[Verdict]]
Relevance = Callable[[Sequence[Exchange]], Sequence[float | None]]
Parts = Callable[[Sequence[Exchange]], list[dict[str, float | None]]]


Mixed = Row[Coefficients | None]  # None: unsteered


@dataclass(frozen=True, eq=False)
class Speaker:
    """A model that answers under any mix of directions: coefficient = alpha · x · scale.

    ``scales`` are coefficients by trait (see ``equal_effect_scales``). Rows are shared out over
    ``processes``, and every process gets all answers.
    """

    chat_model: ChatModel
    directions: Bank
    scales: Mapping[str, float]
    alpha: float
    options: GenerationOptions
    processes: Processes

    def inputs(self) -> dict[str, str]:
        """Return digests of the model, of the directions, and of how they are scaled."""
        scaled = digest_of([self.alpha, dict(self.scales)])
        return {**self.chat_model.inputs(), **self.directions.inputs, "the scales": scaled}

    def answers(
        self,
        rows: Sequence[Mixed],
        *,
        on_batch: Callable[[Sequence[Exchange]], None] | None = None,
    ) -> list[Exchange]:
        """Return one answer for each row, in order; ``on_batch`` sees this process's as they come.

        UserError for a mix where there are no directions.
        """
        if not self.directions.names and any(row.condition is not None for row in rows):
            raise UserError("a mix of directions was asked for, and there are none")

        def told(numbers: Sequence[int], generated: Sequence[Generated]) -> None:
            if on_batch is not None:
                on_batch(list(map(said, numbers, generated)))

        def said(number: int, answer: Generated) -> Exchange:
            return Exchange(rows[number].question, answer.text, answer.finished)

        own = range(self.processes.index, len(rows), self.processes.count)
        steerer = self.directions.answering(
            self.chat_model, [self.coefficients(row.condition) for row in rows]
        )
        with progress.stage("answering"):
            answers = generate_rows(
                self.chat_model, rows, steerer, self.options, numbers=own, on_batch=told
            )
        found = dict(self.processes.gather(list(zip(own, map(said, own, answers), strict=True))))
        return [found[at] for at in range(len(rows))]

    def coefficients(self, mix: Coefficients | None) -> dict[str, float]:
        """Return what each direction is multiplied with; zeros for the unsteered model."""
        values = {} if mix is None else mix.as_dict()
        return {
            trait: self.alpha * values.get(trait, 0.0) * self.scales[trait]
            for trait in self.directions.names
        }

    def divergences(
        self, mix: Coefficients | None, exchanges: Sequence[Exchange]
    ) -> list[list[float]]:
        """Return KL(p₀ ‖ p) in nats at every token of each answer, under the mix that gave it.

        Empty for an empty answer.
        """
        texts = [tokenize_exchange(self.chat_model, each) for each in exchanges]
        told, rows = [text for text in texts if text.answer], [self.coefficients(mix)]
        if not told or not any(rows[0].values()):
            return [[0.0] * len(text.answer) for text in texts]
        found = iter(row_divergences(self.chat_model, self.directions, rows, told)[0].tolist())
        return [list(islice(found, len(text.answer))) for text in texts]


def plain_speaker(
    chat_model: ChatModel,
    options: GenerationOptions,
    processes: Processes = Processes(),
    elsewhere: Elsewhere | None = None,
) -> Speaker:
    """Return a speaker without directions; ``elsewhere`` is who answers in place of the model."""
    return Speaker(chat_model, Bank(elsewhere=elsewhere), {}, 1.0, options, processes)


class RememberingJudge:
    """A judge's scored verdicts by exchange; what was asked for ahead is waited for, not asked."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self._known: dict[Exchange, Verdict] = {}
        self._ahead: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(max_workers=1)

    def ask_ahead(self, exchanges: Sequence[Exchange]) -> None:
        """Have exchanges judged in the background."""
        self._ahead.append(self._pool.submit(copy_context().run, self._ask, list(exchanges)))

    def leave(self) -> None:
        """Ask for nothing more: a program that is told to end waits for no more than one batch."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def verdicts(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Return one verdict per exchange, in order."""
        ahead, self._ahead = self._ahead, []
        try:
            for future in ahead:
                future.result()
        except (KeyboardInterrupt, SystemExit):
            self.leave()
            raise
        missing = self._ask(exchanges)
        return [self._known.get(each) or missing[each] for each in exchanges]

    def _ask(self, exchanges: Sequence[Exchange]) -> Any:
        """Judge what is not known; keep scored verdicts, return the others by exchange."""
        new = [each for each in dict.fromkeys(exchanges) if each not in self._known]
        found = dict(zip(new, self.judge.judge(new, PERSONA_FIT) if new else [], strict=True))
        self._known |= {
            each: verdict for each, verdict in found.items() if verdict.score is not None
        }
        return {each: verdict for each, verdict in found.items() if verdict.score is None}


@dataclass(eq=False)
class MixObjective:
    """Maps the candidates of a generation to values; see ``ObjectiveOptions``.

    ``learnt_from`` are the utterances that no answer may copy; None: whatever is judged counts.
    ``parts`` gives the values of every answer by objective, where several are searched at once,
    ``choice`` what each mix keeps of what the model knows.
    """

    speaker: Speaker
    prompts: Sequence[str]
    judge: Judge
    options: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    _: KW_ONLY
    coherence: Coherence | None = None
    relevance: Relevance | None = None
    learnt_from: Sequence[str] | None = ()
    parts: Parts | None = None
    choice: Callable[[Sequence[Coefficients]], list[float]] | None = None

    def __post_init__(self) -> None:
        self._judge = RememberingJudge(self.judge)
        if not self.prompts:
            raise UserError("a search needs at least one prompt")
        if self.options.min_coherence is not None and self.coherence is None:
            raise UserError("min_coherence needs a measure of coherence")
        if self.options.min_relevance is not None and self.relevance is None:
            raise UserError("min_relevance needs a measure of relevance")
        if self.options.min_choice is not None and self.choice is None:
            raise UserError("min_choice needs a measure of what is kept")
        if self.options.min_relevance is not None and len(self.prompts) < 2:
            raise UserError(
                "relevance compares an answer with two prompts at least, and there is one; give "
                "more, or turn it off (--min-relevance 0)"
            )
        if self.options.race and len(self.prompts) < 2:
            raise UserError("a race is over two prompts at least, and there is one; leave it out")
        if self.options.race and self.parts is not None:
            raise UserError("a race needs one order of its candidates, and a front has none")

    def __call__(self, mixes: Sequence[Coefficients], iteration: int) -> list[Value]:
        """Return a value per candidate; ``iteration`` seeds which prompts a race begins with."""
        first, rest = self._heats(iteration)
        found, kept = self._measure(mixes, first), self._kept(mixes)
        values = [self._value(*each) for each in zip(mixes, found, kept, strict=True)]
        if not rest:
            return values
        order = sorted(range(len(mixes)), key=lambda at: values[at].standing, reverse=True)
        better = sorted(order[: math.ceil(len(mixes) / 2)])
        whole = dict(zip(better, self._measure([mixes[at] for at in better], rest), strict=True))
        values = [
            self._value(mix, found[at] + whole[at] if at in whole else found[at], kept[at])
            for at, mix in enumerate(mixes)
        ]
        return _ranked(values, order[len(better) :])

    def _kept(self, mixes: Sequence[Coefficients]) -> Sequence[float | None]:
        measure = self.choice if self.options.min_choice is not None else None
        if measure is None:
            return [None] * len(mixes)
        return self.speaker.processes.from_main(lambda: measure(mixes))

    def _heats(self, iteration: int) -> tuple[list[int], list[int]]:
        """Return the prompts that all candidates answer, and those that only the better half do."""
        everything = list(range(len(self.prompts)))
        if not self.options.race:
            return everything, []
        drawn = np.random.default_rng([self.options.seed, iteration]).permutation(everything)
        half = math.ceil(len(everything) / 2)
        return sorted(map(int, drawn[:half])), sorted(map(int, drawn[half:]))

    def _measure(self, mixes: Sequence[Coefficients], prompts: Sequence[int]) -> list[Measured]:
        rows = [
            Row(self.prompts[prompt], mix, stream=prompt) for mix in mixes for prompt in prompts
        ]
        judge_here = self.speaker.processes.count == 1
        ahead = self._judge.ask_ahead if judge_here else None
        try:
            exchanges = self.speaker.answers(rows, on_batch=ahead)
        except (KeyboardInterrupt, SystemExit):
            self._judge.leave()
            raise
        # An answer in a heat is nearer to its prompt than to all others, not to a few of them.
        others = [Exchange(each, "") for at, each in enumerate(self.prompts) if at not in prompts]

        def told(measure: Callable[[Sequence[Exchange]], Iterable[Any]] | None) -> list[Any]:
            return [] if measure is None else list(measure(exchanges))

        def placed(measure: Relevance) -> list[float | None]:
            return list(measure([*exchanges, *others]))[: len(exchanges)]

        from_main, options = self.speaker.processes.from_main, self.options
        scores = from_main(lambda: [each.score for each in self._patiently(exchanges)])
        limited = None if options.min_coherence is None else self.coherence
        coherence = from_main(lambda: [each.score for each in told(limited)])
        relevant = None if options.min_relevance is None else self.relevance
        relevance = from_main(lambda: [] if relevant is None else placed(relevant))
        parts = from_main(lambda: told(self.parts))
        spans = [slice(at * len(prompts), (at + 1) * len(prompts)) for at in range(len(mixes))]
        said, own = [each.answer for each in exchanges], [exchanges[span] for span in spans]
        kl = from_main(lambda: list(map(self._kl_of, mixes, own)))
        return [
            Measured(
                *(list(prompts), said[span], scores[span], coherence[span], relevance[span]),
                each,
                parts[span],
            )
            for span, each in zip(spans, kl, strict=True)
        ]

    def _kl_of(self, mix: Coefficients, exchanges: Sequence[Exchange]) -> list[float]:
        if self.options.max_kl is None:
            return []
        return [each for answer in self.speaker.divergences(mix, exchanges) for each in answer]

    def _patiently(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Judge; wait while the judge scores nothing. UserError where its budget is spent."""
        waited, pause = 0.0, FIRST_PAUSE
        while True:
            verdicts = self._judge.verdicts(exchanges)
            refuse_spent(verdicts)
            answered = any(exchange.answer.strip() for exchange in exchanges)
            if not answered or any(each.score is not None for each in verdicts):
                return verdicts
            if waited >= self.options.pause:
                raise UserError(
                    f"the judge scored none of {len(exchanges)} answers for {waited:.0f} s "
                    f"({verdicts[0].reason}); finished generations are kept: run the same command "
                    "again to go on"
                )
            logger.warning("the judge scores nothing (%s); waiting", verdicts[0].reason)
            time.sleep(pause)
            waited, pause = waited + pause, min(2 * pause, LONGEST_PAUSE)

    def _value(self, mix: Coefficients, measured: Measured, kept: float | None) -> Value:
        asked = [self.prompts[at] for at in measured.prompts]
        exchanges = list(map(Exchange, asked, measured.answers))
        failed = [""] * len(exchanges)
        if self.learnt_from is not None:
            told = measured.coherence, measured.relevance
            failed = failures(exchanges, self.learnt_from, *told)
        fits = list(map(counted, measured.scores, failed))
        scored = [each for each in fits if each is not None]
        coverage = len(scored) / len(fits)
        details: dict[str, Any] = {
            "fit": fmean(scored) if scored else None,
            "coverage": coverage,
            "prompts": measured.prompts,
            "scores": measured.scores,
            "failed": failed,
            "answers": measured.answers,
        }
        if not scored or coverage < self.options.min_coverage:
            return Value(None, details)
        penalty = self.options.penalty * math.fsum(x * x for x in mix.values)
        value = fmean(scored) - penalty
        if measured.parts:
            by = {name: [each[name] for each in measured.parts] for name in measured.parts[0]}
            if not all(any(each is not None for each in own) for own in by.values()):
                return Value(None, details)
            details[PARTS] = {name: mean_of(own) - penalty for name, own in by.items()}
        if self.options.min_coherence is not None:
            details["coherence"] = mean_of(measured.coherence)
        if self.options.min_relevance is not None:
            details["relevance"] = mean_of(measured.relevance)
        if self.options.max_kl is not None:
            details["kl"] = mean_of(measured.kl)
        if kept is not None:
            details["choice"] = kept
        limited = (details.get(name) for name in ("coherence", "relevance", "kl", "choice"))
        return Value(value, details, self.options.violation(*limited))


@dataclass(frozen=True)
class Measured:
    """The answers of one candidate to some prompts, with their scores."""

    prompts: list[int]
    answers: list[str]
    scores: list[float | None]
    coherence: list[float | None]
    relevance: list[float | None]
    kl: list[float]  # of every token of all answers
    parts: list[dict[str, float | None]]  # of every answer, where there are several objectives

    def __add__(self, other: Measured) -> Measured:
        return Measured(*map(operator.add, vars(self).values(), vars(other).values()))


def mean_of(values: Sequence[float | None]) -> float:
    """Return the mean of what is known, 0 where nothing is."""
    return fmean([value for value in values if value is not None] or [0.0])


def _ranked(values: Sequence[Value], out: Sequence[int]) -> list[Value]:
    """Put candidates that left a race below all that finished it, in the order they left it.

    Survivors are compared over the same prompts; a partial mean is no match for a whole one.
    """
    whole = [each for at, each in enumerate(values) if at not in out and each.value is not None]
    worst = min(whole, key=lambda each: each.standing, default=None)
    ranked = list(values)
    for place, at in enumerate(out, start=1):
        left = replace(values[at], details={**values[at].details, "raced_out": True})
        if left.value is not None and worst is not None and worst.value is not None:
            below = min(left.value, worst.value - 1e-6 * place)
            left = replace(left, value=below, violation=max(left.violation, worst.violation))
        ranked[at] = left
    return ranked
