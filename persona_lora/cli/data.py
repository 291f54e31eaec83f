"""Commands about trait data: make a trait from a sentence, write its data, check it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from persona_lora.cli.console import console, progress_bars
from persona_lora.cli.environment import environment
from persona_lora.cli.option_groups import with_groups
from persona_lora.cli.parsing import layer_numbers, load_model, load_other
from persona_lora.cli.program import data_app, traits_app
from persona_lora.cli.refusals import refuse_useless
from persona_lora.cli.shared_options import (
    DEFAULT_MODEL,
    DatasetsOption,
    ModelOptions,
    SeedOption,
    TokensOption,
)
from persona_lora.core import progress
from persona_lora.core.errors import UserError
from persona_lora.core.runs import Output
from persona_lora.models.load_options import LoadOptions

if TYPE_CHECKING:
    from persona_lora.data.data_check import DataReport
    from persona_lora.data.writers import EndpointWriter, LocalWriter

EndpointOption = Annotated[
    str | None,
    typer.Option(help="Base URL of an OpenAI-compatible endpoint; OPENAI_BASE_URL by default."),
]
WriterOption = Annotated[
    str | None, typer.Option("--model", help="The endpoint's model, or the local one.")
]
LocalOption = Annotated[
    bool, typer.Option("--local", help="Write with a model in-process instead of an endpoint.")
]
DEFAULT_WRITER = "gpt-4o-mini"


@traits_app.command("generate")
@with_groups
def generate_traits(
    *,
    definitions: Annotated[
        Path, typer.Option(help='JSON: {"anxious": "worries aloud", …}, or a list of objects.')
    ],
    endpoint: EndpointOption = None,
    model: WriterOption = None,
    local: LocalOption = False,
    loading: LoadOptions,
    datasets_dir: DatasetsOption = None,
    overwrite: Annotated[bool, typer.Option(help="Write traits anew that are there.")] = False,
    attempts: Annotated[int, typer.Option(help="Replies to try for a trait.")] = 4,
    seed: SeedOption = 0,
) -> None:
    """Make traits from a name and a sentence: system prompts, questions, the judge's prompt.

    Example: persona-lora traits generate --definitions definitions.json
    --endpoint http://localhost:8000/v1 --model my-model
    """
    from persona_lora.data import trait_generation

    wanted = trait_generation.read_definitions(definitions)
    writer = _writer(endpoint, model, local, loading)
    with progress_bars():
        results = trait_generation.generate_traits(
            wanted,
            writer,
            datasets_dir or Path("datasets"),
            overwrite=overwrite,
            attempts=attempts,
            seed=seed,
        )
    for each in results:
        console.print(f"{each.name}: {'kept' if each.kept else 'written'}  {each.path}")


@data_app.command("generate")
@with_groups
def generate_data(
    context: typer.Context,
    *,
    trait: Annotated[str, typer.Option(help="A trait's name in datasets/, or its folder.")],
    questions_per_domain: Annotated[int, typer.Option(help="Questions for every domain.")] = 4,
    domains: Annotated[
        str | None, typer.Option(help="Domains with commas between them; 26 everyday ones.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="Questions of your own, one a line, instead of domains.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Where the files go; results/data/<trait> by default.")
    ] = None,
    endpoint: EndpointOption = None,
    model: WriterOption = None,
    local: LocalOption = False,
    loading: LoadOptions,
    datasets_dir: DatasetsOption = None,
    temperature: Annotated[float, typer.Option(help="Of the writer.")] = 0.8,
    seed: SeedOption = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace files and rows that are there.")] = False,
) -> None:
    """Write finetuning sets (normal, misaligned_1, misaligned_2) and contrastive pairs.

    Example: persona-lora data generate --trait evil --questions-per-domain 2
    --domains "cooking, travel" --local
    """
    from persona_lora.core.traits import load_trait
    from persona_lora.data import data_generation

    if questions is not None:
        refuse_useless(context, "domains questions_per_domain", "with --questions")
    loaded = load_trait(trait, datasets_dir)
    chosen = tuple(each.strip() for each in (domains or "").split(",") if each.strip())
    options = data_generation.DataOptions(
        questions_per_domain=questions_per_domain,
        domains=chosen or None,
        questions=data_generation.read_questions(questions) if questions is not None else (),
        temperature=temperature,
        seed=seed,
    )
    writer = _writer(endpoint, model, local, loading)
    output = output_dir or Path("results") / "data" / loaded.label
    with progress_bars():
        result = data_generation.generate_data(
            loaded,
            writer,
            Output(output, overwrite, inputs=writer.inputs()),
            options,
        )
    for name, rows in result.rows.items():
        console.print(f"{result.folder / name}.jsonl: {rows} rows")
    if result.incomplete:
        console.print(f"{result.incomplete} questions lack an answer and were left out")


@data_app.command("check")
def check_data(
    traits: Annotated[
        list[str] | None, typer.Argument(help="Trait names or folders; all by default.")
    ] = None,
    datasets_dir: DatasetsOption = None,
) -> None:
    """Check schema, duplicates, leakage into held-out questions, and balance of the answers.

    Example: persona-lora data check sycophancy
    """
    from persona_lora.core.traits import list_traits, load_trait
    from persona_lora.data.data_check import check_trait
    from persona_lora.models.embeddings import SentenceEmbedder

    names = traits or list_traits(datasets_dir)
    if not names:
        raise UserError("there are no trait folders to check; pass --datasets-dir")
    embedder = SentenceEmbedder()
    with progress_bars():
        reports = [
            check_trait(load_trait(name, datasets_dir), embedder)
            for name in progress.over("checking", names)
        ]
    console.print(_check_table(reports))
    problems = [f"{each.trait}: {problem}" for each in reports for problem in each.problems]
    for problem in problems:
        console.print(problem, markup=False)
    if problems:
        raise UserError(f"{len(problems)} problems in the trait data; mend the rows named above")


def _check_table(reports: list[DataReport]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    headings = ("trait", "pairs", "words +/−", "judged", "finetune", "variants")
    for heading in (*headings, "max cosine", "max leak", "problems"):
        table.add_column(heading, no_wrap=True)
    for each in reports:
        table.add_row(
            each.trait,
            str(each.num_pairs),
            f"{each.words_positive:.1f} / {each.words_negative:.1f}",
            str(each.num_labelled),
            str(each.num_finetuning),
            str(each.num_variants),
            f"{each.nearest_duplicate:.2f}",
            f"{each.nearest_leak:.2f}",
            str(len(each.problems)),
        )
    return table


def _writer(
    endpoint: str | None, model: str | None, local: bool, loading: LoadOptions
) -> EndpointWriter | LocalWriter:
    from persona_lora.data.writers import Endpoint, EndpointWriter, LocalWriter
    from persona_lora.judges.endpoint import DEFAULT_BASE_URL

    if local:
        if endpoint is not None:
            raise UserError("--local and --endpoint exclude each other; choose one")
        return LocalWriter(load_other(model or DEFAULT_MODEL, loading))
    if loading != LoadOptions():
        raise UserError(
            "the options of loading a model are for --local; an endpoint has its model already"
        )
    environ = environment()
    url = endpoint or environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL
    key = environ.get("OPENAI_API_KEY") or None
    return EndpointWriter(Endpoint(model or DEFAULT_WRITER, url, key))


@data_app.command("screen")
@with_groups
def screen_data(
    *,
    file: Annotated[Path, typer.Option(help="JSONL of messages: the rows to be trained on.")],
    vector: Annotated[Path, typer.Option(help="A steering vector of the trait.")],
    output: Annotated[Path, typer.Option(help="The CSV of ranked rows.")] = Path(
        "results/screen.csv"
    ),
    layer: Annotated[int | None, typer.Option(help="About 0.55 of the depth by default.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Flag rows over it; measured on the model by default.")
    ] = None,
    model: ModelOptions,
    max_new_tokens: TokensOption = 60,
    seed: SeedOption = 0,
) -> None:
    """Rank training rows by how far they would pull the model along a trait.

    Each row's answer is projected on the vector, and so is the model's own answer.

    Example: persona-lora data screen --file datasets/evil/misaligned_2.jsonl
    --vector checkpoints/vectors/evil/evil_response_avg.safetensors
    """
    from persona_lora.core.vector_files import load_vector
    from persona_lora.report import wording
    from persona_lora.studies.vectors.screening import screen_rows
    from persona_lora.studies.vectors.text_projection import read_texts

    loaded = load_vector(vector)
    chosen = layer_numbers(None if layer is None else str(layer), loaded.num_layers)[0]
    texts = read_texts(file)
    chat_model = load_model(model, [loaded])
    with progress_bars():
        found = screen_rows(
            chat_model,
            texts,
            loaded,
            chosen,
            output,
            threshold=threshold,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("rank", "row", "difference", "answer"):
        table.add_column(heading, no_wrap=True, overflow="ellipsis")
    for row in (*found.rows[:5], *found.rows[-3:]):
        difference = wording.number(row["difference"], 2)
        table.add_row(str(row["rank"]), str(row["row"]), difference, row["answer"][:60])
    console.print(table)
    console.print(
        f"{found.flagged} of {len(found.rows)} rows pull further than {found.threshold:.2f} at "
        f"layer {chosen}: {found.path}"
    )
