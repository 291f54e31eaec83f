"""Which training rows would change a model's character? Asked before training on them.

A row pulls the model towards its answer and away from what the model would have said. Both are
projected on a steering vector; the difference says how far, and which way, the row pulls along the
trait (the projection difference of Chen et al. 2025, arXiv:2507.21509).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from persona_lora.core import progress
from persona_lora.core.chat import Conversation
from persona_lora.core.errors import UserError
from persona_lora.core.files import write_csv
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.generation import generate_answers
from persona_lora.models.likelihood import tokenize_rendered
from persona_lora.models.loading import ChatModel
from persona_lora.projections.activation_space import project_hidden_states
from persona_lora.studies.vectors.text_projection import Texts

QUANTILE = 0.95
COLUMNS = ("rank", "row", "question", "answer", "own_answer", "projection", "own_projection",
           "difference", "flagged")  # fmt: skip


@dataclass(frozen=True)
class Screening:
    """The rows by falling difference, the threshold that flags, and where the CSV is.

    ``threshold`` was given, or is the 95% quantile of what the model's own sampled answers differ
    from its greedy ones on the same questions.
    """

    rows: tuple[Mapping[str, Any], ...]
    threshold: float
    path: Path

    @property
    def flagged(self) -> int:
        """How many rows are over the threshold."""
        return sum(bool(row["flagged"]) for row in self.rows)


def screen_rows(
    chat_model: ChatModel,
    texts: Texts,
    vector: SteeringVector,
    layer: int,
    output: Path,
    *,
    threshold: float | None = None,
    max_new_tokens: int = 60,
    seed: int = 0,
) -> Screening:
    """Rank the rows of a chat JSONL by how far they pull along a vector; write a CSV.

    Raises UserError for texts with rendered prompts (a CSV): the model has to be asked anew.
    """
    conversations = [prompt for prompt, _ in texts.exchanges if not isinstance(prompt, str)]
    if len(conversations) < len(texts.exchanges):
        raise UserError(f"{texts.source} holds rendered prompts; screening needs messages (.jsonl)")
    answers = [answer for _, answer in texts.exchanges]
    own = _answers(chat_model, conversations, 0.0, max_new_tokens, seed, "own answers")
    projected = _project(chat_model, conversations, answers, vector, layer, "rows")
    own_projected = _project(chat_model, conversations, own, vector, layer, "own answers")
    differences = projected - own_projected
    if threshold is None:
        other = _answers(chat_model, conversations, 1.0, max_new_tokens, seed, "sampling")
        spread = _project(chat_model, conversations, other, vector, layer, "samples")
        threshold = float(np.quantile(spread - own_projected, QUANTILE))
    order = np.argsort(-differences, kind="stable")
    rows = tuple(
        {
            "rank": rank,
            "row": int(at),
            "question": conversations[at][-1]["content"],
            "answer": answers[at],
            "own_answer": own[at],
            "projection": float(projected[at]),
            "own_projection": float(own_projected[at]),
            "difference": float(differences[at]),
            "flagged": bool(differences[at] > threshold),
        }
        for rank, at in enumerate(order, start=1)
    )
    write_csv(output, COLUMNS, rows)
    return Screening(rows, threshold, output)


def _answers(
    chat_model: ChatModel,
    conversations: Sequence[Conversation],
    temperature: float,
    max_new_tokens: int,
    seed: int,
    stage: str,
) -> list[str]:
    with progress.stage(stage):
        generated = generate_answers(
            chat_model,
            conversations,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
    return [each.text for each in generated]


def _project(
    chat_model: ChatModel,
    conversations: Sequence[Conversation],
    answers: Sequence[str],
    vector: SteeringVector,
    layer: int,
    stage: str,
) -> np.ndarray:
    texts = [
        # An empty answer has no tokens to project: its end is all that the model said.
        tokenize_rendered(chat_model, chat_model.render(conversation), answer or " ")
        for conversation, answer in zip(conversations, answers, strict=True)
    ]
    with progress.stage(f"projecting {stage}"):
        found = project_hidden_states(chat_model, texts, {"vector": vector}, [layer])
    return np.asarray(found[:, 0, 0, 0].double())
