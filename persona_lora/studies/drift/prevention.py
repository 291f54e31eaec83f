"""What prevention buys and what it costs: finetunes of one task beside one another.

Every model is a finetune of the same base (or the base itself, or a finetune with a correction on
top). Measured are the trait and coherence on held-out questions, the loss on the rows that were
finetuned on (did it learn its task?), and capability. All is paired with the plain finetune.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_lora.core import progress
from persona_lora.core.chat import COHERENCE, Exchange
from persona_lora.core.content import file_digest, model_folder_digest
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.options import TaskOptions
from persona_lora.core.resources import resource_path
from persona_lora.core.runs import Output, Run
from persona_lora.core.traits import Trait
from persona_lora.judges.judging import Judge
from persona_lora.judges.verdicts import lazily
from persona_lora.models.likelihood import mean_logprobs
from persona_lora.models.loading import ChatModel
from persona_lora.report.comparisons import TASK_COLUMNS, TaskScore, score_items, write_found
from persona_lora.steering.bank import steer_live
from persona_lora.studies.asking.capability import run_benchmarks, task_inputs
from persona_lora.studies.asking.run import GenerationOptions, Steering, evaluate, open_run
from persona_lora.studies.drift.figure import render_prevention
from persona_lora.training.finetune import read_conversations

MEASURES = "measures"
TRAIT, LOSS = "trait", "task loss"


@dataclass(frozen=True, eq=False)
class Finetuned:
    """One model of the comparison: an adapter or none, and a diff held on top of it or none."""

    adapter: Path | None
    correction: tuple[LoRADiff, float] | None = None

    def __post_init__(self) -> None:
        if self.adapter is not None and not (self.adapter / "adapter_config.json").is_file():
            raise UserError(f"{self.adapter} is no adapter; finetune it first")

    def record(self) -> dict[str, Any]:
        """Return what a run's configuration keeps of the model."""
        diff, coefficient = self.correction or (None, None)
        return {
            "adapter": None if self.adapter is None else str(self.adapter),
            "correction_norm": None if diff is None else diff.norm(),
            "coefficient": coefficient,
        }

    def inputs(self, name: str) -> dict[str, str]:
        """Return digests of the adapter and of the correction, by the model's name."""
        read = {}
        if self.adapter is not None:
            read[f"the adapter of {name}"] = model_folder_digest(self.adapter)
        if self.correction is not None:
            read[f"the correction of {name}"] = self.correction[0].content()
        return read


def compare_prevention(
    base: ChatModel,
    models: Mapping[str, Finetuned],
    trait: Trait,
    rows: Path,
    judge: Callable[[], Judge],
    output: Output | Path,
    *,
    tasks: TaskOptions = TaskOptions(),
    options: GenerationOptions = GenerationOptions(max_new_tokens=60),
) -> list[TaskScore]:
    """Measure every model; the first one is what the others are paired with.

    ``judge`` builds the judge over the base model, once. ``rows`` is the JSONL that was finetuned
    on; no ``tasks`` leave capability out. Writes
    ``measures.jsonl`` (a row a model, measure and item), ``prevention.csv`` and ``prevention.png``;
    models measured already are kept.
    """
    shared = lazily(judge)
    exchanges = [
        Exchange(turns[-2]["content"], turns[-1]["content"]) for turns in read_conversations(rows)
    ]
    output = Output.of(output)
    config = {
        "trait": trait.name,
        "questions": len(trait.questions["eval"]),
        "rows": str(rows),
        **tasks.record(),
        "max_new_tokens": options.max_new_tokens,
    }
    run = open_run(
        output,
        "compare-prevention",
        base,
        config,
        trait.inputs(),
        *(model.inputs(name) for name, model in models.items()),
        {"the rows that were finetuned on": file_digest(resource_path(rows))},
        task_inputs(tasks),
        seed=options.seed,
        parts=("answers", "capability"),
    )
    with run:
        done = {row["condition"] for row in run.resume_rows(MEASURES)}
        for name, model in progress.over("models", list(models.items())):
            if name in done:
                continue
            measured = _Measured(base, name, model, options, run, output.inputs)
            found = [*measured.character(trait, shared), *measured.loss(exchanges)]
            run.extend(MEASURES, [*found, *measured.capability(tasks)])
        kept = [row for row in run.read(MEASURES) if row["condition"] in models]
        scores = score_items(kept, next(iter(models)))
        write_found(run.folder / "prevention.csv", TASK_COLUMNS, scores)
        render_prevention(scores, trait.name).save(run.folder / "prevention.png")
    return scores


class _Measured:
    """One model while it is measured; what is asked of it becomes rows of ``measures``."""

    def __init__(
        self,
        base: ChatModel,
        name: str,
        model: Finetuned,
        options: GenerationOptions,
        run: Run,
        inputs: Mapping[str, str],
    ) -> None:
        self.name, self.options, self.run = name, options, run
        self.record, self.inputs = model.record(), {**model.inputs(name), **inputs}
        self.terms = {} if model.correction is None else dict([model.correction])
        adapter = model.adapter
        self.chat_model = base if adapter is None else base.reload(adapter=adapter)

    def character(self, trait: Trait, judge: Callable[[], Judge]) -> list[dict[str, Any]]:
        """Return trait score and coherence of every held-out question."""
        result = evaluate(
            self.chat_model,
            trait,
            judge,
            self._output("answers", f"{self.name}.csv"),
            steering=Steering(self.terms),
            options=self.options,
        )
        run = Run(result.run)
        question_of = {row["row"]: row["question_id"] for row in run.read("answers")}
        names = {trait.name: TRAIT, COHERENCE: COHERENCE}
        return [
            self._row(names[each["criterion"]], "score", question_of[each["row"]], each["score"])
            for each in run.read("verdicts")
            if each["score"] is not None
        ]

    def loss(self, exchanges: Sequence[Exchange]) -> list[dict[str, Any]]:
        """Return the mean loss (nats per token) on every row that was finetuned on."""
        with self._corrected():
            means = mean_logprobs(self.chat_model, exchanges)
        return [self._row(LOSS, "nats", at, -value) for at, value in enumerate(means)]

    def capability(self, tasks: TaskOptions) -> list[dict[str, Any]]:
        """Return the score of every item of every task."""
        if not tasks.tasks:
            return []
        output = self._output("capability", self.name)
        run_benchmarks(self.chat_model, {self.name: self._corrected()}, tasks, output)
        return Run(output.path).read("items")

    def _output(self, part: str, name: str) -> Output:
        path = self.run.folder / part / name
        return Output(path, config=self.record, inputs=self.inputs)

    def _corrected(self) -> Any:
        return steer_live(self.chat_model, self.terms) if self.terms else ExitStack()

    def _row(self, task: str, metric: str, item: int, score: float) -> dict[str, Any]:
        return {
            "condition": self.name, "task": task, "metric": metric, "item": item, "score": score,
        }  # fmt: skip
