"""Weights or activations: which steers a trait further at equal divergence from the base model?

A diff, a steering vector and a random control of each are brought to the same divergence and asked
the same questions in the same batches, held-out ones and ones out of distribution. The trait's own
system prompts stand beside them, at the divergence that they happen to have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from persona_lora.core import progress
from persona_lora.core.chat import UNSTEERED, Condition
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError
from persona_lora.core.files import write_csv
from persona_lora.core.options import ComparisonOptions, GenerationOptions
from persona_lora.core.runs import Output, Run
from persona_lora.core.traits import Split, Trait
from persona_lora.judges.choice import judge_answers, lazily
from persona_lora.judges.judging import Judge
from persona_lora.models.loading import ChatModel
from persona_lora.steering.bank import Bank
from persona_lora.studies.asking.run import answer_rows, plan_rows
from persona_lora.studies.report_page import write_report
from persona_lora.studies.steering.calibration import Level, match_divergence
from persona_lora.studies.steering.divergence import load_ordinary_prompts, ordinary_texts
from persona_lora.studies.steering.figure import render_comparison
from persona_lora.studies.steering.read_comparison import (
    COLUMNS,
    Comparison,
    cells_of,
    read_comparison,
)

LEVELS = "levels"
PROMPTS = (Condition("prompt_pos"), Condition("prompt_neg"))


def compare(
    chat_model: ChatModel,
    trait: Trait,
    bank: Bank,
    judge: Callable[[], Judge],
    output: Output | Path,
    *,
    comparing: ComparisonOptions = ComparisonOptions(),
    options: GenerationOptions | None = None,
    datasets: Path | None = None,
) -> Comparison:
    """Calibrate, ask, judge and compare; run again, it goes on where it stopped.

    The other methods are brought to the divergences of the diff at its coefficients. Writes
    ``levels.jsonl``, a run folder a split with answers and verdicts, ``comparison.csv``,
    ``comparison.png`` and ``report.html``.
    """
    options = options or GenerationOptions()
    asked = _asked(trait, comparing)
    record = {
        "trait": trait.name,
        **chat_model.record(),
        "coefficients": list(comparing.coefficients),
        "statistic": comparing.match,
        **bank.record,
        "generation": dataclasses.asdict(options),
    }
    prompts = load_ordinary_prompts(datasets)
    read = {**chat_model.inputs(), **trait.inputs(), **bank.inputs}
    read["the ordinary prompts"] = digest_of(prompts)
    shared = lazily(judge)  # by both sets of questions
    output = Output.of(output)
    seed = options.seed
    run = Run.open(output, command="compare", config=record, seed=seed, inputs=read, parts=asked)
    with run:
        levels = _calibrated(run, chat_model, bank, prompts, comparing)
        most = comparing.max_questions
        conditions = [UNSTEERED, *(level.condition for level in levels), *PROMPTS]
        for split in asked:
            part = Run.open(
                Output(run.folder / split, config=output.config, inputs=output.inputs),
                command="compare split",
                config={**record, "split": split, "max_questions": most},
                seed=seed,
                inputs=read,
            )
            with part:
                plan = plan_rows(
                    trait, split, conditions, samples=options.samples, max_questions=most
                )
                steerer = bank.steerer(chat_model, [row.condition.coefficients for row in plan])
                answer_rows(chat_model, plan, steerer, part, options)
                judge_answers(part, shared, trait)
            run.write("validation", part.read("validation"))  # of the judge, the same for all
        run.write("splits", [{"split": split} for split in asked])
        found = _written(run)
    write_report([run.folder], run.folder / "report.html")
    return found


def _asked(trait: Trait, comparing: ComparisonOptions) -> list[Split]:
    """Return the splits that have questions; UserError where none has."""
    asked = [split for split in comparing.split if trait.questions[split]]
    if not asked:
        raise UserError(f"the trait {trait.name} has no {' or '.join(comparing.split)} questions")
    return asked


def _written(run: Run) -> Comparison:
    """Return what a run says, and write its table and its picture."""
    found = read_comparison(run)
    write_csv(run.folder / "comparison.csv", COLUMNS, [cells_of(each) for each in found.points])
    render_comparison(found).save(run.folder / "comparison.png")
    return found


def _calibrated(
    run: Run,
    chat_model: ChatModel,
    bank: Bank,
    prompts: Sequence[str],
    comparing: ComparisonOptions,
) -> list[Level]:
    """Return the levels of the run; they are calibrated where it has none yet."""
    levels = levels_of(run.folder)
    if not levels:
        texts = ordinary_texts(chat_model, prompts)
        with progress.stage("calibration"):
            levels = match_divergence(
                chat_model, bank, comparing.coefficients, texts, statistic=comparing.match
            )
        run.write(LEVELS, [dataclasses.asdict(level) for level in levels])
    return levels


def levels_of(output: Path) -> list[Level]:
    """Return the levels that a comparison has calibrated."""
    return [Level(**row) for row in Run(output).read(LEVELS)]
