"""Steering vectors of a trait: from prompted answers, from files of them, or from training pairs.

The pipeline of persona vectors (Chen et al. 2025, arXiv:2507.21509): ask the extract questions
under positive and negative system prompts, judge, keep the pairs of answers that show what they
should, and take the difference of their mean hidden states at every layer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from persona_lora.core import progress
from persona_lora.core.chat import COHERENCE, Condition
from persona_lora.core.content import file_digest
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_csv, write_csv
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.options import Elicitation, GenerationOptions, Thresholds
from persona_lora.core.runs import Output, Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.traits import Sign, Trait, load_pairs, named, trait_prompt
from persona_lora.judges.judging import Judge
from persona_lora.judges.verdicts import judge_answers
from persona_lora.models.hidden_states import POSITIONS
from persona_lora.models.likelihood import tokenize_rendered
from persona_lora.models.loading import ChatModel
from persona_lora.models.structure import decoder_layers, weight_fingerprint
from persona_lora.report.scores import answers_columns, answers_table
from persona_lora.steering.directions import EXTRACTORS, WITH_MOMENTS, sum_pairs, vector_of
from persona_lora.steering.steerer import Unsteered
from persona_lora.steering.task_vectors import task_vector
from persona_lora.studies.asking.run import Row, answer_rows, open_run, stream_of
from persona_lora.studies.vectors.figure import render_vectors_over_layers

Form = Literal["vectors", "diff"]
SIGNS: tuple[Sign, Sign] = ("pos", "neg")


class JudgedAnswer(NamedTuple):
    """A rendered prompt, the answer to it, and its scores; None is unscored."""

    prompt: str
    answer: str
    trait: float | None
    coherence: float | None


class Filtered(NamedTuple):
    """The pairs that are kept, and how many failed each threshold."""

    kept: tuple[tuple[JudgedAnswer, JudgedAnswer], ...]
    failed: Mapping[str, int]


@dataclass(frozen=True)
class Extracted:
    """What was made: the run, the vectors by file stem, and the counts of the filter."""

    run: Run
    vectors: Mapping[str, SteeringVector]
    paths: tuple[Path, ...]
    pairs: int
    total: int
    failed: Mapping[str, int]


Pairs = Sequence[tuple[JudgedAnswer, JudgedAnswer]]
Text = tuple[str, str]  # a rendered prompt, and the answer to it


def check_places(methods: Sequence[str], positions: Sequence[str]) -> None:
    """UserError for methods or positions that there are not, or none."""
    for name, chosen, known in (
        ("method", methods, EXTRACTORS),
        ("position", positions, POSITIONS),
    ):
        if not chosen or not set(chosen) <= set(known):
            raise UserError(f"{name} must be of {', '.join(known)}, got {list(chosen)!r}")


def check_of_answers(positions: Sequence[str]) -> None:
    """UserError where none of the positions has a direction in training pairs."""
    if "response_avg" not in positions:
        raise UserError(
            "training pairs share their prompts, which then have no direction; extract "
            f"response_avg, or {positions[0]} with --source prompts"
        )


@dataclass(frozen=True, eq=False)
class Extraction:
    """Which vectors of a trait are made, and where: methods × positions, at layers (None: all).

    With ``form`` "diff" one LoRADiff of rank 1 is made instead, in the folder "diff" of the run.
    """

    chat_model: ChatModel
    trait: Trait
    output: Output | Path
    methods: tuple[str, ...] = ("mean_diff",)
    positions: tuple[str, ...] = POSITIONS
    layers: tuple[int, ...] | None = None
    form: Form = "vectors"

    def __post_init__(self) -> None:
        check_places(self.methods, self.positions)

    def from_prompts(
        self,
        judge: Callable[[], Judge],
        *,
        elicitation: Elicitation = Elicitation(),
        thresholds: Thresholds = Thresholds(),
        generation: GenerationOptions = GenerationOptions(),
    ) -> Extracted:
        """Answer, judge, filter, extract; run again, it goes on where it stopped.

        Every question of the split is asked under every instruction pair and both signs, in
        ``generation.samples`` rollouts. Also writes ``<label>_pos_instruct.csv`` and ``_neg_…``.
        Raises UserError before anything is asked where these are fewer pairs than are to be kept.
        """
        trait = self.trait
        plan = plan_pairs(trait, elicitation, generation.samples, thresholds.least_pairs)
        config = {
            "source": "prompts",
            "elicitation": dataclasses.asdict(elicitation),
            "thresholds": dataclasses.asdict(thresholds),
            "generation": dataclasses.asdict(generation),
        }
        with self._open(config, seed=generation.seed) as run:
            answer_rows(self.chat_model, plan, Unsteered(), run, generation)
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
            return self._extract_judged(run, pairs, thresholds)

    def from_files(
        self, pos_path: Path, neg_path: Path, *, thresholds: Thresholds = Thresholds()
    ) -> Extracted:
        """Extract from two CSV files with the columns prompt, answer, the trait's and coherence.

        Row i of either file is one pair, as in the files that ``from_prompts`` and the published
        scripts write.
        """
        paths = pos_path, neg_path
        pairs = read_pairs(pos_path, neg_path, self.trait.name, thresholds)
        config = {
            "source": "files",
            "pos_path": str(pos_path),
            "neg_path": str(neg_path),
            "thresholds": dataclasses.asdict(thresholds),
        }
        with self._open(config, {str(path): file_digest(path) for path in paths}) as run:
            return self._extract_judged(run, pairs, thresholds)

    def from_answers(self) -> Extracted:
        """Extract from the trait's contrastive training pairs: no generation, judge, or filter.

        Both answers follow the same prompt, so the states of the prompt do not differ, and only
        "response_avg" has a direction: the other positions are left out, and UserError where it is
        not among them.
        """
        check_of_answers(self.positions)
        if self.positions != ("response_avg",):
            return dataclasses.replace(self, positions=("response_avg",)).from_answers()
        texts = []
        for pair in load_pairs(self.trait):
            yes, no = pair.positive[-1]["content"], pair.negative[-1]["content"]
            prompt = self.chat_model.render_before(yes, pair.prompt, self.trait.name)
            texts.append(((prompt, yes), (prompt, no)))
        sources = {"source": "answers", "file": str(self.trait.folder / "train.jsonl")}
        with self._open({"source": "answers"}) as run:
            return self._extract(run, texts, sources)

    def _open(self, config: Mapping[str, Any], *read: Mapping[str, str], seed: int = 0) -> Run:
        trait, depth = self.trait, len(decoder_layers(self.chat_model.model))
        outside = [layer for layer in self.layers or () if not 0 <= layer < depth]
        if outside:
            raise UserError(
                f"layer {outside[0]} is out of range; {self.chat_model.name} has layers "
                f"0–{depth - 1}"
            )
        config = {
            "trait": trait.name,
            "variant": trait.variant,
            "methods": list(self.methods),
            "positions": list(self.positions),
            "layers": list(self.layers) if self.layers else None,
            **({} if self.form == "vectors" else {"form": self.form}),
            **config,
        }
        parts = "diff", f"{trait.label}_*.safetensors", f"{trait.label}_*.csv"
        read = (trait.inputs(), *read)
        return open_run(
            self.output, "extract", self.chat_model, config, *read, seed=seed, parts=parts
        )

    def _extract_judged(self, run: Run, pairs: Pairs, thresholds: Thresholds) -> Extracted:
        kept, failed = filter_pairs(pairs, thresholds)
        run.write("pairs", [{"pair": i, "kept": pair in kept} for i, pair in enumerate(pairs)])
        sources = {
            "source": run.record["config"]["source"],
            "pairs_before": len(pairs),
            "failed": dict(failed),
            "thresholds": dataclasses.asdict(thresholds),
        }
        return self._extract(run, [(yes[:2], no[:2]) for yes, no in kept], sources)

    def _extract(
        self, run: Run, pairs: Sequence[tuple[Text, Text]], sources: Mapping[str, Any]
    ) -> Extracted:
        """Make every vector, then write them all, and a picture of them."""
        chat_model, trait = self.chat_model, self.trait
        positive, negative = (
            [tokenize_rendered(chat_model, *pair[side]) for pair in pairs] for side in (0, 1)
        )
        total, failed = sources.get("pairs_before", len(pairs)), sources.get("failed", {})
        if self.form == "diff":
            made_of = {**sources, "pairs": len(pairs)}
            with progress.stage("inputs of modules"):
                found = task_vector(
                    chat_model, positive, negative, trait=trait.label, sources=made_of
                )
            kept = found if self.layers is None else found.at(self.layers)
            return Extracted(run, {}, (kept.save(run.folder / "diff"),), len(pairs), total, failed)
        depth = len(decoder_layers(chat_model.model))
        with progress.stage("hidden states"):
            sums = sum_pairs(
                chat_model,
                positive,
                negative,
                positions=self.positions,
                layers=self.layers or tuple(range(depth)),
                moments=any(method in WITH_MOMENTS for method in self.methods),
            )
        base_model = BaseModel(chat_model.name, weight_fingerprint(chat_model.model))
        vectors = {}
        for position, method in product(self.positions, self.methods):
            suffix = "" if method == "mean_diff" else f"_{method}"
            about = {
                "base_model": base_model,
                "num_layers": depth,
                "trait": trait.label,
                "position": position,
                "sources": {**sources, "model": chat_model.record()},
            }
            vectors[f"{trait.label}_{position}{suffix}"] = vector_of(sums[position], method, about)
        paths = tuple(
            each.save(run.folder / f"{name}.safetensors") for name, each in vectors.items()
        )
        render_vectors_over_layers(vectors).save(run.folder / "vectors.png")
        return Extracted(run, vectors, paths, len(pairs), total, failed)


def filter_pairs(pairs: Pairs, thresholds: Thresholds) -> Filtered:
    """Keep the pairs that show what they should; UserError where too few do, with the counts."""
    reasons = [_failures(*pair, thresholds) for pair in pairs]
    kept = [pair for pair, why in zip(pairs, reasons, strict=True) if not why]
    names = ("positive", "negative", "coherence", "unscored")
    failed = {name: sum(name in why for why in reasons) for name in names}
    if len(kept) < thresholds.least_pairs:
        raise UserError(
            f"{len(kept)} of {len(pairs)} pairs pass the filter, at least "
            f"{thresholds.least_pairs} are needed (positive answers under "
            f"{thresholds.positive:g}: {failed['positive']}, negative ones at or over "
            f"{thresholds.negative:g}: {failed['negative']}, incoherent: {failed['coherence']}, "
            f"unscored: {failed['unscored']}); lower the thresholds or --min-pairs, ask for more "
            "rollouts, or use --source answers"
        )
    return Filtered(tuple(kept), failed)


def read_pairs(pos_path: Path, neg_path: Path, trait: str, thresholds: Thresholds) -> Pairs:
    """Read two files of judged answers, row i of either being one pair.

    UserError where they have different numbers of rows, or too few pairs pass the filter.
    """
    positive, negative = (read_judged(path, trait) for path in (pos_path, neg_path))
    if len(positive) != len(negative):
        raise UserError(
            f"{pos_path} has {len(positive)} rows and {neg_path} {len(negative)}; row i of "
            "either file must be one pair"
        )
    pairs = list(zip(positive, negative, strict=True))
    filter_pairs(pairs, thresholds)
    return pairs


def read_judged(path: Path, trait: str) -> list[JudgedAnswer]:
    """Read a CSV of judged answers; UserError names a missing column or a score that is none."""
    rows = read_csv(path, ("prompt", "answer", trait, COHERENCE))
    found = []
    for number, row in enumerate(rows, start=1):
        scores = (_score(row[name], f"{path}: row {number}") for name in (trait, COHERENCE))
        found.append(JudgedAnswer(row["prompt"], row["answer"], *scores))
    return found


def elicited_prompt(elicitation: Elicitation, trait: Trait, sign: Sign, index: int) -> str:
    """Return the system prompt of one sign of one instruction pair."""
    instruction = trait_prompt(trait, sign, index)
    chosen = elicitation.assistant_name
    positive = trait.name if chosen is None else chosen
    name = positive if sign == "pos" else elicitation.negative_name
    return named(name.replace("_", " "), instruction) if positive else instruction


def plan_pairs(
    trait: Trait, elicitation: Elicitation, samples: int, least: int = 0
) -> list[Row[Condition]]:
    """Return all rows: the positive ones first, then the negative ones in the same order.

    UserError where these are fewer than ``least`` pairs.
    """
    questions = trait.questions[elicitation.split]
    if not questions or not trait.instructions:
        raise UserError(
            f"the trait {trait.label} has {len(questions)} {elicitation.split} questions and "
            f"{len(trait.instructions)} instruction pairs; both are needed"
        )
    prompts = [
        (Condition(f"prompt_{sign}"), elicited_prompt(elicitation, trait, sign, index))
        for sign in SIGNS
        for index in range(len(trait.instructions))
    ]
    asked = len(trait.instructions) * len(questions) * samples
    if asked < least:
        raise UserError(
            f"{asked} pairs would be asked, and at least {least} are to pass the filter; ask for "
            "more --samples, or lower --min-pairs"
        )
    return [
        Row(question, *prompt, stream_of(at, sample))
        for prompt in prompts
        for at, question in enumerate(questions)
        for sample in range(samples)
    ]


def _failures(positive: JudgedAnswer, negative: JudgedAnswer, thresholds: Thresholds) -> list[str]:
    scores = (positive.trait, negative.trait, positive.coherence, negative.coherence)
    if None in scores or not (positive.answer.strip() and negative.answer.strip()):
        return ["unscored"]
    yes, no, *coherences = (score or 0.0 for score in scores)
    checks = {
        "positive": yes >= thresholds.positive,
        "negative": no < thresholds.negative,
        "coherence": min(coherences) >= thresholds.coherence,
    }
    return [name for name, holds in checks.items() if not holds]


def _score(text: str, where: str) -> float | None:
    if not text.strip():
        return None
    try:
        score = float(text)
    except ValueError as error:
        raise UserError(f"{where} scores {text!r}; expected a number or an empty cell") from error
    return score if math.isfinite(score) else None  # other tools write nan for an empty cell
