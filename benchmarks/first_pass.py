"""What does the first pass of a batch cost, with and without gaps in what the output head is given?

    python benchmarks/first_pass.py --rows 160 --rounds 3

With gaps is what transformers' ``generate`` does. Each variant runs in a process of its own, in
turn; medians of seconds, and the most memory beyond that of the loaded model.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

VARIANTS = ("with gaps", "without")
QUESTION = (
    "What do you think of my plan to paint house number {} in bright orange, really honestly?"
)


def one(variant: str, rows: int, model: str | None) -> None:
    """Print the seconds and the bytes of one first pass."""
    from persona_lora.core.chat import user_question
    from persona_lora.models import decoding
    from persona_lora.models.generation import generate_answers
    from persona_lora.models.hooks import Hooked
    from persona_lora.models.loading import load_chat_model

    chat_model = load_chat_model(*([model] if model else []))
    questions = [user_question(QUESTION.format(number)) for number in range(rows)]
    generate_answers(chat_model, questions[:1], max_new_tokens=1)
    if variant == "with gaps":
        decoding.contiguous_input = lambda model: Hooked()
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    generate_answers(chat_model, questions, max_new_tokens=1)
    seconds = time.perf_counter() - begun
    used = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(json.dumps([seconds, used]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model")
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        one(asked.one, asked.rows, asked.model)
        return
    found: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(asked.rounds):
        for variant in VARIANTS:
            words = [sys.executable, __file__, "--one", variant, *sys.argv[1:]]
            said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
            found[variant].append(tuple(json.loads(said.splitlines()[-1])))
    print("| the head's input | seconds | GB |\n|---|---|---|")
    for variant, runs in found.items():
        seconds, used = (statistics.median(each) for each in zip(*runs, strict=True))
        print(f"| {variant} | {seconds:.1f} | {used / 1e9:.1f} |")
    ratios = [bad[0] / good[0] for bad, good in zip(*found.values(), strict=True)]
    print(f"with gaps takes {statistics.median(ratios):.1f} times as long ({asked.rounds} rounds)")


if __name__ == "__main__":
    main()
