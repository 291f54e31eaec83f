"""Mean hidden states of all layers: one streaming pass against a bare pass and the public loop.

    python benchmarks/extraction.py

Three variants on the same texts, in turn, in one process: (a) a bare forward pass of the decoder
over the same tokens in the same batches, (b) ours, which averages three positions of every layer
inside it, (c) the loop of public implementations, one text at a time with all hidden states, whose
means are kept until the end. Printed: texts a second, both ratios, and the bytes that are kept.
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
from persona_lora.core.runs import package_versions
from persona_lora.core.traits import load_pairs, load_trait
from persona_lora.models.hidden_states import POSITIONS, stream_hidden_means
from persona_lora.models.likelihood import TokenizedExchange, batches_by_length, tokenize_exchange
from persona_lora.models.loading import ChatModel, load_chat_model


@torch.inference_mode()
def bare(chat_model: ChatModel, texts: list[TokenizedExchange]) -> Tensor:
    decoder = chat_model.model.get_decoder()
    for rows in batches_by_length([len(text.prompt) + len(text.answer) for text in texts]):
        batch = [texts[row].prompt + texts[row].answer for row in rows]
        longest = max(map(len, batch))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in batch])
        last: Tensor = decoder(
            input_ids=ids.to(chat_model.model.device), use_cache=False
        ).last_hidden_state
    return last


def ours(chat_model: ChatModel, texts: list[TokenizedExchange]) -> Tensor:
    total = torch.zeros(())
    for _, means in stream_hidden_means(chat_model, texts):
        total = total + means.double().sum(dim=0)
    return total / len(texts)  # [positions, layers, hidden]


@torch.inference_mode()
def keeping_loop(chat_model: ChatModel, texts: list[TokenizedExchange]) -> Tensor:
    """One text at a time; the means of every layer are stacked only when all texts are done."""
    kept: dict[str, list[list[Tensor]]] = {position: [] for position in POSITIONS}
    for prompt, answer in texts:
        ids = torch.tensor([prompt + answer], device=chat_model.model.device)
        states = chat_model.model(ids, output_hidden_states=True).hidden_states
        p = len(prompt)
        kept["response_avg"].append([h[:, p:].mean(dim=1).cpu() for h in states])
        kept["prompt_avg"].append([h[:, :p].mean(dim=1).cpu() for h in states])
        kept["prompt_last"].append([h[:, p - 1].cpu() for h in states])
    return torch.stack(
        [
            torch.stack(
                [torch.cat(layer).mean(dim=0) for layer in zip(*kept[position], strict=True)]
            )
            for position in POSITIONS
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/extraction.json"))
    options = parser.parse_args()

    chat_model = load_chat_model(dtype=options.dtype)
    pairs = load_pairs(load_trait("sycophancy"))[: options.texts]
    texts = [
        tokenize_exchange(
            chat_model, Exchange(pair.prompt[-1]["content"], pair.positive[-1]["content"])
        )
        for pair in pairs
    ]
    variants: dict[str, Callable[[], Tensor]] = {
        "bare pass": lambda: bare(chat_model, texts),
        "ours": lambda: ours(chat_model, texts),
        "keeping loop": lambda: keeping_loop(chat_model, texts),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    means: dict[str, Tensor] = {}
    for _ in range(options.rounds):
        for name, variant in variants.items():
            start = time.perf_counter()
            means[name] = variant()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    config = chat_model.model.config
    per_token = (config.num_hidden_layers + 1) * config.hidden_size * 4
    longest = max(len(text.prompt) + len(text.answer) for text in texts)
    # All but the last layer, which transformers reports after the final norm.
    apart = (means["ours"][:, :-1] - means["keeping loop"][:, 1:-1].double()).abs().max()
    result = {
        "dtype": options.dtype,
        "texts": len(texts),
        "tokens": sum(len(text.prompt) + len(text.answer) for text in texts),
        "rounds": options.rounds,
        "texts_per_second": {name: len(texts) / each for name, each in medians.items()},
        "time_over_bare_pass": medians["ours"] / medians["bare pass"],
        "keeping_loop_over_ours": medians["keeping loop"] / medians["ours"],
        "largest_difference_of_means": float(apart),
        "kept_bytes": {
            "ours (sums, whatever the number of texts)": 3 * per_token * 2,
            "keeping loop (one text's states, and all means)": longest * per_token
            + 3 * per_token * len(texts),
        },
        "versions": package_versions(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
