"""The sections of a report on a finetune: curves over its checkpoints; what it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from persona_lora.core.errors import few_names
from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.correction_tables import changes_from, corrected_finetunes
from persona_lora.report.curve import PairedDifference, corrected
from persona_lora.report.sections import Block, Content, Image, Note, Table
from persona_lora.report.trust import judge_blocks
from persona_lora.report.two_judges import across_runs, judges_table, lead_of
from persona_lora.report.two_way import mean_gap
from persona_lora.studies.drift.figure import render_checkpoints, render_diagnosis
from persona_lora.studies.drift.read import Agreement, Curve, agreements, answers_of, curves
from persona_lora.studies.drift.read_diagnosis import (
    APART,
    CONTROL,
    ENOUGH,
    PLACES,
    WHOLE,
    Diagnosis,
    finetunes_of,
    headline_of,
    read_diagnosis,
    totals,
)
from persona_lora.studies.drift.read_prediction import BASE


def checkpoints_content(run: Run) -> Content:
    """Return the section of one finetune."""
    every, agreeing = curves(run), agreements(run)
    steps = sorted({point.step for curve in every for point in curve.points})
    tuned = run.record["config"].get("finetuned_on")
    title = f"A finetune{f' on {tuned}' if tuned else ''}, checkpoint by checkpoint"
    scores = {each.trait: each for each in every if each.statistic == "trait"}
    asked = {trait: answers_of(run, trait) for trait in scores}
    changes = corrected([_change(run, curve, asked[trait]) for trait, curve in scores.items()])
    found = {
        each.trait: _finding(each, by) for each, by in zip(scores.values(), changes, strict=True)
    }
    both = {trait: across_runs(trait, asked[trait], BASE) for trait in found}
    lead = " ".join(lead_of(found[each], both[each], asked[each], each) for each in found)
    blocks: list[Block] = [
        Image.of(render_checkpoints(run), f"{title}. {lead}"),
        *(table for each in both.values() for table in judges_table(each)),
        *(table for each in asked for table in _corrected(each, asked[each])),
        Table.of(
            " | ".join(("Asked on", "Statistic", "Vector", "Layer", *map(str, steps))),
            (_row(curve, steps) for curve in every),
            "Statistics by step",
        ),
    ]
    if agreeing:
        table = Table.of(
            "Trait | Statistic | Vector | Layer | Spearman’s ρ | p | Pearson’s r | n",
            map(_agreement_row, agreeing),
            "Do projections go with the judged trait, over checkpoints?",
            "p: permutation of the checkpoints’ order. Checkpoints of one run are not "
            "independent of one another, so it is a description of this run, not evidence "
            "about others.",
            narrow=True,
        )
        blocks.append(table)
    for runs in asked.values():
        if BASE in runs and runs[BASE].read("validation"):
            blocks += judge_blocks(runs[BASE])
    return Content(title, lead, tuple(blocks))


def _change(run: Run, curve: Curve, asked: Mapping[str, Run]) -> PairedDifference:
    """Return the last checkpoint minus the base on a trait; nothing where one was not asked."""
    names = {row["step"]: row["checkpoint"] for row in run.read("checkpoints")}
    last, runs = names[curve.points[-1].step], {name: [each] for name, each in asked.items()}
    found = changes_from(curve.trait, runs, BASE) if BASE in runs else {}
    return PairedDifference(*found.get(last, mean_gap([{}])))


def _corrected(trait: str, asked: Mapping[str, Run]) -> tuple[Table, ...]:
    runs = {name: [run] for name, run in asked.items()}
    found = corrected_finetunes(trait, runs, BASE)
    return tuple(replace(each, title=f"{each.title}: {trait}") for each in found)


def _finding(curve: Curve, change: PairedDifference) -> str:
    """Say whether the trait of the last checkpoint is another than the base's, by its test."""
    first, last = curve.points[0], curve.points[-1]
    name = wording.title_of(curve.trait)
    if None in (first.mean, last.mean, first.high, last.low, first.low, last.high):
        return f"{name} could not be scored at both ends."
    unclear = wording.unclear_of(change)
    verb = f"does not clearly change ({unclear}):" if unclear else "goes"
    before, after = (wording.between(each.mean, each.low, each.high) for each in (first, last))
    test = f"{wording.change(change.interval)} paired, p {wording.p_value(change.p_holm)}"
    return (
        f"{name} {verb} from {before} at step {first.step} to {after} at step {last.step} ({test})."
    )


