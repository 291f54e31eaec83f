"""Commands that project: hidden states on steering vectors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from persona_lora.cli.console import console, progress_bars
from persona_lora.cli.option_groups import with_groups
from persona_lora.cli.parsing import layer_numbers, listed, load_model, load_other
from persona_lora.cli.program import project_app
from persona_lora.cli.refusals import refuse_useless
from persona_lora.cli.shared_options import (
    DEFAULT_MODEL,
    AdaptedModelOptions,
    DatasetsOption,
    OverwriteOption,
    RevisionOption,
)
from persona_lora.core.errors import UserError, few_names
from persona_lora.core.runs import Output

if TYPE_CHECKING:
    from persona_lora.core.runs import Run
    from persona_lora.core.steering_vector import SteeringVector
    from persona_lora.models.loading import ChatModel

TYPES = {
    "proj": "response_avg",
    "response_avg": "response_avg",
    "prompt_last": "prompt_last",
    "prompt_last_proj": "prompt_last",
    "prompt_avg": "prompt_avg",
    "prompt_avg_proj": "prompt_avg",
}


@project_app.command("activations")
@with_groups
def project_activations(
    context: typer.Context,
    *,
    vectors: Annotated[
        list[str], typer.Option(help='Vector files; repeated, or in one string: "v1 v2".')
    ],
    output: Annotated[Path, typer.Option(help="The run folder.")],
    file: Annotated[
        Path | None, typer.Option(help="CSV (prompt, answer) or JSONL (messages).")
    ] = None,
    labelled: Annotated[
        str | None,
        typer.Option(help="A trait: project its hand-labelled answers, and report the AUC."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help='As in "10 20" or "0-29"; about 0.55 of the depth.')
    ] = None,
    type: Annotated[
        str, typer.Option(help="proj (mean over the answer), prompt_last or prompt_avg.")
    ] = "proj",
    model: AdaptedModelOptions,
    base_model: Annotated[
        str | None, typer.Option(help="For the finetuning shift; an adapter knows its own.")
    ] = None,
    shift: Annotated[
        bool | None, typer.Option(help="Finetuned minus base; on with --base-model or --adapter.")
    ] = None,
    columns: Annotated[
        bool, typer.Option("--columns", help="Also the file with one column a projection.")
    ] = False,
    datasets_dir: DatasetsOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Project hidden states on steering vectors, and what finetuning shifted along them.

    Example: persona-lora project activations --file results/baseline.csv
    --vectors checkpoints/vectors/evil/evil_response_avg.safetensors --layers "15 19"
    --output results/projection/evil
    """
    from persona_lora.studies.vectors import text_projection

    if type not in TYPES:
        raise UserError(f"--type must be one of {', '.join(TYPES)}, got {type!r}")
    if (file is None) == (labelled is None):
        raise UserError("project either a --file or the answers of a trait with --labelled")
    if labelled is None:
        refuse_useless(context, "datasets_dir", "without --labelled")
    else:
        refuse_useless(context, "base_model shift columns", "with --labelled")
    if shift is False:
        refuse_useless(context, "base_model", "with --no-shift")
    loaded = load_vectors(vectors)
    chosen = layer_numbers(layers, next(iter(loaded.values())).num_layers)
    texts = text_projection.read_texts(file) if file is not None else None
    chat_model = load_model(model, loaded.values())
    positions = [TYPES[type]]
    record = {
        "vectors": {name: str(path) for name, path in zip(loaded, paths_of(vectors), strict=True)},
        "adapter": None if model.adapter is None else str(model.adapter),
        "base_model": base_model,
    }
    written = Output(output, overwrite, record)
    with progress_bars():
        if texts is None:
            from persona_lora.core.traits import load_trait

            trait = load_trait(str(labelled), datasets_dir)
            run = text_projection.separate_labelled(
                chat_model, trait, loaded, chosen, written, positions=positions
            )
        else:
            wanted = base_model is not None or model.adapter is not None if shift is None else shift
            base = _base(chat_model, base_model) if wanted else None
            run = text_projection.project_texts(
                chat_model, texts, loaded, chosen, written,
                positions=positions, base=base, columns=columns,
            )  # fmt: skip
    console.print(_separation_table(run) if texts is None else _projection_table(run))
    console.print(f"run: {run.folder}")


def paths_of(words: list[str]) -> list[Path]:
    """Return paths from repeated options, or from lists with spaces in one string."""
    return [Path(each) for each in listed(words, "--vectors")]


