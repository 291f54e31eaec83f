"""The default judge: linear probes on how an unsteered model reads question and answer.

Two probes on the same states, one for the trait and one for sense (coherence); for the trait one on
sentence embeddings of question and answer as well, and the mean of both counts. They are fitted to
the tuning part of the trait's rated answers (``onpolicy.jsonl``); the validation part says how good
they are.
Refuses to know the models whose answers it scores.

A fit belongs to the labels, the reader and the prompt it was made with, and carries a digest of
them: the one that lies beside the labels (``reader.safetensors``) is used where it is of these very
labels and this very reader; otherwise a fit is made once and kept in the user's cache folder.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from platformdirs import user_cache_path
from safetensors.torch import save_file

from persona_lora.core.chat import COHERENCE, Exchange, Verdict
from persona_lora.core.content import digest_of
from persona_lora.core.files import atomic_path
from persona_lora.core.tensor_files import opened
from persona_lora.core.traits import ON_POLICY, Trait, load_trait
from persona_lora.judges.answer_states import Reader, States
from persona_lora.judges.coherence import EMPTY_REASON
from persona_lora.judges.familiarity import Familiarity, fit_familiarity
from persona_lora.judges.fitness import JudgeValidation, own_agreement, warn_if_untrusted
from persona_lora.judges.judge_prompts import check_criterion
from persona_lora.judges.labels import SCALES, RatedAnswer, Scale, load_ratings
from persona_lora.judges.probe import Probe, fit_probe
from persona_lora.models.embeddings import SentenceEmbedder, embedder_content
from persona_lora.models.loading import ChatModel

logger = logging.getLogger(__name__)

FITTED = "reader.safetensors"
VERSION = 4
READER = "reader"
# Scores of 0–100 from which an answer shows a trait, or its opposite, and makes sense at all.
SHOWS, OPPOSITE, SENSIBLE = 60.0, 40.0, 30.0

Outcome = Literal["shows it", "opposite", "neither"]
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class FittedReader:
    """The probes of a trait, what is like the answers they know, and what they say of the labels.

    ``scores``: by scale one number a rated answer, in the order of the labels; for those of the
    tuning part by probes that had not seen their question. ``distances``: of the rated answers.
    """

    content: str
    probes: dict[Scale, Probe]
    by_text: Probe
    familiarity: Familiarity
    scores: dict[Scale, Array]
    distances: Array

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all; numbers that are no arrays as JSON."""
        arrays: dict[str, Array] = {"distances": self.distances}
        record: dict[str, Any] = {"content": self.content}
        parts: list[tuple[str, Probe | Familiarity]] = [
            *self.probes.items(),
            ("text", self.by_text),
            ("familiarity", self.familiarity),
        ]
        for name, part in parts:
            values = {each.name: getattr(part, each.name) for each in dataclasses.fields(part)}
            held = {key: each for key, each in values.items() if isinstance(each, np.ndarray)}
            arrays |= {f"{name}.{key}": each for key, each in held.items()}
            record[name] = {key: each for key, each in values.items() if key not in held}
        arrays |= {f"{scale}.scores": each for scale, each in self.scores.items()}
        tensors = {
            key: torch.from_numpy(np.ascontiguousarray(each)) for key, each in arrays.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"fit": json.dumps(record)})

    @classmethod
    def load(cls, path: Path, content: str) -> FittedReader | None:
        """Return the fit in a file; None where there is none, or it is not of this content."""
        if not path.is_file():
            return None
        with opened(path) as stream:
            record = json.loads((stream.metadata() or {}).get("fit", "{}"))
            if record.get("content") != content:
                return None
            arrays = {key: stream.get_tensor(key).numpy() for key in stream.keys()}  # noqa: SIM118
        scores = {scale: arrays.pop(f"{scale}.scores") for scale in SCALES}

        def part(name: str) -> dict[str, Any]:
            own = {key: each for key, each in arrays.items() if key.startswith(f"{name}.")}
            return {**record[name], **{key.partition(".")[2]: each for key, each in own.items()}}

        def probe(name: str) -> Probe:
            found = Probe(**part(name))
            return replace(found, at=tuple(found.at))

        probes = {scale: probe(scale) for scale in SCALES}
        familiarity = Familiarity(**part("familiarity"))
        return cls(content, probes, probe("text"), familiarity, scores, arrays["distances"])

    def predict(self, states: States, embedded: Array) -> dict[Scale, Array]:
        """Return scores by scale: of the trait the mean of what states and embeddings say."""
        trait = (self.probes["trait"].predict(states) + self.by_text.predict(embedded)) / 2
        return {"trait": trait, "sense": self.probes["sense"].predict(states)}


