"""Probes fitted to a trait's rated answers, what they are fitted to, and the file they lie in.

What tells about an answer (``Evidence``) is an array; probes on it make the scores.
They are fitted to the tuning part of the rated answers (``onpolicy.jsonl``) and to nonsense made
from it, that of the trait to answers written for it (``written.jsonl``) as well; the validation
part says how good they are. Refuses to know models.

A fit belongs to the labels and the evidence it was made with, and carries a digest of both: the one
that lies beside the labels is used where it is of these very ones; otherwise a fit is made once and
kept in the user's cache folder.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from platformdirs import user_cache_path

from persona_lora.core.chat import Exchange
from persona_lora.core.content import digest_of
from persona_lora.core.tensor_files import load_with_record, save_with_record
from persona_lora.core.traits import ON_POLICY, Trait, load_trait
from persona_lora.judges.labels import SCALES, RatedAnswer, Scale, load_ratings, load_written
from persona_lora.judges.nonsense import nonsense_rows
from persona_lora.judges.probe import Familiarity, Probe, check_enough, fit_familiarity, fit_probe

logger = logging.getLogger(__name__)

VERSION = 6
WRITTEN_COUNT = 0.5  # of a written answer, beside one that a model gave
Array = NDArray[np.floating]
Scores = NDArray[np.float64]


class Evidence(Protocol):
    """What can be told of an answer to probes of one trait, as arrays by kind.

    Whether an answer makes sense is learnt from the rated answers of the traits beside as well.
    """

    @property
    def name(self) -> str:
        """What verdicts carry as ``judge``, and the fit's file is called."""

    @property
    def trait(self) -> Trait:
        """The trait that is judged."""

    def beside(self, trait: Trait) -> Evidence:
        """Return the same of another trait."""

    def content(self, exchanges: Sequence[Exchange]) -> str:
        """Return a digest of all that decides the evidence of exchanges."""

    def read(self, exchanges: Sequence[Exchange], *, keep: bool = False) -> Array:
        """Return the evidence, ``[n, layers, width]``; ``keep`` it for a later call."""


@dataclass(frozen=True, eq=False)
class FittedProbes:
    """The probes of a trait, what is like the answers they know, and what they say of the labels.

    ``scores``: by scale one number a rated answer, in the order of the labels; for those of the
    tuning part by probes that had not seen their question. ``distances``: of the rated answers.
    """

    content: str
    probes: dict[Scale, Probe]
    familiarity: Familiarity
    scores: dict[Scale, Scores]
    distances: Scores

    def predict(self, evidence: Array) -> dict[Scale, Scores]:
        """Return scores by scale."""
        return {scale: probe.predict(evidence) for scale, probe in self.probes.items()}

    def strangeness(self, evidence: Array) -> Scores:
        """Return the distances of answers from those that were rated."""
        return self.familiarity.distances(_familiar(evidence))

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all; numbers that are no arrays as JSON."""
        arrays: dict[str, Scores] = {"distances": self.distances}
        record: dict[str, Any] = {"content": self.content}
        parts: dict[str, Probe | Familiarity] = {"familiarity": self.familiarity}
        parts |= self.probes.items()
        for name, part in parts.items():
            values = {each.name: getattr(part, each.name) for each in dataclasses.fields(part)}
            held = {key: each for key, each in values.items() if isinstance(each, np.ndarray)}
            arrays |= {f"{name}.{key}": each for key, each in held.items()}
            record[name] = {key: each for key, each in values.items() if key not in held}
        arrays |= {f"{scale}.scores": each for scale, each in self.scores.items()}
        tensors = {key: torch.from_numpy(each) for key, each in arrays.items()}
        save_with_record(path, tensors, "fit", record)

    @classmethod
    def load(cls, path: Path, content: str) -> FittedProbes | None:
        """Return the fit in a file; None where there is none, or it is not of this content."""
        if not path.is_file():
            return None
        tensors, record = load_with_record(path, "fit")
        if record is None or record.pop("content", None) != content:
            return None
        arrays = {key: each.numpy() for key, each in tensors.items()}
        scores = {scale: arrays.pop(f"{scale}.scores") for scale in SCALES}

        def part(name: str) -> dict[str, Any]:
            own = {key: each for key, each in arrays.items() if key.startswith(f"{name}.")}
            return {**record[name], **{key.partition(".")[2]: each for key, each in own.items()}}

        probes = {
            scale: replace(probe, penalties=tuple(probe.penalties))
            for scale in SCALES
            for probe in [Probe(**part(scale))]
        }
        return cls(content, probes, Familiarity(**part("familiarity")), scores, arrays["distances"])


def _familiar(evidence: Array) -> Array:
    """Return the layer by which answers are alike or not: the middle one."""
    return evidence[:, evidence.shape[1] // 2]


def fitted_probes(evidence: Evidence, labels: Sequence[RatedAnswer]) -> FittedProbes:
    """Return the fit that lies beside the labels or in the user's cache folder, or make it."""
    content = content_of(evidence, labels)
    kept = cache_folder() / f"fit-{content}.safetensors"
    for path in (evidence.trait.folder / f"{evidence.name}.safetensors", kept):
        found = FittedProbes.load(path, content)
        if found is not None:
            return found
    fitted = fit_probes(evidence, labels)
    fitted.save(kept)
    return fitted


