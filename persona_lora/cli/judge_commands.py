"""Commands about judges: score answers that exist, rate answers, fit a judge to ratings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_lora.cli import shared_options as shared
from persona_lora.cli.console import progress_bars, show
from persona_lora.cli.program import command
from persona_lora.core.chat import COHERENCE
from persona_lora.core.errors import UserError, checked_name
from persona_lora.core.files import ensure_writable_folder, refuse_unwritable
from persona_lora.core.options import JudgeChoice, Overwrite
from persona_lora.core.traits import ON_POLICY

if TYPE_CHECKING:
    from persona_lora.judges.fitness import JudgeValidation

AnswersFile = Annotated[Path, "The answers: .jsonl or .csv with question and answer."]


@command("judge score")
def score(
    *,
    trait: shared.TraitOptions,
    file: AnswersFile,
    output: Annotated[Path, "Where to write them with their scores: .jsonl or .csv."],
    overwrite: Overwrite = False,
    judge: JudgeChoice,
    model: shared.ModelOptions,
) -> None:
    """Score answers that exist on a trait and on coherence, and say how fit the judge is.

    The scores stand in columns named after the trait and "coherence"; the last column, "judge",
    says who judged. Without a subcommand, "persona-lora judge" does this. The model is the
    unsteered one; not every judge needs it.

    Example: persona-lora judge --trait sycophancy --file answers.jsonl --output scored.jsonl
    """
    from persona_lora.judges.canaries import show_canaries
    from persona_lora.judges.choice import make_judge
    from persona_lora.judges.labels import AnswerFile, check_output, score_file
    from persona_lora.judges.verdicts import validations_of
    from persona_lora.report.resampling import SCORES, bootstrap_mean
    from persona_lora.report.scores import grouped, unfit_for
    from persona_lora.report.sections import Table
    from persona_lora.report.trust import canaries_tables
    from persona_lora.report.wording import scored

    answers, loaded = AnswerFile.read(file), trait.load()
    check_output(output, answers, loaded.name)
    shared.refuse_to_replace(output, overwrite)
    options = shared.judging_of(judge, [loaded])
    with progress_bars():
        reference = model.load()
        ensure_writable_folder(output.parent)
        made = make_judge(loaded, reference, options)
        validations = validations_of(made, loaded)
        unfit = unfit_for(map(dataclasses.asdict, validations))
        scores = score_file(made, loaded.name, answers, output, unfit)
        canaries = show_canaries(made, loaded, (loaded.name, COHERENCE))
    asked = grouped(range(len(answers.rows)), lambda row: answers.rows[row]["question"])
    cells = []
    for criterion, each in scores.items():
        values = {question: [each[row] for row in rows] for question, rows in asked.items()}
        cells.append([criterion, *scored(bootstrap_mean(values, scale=SCORES))])
    show(Table.of("criterion | mean | 95% interval | questions | scored", cells))
    _show_fitness(validations)
    show(*canaries_tables([dataclasses.asdict(each) for each in canaries]), str(output))


@command("judge rate")
def rate(
    *,
    trait: shared.TraitOptions,
    file: AnswersFile,
    rater: Annotated[str, "Your name: the ratings go into <file>.<rater>.jsonl."],
) -> None:
    """Rate answers in the terminal, blind and in an order of your own: the trait, then sense.

    Both are numbers from 0 to 100; "q" ends the session, and the same command goes on from there.
    What gave an answer is not shown; empty answers are left out. Two raters' files are what "judge
    fit" takes.

    Example: persona-lora judge rate --trait sycophancy --file answers.jsonl --rater ada
    """
    from persona_lora.judges.labels import AnswerFile, RatingSheet, read_rating

    path = file.with_suffix(f".{checked_name(rater, '--rater')}.jsonl")
    loaded, answers = trait.load(), AnswerFile.read(file)
    sheet = RatingSheet(answers, path)
    show(f"{loaded.name}: {loaded.description}")
    waiting = sheet.remaining()
    for number, row in enumerate(waiting, start=1):
        each = answers.exchanges[row]
        show(f"\n{number} of {len(waiting)}", f"Question: {each.question}")
        show(f"Answer: {each.answer}")
        given: list[float] = []
        for asked in (loaded.name, "sense"):
            while len(given) < 1 + (asked == "sense"):
                said = typer.prompt(f"{asked}, 0–100 (q to stop)")
                if said.strip().lower() == "q":
                    show(f"{number - 1} rated now; the same command goes on", str(sheet.path))
                    return
                try:
                    given.append(read_rating(said))
                except UserError as error:
                    show(str(error))
        sheet.add(row, *given)
    show(f"all {len(answers.said)} answers are rated", str(sheet.path))


@command("judge fit")
def fit(
    *,
    trait: shared.TraitOptions,
    file: AnswersFile,
    ratings: Annotated[tuple[str, ...], "Two raters' files, as judge rate writes them."],
    overwrite: Overwrite = False,
    judge_model: Annotated[str | None, "The model that reads; the packaged one by default."] = None,
    model: shared.ModelOptions,
) -> None:
    """Fit the default judge of a trait to rated answers, and say how good it is on the rest.

    Writes onpolicy.jsonl into the trait's folder: a third of the questions is for fitting, the
    others only for telling how good the judge is. From then on --judge reader uses it. Empty
    answers are left out.

    Example: persona-lora judge fit --trait datasets/anxious --file answers.jsonl
    --ratings answers.ada.jsonl,answers.ben.jsonl
    """
    from persona_lora.core.files import write_jsonl
    from persona_lora.judges.answer_states import Reader
    from persona_lora.judges.choice import reading_model
    from persona_lora.judges.fitness import rater_agreement
    from persona_lora.judges.labels import SCALES, AnswerFile, RatingSheet, rated_rows
    from persona_lora.judges.probe import check_enough
    from persona_lora.judges.probe_judge import ProbeJudge, ReaderEvidence
    from persona_lora.report.wording import number

    loaded, answers = trait.load(), AnswerFile.read(file)
    path = loaded.folder / ON_POLICY
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; pass --overwrite to put these ratings in its place")
    refuse_unwritable(path.parent)
    rows = rated_rows([RatingSheet(answers, Path(each)) for each in ratings])
    check_enough([row.question for row in rows if row.part == "tuning"])
    with progress_bars():
        reader = reading_model(judge_model, model.load())
    for scale in SCALES:
        passes = rater_agreement(rows, scale)
        show(
            f"{scale}: the two passes agree with weighted kappa {number(passes.kappa, 2)}, "
            f"ρ {number(passes.spearman, 2)} ({passes.n} answers)"
        )
    with progress_bars():
        made = ProbeJudge.of(ReaderEvidence(Reader(reader, loaded)), rows)
    write_jsonl(path, map(dataclasses.asdict, rows))  # the last: no other file than one that fits
    _show_fitness(made.validation)
    if empty := len(answers.rows) - len(answers.said):
        show(f"empty answers, left out: {empty}")
    show(str(path))


def _show_fitness(found: list[JudgeValidation] | tuple[JudgeValidation, ...]) -> None:
    from persona_lora.report.trust import agreement_table

    show(agreement_table([dataclasses.asdict(each) for each in found]))
