"""Every checkpoint of a finetune: asked, judged, projected, and compared with its base.

One row says one statistic of one checkpoint, so that pictures and correlations start from rows on
disk. Answers, verdicts and projections of each checkpoint and trait are kept in runs of their own,
and a killed evaluation goes on with what is missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import Tensor

from persona_lora.core import progress
from persona_lora.core.chat import COHERENCE
from persona_lora.core.content import model_folder_digest
from persona_lora.core.errors import UserError
from persona_lora.core.files import write_csv
from persona_lora.core.runs import Output, Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.traits import Split, Trait
from persona_lora.judges.choice import lazily
from persona_lora.judges.judging import Judge
from persona_lora.models.likelihood import TokenizedExchange, tokenize_rendered
from persona_lora.models.loading import ChatModel, load_chat_model
from persona_lora.projections.activation_space import check_fits, project_hidden_states
from persona_lora.report.resampling import Interval, bootstrap_mean
from persona_lora.studies.asking.run import GenerationOptions, evaluate, mean_score
from persona_lora.studies.drift.figure import render_checkpoints

BASE = "base"
MODEL_FILES = ("adapter_config.json", "config.json")
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
    vectors: Mapping[str, SteeringVector]
    layers: tuple[int, ...]
    position: str = "response_avg"
    split: Split = "eval"
    finetuned_on: str | None = None

    def record(self) -> dict[str, Any]:
        """Return the plain values for a run's configuration."""
        return {
            "traits": [trait.name for trait in self.traits],
            "vectors": list(self.vectors),
            "layers": list(self.layers),
            "type": self.position,
            "split": self.split,
            "finetuned_on": self.finetuned_on,
        }

    def inputs(self) -> dict[str, str]:
        """Return digests of the traits and the vectors."""
        traits = (trait.inputs() for trait in self.traits)
        vectors = {f"the vector {name}": each.content() for name, each in self.vectors.items()}
        return {**{key: each for read in traits for key, each in read.items()}, **vectors}


