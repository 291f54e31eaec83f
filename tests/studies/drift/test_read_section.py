"""A finetune's section: what its last checkpoint changed, by a test, raw and corrected."""

from __future__ import annotations

import numpy as np
import pytest

from persona_lora.core.runs import Run
from persona_lora.report.sections import Table
from persona_lora.studies.drift.read_section import checkpoints_content

# What the judge adds: it gives finetunes 20 too little.
KIND = {"base": ("unsteered", 0.0), "checkpoint-9": ("finetuned", -20.0)}
QUESTIONS = 12


@pytest.fixture
def run(tmp_path):
    """A finetune of which each trait truly rises by what is given, from 50, with spread answers."""

    def make(rated=True, **risen):
        random = np.random.default_rng(0)
        run = Run.open(tmp_path / "run", command="evaluate-checkpoints", config={}, seed=0)
        rows = []
        for trait, by in risen.items():
            own = 15 * random.normal(size=QUESTIONS)
            compared = [
                {"model": "m", "condition": kind, "question": f"q{at}", "rating": 50.0,
                 "score": 50.0 + bias + random.normal()}
                for kind, bias in KIND.values()
                for at in range(8)
            ]  # fmt: skip
            for step, (name, (_, bias)) in enumerate(KIND.items()):
                part = Run.open(
                    tmp_path / "run" / "answers" / f"{name}_{trait}",
                    command="evaluate", config={"model": "m"}, seed=0,
                )  # fmt: skip
                asked = {"method": "none", "coefficient": None}
                scores = 50 + own + step * by + bias + random.normal(size=QUESTIONS)
                part.write(
                    "answers",
                    [
                        {"row": q, "question": f"q{q}", "question_id": q, **asked}
                        for q in range(QUESTIONS)
                    ],
                )
                verdict = {"criterion": trait, "judge": "j"}
                part.write(
                    "verdicts",
                    [{"row": q, "score": score, **verdict} for q, score in enumerate(scores)],
                )
                own_labels = {"within": 0.6, "calibration_error": 4.0, "compared": compared}
                kept = {"judge": "j", "criterion": trait, "auc": 0.9, "spearman": 0.7}
                validation = {**kept, "n": 60, "coverage": 1.0, "fit": True, "own": own_labels}
                part.write("validation", [validation] if rated else [])
                mean = float(scores.mean())
                rows.append(
                    {"checkpoint": name, "step": 9 * step, "trait": trait, "statistic": "trait",
                     "vector": None, "layer": None, "type": None, "value": mean,
                     "low": mean - 9, "high": mean + 9}
                )  # fmt: skip
        run.write("checkpoints", rows)
        run.write("cosines", [])
        return run

    return make


def corrected(content):
    return [
        each
        for each in content.blocks
        if isinstance(each, Table) and each.title.startswith("Effects corrected")
    ]


def test_a_change_is_told_by_its_paired_test_and_put_right_beside(run):
    content = checkpoints_content(run(evil=30))
    # The ends are 10 apart and their intervals 18 wide, but every question went up.
    assert content.lead.startswith("Evil goes from 5")
    assert "paired, p < 0.001)" in content.lead
    (table,) = corrected(content)
    ((name, raw, right),) = table.rows
    assert name == "checkpoint-9 − base"
    assert abs(int(raw.split()[0]) - 10) <= 1
    assert abs(int(right.split()[0]) - 30) <= 1
    assert table.title.endswith(": evil")


def test_tests_are_corrected_over_the_traits_and_nothing_unrated_is(run):
    one = checkpoints_content(run(rated=False, evil=20.6)).lead
    both = checkpoints_content(run(rated=False, evil=20.6, kind=20.6))
    assert "Evil goes from" in one
    assert "Evil does not clearly change (equal within 5 points)" in both.lead
    assert corrected(both) == []
