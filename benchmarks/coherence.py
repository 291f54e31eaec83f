"""Which measure of coherence knows the answers of a persona search? Both beside blind ratings.

    python benchmarks/coherence.py

``data/search_answers.jsonl`` holds answers of candidates, finalists and the unsteered model, with
the sense that two passes of a language model gave them (0-100) without seeing condition, score or
each other. Beside them: what persons of the conversations really said, its words shuffled, the same
under questions of other lines. A few minutes on one core.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from persona_lora.core.chat import COHERENCE, Exchange
from persona_lora.core.files import read_jsonl
from persona_lora.core.personas import list_personas, load_persona, load_persona_prompts
from persona_lora.judges.choice import sense_judge
from persona_lora.judges.coherence import shuffled_words
from persona_lora.judges.persona_judges import fit_coherence
from persona_lora.models.loading import load_chat_model
from persona_lora.studies.personas.bench import STYLE_TRAITS

RATED = Path(__file__).parent / "data" / "search_answers.jsonl"
PERSONS, LINES, DRAWS = 16, 6, 1000


def rho(rows: pd.DataFrame, measure: str) -> float:
    return float(spearmanr(rows[measure], rows["rated"]).statistic)


def lines() -> dict[str, list[Exchange]]:
    """Return real lines of persons, and what is none."""
    drawn = random.Random(3)
    real = [
        line
        for name in list_personas()[:PERSONS]
        for line in drawn.sample(list(load_persona(name).answers("test")), LINES)
    ]
    asked = load_persona_prompts().held_out
    return {
        "real lines": real,
        "their words shuffled": [Exchange(q, shuffled_words(a, drawn)) for q, a in real],
        "under other questions": [Exchange(drawn.choice(asked), a) for _, a in real],
    }


def main() -> None:
    chat_model = load_chat_model()
    scorer = fit_coherence(chat_model, STYLE_TRAITS, seed=0)
    reader = sense_judge(chat_model)
    measures = {
        "repetition and likelihood": lambda asked: scorer.verdicts(asked, COHERENCE),
        "the reader": lambda asked: reader.judge(asked, COHERENCE),
    }
    rows = pd.DataFrame(read_jsonl(RATED))
    passes = np.array(rows["sense"].tolist())
    rows["rated"] = passes.mean(axis=1)
    exchanges = [*map(Exchange, rows["question"], rows["answer"])]
    print(f"{len(rows)} answers; rho of the two passes {spearmanr(*passes.T).statistic:.2f}")
    beside = lines()
    print(f"| measure | pooled | within a condition | of condition means | {' | '.join(beside)} |")
    print("|---|---|---|---|" + "---|" * len(beside))
    for name, judged in measures.items():
        rows[name] = [each.score for each in judged(exchanges)]
        drawn = np.random.default_rng(0).integers(len(rows), size=(DRAWS, len(rows)))
        low, high = np.quantile([rho(rows.iloc[each], name) for each in drawn], [0.025, 0.975])
        by = rows.groupby("condition")
        within = np.average([rho(own, name) for _, own in by], weights=by.size())
        means = rho(by[[name, "rated"]].mean(), name)
        other = [np.mean([each.score for each in judged(own)]) for own in beside.values()]
        cells = [f"{rho(rows, name):.2f} [{low:.2f}, {high:.2f}]", f"{within:.2f}", f"{means:.2f}"]
        print(f"| {name} | {' | '.join([*cells, *(f'{each:.0f}' for each in other)])} |")


if __name__ == "__main__":
    main()