def find_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the base and every ``checkpoint-N`` of a folder, in the order of their steps.

    A checkpoint is a PEFT adapter or a whole model. Raises UserError where there is none.
    """
    found = []
    for path in folder.glob("checkpoint-*"):
        named = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if named and any(
            (path / each).is_file() for each in ("adapter_config.json", "config.json")
        ):
            found.append(Checkpoint(path.name, int(named[1]), path))
    if not found:
        raise UserError(
            f"{folder} holds no checkpoint-N with an adapter or a model; make some with: "
            "persona-lora finetune --config train_configs/finetune_sycophancy_misaligned_2.yaml"
        )
    return [Checkpoint(BASE, 0, None), *sorted(found, key=lambda each: each.step)]


def evaluate_checkpoints(
    base: ChatModel,
    folder: Path,
    measures: Measures,
    judge_of: Callable[[Trait, ChatModel], Callable[[], Judge]],
    output: Output | Path,
    *,
    options: GenerationOptions | None = None,
) -> Run:
    """Write ``checkpoints.jsonl`` and ``.csv``, ``cosines.jsonl`` and a plot into ``output``.

    ``base`` is the model that was finetuned. ``judge_of`` gives what builds the judge of a trait
    over the base model; each is built once, and only where something is left to judge. A
    checkpoint's answers are projected through the checkpoint and through the base, and the shift
    is the mean difference on the same tokens.
    """
    checkpoints = find_checkpoints(folder)
    for name, vector in measures.vectors.items():
        check_fits(base, vector, name)
        vector.at(measures.layers)
    options = options or GenerationOptions()
    judges = {trait.name: lazily(judge_of(trait, base)) for trait in measures.traits}
    output = Output.of(output)
    run = Run.open(
        output,
        command="evaluate-checkpoints",
        config={"folder": str(folder), **base.record(), **measures.record()},
        seed=options.seed,
        inputs={
            **base.inputs(),
            **measures.inputs(),
            **{each.name: model_folder_digest(each.path) for each in checkpoints if each.path},
        },
        parts=("answers",),
    )
    asked = _Asked(base, measures, options, run.folder / "answers", output.inputs)
    with run:
        done = {(row["checkpoint"], row["trait"]) for row in run.resume_rows("checkpoints")}
        for checkpoint in progress.over("checkpoints", checkpoints):
            missing = [t for t in measures.traits if (checkpoint.name, t.name) not in done]
            if not missing:
                continue
            with _loaded(base, checkpoint) as model:
                for trait in missing:
                    rows = _measure(asked, model, checkpoint, trait, judges[trait.name])
                    run.extend("checkpoints", rows)
        run.write("cosines", _cosines(measures))
        here = {checkpoint.name for checkpoint in checkpoints}
        rows = [row for row in run.read("checkpoints") if row["checkpoint"] in here]
        run.write("checkpoints", rows)
        write_csv(run.folder / "checkpoints.csv", COLUMNS, rows)
        render_checkpoints(run).save(run.folder / "checkpoints.png")
    return run


@contextmanager
def _loaded(base: ChatModel, checkpoint: Checkpoint) -> Iterator[ChatModel]:
    """Yield the model of a checkpoint; an adapter goes on a fresh copy of the base."""
    if checkpoint.path is None:
        yield base
    elif (checkpoint.path / "adapter_config.json").is_file():
        yield base.reload(adapter=checkpoint.path)
    else:
        yield load_chat_model(
            str(checkpoint.path),
            options=base.options.elsewhere(),
            system_prompt=base.system_prompt,
        )


@dataclass(frozen=True)
class _Asked:
    """What all checkpoints share: how they are asked and measured, and where answers go."""

    base: ChatModel
    measures: Measures
    options: GenerationOptions
    answers: Path
    inputs: Mapping[str, str]


def _measure(
    asked: _Asked,
    model: ChatModel,
    checkpoint: Checkpoint,
    trait: Trait,
    judge: Callable[[], Judge],
) -> list[dict[str, Any]]:
    """Ask, judge and project one checkpoint on one trait."""
    base, measures = asked.base, asked.measures
    path = asked.answers / f"{checkpoint.name}_{trait.name}.csv"
    result = evaluate(
        model,
        trait,
        judge,
        Output(path, config={"checkpoint": checkpoint.name}, inputs=asked.inputs),
        split=measures.split,
        options=asked.options,
    )
    run = Run(result.run)
    place = {"checkpoint": checkpoint.name, "step": checkpoint.step, "trait": trait.name}
    rows = [
        _row({**place, "statistic": "trait"}, mean_score(run, trait.name)),
        _row({**place, "statistic": "coherence"}, mean_score(run, COHERENCE)),
    ]
    answers = [row for row in run.read("answers") if row["answer"].strip()]
    if not answers or not measures.vectors:
        return rows
    texts = [tokenize_rendered(base, row["prompt"], row["answer"]) for row in answers]
    questions = [row["question_id"] for row in answers]
    with progress.stage("projecting"):
        own = _projected(model, texts, measures)
    below = own if model is base else _projected(base, texts, measures)
    for statistic, values in (("projection", own), ("shift", own - below)):
        for v, name in enumerate(measures.vectors):
            for at, layer in enumerate(measures.layers):
                cluster: dict[int, list[float | None]] = {}
                for question, value in zip(questions, values[:, v, at].tolist(), strict=True):
                    cluster.setdefault(question, []).append(value)
                where = {"vector": name, "layer": layer, "type": measures.position}
                rows.append(
                    _row({**place, "statistic": statistic, **where}, bootstrap_mean(cluster))
                )
    return rows


def _projected(
    model: ChatModel,
    texts: Sequence[TokenizedExchange],
    measures: Measures,
) -> Tensor:
    """Return projections ``[texts, vectors, layers]``."""
    return project_hidden_states(
        model,
        texts,
        measures.vectors,
        measures.layers,
        positions=[measures.position],
    )[..., 0]


def _row(place: Mapping[str, Any], interval: Interval) -> dict[str, Any]:
    return {
        **dict.fromkeys(COLUMNS),
        **place,
        "value": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "n": interval.n,
        "n_questions": interval.n_questions,
        "coverage": interval.coverage,
    }


def _cosines(measures: Measures) -> list[dict[str, Any]]:
    return [
        {"vector": one, "other": other, "layer": layer, "cosine": cosine}
        for one, other in combinations(measures.vectors, 2)
        for layer, cosine in measures.vectors[one].cosine(measures.vectors[other]).items()
        if layer in measures.layers
    ]
