"""One self-contained HTML file on any set of runs: a section each, and what they have in common.

Reads run folders and writes text; nothing is loaded from the network when the file is opened. A
kind of run is a function in ``SECTIONS`` that reads the run into a ``Content``, whose blocks the
one template ``page.html.j2`` shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from persona_lora.core.errors import UserError
from persona_lora.core.files import write_text
from persona_lora.core.protocol import Held
from persona_lora.core.runs import Run
from persona_lora.report.sections import (
    Block,
    Content,
    Facts,
    Fold,
    Image,
    Note,
    fill_template,
    provenance,
    text_of,
)
from persona_lora.report.summary import SweepSummary
from persona_lora.report.trust import standing, weak_judges
from persona_lora.studies.drift.figure import render_cross_persona
from persona_lora.studies.drift.read import cross_persona
from persona_lora.studies.drift.read_section import checkpoints_content, diagnosis_content
from persona_lora.studies.personas.read import comparison_content, search_content
from persona_lora.studies.read_seeds import seeds_blocks
from persona_lora.studies.steering.figure import render_sweeps
from persona_lora.studies.steering.read import (
    comparison_section,
    grid_content,
    latency_content,
    side_effects_content,
    sweep_content,
)
from persona_lora.studies.steering.read_grid import is_grid
from persona_lora.studies.steering.read_spaces import spaces_content
from persona_lora.studies.vectors.read import extract_content, project_content

SECTIONS: dict[str, Callable[[Run], Content]] = {
    "sweep": sweep_content,
    "evaluate": sweep_content,  # one condition: a sweep of one point
    "grid": grid_content,
    "extract": extract_content,
    "project": project_content,
    "evaluate-checkpoints": checkpoints_content,
    "diagnose": diagnosis_content,
    "optimize": search_content,
    "compare-methods": comparison_content,
    "compare": comparison_section,
    "latency": latency_content,
    "spaces": spaces_content,
    "side-effects": side_effects_content,
}

DECIDES = (*get_args(Held), "grid")  # and so was planned, or was not


@dataclass(frozen=True)
class Section:
    """One run in the report: what it says, how far that is to be trusted, where it comes from."""

    anchor: str
    content: Content
    weak: bool
    warnings: tuple[Note, ...]
    sources: tuple[Block, ...]


def run_kind(run: Run) -> str:
    """Return which section a run gets: its command, or "grid" for a sweep over layers."""
    command = str(run.record["command"])
    return "grid" if command == "sweep" and is_grid(run) else command


def write_report(runs: Path | Sequence[Path], path: Path) -> Path:
    """Write the report of one or several run folders to ``path`` and return it.

    Raises UserError for a folder that holds no run, or a run of another kind.
    """
    shown = [Run(Path(each)) for each in ([runs] if isinstance(runs, str | Path) else runs)]
    if not shown:
        raise UserError("no run to report on; name at least one run folder")
    sections = [section_of(run, f"run-{index}") for index, run in enumerate(shown, start=1)]
    page = fill_template(
        "page.html.j2",
        sections=sections,
        overview=[*seeds_blocks(shown), *_overview(sections), *_across(shown)],
        heading=f"{len(sections)} {'persona sweeps' if all(map(_is_sweep, sections)) else 'runs'}",
    )
    write_text(Path(path), page)
    return Path(path)


def section_of(run: Run, anchor: str) -> Section:
    """Return what the page says of one run; UserError for a kind of run that it does not show."""
    record, kind = run.record, run_kind(run)
    if kind not in SECTIONS:
        raise UserError(
            f"{run.folder} is a run of {kind!r}; the report shows runs of {', '.join(SECTIONS)}"
        )
    weak = warnings = weak_judges(run)
    if record["status"] != "finished":
        said = (
            f"This run is recorded as “{record['status']}”; what follows covers only the rows it "
        )
        warnings = (*weak, Note(f"{said}has written.", "warning", "Incomplete."))
    settings = tuple((key, text_of(value)) for key, value in record["config"].items())
    content = SECTIONS[kind](run)
    if kind in DECIDES:
        content = replace(content, lead=f"{standing(run)} {content.lead}")
    sources = Facts(provenance(run, record)), Fold("All settings", (Facts(settings),))
    return Section(anchor, content, bool(weak), warnings, sources)


def _overview(sections: Sequence[Section]) -> list[Image]:
    """Return the curves of several sweeps in one picture; nothing where there are not several."""
    summaries = [section.content.subject for section in sections if _is_sweep(section)]
    if len(summaries) < 2:
        return []
    alt = "Trait and coherence against the coefficient, one panel per sweep"
    return [Image.of(render_sweeps(summaries), alt, "")]


def _across(runs: Sequence[Run]) -> list[Image]:
    """Return what several finetunes did to other traits; nothing where it cannot be told."""
    finetunes = [run for run in runs if run_kind(run) == "evaluate-checkpoints"]
    told = [run for run in finetunes if run.record["config"].get("finetuned_on") is not None]
    if len(told) < 2 or not cross_persona(told):
        return []
    alt = "Cosine of vectors against what finetunes did to other traits"
    return [Image.of(render_cross_persona(told), alt, "")]


def _is_sweep(section: Section) -> bool:
    return isinstance(section.content.subject, SweepSummary)