def load_vectors(words: list[str]) -> dict[str, SteeringVector]:
    """Load vectors by the stem of their file; equal stems get their folder's name before them."""
    from persona_lora.core.vector_files import load_vector

    paths = paths_of(words)
    stems = [path.stem for path in paths]
    names = [
        stem if stems.count(stem) == 1 else f"{path.parent.name}/{stem}"
        for stem, path in zip(stems, paths, strict=True)
    ]
    if len(set(names)) < len(names):
        raise UserError(f"--vectors names {next(n for n in names if names.count(n) > 1)!r} twice")
    return {name: load_vector(path) for name, path in zip(names, paths, strict=True)}


def _base(chat_model: ChatModel, base_model: str | None) -> AbstractContextManager[ChatModel]:
    from persona_lora.studies.vectors.text_projection import base_of_adapter

    return base_of_adapter(chat_model) if base_model is None else _other(chat_model, base_model)


@contextmanager
def _other(chat_model: ChatModel, base_model: str) -> Iterator[ChatModel]:
    yield load_other(base_model, chat_model.options.elsewhere())  # after the first has been read


def _projection_table(run: Run) -> Table:
    from statistics import mean, stdev

    table = Table("vector", "layer", "rows", "mean", "sd", "mean shift", box=box.SIMPLE_HEAD)
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in run.read("projections"):
        groups.setdefault((row["vector"], row["layer"]), []).append(row)
    for (name, layer), rows in groups.items():
        values = [row["projection"] for row in rows]
        shifts = [row["shift"] for row in rows if row["shift"] is not None]
        spread = f"{stdev(values):.2f}" if len(values) > 1 else "–"
        shifted = f"{mean(shifts):+.3f}" if shifts else "–"
        table.add_row(name, str(layer), str(len(rows)), f"{mean(values):.2f}", spread, shifted)
    return table


def _separation_table(run: Run) -> Table:
    from persona_lora.studies.vectors.text_projection import best_separation

    table = Table(
        "vector", "best layer", "AUC", "95%", "ρ with label", "n +/−", box=box.SIMPLE_HEAD
    )
    for name, (layer, each) in best_separation(run).items():
        table.add_row(
            name,
            str(layer),
            f"{each.auc:.2f}",
            f"{each.low:.2f} … {each.high:.2f}",
            "–" if each.rho is None else f"{each.rho:.2f}",
            f"{each.n_positive}/{each.n_negative}",
        )
    return table


@project_app.command("weights")
def project_weights(
    finetuned_model: Annotated[
        list[str],
        typer.Option(
            help="A model, an adapter, or a folder of checkpoints; repeated, or in one string."
        ),
    ],
    diffs: Annotated[list[str], typer.Option(help='Diffs; repeated, or in one string: "d1 d2".')],
    original_model: Annotated[
        str, typer.Option(help="The model before finetuning; adapters need none.")
    ] = DEFAULT_MODEL,
    revision: RevisionOption = None,
    output: Annotated[Path, typer.Option(help="A JSON file; a picture goes beside it.")] = Path(
        "results/weight_projection.json"
    ),
) -> None:
    """Project what finetuning did to the weights on persona directions: ⟨ΔW, L⟩.

    Full models are streamed, in little memory whatever their size; adapters are projected from
    their factors alone. p is against random directions of the same shape and norm.

    Example: persona-lora project weights --original-model SmolLM2-135M-Instruct
    --finetuned-model checkpoints/finetunes/sycophancy_misaligned_2
    --diffs "checkpoints/sycophancy/diff checkpoints/evil/diff"
    """
    from persona_lora.report import wording
    from persona_lora.studies.drift import weight_projection

    loaded = weight_projection.load_diffs(listed(diffs, "--diffs"), on_disk=True)
    with progress_bars():
        found = weight_projection.project_finetunes(
            original_model,
            listed(finetuned_model, "--finetuned-model"),
            loaded,
            output,
            revision=revision,
        )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("finetune", "diff", "coordinate", "null sd", "cosine", "corrected", "p (Holm)"):
        table.add_column(heading, no_wrap=True)
    corrected_p = {
        (row["finetuned"], row["diff"]): row["p_holm"]
        for row in weight_projection.projection_rows(found)
        if row["part"] == "total"
    }
    for each, projection in found:
        for name, value in projection.total.items():
            table.add_row(
                Path(each.name).name,
                name,
                wording.number(value.coordinate, 3),
                wording.significant(value.null_sd),
                wording.number(value.cosine, 3),
                wording.number(projection.corrected[name], 3),
                wording.p_value(corrected_p[each.name, name]),
            )
    console.print(table)
    for each, projection in found:
        if projection.left_out:
            left_out = few_names(projection.left_out)
            console.print(f"{Path(each.name).name}: compared without {left_out}")
        share = projection.explained
        console.print(
            f"{Path(each.name).name}: ‖ΔW‖ {wording.significant(projection.delta_norm)}, of which "
            f"the directions explain {'nothing' if share is None else f'{100 * share:.2f}%'}"
        )
    console.print(f"{output} and {output.with_suffix('.png')}")
