"""The sections of a report on persona searches, and on the comparison of methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.fits import (
    ConditionFit,
    Row,
    fits_over_personas,
    fits_over_prompts,
)
from persona_lora.report.sections import Content, ReportOptions, data_uri
from persona_lora.studies.personas.figure import name_of, render_comparison, render_search

EXAMPLE_PROMPTS = 5


@dataclass(frozen=True)
class PersonaBody:
    """The picture, a row for every condition, answers side by side, and the judges' checks."""

    plot: str
    unit: str
    rows: tuple[tuple[str, ...], ...]
    conditions: tuple[str, ...]
    examples: tuple[tuple[str, tuple[str, ...]], ...]
    checks: tuple[str, ...]


def search_content(run: Run, options: ReportOptions) -> Content:
    """Return the section of one search."""
    rows = run.read("held_out")
    fits = fits_over_prompts(rows, "none")
    config = run.record["config"]
    body = PersonaBody(
        data_uri(render_search(run)),
        "prompts",
        tuple(_row(each) for each in fits),
        tuple(name_of(each.condition) for each in fits),
        _examples(rows, [each.condition for each in fits]),
        tuple(_check(row) for row in run.read("judge_checks")),
    )
    title = f"A search for {config['persona']} with {name_of(config['method'])}"
    return Content("report_personas.html.j2", title, _lead(fits, "mean"), body)


def comparison_content(run: Run, options: ReportOptions) -> Content:
    """Return the section of a comparison of methods."""
    rows = run.read("held_out")
    fits = fits_over_personas(rows, "none")
    personas = list(dict.fromkeys(row["persona"] for row in rows))
    shown = [row for row in rows if row["persona"] == personas[0]]
    body = PersonaBody(
        data_uri(render_comparison(run)),
        "personas",
        tuple(_row(each) for each in fits),
        tuple(name_of(each.condition) for each in fits),
        _examples(shown, [each.condition for each in fits]),
        (f"The answers are those for {personas[0]}.",),
    )
    best = max(
        (each for each in fits if each.condition != "none"),
        key=lambda each: each.fit.mean if each.fit.mean is not None else 0.0,
        default=None,
    )
    lead = "" if best is None else _lead(fits, best.condition)
    return Content("report_personas.html.j2", "Ways of giving a person's voice", lead, body)


def _lead(fits: Sequence[ConditionFit], condition: str) -> str:
    """Say what a condition gains over the unsteered model, and whether that is clear."""
    found = {each.condition: each for each in fits}
    plain, steered = found.get("none"), found.get(condition)
    if plain is None or steered is None or steered.difference is None:
        return "There is nothing to compare with."
    gain = steered.difference
    clear = gain.low is not None and gain.high is not None and not gain.low <= 0 <= gain.high
    verdict = "" if clear else " The interval holds 0: the change is not clear."
    name = name_of(condition)
    return (
        f"{name[0].upper()}{name[1:]}: fit {wording.interval(steered.fit, 2)} against "
        f"{wording.interval(plain.fit, 2)} unsteered, a difference of "
        f"{wording.interval(gain, 2)} on held-out prompts.{verdict}"
    )


def _row(each: ConditionFit) -> tuple[str, ...]:
    return (
        name_of(each.condition),
        wording.interval(each.fit, 2),
        str(each.fit.n_questions),
        f"{100 * each.fit.coverage:.0f}%",
        wording.NONE if each.difference is None else wording.interval(each.difference, 2),
        wording.NONE if each.effect_size is None else wording.number(each.effect_size, 2),
        wording.p_value(each.p_holm),
        wording.interval(each.coherence),
        wording.interval(each.relevance),
    )


def _examples(
    rows: Sequence[Row], conditions: Sequence[str]
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the first prompts with the answer of every condition."""
    answers = {(row["prompt_id"], row["condition"]): str(row["answer"]) for row in rows}
    prompts = {row["prompt_id"]: str(row["prompt"]) for row in rows}
    return tuple(
        (prompts[at], tuple(answers.get((at, name), "") for name in conditions))
        for at in sorted(prompts)[:EXAMPLE_PROMPTS]
    )


def _check(row: Row) -> str:
    return (
        f"Judge fitted on {row['fitted_on']} conversations: AUC {row['auc']:.2f} on {row['n_own']} "
        f"unseen utterances of the person against {row['n_others']} of others."
    )
