"""The sections of a report on extractions and projections: vectors, counts, separation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, pstdev
from typing import Any

from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.report import wording
from persona_lora.report.sections import Content, ReportOptions, data_uri
from persona_lora.studies.vectors.figure import (
    render_cosines,
    render_separation,
    render_vectors_over_layers,
)


@dataclass(frozen=True)
class ExtractBody:
    """The vectors of an extraction: pictures, counts of its filter, one row a vector."""

    plots: tuple[str, ...]
    counts: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ProjectBody:
    """Projections: one row for every vector, layer and type, and the AUC where labels were."""

    plot: str | None
    rows: tuple[tuple[str, ...], ...]
    separation: tuple[tuple[str, ...], ...]


def extract_content(run: Run, options: ReportOptions) -> Content:
    """Return the section of an extraction; UserError where its vectors are gone."""
    paths = sorted(run.folder.glob("*.safetensors"))
    vectors = {path.stem: SteeringVector.read(path) for path in paths}
    if not vectors:
        raise UserError(f"{run.folder} holds no vectors; extract them again")
    first = next(iter(vectors.values()))
    middle = first.layers[len(first.layers) * 2 // 3]
    plots = [data_uri(render_vectors_over_layers(vectors))]
    if len(vectors) > 1:
        plots.append(data_uri(render_cosines(vectors, middle)))
    config = run.record["config"]
    trait = str(config.get("variant") or config["trait"])
    return Content(
        template="report_extract.html.j2",
        title=f"{wording.title_of(trait)}: steering vectors",
        lead=f"{len(vectors)} vectors from {first.sources.get('pairs', '?')} pairs of answers "
        f"(source: {config['source']}), at {len(first.layers)} layers.",
        body=ExtractBody(
            tuple(plots),
            _counts(first.sources),
            tuple(_vector_row(name, vector, middle) for name, vector in vectors.items()),
        ),
    )


def project_content(run: Run, options: ReportOptions) -> Content:
    """Return the section of projections."""
    rows = run.read("projections")
    if not rows:
        raise UserError(f"{run.folder} holds no projections; run the projection again")
    separation = run.read("separation")
    config = run.record["config"]
    texts = len({row["row"] for row in rows})
    return Content(
        template="report_project.html.j2",
        title="Projection of hidden states",
        lead=f"{texts} texts of {config['source']} through {config['model']}. {_best(separation)}",
        body=ProjectBody(
            data_uri(render_separation(separation)) if len(separation) > 1 else None,
            _projection_rows(rows),
            tuple(_separation_row(row) for row in separation),
        ),
    )


def _counts(sources: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    failed = sources.get("failed") or {}
    before = sources.get("pairs_before")
    counts = [("Pairs kept", str(sources.get("pairs", "not recorded")))]
    if before is not None:
        counts.append(("Pairs before the filter", str(before)))
    return (*counts, *((f"Failed: {name}", str(count)) for name, count in failed.items()))


def _vector_row(name: str, vector: SteeringVector, layer: int) -> tuple[str, ...]:
    explained = (vector.sources.get("explained") or {}).get(str(layer))
    share = wording.NONE if explained is None else f"{wording.number(100 * explained)}%"
    return (
        name,
        vector.method,
        vector.position,
        wording.number(vector.norms()[layer], 2),
        share,
        str(layer),
    )


def _projection_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], ...]:
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["vector"], row["layer"], row["type"]), []).append(row)
    table = []
    for (vector, layer, position), own in groups.items():
        values = [row["projection"] for row in own]
        shifts = [row["shift"] for row in own if row["shift"] is not None]
        table.append(
            (
                vector,
                str(layer),
                position,
                str(len(own)),
                wording.number(mean(values), 2),
                wording.number(pstdev(values), 2),
                wording.number(mean(shifts), 3) if shifts else wording.NONE,
            )
        )
    return tuple(table)


def _separation_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(row["vector"]),
        str(row["layer"]),
        str(row["type"]),
        f"{wording.number(row['auc'], 2)} "
        f"[{wording.number(row['low'], 2)}, {wording.number(row['high'], 2)}]",
        wording.number(row["rho"], 2),
        f"{row['n_positive']} / {row['n_negative']}",
    )


def _best(separation: Sequence[Mapping[str, Any]]) -> str:
    if not separation:
        return ""
    best = max(separation, key=lambda row: float(row["auc"]))
    return (
        f"Labelled answers are told apart best at layer {best['layer']} (AUC "
        f"{wording.number(best['auc'], 2)} [{wording.number(best['low'], 2)}, "
        f"{wording.number(best['high'], 2)}]), the best of {len(separation)} tried."
    )
