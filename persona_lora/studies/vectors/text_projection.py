"""Projections of texts from files: one row for each text, vector, layer and position.

With a base model, the finetuning shift: the same token ids through the finetuned and through the
base model, finetuned minus base. Of rows to be trained on, the projection difference: a row pulls
the model towards its answer and away from what the model would have said, and the two projections
say how far, and which way, along the trait (both Chen et al. 2025, arXiv:2507.21509).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from torch import Tensor

from persona_lora.core import progress
from persona_lora.core.chat import Conversation, Exchange, read_messages
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError
from persona_lora.core.files import numbered_jsonl, read_csv, write_csv
from persona_lora.core.resources import resource_path
from persona_lora.core.runs import Output, Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.traits import Trait, load_labelled_answers
from persona_lora.models.generation import generate_answers
from persona_lora.models.likelihood import TokenizedExchange, tokenize_exchange, tokenize_rendered
from persona_lora.models.loading import ChatModel
from persona_lora.projections.activation_space import Along
from persona_lora.report import wording
from persona_lora.report.resampling import separation
from persona_lora.report.sections import Table
from persona_lora.studies.asking.run import contents_of, open_run

COLUMNS = (
    *("row", "vector", "trait", "layer", "type"),
    *("projection", "base_projection", "shift"),
)
SEPARATION_COLUMNS = (
    *("trait", "vector", "layer", "type", "auc", "low", "high", "rho"),
    *("n_positive", "n_negative", "n"),
)


@dataclass(frozen=True)
class Texts:
    """Texts to project: what tokenises one of them for a model, and the file's own columns."""

    source: str
    exchanges: tuple[tuple[Conversation | str, str], ...]  # a conversation or rendered prompt
    columns: tuple[Mapping[str, Any], ...] = ()

    def tokenized(self, chat_model: ChatModel) -> list[TokenizedExchange]:
        """Return the token ids of prompt and answer of every text."""
        rendered = [
            asked if isinstance(asked, str) else chat_model.render_before(answer, asked)
            for asked, answer in self.exchanges
        ]
        pairs = zip(rendered, self.exchanges, strict=True)
        return [tokenize_rendered(chat_model, asked, answer) for asked, (_, answer) in pairs]


def read_texts(path: Path) -> Texts:
    """Read a CSV with the columns ``prompt`` (rendered) and ``answer``, or JSONL ``messages``.

    In a row of messages the last one must be the assistant's: it is the answer, and the chat
    template renders what comes before it. Raises UserError naming the file, and the row.
    """
    path = resource_path(path)
    exchanges: tuple[tuple[Conversation | str, str], ...]
    columns: tuple[Mapping[str, Any], ...]
    if path.suffix == ".csv":
        columns = tuple(read_csv(path, ("prompt", "answer")))
        exchanges = tuple((row["prompt"], row["answer"]) for row in columns)
    elif path.suffix == ".jsonl":
        exchanges = tuple(_split(row, where) for where, row in numbered_jsonl(path))
        columns = tuple({} for _ in exchanges)
    else:
        raise UserError(f"{path} is neither .csv nor .jsonl; those two are read")
    if not exchanges:
        raise UserError(f"{path} holds no rows")
    for number, (prompt, answer) in enumerate(exchanges, start=1):
        if not prompt or not answer.strip():
            raise UserError(f"{path}: row {number} has an empty prompt or answer; leave it out")
    return Texts(str(path), exchanges, columns)


def project_texts(
    chat_model: ChatModel,
    texts: Texts,
    along: Along,
    output: Output | Path,
    *,
    base: AbstractContextManager[ChatModel] | None = None,
    columns: bool = False,
) -> Run:
    """Project and write a run: ``projections.jsonl`` and ``.csv`` in long format.

    ``base`` gives the base model for the shift; ``base_of_adapter`` is that of a PEFT model.
    ``columns`` also writes the file's own columns with one
    more for each vector, type and layer, as the published scripts do. Another run in ``output``
    is refused before anything is computed.
    """
    tokenized = texts.tokenized(chat_model)
    content = digest_of([texts.exchanges, texts.columns if columns else None])
    config, read = {"source": texts.source}, {texts.source: content}
    with _open(output, chat_model, along, config, read) as run:
        own, below = along.project(chat_model, tokenized), None
        if base is not None:
            with base as base_model:
                below = along.project(base_model, tokenized, "projecting (base)")
        rows = _long_rows(along, own, below)
        run.write("projections", rows)
        write_csv(run.folder / "projections.csv", COLUMNS, rows)
        if columns:
            _write_columns(run.folder / "columns.csv", texts, rows)
    return run


def base_of_adapter(chat_model: ChatModel) -> AbstractContextManager[ChatModel]:
    """Return the model under a PEFT adapter; raises UserError at once for a model that has none."""
    if not isinstance(chat_model.model, PeftModel):
        raise UserError(f"{chat_model.name} has no adapter; name its base with --base-model")
    return chat_model.base()


