"""Commands about steering vectors: extract them, convert their files."""

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
)
from persona_lora.cli.program import app, vectors_app
from persona_lora.cli.refusals import refuse_useless
from persona_lora.cli.shared_options import (
    BatchOption,
    DatasetsOption,
    JudgeCostOption,
    JudgeModelOption,
    JudgeModeOption,
    JudgeOption,
    JudgeUrlOption,
    LayersOption,
    ModelOptions,
    OverwriteOption,
    SamplesOption,
    SeedOption,
    TemperatureOption,
    TokensOption,
    TraitOption,
)
from persona_lora.core.errors import UserError
from persona_lora.core.runs import Output

if TYPE_CHECKING:
    from persona_lora.studies.vectors.run import Extracted

SOURCES = ("prompts", "answers", "files")
USED_BY = (
    (("files",), "pos_path neg_path"),
    (("prompts", "files"), "positive_threshold negative_threshold coherence_threshold min_pairs"),
    (("prompts",), "assistant_name negative_assistant_name"),
    (("prompts",), "max_new_tokens temperature samples seed batch_size"),
    (("prompts",), "judge judge_model judge_url judge_mode max_judge_cost"),
)


@app.command()
@with_groups
def extract(
    context: typer.Context,
    *,
    trait: TraitOption,
    output: Annotated[
        Path | None, typer.Option(help="The run folder; checkpoints/vectors/<trait> by default.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="prompts (ask, judge, filter), answers (training pairs), or files."),
    ] = None,
    pos_path: Annotated[
        Path | None, typer.Option(help="CSV of judged positive answers (source files).")
    ] = None,
    neg_path: Annotated[
        Path | None, typer.Option(help="CSV of judged negative answers; row i pairs with row i.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="mean_diff, svd, pca, or several with commas between them.")
    ] = "mean_diff",
    position: Annotated[
        str, typer.Option(help="response_avg, prompt_avg, prompt_last, or several.")
    ] = "response_avg,prompt_avg,prompt_last",
    layers: LayersOption = None,
    assistant_name: Annotated[
        str | None,
        typer.Option(help='In "You are an evil assistant."; the trait by default, "" for none.'),
    ] = None,
    negative_assistant_name: Annotated[
        str, typer.Option(help="The same on the negative side.")
    ] = "helpful",
    positive_threshold: Annotated[
        float, typer.Option(help="Least trait score of a positive answer.")
    ] = 50.0,
    negative_threshold: Annotated[
        float, typer.Option(help="A negative answer scores below this.")
    ] = 50.0,
    coherence_threshold: Annotated[float, typer.Option(help="Least coherence of both.")] = 50.0,
    min_pairs: Annotated[int, typer.Option(help="Least pairs that must pass.")] = 10,
    model: ModelOptions,
    judge: JudgeOption = "embedding",
    judge_model: JudgeModelOption = None,
    judge_url: JudgeUrlOption = None,
    judge_mode: JudgeModeOption = "logprobs",
    max_judge_cost: JudgeCostOption = None,
    max_new_tokens: TokensOption = 80,
    temperature: TemperatureOption = 0.0,
    samples: SamplesOption = 1,
    seed: SeedOption = 0,
    batch_size: BatchOption = "auto",
    datasets_dir: DatasetsOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Extract a trait's steering vectors: one direction a layer, for every position and method.

    Example: persona-lora extract --trait evil --source prompts --samples 3 --temperature 1

    Example: persona-lora extract --trait evil --source answers --method mean_diff,svd
    """
    from persona_lora.core.traits import load_trait
    from persona_lora.studies.vectors import run as extraction
    from persona_lora.studies.vectors.judged_pairs import Thresholds

    chosen = source or ("files" if pos_path or neg_path else "prompts")
    if chosen not in SOURCES:
        raise UserError(f"--source must be one of {', '.join(SOURCES)}, got {chosen!r}")
    if chosen == "files" and (pos_path is None or neg_path is None):
        raise UserError("--source files needs both --pos-path and --neg-path")
    others = " ".join(name for source, name in USED_BY if chosen not in source)
    refuse_useless(context, others, f"with --source {chosen}")
    loaded = load_trait(trait, datasets_dir)
    thresholds = Thresholds(positive_threshold, negative_threshold, coherence_threshold, min_pairs)
    generation = generation_options(max_new_tokens, temperature, samples, seed, batch_size)
    judging = judge_options(judge, judge_model, judge_url, judge_mode, max_judge_cost, seed)
    chat_model = load_model(model)
    depth = chat_model.model.config.get_text_config().num_hidden_layers
    options = extraction.ExtractionOptions(
        _words(method), _words(position), layer_numbers(layers, depth) if layers else None
    )
    folder = output or Path("checkpoints") / "vectors" / loaded.label
    with progress_bars():
        if chosen == "answers":
            result = extraction.from_answers(chat_model, loaded, Output(folder, overwrite), options)
        elif pos_path is not None and neg_path is not None:
            result = extraction.from_files(
                chat_model, loaded, pos_path, neg_path, Output(folder, overwrite), options,
                thresholds=thresholds,
            )  # fmt: skip
        else:
            result = extraction.from_prompts(
                chat_model,
                loaded,
                judge_factory(loaded, chat_model, judging),
                judged_output(folder, overwrite, judging),
                options,
                elicitation=extraction.Elicitation(assistant_name, negative_assistant_name),
                thresholds=thresholds,
                generation=generation,
            )
    _show(result)


@vectors_app.command("convert")
def convert_vector(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="A .safetensors of ours, or a published .pt.")],
    target: Annotated[Path, typer.Argument(help="The file to write.")],
    form: Annotated[
        str, typer.Option(help="safetensors, published (.pt), gguf (llama.cpp), or lm-eval (.pt).")
    ],
    layers: LayersOption = None,
    coefficient: Annotated[float, typer.Option(help="lm-eval stores it beside the vector.")] = 1.0,
    model_hint: Annotated[
        str, typer.Option(help="gguf: the model's architecture (llama, qwen2 …).")
    ] = "llama",
) -> None:
    """Convert a steering vector between the forms of this project, papers, llama.cpp and lm-eval.

    Example: persona-lora vectors convert evil_response_avg.safetensors evil.gguf --form gguf
    """
    from persona_lora.core import vector_files as files

    if form != "lm-eval":
        refuse_useless(context, "coefficient", f"with --form {form}")
    if form != "gguf":
        refuse_useless(context, "model_hint", f"with --form {form}")
    vector = files.load_vector(source)
    if layers is not None:
        vector = vector.at(layer_numbers(layers, vector.num_layers))
    if form == "safetensors":
        vector.save(target)
    elif form == "published":
        files.write_published(vector, target)
    elif form == "gguf":
        held = files.write_gguf(vector, target, model_hint=model_hint)
        if len(held) < len(vector.layers):
            console.print("layer 0 was left out: llama.cpp has no place for it")
    elif form == "lm-eval":
        if layers is None:
            raise UserError("lm-eval steers every layer in the file; name those with --layers")
        files.write_lm_eval(vector, target, layers=vector.layers, coefficient=coefficient)
    else:
        raise UserError(f"--form must be safetensors, published, gguf or lm-eval, got {form!r}")
    console.print(f"vector: {target}")


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.replace(",", " ").split()))


def _show(result: Extracted) -> None:
    console.print(f"{result.pairs} of {result.total} pairs kept")
    for reason, count in result.failed.items():
        if count:
            console.print(f"  {count} failed: {reason}")
    layers = next(iter(result.vectors.values())).layers
    shown = [layers[round(at * (len(layers) - 1) / 4)] for at in range(5)]
    shown = list(dict.fromkeys(shown))
    table = Table("vector", *(f"‖v‖ at {layer}" for layer in shown), box=box.SIMPLE_HEAD)
    for name, vector in result.vectors.items():
        norms = vector.norms()
        table.add_row(name, *(f"{norms[layer]:.2f}" for layer in shown))
    console.print(table)
    console.print(f"run: {result.run.folder}")
