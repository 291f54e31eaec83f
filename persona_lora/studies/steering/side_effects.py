"""What else does steering change? Other traits on their own questions, and what the model can do.

Every method at the highest level of a comparison, where all have the same divergence, beside the
unsteered model and the system prompt of the trait that is steered. Knows what is asked and how it
is scored; refuses to know what the scores amount to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from persona_lora.core.chat import COHERENCE, UNSTEERED, Condition
from persona_lora.core.errors import UserError
from persona_lora.core.options import GenerationOptions, TaskOptions
from persona_lora.core.runs import Output, Run
from persona_lora.core.traits import Trait, trait_prompt
from persona_lora.judges.judging import Judge
from persona_lora.judges.verdicts import judge_answers
from persona_lora.models.loading import ChatModel
from persona_lora.report.comparisons import write_found
from persona_lora.report.scores import SECOND, method_of
from persona_lora.steering.bank import Bank
from persona_lora.studies.asking.capability import harness, run_benchmarks
from persona_lora.studies.asking.run import answer_rows, open_run, plan_rows
from persona_lora.studies.steering.figure_side_effects import render_side_effects
from persona_lora.studies.steering.read_side_effects import (
    CAPABILITY,
    COLUMNS,
    OTHER,
    OWN,
    SCORES,
    Change,
    read_side_effects,
)
from persona_lora.studies.steering.run import levels_of

PARTS = (CAPABILITY,)
JUDGED_BY = {"first": "verdicts", "second": SECOND}
Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Watched:
    """What is looked at: other ``traits``, and further ``parts``, of ``PARTS``.

    ``max_questions`` takes the first so many of each trait's questions; ``tasks`` are those of
    capability.
    """

    traits: tuple[Trait, ...]
    parts: tuple[str, ...] = ()
    max_questions: int | None = None
    tasks: TaskOptions = field(default_factory=TaskOptions)

    def __post_init__(self) -> None:
        if CAPABILITY in self.parts:
            harness()  # now, and not after everything else was measured


@dataclass(frozen=True, eq=False)
class _Steered:
    """A model with all its ways of being steered, at the highest level of a comparison.

    ``trait`` is what is steered, ``conditions`` the unsteered model, every method, and the trait's
    own system prompt of the sign that is asked for.
    """

    chat_model: ChatModel
    trait: Trait
    bank: Bank
    conditions: tuple[Condition, ...]
    options: GenerationOptions

    @classmethod
    def of(
        cls,
        chat_model: ChatModel,
        trait: Trait,
        bank: Bank,
        compared: Run,
        options: GenerationOptions,
    ) -> _Steered:
        levels = levels_of(compared.folder)
        if not levels:
            raise UserError(f"{compared.folder} holds no levels; run compare to its end first")
        top = max(each.level for each in levels)
        own = [each.condition for each in levels if each.level == top]
        prompt = Condition("prompt_pos" if (own[0].coefficient or 0.0) > 0 else "prompt_neg")
        return cls(chat_model, trait, bank, (UNSTEERED, *own, prompt), options)

    @property
    def sign(self) -> float:
        """1 where more of the trait is asked for, −1 where less is."""
        return math.copysign(1.0, self.conditions[1].coefficient or 0.0)

    @property
    def places(self) -> dict[str, float | None]:
        """The coefficient of every condition by its method."""
        return {each.method: each.coefficient for each in self.conditions}

    def open(self, output: Output, command: str, *read: Mapping[str, str], **config: Any) -> Run:
        """Open a run on what is steered, at its level."""
        config = {
            "trait": self.trait.name,
            "level": self.places,
            **self.bank.record,
            "generation": dataclasses.asdict(self.options),
            **config,
        }
        read = (self.trait.inputs(), self.bank.inputs, *read)
        return open_run(output, command, self.chat_model, config, *read, seed=self.options.seed)


def run_side_effects(
    chat_model: ChatModel,
    trait: Trait,
    bank: Bank,
    compared: Run,
    watched: Watched,
    judges: Mapping[str, Callable[[], Judge]],
    output: Output | Path,
    *,
    options: GenerationOptions = GenerationOptions(),
) -> list[Change]:
    """Measure what the methods of a finished comparison change besides its trait.

    All at the comparison's highest level, on the bank that it was made with; ``judges`` are by the
    name of what they judge. Writes a run folder
    for every other trait, ``scores`` (a row an answer), ``changes.csv`` and ``side_effects.png``
    into the run ``output``; what is there is kept.
    """
    steered, output = _Steered.of(chat_model, trait, bank, compared, options), Output.of(output)
    with steered.open(output, "side-effects", sign=steered.sign) as run:
        found = [*_own(steered, compared)]
        validation = []
        for other in watched.traits:
            at = output.at(run.folder / other.label)
            part = _ask(steered, other, watched.max_questions, judges[other.label], at)
            for criterion in (other.name, COHERENCE):
                found += _scores(steered, part, OTHER, other.label, criterion)
            validation += [row for row in part.read("validation") if row not in validation]
        run.write(SCORES, found)
        run.write("validation", {str(row): row for row in validation}.values())
        if CAPABILITY in watched.parts:
            _measure_capability(steered, watched.tasks, output.at(run.folder / CAPABILITY))
        changes = read_side_effects(run)
        write_found(run.folder / "changes.csv", COLUMNS, changes)
        render_side_effects(trait.name, changes).save(run.folder / "side_effects.png")
    return changes


def _own(steered: _Steered, compared: Run) -> Rows:
    """Yield the scores of the steered trait, which the comparison holds."""
    for row in compared.read("splits"):
        part = Run(compared.folder / row["split"])
        yield from _scores(steered, part, OWN, row["split"], steered.trait.name)


def _ask(
    steered: _Steered, other: Trait, most: int | None, judge: Callable[[], Judge], output: Output
) -> Run:
    """Ask another trait's questions under all that steers, and judge that trait."""
    of = {"other": other.label, "max_questions": most}
    with steered.open(output, "side-effects on", other.inputs(), **of) as part:
        # The system prompts are those of the steered trait.
        asked = replace(other, instructions=steered.trait.instructions)
        plan = plan_rows(asked, "eval", steered.conditions, samples=1, max_questions=most)
        mixes = [row.condition.coefficients for row in plan]
        steerer = steered.bank.steerer(steered.chat_model, mixes)
        answer_rows(steered.chat_model, plan, steerer, part, steered.options)
        judge_answers(part, judge, other)
    return part


