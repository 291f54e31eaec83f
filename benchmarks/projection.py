"""Projections on many vectors and layers: one pass against a pass for each.

    python benchmarks/projection.py

Three variants on the same texts, in turn, in one process: all vectors and layers at once; one call
for each vector and layer; one text at a time with all hidden states, as public scripts do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from persona_lora.core.chat import Exchange
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.runs import package_versions
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.traits import load_labelled_answers, load_trait
from persona_lora.models.likelihood import TokenizedExchange, tokenize_exchange
from persona_lora.models.loading import ChatModel, load_chat_model
from persona_lora.models.structure import decoder_layers, hidden_size
from persona_lora.projections.activation_space import project_hidden_states

LAYERS = (10, 16, 22)


def random_vectors(chat_model: ChatModel, number: int) -> dict[str, SteeringVector]:
    generator = torch.Generator().manual_seed(0)
    width, depth = hidden_size(chat_model.model), len(decoder_layers(chat_model.model))
    return {
        f"v{index}": SteeringVector(
            {layer: torch.randn(width, generator=generator) for layer in range(depth)},
            BaseModel(""),
            depth,
        )
        for index in range(number)
    }


def at_once(
    chat_model: ChatModel, texts: list[TokenizedExchange], vectors: dict[str, SteeringVector]
) -> Tensor:
    return project_hidden_states(chat_model, texts, vectors, LAYERS)[..., 0]


def one_by_one(
    chat_model: ChatModel, texts: list[TokenizedExchange], vectors: dict[str, SteeringVector]
) -> Tensor:
    columns = [
        [project_hidden_states(chat_model, texts, {n: v}, [at])[:, 0, 0, 0] for at in LAYERS]
        for n, v in vectors.items()
    ]
    return torch.stack([torch.stack(each, dim=1) for each in columns], dim=1)


@torch.inference_mode()
def text_by_text(
    chat_model: ChatModel, texts: list[TokenizedExchange], vectors: dict[str, SteeringVector]
) -> Tensor:
    result = torch.empty(len(texts), len(vectors), len(LAYERS))
    for row, (prompt, answer) in enumerate(texts):
        states = chat_model.model(
            torch.tensor([prompt + answer]), output_hidden_states=True
        ).hidden_states
        for v, vector in enumerate(vectors.values()):
            for at, layer in enumerate(LAYERS):
                direction = vector.directions[layer]
                mean = states[layer + 1][0, len(prompt) :].mean(dim=0)
                result[row, v, at] = mean @ direction / direction.norm()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--vectors", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/projection.json"))
    options = parser.parse_args()

    chat_model = load_chat_model(dtype=options.dtype)
    labelled = load_labelled_answers(load_trait("sycophancy"))[: options.texts]
    texts = [
        tokenize_exchange(chat_model, Exchange(each.question, each.answer)) for each in labelled
    ]
    vectors = random_vectors(chat_model, options.vectors)
    variants: dict[str, Callable[[], Tensor]] = {
        "at once": lambda: at_once(chat_model, texts, vectors),
        "one by one": lambda: one_by_one(chat_model, texts, vectors),
        "text by text": lambda: text_by_text(chat_model, texts, vectors),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    values: dict[str, Tensor] = {}
    for _ in range(options.rounds):
        for name, variant in variants.items():
            start = time.perf_counter()
            values[name] = variant()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    result = {
        "dtype": options.dtype,
        "texts": len(texts),
        "vectors": len(vectors),
        "layers": len(LAYERS),
        "rounds": options.rounds,
        "texts_per_second": {name: len(texts) / each for name, each in medians.items()},
        "one_by_one_over_at_once": medians["one by one"] / medians["at once"],
        "text_by_text_over_at_once": medians["text by text"] / medians["at once"],
        "largest_difference": float((values["at once"] - values["text by text"]).abs().max()),
        "versions": package_versions(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
