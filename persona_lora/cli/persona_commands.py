"""Commands about personas: build one, validate their judge, have people rate answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.table import Table

from persona_lora.cli.console import console
from persona_lora.cli.environment import environment
from persona_lora.cli.option_groups import with_groups
from persona_lora.cli.parsing import generation_options, load_model
from persona_lora.cli.program import persona_app
from persona_lora.cli.refusals import refuse_useless
from persona_lora.cli.shared_options import (
    ModelOptions,
    OverwriteOption,
    SeedOption,
    TokensOption,
)
from persona_lora.core.errors import UserError
from persona_lora.core.runs import Output

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from persona_lora.core.personas import Persona

SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")


@persona_app.command("build")
def build_persona(
    id: Annotated[
        str | None, typer.Option(help="The persona's id: the name of its folder.")
    ] = None,
    all: Annotated[
        bool, typer.Option("--all", help="Every folder of --persona-dir, one after the other.")
    ] = False,
    conversations: Annotated[
        Path | None,
        typer.Option(help="A file, or a folder of files; the persona's own folder by default."),
    ] = None,
    speaker: Annotated[str, typer.Option(help="A speaks first (or is the user), or B.")] = "A",
    episode: Annotated[
        str | None, typer.Option(help="Only sessions of this id, where a file holds many.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Representative utterances to show a judge.")] = 10,
    template: Annotated[
        Path | None, typer.Option(help="A judge prompt of your own, with its placeholders.")
    ] = None,
    writer_url: Annotated[
        str | None, typer.Option(help="An endpoint that writes the profile; else from features.")
    ] = None,
    writer_model: Annotated[str | None, typer.Option(help="The endpoint's model.")] = None,
    profile_prompt: Annotated[
        Path | None, typer.Option(help="How to ask for the profile: {features} and {samples}.")
    ] = None,
    persona_dir: Annotated[Path | None, typer.Option(help="Where persona folders are.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make files anew that are there already.")
    ] = False,
) -> None:
    """Make a persona's features, samples, profile and judge prompt from its conversations.

    Read are our own forms, chat JSONL, ConvAI2 / PersonaChat, Multi-Session Chat, Conversation
    Chronicles, LaMP and the files of published personas. With --all a folder that cannot be built
    is named, and the others are.

    Example: persona-lora persona build --id episode-184019_A --conversations chronicles.jsonl
    --episode episode-184019 --speaker A
    """
    from persona_lora.core.errors import checked_name
    from persona_lora.core.files import read_text
    from persona_lora.core.resources import resource_path
    from persona_lora.models.embeddings import SentenceEmbedder
    from persona_lora.profiles import folders
    from persona_lora.profiles.conversations import load_conversations
    from persona_lora.profiles.judge_prompt import DEFAULT_TEMPLATE

    if speaker not in ("A", "B"):
        raise UserError(f"--speaker must be A or B, got {speaker!r}")
    root = persona_dir or Path("personas")
    names = _persona_names(id, conversations, root, all)
    text = DEFAULT_TEMPLATE if template is None else read_text(template)
    write_profile = _profile_writer(writer_url, writer_model, profile_prompt)
    embedder = SentenceEmbedder()

    def build(name: str) -> None:
        folder = root / checked_name(name, "--id")
        built = folders.build_persona(
            folder,
            load_conversations(
                conversations or resource_path(folder),
                speaker="A" if speaker == "A" else "B",
                episode=episode,
            ),
            embedder.embed,
            num_samples=samples,
            template=text,
            write_profile=write_profile,
            overwrite=overwrite,
        )
        console.print(read_text(built.folder / folders.PROFILE).strip())
        console.print(
            f"{built.num_train} training and {built.num_test} held-out utterances in {built.folder}"
        )
        if built.kept:
            kept = ", ".join(built.kept)
            console.print(f"left as they were: {kept} (--overwrite makes them anew)")

    if not all:
        build(names[0])
        return
    _raise_for(_failures(names, build), len(names))


def _persona_names(id: str | None, conversations: Path | None, root: Path, all: bool) -> list[str]:
    """Return the personas that --id or --all asks for."""
    if (id is None) != all:
        raise UserError("give --id, or --all for every folder of --persona-dir")
    if id is not None:
        return [id]
    if conversations is not None:
        raise UserError("--conversations is of one persona; with --all each has its own folder")
    names = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if not names:
        raise UserError(f"{root} holds no persona's folder; give --persona-dir")
    return names


def _failures(names: Sequence[str], work: Callable[[str], None]) -> list[str]:
    """Do the work for every persona; return those that failed, each named with its reason."""
    failed = []
    for name in names:
        try:
            work(name)
        except UserError as error:
            failed.append(name)
            console.print(f"{name}: {error}", style="red", markup=False, soft_wrap=True)
    return failed


def _raise_for(failed: Sequence[str], number: int) -> None:
    if failed:
        raise UserError(
            f"{len(failed)} of {number} personas cannot be used (see above): {', '.join(failed)}"
        )


def _profile_writer(url: str | None, model: str | None, prompt: Path | None) -> Any:
    """Return what writes a profile by an endpoint, or None: sentences made from the features."""
    from persona_lora.core.files import read_text
    from persona_lora.data.profile_writing import DEFAULT_PROMPT, profile_writer
    from persona_lora.data.writers import Endpoint, EndpointWriter

    if url is None and model is None:
        if prompt is not None:
            raise UserError("--profile-prompt needs --writer-url and --writer-model")
        return None
    if url is None or model is None:
        raise UserError("--writer-url and --writer-model go together")
    text = DEFAULT_PROMPT if prompt is None else read_text(prompt)
    key = environment().get("OPENAI_API_KEY")
    return profile_writer(EndpointWriter(Endpoint(model, url, key)), text)


@persona_app.command("lamp")
@with_groups
def lamp(
    context: typer.Context,
    *,
    questions: Annotated[Path, typer.Option(help="LaMP-7 questions (JSON).")],
    outputs: Annotated[Path, typer.Option(help="Their golds (JSON).")],
    optimization: Annotated[
        Path | None, typer.Option(help="A {persona}_optimization.json, whose mix is scored too.")
    ] = None,
    user: Annotated[list[str] | None, typer.Option(help="Only these ids; may be repeated.")] = None,
    output: Annotated[Path, typer.Option(help="The run's folder.")] = Path("results/lamp7"),
    model: ModelOptions,
    trait_vector_dir: Annotated[
        Path, typer.Option(help="Where directions are: {trait}/diff, and vectors/{trait}/.")
    ] = Path("checkpoints"),
    max_new_tokens: TokensOption = 60,
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Score LaMP-7 files by ROUGE: the plain model, the author's texts as prompt, and a mix.

    Example: persona-lora persona lamp --questions dev_questions.json --outputs dev_outputs.json
    --user 70 --optimization optimization_results/70_optimization.json
    """
    from persona_lora.report import wording
    from persona_lora.studies.personas import lamp as experiment
    from persona_lora.studies.personas.bench import load_optimization

    if optimization is None:
        refuse_useless(context, "trait_vector_dir", "without --optimization")
    read = experiment.load_lamp(questions, outputs)
    unknown = sorted(set(user or []) - {each.id for each in read})
    if unknown:
        raise UserError(f"{questions} has no question {unknown[0]!r}")
    chosen = [each for each in read if user is None or each.id in user]
    chat_model = load_model(model)
    speaker, mix = load_optimization(
        chat_model,
        optimization,
        trait_vector_dir,
        generation_options(max_new_tokens, 0.0, 1, seed, "auto"),
    )
    with console.status(f"{len(chosen)} questions"):
        scores = experiment.score_lamp(speaker, chosen, mix, Output(output, overwrite))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("measure", "condition", "F (0–1)", "users", "gain", "p (Holm)"):
        table.add_column(heading, no_wrap=True)
    for measure, fits in scores.fits.items():
        for each in fits:
            table.add_row(
                measure,
                each.condition,
                wording.interval(each.fit, 3),
                str(each.fit.n_questions),
                "" if each.difference is None else wording.interval(each.difference, 3),
                "" if each.p_holm is None else wording.p_value(each.p_holm),
            )
    console.print(table)
    console.print(f"answers and scores: {scores.folder}")


