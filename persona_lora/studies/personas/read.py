"""The sections of a report on persona searches, and on the comparison of methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.comparisons import ConditionFit, Row
from persona_lora.report.figures import Picture
from persona_lora.report.resampling import FITS
from persona_lora.report.sections import (
    Block,
    Card,
    Cards,
    Content,
    Heading,
    Image,
    Question,
    Table,
)
from persona_lora.report.trust import judge_blocks
from persona_lora.studies.personas.figure import (
    name_of,
    render_comparison,
    render_goal,
    render_search,
    way_of,
)
from persona_lora.studies.personas.read_fits import (
    BOUNDS,
    REAL,
    UNSTEERED,
    WARNING,
    agreement_line,
    condition_fits,
    constraints_line,
    limits_of,
    order_line,
    over_personas,
    rows_of,
    seeds_line,
)
from persona_lora.studies.personas.read_goals import (
    front_line,
    goal_fits,
    goal_line,
    goal_tables,
    is_front,
    sought,
    targets_of,
)

EXAMPLE_PROMPTS = 5


def search_content(run: Run) -> Content:
    """Return the section of one search."""
    config = run.record["config"]
    if "goal" in config:
        return _goal_content(run)
    rows = rows_of(run)
    fits = condition_fits(rows, limits_of(run))
    title = f"A search for {config['persona']} with {way_of(config)}"
    lead = _none_kept(run) + _lead(rows, fits, _best(run))
    checks = [_check(row) for row in run.read("judge_checks")] + _fresh(run)
    return Content(title, lead, _blocks(title, lead, render_search(run), fits, rows, checks))


def _goal_content(run: Run) -> Content:
    rows, config = run.read("held_out"), run.record["config"]
    values, *traits = goal_tables(rows, run, limits_of(run))
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    title = f"A search for {sought(config)} with {way_of(config)}"
    best = next(e for e in goal_fits(rows, config, limits_of(run)) if e.condition == _best(run))
    lines = [constraints_line(best), seeds_line(rows), goal_line(rows, run, best.condition)]
    if is_front(config):
        lines.append(front_line(rows, config, limits_of(run)))
    lead = _none_kept(run) + " ".join(sorted(lines, key=lambda line: not line.startswith(WARNING)))
    note = (
        "Random mix: another for every prompt, as long as the best mix. Intervals: bootstrap over "
        "prompts. p: two-sided sign-flip test on the prompts’ differences from the unsteered "
        "model, corrected over the conditions. "
        f"{'' if is_front(config) else ' '.join(_fresh(run))}"
    )
    blocks: tuple[Block, ...] = (
        Image.of(render_goal(run), f"{title}. {lead}"),
        replace(values, note=note),
        *traits,
        Heading("Answers"),
        Cards(_examples(rows, conditions)),
        *(judge_blocks(run) if targets_of(config) else ()),  # a function is no judge of a trait
    )
    return Content(title, lead, blocks)


def comparison_content(run: Run) -> Content:
    """Return the section of a comparison of methods."""
    rows = rows_of(run)
    fits = condition_fits(rows, limits_of(run), over=over_personas)
    first = rows[0]["persona"]
    ways = [each for each in fits if each.condition not in (UNSTEERED, *BOUNDS)]
    best = max(ways, key=lambda each: each.fit.mean or 0.0, default=None)
    title = "Ways of giving a person's voice"
    lead = order_line(fits) if best is None else _lead(rows, fits, best.condition, len(ways))
    shown = [row for row in rows if row["persona"] == first]
    said = [f"The answers are those for {first}."]
    picture = render_comparison(run)
    return Content(title, lead, _blocks(title, lead, picture, fits, shown, said, "personas"))


def _blocks(
    title: str,
    lead: str,
    picture: Picture,
    fits: Sequence[ConditionFit],
    rows: Sequence[Row],
    checks: Sequence[str],
    unit: str = "prompts",
) -> tuple[Block, ...]:
    """Return the picture, a row for every condition, and answers side by side."""
    columns = (
        *("Condition", "Fit, 1–5 [95%]", f"n {unit}", "Scored", "Counts"),
        *("Change from unsteered [95%]", "d", "p (Holm)", "Coherence [95%]", "Relevance [95%]"),
        "Keeps constraints",
    )
    note = (
        "An answer that does not count (a copy of a training utterance, an echo of the prompt, a "
        "repeat of another answer, broken text, off topic) has a fit of 1. "
        f"Intervals: bootstrap over {unit}. p: two-sided sign-flip test on the {unit}’ mean "
        "differences, corrected over the conditions. d: mean over standard deviation of the "
        "differences. Relevance: the share of the other prompts that an answer is less like than "
        f"its own; 50 by chance.{''.join(f' {check}' for check in checks)}"
    )
    return (
        Image.of(picture, f"{title}. {lead}"),
        Table(columns, tuple(map(_row, fits)), "Fit on held-out prompts", note),
        Heading("Answers"),
        Cards(_examples(rows, [each.condition for each in fits if each.condition != REAL])),
    )


def _best(run: Run) -> str:
    """Return the mix that a search named best: what stood highest on fresh prompts."""
    named = [str(row["best"]) for row in run.read("finalists") if "best" in row]
    if not named:
        raise UserError(
            f"{run.folder} does not say which mix is best; run its optimize command again, which "
            "measures nothing anew"
        )
    return named[0]


def _lead(rows: Sequence[Row], fits: Sequence[ConditionFit], condition: str, ways: int = 1) -> str:
    """Say what the fit is worth, what a condition gains over unsteered, and on how many seeds.

    The condition is the highest of ``ways`` on these rows, where there are several. Warnings come
    first: that judges of two families disagree on a sign is one.
    """
    found = {each.condition: each for each in fits}
    plain, steered = found.get(UNSTEERED), found.get(condition)
    if plain is None or steered is None or steered.difference is None:
        return f"{order_line(fits)} There is nothing to compare with. {agreement_line(rows)}"
    gain, p = steered.difference, steered.p_holm
    why = "" if p is None else f" (p {wording.p_equals(p)}, Holm)"  # two searches have no test
    unclear = wording.unclear(gain, p, scale=FITS)
    verdict = f" The change is not clear: {unclear}." if unclear else ""
    name = name_of(condition)
    chosen = f", the highest of {ways} ways on these prompts" if ways > 1 else ""
    said = (
        f"{name[0].upper()}{name[1:]}{chosen}: fit {wording.interval(steered.fit, 2)} against "
        f"{wording.interval(plain.fit, 2)} unsteered, a difference of "
        f"{wording.interval(gain, 2)} on held-out prompts{why}.{verdict}"
    )
    worth = (agreement_line(rows), order_line(fits), constraints_line(steered))
    lines = (*worth, seeds_line(rows), said)
    return " ".join(sorted(lines, key=lambda line: not line.startswith(WARNING)))


def _row(each: ConditionFit) -> tuple[str, ...]:
    return (
        name_of(each.condition),
        wording.interval(each.fit, 2),
        str(each.fit.n_questions),
        wording.percent(each.fit.coverage),
        wording.percent(each.counted),
        wording.interval(each.difference, 2) + wording.pairs(each.difference, each.fit.n_questions),
        wording.number(each.effect_size, 2),
        wording.p_value(each.p_holm),
        wording.interval(each.coherence),
        wording.interval(each.relevance),
        wording.percent(each.feasible),
    )


def _examples(rows: Sequence[Row], conditions: Sequence[str]) -> tuple[Question, ...]:
    """Return the first prompts with the answer of every condition, and why it does not count."""
    answers = {
        (row["prompt_id"], row["condition"]): (
            name_of(row["condition"])
            + (f" (does not count: {row['failed']})" if row.get("failed") else ""),
            str(row["answer"]),
        )
        for row in rows
    }
    prompts = {row["prompt_id"]: str(row["prompt"]) for row in rows}
    return tuple(
        Question(
            prompts[at],
            tuple(Card(*answers.get((at, name), (name_of(name), ""))) for name in conditions),
        )
        for at in sorted(prompts)[:EXAMPLE_PROMPTS]
    )


def _fresh(run: Run) -> list[str]:
    """Say how the mean and the best few candidates stood on fresh prompts, where one is named."""
    rows = run.read("finalists")
    found = [
        wording.number(row["value"], 2) + (" (breaks the constraints)" if row["violation"] else "")
        for row in rows
    ]
    if not found:
        return []
    kept = "what stands highest there of those that keep the constraints is named best."
    if _none_kept(run):
        kept = "none keeps the constraints, and what breaks them least is named best."
    return [
        f"On fresh prompts, by the judge of the search: the mean {found[0]}, the best candidates "
        f"{', '.join(found[1:])}; {kept}"
    ]


def _none_kept(run: Run) -> str:
    """Return a warning where no mix kept the constraints on fresh prompts; "" where one did."""
    scored = [row for row in run.read("finalists") if row["value"] is not None]
    if not scored or not all(row["violation"] for row in scored):
        return ""
    return f"{WARNING}: on fresh prompts no mix kept the constraints; this one breaks them least. "


def _check(row: Row) -> str:
    return (
        f"Judge fitted on {row['fitted_on']} conversations: AUC {row['auc']:.2f} on {row['n_own']} "
        f"unseen utterances of the person against {row['n_others']} of others."
    )