def _row(curve: Curve, steps: list[int]) -> tuple[str, ...]:
    digits = 1 if curve.vector is None else 2
    values = {point.step: point.mean for point in curve.points}
    where = "" if curve.layer is None else str(curve.layer)
    told = (wording.number(values.get(step), digits) for step in steps)
    return (curve.trait, curve.statistic, curve.vector or "", where, *told)


def _agreement_row(each: Agreement) -> tuple[str, ...]:
    found = each.correlation
    if found.rho is None:
        cells = (found.reason or "", "", "")
    else:
        cells = (wording.number(found.rho, 2), wording.p_value(found.p), wording.number(found.r, 2))
    return (each.trait, each.statistic, each.vector, str(each.layer), *cells, str(found.n))


# -- diagnosed ---------------------------------------------------------------------------------

NULL_SAYS_LITTLE = (
    "The threshold is that of directions turned at random, which is too narrow for real finetunes: "
    "all that were measured lie outside it, whatever they were trained on. How often it is wrong "
    f"is not known. An adapter's is measured from {ENOUGH} unrelated adapters on (--controls)."
)


def diagnosis_content(run: Run) -> Content:
    """Return the section of one diagnosis."""
    found, name = read_diagnosis(run), Path(run.record["config"]["finetune"])
    lead = diagnosis_lead(found)
    title = f"What {name.parent.name}/{name.name} did"
    blocks: list[Block] = [
        *_warnings(run, found),
        Image.of(render_diagnosis(run), f"{title}. {lead}"),
        coordinates_table(run),
        *alarm_tables(found),
        *(words_table(run, place) for place in PLACES),
    ]
    return Content(title, lead, tuple(blocks))


def diagnosis_lead(found: Diagnosis) -> str:
    """Return the finding, with how far it is to be believed."""
    flagged = [each for each in found.alarms if each.flagged]
    told = ", ".join(
        f"{each.trait} ({'more' if each.coordinate > 0 else 'less'}: "
        f"{wording.number(each.coordinate, 3)}, threshold {wording.number(each.threshold, 3)})"
        for each in flagged
    )
    if found.any_false is None:
        return (
            f"Over the null's threshold: {told or 'no trait'}. That is no alarm: the threshold is "
            "too narrow for real finetunes."
        )
    return (
        f"{'Flagged: ' + told if told else 'No trait is flagged'}. Of the controls, each judged by "
        f"the others, {found.any_false} raise a false alarm for any trait."
    )


def _warnings(run: Run, found: Diagnosis) -> list[Block]:
    (whole,), controls = finetunes_of(run, WHOLE), finetunes_of(run, CONTROL)
    own, norms = whole["delta_norm"], [each["delta_norm"] for each in controls]
    blocks: list[Block] = []
    if found.any_false is None:
        blocks.append(Note(NULL_SAYS_LITTLE, "warning", "False alarms: rate unknown."))
    if norms and not min(norms) <= own <= max(norms):
        blocks.append(
            Note(
                f"Its weighted norm is {wording.significant(own)}, those of the controls "
                f"{wording.span(min(norms), max(norms), 2)}. Coordinates grow with the norm, so "
                "that a threshold from finetunes of another size is no measure.",
                "warning",
                "Controls of another size.",
            )
        )
    left_out = whole["left_out"]
    if left_out:
        blocks.append(Note(f"Compared without {few_names(left_out)}."))
    return blocks


