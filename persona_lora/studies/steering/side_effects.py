"""What else does steering change? Other traits, refusals, the turns of a conversation, capability.

Every method at the highest level of a comparison, where all have the same divergence, beside the
unsteered model and the system prompt of the trait that is steered. Knows what is asked and how it
is scored; refuses to know what the scores amount to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from persona_lora.core.chat import COHERENCE, UNSTEERED, Answer, Condition, Conversation
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError, checked_text
from persona_lora.core.files import numbered_jsonl
from persona_lora.core.options import GenerationOptions, TaskOptions
from persona_lora.core.resources import resource_path
from persona_lora.core.runs import Output, Run
from persona_lora.core.traits import Trait, trait_prompt
from persona_lora.judges.judging import Judge
from persona_lora.judges.rules import rule_score
from persona_lora.judges.verdicts import judge_answers, lazily
from persona_lora.models.loading import ChatModel
from persona_lora.report.comparisons import write_found
from persona_lora.report.scores import SECOND, grouped, method_of
from persona_lora.report.trust import OF
from persona_lora.steering.bank import Bank
from persona_lora.steering.steerer import Unsteered
from persona_lora.studies.asking.capability import check_tasks, run_benchmarks
from persona_lora.studies.asking.run import answer_rows, continued, open_run, plan_rows
from persona_lora.studies.steering.calibration import highest_level
from persona_lora.studies.steering.figure_side_effects import render_side_effects
from persona_lora.studies.steering.read_side_effects import (
    CAPABILITY,
    COLUMNS,
    OTHER,
    OWN,
    REFUSAL,
    SCORES,
    TURNS,
    Change,
    gap_by_turn,
    read_side_effects,
)
from persona_lora.studies.steering.run import levels_of

PARTS = (REFUSAL, TURNS, CAPABILITY)
NUMBER_OF_TURNS = 10
KINDS = ("harmless", "decline")
JUDGED_BY = {"first": "verdicts", "second": SECOND}
SCORED = ("kind", "asked", "criterion", "judge", "method", "unit", "turn", "score", "by")
OF_JUDGES = ("validation", "second_validation", "canaries", "second_canaries")
Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Watched:
    """What is looked at: other ``traits``, and further ``parts``, of ``PARTS``.

    ``max_questions`` takes the first so many of each trait's questions, of either kind of prompts
    that are refused or not, and of conversations; ``tasks`` are those of capability.
    """

    traits: tuple[Trait, ...]
    parts: tuple[str, ...] = ()
    max_questions: int | None = None
    tasks: TaskOptions = field(default_factory=TaskOptions)

    def check(self, steered: Trait) -> None:
        """Raise UserError now for what could not be measured after everything else was."""
        if CAPABILITY in self.parts:
            check_tasks(self.tasks)
        if REFUSAL in self.parts:
            load_refusal_prompts(self.tasks.datasets_dir)
        held_out = len(steered.questions["eval"])
        if TURNS in self.parts and held_out < NUMBER_OF_TURNS:
            raise UserError(
                f"{TURNS} need {NUMBER_OF_TURNS} held-out questions, and {steered.name} has "
                f"{held_out}; leave {TURNS} out"
            )


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
        own = [each.condition for each in highest_level(levels)]
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

    @property
    def once(self) -> tuple[Condition, ...]:
        """The conditions, of several random controls the first."""
        return tuple(each for each in self.conditions if each.method == method_of(each.method))

    def answer(
        self,
        questions: Sequence[str],
        part: Run,
        conditions: Sequence[Condition] = (),
        before: Sequence[Conversation] = (),
    ) -> list[Answer]:
        """Answer questions under all conditions, or those given, after what was said before."""
        asked = replace(self.trait, questions={"eval": tuple(questions)})
        plan = plan_rows(asked, "eval", conditions or self.conditions, samples=1)
        if before:
            plan = [replace(row, before=tuple(b)) for row, b in zip(plan, before, strict=True)]
        mixes = [row.condition.coefficients for row in plan]
        steerer = self.bank.answering(self.chat_model, mixes)
        return answer_rows(self.chat_model, plan, steerer, part, self.options)

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
        found, parts = [*_own(steered, compared)], dict[str, list[Run]]()
        for other in watched.traits:
            at = output.at(run.folder / other.label)
            part = _ask(steered, other, watched.max_questions, judges[other.label], at)
            for criterion in (other.name, COHERENCE):
                found += _scores(steered, part, OTHER, other.label, criterion)
            parts.setdefault(other.name, []).append(part)
        run.write(SCORES, found)
        if REFUSAL in watched.parts:
            found += _refusals(steered, watched, output.at(run.folder / REFUSAL))
        if TURNS in watched.parts:
            at, judge = output.at(run.folder / TURNS), lazily(judges[trait.label])
            found += _converse(steered, watched.max_questions, judge, at)
        run.write(SCORES, found)
        parts.setdefault(trait.name, []).extend([*_turns(run), *_splits(compared)])
        _keep_fitness(run, parts)
        if CAPABILITY in watched.parts:
            _measure_capability(steered, watched.tasks, output.at(run.folder / CAPABILITY))
        changes = read_side_effects(run)
        write_found(run.folder / "changes.csv", COLUMNS, changes)
        picture = render_side_effects(trait.name, changes, gap_by_turn(run, trait.name))
        picture.save(run.folder / "side_effects.png")
    return changes


def _own(steered: _Steered, compared: Run) -> Rows:
    """Yield the scores of the steered trait, which the comparison holds."""
    for part in _splits(compared):
        yield from _scores(steered, part, OWN, part.folder.name, steered.trait.name)


def _splits(compared: Run) -> list[Run]:
    return [Run(compared.folder / row["split"]) for row in compared.read("splits")]


def _turns(run: Run) -> list[Run]:
    return [Run(at.parent) for at in sorted((run.folder / TURNS).glob("*/run.json"))]


def _keep_fitness(run: Run, parts: Mapping[str, Sequence[Run]]) -> None:
    """Keep beside the scores how fit their judges are: what all parts, by trait, say of their own.

    A row on coherence says ``of`` which trait's answers it is, where traits would look alike.
    """
    for name in OF_JUDGES:
        kept = [
            {**row, OF: trait} if row["criterion"] == COHERENCE else row
            for trait, own in parts.items()
            for part in own
            for row in part.read(name)
        ]
        run.write(name, {str(row): row for row in kept}.values())


def _ask(
    steered: _Steered, other: Trait, most: int | None, judge: Callable[[], Judge], output: Output
) -> Run:
    """Ask another trait's questions under all that steers, and judge that trait."""
    of = {"other": other.label, "max_questions": most}
    with steered.open(output, "side-effects on", other.inputs(), **of) as part:
        steered.answer(other.questions["eval"][:most], part)
        judge_answers(part, judge, other)
    return part


