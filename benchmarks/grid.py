"""A grid of layers and coefficients: one batch against one generation for each cell.

    python benchmarks/grid.py

Public steering code registers a hook for one layer and one coefficient, generates, removes it,
and goes on to the next cell. Here every row of one batch has a layer and a coefficient of its own.
Same model, vector, prompts and generation code, in turn, in one process. Printed: rows a second,
the ratio, the overhead over the unsteered batch, and how many answers agree token for token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from persona_lora.core.chat import Conversation, user_question
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.runs import package_versions
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.traits import load_trait
from persona_lora.models.generation import RowPlan, generate_answers
from persona_lora.models.loading import ChatModel, load_chat_model
from persona_lora.models.structure import decoder_layers, hidden_size
from persona_lora.steering.activations import ActivationSteerer

LAYERS = (4, 8, 12, 16, 20, 24)
COEFFICIENTS = (-1.0, 1.0, 2.0)
CELLS = [(layer, coefficient) for layer in LAYERS for coefficient in COEFFICIENTS]


def random_vector(model: nn.Module) -> SteeringVector:
    """A direction of length 8 at every layer: time does not depend on where it points."""
    generator = torch.Generator().manual_seed(0)
    directions = {}
    for layer in range(len(decoder_layers(model))):
        direction = torch.randn(hidden_size(model), generator=generator)
        directions[layer] = 8 * direction / direction.norm()
    return SteeringVector(directions, BaseModel(""), len(directions), method="random")


def unsteered(chat_model: ChatModel, questions: list[Conversation], tokens: int) -> list[str]:
    answers = generate_answers(chat_model, questions * len(CELLS), max_new_tokens=tokens)
    return [answer.text for answer in answers]


def one_batch(
    chat_model: ChatModel, vector: SteeringVector, questions: list[Conversation], tokens: int
) -> list[str]:
    rows = [
        [coefficient if layer == at else 0.0 for at in LAYERS]
        for layer, coefficient in CELLS
        for _ in questions
    ]
    vectors = [vector.at([layer]) for layer in LAYERS]
    with ActivationSteerer(chat_model.model, vectors, rows) as steerer:
        answers = generate_answers(
            chat_model,
            questions * len(CELLS),
            max_new_tokens=tokens,
            prepare_batch=steerer.select_rows,
            plan=RowPlan(keep_rows=steerer.keep_rows),
        )
    return [answer.text for answer in answers]


def hook_loop(
    chat_model: ChatModel, vector: SteeringVector, questions: list[Conversation], tokens: int
) -> list[str]:
    """One hook, one generation, for each cell."""
    blocks = decoder_layers(chat_model.model)
    texts = []
    for layer, coefficient in CELLS:
        delta = coefficient * vector.directions[layer]

        def add(
            module: nn.Module, arguments: object, output: Tensor, delta: Tensor = delta
        ) -> Tensor:
            output[:, -1] += delta
            return output

        handle = blocks[layer].register_forward_hook(add)
        answers = generate_answers(chat_model, questions, max_new_tokens=tokens)
        handle.remove()
        texts += [answer.text for answer in answers]
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--questions", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/grid.json"))
    options = parser.parse_args()

    chat_model = load_chat_model(dtype=options.dtype)
    vector = random_vector(chat_model.model)
    asked = load_trait("sycophancy").questions["eval"][: options.questions]
    questions = [user_question(text) for text in asked]
    variants: dict[str, Callable[[], list[str]]] = {
        "unsteered": lambda: unsteered(chat_model, questions, options.tokens),
        "one batch": lambda: one_batch(chat_model, vector, questions, options.tokens),
        "hook loop": lambda: hook_loop(chat_model, vector, questions, options.tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    answers: dict[str, list[str]] = {}
    for _ in range(options.rounds):
        for name, variant in variants.items():
            start = time.perf_counter()
            answers[name] = variant()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    rows = len(CELLS) * len(questions)
    equal = zip(answers["one batch"], answers["hook loop"], strict=True)
    result = {
        "dtype": options.dtype,
        "cells": len(CELLS),
        "rows": rows,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "rows_per_second": {name: rows / each for name, each in medians.items()},
        "one_batch_over_hook_loop": medians["hook loop"] / medians["one batch"],
        "overhead_over_unsteered": medians["one batch"] / medians["unsteered"] - 1,
        "answers_equal": sum(one == other for one, other in equal) / rows,
        "versions": package_versions(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
