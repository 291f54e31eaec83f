"""What a search may seek instead of a person's voice: scores of traits, or any function of answers.

A goal is a judge whose score is the value of an answer, higher is better: minus its mean distance
from the scores that are wanted (``Targets``), or what a function of the user's says (``Scorer``).
``GoalProblem`` is what a search needs of it, as ``PersonaProblem`` of a person.
"""

from __future__ import annotations

import hashlib
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import zip_longest
from numbers import Real
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from persona_lora.core.chat import Exchange, Verdict
from persona_lora.core.errors import UserError
from persona_lora.core.options import SearchOptions
from persona_lora.core.personas import Coefficients, PersonaPrompts
from persona_lora.core.traits import Trait
from persona_lora.judges.budget import reasons
from persona_lora.judges.canaries import show_canaries
from persona_lora.judges.coherence import CoherenceScorer
from persona_lora.judges.judging import Judge
from persona_lora.judges.verdicts import fitness_on
from persona_lora.models.loading import ChatModel
from persona_lora.models.processes import Processes
from persona_lora.report.resampling import Bounds
from persona_lora.studies.asking.run import GenerationOptions
from persona_lora.studies.personas.objective import Parts, Relevance
from persona_lora.studies.personas.read_goals import DISTANCE, RANDOM_MIX

VALUE = "value"  # the criterion of a goal's verdicts


class Valued(NamedTuple):
    """The value of an answer, None without one, and the scores that it is made of, by trait."""

    verdict: Verdict
    parts: dict[str, float | None]


@dataclass(frozen=True, eq=False)
class Targets:
    """Scores of traits (0–100) that answers are to have, and who scores each trait.

    The value of an answer is −mean |score − target| over its traits, from −100 to 0; None where one
    of them could not be scored. ``asked`` are the questions of each trait, on which alone it is
    scored; a question of none is scored on all. ``pareto``: each target is an objective of its own.
    ``traits`` have the labels that tell how fit their judges are.
    """

    wanted: Mapping[str, float]
    judges: Mapping[str, Judge]
    asked: Mapping[str, frozenset[str]]
    pareto: bool = False
    traits: tuple[Trait, ...] = ()
    _known: dict[Exchange, Valued] = field(default_factory=dict, init=False, repr=False)

    scale = DISTANCE

    @property
    def name(self) -> str:
        """Who scores, as "reader"."""
        return ",".join(dict.fromkeys(each.name for each in self.judges.values()))

    def record(self) -> dict[str, Any]:
        """Return what a run's configuration keeps of the goal."""
        return {"targets": dict(self.wanted), **({"pareto": True} if self.pareto else {})}

    def parts(self, exchanges: Sequence[Exchange]) -> list[dict[str, float | None]]:
        """Return minus the distance of each answer from each target; None where not scored."""
        self.valued([each for each in dict.fromkeys(exchanges) if each not in self._known])
        return [
            {
                trait: None if (score := scores.get(trait)) is None else -abs(score - target)
                for trait, target in sorted(self.wanted.items())
            }
            for scores in (self._known[each].parts for each in exchanges)
        ]

    def fitness(self, model: str) -> dict[str, list[dict[str, Any]]]:
        """Return what each judge makes of nonsense, and how fit it is on a model: rows by file."""
        judged = [(self.judges[trait.name], trait) for trait in self.traits]
        canaries = [each for own in judged for each in show_canaries(*own, [own[1].name])]
        validation = [fitness_on(*own, model) for own in judged]
        return {"canaries": [*map(asdict, canaries)], "validation": [*map(asdict, validation)]}

    def valued(self, exchanges: Sequence[Exchange]) -> list[Valued]:
        """Return the value of each answer, and its score by trait."""
        found: list[dict[str, Verdict]] = [{} for _ in exchanges]
        for trait, judge in self.judges.items():
            own = [at for at, each in enumerate(exchanges) if self._scored_on(each, trait)]
            verdicts = judge.judge([exchanges[at] for at in own], trait) if own else []
            for at, verdict in zip(own, verdicts, strict=True):
                found[at][trait] = verdict
        valued = [
            Valued(self._verdict(each), {trait: told.score for trait, told in each.items()})
            for each in found
        ]
        if self.pareto:
            self._known.update(zip(exchanges, valued, strict=True))
        return valued

    def _scored_on(self, exchange: Exchange, trait: str) -> bool:
        owners = [name for name, own in self.asked.items() if exchange.question in own]
        return trait in owners or not owners

    def judge(self, exchanges: Sequence[Exchange], criterion: str) -> list[Verdict]:
        """Return the value of each answer."""
        return [each.verdict for each in self.valued(exchanges)]

    def _verdict(self, verdicts: Mapping[str, Verdict]) -> Verdict:
        away, missing = [], []
        for trait, each in sorted(verdicts.items()):
            if each.score is None:
                missing.append(f"no score of {trait}: {each.reason}")
            else:
                away.append(abs(each.score - self.wanted[trait]))
        if missing:
            return Verdict(VALUE, None, "; ".join(missing), self.name)
        return Verdict(VALUE, -fmean(away), "", self.name)


