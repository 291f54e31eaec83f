"""The command that measures capability before and after steering or finetuning."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from persona_lora.cli.console import console
from persona_lora.cli.option_groups import with_groups
from persona_lora.cli.parsing import load_activation, load_model, load_terms
from persona_lora.cli.program import app
from persona_lora.cli.refusals import refuse_useless
from persona_lora.cli.shared_options import (
    AdaptedModelOptions,
    DatasetsOption,
    LayersOption,
    OtherBaseOption,
    OverwriteOption,
    PositionsOption,
    VectorOption,
)
from persona_lora.core.errors import UserError
from persona_lora.core.options import TaskOptions
from persona_lora.core.runs import Output

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from persona_lora.models.loading import ChatModel
    from persona_lora.report.comparisons import TaskScore


@app.command("benchmark")
@with_groups
def benchmark(
    context: typer.Context,
    *,
    tasks: Annotated[
        str, typer.Option(help="choice, steps, perplexity, or the harness's own: mmlu, gsm8k …")
    ] = "choice steps perplexity",
    diff: Annotated[
        list[Path] | None, typer.Option(help="A diff to steer with; may be repeated.")
    ] = None,
    vector: VectorOption = None,
    coefficient: Annotated[
        list[float] | None, typer.Option(help="One for each diff or vector; 1 by default.")
    ] = None,
    layers: LayersOption = None,
    positions: PositionsOption = "all",
    model: AdaptedModelOptions,
    output: Annotated[Path, typer.Option(help="The run folder.")] = Path("results/benchmark"),
    tasks_dir: Annotated[
        Path | None, typer.Option(help="YAML tasks; datasets/capability by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first items of each task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of the harness's batches.")] = 16,
    datasets_dir: DatasetsOption = None,
    allow_other_base: OtherBaseOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Measure capability before and after steering (or a finetune), item by item.

    The reference is the plain model: without the adapter where one is given, unsteered. Needs the
    extra "benchmark" for tasks of the harness.

    Example: persona-lora benchmark --tasks "choice steps perplexity"
    --diff checkpoints/evil/diff --coefficient 1.0 --output results/benchmark/evil
    """
    from persona_lora.core.content import path_digest
    from persona_lora.studies.asking.capability import run_benchmarks

    if not vector:
        refuse_useless(context, "layers positions", "without --vector")
    if not diff and not vector:
        refuse_useless(context, "coefficient allow_other_base", "without --diff or --vector")
    chat_model = load_model(model, allow_other_base=allow_other_base)
    changed = _steerer(chat_model, diff or [], vector or [], coefficient or [], layers, positions)
    if changed is None and model.adapter is None:
        raise UserError("there is nothing to compare; give --diff, --vector or --adapter")
    conditions: dict[str, AbstractContextManager[Any]] = {
        "plain": _plain(chat_model, model.adapter is not None)
    }
    conditions["changed"] = changed if changed is not None else ExitStack()
    record = {
        "diffs": [str(path) for path in diff or []],
        "vectors": [str(path) for path in vector or []],
        "coefficients": coefficient or [],
        "layers": layers,
        "adapter": None if model.adapter is None else str(model.adapter),
    }
    inputs = {str(path): path_digest(path) for path in [*(diff or []), *(vector or [])]}
    scores = run_benchmarks(
        chat_model,
        conditions,
        TaskOptions(
            tuple(tasks.replace(",", " ").split()), tasks_dir, limit, batch_size, datasets_dir
        ),
        Output(output, overwrite, record, inputs),
    )
    console.print(_table(scores))
    console.print(f"{output / 'scores.csv'}")


def _steerer(
    chat_model: ChatModel,
    diffs: list[Path],
    vectors: list[Path],
    coefficients: list[float],
    layers: str | None,
    positions: str,
) -> Any:
    from persona_lora.steering.bank import steer_merged

    if diffs and vectors:
        raise UserError("a diff and a steering vector do not steer at once; choose one of them")
    if vectors:
        setting = load_activation(vectors, coefficients, layers, positions, ablate=False)
        return setting.steerer(chat_model)
    if diffs:
        return steer_merged(chat_model, load_terms(diffs, coefficients))
    return None


@contextmanager
def _plain(chat_model: ChatModel, wears_adapter: bool) -> Iterator[None]:
    model: Any = chat_model.model
    with model.disable_adapter() if wears_adapter else ExitStack():
        yield


def _table(scores: Sequence[TaskScore]) -> Table:
    from persona_lora.report import wording

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("task", "metric", "condition", "score", "n", "difference", "p (Holm)"):
        table.add_column(heading, no_wrap=True)
    for each in sorted(scores, key=lambda score: (score.task, score.metric)):
        gap = each.difference
        table.add_row(
            each.task,
            each.metric,
            each.condition,
            wording.interval(each.score, 3),
            str(each.score.n),
            "" if gap is None else wording.interval(gap, 3),
            "" if each.p_holm is None else wording.p_value(each.p_holm),
        )
    return table
