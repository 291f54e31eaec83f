"""Commands that ask a model and judge its answers: evaluate, sweep, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from persona_lora.cli.console import console, interval_cells, progress_bars
from persona_lora.cli.option_groups import with_groups
from persona_lora.cli.parsing import (
    activation_settings,
    generation_options,
    judge_factory,
    judge_options,
    judged_output,
    load_activation,
    load_model,
    load_population,
    load_terms,
    numbers,
    question_split,
    steering_method,
)
from persona_lora.cli.program import app
from persona_lora.cli.refusals import refuse_useless
from persona_lora.cli.shared_options import (
    DEFAULT_COEFFICIENTS,
    AdaptedModelOptions,
    BatchOption,
    DatasetsOption,
    JudgeCostOption,
    JudgeModelOption,
    JudgeModeOption,
    JudgeOption,
    JudgeUrlOption,
    LayersOption,
    MethodOption,
    OtherBaseOption,
    OverwriteOption,
    PositionsOption,
    SamplesOption,
    SeedOption,
    SplitOption,
    TemperatureOption,
    TokensOption,
    TraitOption,
    VectorOption,
)
from persona_lora.cli.tables import show_sweep
from persona_lora.core.errors import UserError


@app.command()
@with_groups
def evaluate(
    context: typer.Context,
    *,
    trait: TraitOption,
    output: Annotated[Path, typer.Option(help="The CSV; a run folder goes beside it.")],
    model: AdaptedModelOptions,
    method: MethodOption = None,
    diff: Annotated[list[Path] | None, typer.Option(help="A diff; may be repeated.")] = None,
    vector: VectorOption = None,
    coefficient: Annotated[
        list[float] | None, typer.Option(help="One for each --diff or --vector.")
    ] = None,
    layers: LayersOption = None,
    positions: PositionsOption = "response",
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Project the vectors out instead of adding them.")
    ] = False,
    system_prompt: Annotated[
        str | None, typer.Option(help="pos or neg (the trait's own), or a text.")
    ] = None,
    mode: Annotated[str, typer.Option(help="Diffs: live (unmerged) or merged.")] = "live",
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
    datasets_dir: DatasetsOption = None,
    allow_other_base: OtherBaseOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Ask a trait's held-out questions, judge the answers, write CSV and rows.

    Example: persona-lora evaluate --trait sycophancy --diff checkpoints/sycophancy/diff
    --coefficient 1.0 --output results/sycophancy_1.0.csv
    """
    from persona_lora.core.traits import load_trait
    from persona_lora.studies.asking import run as evaluation

    loaded = load_trait(trait, datasets_dir)
    chosen = steering_method(method, {"lora": diff, "activation": vector, "prompt": system_prompt})
    _refuse_of_other_methods(context, chosen)
    if ablate:
        refuse_useless(context, "coefficient", "with --ablate, which takes directions out whole")
    if chosen == "prompt" and system_prompt is None:
        system_prompt = "pos"
    terms = load_terms(diff or [], coefficient or []) if chosen != "activation" else {}
    activation = (
        load_activation(vector or [], coefficient or [], layers, positions, ablate)
        if chosen == "activation"
        else None
    )
    options = generation_options(max_new_tokens, temperature, samples, seed, batch_size)
    judging = judge_options(judge, judge_model, judge_url, judge_mode, max_judge_cost, seed)
    steering = [*terms, *(activation.vectors if activation else ())]
    chat_model = load_model(model, steering, allow_other_base=allow_other_base)
    record = {
        "diffs": [str(path) for path in diff or []],
        "coefficients": list(terms.values()),
        **activation_settings(vector or [], activation),
        "adapter": None if model.adapter is None else str(model.adapter),
    }
    with progress_bars():
        result = evaluation.evaluate(
            chat_model,
            loaded,
            judge_factory(loaded, chat_model, judging),
            judged_output(output, overwrite, judging, record),
            steering=evaluation.Steering(terms, mode, activation, system_prompt),
            split=question_split(split),
            options=options,
        )
    table = Table("criterion", "mean", "95% interval", "questions", "scored", box=box.SIMPLE_HEAD)
    for criterion, interval in ((trait, result.trait), ("coherence", result.coherence)):
        table.add_row(criterion, *interval_cells(interval))
    console.print(table)
    console.print(f"answers: {result.answers}\nrun:     {result.run}")


# What only some ways of steering use, in evaluate and in sweep.
USED_BY = {
    "lora": "mode coefficient coefficients costs allow_other_base",
    "activation": "layers positions ablate control coefficient coefficients costs allow_other_base",
}


def _refuse_of_other_methods(context: typer.Context, method: str) -> None:
    """UserError for an option that another way of steering uses, and this one does not."""
    own = USED_BY.get(method, "").split()
    others = [name for names in USED_BY.values() for name in names.split() if name not in own]
    refuse_useless(context, " ".join(others), f"with --method {method}")