def content_of(evidence: Evidence, labels: Sequence[RatedAnswer]) -> str:
    """Return a digest of all that decides a fit."""
    beside = list(traits_beside(evidence))
    rows = [*labels, *made_up(labels, beside), *load_written(evidence.trait, labels)]
    rated = [[row.part, row.trait, row.sense] for row in rows]
    read = evidence.content([row.exchange for row in rows])
    own = digest_of([VERSION, evidence.name, rated, read])
    others = [
        [other.name, other.description, [[row.question, row.answer, row.sense] for row in rows]]
        for other, rows in beside
    ]
    return digest_of([own, others])


def cache_folder() -> Path:
    """Return where evidence and fits are kept, of whatever models and labels."""
    return user_cache_path("persona_lora") / "reader"


class _Rated(NamedTuple):
    """Rated answers to fit to, what is known of them, and what is held out together."""

    rows: Sequence[RatedAnswer]
    evidence: Array
    groups: list[str]


def fit_probes(evidence: Evidence, labels: Sequence[RatedAnswer]) -> FittedProbes:
    """Fit the probes of a trait to the tuning part of its rated answers, and to nonsense.

    That of sense is fitted to those of the traits beside it as well. Equal labels and evidence give
    equal fits. Raises UserError for too few labels.
    """
    tuning = [at for at, row in enumerate(labels) if row.part == "tuning"]
    rated = [labels[at] for at in tuning]
    read = evidence.read([row.exchange for row in labels], keep=True)
    own = _Rated(rated, read[tuning], [row.question for row in rated])
    familiarity = fit_familiarity(_familiar(own.evidence), own.groups)
    traits = list(traits_beside(evidence))
    nonsense = _read(evidence, made_up(labels, traits))
    written = load_written(evidence.trait, labels)
    beside: dict[Scale, list[_Rated]] = {
        "trait": [_read(evidence, written)] if written else [],
        "sense": [_read(evidence.beside(t), rows, f"{t.name}: ") for t, rows in traits],
    }
    probes, held_out = {}, {}
    for scale in SCALES:
        parts = [own, nonsense, *beside[scale]]
        others = sum(len(part.rows) for part in beside[scale])
        each = WRITTEN_COUNT if scale == "trait" else 1.0
        fitted = fit_probe(
            np.concatenate([part.evidence for part in parts]),
            np.array([row.rating(scale) for part in parts for row in part.rows]),
            [group for part in parts for group in part.groups],
            counts=counts_of(len(own.rows), len(nonsense.rows), [each] * others),
        )
        probes[scale], held_out[scale] = fitted.probe, fitted.held_out[: len(tuning)]
        logger.info(
            "%s of %s, %s: penalties %s, held-out error %.1f points",
            evidence.name,
            evidence.trait.name,
            scale,
            fitted.probe.penalties,
            fitted.probe.error,
        )
    distances = familiarity.distances(_familiar(read))
    fit = FittedProbes(content_of(evidence, labels), probes, familiarity, {}, distances)
    scores = fit.predict(read)
    for scale in SCALES:
        scores[scale][tuning] = held_out[scale]
    return replace(fit, scores=scores)


def counts_of(own: int, nonsense: int, beside: Sequence[float] = ()) -> Scores:
    """Return how much each row counts: own ones, then nonsense, then those beside as they say.

    All nonsense together counts at most as much as what was rated of the trait.
    """
    less = np.full(nonsense, min(1.0, own / max(nonsense, 1)))
    return np.concatenate([np.ones(own), less, beside])


def _read(evidence: Evidence, rows: Sequence[RatedAnswer], prefix: str = "") -> _Rated:
    read = evidence.read([row.exchange for row in rows], keep=True)
    return _Rated(rows, read, [f"{prefix}{row.question}" for row in rows])


def made_up(
    labels: Sequence[RatedAnswer], beside: Sequence[tuple[Trait, list[RatedAnswer]]]
) -> list[RatedAnswer]:
    """Return the nonsense that is fitted to beside the tuning part of labels."""
    tuning = [row for row in labels if row.part == "tuning"]
    check_enough([row.question for row in tuning])
    return nonsense_rows(tuning, [row for _, rows in beside for row in rows])


def traits_beside(evidence: Evidence) -> Iterator[tuple[Trait, list[RatedAnswer]]]:
    """Yield the rated traits in the folder beside this one, with their tuning parts."""
    paths = evidence.trait.folder.parent.glob(f"*/{ON_POLICY}")
    for path in sorted(paths, reverse=True):
        if path.parent.resolve() != evidence.trait.folder.resolve():
            other = load_trait(path.parent)
            yield other, load_ratings(other, "tuning")
