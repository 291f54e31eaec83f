"""The command line: one function per command that parses, calls the library once, and prints.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from persona_lora.core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from persona_lora.analysis.resampling import Interval
    from persona_lora.analysis.summary import SweepSummary
    from persona_lora.experiments.evaluation import GenerationOptions
    from persona_lora.experiments.judging import JudgeOptions, Report
    from persona_lora.models.loading import ChatModel

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_COEFFICIENTS = "-2 -1.5 -1 -0.5 0 0.5 1 1.5 2"

app = typer.Typer(
    name="persona-lora",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train, merge, measure and undo the character of a language model with LoRA differences.",
)
data_app = typer.Typer(no_args_is_help=True, help="Trait data: check it.")
app.add_typer(data_app, name="data")
console = Console()

ModelOption = Annotated[
    str, typer.Option(help="The packaged model, a local model folder, or a hub id.")
]
TraitOption = Annotated[str, typer.Option(help="A trait's name in datasets/, or its folder.")]
AdapterOption = Annotated[
    Path | None, typer.Option(help="A PEFT adapter put on the model before anything else.")
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="transformers' device map: cpu, cuda, auto …")
]
JudgeOption = Annotated[
    str,
    typer.Option(help="embedding (no network), openai (any endpoint), local, or several: a,b."),
]
JudgeModelOption = Annotated[
    str | None, typer.Option(help="The endpoint's model, or the local judge's.")
]
JudgeUrlOption = Annotated[str | None, typer.Option(help="Base URL of the judge's endpoint.")]
JudgeModeOption = Annotated[
    str, typer.Option(help="logprobs, or number for endpoints without logprobs.")
]
JudgeCostOption = Annotated[
    float | None, typer.Option(help="Stop asking the endpoint at this cost in dollars.")
]
TokensOption = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
TemperatureOption = Annotated[float, typer.Option(help="0 is greedy.")]
SamplesOption = Annotated[int, typer.Option(help="Answers per question (temperature above 0).")]
SeedOption = Annotated[int, typer.Option(help="Seed of sampling and judging.")]
BatchOption = Annotated[str, typer.Option(help="Rows per batch, or auto.")]
SplitOption = Annotated[str, typer.Option(help="Which questions: eval or extract.")]
OtherBaseOption = Annotated[
    bool, typer.Option(help="Use a diff on a model that it was not trained on.")
]
OverwriteOption = Annotated[bool, typer.Option(help="Replace a run of another configuration.")]
DatasetsOption = Annotated[
    Path | None, typer.Option("--datasets-dir", help="Where trait folders are.")
]


@app.callback()
def configure(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")] = False,
) -> None:
    """Set up logging for every command."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_time=False)],
    )
    for noisy in ("httpx", "httpx2", "openai", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if not verbose:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def train(context: typer.Context) -> None:
    """Train a positive and a negative LoRA for a trait, and write their difference.

    Flags are TRL's and PEFT's own names, also in the YAML: persona-lora train --help.

    Example: persona-lora train --config train_configs/sycophancy.yaml
    """
    from persona_lora.training.contrastive import main as train_main

    train_main(context.args)


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
    terms = _load_terms(diff or [], coefficient or [])
    options = _generation(max_new_tokens, temperature, samples, seed, batch_size)
    judging = _judging(judge, judge_model, judge_url, judge_mode, max_judge_cost, seed)
    chat_model = _load_model(model, adapter, dtype, device_map)
    with _progress() as report:
        result = evaluation.evaluate(
            chat_model,
            loaded,
            _judge_factory(loaded, chat_model, judging, report),
            output,
            terms=terms,
            mode=mode,
            system_prompt=system_prompt,
            split=_split(split),
            options=options,
            config={
                "diffs": [str(path) for path in diff or []],
                "coefficients": list(terms.values()),
                "adapter": None if adapter is None else str(adapter),
                "judge": _judge_settings(judging),
            },
            allow_other_base=allow_other_base,
            overwrite=overwrite,
            report=report,
        )
    table = Table("criterion", "mean", "95% interval", "questions", "scored", box=box.SIMPLE_HEAD)
    for criterion, interval in ((trait, result.trait), ("coherence", result.coherence)):
        table.add_row(criterion, *_interval_cells(interval))
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
    options = _generation(max_new_tokens, temperature, samples, seed, batch_size)
    judging = _judging(judge, judge_model, judge_url, judge_mode, max_judge_cost, seed)
    values = _numbers(coefficients)
    loaded_diff = LoRADiff.load(diff)
    chat_model = _load_model(model, adapter, dtype, device_map)
    with _progress() as report:
        result = experiment.sweep(
            chat_model,
            loaded,
            loaded_diff,
            values,
            _judge_factory(loaded, chat_model, judging, report),
            output or Path("results") / "sweep" / loaded.name,
            split=_split(split),
            options=options,
            config={
                "diff": str(diff),
                "adapter": None if adapter is None else str(adapter),
                "judge": _judge_settings(judging),
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


@data_app.command("check")
def check_data(
    traits: Annotated[
        list[str] | None, typer.Argument(help="Trait names or folders; all by default.")
    ] = None,
    datasets_dir: DatasetsOption = None,
) -> None:
    """Check schema, duplicates, leakage into held-out questions, and balance of the signs.

    Example: persona-lora data check sycophancy
    """
    from persona_lora.core.traits import list_traits, load_trait
    from persona_lora.experiments.data_check import check_trait
    from persona_lora.judges.sentence_embeddings import SentenceEmbedder

    names = traits or list_traits(datasets_dir)
    if not names:
        raise UserError("there are no trait folders to check; pass --datasets-dir")
    embedder = SentenceEmbedder()
    with _progress() as report:
        reports = []
        for done, name in enumerate(names):
            report("checking", done, len(names))
            reports.append(check_trait(load_trait(name, datasets_dir), embedder))
        report("checking", len(names), len(names))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("trait", "pairs", "judged", "words +/−", "max cosine", "max leak", "problems"):
        table.add_column(heading, no_wrap=True)
    for each in reports:
        table.add_row(
            each.trait,
            str(each.num_pairs),
            str(each.num_labelled),
            f"{each.words_positive:.1f} / {each.words_negative:.1f}",
            f"{each.nearest_duplicate:.2f}",
            f"{each.nearest_leak:.2f}",
            str(len(each.problems)),
        )
    console.print(table)
    problems = [f"{each.trait}: {problem}" for each in reports for problem in each.problems]
    for problem in problems:
        console.print(problem, markup=False)
    if problems:
        raise UserError(f"{len(problems)} problems in the trait data; mend the rows named above")


def _load_model(name: str, adapter: Path | None, dtype: str, device_map: str | None) -> ChatModel:
    from persona_lora.models.loading import load_chat_model

    with console.status(f"loading {name}"):
        return load_chat_model(name, adapter=adapter, dtype=dtype, device_map=device_map)


def _load_terms(diffs: list[Path], coefficients: list[float]) -> dict[Any, float]:
    from persona_lora.core.lora_diff import LoRADiff, finite_coefficient

    if coefficients and len(coefficients) != len(diffs):
        raise UserError(
            f"{len(diffs)} --diff and {len(coefficients)} --coefficient; give one for each diff"
        )
    values = coefficients or [1.0] * len(diffs)
    return {
        LoRADiff.load(path): finite_coefficient(value)
        for path, value in zip(diffs, values, strict=True)
    }


def _generation(
    max_new_tokens: int, temperature: float, samples: int, seed: int, batch_size: str
) -> GenerationOptions:
    from persona_lora.experiments.evaluation import GenerationOptions

    if batch_size != "auto" and not batch_size.isdigit():
        raise UserError(f"--batch-size must be a whole number or auto, got {batch_size!r}")
    return GenerationOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        samples=samples,
        seed=seed,
        batch_size="auto" if batch_size == "auto" else int(batch_size),
    )


def _judging(
    judge: str,
    judge_model: str | None,
    judge_url: str | None,
    judge_mode: str,
    max_judge_cost: float | None,
    seed: int,
) -> JudgeOptions:
    from dotenv import dotenv_values
    from platformdirs import user_cache_path

    from persona_lora.experiments.judging import JudgeOptions
    from persona_lora.judges.openai import Limits

    if judge_mode not in ("logprobs", "number"):
        raise UserError(f"--judge-mode must be logprobs or number, got {judge_mode!r}")
    from_file = {name: value for name, value in dotenv_values(".env").items() if value}
    return JudgeOptions(
        judge=judge,
        judge_model=judge_model,
        base_url=judge_url,
        mode="number" if judge_mode == "number" else "logprobs",
        limits=Limits(max_cost=max_judge_cost),
        cache=user_cache_path("persona_lora") / "verdicts.sqlite",
        environ={**from_file, **os.environ},
        seed=seed,
    )


def _judge_settings(options: JudgeOptions) -> dict[str, Any]:
    """What a run records of its judge: everything but the key."""
    return {
        "judge": options.judge,
        "model": options.judge_model or options.environ.get("JUDGE_MODEL") or None,
        "mode": options.mode,
    }


def _judge_factory(
    trait: Any, chat_model: ChatModel, options: JudgeOptions, report: Report
) -> Callable[[], Any]:
    from persona_lora.experiments.judging import check_judge, make_judge

    check_judge(trait, chat_model, options)
    return lambda: make_judge(trait, chat_model, options, report)


def _split(split: str) -> Any:
    if split not in ("eval", "extract"):
        raise UserError(f"--split must be eval or extract, got {split!r}")
    return split


def _numbers(text: str) -> list[float]:
    from persona_lora.core.lora_diff import finite_coefficient

    words = text.replace(",", " ").split()
    try:
        return [finite_coefficient(float(word)) for word in words]
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f'--coefficients must be numbers, as in "-1 0 1", got {text!r}') from error


@contextmanager
def _progress() -> Iterator[Report]:
    """Yield a callback that shows one bar for every stage of the work."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def _interval_cells(interval: Interval) -> list[str]:
    from persona_lora.analysis import wording

    return [
        wording.number(interval.mean, 1),
        f"{wording.number(interval.low, 1)} … {wording.number(interval.high, 1)}",
        str(interval.n_questions),
        f"{interval.n}/{round(interval.n / interval.coverage)}" if interval.coverage else "0",
    ]


def _sweep_table(summary: SweepSummary) -> Table:
    from persona_lora.analysis import wording

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("c", "trait", "95%", "coherent", "scored", "‖cΔW‖/‖W‖", "KL p95"):
        table.add_column(heading, no_wrap=True)
    for condition in summary.conditions:
        mean, interval, _, scored = _interval_cells(condition.trait)
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


def main() -> None:
    """Run the command line; a mistake the user can mend is one line and exit status 2."""
    try:
        app(standalone_mode=False)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except UserError as error:
        _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; run the same command again to go on", 130)
    except typer.TyperException as error:
        if not error.format_message():  # a command was left out, and the help page is shown
            sys.exit(2)
        _fail(error.format_message(), 2)


def _fail(message: str, status: int) -> None:
    Console(stderr=True, highlight=False).print(
        "error: " + " ".join(message.split()), style="red", markup=False, soft_wrap=True
    )
    sys.exit(status)