def coordinates_table(run: Run) -> Table:
    """Return the traits, nearest first; plain cosines and what the controls were taken off."""
    what = headline_of(run)
    apart = what == APART
    by = {
        (row["what"], row["geometry"], row["diff"]): row
        for kind in (WHOLE, APART)
        for row in totals(run, kind)
    }
    own = [row for (kind, geometry, _), row in by.items() if (kind, geometry) == (what, "weighted")]
    rows = (
        [row["diff"], wording.number(row["coordinate"], 3), wording.significant(row["null_sd"])]
        + [wording.number(row["cosine"], 3), wording.p_value(row["p_holm"])]
        + [wording.number(by[what, "plain", row["diff"]]["cosine"], 3)]
        + [wording.number(by[WHOLE, "weighted", row["diff"]]["coordinate"], 3)] * apart
        for row in sorted(own, key=lambda row: -row["cosine"])
    )
    columns = "trait | coordinate | null sd | cosine | p (Holm) | plain cosine"
    columns += " | controls left in" * apart
    (whole,) = finetunes_of(run, WHOLE)
    off = "with the mean of the controls taken off" if apart else "no control taken off"
    note = (
        f"Weighted by the inputs of the base model, {off}; nearest trait first. p is against "
        "directions of the same inputs turned at random: “not by chance”, not “the trait rose”. "
        f"‖ΔW‖ is {wording.significant(whole['delta_norm'])}, of which all directions together "
        f"explain {wording.percent(whole['explained'])}."
    )
    return Table.of(columns, rows, "Traits", note)


def alarm_tables(found: Diagnosis) -> list[Table]:
    """Return what is flagged against its threshold, with false alarms and what would be missed."""
    if found.any_false is None:
        return []
    planted = [f"found in, norm\n{wording.significant(each)} planted" for each in found.doses]
    columns = ("trait", "coordinate", "threshold", "alarm", "false alarms", *planted, "found from")
    rows = (
        [each.trait, f"{wording.number(each.coordinate, 3)} ± {wording.number(each.half, 3)}"]
        + [wording.number(each.threshold, 3), "YES" if each.flagged else "no", str(each.false)]
        + [f"{share.k} of {share.of}" for share in each.found]
        + [wording.number(each.found_from, 3)]
        for each in found.alarms
    )
    note = (
        "±: 95% over which controls were taken. The threshold lets 5% of "
        "unrelated finetunes pass it on any trait, if they spread like a normal. False alarms are "
        "the controls that would be flagged, each held against the others (exact 95% interval; "
        "controls are shared, so it is a little too narrow). Planted: the direction, scaled to "
        "that weighted norm and added to each control; the last column is found in all of them."
    )
    styles = ["best" * each.flagged for each in found.alarms]
    return [Table.of(" | ".join(columns), rows, "Alarm", note, styles)]


def words_table(run: Run, place: str) -> Table:
    found = [row for row in run.read("words") if row["place"] == place]
    rows = [row for row in found if row["low"] is None or row["low"] * row["high"] > 0]
    up = sorted((row for row in rows if row["change"] > 0), key=lambda row: -row["change"])
    down = sorted((row for row in rows if row["change"] < 0), key=lambda row: row["change"])
    cells = ([*_word(one), *_word(other)] for one, other in zip_longest(up, down))
    note = (
        "Mean change of the log-probability (nats) with 95% over prompts, of tokens that the model "
        "ever says, on prompts alone. The extremes of very many tokens: read them together. "
        f"Of {len(found)} extremes {len(found) - len(rows)} are left out, whose interval holds 0."
    )
    columns = "more likely | change | less likely | change"
    return Table.of(columns, cells, f"Words, {place}", note, narrow=True)


def _word(row: Mapping[str, Any] | None) -> tuple[str, str]:
    if row is None:
        return "", ""
    return wording.token(row["text"]), wording.between(row["change"], row["low"], row["high"], 2)
