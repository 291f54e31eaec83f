"""The section of a report on a finetune: curves over its checkpoints, and what agrees."""

from __future__ import annotations

from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.sections import Block, Content, Image, ReportOptions, Table
from persona_lora.report.trust import judge_blocks
from persona_lora.report.two_judges import across_runs, judges_table, lead_of
from persona_lora.studies.drift.figure import render_checkpoints
from persona_lora.studies.drift.read import Agreement, Curve, agreements, answers_of, curves
from persona_lora.studies.drift.read_prediction import BASE


def checkpoints_content(run: Run, options: ReportOptions) -> Content:
    """Return the section of one finetune."""
    every, agreeing = curves(run), agreements(run)
    steps = sorted({point.step for curve in every for point in curve.points})
    tuned = run.record["config"].get("finetuned_on")
    title = f"A finetune{f' on {tuned}' if tuned else ''}, checkpoint by checkpoint"
    found = {each.trait: _finding(each) for each in every if each.statistic == "trait"}
    asked = {trait: answers_of(run, trait) for trait in found}
    both = {trait: across_runs(trait, asked[trait], BASE) for trait in found}
    lead = " ".join(lead_of(found[each], both[each], asked[each], each) for each in found)
    blocks: list[Block] = [
        Image.of(render_checkpoints(run), f"{title}. {lead}"),
        *(table for each in both.values() for table in judges_table(each)),
        Table(
            ("Asked on", "Statistic", "Vector", "Layer", *map(str, steps)),
            tuple(_row(curve, steps) for curve in every),
            "Statistics by step",
        ),
    ]
    if agreeing:
        blocks.append(
            Table(
                ("Trait", "Statistic", "Vector", "Layer", "Spearman’s ρ", "p", "Pearson’s r", "n"),
                tuple(map(_agreement_row, agreeing)),
                "Do projections go with the judged trait, over checkpoints?",
                "p: permutation of the checkpoints’ order. Checkpoints of one run are not "
                "independent of one another, so it is a description of this run, not evidence "
                "about others.",
                narrow=True,
            )
        )
    for runs in asked.values():
        if BASE in runs and runs[BASE].read("validation"):
            blocks += judge_blocks(runs[BASE])
    return Content(title, lead, tuple(blocks))


def _finding(curve: Curve) -> str:
    first, last = curve.points[0], curve.points[-1]
    name = wording.title_of(curve.trait)
    if None in (first.mean, last.mean, first.high, last.low, first.low, last.high):
        return f"{name} could not be scored at both ends."
    apart = (last.low or 0.0) > (first.high or 0.0) or (last.high or 0.0) < (first.low or 0.0)
    verb = "goes" if apart else "does not clearly change (the intervals overlap):"
    before, after = (wording.between(each.mean, each.low, each.high) for each in (first, last))
    return f"{name} {verb} from {before} at step {first.step} to {after} at step {last.step}."


def _row(curve: Curve, steps: list[int]) -> tuple[str, ...]:
    digits = 1 if curve.vector is None else 2
    values = {point.step: point.mean for point in curve.points}
    where = "" if curve.layer is None else str(curve.layer)
    return (
        curve.trait,
        curve.statistic,
        curve.vector or "",
        where,
        *(wording.number(values.get(step), digits) for step in steps),
    )


def _agreement_row(each: Agreement) -> tuple[str, ...]:
    found = each.correlation
    if found.rho is None:
        cells = (found.reason or "", "", "")
    else:
        cells = (wording.number(found.rho, 2), wording.p_value(found.p), wording.number(found.r, 2))
    return (each.trait, each.statistic, each.vector, str(each.layer), *cells, str(found.n))
