"""Means and effects corrected for their judge's error, beside the raw ones, as tables.

Knows runs of answers, and of finetunes the base. Refuses to know kinds of studies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.correction import Errors, errors_of, kind_of_model, of_condition
from persona_lora.report.scores import clusters, minus, question_means, score_answers
from persona_lora.report.sections import Table
from persona_lora.report.two_way import Crossed, mean_gap


def means_table(
    columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], errors: Errors
) -> tuple[Table, ...]:
    """Return means of conditions, raw and corrected; nothing where there are no rows."""
    note = (
        "The mean over questions as the judge has it, and put right by how far it misses the "
        f"ratings of answers of the same kind of condition ({', '.join(errors.models)}); the "
        "interval carries both uncertainties (prediction-powered inference, Angelopoulos et al. "
        "2023). Conditions of a kind that was not rated are left out."
    )
    title = "Corrected for the judge’s error"
    return (Table(columns, tuple(rows), title, note),) if rows else ()


def effects_table(rows: Sequence[tuple[str, ...]], models: Sequence[str], said: str = "") -> Table:
    """Return effects, raw and corrected by the ratings of ``models``; ``said`` ends the note."""
    note = (
        "Put right by how far the judge misses the ratings of answers of the same kinds of "
        f"condition ({', '.join(models)}); intervals carry both uncertainties. It is assumed that "
        "the answers at hand are misjudged by as many points as those that were rated: too many "
        f"where their effects are smaller.{said}"
    )
    columns = ("Questions", "Effect", "Raw", "Corrected")[-len(rows[0]) :]
    title = "Effects corrected for the judge’s error"
    return Table(columns, tuple(rows), title, note, narrow=True)


# -- finetunes -----------------------------------------------------------------------------------

OF_FINETUNES = (
    " Rated as finetuned are answers of other finetunes: whether these ones, prevented ones among "
    "them, are misjudged by as much is not known. The same error on both sides, it leaves the "
    "difference of two finetunes as it is."
)


def changes_from(trait: str, runs: Mapping[str, Sequence[Run]], base: str) -> dict[str, Crossed]:
    """Return every model's mean trait minus that of ``base``, paired by question, with its test.

    ``runs`` hold answers and verdicts: one of each training seed of a model, one of the base.
    """
    means = {name: [_means(run, trait) for run in own] for name, own in runs.items()}
    (plain,) = means.pop(base)
    return {name: mean_gap([minus(each, plain) for each in own]) for name, own in means.items()}


def _means(run: Run, trait: str) -> dict[int, float]:
    scored = score_answers(run.read("answers"), run.read("verdicts"), trait)
    return question_means(clusters(scored, trait))


def corrected_finetunes(
    trait: str, runs: Mapping[str, Sequence[Run]], base: str
) -> tuple[Table, ...]:
    """Return ``changes_from`` the base, raw and corrected by errors on finetunes in general.

    Nothing without the base, nor where none was rated; a finetune that is steered on top is of no
    rated kind.
    """
    if base not in runs:
        return ()
    errors, rows = errors_of(runs[base][0], trait), []
    for name, (change, _) in changes_from(trait, runs, base).items():
        kind = kind_of_model(runs[name][0], finetuned=True)
        _, right = of_condition(kind, None, change, errors)
        if right is not None:
            rows.append((f"{name} − {base}", wording.change(change), wording.change(right)))
    return (effects_table(rows, errors.models, OF_FINETUNES),) if rows else ()
