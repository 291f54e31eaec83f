"""Commands on finished runs (pack, check, run again), and on whether instruments are right here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from persona_lora.cli import shared_options as shared
from persona_lora.cli.console import progress_bars, show
from persona_lora.cli.program import OPTIONS, TRAINING, app, command
from persona_lora.core.errors import HIDDEN, UserError, few_names
from persona_lora.core.files import read_text, write_text
from persona_lora.core.options import Overwrite
from persona_lora.core.runs import CONFIG, Run, package_versions
from persona_lora.core.settings import read_yaml
from persona_lora.core.traits import load_pairs, load_trait

Archive = Annotated[Path, typer.Argument(help="An archive of pack, or a folder of its files.")]


@command("pack")
def pack(
    *,
    folder: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    output: Annotated[Path | None, "The .zip to write; beside the run by default."] = None,
    overwrite: Overwrite = False,
) -> None:
    """Pack a finished run into one archive: its rows and pages, a card, and every file's digest.

    The same run gives the same bytes. Adapters and other weights stay outside.

    Example: persona-lora pack results/sweep/evil --output evil.zip
    """
    from persona_lora.studies.packing import pack_run

    run = shared.run_folder(folder)
    target = output or run.resolve().with_name(f"{run.resolve().name}.zip")
    left_out, digest = pack_run(run, target, overwrite=overwrite)
    if left_out:
        show(f"not packed, being neither rows nor pages: {few_names(left_out)}")
    show(f"archive: {target}", f"sha256 of its manifest: {digest}")


@command("verify")
def verify(*, archive: Archive) -> None:
    """Check an archive of a run: every file, that the run is finished, the inputs that are here.

    Ends with status 1 where something has changed. Digests say what changed, not who made it.

    Example: persona-lora verify evil.zip
    """
    from persona_lora.report.sections import Table
    from persona_lora.studies.packing import CHANGED, inputs_now

    with _whole_run(archive) as run:
        path = run.folder / CONFIG
        inputs = inputs_now(run.record, read_yaml(path) if path.is_file() else {})
    show("every file is as it was packed, and the run is finished")
    show(Table.of("input | now | looked for", inputs))
    changed = [name for name, state, _ in inputs if state == CHANGED]
    if changed:
        show(f"changed since the run: {', '.join(changed)}")
        raise typer.Exit(1)


@command("reproduce")
def reproduce(*, archive: Archive, output: Annotated[Path, "A new folder for the run."]) -> None:
    """Run the command of an archive again from its options, and compare the rows.

    Paths are those of the options, from the working folder. Ends with status 1 where rows differ.

    Example: persona-lora reproduce evil.zip --output results/again/evil
    """
    from persona_lora.report.sections import Table
    from persona_lora.studies.packing import compare_rows, same_run

    if output.exists():
        raise UserError(f"{output} exists; name a new folder for --output")
    with _whole_run(archive) as run:
        before, now = run.record["versions"], package_versions()
        for name in (each for each in now if before.get(each) != now[each]):
            show(f"another version of {name}: {before.get(name)} then, {now[name]} now")
        _run_again(run, output)
        again, difference = same_run(run, output)
        found = compare_rows(run.folder, again.folder)
    if difference is not None:
        show(f"this is another run than the recorded one: {difference}")
    rows = [
        (name, f"{equal} of {number}", "" if gap is None else f"{gap:.3g}")
        for name, equal, number, gap in found
    ]
    show(Table.of("rows | equal | largest difference of scores", rows))
    if difference is not None or any(each.equal < each.rows for each in found):
        raise typer.Exit(1)


@command("selfcheck")
def selfcheck(
    *,
    trait: Annotated[str, "The trait whose pairs and rated answers judges are shown."] = (
        "sycophancy"
    ),
    datasets_dir: shared.DatasetsDir = None,
    output: shared.RunOptions,
    model: shared.ModelOptions,
) -> None:
    """Is every instrument right on this machine? Each must find what is planted, and no more.

    Directions, labels and an optimum are planted, and the same with their order or directions drawn
    at random beside them. Nothing is trained. Ends with status 1 where an instrument fails.

    Example: persona-lora selfcheck --output results/selfcheck
    """
    from persona_lora.judges.labels import load_ratings
    from persona_lora.projections.inputs import load_ordinary_prompts
    from persona_lora.studies import selfcheck as study

    loaded = load_trait(trait, datasets_dir)
    for read in (load_pairs, load_ratings):  # without which an instrument would seem to fail
        read(loaded)
    prompts = load_ordinary_prompts(datasets_dir)[: study.PROMPTS]
    place = output.at(output.output or Path("results") / "selfcheck")
    chat_model = model.load()
    with progress_bars():
        run = study.selfcheck(chat_model, loaded, prompts, place)
    failed = study.failed_instruments(run)
    said = f"FAILED: {', '.join(failed)}" if failed else "every instrument passed"
    show(study.instruments_table(run), said, f"run: {run.folder}")
    if failed:
        raise typer.Exit(1)


@command("push")
def push(
    *,
    direction: Annotated[Path, typer.Argument(help="A diff's folder, or a vector's file.")],
    repo: Annotated[str, "The repository of the hub: owner/name."],
    base_id: Annotated[str | None, "The base model's id on the hub, where it was a folder."] = None,
    public: Annotated[bool, "Let everybody see the repository; private without."] = False,
    yes: Annotated[bool, "Push. Without it, say what would be pushed."] = False,
) -> None:
    """Push a diff or a vector to a model hub, with a card; without --yes, only show what would be.

    The token is HF_TOKEN of the environment or .env. Paths of this machine stay here.

    Example: persona-lora push checkpoints/evil/diff --repo somebody/evil-diff
    """
    from persona_lora.studies import publishing

    publishing.check_repository(repo)
    with TemporaryDirectory() as place:
        folder = Path(place) / "direction"
        publishing.write_publication(direction, folder, base_id)
        for path in sorted(folder.glob("*")):
            show(f"{path.name}: {path.stat().st_size:,} bytes")
        if not yes:
            show("", read_text(folder / publishing.CARD), "nothing was pushed: add --yes")
            return
        show(publishing.push(folder, repo, private=not public))


@contextmanager
def _whole_run(archive: Path) -> Iterator[Run]:
    """Yield the finished run of an archive; what is wrong with its files ends the command."""
    from persona_lora.core.archives import faults_of, opened
    from persona_lora.studies.packing import finished_run

    with opened(archive) as (folder, damaged):
        faults = faults_of(folder, damaged, archive)
        if faults:
            show(f"{archive} is not as it was packed", *faults)
            raise typer.Exit(1)
        yield finished_run(folder)


def _run_again(run: Run, output: Path) -> None:
    """Run the command of a run into ``output``; UserError where that cannot be done."""
    from persona_lora.studies.packing import command_of

    words = command_of(run.folder)
    if words is None:
        raise UserError(f"the run has no {CONFIG} of a command, so that nothing can be run again")
    flag = "--output_dir" if words in TRAINING else "--output"
    if words not in TRAINING and not any(each.flag == flag for each in OPTIONS.get(words, ())):
        raise UserError(f"{words!r} is no command that writes a run")
    text = read_text(run.folder / CONFIG)
    if HIDDEN in text:
        raise UserError(f"{CONFIG} has a secret taken out ({HIDDEN}); run the command by hand")
    file = Path(str(read_yaml(run.folder / CONFIG).get("output"))).name
    place = output / file if file.endswith(".csv") else output
    with TemporaryDirectory() as folder:
        config = Path(folder) / CONFIG
        write_text(config, text)
        arguments = [*words.split(), "--config", str(config), flag, str(place)]
        status = app(arguments, standalone_mode=False)
    if status:
        raise typer.Exit(status)
