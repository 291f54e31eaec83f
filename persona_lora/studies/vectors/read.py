"""The sections of a report on extractions and projections: vectors, counts, separation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.runs import Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.report import wording
from persona_lora.report.scores import Row, grouped
from persona_lora.report.sections import Block, Content, Facts, Fold, Image, Table
from persona_lora.studies.vectors.figure import (
    render_cosines,
    render_separation,
    render_vectors_over_layers,
)


def extract_content(run: Run) -> Content:
    """Return the section of an extraction; UserError where its vectors, or its diff, are gone."""
    config = run.record["config"]
    name = wording.title_of(str(config.get("variant") or config["trait"]))
    if config.get("form") == "diff":
        return _diff_content(f"{name}: a difference without training", run)
    paths = sorted(run.folder.glob("*.safetensors"))
    vectors = {path.stem: SteeringVector.read(path) for path in paths}
    if not vectors:
        raise UserError(f"{run.folder} holds no vectors; extract them again")
    first = next(iter(vectors.values()))
    middle = first.layers[len(first.layers) * 2 // 3]
    title = f"{name}: steering vectors"
    blocks: list[Block] = [Image.of(render_vectors_over_layers(vectors), f"{title} over layers")]
    if len(vectors) > 1:
        blocks.append(Image.of(render_cosines(vectors, middle), f"{title}: cosines", "small"))
    table = Table.of(
        "Vector | Method | Position | ‖v‖ | Explained | at layer",
        (_vector_row(name, vector, middle) for name, vector in vectors.items()),
        "Vectors",
        "“Explained” is the share of the sum of squares of the paired differences along the "
        "direction (for pca, after centring).",
        narrow=True,
    )
    lead = (
        f"{len(vectors)} vectors from {first.sources.get('pairs', '?')} pairs of answers "
        f"(source: {config['source']}), at {len(first.layers)} layers."
    )
    return Content(title, lead, (*blocks, table, Facts(_counts(first.sources))))


def _diff_content(title: str, run: Run) -> Content:
    diff = LoRADiff.load(run.folder / "diff")
    made_of = diff.sources["task_vector"]
    facts = (
        ("‖L‖, plain", wording.significant(diff.norm())),
        ("Rank", str(diff.rank)),
        ("Modules", str(len(diff.factors))),
        *_counts(made_of),
    )
    lead = (
        f"A difference of rank {diff.rank} in {len(diff.factors)} modules from {made_of['pairs']} "
        f"pairs of answers (source: {run.record['config']['source']})."
    )
    return Content(title, lead, (Facts(facts),))


def project_content(run: Run) -> Content:
    """Return the section of projections."""
    rows = run.read("projections")
    if not rows:
        raise UserError(f"{run.folder} holds no projections; run the projection again")
    separation = run.read("separation")
    config = run.record["config"]
    title = "Projection of hidden states"
    blocks: list[Block] = []
    if len(separation) > 1:
        blocks.append(Image.of(render_separation(separation), title))
    if separation:
        labels = "Answers labelled 75 and more against 25 and less"
        blocks.append(separation_table(separation, labels))
    fold = "Projections by vector and layer"
    blocks.append(Fold(fold, (projections_table(rows),), open=not separation))
    texts = len({row["row"] for row in rows})
    lead = f"{texts} texts of {config['source']} through {config['model']}. {_best(separation)}"
    return Content(title, lead, tuple(blocks))


def projections_table(rows: Sequence[Row]) -> Table:
    """Return the mean projection of the texts on every vector, at every layer, of every type."""
    cells = []
    groups = grouped(rows, lambda row: (row["vector"], row["layer"], row["type"]))
    for (vector, layer, position), own in groups.items():
        values = [row["projection"] for row in own]
        shifts = [row["shift"] for row in own if row["shift"] is not None]
        spread = stdev(values) if len(values) > 1 else None
        shift = wording.signed(mean(shifts), 3) if shifts else wording.NONE
        said = (wording.number(mean(values), 2), wording.number(spread, 2), shift)
        cells.append([vector, str(layer), position, str(len(own)), *said])
    headings = "Vector | Layer | Type | Texts | Mean | SD | Mean shift"
    return Table.of(headings, cells, narrow=True)


def separation_table(rows: Iterable[Row], title: str = "") -> Table:
    """Return how well vectors tell labelled answers apart."""
    columns = "Vector | Layer | Type | AUC [95%] | ρ with label | n +/−"
    return Table.of(columns, map(_separation_row, rows), title, narrow=True)


def _counts(sources: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    counts = {
        "Pairs kept": sources.get("pairs", "not recorded"),
        "Pairs before the filter": sources.get("pairs_before"),
        **{f"Failed: {name}": count for name, count in (sources.get("failed") or {}).items()},
    }
    return tuple((name, str(count)) for name, count in counts.items() if count is not None)


def _vector_row(name: str, vector: SteeringVector, layer: int) -> tuple[str, ...]:
    explained = (vector.sources.get("explained") or {}).get(str(layer))
    share = wording.NONE if explained is None else f"{wording.number(100 * explained)}%"
    norm = wording.number(vector.norms()[layer], 2)
    return (name, vector.method, vector.position, norm, share, str(layer))


def _separation_row(row: Row) -> tuple[str, ...]:
    place = tuple(str(row[name]) for name in ("vector", "layer", "type"))
    counts = f"{row['n_positive']} / {row['n_negative']}"
    return (*place, _auc(row), wording.number(row["rho"], 2), counts)


def _auc(row: Row) -> str:
    return wording.between(row["auc"], row["low"], row["high"], 2)


def _best(separation: Sequence[Row]) -> str:
    if not separation:
        return ""
    best = max(separation, key=lambda row: float(row["auc"]))
    return (
        f"Labelled answers are told apart best at layer {best['layer']} (AUC {_auc(best)}), the "
        f"best of {len(separation)} tried."
    )


# -- in the terminal ---------------------------------------------------------------------------


def norms_table(vectors: Mapping[str, SteeringVector]) -> Table:
    """Return the norms of vectors at five layers from the first to the last."""
    layers = next(iter(vectors.values())).layers
    shown = dict.fromkeys(layers[round(at * (len(layers) - 1) / 4)] for at in range(5))
    norms = {name: vector.norms() for name, vector in vectors.items()}
    return Table.of(
        " | ".join(["vector", *(f"‖v‖ at {layer}" for layer in shown)]),
        ([name, *(f"{each[layer]:.2f}" for layer in shown)] for name, each in norms.items()),
    )


def best_layers(separation: Sequence[Row]) -> Iterator[Row]:
    """Yield the row of every vector at the layer with its largest AUC."""
    for own in grouped(separation, lambda row: row["vector"]).values():
        yield max(own, key=lambda row: row["auc"])
