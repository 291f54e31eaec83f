"""Evaluations a second of a persona search: one batch of candidates against the usual loops.

    python benchmarks/optimization.py
    python benchmarks/optimization.py --steps-only  # one step of decoding, in CPU seconds

Same model, dtype, directions, candidates, prompts and generation code, in turn, in one process:

- population: all candidates and prompts are rows of one batch, each with its own coefficients, and
  the beginning that all prompts share runs once a candidate;
- cut population: the same with differences cut to 99% of their squared norm;
- basis population: the same with differences on one basis of rank ``--basis-rank`` per module;
- whole prompts: the population without the shared beginning;
- merging loop: PEFT merges a candidate's mix, generates, unmerges, one candidate after another;
- unmerged loop: PEFT's adapters stay unmerged, with a candidate's coefficients, one after another;
- unsteered: the plain model on as many rows, with as many shared beginnings;
- unsteered, whole prompts: the plain model on as many rows, as transformers would run it.

Printed: evaluations a second, ratios, the overhead of live LoRA, the share of decoding time that
the model's own matrix products take (measured alone, at the same batch), and how the cost grows
with the population; and what one step of decoding costs at several populations, in CPU seconds,
which other work on the machine distorts least.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import operator
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.profiler import ProfilerActivity, profile

from persona_lora.core.chat import Conversation, user_question
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.personas import load_persona_prompts
from persona_lora.core.runs import package_versions
from persona_lora.core.shared_basis import on_one_basis
from persona_lora.models.generation import LARGEST_BATCH, Generated, RowPlan, generate_answers
from persona_lora.models.loading import ChatModel, load_chat_model
from persona_lora.models.structure import linear_modules, weight_of
from persona_lora.steering.live import LiveLoRA
from persona_lora.steering.steerer import Steerer, Unsteered, select_batch, select_prefix
from persona_lora.studies.personas.bench import STYLE_TRAITS

Texts = list[str]
Mixes = list[list[float]]


def texts(answers: Sequence[Generated]) -> Texts:
    return [answer.text for answer in answers]


def population(
    chat_model: ChatModel,
    diffs: list[LoRADiff],
    mixes: Mixes,
    prompts: list[Conversation],
    tokens: int,
    *,
    shared: bool = True,
) -> Texts:
    rows = [mix for mix in mixes for _ in prompts]
    with LiveLoRA(chat_model.model, diffs, rows) as steerer:
        answers = generate_answers(
            chat_model,
            prompts * len(mixes),
            max_new_tokens=tokens,
            prepare_batch=partial(select_batch, steerer),
            plan=RowPlan(
                alike=[tuple(row) for row in rows] if shared else None,
                prepare_prefix=partial(select_prefix, steerer),
                keep_rows=steerer.keep_rows,
            ),
        )
    return texts(answers)


def set_mix(wrapped: ChatModel, traits: Sequence[str], mix: list[float]) -> None:
    for module in wrapped.model.modules():
        if isinstance(module, LoraLayer):
            for trait, value in zip(traits, mix, strict=True):
                module.set_scale(trait, value)


def peft_loop(
    wrapped: ChatModel,
    traits: Sequence[str],
    mixes: Mixes,
    prompts: list[Conversation],
    tokens: int,
    *,
    merged: bool,
) -> Texts:
    answers: Texts = []
    for mix in mixes:
        set_mix(wrapped, traits, mix)
        if merged:
            wrapped.model.merge_adapter()
        answers += texts(generate_answers(wrapped, prompts, max_new_tokens=tokens))
        if merged:
            wrapped.model.unmerge_adapter()
    return answers


def with_adapters(folders: dict[str, Path], dtype: str) -> ChatModel:
    plain = load_chat_model(dtype=dtype)
    first, *others = folders
    model = PeftModel.from_pretrained(plain.model, folders[first], adapter_name=first)
    for trait in others:
        model.load_adapter(folders[trait], adapter_name=trait)
    model.base_model.set_adapter(list(folders))
    return dataclasses.replace(plain, model=model.eval())


@torch.inference_mode()
def product_seconds(
    chat_model: ChatModel,
    rows: int,
    repeats: int = 20,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the time of one decoding step's matrix products alone, at ``rows`` rows."""
    weights = [weight_of(module) for module in linear_modules(chat_model.model).values()]
    inputs = {
        size: torch.randn(rows, size, dtype=weights[0].dtype)
        for size in {weight.shape[1] for weight in weights}
    }
    times = []
    for _ in range(repeats):
        start = clock()
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        times.append(clock() - start)
    return statistics.median(times)


