"""Projections of texts from files: one row for each text, vector, layer and position.

With a base model, the finetuning shift: the same token ids through the finetuned and through the
base model, finetuned minus base (Chen et al. 2025, arXiv:2507.21509).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor

from persona_lora.core import progress
from persona_lora.core.chat import Conversation, Exchange, read_messages
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_csv, read_jsonl, write_csv
from persona_lora.core.resources import resource_path
from persona_lora.core.runs import Output, Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.traits import Trait, load_labelled_answers
from persona_lora.models.likelihood import (
    TokenizedExchange,
    tokenize_exchange,
    tokenize_rendered,
)
from persona_lora.models.loading import ChatModel
from persona_lora.projections.activation_space import check_fits, project_hidden_states
from persona_lora.report.separation import Separation, separation

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
        return [
            tokenize_rendered(chat_model, _asked(chat_model, prompt, answer), answer)
            for prompt, answer in self.exchanges
        ]


def _asked(chat_model: ChatModel, prompt: Conversation | str, answer: str) -> str:
    if isinstance(prompt, str):
        return prompt
    return chat_model.render_before(answer, prompt)


def read_texts(path: Path) -> Texts:
    """Read a CSV with the columns ``prompt`` (rendered) and ``answer``, or JSONL ``messages``.

    In a row of messages the last one must be the assistant's: it is the answer, and the chat
    template renders what comes before it. Raises UserError naming the file, and the row.
    """
    path = resource_path(path)
    if path.suffix == ".csv":
        return _read_csv(path)
    if path.suffix == ".jsonl":
        rows = read_jsonl(path)
        exchanges = tuple(_split(row, f"{path}:{line}") for line, row in enumerate(rows, start=1))
        return Texts(str(path), _filled(exchanges, path), tuple({} for _ in exchanges))
    raise UserError(f"{path} is neither .csv nor .jsonl; those two are read")


def project_texts(
    chat_model: ChatModel,
    texts: Texts,
    vectors: Mapping[str, SteeringVector],
    layers: Sequence[int],
    output: Output | Path,
    *,
    positions: Sequence[str] = ("response_avg",),
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
    for name, vector in vectors.items():
        check_fits(chat_model, vector, name)
        vector.at(layers)

    def project(model: ChatModel, stage: str) -> Tensor:
        with progress.stage(stage):
            return project_hidden_states(model, tokenized, vectors, layers, positions=positions)

    run = Run.open(
        output,
        command="project",
        config={
            **chat_model.record(),
            "source": texts.source,
            "layers": list(layers),
            "types": list(positions),
        },
        seed=0,
        inputs={
            **chat_model.inputs(),
            **_vector_inputs(vectors),
            texts.source: digest_of([texts.exchanges, texts.columns if columns else None]),
        },
    )
    with run:
        own, below = project(chat_model, "projecting"), None
        if base is not None:
            with base as base_model:
                below = project(base_model, "projecting (base)")
        rows = _long_rows(vectors, layers, positions, own, below)
        run.write("projections", rows)
        write_csv(run.folder / "projections.csv", COLUMNS, rows)
        if columns:
            _write_columns(run.folder / "columns.csv", texts, rows)
    return run


def base_of_adapter(chat_model: ChatModel) -> AbstractContextManager[ChatModel]:
    """Return the model under a PEFT adapter; raises UserError at once for a model that has none."""
    if not isinstance(chat_model.model, PeftModel):
        raise UserError(f"{chat_model.name} has no adapter; name its base with --base-model")
    return _adapter_off(chat_model, chat_model.model)


@contextmanager
def _adapter_off(chat_model: ChatModel, adapted: PeftModel) -> Iterator[ChatModel]:
    with adapted.disable_adapter():
        yield chat_model


def separate_labelled(
    chat_model: ChatModel,
    trait: Trait,
    vectors: Mapping[str, SteeringVector],
    layers: Sequence[int],
    output: Output | Path,
    *,
    positions: Sequence[str] = ("response_avg",),
) -> Run:
    """Project a trait's hand-labelled answers and write how well each projection tells them apart.

    The answers stand in ``judge_eval.jsonl``; no vector is extracted from them.
    """
    labelled = load_labelled_answers(trait)
    tokenized = [
        tokenize_exchange(chat_model, Exchange(each.question, each.answer)) for each in labelled
    ]
    run = Run.open(
        output,
        command="project",
        config={
            **chat_model.record(),
            "trait": trait.name,
            "source": "judge_eval.jsonl",
            "layers": list(layers),
            "types": list(positions),
        },
        seed=0,
        inputs={**chat_model.inputs(), **_vector_inputs(vectors), **trait.inputs()},
    )
    with run:
        with progress.stage("projecting"):
            values = project_hidden_states(
                chat_model, tokenized, vectors, layers, positions=positions
            )
        labels = [each.label for each in labelled]
        rows = [
            {
                "trait": trait.name,
                "vector": name,
                "layer": layer,
                "type": position,
                **dataclasses.asdict(separation(values[:, v, at, p].tolist(), labels)),
            }
            for v, name in enumerate(vectors)
            for at, layer in enumerate(layers)
            for p, position in enumerate(positions)
        ]
        run.write("projections", _long_rows(vectors, layers, positions, values, None))
        run.write("separation", rows)
        write_csv(run.folder / "separation.csv", SEPARATION_COLUMNS, rows)
    return run


def best_separation(run: Run) -> dict[str, tuple[int, Separation]]:
    """Return, for every vector, the layer with the largest AUC, and the separation there."""
    best: dict[str, tuple[int, Separation]] = {}
    for row in run.read("separation"):
        fields = {each.name: row[each.name] for each in dataclasses.fields(Separation)}
        if row["vector"] not in best or row["auc"] > best[row["vector"]][1].auc:
            best[row["vector"]] = (row["layer"], Separation(**fields))
    return best


def _vector_inputs(vectors: Mapping[str, SteeringVector]) -> dict[str, str]:
    return {f"the vector {name}": vector.content() for name, vector in vectors.items()}


def _read_csv(path: Path) -> Texts:
    rows = read_csv(path, ("prompt", "answer"))
    exchanges = tuple((row["prompt"], row["answer"]) for row in rows)
    return Texts(str(path), _filled(exchanges, path), tuple(rows))


def _split(row: Mapping[str, Any], where: str) -> tuple[Conversation, str]:
    messages = read_messages(row.get("messages"), where)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError(f"{where} cannot be split: its last message must be the assistant's answer")
    return messages[:-1], messages[-1]["content"]


def _filled(
    exchanges: tuple[tuple[Conversation | str, str], ...], path: Path
) -> tuple[tuple[Conversation | str, str], ...]:
    if not exchanges:
        raise UserError(f"{path} holds no rows")
    for number, (prompt, answer) in enumerate(exchanges, start=1):
        if not prompt or not answer.strip():
            raise UserError(f"{path}: row {number} has an empty prompt or answer; leave it out")
    return exchanges


def _long_rows(
    vectors: Mapping[str, SteeringVector],
    layers: Sequence[int],
    positions: Sequence[str],
    own: Tensor,
    below: Tensor | None,
) -> list[dict[str, Any]]:
    return [
        {
            "row": row,
            "vector": name,
            "trait": vector.trait,
            "layer": layer,
            "type": position,
            "projection": float(own[row, v, at, p]),
            "base_projection": None if below is None else float(below[row, v, at, p]),
            "shift": None if below is None else float(own[row, v, at, p] - below[row, v, at, p]),
        }
        for row in range(len(own))
        for v, (name, vector) in enumerate(vectors.items())
        for at, layer in enumerate(layers)
        for p, position in enumerate(positions)
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
