"""Activation vectors beside the steering-vectors library: extraction, generation, coefficients.

    pip install --no-deps steering-vectors==0.12.2
    python benchmarks/steering_library.py                                # all three parts
    python benchmarks/steering_library.py generation coefficients --rounds 9

Both get the same model, pairs, layers, prompts and coefficient, by turns in a new order each round,
in one process. The library asks for a transformers below 5; ``--no-deps`` leaves ours. It reads one
token of a text, so that both read the last one here: in ours it is an answer of one token. "At the
answer" is its ``token_indices=slice(-1, None)``, the last position of every pass, and our
positions "response". Printed: medians of seconds of the clock and of the CPU, ratios within a round
with Student's interval over rounds, cosines of the vectors, and how many answers are equal.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from persona_lora.core.chat import user_question
from persona_lora.core.files import write_json
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.runs import package_versions
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.traits import Trait, load_pairs, load_trait
from persona_lora.models.generation import RowPlan, generate_answers
from persona_lora.models.likelihood import TokenizedExchange
from persona_lora.models.loading import ChatModel, load_chat_model
from persona_lora.models.structure import weight_fingerprint
from persona_lora.report.resampling import t_bounds
from persona_lora.steering.activations import ActivationSteerer
from persona_lora.steering.directions import sum_pairs, vector_of

PARTS = ("extraction", "generation", "coefficients")
INSTALL = "pip install --no-deps steering-vectors==0.12.2"
AT_THE_ANSWER = slice(-1, None)
Work = Callable[[], Any]


class Measured(NamedTuple):
    """Seconds of every round, of the clock and of the CPU, and what the last round gave."""

    seconds: dict[str, list[float]]
    cpu: dict[str, list[float]]
    found: dict[str, Any]

    def summary(self, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """Return the medians, and one's time over the other's of some pairs of names."""
        told: dict[str, Any] = {}
        for clock, times in (("seconds", self.seconds), ("cpu_seconds", self.cpu)):
            told[clock] = {name: statistics.median(each) for name, each in times.items()}
            for one, other in pairs:
                ratios = np.array(times[one]) / np.array(times[other])
                low, high = t_bounds(ratios)
                told[f"{clock}: {one} / {other}"] = [float(ratios.mean()), low, high]
        return told


def by_turns(variants: dict[str, Work], rounds: int) -> Measured:
    """Run every variant once to warm up, then once a round in a new order."""
    measured = Measured({name: [] for name in variants}, {name: [] for name in variants}, {})
    for turn in range(rounds + 1):
        for name in random.sample(list(variants), len(variants)):
            cpu, begun = time.process_time(), time.perf_counter()
            measured.found[name] = variants[name]()
            if turn:
                measured.seconds[name].append(time.perf_counter() - begun)
                measured.cpu[name].append(time.process_time() - cpu)
    return measured


def our_vector(chat: ChatModel, texts: Sequence[tuple[str, str]], method: str) -> SteeringVector:
    """Return the vectors of all layers at the last token of the texts."""

    def last_apart(side: int) -> list[TokenizedExchange]:
        ids = chat.tokenize([text[side] for text in texts])
        return [TokenizedExchange(each[:-1], each[-1:]) for each in ids]

    depth = chat.model.config.num_hidden_layers
    sums = sum_pairs(
        chat,
        last_apart(0),
        last_apart(1),
        positions=["response_avg"],
        layers=range(depth),
        moments=method != "mean_diff",
    )
    base = BaseModel(chat.name, weight_fingerprint(chat.model))
    return vector_of(sums["response_avg"], method, {"base_model": base, "num_layers": depth})


def last_token_texts(chat: ChatModel, trait: Trait, pairs: int) -> list[tuple[str, str]]:
    """Return the texts of a trait's first pairs: question and positive, question and negative."""
    return [
        (asked + pair.positive[-1]["content"], asked + pair.negative[-1]["content"])
        for pair in load_pairs(trait)[:pairs]
        for asked in [chat.render(pair.prompt)]
    ]


