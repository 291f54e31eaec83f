"""Commands about trait data: data check."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.table import Table

from persona_lora.cli.console import console, progress
from persona_lora.cli.options import DatasetsOption
from persona_lora.cli.program import data_app
from persona_lora.core.errors import UserError


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
    with progress() as report:
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
