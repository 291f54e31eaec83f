"""What prevention buys and what it costs: finetunes of one task beside one another.

Every model is a finetune of the same base (or the base itself, or a finetune with a correction on
top), of one or several training seeds. Measured are the trait and coherence on held-out questions,
what rules tell of the same answers, both again where the trait may come back (under system prompts,
in later turns), the loss on the rows that were finetuned on (did it learn its task?), and
capability. All is paired with the plain finetune.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from persona_lora.core import progress
from persona_lora.core.chat import COHERENCE, Conversation
from persona_lora.core.content import digest_of, file_digest, model_folder_digest
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.options import ProbeOptions, TaskOptions
from persona_lora.core.protocol import Design
from persona_lora.core.resources import resource_path
from persona_lora.core.runs import RECORD, Output, Planned, Run, first_difference
from persona_lora.core.traits import Trait, trait_prompt
from persona_lora.judges.judging import Judge
from persona_lora.judges.rules import check_rules, rule_score
from persona_lora.judges.verdicts import Judges, lazily
from persona_lora.models.likelihood import answer_logprobs, tokenize_rendered
from persona_lora.models.loading import ChatModel
from persona_lora.report.comparisons import PROBE, TASK_COLUMNS, TaskScore, write_found
from persona_lora.report.correction import corrected_columns
from persona_lora.report.correction_tables import corrected_finetunes
from persona_lora.report.scores import grouped
from persona_lora.report.sections import Table
from persona_lora.report.trust import fitness_tables
from persona_lora.report.two_judges import across_runs, lead_of
from persona_lora.steering.bank import steer_live
from persona_lora.steering.steerer import Steerer, Unsteered
from persona_lora.studies.asking.capability import check_tasks, run_benchmarks, task_inputs
from persona_lora.studies.asking.run import (
    GenerationOptions,
    Steering,
    continued,
    evaluate,
    open_planned,
)
from persona_lora.studies.drift.figure import render_prevention
from persona_lora.studies.drift.read import prevention_scores
from persona_lora.training.finetune import read_conversations
from persona_lora.training.preventative import Preventative, inoculated

MEASURES = "measures"
TRAIT, LOSS = "trait", "task loss"
BESIDE = " / "  # in a protocol in place of what sets a probe off, since commas part its tests


@dataclass(frozen=True)
class Measured:
    """What is measured of every model: answers, also under probes, and capability.

    No tasks leave capability out.
    """

    options: GenerationOptions = field(default_factory=lambda: GenerationOptions(60))
    probes: ProbeOptions = field(default_factory=ProbeOptions)
    tasks: TaskOptions = field(default_factory=TaskOptions)

    @property
    def names(self) -> list[str]:
        """Everything that is measured, as the tables call it."""
        rules = self.probes.rules
        turns = (f"turn {turn}" for turn in range(2, self.probes.turns + 1))
        probed = product((*turns, *self.probes.prompts), (TRAIT, *rules))
        told = (f"{behaviour}{PROBE}{probe}" for probe, behaviour in probed)
        return [TRAIT, COHERENCE, *rules, *told, LOSS, *self.tasks.tasks]

    def check(self, trait: Trait, rows: Path) -> list[Conversation]:
        """Return the rows that were finetuned on.

        UserError for a rule, a probe, a number of turns or a task that there is not, and for rows
        that are no conversations.
        """
        check_tasks(self.tasks)
        check_rules(self.probes.rules)
        if self.probes.probes:
            trait_prompt(trait, "pos", 0)
        if self.probes.turns > len(trait.questions["eval"]):
            raise UserError(
                f"{self.probes.turns} turns need as many questions; {trait.name} has "
                f"{len(trait.questions['eval'])} here"
            )
        if self.probes.turns > 1 and self.options.samples > 1:
            raise UserError(
                f"{self.options.samples} samples of an answer cannot all be gone on from in later "
                "turns; ask for one sample (samples=1), or for one turn"
            )
        return read_conversations(rows)


@dataclass(frozen=True, eq=False)
class Finetuned:
    """One model of the comparison: an adapter or none, and a diff held on top of it or none.

    Models of one name are training seeds; the base has one, "".
    """

    name: str
    adapter: Path | None
    correction: tuple[LoRADiff, float] | None = None
    seed: str = ""

    def __post_init__(self) -> None:
        if self.adapter is not None and not (self.adapter / "adapter_config.json").is_file():
            raise UserError(
                f"{self.adapter} is no adapter, and only finetunes of a LoRA are compared; make "
                "one with persona-lora finetune"
            )

    def record(self) -> dict[str, Any]:
        """Return what a run's configuration keeps of the model."""
        diff, coefficient = self.correction or (None, None)
        return {
            "adapter": None if self.adapter is None else str(self.adapter),
            "correction_norm": None if diff is None else diff.norm(),
            "coefficient": coefficient,
        }

    @property
    def label(self) -> str:
        """The name, with the seed where there is one."""
        return f"{self.name} {self.seed}".strip()

    def inputs(self) -> dict[str, str]:
        """Return digests of the adapter and of the correction, by the model's name."""
        read = {}
        if self.adapter is not None:
            read[f"the adapter of {self.label}"] = model_folder_digest(self.adapter)
        if self.correction is not None:
            read[f"the correction of {self.label}"] = self.correction[0].content()
        return read


