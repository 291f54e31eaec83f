"""One self-contained HTML file on any set of runs: a section each, and what they have in common.

Reads run folders and writes text; nothing is loaded from the network when the file is opened. A
kind of run is a function in ``SECTIONS`` and a template: the function reads the run into a
``Content``, whose ``body`` the template shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from persona_lora.core.errors import UserError
from persona_lora.core.files import write_text
from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.sections import (
    EXAMPLE_COEFFICIENTS,
    WEAK_AUC,
    Content,
    ReportOptions,
    Validation,
    data_uri,
    provenance,
    text_of,
    validations,
)
from persona_lora.studies.drift.figure import render_cross_persona
from persona_lora.studies.drift.read import cross_persona
from persona_lora.studies.drift.read_section import checkpoints_content
from persona_lora.studies.personas.read import comparison_content, search_content
from persona_lora.studies.steering import read_words
from persona_lora.studies.steering.figure import render_sweeps
from persona_lora.studies.steering.read import SweepBody, sweep_content
from persona_lora.studies.steering.read_comparison_section import comparison_section
from persona_lora.studies.steering.read_costs import latency_content, spaces_content
from persona_lora.studies.steering.read_grid import is_grid
from persona_lora.studies.steering.read_grid_section import grid_content
from persona_lora.studies.vectors.read import extract_content, project_content

SECTIONS: dict[str, Callable[[Run, ReportOptions], Content]] = {
    "sweep": sweep_content,
    "evaluate": sweep_content,  # one condition: a sweep of one point
    "grid": grid_content,
    "extract": extract_content,
    "project": project_content,
    "evaluate-checkpoints": checkpoints_content,
    "optimize": search_content,
    "compare-methods": comparison_content,
    "compare": comparison_section,
    "latency": latency_content,
    "spaces": spaces_content,
}


@dataclass(frozen=True)
class Section:
    """One run in the report: what it says, and how far that is to be trusted."""

    anchor: str
    content: Content
    validations: tuple[Validation, ...]
    status: str
    provenance: tuple[tuple[str, str], ...]
    settings: tuple[tuple[str, str], ...]


def run_kind(run: Run) -> str:
    """Return which section a run gets: its command, or "grid" for a sweep over layers."""
    command = str(run.record["command"])
    return "grid" if command == "sweep" and is_grid(run) else command


def write_report(
    runs: Path | Sequence[Path],
    path: Path,
    *,
    coefficients: Sequence[float] = EXAMPLE_COEFFICIENTS,
    seed: int = 0,
) -> Path:
    """Write the report of one or several run folders to ``path`` and return it.

    ``coefficients`` are those whose answers stand side by side; where one was not run, the nearest
    is shown. Raises UserError for a folder that holds no run, or a run of another kind.
    """
    folders = [Path(runs)] if isinstance(runs, str | Path) else [Path(run) for run in runs]
    if not folders:
        raise UserError("no run to report on; name at least one run folder")
    options = ReportOptions(tuple(coefficients), seed)
    sections = [
        _section(Run(folder), f"run-{index}", options)
        for index, folder in enumerate(folders, start=1)
    ]
    template = _environment().get_template("report.html.j2")
    page = template.render(
        sections=sections,
        overview=_overview(sections),
        across=_across([Run(folder) for folder in folders]),
        heading=_heading(sections),
    )
    write_text(Path(path), page)
    return Path(path)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("persona_lora", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["wording"] = wording
    environment.globals["grid_wording"] = read_words
    environment.globals["weak_auc"] = WEAK_AUC
    return environment


def _section(run: Run, anchor: str, options: ReportOptions) -> Section:
    record = run.record
    kind = run_kind(run)
    if kind not in SECTIONS:
        raise UserError(
            f"{run.folder} is a run of {kind!r}; the report shows runs of {', '.join(SECTIONS)}"
        )
    return Section(
        anchor=anchor,
        content=SECTIONS[kind](run, options),
        validations=validations(run),
        status=record["status"],
        provenance=provenance(run, record),
        settings=tuple((key, text_of(value)) for key, value in record["config"].items()),
    )


def _overview(sections: Sequence[Section]) -> str | None:
    """Return the curves of several sweeps in one picture, or None where there are not several."""
    bodies = [section.content.body for section in sections]
    summaries = [body.summary for body in bodies if isinstance(body, SweepBody)]
    return data_uri(render_sweeps(summaries)) if len(summaries) > 1 else None


def _across(runs: Sequence[Run]) -> str | None:
    """Return what several finetunes did to other traits, or None where it cannot be told."""
    finetunes = [run for run in runs if run_kind(run) == "evaluate-checkpoints"]
    told = [run for run in finetunes if run.record["config"].get("finetuned_on") is not None]
    if len(told) < 2 or not cross_persona(told):
        return None
    return data_uri(render_cross_persona(told))


def _heading(sections: Sequence[Section]) -> str:
    sweeps = all(isinstance(section.content.body, SweepBody) for section in sections)
    return f"{len(sections)} {'persona sweeps' if sweeps else 'runs'}"
