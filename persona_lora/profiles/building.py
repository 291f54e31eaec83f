"""The files of a persona, made from its training conversations.

Only conversations of the split "train" go into features, samples, profile and judge prompt: what
is held out stays unseen until a persona's reproduction is measured on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from persona_lora.core.errors import UserError
from persona_lora.core.files import ensure_writable_folder, write_json, write_jsonl, write_text
from persona_lora.core.personas import PersonaConversation, conversation_rows
from persona_lora.profiles.features import Features, extract_features
from persona_lora.profiles.judge_prompt import DEFAULT_TEMPLATE, build_judge_prompt
from persona_lora.profiles.profile import describe
from persona_lora.profiles.selection import Embed, select_samples

FEW_UTTERANCES = 10


@dataclass(frozen=True)
class BuiltPersona:
    """What was made: the folder, the features, and how many utterances each split has."""

    folder: Path
    features: Features
    num_train: int
    num_test: int


def build_persona(
    folder: Path,
    conversations: Sequence[PersonaConversation],
    embed: Embed,
    *,
    num_samples: int = 10,
    template: str = DEFAULT_TEMPLATE,
    write_profile: Callable[[Features, Sequence[str]], str] | None = None,
) -> BuiltPersona:
    """Write the six files of a persona into ``folder``.

    ``conversations.jsonl`` (all, with their splits), ``raw_conversations.json`` (the training
    messages in a flat list), ``persona_features.json``, ``persona_samples.json``,
    ``persona_profile.txt`` and ``final_judge_prompt.txt``. ``write_profile`` replaces the
    template's sentences, by a language model for instance.

    Raises UserError when the training conversations hold under ten utterances.
    """
    train = [each for each in conversations if each.split == "train"]
    utterances = [text for each in train for text in each.utterances]
    if len(utterances) < FEW_UTTERANCES:
        raise UserError(
            f"the training conversations hold {len(utterances)} utterances of the persona; at "
            f"least {FEW_UTTERANCES} are needed to tell how someone speaks"
        )
    features = extract_features(utterances)
    samples = select_samples(utterances, embed, number=num_samples)
    profile = (write_profile or _from_template)(features, samples)
    prompt = build_judge_prompt(profile, samples, template=template)
    ensure_writable_folder(folder)
    write_jsonl(folder / "conversations.jsonl", conversation_rows(conversations))
    write_json(
        folder / "raw_conversations.json", [turn for each in train for turn in each.messages]
    )
    write_json(folder / "persona_features.json", dataclasses.asdict(features))
    write_json(folder / "persona_samples.json", samples)
    write_text(folder / "persona_profile.txt", profile)
    write_text(folder / "final_judge_prompt.txt", prompt)
    held_out = sum(len(each.utterances) for each in conversations if each.split == "test")
    return BuiltPersona(folder, features, len(utterances), held_out)


def _from_template(features: Features, samples: Sequence[str]) -> str:
    return describe(features)
