"""Steering vectors of a trait: from prompted answers, from files of them, or from training pairs.

The pipeline of persona vectors (Chen et al. 2025, arXiv:2507.21509): ask the extract questions
under positive and negative system prompts, judge, keep the pairs of answers that show what they
should, and take the difference of their mean hidden states at every layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_lora.core import progress
from persona_lora.core.chat import COHERENCE, Condition
from persona_lora.core.content import file_digest
from persona_lora.core.errors import UserError
from persona_lora.core.files import write_csv
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.options import Elicitation, GenerationOptions, Thresholds
from persona_lora.core.runs import Output, Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.traits import Sign, Trait, load_pairs, named, trait_prompt
from persona_lora.judges.choice import judge_answers
from persona_lora.judges.judging import Judge
from persona_lora.models.hidden_states import POSITIONS
from persona_lora.models.likelihood import TokenizedExchange, tokenize_rendered
from persona_lora.models.loading import ChatModel
from persona_lora.models.structure import decoder_layers, weight_fingerprint
from persona_lora.report.scores import answers_columns, answers_table
from persona_lora.steering.directions import EXTRACTORS, WITH_MOMENTS, sum_pairs, vector_of
from persona_lora.steering.steerer import Unsteered
from persona_lora.studies.asking.run import Row, answer_rows, stream_of
from persona_lora.studies.vectors.figure import render_vectors_over_layers
from persona_lora.studies.vectors.judged_pairs import (
    JudgedAnswer,
    filter_pairs,
    read_judged,
)

SIGNS: tuple[Sign, Sign] = ("pos", "neg")


@dataclass(frozen=True)
class ExtractionOptions:
    """Which vectors are made: methods × positions, at which layers (None: all)."""

    methods: tuple[str, ...] = ("mean_diff",)
    positions: tuple[str, ...] = POSITIONS
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, chosen, known in (
            ("method", self.methods, EXTRACTORS),
            ("position", self.positions, POSITIONS),
        ):
            wrong = [each for each in chosen if each not in known]
            if wrong or not chosen:
                raise UserError(f"{name} must be of {', '.join(known)}, got {list(chosen)!r}")


@dataclass(frozen=True)
class Extracted:
    """What was made: the run, the vectors by file stem, and the counts of the filter."""

    run: Run
    vectors: Mapping[str, SteeringVector]
    paths: tuple[Path, ...]
    pairs: int
    total: int
    failed: Mapping[str, int]


def from_prompts(
    chat_model: ChatModel,
    trait: Trait,
    judge: Callable[[], Judge],
    output: Output | Path,
    options: ExtractionOptions,
    *,
    elicitation: Elicitation | None = None,
    thresholds: Thresholds | None = None,
    generation: GenerationOptions | None = None,
) -> Extracted:
    """Answer, judge, filter, extract; run again, it goes on where it stopped.

    Every question of the split is asked under every instruction pair and both signs, in
    ``generation.samples`` rollouts. Also writes ``<label>_pos_instruct.csv`` and ``_neg_…``.
    """
    elicitation, thresholds = elicitation or Elicitation(), thresholds or Thresholds()
    generation = generation or GenerationOptions()
    plan = plan_pairs(trait, elicitation, samples=generation.samples)
    run = _open(
        output,
        chat_model,
        trait,
        options,
        {
            "source": "prompts",
            "elicitation": dataclasses.asdict(elicitation),
            "thresholds": dataclasses.asdict(thresholds),
            "generation": dataclasses.asdict(generation),
        },
        generation.seed,
    )
    with run:
        answer_rows(chat_model, plan, Unsteered(), run, generation)
        judge_answers(run, judge, trait)
        table = answers_table(run.read("answers"), run.read("verdicts"), trait.name)
        half = len(table) // 2
        for sign, rows in zip(SIGNS, (table[:half], table[half:]), strict=True):
            path = run.folder / f"{trait.label}_{sign}_instruct.csv"
            write_csv(path, answers_columns(trait.name, sweep=False), rows)
        judged = [
            JudgedAnswer(row["prompt"], row["answer"], row[trait.name], row[COHERENCE])
            for row in table
        ]
        pairs = list(zip(judged[:half], judged[half:], strict=True))
        return _extract_judged(chat_model, trait, run, pairs, thresholds, options)


def from_files(
    chat_model: ChatModel,
    trait: Trait,
    pos_path: Path,
    neg_path: Path,
    output: Output | Path,
    options: ExtractionOptions,
    *,
    thresholds: Thresholds | None = None,
) -> Extracted:
    """Extract from two CSV files with the columns prompt, answer, the trait's name and coherence.

    Row i of either file is one pair, as in the files that ``from_prompts`` and the published
    scripts write.
    """
    thresholds = thresholds or Thresholds()
    positive, negative = (read_judged(path, trait.name) for path in (pos_path, neg_path))
    if len(positive) != len(negative):
        raise UserError(
            f"{pos_path} has {len(positive)} rows and {neg_path} {len(negative)}; row i of either "
            "file must be one pair"
        )
    pairs = list(zip(positive, negative, strict=True))
    filter_pairs(pairs, thresholds)  # raises before anything is written
    run = _open(
        output,
        chat_model,
        trait,
        options,
        {
            "source": "files",
            "pos_path": str(pos_path),
            "neg_path": str(neg_path),
            "thresholds": dataclasses.asdict(thresholds),
        },
        0,
        {str(path): file_digest(path) for path in (pos_path, neg_path)},
    )
    with run:
        return _extract_judged(chat_model, trait, run, pairs, thresholds, options)


def from_answers(
    chat_model: ChatModel,
    trait: Trait,
    output: Output | Path,
    options: ExtractionOptions,
) -> Extracted:
    """Extract from the trait's contrastive training pairs: no generation, no judge, no filter.

    Both answers follow the same prompt, so the states of the prompt do not differ, and only
    "response_avg" has a direction: the other positions are left out, and UserError where it is
    not among them.
    """
    if "response_avg" not in options.positions:
        raise UserError(
            f"training pairs share their prompts, which then have no direction; extract "
            f"response_avg, or {options.positions[0]} with --source prompts"
        )
    options = dataclasses.replace(options, positions=("response_avg",))
    pairs = load_pairs(trait)
    run = _open(output, chat_model, trait, options, {"source": "answers"}, 0)
    with run:
        texts = [
            (
                chat_model.render_before(pair.positive[-1]["content"], pair.prompt, trait.name),
                pair.positive[-1]["content"],
                pair.negative[-1]["content"],
            )
            for pair in pairs
        ]
        positive = [tokenize_rendered(chat_model, prompt, yes) for prompt, yes, _ in texts]
        negative = [tokenize_rendered(chat_model, prompt, no) for prompt, _, no in texts]
        sources = {"source": "answers", "file": str(trait.folder / "train.jsonl")}
        vectors, paths = _vectors(chat_model, trait, run, positive, negative, options, sources)
    return Extracted(run, vectors, paths, len(pairs), len(pairs), {})


def elicited_prompt(elicitation: Elicitation, trait: Trait, sign: Sign, index: int) -> str:
    """Return the system prompt of one sign of one instruction pair."""
    instruction = trait_prompt(trait, sign, index)
    chosen = elicitation.assistant_name
    positive = trait.name if chosen is None else chosen
    name = positive if sign == "pos" else elicitation.negative_name
    return named(name.replace("_", " "), instruction) if positive else instruction


def plan_pairs(trait: Trait, elicitation: Elicitation, *, samples: int) -> list[Row[Condition]]:
    """Return all rows: the positive ones first, then the negative ones in the same order."""
    questions = trait.questions[elicitation.split]
    if not questions or not trait.instructions:
        raise UserError(
            f"the trait {trait.label} has {len(questions)} {elicitation.split} questions and "
            f"{len(trait.instructions)} instruction pairs; both are needed"
        )
    return [
        Row(
            questions[question_id],
            Condition(f"prompt_{sign}"),
            elicited_prompt(elicitation, trait, sign, index),
            stream_of(question_id, sample),
        )
        for sign in SIGNS
        for index in range(len(trait.instructions))
        for question_id in range(len(questions))
        for sample in range(samples)
    ]


def _extract_judged(
    chat_model: ChatModel,
    trait: Trait,
    run: Run,
    pairs: Sequence[tuple[JudgedAnswer, JudgedAnswer]],
    thresholds: Thresholds,
    options: ExtractionOptions,
) -> Extracted:
    filtered = filter_pairs(pairs, thresholds)
    kept = set(filtered.kept)
    run.write("pairs", [{"pair": i, "kept": pair in kept} for i, pair in enumerate(pairs)])
    positive, negative = (
        [
            tokenize_rendered(chat_model, pair[side].prompt, pair[side].answer)
            for pair in filtered.kept
        ]
        for side in (0, 1)
    )
    sources = {
        "source": run.record["config"]["source"],
        "pairs_before": filtered.total,
        "failed": dict(filtered.failed),
        "thresholds": dataclasses.asdict(thresholds),
    }
    vectors, paths = _vectors(chat_model, trait, run, positive, negative, options, sources)
    return Extracted(run, vectors, paths, len(filtered.kept), filtered.total, filtered.failed)


def _vectors(
    chat_model: ChatModel,
    trait: Trait,
    run: Run,
    positive: Sequence[TokenizedExchange],
    negative: Sequence[TokenizedExchange],
    options: ExtractionOptions,
    sources: Mapping[str, Any],
) -> tuple[dict[str, SteeringVector], tuple[Path, ...]]:
    """Make every vector, then write them all, and a picture of them."""
    depth = len(decoder_layers(chat_model.model))
    with progress.stage("hidden states"):
        sums = sum_pairs(
            chat_model,
            positive,
            negative,
            positions=options.positions,
            layers=options.layers or tuple(range(depth)),
            moments=any(method in WITH_MOMENTS for method in options.methods),
        )
    base_model = BaseModel(chat_model.name, weight_fingerprint(chat_model.model))
    vectors = {}
    for position in options.positions:
        for method in options.methods:
            suffix = "" if method == "mean_diff" else f"_{method}"
            vectors[f"{trait.label}_{position}{suffix}"] = vector_of(
                sums[position],
                method,
                {
                    "base_model": base_model,
                    "num_layers": depth,
                    "trait": trait.label,
                    "position": position,
                    "sources": {**sources, "model": chat_model.record()},
                },
            )
    paths = tuple(
        vector.save(run.folder / f"{name}.safetensors") for name, vector in vectors.items()
    )
    render_vectors_over_layers(vectors).save(run.folder / "vectors.png")
    return vectors, paths


def _open(
    output: Output | Path,
    chat_model: ChatModel,
    trait: Trait,
    options: ExtractionOptions,
    config: Mapping[str, Any],
    seed: int,
    inputs: Mapping[str, str] | None = None,
) -> Run:
    depth = len(decoder_layers(chat_model.model))
    outside = [layer for layer in options.layers or () if not 0 <= layer < depth]
    if outside:
        raise UserError(
            f"layer {outside[0]} is out of range; {chat_model.name} has layers 0–{depth - 1}"
        )
    return Run.open(
        output,
        command="extract",
        config={
            "trait": trait.name,
            "variant": trait.variant,
            **chat_model.record(),
            "methods": list(options.methods),
            "positions": list(options.positions),
            "layers": list(options.layers) if options.layers else None,
            **config,
        },
        seed=seed,
        inputs={**chat_model.inputs(), **trait.inputs(), **(inputs or {})},
        parts=(f"{trait.label}_*.safetensors", f"{trait.label}_*.csv"),
    )
