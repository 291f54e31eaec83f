"""Projections of finetunes in weight space: from names and folders to rows and a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_lora.core import progress
from persona_lora.core.adapter_files import ADAPTER_CONFIG
from persona_lora.core.errors import UserError
from persona_lora.core.files import write_json
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.models.weight_files import weights_of
from persona_lora.projections.weight_space import (
    Projection,
    WeightProjection,
    project_adapter,
    project_weights,
)
from persona_lora.report.resampling import holm
from persona_lora.studies.drift.figure import render_weight_projection
from persona_lora.studies.drift.run import find_checkpoints


@dataclass(frozen=True)
class Finetuned:
    """One finetune: a model or an adapter, and its step where it is a checkpoint."""

    name: str
    step: int | None = None


def expand(names: Sequence[str]) -> list[Finetuned]:
    """Return the finetunes that are meant: a folder of checkpoints stands for all of them."""
    found: list[Finetuned] = []
    for name in names:
        folder = Path(name)
        holds = any((folder / each).is_file() for each in (ADAPTER_CONFIG, "config.json"))
        if folder.is_dir() and not holds and any(folder.glob("checkpoint-*")):
            steps = [each for each in find_checkpoints(folder) if each.path is not None]
            found += [Finetuned(str(each.path), each.step) for each in steps]
        else:
            found.append(Finetuned(name))
    return found


def load_diffs(paths: Sequence[Path | str], *, on_disk: bool = False) -> dict[str, LoRADiff]:
    """Open diffs by a name each: the trait, or the path where two are of one trait.

    With ``on_disk`` their factors stay there, for one pass over models that are large.
    """
    loaded = [(str(path), LoRADiff.load(path, on_disk=on_disk)) for path in paths]
    traits = [diff.trait for _, diff in loaded]
    return {
        path if diff.trait is None or traits.count(diff.trait) > 1 else diff.trait: diff
        for path, diff in loaded
    }


def project_finetunes(
    original: str,
    finetuned: Sequence[str],
    diffs: Mapping[str, LoRADiff],
    output: Path,
    *,
    revision: str | None = None,
) -> list[tuple[Finetuned, WeightProjection]]:
    """Project every finetune on every diff; write ``output`` (JSON) and a picture beside it.

    An adapter is projected from its factors alone; a full model is streamed against ``original``
    (of ``revision``, on the hub). p values are corrected over all finetunes and diffs (Holm).
    """
    if output.suffix != ".json":
        raise UserError(f"output must end in .json, got {output}")
    found = []
    for each in expand(finetuned):
        if (Path(each.name) / ADAPTER_CONFIG).is_file():
            found.append((each, project_adapter(LoRADiff.load(each.name), diffs)))
            continue
        before, after = weights_of(original, revision), weights_of(each.name)
        with progress.stage(each.name):
            found.append((each, project_weights(before, after, diffs)))
    rows = projection_rows(found)
    record = {
        "original_model": original,
        "revision": revision,
        "diffs": {name: {"norm": diff.norm(), "trait": diff.trait} for name, diff in diffs.items()},
        "finetuned": [_summary(each, projection) for each, projection in found],
        "rows": rows,
    }
    write_json(output, record)
    render_weight_projection(record).save(output.with_suffix(".png"))
    return found


def projection_rows(
    found: Sequence[tuple[Finetuned, WeightProjection]],
) -> list[dict[str, Any]]:
    """Return long rows: one finetune, one diff, and one part (total, a layer, a kind) each."""
    rows: list[dict[str, Any]] = []
    for each, projection in found:
        parts: list[tuple[str, Any, Mapping[str, Projection]]] = [("total", None, projection.total)]
        parts += [("layer", layer, part) for layer, part in projection.by_layer().items()]
        parts += [("kind", kind, part) for kind, part in projection.by_kind().items()]
        rows += [
            {
                "finetuned": each.name,
                "step": each.step,
                "part": part,
                "of": of,
                "diff": name,
                **dataclasses.asdict(value),
            }
            for part, of, values in parts
            for name, value in values.items()
        ]
    for part in ("total", "layer", "kind"):
        of_part = [row for row in rows if row["part"] == part]
        for row, adjusted in zip(of_part, holm([r["p"] for r in of_part]), strict=True):
            row["p_holm"] = adjusted
    return rows


def _summary(each: Finetuned, projection: WeightProjection) -> dict[str, Any]:
    return {
        "finetuned": each.name,
        "step": each.step,
        "delta_norm": projection.delta_norm,
        "outside_norm": projection.other_square**0.5,
        "corrected": projection.corrected,
        "explained": projection.explained,
        "left_out": list(projection.left_out),
    }
