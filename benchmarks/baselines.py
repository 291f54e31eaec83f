"""Tuned prompts over many runs, and what bounds and thresholds of a vector are ordinary.

    python benchmarks/baselines.py prompts results/prompts/*
    python benchmarks/baselines.py floor results/floor/*
    python benchmarks/baselines.py states results/ways/none --vector V.safetensors --layer 20

``prompts`` prints the held-out means of each run of ``tune-prompt`` and what the tuned prompt has
over the trait's own, with Holm's correction over all runs given. ``floor`` prints of each sweep
what the trait's own system prompts have over neutral ones, and what none has. ``states`` prints,
over the tokens of a run's answers, the tenth and the ninetieth percentile of the coordinate along a
vector (for ``--ceiling`` and ``--floor`` of ``evaluate``) and the median cosine with it (for
``--threshold``).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from persona_lora import load_chat_model, load_vector
from persona_lora.core.chat import COHERENCE, Exchange
from persona_lora.core.runs import Run
from persona_lora.models.hidden_states import BlockOutputs
from persona_lora.models.likelihood import tokenize_exchange
from persona_lora.report import wording
from persona_lora.report.comparisons import frame, means, paired
from persona_lora.report.resampling import SCORES, holm
from persona_lora.report.scores import NEUTRAL, score_answers
from persona_lora.studies.asking.prompt_tuning import NONE, OWN, TUNED, scores_by_prompt


def prompts(folders: Sequence[Path]) -> None:
    """Print every run's means, and the tuned prompt beside the trait's own, corrected over all."""
    lines, tested = [], []
    place: dict[str, Any] = {"by": "prompt", "unit": "question"}
    for folder in folders:
        run = Run(folder / "held_out")
        trait = run.record["config"]["trait"]
        rows = scores_by_prompt(run, trait)
        gap = paired(rows, value=trait, reference=OWN, **place)[TUNED]
        beyond = paired(rows, value=trait, reference=NONE, **place)[TUNED]
        score, sense = (means(rows, value=v, scale=SCORES, **place) for v in (trait, COHERENCE))
        shown = [
            wording.interval(part[way]) for way in (NONE, OWN, TUNED) for part in (score, sense)
        ]
        gaps = [wording.interval(found.difference) for found in (gap, beyond)]
        lines.append([str(folder), *shown, *gaps])
        tested.append(gap.p)
    heads = [f"{way}{what}" for way in (NONE, OWN, TUNED) for what in ("", ": coherence")]
    table = Table("run", *heads, "tuned − own", "tuned − none", "p (Holm)")
    for line, p in zip(lines, holm(tested), strict=True):
        table.add_row(*line, wording.p_value(p))
    Console(width=240).print(table)


def floor(folders: Sequence[Path]) -> None:
    """Print every sweep's means, and its prompts beside neutral ones, corrected over all."""
    lines: list[list[str]] = []
    own: list[float | None] = []
    plain: list[float | None] = []
    place: dict[str, Any] = {"by": "condition", "unit": "question"}
    for folder in folders:
        run = Run(folder)
        trait = run.record["config"]["trait"]
        rows = _by_condition(run, trait)
        score, sense = (means(rows, value=v, scale=SCORES, **place) for v in (trait, COHERENCE))
        beyond = paired(rows, value=trait, reference=NEUTRAL, **place)
        gaps = [*(beyond[each] for each in ("prompt_pos", "prompt_neg")), beyond["none"]]
        shown = [f"{wording.interval(score[w])} ({wording.number(sense[w].mean)})" for w in score]
        lines.append([str(folder), *shown, *(wording.interval(each.difference) for each in gaps)])
        own += [each.p for each in gaps[:2]]
        plain.append(gaps[2].p)
    heads = ("own + minus neutral", "own - minus neutral", "none minus neutral")
    table = Table("run", *map(str, score), *(each for head in heads for each in (head, "p (Holm)")))
    both = iter(holm(own))
    for line, last in zip(lines, holm(plain), strict=True):
        p = [wording.p_value(each) for each in (next(both), next(both), last)]
        told = zip(line[-3:], p, strict=True)
        table.add_row(*line[:-3], *(each for pair in told for each in pair))
    Console(width=260).print(table)


def _by_condition(run: Run, trait: str) -> pd.DataFrame:
    scored = score_answers(run.read("answers"), run.read("verdicts"), trait)
    rows = []
    for row in scored:
        method, coefficient = row.answer["method"], row.answer["coefficient"]
        name = "none" if coefficient == 0 else method
        rows.append(
            {
                "condition": f"{name} {'+' if coefficient > 0 else '-'}" if coefficient else name,
                "question": row.answer["question_id"],
                trait: row.trait,
                COHERENCE: row.coherence,
            }
        )
    return frame(rows, [trait, COHERENCE])


def states(run: Path, vector: Path, layer: int) -> None:
    """Print what coordinates and cosines the tokens of answers have at a layer."""
    chat, direction = load_chat_model(), load_vector(vector).directions[layer].float()
    unit = direction / direction.norm()
    along: list[torch.Tensor] = []
    cosines: list[torch.Tensor] = []

    class Taken(BlockOutputs):
        def take(self, index: int, hidden: torch.Tensor) -> None:
            tokens = hidden[0, start:].float()
            along.append(tokens @ unit)
            cosines.append(along[-1] / tokens.norm(dim=-1))

    taken = Taken(chat, [layer])
    for row in Run(run).read("answers"):
        text = tokenize_exchange(chat, Exchange(row["question"], row["answer"]))
        start = len(text.prompt)
        with torch.no_grad():
            taken.read(torch.tensor([[*text.prompt, *text.answer]]))
    low, high = torch.cat(along).quantile(torch.tensor([0.1, 0.9])).tolist()
    print(f"{len(torch.cat(along))} tokens; ‖v‖ {direction.norm():.3g}")
    print(f"--ceiling {low:.4g} (tenth percentile), --floor {high:.4g} (ninetieth)")
    alike = torch.cat(cosines)
    over = wording.percent((alike > 0).float().mean().item())
    print(f"--threshold {alike.median():.4g} (median cosine; over 0 are {over})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked = parser.add_subparsers(required=True, dest="asked")
    for name in ("prompts", "floor"):
        asked.add_parser(name).add_argument("runs", nargs="+", type=Path)
    of_states = asked.add_parser("states")
    of_states.add_argument("run", type=Path)
    of_states.add_argument("--vector", type=Path, required=True)
    of_states.add_argument("--layer", type=int, required=True)
    given = parser.parse_args()
    if given.asked == "prompts":
        prompts(given.runs)
    elif given.asked == "floor":
        floor(given.runs)
    else:
        states(given.run, given.vector, given.layer)


if __name__ == "__main__":
    main()