@persona_app.command("validate")
def validate_personas(
    persona_dir: Annotated[Path | None, typer.Option(help="Where persona folders are.")] = None,
    output: Annotated[Path | None, typer.Option(help="A JSON file for the numbers.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the cross-validation.")] = 0,
) -> None:
    """Test the embedded persona judge: does it know who speaks, in conversations it never saw?

    One judge a persona is fitted on the utterances of one split, and meets those of the other.

    Example: persona-lora persona validate --output results/persona_judge.json
    """
    from persona_lora.core.files import write_json
    from persona_lora.core.personas import list_personas, load_persona
    from persona_lora.judges.style_judge import TextFeatures, fit_judges, validate_judges
    from persona_lora.models.embeddings import SentenceEmbedder
    from persona_lora.report import wording

    personas: list[Persona] = []
    names = list_personas(persona_dir)
    bad = _failures(names, lambda name: personas.append(load_persona(name, persona_dir)))
    with console.status("embedding utterances"):
        features = TextFeatures(SentenceEmbedder())
        validations = [
            validate_judges(
                personas, fit_judges(personas, split, features=features, seed=seed), split
            )
            for split in SPLITS
        ]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("persona", *(f"AUC, fitted on {each.fitted_on}" for each in validations)):
        table.add_column(heading, no_wrap=True)
    for persona in personas:
        cells = [wording.number(each.auc[persona.id], 2) for each in validations]
        table.add_row(persona.id, *cells)
    console.print(table)
    for each in validations:
        console.print(
            f"fitted on {each.fitted_on} conversations: top-1 {each.top1:.2f} of "
            f"{each.n_utterances} utterances, {each.top1_conversations:.2f} of "
            f"{each.n_conversations} conversations (chance {each.chance:.2f}); mean AUC "
            f"{each.mean_auc:.2f}"
        )
    if output is not None:
        write_json(output, [dataclasses.asdict(each) for each in validations])
    _raise_for(bad, len(names))


