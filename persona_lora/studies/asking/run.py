"""With this steerer: ask the trait's questions, judge the answers, write the rows.

The sweep and every later experiment plan their rows and answer them through this module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from persona_lora.core import progress
from persona_lora.core.chat import (
    COHERENCE,
    UNSTEERED,
    Answer,
    Condition,
    Conversation,
    Message,
    user_question,
)
from persona_lora.core.content import digest_of, numbered
from persona_lora.core.errors import UserError
from persona_lora.core.files import ensure_writable_folder, write_csv
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.options import SAMPLES_PER_QUESTION, GenerationOptions
from persona_lora.core.protocol import Design
from persona_lora.core.runs import Output, Planned, Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.traits import (
    NEUTRAL_INPUTS,
    Sign,
    Split,
    Trait,
    neutral_prompt,
    trait_prompt,
)
from persona_lora.judges.judging import Judge
from persona_lora.judges.verdicts import judge_answers
from persona_lora.models.generation import Generated, RowPlan
from persona_lora.models.loading import ChatModel
from persona_lora.report import wording
from persona_lora.report.correction import OF_OTHERS
from persona_lora.report.resampling import SCORES, Interval, bootstrap_mean
from persona_lora.report.scores import (
    SECOND,
    answers_columns,
    answers_table,
    clusters,
    judges_of,
    score_answers,
)
from persona_lora.report.sections import Table
from persona_lora.report.two_judges import TwoJudges, agreement_line, two_judges
from persona_lora.steering.bank import METHODS, NO_ENGINE, ActivationSetting, Elsewhere
from persona_lora.steering.steerer import Steerer, Unsteered

T = TypeVar("T")
C_co = TypeVar("C_co", bound=Hashable, covariant=True)


@dataclass(frozen=True)
class Row(Generic[C_co]):
    """One answer to be generated: to a question, under a condition and a system prompt.

    ``before`` are turns that stand between system prompt and question.
    Rows of equal conditions share the computation of what their prompts begin with; rows of one
    ``stream`` share their random numbers.
    """

    question: str
    condition: C_co
    system_prompt: str | None = None
    stream: int = 0
    before: tuple[Message, ...] = ()

    @property
    def conversation(self) -> Conversation:
        """What is asked: system prompt, earlier turns and question."""
        return user_question(self.question, self.system_prompt, self.before)


@dataclass(frozen=True)
class Evaluation:
    """The scores of one condition: mean, 95% interval over questions, n and coverage."""

    trait: Interval
    coherence: Interval
    answers: Path
    run: Path
    judges: TwoJudges | None = None

    def table(self, trait: str) -> Table:
        """Return both scores, and the trait's by the second judge."""
        scores = {trait: self.trait, "coherence": self.coherence}
        if self.judges is not None:
            scores[f"{trait}, by {self.judges.second}"] = self.judges.means[0].second
        rows = ([name, *wording.scored(each)] for name, each in scores.items())
        return Table.of("criterion | mean | 95% interval | questions | scored", rows)

    def lines(self, trait: str) -> tuple[str, str]:
        """Say how the judges agree, and where the files are."""
        said = agreement_line(self.judges, judges_of(Run(self.run).read("verdicts"), trait))
        return said, f"answers: {self.answers}\nrun:     {self.run}"


def open_planned(
    output: Output | Path, planned: Planned, chat_model: ChatModel, parts: Sequence[str] = ()
) -> Run:
    """Open a planned run on its model, which it records."""
    return Run.open(
        output,
        command=planned.command,
        config={**chat_model.record(), **planned.config},
        seed=planned.seed,
        inputs={**chat_model.inputs(), **planned.inputs},
        parts=parts,
        design=planned.design,
    )


def open_run(
    output: Output | Path,
    command: str,
    chat_model: ChatModel,
    config: Mapping[str, Any],
    *read: Mapping[str, str],
    seed: int = 0,
    parts: Sequence[str] = (),
) -> Run:
    """Open the run of a command on a model; ``read`` are digests of what else it reads."""
    inputs = {name: each for digests in read for name, each in digests.items()}
    return open_planned(output, Planned(command, config, seed, inputs), chat_model, parts)


