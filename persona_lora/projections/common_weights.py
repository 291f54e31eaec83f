"""What two models both hold: finetunes come with padded vocabularies, buffers, heads written out.

Knows which differences leave the comparison whole; every one of them is named, any other refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from persona_lora.core.errors import UserError, few_names
from persona_lora.models.loaded_model import BUFFERS
from persona_lora.models.weight_files import WeightSource

# One row per token: a padded vocabulary has more of them.
VOCABULARY = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|embed_out|lm_head)\.weight$"
)


@dataclass(frozen=True)
class CommonWeights:
    """The rows to compare of each tensor that both models hold, and what is left out."""

    rows: dict[str, int]
    left_out: tuple[str, ...]


def common_weights(
    original: WeightSource, finetuned: WeightSource, touched: Collection[str]
) -> CommonWeights:
    """Return what both hold.

    Raises UserError where a difference may be a weight under another name.

    Left out are buffers, a part that the other model has not at all (a tied head written out, a
    value head), and rows of a longer vocabulary; never anything of the modules in ``touched``.
    """
    before, after = original.tensors, finetuned.tensors
    known = {
        source: {name.partition(".")[0] for name in source.tensors}
        for source in (original, finetuned)
    }
    lacking = {
        other: [
            name
            for name in sorted(source.tensors.keys() - other.tensors.keys())
            if not BUFFERS.search(name) and name.partition(".")[0] in known[other]
        ]
        for source, other in ((original, finetuned), (finetuned, original))
    }
    if any(lacking.values()):
        parts = "; ".join(
            f"{each.label} lacks {few_names(names)}" for each, names in lacking.items() if names
        )
        raise UserError(f"the models do not hold the same weights: {parts}")
    left_out = [
        f"{name} (only {source.label} has it)"
        for source, other in ((original, after), (finetuned, before))
        for name in sorted(source.tensors.keys() - other.keys())
    ]
    rows = {}
    for name in (each for each in after if each in before):
        shapes = [tuple(source.tensors[name].shape) for source in (original, finetuned)]
        lengths = sorted(shape[0] if shape else 1 for shape in shapes)
        rows[name] = lengths[0]
        if shapes[0] == shapes[1]:
            continue
        padded = VOCABULARY.search(name) and name.removesuffix(".weight") not in touched
        if not padded or shapes[0][1:] != shapes[1][1:]:
            raise UserError(
                f"{name} is {list(shapes[0])} in {original.label} and {list(shapes[1])} in "
                f"{finetuned.label}; a change of shape is no difference of weights"
            )
        left_out.append(f"rows {lengths[0]} to {lengths[1] - 1} of {name} (only one has them)")
    return CommonWeights(rows, tuple(left_out))