@persona_app.command("sheets")
def rating_sheets(
    run: Annotated[Path, typer.Argument(help="A run of optimize, or comparison/ of a comparison.")],
    id: Annotated[str, typer.Option(help="The persona.")],
    output: Annotated[Path, typer.Option(help="The folder for sheet and key.")],
    conditions: Annotated[
        str | None, typer.Option(help='As in "none lora prompt"; all by default.')
    ] = None,
    prompts: Annotated[int, typer.Option(help="Held-out prompts to show.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the order.")] = 0,
    persona_dir: Annotated[Path | None, typer.Option(help="Where persona folders are.")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write blind rating sheets for people: a CSV, a page to click in, and the key apart.

    Example: persona-lora persona sheets results/personas/comparison --id episode-000101_A
    --conditions "none lora prompt" --output results/sheets
    """
    from persona_lora.core.runs import Run
    from persona_lora.studies.personas.human_ratings import write_sheets

    sheets = write_sheets(
        Run(run),
        Output(output, overwrite),
        persona=id,
        conditions=None if conditions is None else conditions.replace(",", " ").split(),
        prompts=prompts,
        seed=seed,
        personas=persona_dir,
    )
    console.print(f"{sheets.items} answers: {sheets.csv} and {sheets.page}; key: {sheets.key}")


@persona_app.command("ratings")
def read_ratings(
    folder: Annotated[Path, typer.Argument(help="The folder that the sheets were written to.")],
    files: Annotated[list[Path], typer.Argument(help="Rated sheets, one a rater.")],
) -> None:
    """Read rated sheets back: mean ratings by condition, agreement of raters and of the judge.

    Example: persona-lora persona ratings results/sheets ann.csv bob.csv
    """
    from persona_lora.report import wording
    from persona_lora.studies.personas import human_ratings

    found = human_ratings.read_ratings(folder, files)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("condition", "rating (1–5)", "prompts", "ratings"):
        table.add_column(heading, no_wrap=True)
    for name, fit in found.fits.items():
        table.add_row(name, wording.interval(fit, 2), str(fit.n_questions), str(fit.n))
    console.print(table)
    for each in found.agreements:
        kappa = "" if each.kappa is None else f"weighted κ {each.kappa:.2f}, "
        console.print(
            f"{each.first} and {each.second}: {kappa}ρ {wording.number(each.spearman, 2)} over "
            f"{each.n} answers"
        )