def product_share(chat_model: ChatModel, rows: int, tokens: int) -> float:
    """Return which share of decoding's CPU time its matrix products take when run alone.

    Of ``generate_answers`` with the unsteered model, a token more for every row; the rest is
    attention, norms, choosing tokens, and Python.
    """
    prompts = [user_question(text) for text in load_persona_prompts().train[:10]]
    asked = [prompts[at % len(prompts)] for at in range(rows)]
    taken = []
    for steps in (2, 2, 2 + tokens):  # the first warms up
        start = time.process_time()
        generate_answers(chat_model, asked, max_new_tokens=steps, plan=RowPlan(endless=True))
        taken.append(time.process_time() - start)
    step = (taken[2] - taken[1]) / tokens
    return product_seconds(chat_model, rows, clock=time.process_time) / step


@torch.inference_mode()
def step_seconds(
    chat_model: ChatModel, banks: dict[str, list[LoRADiff]], candidates: int, prompts: int
) -> dict[str, float]:
    """Return the CPU seconds of one step of decoding: unsteered, and with each bank held live.

    Each variant steps in turn, after 32 tokens of context; the least of seven turns of two steps.
    """
    mine = max(1, min(prompts, LARGEST_BATCH // candidates))  # rows of one candidate in a batch
    random = np.random.default_rng(0)
    model, times = chat_model.model, dict.fromkeys(("unsteered", *banks), float("inf"))
    ids = torch.randint(3, 1000, (candidates * mine, 1), generator=torch.Generator().manual_seed(0))
    context = torch.arange(3, 35)[None]
    for _ in range(7):
        for name in times:
            kept = model(context, use_cache=True).past_key_values
            kept.batch_repeat_interleave(len(ids))
            steerer: Steerer = Unsteered()
            if name in banks:
                drawn = 0.5 * random.standard_normal((candidates, len(banks[name])))
                rows = drawn.repeat(mine, axis=0).tolist()
                steerer = LiveLoRA(model, banks[name], rows)
            with steerer:
                steerer.select_rows(range(len(ids)))
                model(ids, past_key_values=kept)
                start = time.process_time()
                for _ in range(2):
                    model(ids, past_key_values=kept)
                times[name] = min(times[name], (time.process_time() - start) / 2)
    return times


def overheads(times: dict[str, float]) -> dict[str, float]:
    return {name: each / times["unsteered"] - 1 for name, each in times.items()}


def shares_of_operations(variant: Callable[[], Texts], most: int = 8) -> dict[str, float]:
    """Return what share of a variant's time torch's profiler gives to its largest operations."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        variant()
    times = {each.key: each.self_cpu_time_total for each in profiled.key_averages()}
    total = sum(times.values())
    largest = sorted(times, key=lambda name: -times[name])[:most]
    return {name: times[name] / total for name in largest}


def seconds_of(variant: Callable[[], Texts]) -> tuple[float, Texts]:
    start = time.perf_counter()
    answers = variant()
    return time.perf_counter() - start, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directions", type=Path, default=Path("checkpoints"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--traits", nargs="*", default=sorted(STYLE_TRAITS))
    parser.add_argument("--basis-rank", type=int, default=16)
    parser.add_argument("--steps", type=int, nargs="*", default=[4, 16, 64])
    parser.add_argument("--rows", type=int, nargs="*", default=[10, 100])
    parser.add_argument("--steps-only", action="store_true")
    parser.add_argument("--curve", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/optimization.json"))
    options = parser.parse_args()

    traits = sorted(options.traits)
    folders = {trait: options.directions / trait / "diff" for trait in traits}
    diffs = [LoRADiff.load(folder) for folder in folders.values()]
    based = on_one_basis(dict(zip(traits, diffs, strict=True)), rank=options.basis_rank)
    chat_model = load_chat_model(dtype=options.dtype)
    banks = {"stacked": diffs, "basis": [*based.diffs.values()]}
    steps = {size: step_seconds(chat_model, banks, size, options.prompts) for size in options.steps}
    of_steps = {
        "traits": traits,
        "step_ranks": {name: sum(diff.rank for diff in bank) for name, bank in banks.items()},
        "basis_rank": options.basis_rank,
        "basis_relative_error": based.errors,
        "step_cpu_seconds": steps,
        "product_share_of_decoding": {
            rows: product_share(chat_model, rows, 24) for rows in options.rows
        },
        "step_overhead": {size: overheads(times) for size, times in steps.items()},
    }
    if options.steps_only:
        print(json.dumps(of_steps, indent=2))
        return
    wrapped = with_adapters(folders, options.dtype)
    asked = load_persona_prompts().train[: options.prompts]
    prompts = [user_question(text) for text in asked]
    random = np.random.default_rng(0)
    mixes: Mixes = (0.5 * random.standard_normal((options.candidates, len(traits)))).tolist()
    tokens = options.tokens

    cut = [diff.compress(energy=0.99).diff for diff in diffs]
    candidates = [at for at in range(len(mixes)) for _ in prompts]

    def plain(alike: list[int] | None) -> Texts:
        asked = prompts * len(mixes)
        plan = RowPlan(alike=alike)
        return texts(generate_answers(chat_model, asked, max_new_tokens=tokens, plan=plan))

    variants: dict[str, Callable[[], Texts]] = {
        "unsteered": lambda: plain(candidates),
        "unsteered, whole prompts": lambda: plain(None),
        "population": lambda: population(chat_model, diffs, mixes, prompts, tokens),
        "cut population": lambda: population(chat_model, cut, mixes, prompts, tokens),
        "basis population": lambda: population(chat_model, banks["basis"], mixes, prompts, tokens),
        "whole prompts": lambda: population(
            chat_model, diffs, mixes, prompts, tokens, shared=False
        ),
        "merging loop": lambda: peft_loop(wrapped, traits, mixes, prompts, tokens, merged=True),
        "unmerged loop": lambda: peft_loop(wrapped, traits, mixes, prompts, tokens, merged=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    answers: dict[str, Texts] = {}
    for _ in range(options.rounds):
        for name, variant in variants.items():
            taken, answers[name] = seconds_of(variant)
            seconds[name].append(taken)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    curve = {}
    for size in options.curve:
        drawn = (0.5 * random.standard_normal((size, len(traits)))).tolist()
        taken, _ = seconds_of(lambda: population(chat_model, diffs, drawn, prompts, tokens))  # noqa: B023
        curve[size] = taken / size
    rows = len(mixes) * len(prompts)
    equal = {
        name: sum(map(operator.eq, answers[name], answers["merging loop"])) / rows
        for name in ("population", "cut population", "basis population", "whole prompts")
    }
    result: dict[str, Any] = {
        "dtype": options.dtype,
        "candidates": len(mixes),
        "prompts": len(prompts),
        "tokens": tokens,
        "rounds": options.rounds,
        "seconds": medians,
        "evaluations_per_second": {name: len(mixes) / each for name, each in medians.items()},
        "population_over_merging_loop": medians["merging loop"] / medians["population"],
        "population_over_unmerged_loop": medians["unmerged loop"] / medians["population"],
        "live_overhead": {
            name: medians[name] / medians["unsteered"] - 1
            for name in ("population", "cut population", "basis population")
        },
        **of_steps,
        "shares_of_operations": shares_of_operations(variants["unsteered"]),
        "ranks": {
            "population": sum(diff.rank for diff in diffs),
            "cut population": sum(
                statistics.fmean(factors.rank for factors in diff.factors.values()) for diff in cut
            ),
        },
        "matrix_product_share": product_seconds(chat_model, rows) * tokens / medians["population"],
        "answers_equal_to_merging_loop": equal,
        "seconds_per_candidate_by_population": curve,
        "versions": package_versions(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