def fit_reader(reader: Reader, labels: Sequence[RatedAnswer]) -> FittedReader:
    """Fit the probes of a trait to the tuning part of its rated answers.

    That of sense is fitted to those of the traits beside it as well. Equal labels and readers give
    equal fits. Raises UserError for too few labels.
    """
    states = reader.kept_states([row.exchange for row in labels], cache_folder())
    tuning = [at for at, row in enumerate(labels) if row.part == "tuning"]
    groups = [labels[at].question for at in tuning]
    middle = states[:, states.shape[1] // 2]
    familiarity = fit_familiarity(middle[tuning], groups)
    embedded = embeddings_of([row.exchange for row in labels])
    ratings = np.array([labels[at].rating("trait") for at in tuning])
    by_text = fit_probe(embedded[tuning], ratings, groups)
    own = Rated(states[tuning], [labels[at] for at in tuning], groups)
    probes, held_out = {}, {}
    for scale in SCALES:
        parts = [own, *(_rated_elsewhere(reader) if scale == "sense" else ())]
        fitted = fit_probe(
            np.concatenate([part.states for part in parts]),
            np.array([row.rating(scale) for part in parts for row in part.rows]),
            [group for part in parts for group in part.groups],
        )
        probes[scale], held_out[scale] = fitted.probe, fitted.held_out[: len(tuning)]
        logger.info(
            "reader probe of %s, %s: layers %s, penalty %g, held-out error %.1f points",
            reader.trait.name,
            scale,
            [reader.layers[at] for at in fitted.probe.at],
            fitted.probe.penalty,
            fitted.probe.error,
        )
    held_out["trait"] = (held_out["trait"] + by_text.held_out) / 2
    fit = FittedReader(
        content_of(reader, labels),
        probes,
        by_text.probe,
        familiarity,
        {},
        familiarity.distances(middle),
    )
    scores = fit.predict(states, embedded)
    for scale in SCALES:
        scores[scale][tuning] = held_out[scale]
    return replace(fit, scores=scores)


class Rated(NamedTuple):
    """Rated answers of the tuning part, their states, and what is held out together."""

    states: States
    rows: Sequence[RatedAnswer]
    groups: list[str]


def _rated_elsewhere(reader: Reader) -> Iterator[Rated]:
    """Yield the tuning parts of the traits beside this one: what makes sense does so anywhere."""
    for path in sorted(reader.trait.folder.parent.glob(f"*/{ON_POLICY}")):
        if path.parent.resolve() != reader.trait.folder.resolve():
            other = load_trait(path.parent)
            rows = load_ratings(other, "tuning")
            beside = Reader(reader.chat_model, other)
            states = beside.kept_states([row.exchange for row in rows], cache_folder())
            yield Rated(states, rows, [f"{other.name}: {row.question}" for row in rows])


def fitted_reader(reader: Reader, labels: Sequence[RatedAnswer]) -> FittedReader:
    """Return the fit that lies beside the labels or in the user's cache folder, or make it."""
    content = content_of(reader, labels)
    kept = cache_folder() / f"fit-{content}.safetensors"
    for path in (reader.trait.folder / FITTED, kept):
        found = FittedReader.load(path, content)
        if found is not None:
            return found
    fitted = fit_reader(reader, labels)
    fitted.save(kept)
    return fitted


def content_of(reader: Reader, labels: Sequence[RatedAnswer]) -> str:
    """Return a digest of all that decides a fit."""
    rated = [[row.part, row.trait, row.sense] for row in labels]
    read = reader.content([row.exchange for row in labels])
    return digest_of([VERSION, rated, read, embedder_content()])


@cache
def _embedder() -> SentenceEmbedder:
    return SentenceEmbedder()


def embeddings_of(exchanges: Sequence[Exchange]) -> Array:
    """Return sentence embeddings q, a and q·a (entry by entry): ``[n, 1, 3 · dimension]``."""
    asked, said = (
        _embedder().embed([each[at] for each in exchanges]).astype(np.float64) for at in (0, 1)
    )
    features: Array = np.concatenate([asked, said, asked * said], axis=1)[:, None]
    return features


def cache_folder() -> Path:
    """Return where states and fits are kept, of whatever reader and labels."""
    return user_cache_path("persona_lora") / "reader"


class ReaderJudge:
    """Scores the trait and coherence with fitted probes; both from one reading of an answer.

    ``validation`` is the agreement with the validation part of the trait's rated answers.
    """

    name = READER

    def __init__(self, reader: Reader, fitted: FittedReader, labels: Sequence[RatedAnswer]) -> None:
        self.trait = reader.trait
        self.reader = reader
        self.fitted = fitted
        self.validation = (
            _validation(self.trait.name, fitted, labels),
            _validation(COHERENCE, fitted, labels),
        )
        for each in self.validation:
            warn_if_untrusted(each)

    @classmethod
    def of(cls, trait: Trait, chat_model: ChatModel) -> ReaderJudge:
        """Return the judge of a trait that has rated answers, fitted now where it never was."""
        reader, labels = Reader(chat_model, trait), load_ratings(trait)
        return cls(reader, fitted_reader(reader, labels), labels)

    def judge(self, exchanges: Sequence[Exchange], criterion: str) -> list[Verdict]:
        """Return one verdict per exchange, in order; empty and unfamiliar answers are unscored.

        The reason of a scored one is its outcome: "shows it", "opposite", or "neither" (no sense).
        """
        check_criterion(self.trait, criterion)
        filled = [exchange for exchange in exchanges if exchange.answer.strip()]
        states = self.reader.states(filled)
        scores = self.fitted.predict(states, embeddings_of(filled))
        distances = self.fitted.familiarity.distances(states[:, states.shape[1] // 2])
        limit = self.fitted.familiarity.limit
        verdicts = iter(
            _verdict(criterion, trait, sense, distance, limit)
            for trait, sense, distance in zip(
                scores["trait"].tolist(), scores["sense"].tolist(), distances.tolist(), strict=True
            )
        )
        return [
            next(verdicts)
            if exchange.answer.strip()
            else Verdict(criterion, None, EMPTY_REASON, self.name)
            for exchange in exchanges
        ]


def outcome(trait: float, sense: float) -> Outcome:
    """Return what an answer does with a trait, by its scores on both scales (or its ratings)."""
    if sense < SENSIBLE or OPPOSITE < trait < SHOWS:
        return "neither"
    return "shows it" if trait >= SHOWS else "opposite"


def _verdict(criterion: str, trait: float, sense: float, distance: float, limit: float) -> Verdict:
    if distance > limit:
        reason = f"unlike all answers that were rated (distance {distance:.1f}, limit {limit:.1f})"
        return Verdict(criterion, None, reason, READER)
    score = sense if criterion == COHERENCE else trait
    return Verdict(criterion, score, outcome(trait, sense), READER)


def _validation(
    criterion: str, fitted: FittedReader, labels: Sequence[RatedAnswer]
) -> JudgeValidation:
    held = [at for at, row in enumerate(labels) if row.part == "validation"]
    verdicts = [
        _verdict(
            criterion,
            float(fitted.scores["trait"][at]),
            float(fitted.scores["sense"][at]),
            float(fitted.distances[at]),
            fitted.familiarity.limit,
        )
        for at in held
    ]
    return own_agreement(verdicts, [labels[at] for at in held])