def separate_labelled(
    chat_model: ChatModel, trait: Trait, along: Along, output: Output | Path
) -> Run:
    """Project a trait's hand-labelled answers and write how well each projection tells them apart.

    The answers stand in ``judge_eval.jsonl``; no vector is extracted from them.
    """
    labelled = load_labelled_answers(trait)
    tokenized = [
        tokenize_exchange(chat_model, Exchange(each.question, each.answer)) for each in labelled
    ]
    config = {"trait": trait.name, "source": "judge_eval.jsonl"}
    with _open(output, chat_model, along, config, trait.inputs()) as run:
        values = along.project(chat_model, tokenized)
        labels, asked = zip(*((each.label, each.question) for each in labelled), strict=True)
        found = {at: separation(values[:, *at].tolist(), labels, asked) for at, _ in along.places()}
        rows = [
            {**place, "trait": trait.name, **dataclasses.asdict(found[at])}
            for at, place in along.places()
        ]
        run.write("projections", _long_rows(along, values, None))
        run.write("separation", rows)
        write_csv(run.folder / "separation.csv", SEPARATION_COLUMNS, rows)
    return run


def _open(
    output: Output | Path,
    chat_model: ChatModel,
    along: Along,
    config: Mapping[str, Any],
    read: Mapping[str, str],
) -> Run:
    along.check(chat_model)
    config = {**config, "layers": list(along.layers), "types": list(along.positions)}
    contents = contents_of("vector", along.vectors)
    return open_run(output, "project", chat_model, config, contents, read)


def _split(row: Mapping[str, Any], where: str) -> tuple[Conversation, str]:
    messages = read_messages(row.get("messages"), where)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError(f"{where} cannot be split: its last message must be the assistant's answer")
    return messages[:-1], messages[-1]["content"]


def _long_rows(along: Along, own: Tensor, below: Tensor | None) -> list[dict[str, Any]]:
    return [
        {
            "row": row,
            **place,
            "projection": float(own[row, *at]),
            "base_projection": None if below is None else float(below[row, *at]),
            "shift": None if below is None else float(own[row, *at] - below[row, *at]),
        }
        for row in range(len(own))
        for at, place in along.places()
    ]


def _write_columns(path: Path, texts: Texts, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one row per text, with a column for each vector, type and layer."""
    wide: list[dict[str, Any]] = [dict(each) for each in texts.columns]
    for row in rows:
        name = f"{row['vector']}_{row['type']}_layer{row['layer']}"
        wide[row["row"]][name] = row["projection"]
        if row["shift"] is not None:
            wide[row["row"]][f"{name}_shift"] = row["shift"]
    write_csv(path, list(dict.fromkeys(key for each in wide for key in each)), wide)


QUANTILE = 0.95  # of what the model's own answers differ by


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

    def table(self) -> Table:
        """Return the rows that pull furthest, and those that pull least."""
        rows = (
            [str(row["rank"]), str(row["row"]), wording.number(row["difference"], 2)]
            + [row["answer"][:60]]
            for row in (*self.rows[:5], *self.rows[5:][-3:])
        )
        return Table.of("rank | row | difference | answer", rows)


def conversations_of(texts: Texts) -> list[Conversation]:
    """Return what the model is asked anew; UserError for rendered prompts (a CSV)."""
    conversations = [prompt for prompt, _ in texts.exchanges if not isinstance(prompt, str)]
    if len(conversations) < len(texts.exchanges):
        raise UserError(f"{texts.source} holds rendered prompts; screening needs messages (.jsonl)")
    return conversations


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
    conversations = conversations_of(texts)
    along, rendered = Along({"vector": vector}, [layer]), [*map(chat_model.render, conversations)]
    answer = partial(
        generate_answers, chat_model, conversations, max_new_tokens=max_new_tokens, seed=seed
    )

    def projections(answers: Sequence[str], stage: str) -> np.ndarray:
        # An empty answer has no tokens to project: its end is all that the model said.
        pairs = zip(rendered, answers, strict=True)
        asked = [tokenize_rendered(chat_model, prompt, said or " ") for prompt, said in pairs]
        found = along.project(chat_model, asked, f"projecting {stage}")
        return np.asarray(found[:, 0, 0, 0].double())

    answers = [said for _, said in texts.exchanges]
    with progress.stage("own answers"):
        own = [each.text for each in answer()]
    projected, own_projected = projections(answers, "rows"), projections(own, "own answers")
    differences = projected - own_projected
    if threshold is None:
        with progress.stage("sampling"):
            sampled = [each.text for each in answer(temperature=1.0)]
        spread = projections(sampled, "samples")
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
    write_csv(output, list(rows[0]), rows)
    return Screening(rows, threshold, output)
