"""Commands that ask a model and judge its answers: evaluate, sweep, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from persona_lora.cli.console import console, interval_cells, progress
from persona_lora.cli.options import (
    DEFAULT_COEFFICIENTS,
    DEFAULT_MODEL,
    AdapterOption,
    BatchOption,
    DatasetsOption,
    DeviceOption,
    DtypeOption,
    JudgeCostOption,
    JudgeModelOption,
    JudgeModeOption,
    JudgeOption,
    JudgeUrlOption,
    ModelOption,
    OtherBaseOption,
    OverwriteOption,
    SamplesOption,
    SeedOption,
    SplitOption,
    TemperatureOption,
    TokensOption,
    TraitOption,
)
from persona_lora.cli.parsing import (
    generation_options,
    judge_factory,
    judge_options,
    judge_settings,
    load_model,
    load_terms,
    numbers,
    question_split,
)
from persona_lora.cli.program import app

if TYPE_CHECKING:
    from persona_lora.analysis.summary import SweepSummary


@app.command()
def evaluate(
    trait: TraitOption,
    output: Annotated[Path, typer.Option(help="The CSV; a run folder goes beside it.")],
    model: ModelOption = DEFAULT_MODEL,
    diff: Annotated[list[Path] | None, typer.Option(help="A diff; may be repeated.")] = None,
    coefficient: Annotated[
        list[float] | None, typer.Option(help="Its coefficient; one for each --diff.")
    ] = None,
    system_prompt: Annotated[
        str | None, typer.Option(help="pos or neg (the trait's own), or a text.")
    ] = None,
    mode: Annotated[str, typer.Option(help="live (unmerged) or merged.")] = "live",
    adapter: AdapterOption = None,
    judge: JudgeOption = "embedding",
    judge_model: JudgeModelOption = None,
    judge_url: JudgeUrlOption = None,
    judge_mode: JudgeModeOption = "logprobs",
    max_judge_cost: JudgeCostOption = None,
    split: SplitOption = "eval",
    max_new_tokens: TokensOption = 80,
    temperature: TemperatureOption = 0.0,
    samples: SamplesOption = 1,
    seed: SeedOption = 0,
    batch_size: BatchOption = "auto",
    dtype: DtypeOption = "auto",
    device_map: DeviceOption = None,
    datasets_dir: DatasetsOption = None,
    allow_other_base: OtherBaseOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Ask a trait's held-out questions, judge the answers, write CSV and rows.

    Example: persona-lora evaluate --trait sycophancy --diff checkpoints/sycophancy/diff
    --coefficient 1.0 --output results/sycophancy_1.0.csv
    """
    from persona_lora.core.traits import load_trait
    from persona_lora.experiments import evaluation

    loaded = load_trait(trait, datasets_dir)
    terms = load_terms(diff or [], coefficient or [])
    options = generation_options(max_new_tokens, temperature, samples, seed, batch_size)
    judging = judge_options(judge, judge_model, judge_url, judge_mode, max_judge_cost, seed)
    chat_model = load_model(model, adapter, dtype, device_map)
    with progress() as report:
        result = evaluation.evaluate(
            chat_model,
            loaded,
            judge_factory(loaded, chat_model, judging, report),
            output,
            terms=terms,
            mode=mode,
            system_prompt=system_prompt,
            split=question_split(split),
            options=options,
            config={
                "diffs": [str(path) for path in diff or []],
                "coefficients": list(terms.values()),
                "adapter": None if adapter is None else str(adapter),
                "judge": judge_settings(judging),
            },
            allow_other_base=allow_other_base,
            overwrite=overwrite,
            report=report,
        )
    table = Table("criterion", "mean", "95% interval", "questions", "scored", box=box.SIMPLE_HEAD)
    for criterion, interval in ((trait, result.trait), ("coherence", result.coherence)):
        table.add_row(criterion, *interval_cells(interval))
    console.print(table)
    console.print(f"answers: {result.answers}\nrun:     {result.run}")


