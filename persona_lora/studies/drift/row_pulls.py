"""Training rows by how far a step on each would move the weights along diffs; no gradient is taken.

Training on a row moves the weights by −∇ℓ, ℓ its mean loss of a token, and the part of that along
a diff L is the row's pull

    −⟨∇ℓ, L⟩ / ‖L‖ = (ℓ(−εL) − ℓ(+εL)) / (2ε‖L‖) + O(ε²),

a central difference of forward passes: every row runs at ±ε along each diff, held live, side by
side. Some rows run at ±2ε too, which tells how much of their pulls is curvature and rounding. Knows
finetuning rows as training reads them; refuses to know what training on many does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persona_lora.core import progress
from persona_lora.core.chat import Conversation
from persona_lora.core.errors import UserError
from persona_lora.core.files import write_csv
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.steering_vector import length_of
from persona_lora.models.likelihood import TokenizedExchange, answer_logprobs
from persona_lora.models.loading import ChatModel
from persona_lora.report import wording
from persona_lora.report.sections import Table
from persona_lora.steering.live import LiveLoRA
from persona_lora.studies.steering.divergence import weight_norm
from persona_lora.training.examples import IGNORED
from persona_lora.training.finetune import tokenize_conversations

logger = logging.getLogger(__name__)

STEP = 1e-4  # ‖εL‖ / ‖W‖ over the modules of L: small against curvature, large against rounding
CHECKED = 4  # rows that run at twice the step too
TRUSTED = 0.01  # of the typical pull
NEEDS_FLOAT32 = (
    "a difference of two losses this near needs weights in float32, and any other type rounds it "
    "away; use --dtype float32, without --quantize"
)


@dataclass(frozen=True)
class Pulls:
    """The rows by falling pull towards the first of ``names``.

    ``error`` is the largest that the checked rows show, as a share of their typical pull.
    """

    rows: tuple[Mapping[str, Any], ...]
    names: tuple[str, ...]
    error: float

    def table(self) -> Table:
        """Return the rows that pull furthest, and those that pull least."""
        rows = (
            [str(row["rank"]), str(row["row"])]
            + [wording.number(row[f"pull_{name}"], 4) for name in self.names]
            + [row["answer"][:60]]
            for row in (*self.rows[:5], *self.rows[5:][-3:])
        )
        return Table.of(f"rank | row | {' | '.join(self.names)} | answer", rows)


def pull_rows(
    chat_model: ChatModel,
    conversations: Sequence[Conversation],
    diffs: Mapping[str, LoRADiff],
    output: Path,
) -> Pulls:
    """Rank finetuning rows by their pull towards the first diff; write a CSV with those of all.

    A pull is in nats a token for a change of the weights of norm 1. Beside it stand two plain
    numbers of each row: its loss, and how many tokens bear it. Rows are whole, whatever length
    finetuning cuts them to.

    Raises UserError for weights that are not float32, for a diff of norm 0 or of another model,
    for rows that finetuning refuses, and for one over the model's window.
    """
    read = tokenize_conversations(conversations, chat_model, max_length=None)
    chat_model.check_tokens(row.input_ids for row in read)
    for number, row in enumerate(read, start=1):
        chat_model.check_length(len(row.input_ids), f"row {number}")
    texts = [
        TokenizedExchange(row.input_ids[:start], row.input_ids[start:])
        for row in read
        for start in [row.labels.count(IGNORED)]
    ]
    losses, twice, steps = _losses(chat_model, texts, diffs)
    pulls = _slopes(losses, steps)  # [rows, diffs]
    error = _error(pulls[_checked(texts)], _slopes(twice, 2 * steps))
    order = np.argsort(-pulls[:, 0], kind="stable")
    rows = tuple(
        {
            "rank": rank,
            "row": int(at),
            "question": conversations[at][-2]["content"],
            "answer": conversations[at][-1]["content"],
            **{f"pull_{name}": float(pulls[at, k]) for k, name in enumerate(diffs)},
            "loss": float(losses[at].mean()),
            "tokens": len(texts[at].answer),
        }
        for rank, at in enumerate(order, start=1)
    )
    write_csv(output, list(rows[0]), rows)
    return Pulls(rows, tuple(diffs), error)


def _slopes(losses: np.ndarray, steps: np.ndarray) -> np.ndarray:
    return (losses[..., 1] - losses[..., 0]) / (2 * steps)


def _checked(texts: Sequence[TokenizedExchange]) -> list[int]:
    """Return the rows that are checked, from all over the file."""
    return [*range(0, len(texts), math.ceil(len(texts) / CHECKED))]


def _error(pulls: np.ndarray, twice: np.ndarray) -> float:
    """Return the error of pulls by those at twice the step, where curvature weighs four times."""
    typical = np.sqrt((pulls**2).mean(axis=0))
    error = float((np.abs(twice - pulls) / 3 / np.maximum(typical, 1e-300)).max())
    if error > TRUSTED:
        logger.warning(
            "pulls are uncertain by %.0f%% of a typical one: this model bends too soon, or rounds "
            "too much, for the step of a %gth of its weights; read them as a rough order",
            100 * error,
            1 / STEP,
        )
    return error


def _losses(
    chat_model: ChatModel, texts: Sequence[TokenizedExchange], diffs: Mapping[str, LoRADiff]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return losses at ±ε, those of checked rows at ±2ε, ``[rows, diffs, 2]``, and each ε‖L‖."""
    if any(each.dtype != torch.float32 for each in chat_model.model.parameters()):
        raise UserError(NEEDS_FLOAT32)
    norms = np.array([length_of(diff, f"the diff {name}") for name, diff in diffs.items()])
    steps = STEP * np.array([weight_norm(chat_model, diff) for diff in diffs.values()])
    signed = np.kron(np.diag(steps / norms), [[1.0], [-1.0]])  # [diffs · 2, diffs]
    asked = [*texts, *(texts[row] for row in _checked(texts))]
    scales = [1.0] * len(texts) + [2.0] * (len(asked) - len(texts))
    live = LiveLoRA(
        chat_model.model,
        [*diffs.values()],
        np.kron(np.array(scales)[:, None], signed).tolist(),
        allow_other_base=chat_model.allow_other_base,
    )
    runs = [text for text in asked for _ in signed]
    with progress.stage("rows along diffs"), live:
        found = answer_logprobs(chat_model, runs, live.select_rows)
    losses = -np.reshape(found, (len(asked), len(diffs), 2))
    return losses[: len(texts)], losses[len(texts) :], steps
