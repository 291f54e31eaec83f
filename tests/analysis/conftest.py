"""A synthetic sweep run: known curve, question effects, prompting references, costs, validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persona_lora.core.runs import Run

COEFFICIENTS = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
PROMPTED = {"prompt_pos": 75.0, "prompt_neg": 25.0}
Rows = list[dict[str, Any]]
MakeRows = Callable[..., tuple[Rows, Rows]]
MakeRun = Callable[..., Run]


def _trait_mean(coefficient: float | None, method: str) -> float:
    if coefficient is None:
        return PROMPTED[method]
    return float(50 + 40 * np.tanh(coefficient))


def _coherence_mean(coefficient: float | None) -> float:
    return 90.0 if coefficient is None or abs(coefficient) < 1.8 else 30.0


def _rows(
    *,
    coefficients: Sequence[float] = COEFFICIENTS,
    prompts: Sequence[str] = ("prompt_pos", "prompt_neg"),
    questions: int = 12,
    samples: int = 1,
    noise: float = 5.0,
    seed: int = 0,
    trait: str = "sycophancy",
) -> tuple[Rows, Rows]:
    rng = np.random.default_rng(seed)
    effects = rng.normal(0, noise, questions)
    conditions = [("lora", c) for c in coefficients] + [(method, None) for method in prompts]
    answers: Rows = []
    verdicts: Rows = []
    for method, coefficient in conditions:
        for question in range(questions):
            for sample in range(samples):
                row = len(answers)
                answers.append(
                    {
                        "row": row,
                        "question_id": question,
                        "question": f"Is <claim {question}> right & fair?",
                        "sample": sample,
                        "method": method,
                        "coefficient": coefficient,
                        "system_prompt": None if coefficient is not None else "You flatter.",
                        "prompt": f"user: claim {question}",
                        "answer": f'Answer <b>{row}</b> & see http://example.org/{row} "quoted"',
                        "num_tokens": 20 + row % 5,
                        "finished": row % 10 != 0,
                    }
                )
                mean = _trait_mean(coefficient, method) + effects[question]
                score = float(np.clip(mean + rng.normal(0, noise), 0, 100))
                coherence = float(np.clip(_coherence_mean(coefficient) + rng.normal(0, 3), 0, 100))
                for criterion, value in ((trait, score), ("coherence", coherence)):
                    verdicts.append(
                        {
                            "row": row,
                            "criterion": criterion,
                            "score": value,
                            "reason": "",
                            "judge": "embedding",
                        }
                    )
    return answers, verdicts


@pytest.fixture
def sweep_rows() -> MakeRows:
    """Make the answer and verdict rows of a synthetic sweep."""
    return _rows


@pytest.fixture
def make_sweep_run(tmp_path: Path) -> MakeRun:
    """Write a synthetic sweep run folder; options as those of the rows, and the judge's AUC."""

    def make(
        name: str = "run", *, trait: str = "sycophancy", auc: float = 0.92, **rows: Any
    ) -> Run:
        answers, verdicts = _rows(trait=trait, **rows)
        config = {
            "trait": trait,
            "model": "tiny-model",
            "diff": "checkpoints/tiny/diff",
            "coefficients": list(rows.get("coefficients", COEFFICIENTS)),
            "judge": "embedding",
        }
        run = Run.open(tmp_path / name, command="sweep", config=config, seed=7)
        with run:
            run.write("answers", answers)
            run.write("verdicts", verdicts)
            run.write(
                "costs",
                [
                    {
                        "coefficient": c,
                        "relative_weight_norm": 0.03 * abs(c),
                        "kl_mean": 0.1 * c * c,
                        "kl_p95": 0.5 * c * c,
                    }
                    for c in sorted(set(config["coefficients"]))
                ],
            )
            run.write(
                "validation",
                [
                    {
                        "criterion": criterion,
                        "auc": value,
                        "spearman": 0.8,
                        "n": 60,
                        "coverage": 1.0,
                        "judge": "embedding",
                    }
                    for criterion, value in ((trait, auc), ("coherence", 0.95))
                ],
            )
        return run

    return make