def _seeds_of(models: Sequence[Finetuned]) -> list[str]:
    """Return the training seeds that all finetunes have, as they are called.

    UserError where they have different ones, for a finetune that is given twice, and for two models
    of one name.
    """
    by_name: dict[str, list[str]] = {}
    contents: dict[str, str] = {}
    bare = {model.name for model in models if model.adapter is None}
    places: set[tuple[str, str]] = set()
    for model in models:
        place = model.name, model.seed
        if place in places or (model.adapter is not None and model.name in bare):
            raise UserError(
                f"two models are called {model.name!r}, and would be taken for one; call the "
                "finetune otherwise, and compare corrections of one coefficient apart"
            )
        places.add(place)
        if model.adapter is None:
            continue
        by_name.setdefault(model.name, []).append(model.seed)
        if model.correction is None:
            content = model_folder_digest(model.adapter)
            if contents.setdefault(content, model.label) != model.label:
                raise UserError(
                    f"{model.label} is the finetune {contents[content]} once more; leave one out"
                )
    (first, seeds), *others = by_name.items() or [("base", [""])]
    for name, own in others:
        if own != seeds:
            said = [", ".join(filter(None, each)) or "one" for each in (seeds, own)]
            raise UserError(
                f"{first} and {name} have different training seeds ({said[0]}; {said[1]}); give "
                "each the same, in folders named alike"
            )
    return seeds


def _refuse_unequal_seeds(models: Sequence[Finetuned]) -> None:
    """UserError for training seeds of a finetune whose own runs tell that more than a seed differs.

    Each may be steered by a direction, and by a random one, of its own.
    """
    for own in grouped(models, lambda each: each.name).values():
        told = {each.label: trained for each in own if (trained := _training_of(each)) is not None}
        first = next(iter(told), "")
        for label, trained in told.items():
            found = first_difference(told[first], trained)
            if found is not None:
                raise UserError(
                    f"{label} differs from {first} in more than its seed ({found}); finetune all "
                    "seeds alike"
                )


def _refuse_other_rows(
    models: Sequence[Finetuned], rows: Path, conversations: Sequence[Conversation]
) -> None:
    """UserError for a finetune whose own run tells that it was made on other rows."""
    for model in models:
        config = _config_of(model) or {}
        digest = config.get("data_sha256", config.get("rows_sha256"))
        said = None if "data_sha256" in config else config.get("preventative")
        held = inoculated(conversations, None if said is None else Preventative(**said))
        if digest not in (None, digest_of(held)):
            raise UserError(
                f"{model.label} was finetuned on other rows than {rows} holds: on "
                f"{config['num_rows']} of {config['train_file']} as it was then; name the rows "
                "that all were finetuned on with --rows"
            )


def _training_of(model: Finetuned) -> dict[str, Any] | None:
    """Return what training seeds of a finetune have in common, as its run tells; None without."""
    config = _config_of(model)
    own = {"seed", "data_seed", "diff", "vector", "random", "drift_diffs"}
    if config is None:
        return None
    parts = {
        name: {key: each for key, each in (config.get(name) or {}).items() if key not in own}
        for name in ("training", "preventative", "drift")
    }
    return {**config, **parts}


def _config_of(model: Finetuned) -> dict[str, Any] | None:
    """Return the configuration of a finetune; None where no run of one lies around it."""
    folder = None if model.adapter is None else model.adapter.parent
    if folder is None or not (folder / RECORD).is_file():
        return None
    record = Run(folder).record
    return dict(record["config"]) if record["command"] == "finetune" else None