def checked_targets(wanted: Mapping[str, float]) -> dict[str, float]:
    """Return targets sorted by trait; UserError for one that is no score."""
    for trait, target in wanted.items():
        if not 0 <= target <= 100:
            raise UserError(f"the target of {trait} must be a score from 0 to 100, got {target:g}")
    return dict(sorted(wanted.items()))


def questions_of(trait: Trait) -> frozenset[str]:
    """Return the questions on which a trait is scored."""
    return frozenset((*trait.questions["extract"], *trait.questions["eval"]))


def prompts_of(traits: Sequence[Trait]) -> PersonaPrompts:
    """Return the traits' questions, in turn: the training ones to search on, the others held out.

    UserError for a trait without questions of either kind.
    """
    parts = []
    for split in ("extract", "eval"):
        for trait in traits:
            if not trait.questions[split]:
                raise UserError(
                    f"the trait {trait.name} has no {split} questions; give --prompts, a file of "
                    "train and held_out prompts"
                )
        rows = zip_longest(*(trait.questions[split] for trait in traits))
        parts.append(tuple(dict.fromkeys(each for row in rows for each in row if each)))
    train, held_out = parts
    return PersonaPrompts(train, tuple(each for each in held_out if each not in train))


@dataclass(frozen=True, eq=False)
class Scorer:
    """A function of the user's, of questions and answers, that returns a number for each answer.

    Higher is better; None is an answer that has no score. It is called with any number of answers
    at a time, and must give an answer the same number whatever stands beside it. ``content`` is the
    digest of its file.
    """

    name: str
    function: Callable[[list[str], list[str]], Any]
    path: Path
    content: str

    scale = None

    @classmethod
    def load(cls, text: str) -> Scorer:
        """Load "my.py:score"; UserError for a file that cannot be run, or has no such function."""
        name, _, function = text.rpartition(":")
        path = Path(name)
        if not name or not function.isidentifier():
            raise UserError(
                f'--scorer takes a file and a function, as in "my.py:score"; got {text!r}'
            )
        if not path.is_file():
            raise UserError(f"--scorer: {path} does not exist")
        source = path.read_bytes()
        module = ModuleType(f"scorer_{path.stem}")
        module.__file__ = str(path)
        sys.modules[module.__name__] = module  # dataclasses look themselves up
        try:
            exec(compile(source, str(path), "exec"), vars(module))
        except (Exception, SystemExit) as error:
            raise UserError(f"{path} cannot be run: {_said(error, path)}") from error
        found = vars(module).get(function)
        if not callable(found):
            raise UserError(f"{path} has no function {function!r}")
        return cls(f"{path.stem}:{function}", found, path, hashlib.sha256(source).hexdigest())

    def record(self) -> dict[str, Any]:
        """Return what a run's configuration keeps of the goal."""
        return {"scorer": self.name}

    def valued(self, exchanges: Sequence[Exchange]) -> list[Valued]:
        """Return the value of each answer, which is made of nothing."""
        return [Valued(each, {}) for each in self.judge(exchanges)]

    def judge(self, exchanges: Sequence[Exchange], criterion: str = VALUE) -> list[Verdict]:
        """Return what the function says of each answer.

        UserError where it fails, or returns anything but one finite number or None for each.
        """
        answers = [each.answer for each in exchanges]
        try:
            returned = self.function([each.question for each in exchanges], list(answers))
        except Exception as error:
            raise UserError(f"{self._called}: {_said(error, self.path)}") from error
        try:
            scores = [] if isinstance(returned, str) else list(returned)
        except TypeError:
            scores = []
        if len(scores) != len(answers):
            got = f"{len(scores)} scores" if scores else ascii(returned)[:60]
            raise UserError(f"{self._called} gave {got} for {len(answers)} answers; give one each")
        return [self._verdict(*each) for each in zip(scores, answers, strict=True)]

    @property
    def _called(self) -> str:
        return f"--scorer {self.path}:{self.name.rpartition(':')[2]}"

    def _verdict(self, score: Any, answer: str) -> Verdict:
        if score is None:
            return Verdict(VALUE, None, f"{self.name} gave no score", self.name)
        if isinstance(score, Real) and math.isfinite(score):
            return Verdict(VALUE, float(score), "", self.name)
        raise UserError(
            f"{self._called} gave {ascii(score)[:60]} to the answer {answer[:60]!r}; give a finite "
            "number, or None for an answer that has no score"
        )


Goal = Targets | Scorer
"""A ``Judge`` whose scores are values of answers; ``scale`` are their ends, where known."""


def _said(error: BaseException, path: Path) -> str:
    """Return what went wrong, with the last line of the file that it went through."""
    steps = traceback.extract_tb(error.__traceback__)
    lines = [each.lineno for each in steps if each.filename == str(path)]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{where}"