def contents_of(
    kind: str, directions: Mapping[str, LoRADiff] | Mapping[str, SteeringVector]
) -> dict[str, str]:
    """Return digests of directions, for a run that reads them by name."""
    return {f"the {kind} {name}": each.content() for name, each in directions.items()}


def plan_rows(
    trait: Trait,
    split: Split,
    conditions: Sequence[Condition],
    *,
    samples: int,
    max_questions: int | None = None,
) -> list[Row[Condition]]:
    """Return the questions of the split under every condition, ``samples`` times.

    ``max_questions`` takes the first so many of them.
    """
    if max_questions is not None and max_questions < 1:
        raise UserError(f"max_questions must be at least 1, got {max_questions}")
    questions = trait.questions[split][:max_questions]
    if not questions:
        raise UserError(f"the trait {trait.name} has no {split} questions")
    return [
        Row(question, condition, _system_prompt(trait, condition, at), stream_of(at, sample))
        for condition in conditions
        for at, question in enumerate(questions)
        for sample in range(samples)
    ]


def asked_of(
    trait: Trait,
    splits: Iterable[Split],
    conditions: Sequence[Condition] = (UNSTEERED,),
    most: int | None = None,
) -> list[Conversation]:
    """Return all that is asked of a trait, once, whatever steers; ``most`` questions of a split.

    UserError where there are no questions, or no system prompts to ask under.
    """
    return [
        row.conversation
        for split in splits
        for row in plan_rows(trait, split, conditions, samples=1, max_questions=most)
    ]


def continued(before: Conversation, question: str, answer: str) -> Conversation:
    """Return a conversation with a further question and the answer to it."""
    return [*user_question(question, before=before), {"role": "assistant", "content": answer}]


def stream_of(question_id: int, sample: int) -> int:
    """Return the random stream of a question's sample: the same under every condition."""
    return question_id * SAMPLES_PER_QUESTION + sample


def generate_rows(
    chat_model: ChatModel,
    plan: Sequence[Row[Any]],
    steerer: Steerer,
    options: GenerationOptions,
    *,
    numbers: Sequence[int] | None = None,
    on_batch: Callable[[Sequence[int], Sequence[Generated]], None] | None = None,
) -> list[Generated]:
    """Answer rows of the plan inside a steerer that has the same rows.

    ``numbers`` are those that are asked for, in order; all by default. ``on_batch`` is told the
    numbers and answers of each batch.
    """
    numbers = range(len(plan)) if numbers is None else numbers
    rows = [plan[number] for number in numbers]
    if not rows:
        return []

    def told(batch: Sequence[int], generated: Sequence[Generated]) -> None:
        if on_batch is not None:
            on_batch([numbers[place] for place in batch], generated)

    shared = RowPlan(
        streams=[row.stream for row in rows], alike=[row.condition for row in rows], on_batch=told
    )
    with steerer:
        return steerer.answers(
            chat_model, [row.conversation for row in rows], numbers, options, shared
        )


def answer_rows(
    chat_model: ChatModel,
    plan: Sequence[Row[Condition]],
    steerer: Steerer,
    run: Run,
    options: GenerationOptions,
) -> list[Answer]:
    """Answer the planned rows inside the steerer and write them to the run, batch by batch.

    Rows that an interrupted run has answered are kept.
    """
    answered = {row["row"]: Answer(**row) for row in run.resume_rows("answers")}
    pending = [number for number in range(len(plan)) if number not in answered]

    def keep(numbers: Sequence[int], generated: Sequence[Generated]) -> None:
        pairs = zip(numbers, generated, strict=True)
        answers = {number: _answer(number, plan[number], each) for number, each in pairs}
        run.append("answers", map(dataclasses.asdict, answers.values()))
        answered.update(answers)

    with progress.stage("answering"):
        generate_rows(chat_model, plan, steerer, options, numbers=pending, on_batch=keep)
    ordered = [answered[number] for number in range(len(plan))]
    run.write("answers", map(dataclasses.asdict, ordered))
    return ordered