def planned_prevention(
    models: Sequence[Finetuned], trait: Trait, rows: Path, measured: Measured
) -> Planned:
    """Return what is known of a comparison before its model is loaded.

    UserError for finetunes that cannot be compared, and for what cannot be measured.
    """
    trained_on, seeds = measured.check(trait, rows), _seeds_of(models)
    _refuse_unequal_seeds(models)
    _refuse_other_rows(models, rows, trained_on)
    tasks, questions = measured.tasks, len(trait.questions["eval"])
    config = {
        "trait": trait.name,
        "questions": questions,
        "rows": str(rows),
        "finetunes": len(seeds),
        **tasks.record(),
        **vars(measured.probes),
        **vars(measured.options),
    }
    inputs = {name: each for model in models for name, each in model.inputs().items()}
    inputs["the rows that were finetuned on"] = file_digest(resource_path(rows))
    inputs |= {**trait.inputs(), **task_inputs(tasks)}
    names = list(dict.fromkeys(model.name for model in models))
    design = Design.of(
        "compare-prevention",
        {"eval": questions, "rows": len(trained_on)},
        tuple(
            f"{name}: {task.replace(PROBE, BESIDE)}"
            for name in names[1:]
            for task in measured.names
        ),
        len(seeds),
    )
    return Planned("compare-prevention", config, measured.options.seed, inputs, design)


def compare_prevention(
    base: ChatModel,
    models: Sequence[Finetuned],
    trait: Trait,
    rows: Path,
    judge: Callable[[], Judge],
    output: Output | Path,
    measured: Measured = Measured(),
) -> list[TaskScore]:
    """Measure every model; those of the first one's name are what the others are paired with.

    ``judge`` builds the judge over the base model, once. ``rows`` is the JSONL that was finetuned
    on. Writes ``measures.jsonl`` (a row a model, measure and item), ``prevention.csv`` and
    ``prevention.png``; models measured already are kept. UserError for what cannot be measured.
    """
    planned = planned_prevention(models, trait, rows, measured)
    trained_on, shared, output = measured.check(trait, rows), lazily(judge), Output.of(output)
    run = open_planned(output, planned, base, parts=("answers", "probes", "capability"))
    with run:
        done = {_place(row) for row in run.resume_rows(MEASURES)}
        for model in progress.over("models", models):
            if (model.name, model.seed) in done:
                continue
            asked = _Asked(base, model, measured, output)
            found = [*asked.character(trait, shared), *asked.loss(trained_on)]
            run.extend(MEASURES, [*found, *asked.capability(measured.tasks)])
        places = {(model.name, model.seed) for model in models}
        kept = [row for row in run.read(MEASURES) if _place(row) in places]
        scores = prevention_scores(run, kept, models[0].name)
        columns = {**TASK_COLUMNS, **corrected_columns("score", "difference")}
        write_found(run.folder / "prevention.csv", columns, scores)
        render_prevention(scores, trait.name).save(run.folder / "prevention.png")
    return scores


def answers_of(folder: Path, models: Sequence[Finetuned]) -> dict[str, list[Run]]:
    """Return the runs that hold the models' answers, one for each training seed, by name."""
    return {
        name: [Run(folder / "answers" / each.label) for each in seeds]
        for name, seeds in grouped(models, lambda each: each.name).items()
    }


def corrected_models(folder: Path, models: Sequence[Finetuned], trait: str) -> tuple[Table, ...]:
    """Return what finetunes change, corrected for the judge's error; nothing without a base."""
    bare = [each.name for each in models if each.adapter is None and each.correction is None]
    return corrected_finetunes(trait, answers_of(folder, models), next(iter(bare), ""))


def judged_lead(folder: Path, models: Sequence[Finetuned], trait: str) -> str:
    """Return how the judges of a comparison agree."""
    own = answers_of(folder, models)
    both = across_runs(trait, own, models[0].name)
    return lead_of("", both, {name: runs[0] for name, runs in own.items()}, trait)


def judge_tables(folder: Path, trait: str) -> tuple[Table, ...]:
    """Return how the judges of a comparison agree with labels, and what they made of nonsense.

    As it is kept with the answers of the base.
    """
    return fitness_tables([Run(folder / "answers" / "base")], (trait, COHERENCE))


