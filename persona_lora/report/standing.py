"""The first line of every report: pre-registered or exploratory, and on how many seeds it rests.

A run is held to its protocol when it starts (``core/protocol``); what only its rows can tell, how
many of the planned questions were scored at all, is read here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from persona_lora.core.runs import Run
from persona_lora.report.scores import Row

HASH_SHOWN = 12
TRAINED = ("diff", "diffs", "diff_norm", "adapter")  # what a configuration calls a trained LoRA


def standing(run: Run, seeds: int = 1) -> str:
    """Return "Pre-registered (sha256 0f3a…), one seed.", or why the run is exploratory."""
    record = run.record
    protocol, trained = record.get("protocol"), any(map(record["config"].get, TRAINED))
    said = "one seed" if seeds == 1 else f"{seeds} seeds"
    on = f", {said}." if trained or seeds > 1 else "."
    if protocol is None:
        return f"Exploratory{on}"
    named = f"sha256 {protocol['sha256'][:HASH_SHOWN]}…"
    deviated = next(_deviations(run, protocol), None)
    if deviated is None:
        return f"Pre-registered ({named}){on}"
    return f"Exploratory (it deviates from its protocol, {named}: {deviated}){on}"


def _deviations(run: Run, protocol: Row) -> Iterator[str]:
    status = run.record["status"]
    if status != "finished":
        yield f"the run is recorded as “{status}”"
    asked: dict[str, dict[Any, bool]] = {}
    for condition, question, scored in _asked(run):
        questions = asked.setdefault(condition, {})
        questions[question] = scored or questions.get(question, False)
    for condition, questions in asked.items():
        share = sum(questions.values()) / len(questions)
        if share < protocol["least_scored"]:
            yield (
                f"{100 * share:.0f}% of the questions were scored under {condition}, "
                f"{100 * protocol['least_scored']:.0f}% were to be"
            )


def _asked(run: Run) -> Iterator[tuple[str, Any, bool]]:
    """Return the condition and question of every answer of a run, and whether it was scored."""
    parts = [Run(run.folder / row["split"]) for row in run.read("splits")]
    folders = sorted(path.parent for path in run.folder.glob("answers/*/*/run.json"))
    trait = run.record["config"].get("trait")
    for part in [*parts, *map(Run, folders)] or [run]:
        criterion = trait or part.record["config"].get("trait")
        scored = {
            row["row"]
            for row in part.read("verdicts")
            if row["criterion"] == criterion and row["score"] is not None
        }
        for row in part.read("answers"):
            value = "" if row["coefficient"] is None else f" {row['coefficient']:+.3g}"
            place = "" if part is run else f" ({part.folder.relative_to(run.folder)})"
            yield f"{row['method']}{value}{place}", row["question_id"], row["row"] in scored
    for row in run.read("held_out"):
        yield row["condition"], row["prompt_id"], row["score"] is not None