@app.command()
@with_groups
def sweep(
    context: typer.Context,
    *,
    trait: TraitOption,
    method: MethodOption = None,
    diff: Annotated[
        Path | None, typer.Option(help="A diff folder, a PEFT adapter, or a file of one.")
    ] = None,
    vector: Annotated[
        Path | None, typer.Option(help="A steering vector (.safetensors or published .pt).")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="The run folder; results/sweep/<trait>, or …/<trait>_<method>."),
    ] = None,
    coefficients: Annotated[
        str, typer.Option(help="Coefficients with spaces or commas between them.")
    ] = DEFAULT_COEFFICIENTS,
    layers: LayersOption = None,
    positions: PositionsOption = "response",
    control: Annotated[
        bool | None,
        typer.Option(help="A random direction of the same norm beside a vector; on for one layer."),
    ] = None,
    references: Annotated[
        bool, typer.Option(help="The trait's own system prompts beside the steered rows.")
    ] = True,
    costs: Annotated[
        bool | None, typer.Option(help="Divergence from the unsteered model; on for one layer.")
    ] = None,
    max_questions: Annotated[
        int | None, typer.Option(help="Only the first so many questions of the split.")
    ] = None,
    model: AdaptedModelOptions,
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
    datasets_dir: DatasetsOption = None,
    allow_other_base: OtherBaseOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Steer at many coefficients (and layers) in the same batches; judge, summarise, plot.

    Example: persona-lora sweep --trait sycophancy --diff checkpoints/sycophancy/diff
    --coefficients "-1.5 -1 -0.5 0 0.5 1 1.5"

    Example: persona-lora sweep --trait evil --vector evil_response_avg.safetensors
    --layers 0-29 --coefficients "1 2" --split extract --max-questions 10
    """
    from persona_lora.core.traits import load_trait
    from persona_lora.studies.steering import run as experiment

    loaded = load_trait(trait, datasets_dir)
    options = generation_options(max_new_tokens, temperature, samples, seed, batch_size)
    judging = judge_options(judge, judge_model, judge_url, judge_mode, max_judge_cost, seed)
    chosen = steering_method(method, {"lora": diff, "activation": vector, "prompt": None})
    if method is None and chosen == "none":
        raise UserError("a sweep needs --diff or --vector, or --method prompt or none")
    _refuse_of_other_methods(context, chosen)
    if chosen == "none":
        refuse_useless(context, "references", "with --method none, which asks the plain model")
    population = load_population(
        chosen, diff, vector, numbers(coefficients), layers, positions, control, seed
    )
    one_layer = len(population.bank.record.get("layers", [0])) == 1
    sweeping = experiment.SweepOptions(
        question_split(split),
        references=references and chosen != "none",
        costs=chosen in ("lora", "activation") and (one_layer if costs is None else costs),
        max_questions=max_questions,
    )
    chat_model = load_model(model, population.made, allow_other_base=allow_other_base)
    suffix = "" if chosen == "lora" else f"_{chosen}"
    record = {
        **({"diff": str(diff)} if diff else {"vector_path": str(vector)} if vector else {}),
        "adapter": None if model.adapter is None else str(model.adapter),
    }
    with progress_bars():
        result = experiment.sweep(
            chat_model,
            loaded,
            population,
            judge_factory(loaded, chat_model, judging),
            judged_output(
                output or Path("results") / "sweep" / f"{loaded.name}{suffix}",
                overwrite,
                judging,
                record,
            ),
            sweeping=sweeping,
            options=options,
            datasets=datasets_dir,
        )
    show_sweep(result)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of sweeps.")],
    output: Annotated[Path, typer.Option(help="The HTML file.")] = Path("results/report.html"),
) -> None:
    """Write one self-contained HTML page about one or several sweeps.

    Example: persona-lora report results/sweep/evil results/sweep/sycophancy
    """
    from persona_lora.studies.report_page import write_report

    write_report(runs, output)
    console.print(f"report: {output.resolve()}")


@app.command()
def research_questions(
    results: Annotated[Path, typer.Option(help="Where scripts/reproduce.sh left its runs.")] = Path(
        "results"
    ),
    output: Annotated[Path, typer.Option(help="The page; its pictures go to figures/.")] = Path(
        "docs/results.md"
    ),
) -> None:
    """Answer the five research questions on one page, from the runs that are there.

    Example: persona-lora research-questions --output results/answers.md
    """
    from persona_lora.studies.research_questions import write_research_questions

    missing = write_research_questions(results, output)
    if missing:
        console.print(f"not measured yet: {', '.join(missing)}")
    console.print(f"page: {output.resolve()}")


@app.command()
def paired(
    reference: Annotated[Path, typer.Argument(help="A run of evaluate to compare with.")],
    runs: Annotated[list[Path], typer.Argument(help="Runs of evaluate on the same questions.")],
    output: Annotated[Path | None, typer.Option(help="A CSV for the table.")] = None,
) -> None:
    """Compare runs of evaluate with one of them, paired by question.

    Example: persona-lora paired results/drift/evil/plain results/drift/evil/weights
    """
    from persona_lora.core.files import write_csv
    from persona_lora.core.runs import Run
    from persona_lora.report import wording
    from persona_lora.report.comparisons import RUN_COLUMNS, compare_runs

    # A run may be named by its CSV; a name such as "evil_1.0" keeps its end.
    given = [path.with_suffix("") if path.suffix == ".csv" else path for path in (reference, *runs)]
    first, *others = map(Run, given)
    found = compare_runs(others, first)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("run", "trait", "n", "scored", "difference", "p (Holm)", "coherence"):
        table.add_column(heading, no_wrap=True)
    for each in found:
        gap = each.difference
        table.add_row(
            each.name,
            wording.interval(each.trait, 1),
            str(each.trait.n_questions),
            f"{100 * each.trait.coverage:.0f}%",
            "" if gap is None else wording.interval(gap, 1),
            "" if each.p_holm is None else wording.p_value(each.p_holm),
            wording.interval(each.coherence),
        )
    console.print(table)
    if output is not None:
        write_csv(output, RUN_COLUMNS, [each.cells() for each in found])