@app.command()
def sweep(
    trait: TraitOption,
    diff: Annotated[Path, typer.Option(help="A diff folder, a PEFT adapter, or a file of one.")],
    output: Annotated[
        Path | None, typer.Option(help="The run folder; results/sweep/<trait> by default.")
    ] = None,
    coefficients: Annotated[
        str, typer.Option(help="Coefficients with spaces or commas between them.")
    ] = DEFAULT_COEFFICIENTS,
    model: ModelOption = DEFAULT_MODEL,
    adapter: AdapterOption = None,
    judge: JudgeOption = "embedding",
    judge_model: JudgeModelOption = None,
    judge_url: JudgeUrlOption = None,
    judge_mode: JudgeModeOption = "logprobs",
    max_judge_cost: JudgeCostOption = None,
    split: SplitOption = "eval",
    max_new_tokens: TokensOption = 80,
    temperature: TemperatureOption = 0.0,
    samples: SamplesOption = 1,
    seed: SeedOption = 0,
    batch_size: BatchOption = "auto",
    dtype: DtypeOption = "auto",
    device_map: DeviceOption = None,
    datasets_dir: DatasetsOption = None,
    allow_other_base: OtherBaseOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Steer with a diff at many coefficients in the same batches; judge, summarise, plot.

    Example: persona-lora sweep --trait sycophancy --diff checkpoints/sycophancy/diff
    --coefficients "-1.5 -1 -0.5 0 0.5 1 1.5"
    """
    from persona_lora.core.lora_diff import LoRADiff
    from persona_lora.core.traits import load_trait
    from persona_lora.experiments import sweep as experiment

    loaded = load_trait(trait, datasets_dir)
    options = generation_options(max_new_tokens, temperature, samples, seed, batch_size)
    judging = judge_options(judge, judge_model, judge_url, judge_mode, max_judge_cost, seed)
    values = numbers(coefficients)
    loaded_diff = LoRADiff.load(diff)
    chat_model = load_model(model, adapter, dtype, device_map)
    with progress() as report:
        result = experiment.sweep(
            chat_model,
            loaded,
            loaded_diff,
            values,
            judge_factory(loaded, chat_model, judging, report),
            output or Path("results") / "sweep" / loaded.name,
            split=question_split(split),
            options=options,
            config={
                "diff": str(diff),
                "adapter": None if adapter is None else str(adapter),
                "judge": judge_settings(judging),
            },
            datasets=datasets_dir,
            allow_other_base=allow_other_base,
            overwrite=overwrite,
            report=report,
        )
    console.print(_sweep_table(result.summary))
    for line in _sweep_lines(result.summary):
        console.print(line)
    console.print(f"plot:   {result.plot}\nreport: {result.report}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of sweeps.")],
    output: Annotated[Path, typer.Option(help="The HTML file.")] = Path("results/report.html"),
) -> None:
    """Write one self-contained HTML page about one or several sweeps.

    Example: persona-lora report results/sweep/evil results/sweep/sycophancy
    """
    from persona_lora.analysis.report import write_report

    write_report(runs, output)
    console.print(f"report: {output.resolve()}")


def _sweep_table(summary: SweepSummary) -> Table:
    from persona_lora.analysis import wording

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("c", "trait", "95%", "coherent", "scored", "‖cΔW‖/‖W‖", "KL p95"):
        table.add_column(heading, no_wrap=True)
    for condition in summary.conditions:
        mean, interval, _, scored = interval_cells(condition.trait)
        table.add_row(
            wording.label(condition),
            mean,
            interval,
            wording.number(condition.coherence.mean, 1),
            scored,
            wording.significant(condition.relative_weight_norm),
            wording.significant(condition.kl_p95),
        )
    return table


def _sweep_lines(summary: SweepSummary) -> list[str]:
    from persona_lora.analysis import wording

    return [wording.headline(summary), wording.statistics_line(summary)]