def _refusals(steered: _Steered, watched: Watched, output: Output) -> Rows:
    """Ask prompts that should be answered and ones that should not; yield which are refused."""
    rows, most = load_refusal_prompts(watched.tasks.datasets_dir), watched.max_questions
    asked = [each for own in grouped(rows, lambda row: row["kind"]).values() for each in own[:most]]
    read = {"the prompts to refuse or not": digest_of(asked)}
    with steered.open(output, "side-effects on", read, other=REFUSAL) as part:
        for each in steered.answer([row["prompt"] for row in asked], part):
            kind = asked[each.question_id]["kind"]
            score = rule_score(REFUSAL, each.answer, finished=each.finished)
            place = (REFUSAL, kind, REFUSAL, "first", each.method, each.question_id, 1, score, "")
            yield dict(zip(SCORED, place, strict=True))


def load_refusal_prompts(datasets: Path | None = None) -> list[dict[str, Any]]:
    """Load prompts that are ``harmless`` or to ``decline``; UserError for another kind."""
    name = Path("refusal") / "prompts.jsonl"
    path = resource_path("datasets" / name) if datasets is None else datasets / name
    rows = numbered_jsonl(path)
    for where, row in rows:
        checked_text(row.get("prompt"), f"{where}: prompt")
        if row.get("kind") not in KINDS:
            raise UserError(f"{where} needs a kind: {' or '.join(KINDS)}")
    return [row for _, row in rows]


def _converse(
    steered: _Steered, most: int | None, judge: Callable[[], Judge], output: Output
) -> Rows:
    """Lead conversations on the trait's own questions; yield the scores of every turn.

    Conversation i asks question i + k at turn k, so that of as many conversations as turns every
    turn asks the same questions. Everybody hears what they have answered themselves before.
    """
    questions, trait = steered.trait.questions["eval"][:NUMBER_OF_TURNS], steered.trait
    conversations = len(questions[:most]) * len(steered.once)
    told: list[Conversation] = [[] for _ in range(conversations)]
    for turn in range(NUMBER_OF_TURNS):
        asked = [*questions[turn:], *questions[:turn]][:most]
        read = {"the earlier turns": digest_of(told)}
        at = output.at(output.path / f"turn_{turn + 1:02}")
        with steered.open(at, "side-effects on", read, other=TURNS, questions=asked) as part:
            answers = steered.answer(asked, part, steered.once, told)
            judge_answers(part, judge, trait)
        pairs = zip(told, answers, strict=True)
        told = [continued(before, each.question, each.answer) for before, each in pairs]
        for criterion in (trait.name, COHERENCE):
            yield from _scores(steered, part, TURNS, TURNS, criterion, turn + 1)


def _scores(
    steered: _Steered, part: Run, kind: str, asked: str, criterion: str, turn: int = 1
) -> Rows:
    """Yield the score of every answer at the level, by each judge."""
    answers, places = part.read("answers"), steered.places
    for judge, file in JUDGED_BY.items():
        found = {row["row"]: row for row in part.read(file) if row["criterion"] == criterion}
        for row in answers:
            method = row["method"]
            if method in places and row["coefficient"] == places[method] and row["row"] in found:
                place = (kind, asked, criterion, judge, method, row["question_id"], turn)
                verdict = found[row["row"]]
                yield dict(zip(SCORED, (*place, verdict["score"], verdict["judge"]), strict=True))


def _measure_capability(steered: _Steered, tasks: TaskOptions, output: Output) -> None:
    """Run the tasks under every method, of several random controls the first.

    Vectors act on all tokens there: the harness knows no responses.
    """
    bank, model = replace(steered.bank, positions="all"), steered.chat_model
    conditions = {
        each.method: bank.steerer(model, [each.coefficients]) if each.coefficient else Unsteered()
        for each in steered.once
    }
    prompt = steered.once[-1].method
    told = trait_prompt(steered.trait, "pos" if prompt == "prompt_pos" else "neg", 0)
    run_benchmarks(model, conditions, tasks, output, system_prompts={prompt: told})