@dataclass(frozen=True, eq=False)
class Steering:
    """How a model is steered while it answers: by diffs or by vectors, or told to by a prompt.

    ``terms`` are diffs with coefficients, held "live" or "merged"; ``activation`` steers hidden
    states instead; ``system_prompt`` is "pos", "neg" (the trait's own), "neutral" or a text. Where
    ``elsewhere`` is set, it answers in place of the model in this process.
    """

    terms: Mapping[LoRADiff, float] = field(default_factory=dict)
    mode: str = "live"
    activation: ActivationSetting | None = None
    system_prompt: str | None = None
    elsewhere: Elsewhere | None = None

    @property
    def vectors(self) -> Mapping[SteeringVector, float]:
        """The vectors with their coefficients."""
        return {} if self.activation is None else self.activation.vectors

    @property
    def directions(self) -> list[LoRADiff | SteeringVector]:
        """The diffs, the vectors, and the condition of these."""
        condition = None if self.activation is None else self.activation.condition
        return [*self.terms, *self.vectors, *([] if condition is None else [condition])]

    @property
    def coefficients(self) -> list[float]:
        """The coefficient of each of the directions."""
        return [*self.terms.values(), *self.vectors.values()]

    def condition(self) -> Condition:
        """Return the condition that rows are of; UserError for diffs and vectors at once."""
        activation, system_prompt = self.activation, self.system_prompt
        if self.terms and activation is not None:
            raise UserError("a diff and a steering vector do not steer at once; choose one of them")
        if self.terms:
            return Condition("lora", _only(self.terms.values()), system_prompt=system_prompt)
        if activation is not None:
            layer, value = _only(activation.layers or ()), _only(activation.vectors.values())
            if activation.ablate or activation.bounded:
                name = "ablation" if activation.ablate else "bounded"
                return Condition(name, None, layer, system_prompt)
            return Condition("activation", value, layer, system_prompt)
        if system_prompt in ("pos", "neg", "neutral"):
            return Condition(f"prompt_{system_prompt}")
        if system_prompt is None:
            return UNSTEERED
        return Condition("prompt", system_prompt=system_prompt)

    def steerer(self, chat_model: ChatModel) -> Steerer:
        """Return the context manager that steers the model so; UserError for an unknown mode."""
        if self.elsewhere is not None:
            if self.activation is not None or self.mode != "live":
                raise UserError(NO_ENGINE)
            return self.elsewhere.steerer([self.terms])
        if self.activation is not None:
            return self.activation.steerer(chat_model)
        if self.mode not in METHODS:
            raise UserError(f"mode must be one of {', '.join(METHODS)}, got {self.mode!r}")
        return METHODS[self.mode](chat_model, self.terms) if self.terms else Unsteered()

    def inputs(self) -> dict[str, str]:
        """Return digests of the diffs and of the vectors."""
        condition = None if self.activation is None else self.activation.condition
        return {
            **({} if condition is None else {"the condition": condition.content()}),
            **(
                next(iter(self.terms)).inputs("the diff")
                if len(self.terms) == 1
                else numbered("diff", [diff.content() for diff in self.terms])
            ),
            **numbered("vector", [each.content() for each in self.vectors]),
        }


