"""Synthetic runs: a known curve or grid, question effects, references, control, divergences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persona_lora.core.runs import Run
from persona_lora.report.scores import control_name, method_of

COEFFICIENTS = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
PROMPTED = {"prompt_pos": 75.0, "prompt_neg": 25.0, "prompt_neutral": 55.0}
GRID_LAYERS = (4, 8, 12, 16)
GRID_COEFFICIENTS = (-2.0, 1.0, 2.0, 4.0)
PEAK = 12  # the layer at which a synthetic vector works best
Place = tuple[str, int | None, float | None]
Rows = list[dict[str, Any]]
MakeRows = Callable[..., tuple[Rows, Rows]]
MakeRun = Callable[..., Run]


def _trait_mean(method: str, layer: int | None, coefficient: float | None) -> float:
    if coefficient is None:
        return PROMPTED.get(method, 50.0)
    height = {"random": 4.0}.get(method_of(method), 40.0)
    if layer is not None:
        height *= np.exp(-(((layer - PEAK) / 5) ** 2))
    return float(50 + height * np.tanh(coefficient))


def _coherence_mean(method: str, coefficient: float | None) -> float:
    largest = 1.8 if method in ("lora", "none") else 3.0
    return 90.0 if coefficient is None or abs(coefficient) < largest else 30.0


def _judged(
    places: Sequence[Place],
    *,
    questions: int = 12,
    samples: int = 1,
    noise: float = 5.0,
    seed: int = 0,
    trait: str = "sycophancy",
) -> tuple[Rows, Rows]:
    """Return answers and verdicts of every question at every place."""
    rng = np.random.default_rng(seed)
    effects = rng.normal(0, noise, questions)
    cells = [(at, q, s) for at in places for q in range(questions) for s in range(samples)]
    answers: Rows = []
    verdicts: Rows = []
    for row, ((method, layer, coefficient), question, sample) in enumerate(cells):
        steered = None if method == "none" else coefficient
        answers.append(
            {
                "row": row,
                "question_id": question,
                "question": f"Is <claim {question}> right & fair?",
                "sample": sample,
                "method": method,
                "coefficient": steered,
                "system_prompt": "You flatter." if method in PROMPTED else None,
                "prompt": f"user: claim {question}",
                "answer": f'Answer <b>{row}</b> & see http://example.org/{row} "quoted"',
                "num_tokens": 20 + row % 5,
                "finished": row % 10 != 0,
                **({} if method == "lora" else {"layer": layer}),
            }
        )
        mean = _trait_mean(method, layer, coefficient) + effects[question]
        score = float(np.clip(mean + rng.normal(0, noise), 0, 100))
        coherence = _coherence_mean(method, coefficient) + rng.normal(0, 3)
        scores = ((trait, score), ("coherence", float(np.clip(coherence, 0, 100))))
        verdicts += [
            {"row": row, "criterion": each, "score": value, "reason": "", "judge": "embedding"}
            for each, value in scores
        ]
    return answers, verdicts


def _places(
    *,
    coefficients: Sequence[float] = COEFFICIENTS,
    prompts: Sequence[str] = tuple(PROMPTED),
    layers: Sequence[int] = (),
    control: int = 0,
) -> list[Place]:
    """Return the conditions of a sweep of a diff, or of a vector where layers are given."""
    prompted: list[Place] = [(method, None, None) for method in prompts]
    if not layers:
        return [*(("lora", None, each) for each in coefficients), *prompted]
    methods = ("activation", *(control_name("random", at) for at in range(control)))
    cells = [(m, at, c) for m in methods for at in layers for c in coefficients if c]
    return [("none", None, 0.0), *cells, *prompted]


def _rows(**options: Any) -> tuple[Rows, Rows]:
    chosen = {"coefficients", "prompts", "layers", "control"} & options.keys()
    places = _places(**{name: options.pop(name) for name in chosen})
    return _judged(places, **options)


@pytest.fixture
def sweep_rows() -> MakeRows:
    """Make the answer and verdict rows of a synthetic sweep, of a diff unless layers are given."""
    return _rows


@pytest.fixture
def grid_rows() -> MakeRows:
    """Make the answer and verdict rows of a synthetic grid whose best layer is ``PEAK``."""

    def make(**options: Any) -> tuple[Rows, Rows]:
        grid = {"layers": GRID_LAYERS, "coefficients": GRID_COEFFICIENTS}
        return _rows(**{**grid, **options})

    return make


@pytest.fixture
def judged() -> MakeRows:
    """Make rows at any list of (method, layer, coefficient)."""
    return _judged


def _divergences(places: Sequence[Place]) -> Rows:
    rows: Rows = []
    for method, layer, c in sorted({each for each in places if each[2] is not None}, key=str):
        if method == "none":
            continue
        norms = {"relative_weight_norm": 0.03 * abs(c)}
        if method != "lora":
            norms = {"relative_weight_norm": None, "relative_state_norm": 0.1 * abs(c)}
            norms.update(method=method, layer=layer)
        rows.append({**norms, "coefficient": c, "kl_mean": 0.1 * c * c, "kl_p95": 0.5 * c * c})
    return rows


@pytest.fixture
def make_sweep_run(tmp_path: Path) -> MakeRun:
    """Write a synthetic sweep run folder; options as those of the rows, and the judge's AUC."""

    def make(
        name: str = "run", *, trait: str = "sycophancy", auc: float = 0.92, **rows: Any
    ) -> Run:
        answers, verdicts = _rows(trait=trait, **rows)
        places = [(each["method"], each.get("layer"), each["coefficient"]) for each in answers]
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
            run.write("divergence", _divergences(places))
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
