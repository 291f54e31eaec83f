"""Every checkpoint of a finetune: asked, judged, projected, and compared with its base.

One row says one statistic of one checkpoint, so that pictures and correlations start from rows on
disk. Answers, verdicts and projections of each checkpoint and trait are kept in runs of their own,
and a killed evaluation goes on with what is missing. Weights are projected apart from all that.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations, takewhile
from pathlib import Path
from typing import Any

from persona_lora.core import progress
from persona_lora.core.adapter_files import ADAPTER_CONFIG
from persona_lora.core.chat import COHERENCE
from persona_lora.core.content import model_folder_digest
from persona_lora.core.errors import UserError, few_names
from persona_lora.core.files import write_csv, write_json
from persona_lora.core.lora_diff import LoRADiff, mix
from persona_lora.core.runs import Output, Run
from persona_lora.core.steering_vector import length_of
from persona_lora.core.traits import Split, Trait, check_names
from persona_lora.judges.judging import Judge
from persona_lora.judges.verdicts import lazily
from persona_lora.models.likelihood import tokenize_rendered
from persona_lora.models.loading import ChatModel, load_chat_model
from persona_lora.models.weight_files import WeightSource, weights_of
from persona_lora.projections.activation_space import Along
from persona_lora.projections.inputs import PLAIN, WEIGHTED, ModuleInputs
from persona_lora.projections.weight_space import (
    Projection,
    WeightProjection,
    project_adapter,
    project_weights,
)
from persona_lora.report import wording
from persona_lora.report.conditions import interval_cells, interval_of
from persona_lora.report.correction import (
    LONG_CORRECTED,
    corrected_cells,
    errors_of,
    kind_of_model,
    of_condition,
)
from persona_lora.report.resampling import Interval, bootstrap_mean, holm
from persona_lora.report.scores import JUDGE, SECOND, SECOND_SUFFIX, grouped, judges_of
from persona_lora.report.sections import Table
from persona_lora.studies.asking.run import (
    Evaluation,
    GenerationOptions,
    contents_of,
    evaluate,
    open_run,
)
from persona_lora.studies.drift.figure import render_checkpoints, render_weight_projection

BASE = "base"
TRAIT_SECOND = f"trait{SECOND_SUFFIX}"
COLUMNS = (
    *("checkpoint", "step", "trait", "statistic", "vector", "layer", "type"),
    *("value", "low", "high", "n", "n_questions", "coverage"),
)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a finetune; step 0 is the base model, whose path is None."""

    name: str
    step: int
    path: Path | None


@dataclass(frozen=True)
class Measures:
    """What is measured of every checkpoint."""

    traits: tuple[Trait, ...]
    along: Along
    split: Split = "eval"
    finetuned_on: str | None = None

    def __post_init__(self) -> None:
        check_names(self.traits)

    def record(self) -> dict[str, Any]:
        """Return the plain values for a run's configuration."""
        return {
            "traits": [trait.name for trait in self.traits],
            "vectors": list(self.along.vectors),
            "layers": list(self.along.layers),
            "type": next(iter(self.along.positions)),
            "split": self.split,
            "finetuned_on": self.finetuned_on,
        }