def extraction(
    chat: ChatModel, library: Any, texts: Sequence[tuple[str, str]], rounds: int
) -> dict[str, Any]:
    """Return times and cosines of the vectors of all layers at the last token."""

    def theirs(batch: int, aggregator: Any) -> Work:
        asked = {"batch_size": batch, "aggregator": aggregator}
        return lambda: library.train_steering_vector(chat.model, chat.tokenizer, texts, **asked)

    mean = library.mean_aggregator()
    variants: dict[str, Work] = {
        "ours": lambda: our_vector(chat, texts, "mean_diff"),
        "library, one text a pass": theirs(1, mean),
        "library, sixteen": theirs(16, mean),
    }
    measured = by_turns(variants, rounds)
    measured.found["ours, svd"] = our_vector(chat, texts, "svd")
    measured.found["library, pca"] = theirs(16, library.pca_aggregator())()
    told = measured.summary([(name, "ours") for name in list(variants)[1:]])
    told["texts"] = 2 * len(texts)
    told["least_cosine_over_layers"] = {}
    for one, other in (("ours", "library, sixteen"), ("ours, svd", "library, pca")):
        ours, peer = measured.found[one].directions, measured.found[other].layer_activations
        cosines = [float(torch.cosine_similarity(ours[at], peer[at], dim=0)) for at in ours]
        told["least_cosine_over_layers"][f"{one}, {other}"] = min(cosines)
    return told


