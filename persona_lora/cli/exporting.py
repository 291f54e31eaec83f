"""The command that writes a mix of diffs for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from persona_lora.cli.console import console, progress_bars
from persona_lora.cli.option_groups import with_groups
from persona_lora.cli.program import app
from persona_lora.cli.refusals import refuse_useless
from persona_lora.cli.shared_options import StoredModelOptions
from persona_lora.core import progress
from persona_lora.core.errors import UserError

FORMATS = ("peft", "merged", "gguf-lora", "gguf")


@app.command("export")
@with_groups
def export(
    context: typer.Context,
    *,
    mix: Annotated[
        str, typer.Option(help='Traits or paths with coefficients: "evil=-1,sycophancy=-0.5".')
    ],
    output: Annotated[Path, typer.Option(help="A folder, or a .gguf file.")],
    format: Annotated[str, typer.Option(help="peft, merged, gguf-lora or gguf.")] = "peft",
    rank: Annotated[int | None, typer.Option(help="Cut an adapter to this rank.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Or to this share of its squared norm, as in 0.99.")
    ] = None,
    model: StoredModelOptions,
    trait_vector_dir: Annotated[Path, typer.Option(help="Where diffs are: {trait}/diff.")] = Path(
        "checkpoints"
    ),
    converter: Annotated[
        Path | None, typer.Option(help="llama.cpp's convert_hf_to_gguf.py, for gguf.")
    ] = None,
) -> None:
    """Write a mix of diffs for other tools, with its coefficients baked in.

    peft is one adapter (vLLM, transformers), merged a whole model in the base's own types,
    gguf-lora an adapter for llama.cpp, gguf a whole model by llama.cpp's converter.

    Example: persona-lora export --mix "evil=-1,sycophancy=-0.5" --format peft
    --output exported/candid
    """
    from persona_lora.models.weight_files import weights_folder
    from persona_lora.steering import export as exporting

    if format not in FORMATS:
        raise UserError(f"--format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format in ("merged", "gguf") and (rank is not None or energy is not None):
        raise UserError("--rank and --energy cut adapters; a merged model has no rank")
    if format == "peft":
        refuse_useless(context, "model revision", "with --format peft: the diffs know their base")
    if format != "gguf":
        refuse_useless(context, "converter", f"with --format {format}")
    terms = exporting.read_mix(mix, trait_vector_dir)
    if format == "peft":
        done = exporting.export_peft(terms, output, rank=rank, energy=energy)
    elif format == "gguf-lora":
        base = weights_folder(model.model, model.revision)
        done = exporting.export_gguf_lora(terms, base, output, rank=rank, energy=energy)
    elif format == "gguf":
        done = exporting.export_gguf(
            terms, weights_folder(model.model, model.revision), output, converter=converter
        )
    else:
        with progress_bars(), progress.stage("shards"):
            done = exporting.export_merged(
                terms, weights_folder(model.model, model.revision), output
            )
    console.print(f"{done.path}")
    if done.rank is not None and done.energy is not None:
        vllm = "" if done.vllm_rank is None else f"; vLLM: --max-lora-rank {done.vllm_rank}"
        console.print(f"rank {done.rank}, {100 * done.energy:.2f}% of the squared norm{vllm}")
