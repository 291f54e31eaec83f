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

from persona_lora.core.errors import UserError
from persona_lora.core.files import (
    ensure_writable_folder,
    read_text,
    write_json,
    write_jsonl,
    write_text,
)
from persona_lora.core.personas import (
    PersonaConversation,
    conversation_rows,
    read_conversations,
)
from persona_lora.profiles.features import Features, extract_features
from persona_lora.profiles.judge_prompt import DEFAULT_TEMPLATE, build_judge_prompt, check_template
from persona_lora.profiles.profile import Embed, describe, select_samples

logger = logging.getLogger(__name__)

FEWEST_UTTERANCES = 5
FEW_UTTERANCES = 10  # what the embedded persona judge needs
CONVERSATIONS, RAW = "conversations.jsonl", "raw_conversations.json"
PROFILE, PROMPT = "persona_profile.txt", "final_judge_prompt.txt"


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
        profile = (write_profile or _from_template)(features, samples)
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


def _from_template(features: Features, samples: Sequence[str]) -> str:
    return describe(features)