def find_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the base and every ``checkpoint-N`` of a folder, in the order of their steps.

    A checkpoint is a PEFT adapter or a whole model. Raises UserError where there is none.
    """
    found = [
        Checkpoint(path.name, int(named[1]), path)
        for path in folder.glob("checkpoint-*")
        if (named := re.fullmatch(r"checkpoint-(\d+)", path.name)) and _is_model(path)
    ]
    if not found:
        raise UserError(
            f"{folder} holds no checkpoint-N with an adapter or a model; make some with: "
            "persona-lora finetune --config train_configs/finetune_sycophancy_misaligned_2.yaml"
        )
    return [Checkpoint(BASE, 0, None), *sorted(found, key=lambda each: each.step)]


def _is_model(folder: Path) -> bool:
    return any((folder / each).is_file() for each in (ADAPTER_CONFIG, "config.json"))


def evaluate_checkpoints(
    base: ChatModel,
    folder: Path,
    measures: Measures,
    judge_of: Callable[[Trait, ChatModel], Callable[[], Judge]],
    output: Output | Path,
    *,
    options: GenerationOptions = GenerationOptions(),
) -> Run:
    """Write ``checkpoints.jsonl`` and ``.csv``, ``cosines.jsonl`` and a plot into ``output``.

    ``base`` is the model that was finetuned. ``judge_of`` gives what builds the judge of a trait
    over the base model; each is built once, and only where something is left to judge. A
    checkpoint's answers are projected through the checkpoint and through the base, and the shift
    is the mean difference on the same tokens.
    """
    checkpoints = find_checkpoints(folder)
    measures.along.check(base)
    judges = {trait.name: lazily(judge_of(trait, base)) for trait in measures.traits}
    output = Output.of(output)
    config = {"folder": str(folder), **measures.record(), **vars(options)}
    read = (
        *(trait.inputs() for trait in measures.traits),
        contents_of("vector", measures.along.vectors),
        {each.name: model_folder_digest(each.path) for each in checkpoints if each.path},
    )
    run = open_run(
        output, "evaluate-checkpoints", base, config, *read, seed=options.seed, parts=("answers",)
    )
    with run:
        done = {(row["checkpoint"], row["trait"]) for row in run.resume_rows("checkpoints")}
        for checkpoint in progress.over("checkpoints", checkpoints):
            missing = [t for t in measures.traits if (checkpoint.name, t.name) not in done]
            if not missing:
                continue
            with loaded_checkpoint(base, checkpoint) as model:
                for trait in missing:
                    path = run.folder / "answers" / f"{checkpoint.name}_{trait.name}.csv"
                    made_by = {"checkpoint": checkpoint.name}
                    answers = Output(path, config=made_by, inputs=output.inputs)
                    judge, split = judges[trait.name], measures.split
                    result = evaluate(model, trait, judge, answers, split=split, options=options)
                    place = {**made_by, "step": checkpoint.step, "trait": trait.name}
                    run.extend("checkpoints", _measure(base, model, measures, place, result))
        run.write("cosines", _cosines(measures.along))
        here = {checkpoint.name for checkpoint in checkpoints}
        rows = [row for row in run.read("checkpoints") if row["checkpoint"] in here]
        run.write("checkpoints", rows)
        write_csv(
            run.folder / "checkpoints.csv",
            (*COLUMNS, *LONG_CORRECTED, JUDGE),
            [{**row, **_corrected(run, row), JUDGE: _judge_of(run, row)} for row in rows],
        )
        render_checkpoints(run).save(run.folder / "checkpoints.png")
    return run


@contextmanager
def loaded_checkpoint(base: ChatModel, checkpoint: Checkpoint) -> Iterator[ChatModel]:
    """Yield the model of a checkpoint; an adapter goes on a fresh copy of the base."""
    if checkpoint.path is None:
        yield base
    elif is_adapter(checkpoint.path):
        yield base.reload(adapter=checkpoint.path)
    else:
        options, told = base.options.elsewhere(), base.system_prompt
        yield load_chat_model(str(checkpoint.path), options=options, system_prompt=told)


def _measure(
    base: ChatModel,
    model: ChatModel,
    measures: Measures,
    place: Mapping[str, Any],
    result: Evaluation,
) -> list[dict[str, Any]]:
    """Return the rows of one checkpoint on one trait: its scores, and its answers projected."""

    def row(statistic: str, interval: Interval, where: Mapping[str, Any] = {}) -> dict[str, Any]:
        found = {**where, **place, "statistic": statistic, **interval_cells(interval)}
        return {name: found.get(name) for name in COLUMNS}

    rows = [row("trait", result.trait), row(COHERENCE, result.coherence)]
    if result.judges is not None:
        rows.append(row(TRAIT_SECOND, result.judges.means[0].second))
    answers = [each for each in Run(result.run).read("answers") if each["answer"].strip()]
    if not answers or not measures.along.vectors:
        return rows
    texts = [tokenize_rendered(base, each["prompt"], each["answer"]) for each in answers]
    own = measures.along.project(model, texts)
    below = own if model is base else measures.along.project(base, texts)
    for statistic, values in (("projection", own), ("shift", own - below)):
        for at, where in measures.along.places():
            asked = [each["question_id"] for each in answers]
            by = grouped(zip(asked, values[:, *at].tolist(), strict=True), lambda pair: pair[0])
            cluster = {question: [value for _, value in own] for question, own in by.items()}
            rows.append(row(statistic, bootstrap_mean(cluster), where))
    return rows


def _corrected(run: Run, row: Mapping[str, Any]) -> dict[str, float | None]:
    """Return a mean score corrected for the error of its judge; empty cells for what is none."""
    right, files = None, {"trait": "verdicts", TRAIT_SECOND: SECOND}
    if row["statistic"] in files:
        answers = Run(run.folder / "answers" / f"{row['checkpoint']}_{row['trait']}")
        kind = kind_of_model(answers, finetuned=row["checkpoint"] != BASE)
        errors = errors_of(answers, row["trait"], by=files[row["statistic"]])
        right, _ = of_condition(kind, interval_of(row), None, errors)
    return corrected_cells(right)


def _judge_of(run: Run, row: Mapping[str, Any]) -> str:
    """Return who gave the score that a row says; "" for projections.

    Read from the verdicts, which say it whenever the row was measured.
    """
    trait, statistic = row["trait"], row["statistic"]
    if statistic not in ("trait", COHERENCE, TRAIT_SECOND):
        return ""
    answers = Run(run.folder / "answers" / f"{row['checkpoint']}_{trait}")
    verdicts = answers.read(SECOND if statistic == TRAIT_SECOND else "verdicts")
    return judges_of(verdicts, COHERENCE if statistic == COHERENCE else trait)


def _cosines(along: Along) -> list[dict[str, Any]]:
    vectors = along.vectors
    return [
        {"vector": one, "other": other, "layer": layer, "cosine": cosine}
        | {"vector_trait": vectors[one].trait, "other_trait": vectors[other].trait}
        for one, other in combinations(vectors, 2)
        for layer, cosine in vectors[one].cosine(vectors[other], allow_other_base=True).items()
        if layer in along.layers
    ]


# -- in weights ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projected:
    """The projections of one finetune by geometry: weighted by inputs where there are, and plain.

    The first is the one to read. ``step`` is that of a checkpoint.
    """

    name: str
    step: int | None
    by_geometry: Mapping[str, WeightProjection]

    @property
    def geometry(self) -> str:
        """The geometry to read."""
        return next(iter(self.by_geometry))

    @property
    def headline(self) -> WeightProjection:
        """The projections to read."""
        return self.by_geometry[self.geometry]

    def named(self) -> Iterator[tuple[dict[str, Any], WeightProjection]]:
        """Yield the projections, each with what its rows begin with."""
        for geometry, projection in self.by_geometry.items():
            yield {"finetuned": self.name, "step": self.step, "geometry": geometry}, projection


def expand(names: Sequence[str]) -> list[tuple[str, int | None]]:
    """Return the finetunes that are meant, and their steps where they are checkpoints.

    A folder of checkpoints stands for all of them.
    """
    found: list[tuple[str, int | None]] = []
    for name in names:
        folder = Path(name)
        if folder.is_dir() and not _is_model(folder) and any(folder.glob("checkpoint-*")):
            steps = [each for each in find_checkpoints(folder) if each.path is not None]
            found += [(str(each.path), each.step) for each in steps]
        else:
            found.append((name, None))
    return found


def load_diffs(paths: Sequence[Path | str], *, on_disk: bool = False) -> dict[str, LoRADiff]:
    """Open diffs by a name each: the trait, with what tells their paths apart where two are of one.

    With ``on_disk`` their factors stay there, for one pass over models that are large. UserError
    for one that is zero.
    """
    loaded = [(str(path), LoRADiff.load(path, on_disk=on_disk)) for path in paths]
    named = {}
    for path, diff in loaded:
        if not any(each.inner(each) > 0 for each in diff.factors.values()):  # reads few of them
            length_of(diff, path)
        alike = [other for other, each in loaded if each.trait == diff.trait]
        if diff.trait is None:
            named[path] = diff
        else:
            apart = f" ({_apart(path, alike)})" if len(alike) > 1 else ""
            named[diff.trait + apart] = diff
    return named


def _apart(path: str, alike: Sequence[str]) -> str:
    """Return the part of a path in which some differ; all of it where that is nothing."""
    parts = [Path(each).parts for each in alike]
    ahead = _shared(parts)
    behind = _shared([each[ahead:][::-1] for each in parts])
    own = Path(path).parts
    return "/".join(own[ahead : len(own) - behind]) or path


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """Return how many parts all begin with."""
    return sum(1 for _ in takewhile(lambda each: len(set(each)) == 1, zip(*parts, strict=False)))


def check_finetunes(names: Sequence[str], controls: Sequence[str], original: str) -> None:
    """UserError, before anything is loaded, for what cannot be read of finetunes and controls.

    That is what is no plain low-rank adapter (DoRA, bias, …) and no model whose weights lie there,
    and controls of another kind than the finetunes.
    """
    taken_off(controls, original, names)
    for name in names:
        if is_adapter(name):
            LoRADiff.load(name, on_disk=True)
        else:
            weights_of(name)


def check_json(path: Path) -> None:
    """UserError for a path of anything but JSON."""
    if path.suffix != ".json":
        raise UserError(f"output must end in .json, got {path}")


def project_finetunes(
    original: str,
    finetuned: Sequence[str],
    diffs: Mapping[str, LoRADiff],
    output: Path,
    *,
    revision: str | None = None,
    inputs: ModuleInputs | None = None,
    controls: Sequence[str] = (),
) -> list[Projected]:
    """Project every finetune on every diff; write ``output`` (JSON) and a picture beside it.

    An adapter is projected from its factors alone; a full model is streamed against ``original``
    (of ``revision``, on the hub). With ``inputs`` of the original model projections are weighted by
    them, and the plain ones stand beside. The mean change of ``controls`` is taken off every
    finetune's: of adapters, or of one full model where all finetunes are full models. p values are
    corrected over all finetunes and diffs (Holm).
    """
    check_json(output)
    named = expand(finetuned)
    control, before = taken_off(controls, original, [name for name, _ in named])
    source = partial(weights_of, before, revision if before == original else None)
    found = [
        project_finetune(each, source, diffs, inputs=inputs, control=control, step=step)
        for each, step in named
    ]
    record = {
        "original_model": original,
        "revision": revision,
        "geometry": PLAIN if inputs is None else WEIGHTED,
        "inputs": None if inputs is None else {"prompts": inputs.prompts, "tokens": inputs.tokens},
        "controls": list(controls),
        "diffs": {
            name: {"trait": diff.trait, **_norms(diff, inputs)} for name, diff in diffs.items()
        },
        "finetuned": [row for each in found for row in summaries(each)],
        "rows": projection_rows(found),
    }
    render_weight_projection(record).save(output.with_suffix(".png"))
    write_json(output, record)  # last: where it is, all is
    return found


def _norms(diff: LoRADiff, inputs: ModuleInputs | None) -> dict[str, float]:
    """Return the plain norm of a diff and, where inputs are there, the weighted one."""
    weighted = {} if inputs is None else {"weighted_norm": inputs.weigh(diff).norm()}
    return {"norm": diff.norm(), **weighted}


def project_finetune(
    name: str,
    before: Callable[[], WeightSource],
    diffs: Mapping[str, LoRADiff],
    *,
    inputs: ModuleInputs | None = None,
    control: LoRADiff | None = None,
    step: int | None = None,
) -> Projected:
    """Project one finetune as ``project_finetunes`` does; a full model against ``before``."""
    adapter = LoRADiff.load(name) if is_adapter(name) else None
    geometries = {PLAIN: None} if inputs is None else {WEIGHTED: inputs, PLAIN: None}

    def projected(geometry: str) -> WeightProjection:
        how: Any = {"inputs": geometries[geometry], "control": control}
        if adapter is not None:
            return project_adapter(adapter, diffs, **how)
        with progress.stage(f"{name}, {geometry}"):
            return project_weights(before(), weights_of(name), diffs, **how)

    return Projected(name, step, {each: projected(each) for each in geometries})


def taken_off(
    controls: Sequence[str], original: str, finetuned: Sequence[str]
) -> tuple[LoRADiff | None, str]:
    """Return the mean change of controls that are adapters, and what full models are compared with.

    The change of a full model F less that of a full control C is (F − O) − (C − O) = F − C.
    """
    whole = [name for name in controls if not is_adapter(name)]
    if not whole:
        shares = {LoRADiff.load(name): 1 / len(controls) for name in controls}
        return (mix(shares) if shares else None), original
    adapter = next((name for name in finetuned if is_adapter(name)), None)
    if len(controls) > 1 or adapter is not None:
        beside = f"{adapter} is one" if adapter is not None else f"{len(controls)} are given"
        raise UserError(
            f"{whole[0]} is no adapter, and {beside}; what is taken off must be adapters, or one "
            "full model where all finetunes are full models"
        )
    return None, whole[0]


def is_adapter(name: str | Path) -> bool:
    """Say whether a name is that of the folder of an adapter."""
    return (Path(name) / ADAPTER_CONFIG).is_file()


def adapters_among(names: Sequence[str]) -> list[LoRADiff]:
    """Return those that are adapters, their factors left on disk."""
    return [LoRADiff.load(name, on_disk=True) for name in names if is_adapter(name)]


def projection_rows(found: Sequence[Projected]) -> list[dict[str, Any]]:
    """Return long rows: one finetune, geometry, diff, and part (total, a layer, a kind) each."""
    rows: list[dict[str, Any]] = []
    for named, projection in (pair for each in found for pair in each.named()):
        parts: dict[str, Mapping[Any, Mapping[str, Projection]]] = {
            "total": {None: projection.total},
            "layer": projection.by_layer(),
            "kind": projection.by_kind(),
        }
        rows += [
            {**named, "part": part, "of": of, "diff": name, **dataclasses.asdict(value)}
            for part, values_of in parts.items()
            for of, values in values_of.items()
            for name, value in values.items()
        ]
    for of_part in grouped(rows, lambda row: (row["geometry"], row["part"])).values():
        for row, adjusted in zip(of_part, holm([r["p"] for r in of_part]), strict=True):
            row["p_holm"] = adjusted
    return rows


def summaries(each: Projected) -> list[dict[str, Any]]:
    """Return a row for each geometry: norms, the mix that explains most, what was left out."""
    return [
        {
            **named,
            "delta_norm": projection.delta_norm,
            "outside_norm": projection.other_square**0.5,
            "corrected": projection.corrected,
            "explained": projection.explained,
            "left_out": list(projection.left_out),
        }
        for named, projection in each.named()
    ]


def weights_table(found: Sequence[Projected]) -> Table:
    """Return every finetune along every diff, over all layers and kinds; plain cosines beside."""
    corrected_p = {
        (row["finetuned"], row["geometry"], row["diff"]): row["p_holm"]
        for row in projection_rows(found)
        if row["part"] == "total"
    }
    weighted = any(WEIGHTED in each.by_geometry for each in found)
    names = wording.short_paths([each.name for each in found])
    rows = (
        [names[each.name], name, wording.number(value.coordinate, 3)]
        + [wording.significant(value.null_sd), wording.number(value.cosine, 3)]
        + [wording.number(each.by_geometry[PLAIN].total[name].cosine, 3)] * weighted
        + [wording.number(each.headline.corrected[name], 3)]
        + [wording.p_value(corrected_p[each.name, each.geometry, name])]
        for each in found
        for name, value in each.headline.total.items()
    )
    cosines = "cosine | plain cosine" if weighted else "cosine"
    columns = f"finetune | diff | coordinate | null sd | {cosines} | corrected | p (Holm)"
    return Table.of(columns, rows)


def explained_lines(found: Sequence[Projected]) -> Iterator[str]:
    """Say how much of every finetune the directions explain, and what was left out of it."""
    names = wording.short_paths([each.name for each in found])
    for each in found:
        name, projection = names[each.name], each.headline
        share = projection.explained
        if projection.left_out:
            yield f"{name}: compared without {few_names(projection.left_out)}"
        yield (
            f"{name}: ‖ΔW‖ {wording.significant(projection.delta_norm)} ({each.geometry}), of "
            f"which the directions explain {'nothing' if share is None else f'{100 * share:.2f}%'}"
        )