def name_of_goal(wanted: Mapping[str, float], scorer: Scorer | None, pareto: bool = False) -> str:
    """Return what a search is called: "formality70_sycophancy0", or "my_score"."""
    if scorer is not None:
        return scorer.name.replace(":", "_")
    told = [f"{trait}{target:g}" for trait, target in wanted.items()]
    return "_".join([*told, "pareto"] if pareto else told)


@dataclass(frozen=True, eq=False)
class GoalProblem:
    """A goal, and what it is sought on: what a search needs of it.

    ``second`` is the same goal by judges of another kind, which report beside and search nothing;
    ``judged_by`` are digests of what judges were made from.
    """

    chat_model: ChatModel
    name: str
    goal: Goal
    prompts: PersonaPrompts
    coherence: CoherenceScorer
    relevance: Relevance
    generation: GenerationOptions
    processes: Processes
    judged_by: Mapping[str, str]
    second: Goal | None = None

    kind, controls = "goal", (RANDOM_MIX,)
    learnt_from, checks, bounds = None, (), ()

    @cached_property
    def fitness(self) -> dict[str, list[dict[str, Any]]]:
        """What a run keeps of how fit its judges are: rows by file, ``validation`` the last."""
        found: dict[str, list[dict[str, Any]]] = {}
        for file, goal in (("second_", self.second), ("", self.goal)):
            if isinstance(goal, Targets):
                rows = goal.fitness(self.chat_model.name)
                found |= {f"{file}{name}": each for name, each in rows.items()}
        return found

    @property
    def search_judge(self) -> Goal:
        """Who judges in the search."""
        return self.goal

    @property
    def scale(self) -> Bounds | None:
        """The ends of the values, where there are any."""
        return self.goal.scale

    @property
    def parts(self) -> Parts | None:
        """What gives the values of answers by objective, where several are searched at once."""
        goal = self.goal
        return goal.parts if isinstance(goal, Targets) and goal.pareto else None

    @property
    def scored(self) -> tuple[str, ...]:
        """The columns of its rows that hold judges' scores."""
        return ("score",) if self.second is None else ("score", "second")

    def inputs(self) -> dict[str, str]:
        """Return digests of the model, and of what judges."""
        return {**self.chat_model.inputs(), **self.judged_by}

    def record(self) -> dict[str, Any]:
        """Return what a run's configuration keeps of what is sought."""
        second = None if self.second is None else self.second.name
        return {"goal": self.goal.record(), "judge": self.goal.name, "second_judge": second}

    def beside(
        self, best: Coefficients, searching: SearchOptions
    ) -> dict[str, tuple[Coefficients, ...]]:
        """Return a random mix for each held-out prompt, of the same length as the best one.

        It is one that the search could have found: with its fixed weights, and inside its bound.
        """
        free = [trait not in searching.fixed for trait in best.traits]
        mixes = np.tile(best.values, (len(self.prompts.held_out), 1))
        drawn = np.random.default_rng(searching.seed).standard_normal((len(mixes), sum(free)))
        mixes[:, free] = _of_length(
            drawn, float(np.linalg.norm(mixes[0, free])), searching.bound or math.inf
        )
        return {
            RANDOM_MIX: tuple(Coefficients(best.traits, tuple(map(float, row))) for row in mixes)
        }

    def judged(self, condition: str, exchanges: Sequence[Exchange]) -> list[dict[str, Any]]:
        """Return the rows of one condition; ``second`` is the value by the second judges."""
        values = self.goal.valued(exchanges)
        second: Sequence[Valued | None] = [None] * len(exchanges)
        if self.second is not None:
            second = self.second.valued(exchanges)
        coherence = self.coherence.verdicts(exchanges, "embedding")
        measured = zip(exchanges, values, second, coherence, self.relevance(exchanges), strict=True)
        return [
            {
                "persona": self.name,
                "condition": condition,
                "prompt_id": at,
                "prompt": asked.question,
                "answer": asked.answer,
                "score": value.verdict.score,
                "parts": value.parts,
                "reason": reasons(value.verdict, None if other is None else other.verdict),
                "judge": value.verdict.judge,
                "second": None if other is None else other.verdict.score,
                "second_parts": {} if other is None else other.parts,
                "failed": "",
                "coherence": coherent.score,
                "relevance": relevant,
                "weights": None,
            }
            for at, (asked, value, other, coherent, relevant) in enumerate(measured)
        ]


def _of_length(drawn: NDArray[np.float64], length: float, bound: float) -> NDArray[np.float64]:
    """Scale rows ``[N, K]`` to a length; what would pass the bound is at it, the rest longer."""
    found = drawn * (length / np.linalg.norm(drawn, axis=1, keepdims=True))
    for _ in range(drawn.shape[1]):  # each turn puts one more at the bound, or changes nothing
        found = np.clip(found, -bound, bound)
        held = np.abs(found) >= bound
        taken, rest = (np.square(np.where(at, found, 0.0)).sum(axis=1) for at in (held, ~held))
        longer = np.sqrt(np.maximum(length**2 - taken, 0.0) / np.where(rest > 0, rest, 1.0))
        found = np.where(held, found, found * longer[:, None])
    return np.clip(found, -bound, bound)