def _scores(steered: _Steered, part: Run, kind: str, asked: str, criterion: str) -> Rows:
    """Yield the score of every answer at the level, by each judge."""
    answers, places = part.read("answers"), steered.places
    for judge, file in JUDGED_BY.items():
        score = {
            row["row"]: row["score"] for row in part.read(file) if row["criterion"] == criterion
        }
        for row in answers:
            method = row["method"]
            if method in places and row["coefficient"] == places[method] and row["row"] in score:
                yield {
                    "kind": kind,
                    "asked": asked,
                    "criterion": criterion,
                    "judge": judge,
                    "method": method,
                    "unit": row["question_id"],
                    "score": score[row["row"]],
                }


def _measure_capability(steered: _Steered, tasks: TaskOptions, output: Output) -> None:
    """Run the tasks under every method, of several random controls the first.

    Vectors act on all tokens there: the harness knows no responses.
    """
    bank, model = replace(steered.bank, positions="all"), steered.chat_model
    once = [each for each in steered.conditions if each.method == method_of(each.method)]
    conditions = {
        each.method: bank.steerer(model, [each.coefficients]) if each.coefficient else nullcontext()
        for each in once
    }
    prompt = once[-1].method
    told = trait_prompt(steered.trait, "pos" if prompt == "prompt_pos" else "neg", 0)
    run_benchmarks(model, conditions, tasks, output, system_prompts={prompt: told})
