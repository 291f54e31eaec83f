"""The server's tokens a second: eight requests with eight mixes at once, with one mix, and in turn.

    python benchmarks/serving.py --directions checkpoints --traits evil formality sycophancy

Over HTTP, greedy, in fp32, against a server in this process. Printed beside: how many of the eight
answers that were given at once equal, to the last character, those of exactly merged weights.

With --beside http://127.0.0.1:8080 a llama.cpp server (llama-server of the same model, with
--parallel 8, and with --lora once for each of --traits in their order, as persona-lora export
--format gguf-lora writes them) is asked by turns with it: the same prompts as token ids, the mixes
as scales of its adapters with each request. Its answers have just as many tokens, as it is told to
ignore ends; those here end where they end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from persona_lora.cli.serving_commands import listening
from persona_lora.core.chat import user_question
from persona_lora.core.files import write_json
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.runs import package_versions
from persona_lora.core.traits import load_trait
from persona_lora.models.generation import generate_answers
from persona_lora.models.loading import load_chat_model
from persona_lora.serving.batching import Batch
from persona_lora.serving.mixes import Personas
from persona_lora.serving.server import Server, Service
from persona_lora.steering.weights import LoRASteerer

AT_ONCE = 8


def mixes_of(traits: list[str]) -> list[str]:
    """Return eight different mixes of all traits."""
    steps = [(at / AT_ONCE, trait) for at, trait in enumerate(traits, start=1)]
    return [
        "base" + "".join(f"{(-1) ** number * (size + number / 10):+.3f}*{t}" for size, t in steps)
        for number in range(AT_ONCE)
    ]


def ask(client: httpx.Client, tokens: int, model: str, question: str) -> dict[str, Any]:
    asked = {"model": model, "messages": user_question(question), "temperature": 0}
    response = client.post("/v1/chat/completions", json={**asked, "max_tokens": tokens})
    response.raise_for_status()
    return dict(response.json())


def answered(
    client: httpx.Client, tokens: int, models: Sequence[str], questions: Sequence[str], at_once: int
) -> tuple[float, list[str]]:
    """Return tokens a second, and the answers."""
    start = time.perf_counter()
    with ThreadPoolExecutor(at_once) as threads:
        found = list(threads.map(partial(ask, client, tokens), models, questions))
    seconds = time.perf_counter() - start
    count = sum(each["usage"]["completion_tokens"] for each in found)
    return count / seconds, [each["choices"][0]["message"]["content"].strip() for each in found]


def ask_llama(client: httpx.Client, tokens: int, scales: Sequence[float], prompt: list[int]) -> int:
    """Return how many tokens llama.cpp answered with, its adapters scaled so."""
    lora = [{"id": at, "scale": scale} for at, scale in enumerate(scales)]
    asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True}
    response = client.post("/completion", json={**asked, "cache_prompt": False, "lora": lora})
    response.raise_for_status()
    return int(response.json()["tokens_predicted"])


def llama_rate(
    client: httpx.Client,
    tokens: int,
    scales: Sequence[Sequence[float]],
    prompts: Sequence[list[int]],
    at_once: int,
) -> float:
    """Return llama.cpp's tokens a second."""
    start = time.perf_counter()
    with ThreadPoolExecutor(at_once) as threads:
        count = sum(threads.map(partial(ask_llama, client, tokens), scales, prompts))
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directions", type=Path, default=Path("checkpoints"))
    parser.add_argument("--traits", nargs="+", default=["evil", "formality", "sycophancy"])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beside", help="The URL of a llama.cpp server.")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/serving.json"))
    options = parser.parse_args()

    diffs = {each: LoRADiff.load(options.directions / each / "diff") for each in options.traits}
    questions = load_trait("sycophancy").questions["eval"][:AT_ONCE]
    mixes = mixes_of(options.traits)
    batch = Batch(load_chat_model(dtype="float32"), diffs)
    personas = Personas(batch.traits, Path("nowhere"))
    variants = {
        "eight mixes at once": (mixes, AT_ONCE),
        "one mix at once": (mixes[:1] * AT_ONCE, AT_ONCE),
        "no mix at once": (["base"] * AT_ONCE, AT_ONCE),
        "eight mixes in turn": (mixes, 1),
        "no mix in turn": (["base"] * AT_ONCE, 1),
    }
    nothing = [0.0] * len(options.traits)
    by_trait = [dict(zip(batch.traits, personas.mix(mix), strict=True)) for mix in mixes]
    scales = [[mix[trait] for trait in options.traits] for mix in by_trait]
    beside = {
        "eight mixes at once": (scales, AT_ONCE),
        "one mix at once": (scales[:1] * AT_ONCE, AT_ONCE),
        "no mix at once": ([nothing] * AT_ONCE, AT_ONCE),
        "eight mixes in turn": (scales, 1),
        "no mix in turn": ([nothing] * AT_ONCE, 1),
    }
    rendered = [batch.chat_model.render(user_question(each)) for each in questions]
    prompts = batch.chat_model.tokenize(rendered)
    rates: dict[str, list[float]] = {name: [] for name in variants}
    theirs: dict[str, list[float]] = {name: [] for name in beside}
    answers: dict[str, list[str]] = {}
    server = Server(Service(batch, personas), grace=0)
    with listening("127.0.0.1", 0) as place, ThreadPoolExecutor(1) as threads:
        running = threads.submit(server.answer, place)
        url = f"http://127.0.0.1:{place.getsockname()[1]}"
        try:
            with (
                httpx.Client(base_url=url, timeout=600) as client,
                httpx.Client(base_url=options.beside or url, timeout=600) as llama,
            ):
                for _ in range(options.rounds + 1):
                    for name, (models, at_once) in variants.items():
                        rate, answers[name] = answered(
                            client, options.tokens, models, questions, at_once
                        )
                        rates[name].append(rate)
                        if options.beside is not None:
                            how, many = beside[name]
                            theirs[name].append(
                                llama_rate(llama, options.tokens, how, prompts, many)
                            )
        finally:
            server.should_exit = True
        running.result()
    merged = []
    for mix, question in zip(mixes, questions, strict=True):
        terms = dict(zip((diffs[each] for each in batch.traits), personas.mix(mix), strict=True))
        with LoRASteerer(batch.chat_model.model, terms):
            (answer,) = generate_answers(
                batch.chat_model, [user_question(question)], max_new_tokens=options.tokens
            )
        merged.append(answer.text)
    medians = {name: statistics.median(each[1:]) for name, each in rates.items()}  # 1: warming up
    others = {name: statistics.median(each[1:]) for name, each in theirs.items() if each[1:]}
    together = answers["eight mixes at once"]
    result = {
        "tokens": options.tokens,
        "rounds": options.rounds,
        "tokens_per_second": medians,
        "eight_mixes_over": {
            name: medians["eight mixes at once"] / each for name, each in medians.items()
        },
        "llama_cpp_tokens_per_second": others,
        "here_over_llama_cpp": {name: medians[name] / each for name, each in others.items()},
        "answers_equal_to_merged": sum(
            one == other for one, other in zip(together, merged, strict=True)
        ),
        "versions": package_versions(),
    }
    write_json(options.output, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
