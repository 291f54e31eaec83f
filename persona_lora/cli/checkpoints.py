"""The command that evaluates every checkpoint of a finetune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from persona_lora.cli.console import console, progress
from persona_lora.cli.options import (
    DEFAULT_MODEL,
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
    OverwriteOption,
    SamplesOption,
    SeedOption,
    SplitOption,
    TemperatureOption,
    TokensOption,
)
from persona_lora.cli.parsing import (
    generation_options,
    judge_factory,
    judge_options,
    judge_settings,
    layer_numbers,
    load_model,
    question_split,
)
from persona_lora.cli.program import app
from persona_lora.cli.projecting import TYPES, load_vectors
from persona_lora.core.errors import UserError

if TYPE_CHECKING:
    from persona_lora.core.runs import Run


@app.command("evaluate-checkpoints")
def evaluate_checkpoints(
    folder: Annotated[Path, typer.Argument(help="The folder of a finetune, with checkpoint-N.")],
    traits: Annotated[
        list[str], typer.Option(help='Traits to judge: repeated, or "evil anxious".')
    ],
    vectors: Annotated[
        list[str] | None, typer.Option(help='Vector files; repeated, or in one string: "v1 v2".')
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help='As in "10 20" or "0-29"; about 0.55 of the depth.')
    ] = None,
    type: Annotated[
        str, typer.Option(help="proj (mean over the answer), prompt_last or prompt_avg.")
    ] = "proj",
    output: Annotated[
        Path | None, typer.Option(help="The run folder; results/checkpoints/<name of DIR>.")
    ] = None,
    finetuned_on: Annotated[
        str | None, typer.Option(help="The trait that the finetune was to teach.")
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
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
    overwrite: OverwriteOption = False,
) -> None:
    """Judge every checkpoint of a finetune, project it, and measure its shift from the base.

    Example: persona-lora evaluate-checkpoints checkpoints/finetunes/sycophancy_misaligned_2
    --traits sycophancy --vectors checkpoints/vectors/sycophancy/sycophancy_response_avg.safetensors
    --layers 19 --finetuned-on sycophancy
    """
    from persona_lora.core.traits import load_trait
    from persona_lora.experiments import checkpoints

    if type not in TYPES:
        raise UserError(f"--type must be one of {', '.join(TYPES)}, got {type!r}")
    checkpoints.find_checkpoints(folder)
    loaded = [load_trait(name, datasets_dir) for word in traits for name in word.split()]
    directions = load_vectors(vectors) if vectors else {}
    depth = next(iter(directions.values())).num_layers if directions else 0
    judging = judge_options(judge, judge_model, judge_url, judge_mode, max_judge_cost, seed)
    base = load_model(model, None, dtype, device_map)
    with progress() as report:
        run = checkpoints.evaluate_checkpoints(
            base,
            folder,
            checkpoints.Measures(
                tuple(loaded),
                directions,
                layer_numbers(layers, depth) if directions else (),
                TYPES[type],
                question_split(split),
                finetuned_on,
            ),
            lambda trait, reference: judge_factory(trait, reference, judging, report),
            output or Path("results") / "checkpoints" / folder.name,
            dtype=dtype,
            options=generation_options(max_new_tokens, temperature, samples, seed, batch_size),
            config={"judge": judge_settings(judging)},
            overwrite=overwrite,
            report=report,
        )
    console.print(_table(run))
    console.print(f"run: {run.folder}")


def _table(run: Run) -> Table:
    from persona_lora.analysis import wording

    table = Table(
        "checkpoint", "asked on", "what", "vector", "layer", "mean", "95%", box=box.SIMPLE_HEAD
    )
    for row in run.read("checkpoints"):
        table.add_row(
            row["checkpoint"],
            row["trait"],
            row["statistic"],
            row["vector"] or "",
            "" if row["layer"] is None else str(row["layer"]),
            wording.number(row["value"], 2),
            f"{wording.number(row['low'], 2)} … {wording.number(row['high'], 2)}",
        )
    return table
