"""The command that compares weight steering with activation steering."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from persona_lora.cli.console import console, progress_bars
from persona_lora.cli.option_groups import with_groups
from persona_lora.cli.parsing import (
    generation_options,
    judge_factory,
    judge_options,
    judged_output,
    layer_numbers,
    load_model,
    numbers,
    question_split,
    steering_positions,
)
from persona_lora.cli.program import app
from persona_lora.cli.refusals import refuse_useless
from persona_lora.cli.shared_options import (
    BatchOption,
    ConfigOption,
    DatasetsOption,
    JudgeCostOption,
    JudgeModelOption,
    JudgeModeOption,
    JudgeOption,
    JudgeUrlOption,
    LayersOption,
    ModelOptions,
    OtherBaseOption,
    OverwriteOption,
    PositionsOption,
    SeedOption,
    TokensOption,
    TraitOption,
)
from persona_lora.core.errors import UserError
from persona_lora.core.options import ComparisonOptions, TimingOptions
from persona_lora.core.runs import Output

if TYPE_CHECKING:
    from persona_lora.studies.steering.read_comparison import Comparison


@app.command("compare")
@with_groups
def compare(
    context: typer.Context,
    *,
    trait: TraitOption,
    diff: Annotated[Path, typer.Option(help="A diff folder or a PEFT adapter.")],
    activation_vector: Annotated[
        Path, typer.Option(help="A steering vector (.safetensors or published .pt).")
    ],
    coefficients: Annotated[
        str, typer.Option(help="Of the diff; the vector is brought to the same divergence.")
    ] = "0.5 1 1.5 2",
    layers: LayersOption = None,
    positions: PositionsOption = "response",
    match: Annotated[
        str, typer.Option(help="What is made equal: mean or p95 of the divergence a token.")
    ] = "mean",
    splits: Annotated[str, typer.Option(help="Question sets to ask.")] = "eval ood",
    max_questions: Annotated[
        int | None, typer.Option(help="Only the first so many questions of each set.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="The run folder; results/compare/<trait>.")
    ] = None,
    latency: Annotated[
        bool, typer.Option("--latency", help="Time all ways of steering as well.")
    ] = False,
    batches: Annotated[str, typer.Option(help="Batch sizes of --latency.")] = "1 8 32",
    rounds: Annotated[int, typer.Option(help="Rounds of --latency.")] = 5,
    spaces: Annotated[
        str | None,
        typer.Option(help='Traits to compare both spaces over: "evil sycophancy hallucination".'),
    ] = None,
    trait_vector_dir: Annotated[
        Path, typer.Option(help="Where --spaces finds {trait}/diff, and vectors/{trait}/.")
    ] = Path("checkpoints"),
    model: ModelOptions,
    judge: JudgeOption = "embedding",
    judge_model: JudgeModelOption = None,
    judge_url: JudgeUrlOption = None,
    judge_mode: JudgeModeOption = "logprobs",
    max_judge_cost: JudgeCostOption = None,
    max_new_tokens: TokensOption = 60,
    seed: SeedOption = 0,
    batch_size: BatchOption = "auto",
    datasets_dir: DatasetsOption = None,
    allow_other_base: OtherBaseOption = False,
    overwrite: OverwriteOption = False,
    config: ConfigOption = None,
) -> None:
    """Compare weight steering with activation steering at equal divergence from the base model.

    A random difference and a random vector stand beside them, and the trait's own prompts. Run
    again, it goes on where it stopped.

    Example: persona-lora compare --trait evil --diff checkpoints/evil/diff --layers 19
    --activation-vector checkpoints/vectors/evil/evil_response_avg.safetensors
    """
    from persona_lora.core.lora_diff import LoRADiff, random_diff_like
    from persona_lora.core.traits import load_trait
    from persona_lora.core.vector_files import load_vector
    from persona_lora.steering.directions import random_like
    from persona_lora.studies.report_page import write_report
    from persona_lora.studies.steering import comparison as experiment
    from persona_lora.studies.steering.calibration import bank_of_methods
    from persona_lora.studies.steering.latency import run_latency
    from persona_lora.studies.steering.spaces import run_spaces, trait_directions

    if match not in ("mean", "p95"):
        raise UserError(f"--match must be mean or p95, got {match!r}")
    if not latency:
        refuse_useless(context, "batches rounds", "without --latency")
    if spaces is None:
        refuse_useless(context, "trait_vector_dir", "without --spaces")
    loaded = load_trait(trait, datasets_dir)
    weights, whole = LoRADiff.load(diff), load_vector(activation_vector)
    vector = whole.at(layer_numbers(layers, whole.num_layers))
    bank = bank_of_methods(
        weights,
        vector,
        random_diff_like(weights, seed),
        random_like(vector, seed),
        steering_positions(positions),
    )
    if spaces is not None and len(vector.layers) > 1:
        raise UserError(f"--spaces compares at one layer; --layers {layers!r} names several")
    timing = TimingOptions(tuple(_whole(batches)), rounds=rounds)
    named = dict.fromkeys([loaded.name, *(spaces or "").replace(",", " ").split()])
    directions = None if spaces is None else trait_directions(list(named), trait_vector_dir)
    judging = judge_options(judge, judge_model, judge_url, judge_mode, max_judge_cost, seed)
    chat_model = load_model(model, [weights, whole], allow_other_base=allow_other_base)
    output = output_dir or Path("results") / "compare" / loaded.name
    with progress_bars():
        found = experiment.compare(
            chat_model,
            loaded,
            bank,
            judge_factory(loaded, chat_model, judging),
            judged_output(
                output,
                overwrite,
                judging,
                {"diff": str(diff), "vector_path": str(activation_vector)},
            ),
            comparing=ComparisonOptions(
                tuple(numbers(coefficients)),
                "mean" if match == "mean" else "p95",
                tuple(question_split(each) for each in splits.replace(",", " ").split()),
                max_questions,
            ),
            options=generation_options(max_new_tokens, 0.0, 1, seed, batch_size),
            datasets=datasets_dir,
        )
        parts = [output]
        if latency:
            parts.append(output / "latency")
            run_latency(
                chat_model,
                loaded,
                bank,
                experiment.levels_of(output),
                Output(parts[-1], overwrite),
                timing=timing,
                datasets=datasets_dir,
            )
        if directions is not None:
            parts.append(output / "spaces")
            run_spaces(
                chat_model,
                *directions,
                vector.layers[0],
                Output(parts[-1], overwrite),
                datasets=datasets_dir,
            )
    write_report(parts, output / "report.html")
    _show(found, output)


def _whole(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise UserError(f'--batches must be like "1 8 32", got {text!r}')
    return [int(word) for word in words]


def _show(found: Comparison, output: Path) -> None:
    from persona_lora.report import wording
    from persona_lora.studies.steering.read import verdict_lines

    for line in verdict_lines(found):
        console.print(line)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("questions", "method", "effect", "weights minus this", "p (Holm)"):
        table.add_column(heading, no_wrap=True)
    for each in found.overall:
        table.add_row(
            each.split,
            each.method,
            wording.interval(each.effect),
            "" if each.difference is None else wording.interval(each.difference),
            "" if each.p_holm is None else wording.p_value(each.p_holm),
        )
    console.print(table)
    console.print(f"report: {output / 'report.html'}")
