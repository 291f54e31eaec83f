"""How does the trait move with the coefficient? All coefficients are rows of the same batches.

Beside the steered rows go the same questions under the trait's positive and negative system
prompt: prompting is the baseline to fear.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_lora.analysis.plots.sweep import plot_sweep
from persona_lora.analysis.report import write_report
from persona_lora.analysis.scores import answers_columns, answers_table
from persona_lora.analysis.summary import SweepSummary, write_summary
from persona_lora.core.errors import UserError
from persona_lora.core.files import write_csv
from persona_lora.core.lora_diff import LoRADiff, finite_coefficient
from persona_lora.core.runs import Run
from persona_lora.core.traits import Split, Trait
from persona_lora.experiments.divergence import load_ordinary_prompts, measure_costs
from persona_lora.experiments.evaluation import (
    Condition,
    GenerationOptions,
    PlannedRow,
    answer_rows,
    plan_rows,
)
from persona_lora.experiments.judging import Report, judge_answers, staged
from persona_lora.judges.judging import Judge
from persona_lora.models.loading import ChatModel
from persona_lora.steering.live import LiveLoRA

REFERENCES = (Condition("prompt_pos"), Condition("prompt_neg"))


@dataclass(frozen=True)
class SweepResult:
    """The summary of a sweep, and where its files are."""

    summary: SweepSummary
    run: Path
    plot: Path
    report: Path


def sweep(
    chat_model: ChatModel,
    trait: Trait,
    diff: LoRADiff,
    coefficients: Sequence[float],
    judge: Callable[[], Judge],
    output: Path,
    *,
    split: Split = "eval",
    options: GenerationOptions | None = None,
    config: Mapping[str, Any] | None = None,
    datasets: Path | None = None,
    allow_other_base: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
) -> SweepResult:
    """Run a sweep into the folder ``output``; run again, it goes on where it stopped.

    Writes the run's rows (answers, verdicts, costs, validation), ``sweep.csv``,
    ``summary.json``, ``summary.csv``, ``sweep.png`` and ``report.html``. Coefficient 0 is always
    among the rows: it is what the others are compared with.
    """
    values = sorted({finite_coefficient(value) + 0.0 for value in coefficients} | {0.0})
    if len(values) < 2:
        raise UserError("a sweep needs at least one coefficient other than 0")
    options = options or GenerationOptions()
    prompts = load_ordinary_prompts(datasets)
    conditions = [*(Condition("lora", value) for value in values), *REFERENCES]
    plan = plan_rows(trait, split, conditions, samples=options.samples)
    steerer = _population(chat_model, diff, plan, allow_other_base)
    run = Run.open(
        Path(output),
        command="sweep",
        config={
            "trait": trait.name,
            "model": chat_model.name,
            "dtype": str(chat_model.model.dtype).removeprefix("torch."),
            "diff_norm": diff.norm(),
            "coefficients": values,
            "split": split,
            "generation": dataclasses.asdict(options),
            **(config or {}),
        },
        seed=options.seed,
        overwrite=overwrite,
    )
    with run:
        answer_rows(chat_model, plan, steerer, run, options, report=report)
        if not run.read("costs"):
            costs = measure_costs(
                chat_model,
                diff,
                values,
                prompts,
                allow_other_base=allow_other_base,
                progress=staged(report, "divergence"),
            )
            run.write("costs", [dataclasses.asdict(cost) for cost in costs])
        judge_answers(run, judge, trait, report)
    return write_results(run, trait.name)


def write_results(run: Run, trait: str) -> SweepResult:
    """Write tables, statistics, plot and report from the rows of a sweep."""
    table = answers_table(run.read("answers"), run.read("verdicts"), trait)
    write_csv(run.folder / "sweep.csv", answers_columns(trait), table)
    summary = write_summary(run)
    plot, page = run.folder / "sweep.png", run.folder / "report.html"
    plot_sweep(summary, plot)
    write_report([run.folder], page)
    return SweepResult(summary, run.folder, plot, page)


def _population(
    chat_model: ChatModel, diff: LoRADiff, plan: Sequence[PlannedRow], allow_other_base: bool
) -> LiveLoRA:
    rows = [[planned.condition.coefficient or 0.0] for planned in plan]
    return LiveLoRA(chat_model.model, [diff], rows, allow_other_base=allow_other_base)