class Asked(NamedTuple):
    """What is generated: prompts as conversations and as one padded batch, and how long."""

    chat: ChatModel
    conversations: list[Any]
    batch: dict[str, Tensor]  # left-padded
    tokens: int

    @classmethod
    def of(cls, chat: ChatModel, questions: Sequence[str], tokens: int) -> Asked:
        """Render questions, and pad them on the left."""
        conversations = [user_question(each) for each in questions]
        rendered = [chat.render(each) for each in conversations]
        batch = chat.tokenizer(
            rendered,
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        return cls(chat, conversations, dict(batch), tokens)

    def ours(self, steering: Any) -> list[str]:
        """Generate with this suite, and a steerer or nothing."""
        with steering:
            prepare = getattr(steering, "select_rows", None)
            rows = generate_answers(
                self.chat,
                self.conversations,
                max_new_tokens=self.tokens,
                prepare_batch=prepare,
                plan=RowPlan(keep_rows=getattr(steering, "keep_rows", None)),
            )
        return [row.text for row in rows]

    def plain(self, steering: AbstractContextManager[Any]) -> list[str]:
        """Generate with transformers' own loop, greedily."""
        with steering:
            ids = self.chat.model.generate(
                **self.batch, max_new_tokens=self.tokens, do_sample=False
            )
        answers = ids[:, self.batch["input_ids"].shape[1] :]
        decoded: list[str] = self.chat.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [each.strip() for each in decoded]


def equal(found: dict[str, list[str]], one: str, other: str) -> str:
    same = sum(a.strip() == b.strip() for a, b in zip(found[one], found[other], strict=True))
    return f"{same} of {len(found[one])}"


def generation(
    asked: Asked, library: Any, vector: SteeringVector, coefficient: float, rounds: int
) -> dict[str, Any]:
    """Return times and equal answers at one coefficient, at the answer and at all positions."""
    model = asked.chat.model
    peer = library.SteeringVector(dict(vector.directions))

    def theirs(positions: slice | None) -> AbstractContextManager[Any]:
        at = {"min_token_index": None, "token_indices": positions}
        kept: AbstractContextManager[Any] = peer.apply(model, multiplier=coefficient, **at)
        return kept

    def steered(positions: Any = "response") -> ActivationSteerer:
        return ActivationSteerer(model, vector, coefficient, positions=positions)

    variants: dict[str, Work] = {
        "ours": lambda: asked.ours(steered()),
        "ours, unsteered": lambda: asked.ours(nullcontext()),
        "library": lambda: asked.plain(theirs(AT_THE_ANSWER)),
        "our hooks in generate": lambda: asked.plain(steered()),
        "generate, unsteered": lambda: asked.plain(nullcontext()),
    }
    measured = by_turns(variants, rounds)
    told = measured.summary(
        [
            ("library", "ours"),
            ("library", "our hooks in generate"),
            ("library", "generate, unsteered"),
            ("our hooks in generate", "generate, unsteered"),
            ("ours", "ours, unsteered"),
        ]
    )
    found = measured.found
    found["ours, all positions"] = asked.ours(steered("all"))
    found["library, all positions"] = asked.plain(theirs(None))
    told["equal_answers"] = {
        f"{one}, {other}": equal(found, one, other)
        for one, other in (
            ("ours", "library"),
            ("our hooks in generate", "library"),
            ("ours, all positions", "library, all positions"),
            ("ours, unsteered", "generate, unsteered"),
            ("ours", "ours, unsteered"),
        )
    }
    told["answers"] = {name: found[name][0] for name in ("ours", "library", "ours, unsteered")}
    return told


def many(
    asked: Asked, library: Any, vector: SteeringVector, coefficients: Sequence[float], rounds: int
) -> dict[str, Any]:
    """Return what several coefficients for every prompt take: one batch, or one after the other."""
    model, prompts = asked.chat.model, len(asked.conversations)
    peer = library.SteeringVector(dict(vector.directions))
    rows = [[each] for each in coefficients for _ in range(prompts)]
    whole = Asked(
        asked.chat,
        asked.conversations * len(coefficients),
        {name: each.repeat(len(coefficients), 1) for name, each in asked.batch.items()},
        asked.tokens,
    )
    column = torch.tensor(rows)[:, None]  # [rows, 1, 1]
    at = {"min_token_index": None, "token_indices": AT_THE_ANSWER}

    def in_turn() -> list[str]:
        return [
            answer
            for each in coefficients
            for answer in asked.plain(peer.apply(model, multiplier=each, **at))
        ]

    def by_operator() -> list[str]:
        def scaled(hidden: Tensor, direction: Tensor) -> Tensor:
            return column * direction

        return whole.plain(peer.apply(model, operator=scaled, **at))

    variants: dict[str, Work] = {
        "ours, one batch": lambda: whole.ours(ActivationSteerer(model, vector, rows)),
        "library, one after the other": in_turn,
        "library, an operator of one's own": by_operator,
    }
    measured = by_turns(variants, rounds)
    names = list(variants)
    told = measured.summary([(name, names[0]) for name in names[1:]])
    told["equal_answers"] = {name: equal(measured.found, names[0], name) for name in names[1:]}
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="part", help=", ".join(PARTS))
    parser.add_argument("--trait", default="sycophancy")
    parser.add_argument("--layer", type=int, default=20)
    parser.add_argument("--coefficient", type=float, default=1.0)
    parser.add_argument("--coefficients", type=float, nargs="+", default=[-2, -1, -0.5, 0.5, 1, 2])
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    folder = Path("results/benchmarks")
    parser.add_argument("--output", type=Path, default=folder / "steering_library.json")
    options = parser.parse_args()
    try:
        library = importlib.import_module("steering_vectors")
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: no package {error.name}; install it with: {INSTALL}") from None

    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    random.seed(0)
    chat, trait = load_chat_model(dtype=options.dtype, device_map="cpu"), load_trait(options.trait)
    before, rounds = weight_fingerprint(chat.model), options.rounds
    texts = last_token_texts(chat, trait, options.pairs)
    vector = our_vector(chat, texts, "mean_diff").at([options.layer])
    asked = Asked.of(chat, trait.questions["eval"][: options.prompts], options.tokens)
    result = {
        "settings": {name: str(value) for name, value in vars(options).items()},
        "threads": torch.get_num_threads(),
        "versions": package_versions() | {"steering-vectors": version("steering-vectors")},
    }
    parts: dict[str, Work] = {
        "extraction": lambda: extraction(chat, library, texts, rounds),
        "generation": lambda: generation(asked, library, vector, options.coefficient, rounds),
        "coefficients": lambda: many(asked, library, vector, options.coefficients, rounds),
    }
    for name in options.parts:
        result[name] = parts[name]()
        result["weights_untouched"] = weight_fingerprint(chat.model) == before
        write_json(options.output, result)
        print(json.dumps({name: result[name]}, indent=2), flush=True)


if __name__ == "__main__":
    main()
