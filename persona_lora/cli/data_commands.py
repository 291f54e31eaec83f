"""Commands about trait data: make a trait from a sentence, write its data, check it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_lora.cli import shared_options as shared
from persona_lora.cli.console import progress_bars, show
from persona_lora.cli.option_groups import refuse_useless
from persona_lora.cli.program import command, environment
from persona_lora.core import progress
from persona_lora.core.errors import UserError
from persona_lora.core.options import DataOptions, Seed
from persona_lora.core.settings import split_lists
from persona_lora.core.traits import list_traits, load_trait
from persona_lora.models.load_options import DEFAULT_MODEL, LoadOptions

if TYPE_CHECKING:
    from persona_lora.data.writers import EndpointWriter, LocalWriter

DEFAULT_WRITER = "gpt-4o-mini"


@dataclass(frozen=True)
class WriterOptions(LoadOptions):
    """The language model that writes: behind an endpoint, or in this process."""

    endpoint: Annotated[
        str | None, "Base URL of an OpenAI-compatible endpoint; OPENAI_BASE_URL by default."
    ] = None
    model: Annotated[str | None, "The endpoint's model, or the local one."] = None
    local: Annotated[bool, "Write with a model in this process instead of an endpoint."] = False

    def open(self) -> EndpointWriter | LocalWriter:
        """Return the writer; UserError for options that exclude each other."""
        from persona_lora.data.writers import Endpoint, EndpointWriter, LocalWriter
        from persona_lora.judges.endpoint import DEFAULT_BASE_URL

        if self.local:
            if self.endpoint is not None:
                raise UserError("--local and --endpoint exclude each other; choose one")
            return LocalWriter(shared.load_other(self.model or DEFAULT_MODEL, self.alone()))
        if self.alone() != LoadOptions():
            raise UserError(
                "the options of loading a model are for --local; an endpoint has its model already"
            )
        environ = environment()
        url = self.endpoint or environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL
        key = environ.get("OPENAI_API_KEY") or None
        return EndpointWriter(Endpoint(self.model or DEFAULT_WRITER, url, key))


@command("traits generate")
def generate_traits(
    *,
    definitions: Annotated[Path, 'JSON: {"anxious": "worries aloud", …}, or a list of objects.'],
    datasets_dir: shared.DatasetsDir = None,
    attempts: Annotated[int, "Replies to try for each trait."] = 4,
    seed: Seed = 0,
    overwrite: Annotated[bool, "Write traits anew that are there."] = False,
    writer: WriterOptions,
) -> None:
    """Make traits from a name and a sentence: system prompts, questions, the judge's prompt.

    Example: persona-lora traits generate --definitions definitions.json
    --endpoint http://localhost:8000/v1 --model my-model
    """
    from persona_lora.data import trait_generation

    wanted = trait_generation.read_definitions(definitions)
    opened, root = writer.open(), datasets_dir or Path("datasets")
    with progress_bars():
        results = trait_generation.generate_traits(
            wanted, opened, root, overwrite=overwrite, attempts=attempts, seed=seed
        )
    for each in results:
        show(f"{each.name}: {'kept' if each.kept else 'written'}  {each.path}")


@command("data generate")
def generate_data(
    *,
    trait: shared.TraitOptions,
    written: DataOptions,
    questions: Annotated[
        Path | None, "Questions of your own, one on each line, instead of domains."
    ] = None,
    output: shared.RunOptions,
    writer: WriterOptions,
) -> None:
    """Write finetuning sets (normal, misaligned_1, misaligned_2) and contrastive pairs.

    They go to results/data/<trait>, unless --output says otherwise.

    Example: persona-lora data generate --trait evil --questions-per-domain 2
    --domains cooking,travel --local
    """
    from persona_lora.data import data_generation

    if questions is not None:
        refuse_useless("domains questions_per_domain", "with --questions")
        own = tuple(data_generation.read_questions(questions))
        written = dataclasses.replace(written, questions=own)
    loaded = trait.load()
    place = output.at(output.output or Path("results") / "data" / loaded.label)
    data_generation.check_generation(loaded, place)
    opened = writer.open()
    with progress_bars():
        place = dataclasses.replace(place, inputs=opened.inputs())
        result = data_generation.generate_data(loaded, opened, place, written)
    for name, rows in result.rows.items():
        show(f"{result.folder / name}.jsonl: {rows} rows")
    if result.incomplete:
        show(f"{result.incomplete} questions lack an answer, or have equal ones; left out")


@command("data check")
def check_data(
    *,
    traits: Annotated[
        list[str] | None, typer.Argument(help="Trait names or folders; all by default.")
    ] = None,
    datasets_dir: shared.DatasetsDir = None,
) -> None:
    """Check schema, duplicates, leakage into held-out questions, and balance of the answers.

    Example: persona-lora data check sycophancy
    """
    from persona_lora.data.data_check import check_table, check_trait, exception_lines
    from persona_lora.models.embeddings import SentenceEmbedder

    names = split_lists(traits or []) or list_traits(datasets_dir)
    if not names:
        raise UserError("there are no trait folders to check; pass --datasets-dir")
    loaded = [load_trait(name, datasets_dir) for name in names]
    embedder = SentenceEmbedder()
    with progress_bars():
        reports = [check_trait(trait, embedder) for trait in progress.over("checking", loaded)]
    problems = [f"{each.trait}: {problem}" for each in reports for problem in each.problems]
    show(check_table(reports), *exception_lines(reports), *problems)
    if problems:
        raise UserError(f"{len(problems)} problems in the trait data; mend the rows named above")
