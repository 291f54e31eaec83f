"""A sweep's answers: one live-LoRA batch against the loop merge – generate – unmerge with PEFT.

    python benchmarks/population.py --diff checkpoints/sycophancy/diff

Same model, dtype, prompts, coefficients and generation code, in turn, in one process. Printed:
rows a second, the ratio to the loop, the overhead of live LoRA over the unsteered model at the
same batch, and how many answers agree token for token with those of exactly merged weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from peft import PeftModel
from peft.tuners.lora import LoraLayer

from persona_lora.core.chat import Conversation, user_question
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.runs import package_versions
from persona_lora.core.traits import load_trait
from persona_lora.models.generation import Generated, RowPlan, generate_answers
from persona_lora.models.loading import ChatModel, load_chat_model
from persona_lora.steering.live import LiveLoRA
from persona_lora.steering.weights import LoRASteerer

COEFFICIENTS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
Texts = list[str]


def texts(answers: Sequence[Generated]) -> Texts:
    return [answer.text for answer in answers]


def unsteered(chat_model: ChatModel, questions: list[Conversation], tokens: int) -> Texts:
    conversations = questions * len(COEFFICIENTS)
    return texts(generate_answers(chat_model, conversations, max_new_tokens=tokens))


def live(
    chat_model: ChatModel, diff: LoRADiff, questions: list[Conversation], tokens: int
) -> Texts:
    rows = [[value] for value in COEFFICIENTS for _ in questions]
    with LiveLoRA(chat_model.model, [diff], rows) as steerer:
        answers = generate_answers(
            chat_model,
            questions * len(COEFFICIENTS),
            max_new_tokens=tokens,
            prepare_batch=steerer.select_rows,
            plan=RowPlan(keep_rows=steerer.keep_rows),
        )
    return texts(answers)


def peft_loop(wrapped: ChatModel, questions: list[Conversation], tokens: int) -> Texts:
    model = wrapped.model
    answers: Texts = []
    for value in COEFFICIENTS:
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.set_scale("default", value)
        model.merge_adapter()
        answers += texts(generate_answers(wrapped, questions, max_new_tokens=tokens))
        model.unmerge_adapter()
    return answers


def merged_loop(
    chat_model: ChatModel, diff: LoRADiff, questions: list[Conversation], tokens: int
) -> Texts:
    answers: Texts = []
    for value in COEFFICIENTS:
        with LoRASteerer(chat_model.model, diff, value):
            answers += texts(generate_answers(chat_model, questions, max_new_tokens=tokens))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--diff", default="checkpoints/sycophancy/diff")
    parser.add_argument("--trait", default="sycophancy")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/population.json"))
    options = parser.parse_args()

    diff = LoRADiff.load(options.diff)
    chat_model = load_chat_model(dtype=options.dtype)
    plain = load_chat_model(dtype=options.dtype)
    wrapped = dataclasses.replace(
        plain, model=PeftModel.from_pretrained(plain.model, options.diff).eval()
    )
    asked = load_trait(options.trait).questions["eval"][: options.questions]
    questions = [user_question(text) for text in asked]
    variants: dict[str, Callable[[], Texts]] = {
        "unsteered": lambda: unsteered(chat_model, questions, options.tokens),
        "live": lambda: live(chat_model, diff, questions, options.tokens),
        "merged loop": lambda: merged_loop(chat_model, diff, questions, options.tokens),
        "peft loop": lambda: peft_loop(wrapped, questions, options.tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    answers: dict[str, Texts] = {}
    for _ in range(options.rounds):
        for name, variant in variants.items():
            start = time.perf_counter()
            answers[name] = variant()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    rows = len(COEFFICIENTS) * len(questions)
    equal = zip(answers["live"], answers["merged loop"], strict=True)
    result = {
        "dtype": options.dtype,
        "rows": rows,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "rows_per_second": {name: rows / each for name, each in medians.items()},
        "live_over_peft_loop": medians["peft loop"] / medians["live"],
        "live_overhead": medians["live"] / medians["unsteered"] - 1,
        "answers_equal_to_merged": sum(one == other for one, other in equal) / rows,
        "versions": package_versions(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