def _place(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["condition"], row["seed"]


class _Asked:
    """One model while it is measured; what is asked of it becomes rows of ``measures``."""

    def __init__(
        self, base: ChatModel, model: Finetuned, measured: Measured, output: Output
    ) -> None:
        self.model, self.measured = model, measured
        inputs = {**model.inputs(), **output.inputs}
        self.below = Output(output.path, config=model.record(), inputs=inputs)
        self.terms = {} if model.correction is None else dict([model.correction])
        adapter = model.adapter
        self.chat_model = base if adapter is None else base.reload(adapter=adapter)

    def character(self, trait: Trait, judge: Judges) -> list[dict[str, Any]]:
        """Return trait, coherence and rules of every held-out question, plainly and under probes.

        In turn n a question stands after the n − 1 before it, the last ones before the first, with
        the model's own answers.
        """
        questions, probes = trait.questions["eval"], self.measured.probes
        told: list[Conversation] = [[] for _ in questions]
        rows = []
        for turn in range(1, probes.turns + 1):
            probe = f"turn {turn}" if turn > 1 else ""
            run = self._ask(trait, judge, probe, before=told)
            rows += self._scores(run, trait, probe)
            pairs = zip(told, run.read("answers"), strict=True)
            answered = [continued(said, row["question"], row["answer"]) for said, row in pairs]
            told = [*answered[-1:], *answered[:-1]]
        for probe, prompt in probes.prompts.items():
            rows += self._scores(self._ask(trait, judge, probe, prompt), trait, probe)
        return rows

    def _ask(
        self,
        trait: Trait,
        judge: Judges,
        probe: str,
        prompt: str | None = None,
        before: Sequence[Conversation] = (),
    ) -> Run:
        label = self.model.label
        part, name = ("probes", f"{label} {probe}") if probe else ("answers", label)
        result = evaluate(
            self.chat_model,
            trait,
            replace(judge, coherence=not probe),
            self.below.at(self.below.path / part / f"{name}.csv"),
            steering=Steering(self.terms, system_prompt=prompt),
            options=self.measured.options,
            before=before if any(before) else (),
        )
        return Run(result.run)

    def _scores(self, run: Run, trait: Trait, probe: str) -> list[dict[str, Any]]:
        """Return what the judge and the rules say of a run; coherence where nothing probes."""
        after = f"{PROBE}{probe}" if probe else ""
        answers = {row["row"]: row for row in run.read("answers")}
        names = {trait.name: f"{TRAIT}{after}", **({} if probe else {COHERENCE: COHERENCE})}
        scores = [
            (names[each["criterion"]], answers[each["row"]], each["score"])
            for each in run.read("verdicts")
            if each["criterion"] in names
        ]
        for rule, row in product(self.measured.probes.rules, answers.values()):
            score = rule_score(rule, row["answer"], finished=row["finished"])
            scores.append((f"{rule}{after}", row, score))
        return [
            self._row(task, "score", row["question_id"], score)
            for task, row, score in scores
            if score is not None
        ]

    def loss(self, rows: Sequence[Conversation]) -> list[dict[str, Any]]:
        """Return the mean loss (nats per token) on the answer of every row, after all before it."""
        texts = [
            tokenize_rendered(
                self.chat_model, self.chat_model.render(turns[:-1]), turns[-1]["content"]
            )
            for turns in rows
        ]
        with self._corrected():
            means = answer_logprobs(self.chat_model, texts)
        return [self._row(LOSS, "nats", at, -value) for at, value in enumerate(means)]

    def capability(self, tasks: TaskOptions) -> list[dict[str, Any]]:
        """Return the score of every item of every task."""
        if not tasks.tasks:
            return []
        output = self.below.at(self.below.path / "capability" / self.model.label)
        run_benchmarks(self.chat_model, {self.model.name: self._corrected()}, tasks, output)
        return [{**row, "seed": self.model.seed} for row in Run(output.path).read("items")]

    def _corrected(self) -> Steerer:
        return steer_live(self.chat_model, self.terms) if self.terms else Unsteered()

    def _row(self, task: str, metric: str, item: int, score: float) -> dict[str, Any]:
        of = {"condition": self.model.name, "seed": self.model.seed, "task": task, "metric": metric}
        return {**of, "item": item, "score": score}
