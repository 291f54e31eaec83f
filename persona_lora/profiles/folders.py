"""The files of a persona, made from its training conversations.

Only conversations of the split "train" go into features, samples, profile and judge prompt: what
is held out stays unseen until a persona's reproduction is measured on it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from persona_lora.core.errors import UserError
from persona_lora.core.files import (
    ensure_writable_folder,
    read_text,
    write_json,
    write_jsonl,
    write_text,
)
from persona_lora.core.personas import PersonaConversation, conversation_rows, read_conversations
from persona_lora.profiles.features import Features, extract_features, words_of
from persona_lora.profiles.judge_prompt import DEFAULT_TEMPLATE, build_judge_prompt, check_template

logger = logging.getLogger(__name__)

FEWEST_UTTERANCES = 5
FEW_UTTERANCES = 10  # what the embedded persona judge needs
CONVERSATIONS, RAW = "conversations.jsonl", "raw_conversations.json"
PROFILE, PROMPT = "persona_profile.txt", "final_judge_prompt.txt"


Steps = tuple[tuple[float, str], ...]

LENGTH: Steps = (
    (8, "speaks in very short utterances"),
    (15, "keeps utterances short"),
    (28, "speaks in utterances of middling length"),
    (1e9, "speaks at length, in long utterances"),
)
FORMALITY: Steps = (
    (0.15, "very casually"),
    (0.4, "casually"),
    (0.58, "neither formally nor casually"),
    (0.75, "rather formally"),
    (1e9, "very formally"),
)
SENTIMENT: Steps = (
    (-0.15, "The tone is gloomy or critical."),
    (0.05, "The tone is level and matter-of-fact."),
    (0.3, "The tone is friendly."),
    (1e9, "The tone is very positive and warm."),
)


def describe(features: Features) -> str:
    """Return the profile: sentences on length, register, focus, tone, manner and relations."""
    sentences = [
        f"This person {_step(features.avg_words, LENGTH)} (about {features.avg_words:.0f} words) "
        f"and writes {_step(features.formality, FORMALITY)}.",
        _focus(features),
        _step(features.sentiment, SENTIMENT),
        *_manners(features),
        *_relations(features),
    ]
    return " ".join(sentence for sentence in sentences if sentence) + "\n"


def _step(value: float, steps: Steps) -> str:
    return next(text for limit, text in steps if value < limit)


def _focus(features: Features) -> str:
    own, other = features.first_person_singular_rate, features.second_person_rate
    if own > 0.05 and own > 3 * other:
        return "Talk is mostly about the person's own life and thoughts."
    if other > 0.05 and other > own:
        return "Attention goes to the other person more than to the self."
    if own < 0.03:
        return "The person hardly speaks of the self."
    return "The person speaks of the self as much as most people do."


def _manners(features: Features) -> list[str]:
    """Return what stands out, strongest thresholds first; nothing for what is ordinary."""
    found = (
        (features.question_rate > 0.35, "Asks many questions."),
        (features.question_rate < 0.04, "Hardly ever asks a question."),
        (features.exclamation_rate > 0.3, "Uses many exclamation marks."),
        (features.lower_case_rate > 0.6, "Types in lower case."),
        (features.humor_rate > 0.12, "Jokes and laughs a lot."),
        (features.hedge_rate > 0.02, "Hedges: perhaps, probably, I suppose."),
        (features.past_rate > 0.1, "Tells of the past: memories and stories."),
        (features.advice_rate > 0.018, "Gives practical advice and solves problems."),
        (features.empathy_rate > 0.025, "Shows feeling for others."),
        (features.emotionality > 0.5, "Words carry strong emotion."),
        (features.contraction_rate < 0.005, "Avoids contractions."),
    )
    return [sentence for holds, sentence in found if holds]


def _relations(features: Features) -> list[str]:
    counts = features.relationship_contexts
    often = sorted(counts, key=lambda name: (-counts[name], name))[:2]
    return [f"Mentions {' and '.join(often)} most among relations."] if often else []


Embed = Callable[[Sequence[str]], NDArray[np.float32]]

SHORTEST = 4  # words; "Yes, indeed." says little about anyone
TYPICALITY = 0.6


def select_samples(
    utterances: Sequence[str], embed: Embed, *, number: int = 10, typicality: float = TYPICALITY
) -> list[str]:
    """Return up to ``number`` utterances by maximal marginal relevance, in their own order.

    The next one maximises t·cos(u, centroid) − (1 − t)·max cos(u, chosen) over unit embeddings
    (Carbonell & Goldstein 1998): typical, and unlike those chosen before. Equal utterances count
    once, ties go to the earlier one, so the choice is deterministic. Utterances of under four
    words are taken only where there are too few longer ones.
    """
    if number < 1 or not 0 <= typicality <= 1:
        raise UserError(
            f"samples: number must be at least 1 and typicality in [0, 1], got {number} and "
            f"{typicality}"
        )
    distinct = list(dict.fromkeys(utterances))
    long = [text for text in distinct if len(words_of(text)) >= SHORTEST]
    pool = long if len(long) >= number else distinct
    if not pool:
        raise UserError("there are no utterances to choose samples from")
    vectors = embed(pool)  # [n, size], unit rows
    centroid = vectors.mean(axis=0)
    typical = vectors @ (centroid / max(float(np.linalg.norm(centroid)), 1e-9))
    nearest = np.zeros(len(pool))
    chosen: list[int] = []
    while len(chosen) < min(number, len(pool)):
        scores = typicality * typical - (1 - typicality) * nearest
        scores[chosen] = -np.inf
        best = int(np.argmax(scores))
        chosen.append(best)
        similar = vectors @ vectors[best]
        nearest = similar if len(chosen) == 1 else np.maximum(nearest, similar)
    return [pool[index] for index in sorted(chosen)]


@dataclass(frozen=True)
class BuiltPersona:
    """What was made: the folder, the features, and how many utterances each split has.

    ``kept`` names files of the user that were there before and stayed.
    """

    folder: Path
    features: Features
    num_train: int
    num_test: int
    kept: tuple[str, ...] = ()


def build_persona(
    folder: Path,
    conversations: Sequence[PersonaConversation],
    embed: Embed,
    *,
    num_samples: int = 10,
    template: str = DEFAULT_TEMPLATE,
    write_profile: Callable[[Features, Sequence[str]], str] | None = None,
    overwrite: bool = False,
) -> BuiltPersona:
    """Write the six files of a persona into ``folder``.

    ``conversations.jsonl`` (all, with their splits), ``raw_conversations.json`` (the training
    messages in a flat list), ``persona_features.json``, ``persona_samples.json``,
    ``persona_profile.txt`` and ``final_judge_prompt.txt``. ``write_profile`` replaces the
    template's sentences, by a language model for instance. In a folder that was not built before,
    files that are there (of a published persona) stay as they are, and its profile is used.

    Raises UserError when the training conversations hold under five utterances, and where a file
    that was built would change; nothing is written then. ``overwrite`` makes all of them anew, but
    for a ``raw_conversations.json`` that the conversations may have come from.
    """
    train = [each for each in conversations if each.split == "train"]
    utterances = [text for each in train for text in each.utterances]
    _check_number(len(utterances))
    check_template(template)
    built_before = (folder / CONVERSATIONS).exists()
    if write_profile is not None and not overwrite and built_before:
        _refuse([path for path in (folder / PROFILE, folder / PROMPT) if path.exists()])
    features = extract_features(utterances)
    samples = select_samples(utterances, embed, number=num_samples)
    if (folder / PROFILE).is_file() and not overwrite and not built_before:
        profile = read_text(folder / PROFILE)
    else:
        profile = write_profile(features, samples) if write_profile else describe(features)
    ensure_writable_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build.") as name:
        new = Path(name)
        write_jsonl(new / CONVERSATIONS, conversation_rows(conversations))
        write_json(new / RAW, [turn for each in train for turn in each.messages])
        write_json(new / "persona_features.json", dataclasses.asdict(features))
        write_json(new / "persona_samples.json", samples)
        write_text(new / PROFILE, profile)
        write_text(new / PROMPT, build_judge_prompt(profile, samples, template=template))
        kept = _publish(new, folder, overwrite=overwrite, built_before=built_before)
    held_out = sum(len(each.utterances) for each in conversations if each.split == "test")
    return BuiltPersona(folder, features, len(utterances), held_out, kept)


def _check_number(number: int) -> None:
    if number < FEWEST_UTTERANCES:
        raise UserError(
            f"the training conversations hold {number} utterances of the persona; at least "
            f"{FEWEST_UTTERANCES} are needed to tell how someone speaks"
        )
    if number < FEW_UTTERANCES:
        logger.warning(
            "%d training utterances: the embedded persona judge needs %d", number, FEW_UTTERANCES
        )


def _publish(new: Path, folder: Path, *, overwrite: bool, built_before: bool) -> tuple[str, ...]:
    """Move the files that are new or changed; return those that a user's own stand in for.

    In a folder that was built before, nothing is moved where a file would change: UserError.
    """
    changed = [path.name for path in sorted(new.iterdir()) if not _same(path, folder / path.name)]
    there = [name for name in changed if (folder / name).exists()]
    if not built_before:  # what stands there came with the conversations
        kept = [name for name in there if name == RAW or not overwrite]
    else:
        kept = [name for name in there if name == RAW and not overwrite]
        if not overwrite:
            _refuse([folder / name for name in there if name != RAW])
    for name in changed:
        if name not in kept:
            os.replace(new / name, folder / name)
    return tuple(name for name in kept if name != RAW)


def _same(new: Path, old: Path) -> bool:
    if not old.is_file():
        return False
    if new.name != CONVERSATIONS:
        return new.read_bytes() == old.read_bytes()
    return read_conversations(new) == read_conversations(old)  # however it is written down


def _refuse(paths: Sequence[Path]) -> None:
    if paths:
        raise UserError(
            f"{paths[0]} exists and would change; pass --overwrite to make it anew, or choose "
            "another --id"
        )