def evaluate(
    chat_model: ChatModel,
    trait: Trait,
    judge: Callable[[], Judge],
    output: Output | Path,
    *,
    steering: Steering = Steering(),
    split: Split = "eval",
    options: GenerationOptions = GenerationOptions(),
    before: Sequence[Conversation] = (),
) -> Evaluation:
    """Ask, answer, judge; write ``output`` (CSV) and a run folder of the same name beside it.

    ``before`` are the turns before each question. ``judge`` builds the judge once answers are
    there; it is called outside the steerer, so that a judge may ask the unsteered model.
    """
    output = Output.of(output)
    path = check_csv(output.path)
    planned = planned_evaluation(trait, steering, split, options, output.seeds, before)
    plan = plan_rows(trait, split, [steering.condition()], samples=options.samples)
    if before:
        plan = [
            dataclasses.replace(row, before=tuple(before[row.stream // SAMPLES_PER_QUESTION]))
            for row in plan
        ]
    steerer = steering.steerer(chat_model)
    ensure_writable_folder(path.parent)
    run = open_planned(output.at(path.with_suffix("")), planned, chat_model)
    with run:
        answer_rows(chat_model, plan, steerer, run, options)
        judge_answers(run, judge, trait)
        write_scores(path, trait.name, {"": run})
    scored = score_answers(run.read("answers"), run.read("verdicts"), trait.name)
    trait_score, coherence = (
        bootstrap_mean(clusters(scored, each), scale=SCORES) for each in (trait.name, COHERENCE)
    )
    both = two_judges(run, trait.name)
    return Evaluation(trait_score, coherence, answers=path, run=run.folder, judges=both)


def planned_evaluation(
    trait: Trait,
    steering: Steering,
    split: Split,
    options: GenerationOptions,
    seeds: int = 1,
    before: Sequence[Conversation] = (),
) -> Planned:
    """Return what is known of an evaluation before its model is loaded."""
    config = {
        "trait": trait.name,
        "split": split,
        "mode": steering.mode if steering.terms else None,
        "condition": dataclasses.asdict(steering.condition()),
        "generation": dataclasses.asdict(options),
        **directions_of_others(trait, [*steering.terms, *steering.vectors]),
    }
    earlier = {"the earlier turns": digest_of(list(before))} if before else {}
    neutral = NEUTRAL_INPUTS if steering.system_prompt == "neutral" else {}
    inputs = {**trait.inputs(), **steering.inputs(), **earlier, **neutral}
    design = Design.of("evaluate", {split: len(trait.questions[split])}, (), seeds)
    return Planned("evaluate", config, options.seed, inputs, design)


def directions_of_others(
    trait: Trait, directions: Iterable[LoRADiff | SteeringVector]
) -> dict[str, list[str]]:
    """Return what a run keeps of directions that are known to be of another trait than is judged.

    How its judge misses ratings was measured under the trait's own.
    """
    others = sorted({each.trait for each in directions if each.trait} - {trait.name})
    return {OF_OTHERS: others} if others else {}


def check_csv(path: Path) -> Path:
    """Return the path of a CSV; UserError where its name is of anything else."""
    if path.suffix != ".csv":
        raise UserError(f"output must end in .csv, got {path}")
    return path


def write_scores(path: Path, trait: str, runs: Mapping[str, Run]) -> None:
    """Write every answer with its scores as CSV; of the runs of several seeds with their names."""
    second = {name: run.read(SECOND) for name, run in runs.items()}
    rows = [
        {"seed": name, **row}
        for name, run in runs.items()
        for row in answers_table(run.read("answers"), run.read("verdicts"), trait, second[name])
    ]
    columns = answers_columns(trait, sweep=False, second=any(second.values()))
    write_csv(path, columns if "" in runs else ["seed", *columns], rows)


def _only(values: Collection[T]) -> T | None:
    """Return the one value there is, or None where there are several."""
    return next(iter(values)) if len(values) == 1 else None


def _system_prompt(trait: Trait, condition: Condition, question_id: int) -> str | None:
    wanted = condition.system_prompt or condition.method.removeprefix("prompt_")
    signs: dict[str, Sign] = {"pos": "pos", "neg": "neg"}
    if wanted in signs:
        return trait_prompt(trait, signs[wanted], question_id)
    if wanted == "neutral":
        return neutral_prompt(question_id)
    return condition.system_prompt


def _answer(number: int, row: Row[Condition], generated: Generated) -> Answer:
    question_id, sample = divmod(row.stream, SAMPLES_PER_QUESTION)
    return Answer(
        row=number,
        question_id=question_id,
        question=row.question,
        sample=sample,
        method=row.condition.method,
        coefficient=row.condition.coefficient,
        layer=row.condition.layer,
        system_prompt=row.system_prompt,
        prompt=generated.prompt,
        answer=generated.text,
        num_tokens=generated.num_tokens,
        finished=generated.finished,
    )
